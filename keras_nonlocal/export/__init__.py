"""Trained networks as files that need neither Keras nor this package."""

from .saved_model import export_saved_model, read_class_names

__all__ = ["export_saved_model", "read_class_names"]
