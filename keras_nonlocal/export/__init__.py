"""Trained networks as files that need neither Keras nor this package."""

from .saved_model import export_saved_model, read_class_names, read_metadata
from .verify import SignatureCheck, verify_saved_model

__all__ = [
    "SignatureCheck",
    "export_saved_model",
    "read_class_names",
    "read_metadata",
    "verify_saved_model",
]
