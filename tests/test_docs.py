"""The examples in the docstrings run, and every public name has a docstring."""

import doctest
import importlib
import inspect
import pkgutil

import keras
import numpy as np
import pytest

import keras_nonlocal

MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages(keras_nonlocal.__path__, keras_nonlocal.__name__ + ".")
    if not info.name.endswith("__main__")
)


def public_names(module):
    """The names of `__all__`, or else the public functions and classes of the module itself."""
    if hasattr(module, "__all__"):
        return [name for name in module.__all__ if not name.startswith("__")]
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
    ]


def undocumented(module):
    """`module.name` of all that is public and has no docstring of its own."""
    found = [] if (module.__doc__ or "").strip() else [module.__name__]
    for name in public_names(module):
        value = getattr(module, name)
        if inspect.ismodule(value) or not (inspect.isclass(value) or callable(value)):
            continue
        if not (value.__doc__ or "").strip():
            found.append(f"{module.__name__}.{name}")
        if inspect.isclass(value):
            for method, function in vars(value).items():
                # Methods that override an inherited one are documented there.
                inherited = any(hasattr(base, method) for base in value.__mro__[1:])
                if method.startswith("_") or not inspect.isfunction(function) or inherited:
                    continue
                if not (function.__doc__ or "").strip():
                    found.append(f"{module.__name__}.{name}.{method}")
    return found


# Every example of this one builds a large network.
SLOW = ("keras_nonlocal.applications.resnet",)
WITH_MARKS = [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in MODULES]


@pytest.mark.parametrize("name", ["keras_nonlocal", *WITH_MARKS])
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # examples that write, write here
    module = importlib.import_module(name)
    globs = {**vars(module), "np": np, "keras": keras, "knl": keras_nonlocal}
    options = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    result = doctest.testmod(module, extraglobs=globs, optionflags=options)
    assert result.failed == 0


@pytest.mark.parametrize("name", ["keras_nonlocal", *MODULES])
def test_public_names_have_docstrings(name):
    assert undocumented(importlib.import_module(name)) == []


def test_there_are_examples():
    """The layers' docstrings are put together: doctest must find what is in them."""
    finder = doctest.DocTestFinder()
    for name, examples in (("layers", 3), ("ops", 2), ("applications.resnet", 7)):
        module = importlib.import_module(f"keras_nonlocal.{name}")
        with_examples = [test.name for test in finder.find(module) if test.examples]
        assert len(with_examples) >= examples, with_examples


def test_a_missing_docstring_is_found(tmp_path, monkeypatch):
    source = (
        '"""Module."""\n'
        "def documented():\n    'Yes.'\n"
        "def bare():\n    pass\n"
        "class Thing:\n    'Yes.'\n    def method(self):\n        pass\n"
        "def _private():\n    pass\n"
    )
    (tmp_path / "bare_module.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("bare_module")
    assert undocumented(module) == ["bare_module.bare", "bare_module.Thing.method"]


def test_a_wrong_example_is_found(tmp_path, monkeypatch):
    (tmp_path / "wrong_example.py").write_text('"""M.\n\n>>> 1 + 1\n3\n"""\n')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(AssertionError):
        module = importlib.import_module("wrong_example")
        assert doctest.testmod(module).failed == 0
