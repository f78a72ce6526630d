"""Search for the best network within a budget: a hypermodel for Keras Tuner, and a search that survives being killed.

Needs Keras Tuner: `pip install 'keras-nonlocal[tuner]'`.
"""

try:
    import keras_tuner  # noqa: F401
except ImportError as error:
    raise ImportError(
        "keras_nonlocal.tuning needs Keras Tuner: install it with pip install 'keras-nonlocal[tuner]'"
    ) from error

from keras_nonlocal.tuning.search import METHODS, TrialRow, TuningResult, tune
from keras_nonlocal.tuning.space import Costs, NonLocalHyperModel

__all__ = ["METHODS", "Costs", "NonLocalHyperModel", "TrialRow", "TuningResult", "tune"]
