"""Settings of all tests: importable root, quiet TensorFlow, the same random numbers every time."""

import importlib.util
import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

ROOT = str(Path(__file__).resolve().parent.parent)
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)

import pytest  # noqa: E402

# What runs on the other backends. The rest is TensorFlow's (tf.data, SavedModels, unknown sizes), or reads no tensor.
# Not collected rather than skipped: a test that appears has run.
_PORTABLE = ("ops", "fast_forms", "normalization", "layers", "conformance", "rematerialization")
_PORTABLE += ("training_optimizer", "training_batch_norm", "training_loop", "visualization_drawing")
PORTABLE = {"jax": (*_PORTABLE, "compiled", "ops_jax", "training_distribution"), "torch": _PORTABLE}
BACKEND = os.environ["KERAS_BACKEND"]
if BACKEND == "tensorflow":
    collect_ignore = ["test_ops_jax.py"]
else:
    portable = {f"test_{name}.py" for name in PORTABLE[BACKEND]}
    collect_ignore = [path.name for path in Path(__file__).parent.glob("test_*.py") if path.name not in portable]
# What needs a package that the plain tests do without; CONTRIBUTING.md says how to get it.
PEERS = {
    "test_benchmarks_models_peers.py": ("torch", "torchvision", "pytorchvideo"),
    "test_checkpoints_torch.py": ("torch",),
    "test_insert_keras_hub.py": ("keras_hub",),
    "test_parity.py": ("torch",),
    "test_parity_mmaction2.py": ("torch", "mmaction", "mmcv"),
    "test_parity_slowfast.py": ("torch", "slowfast"),
}
collect_ignore += [file for file, needed in PEERS.items() if not all(map(importlib.util.find_spec, needed))]


# Files of few long tests: begun last, they would keep one process busy while the others have nothing left.
LONG = {
    f"test_{name}.py" for name in ("quickstart", "ablation", "docs", "sequence", "insert_example", "serve", "tuning")
}


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes longer than a few seconds")


@pytest.fixture(autouse=True)
def _seeds():
    # Architecture and data tests need no Keras: only those that have it loaded pay for it.
    if "keras" in sys.modules:
        sys.modules["keras"].utils.set_random_seed(0)


@pytest.fixture
def rng():
    import numpy as np

    return np.random.default_rng(0)


@pytest.fixture
def policy():
    """Sets the global dtype policy; the old one comes back after the test."""
    import keras

    before = keras.config.dtype_policy()
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy(before)
