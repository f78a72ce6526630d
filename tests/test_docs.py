"""The examples in the docstrings run, and every public name has a docstring."""

import doctest
import importlib
import inspect
import pathlib
import pkgutil
import re
import shlex

import keras
import numpy as np
import pytest

import keras_nonlocal
from keras_nonlocal import cli
from keras_nonlocal.applications import I3DResNet11
from keras_nonlocal.data import write_video
from keras_nonlocal.training import read_recipe
from tests.test_conversion import values_of, write_release
from tests.test_summary import TABLE

ROOT = pathlib.Path(__file__).resolve().parents[1]
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


def readme_blocks(language):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_readme_is_finished_and_its_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not re.findall(r"@\w+@", text)
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert links and all((ROOT / link).exists() for link in links), links


def test_readme_recipe(tmp_path):
    """What its comments say."""
    (recipe,) = readme_blocks("yaml")
    (tmp_path / "mine.yaml").write_text(recipe)
    recipe = read_recipe(tmp_path / "mine.yaml")
    assert (recipe.num_steps, recipe.scaled_learning_rate, recipe.scaled_milestones) == (20000, 0.00125, (8000, 16000))
    assert read_recipe("kinetics-8x8").weights == "imagenet"


def test_readme_code_runs(tmp_path, monkeypatch):
    """As printed, but for the size of the network and the number of views."""
    blocks = readme_blocks("python")
    assert len(blocks) == 3
    exec(blocks[0], {})
    for split in ("train", "test"):
        for level, name in enumerate(("dark", "light")):
            folder = tmp_path / "videos" / split / name
            folder.mkdir(parents=True)
            write_video(folder / "clip.mp4", np.full((12, 64, 80, 3), 60 + 120 * level, "uint8"))
    smaller = blocks[1]
    for printed, small in (
        ("I3DResNet50(", "I3DResNet11("),
        ("non_local=5", "non_local=2"),
        ("views=(10, 3)", "views=(2, 3)"),
    ):
        assert printed in smaller
        smaller = smaller.replace(printed, small)
    monkeypatch.chdir(tmp_path)
    exec(smaller, {})
    assert (tmp_path / "served" / "actions" / "1" / "saved_model.pb").exists()


def test_readme_takes_the_weights_of_others(tmp_path, monkeypatch):
    """As printed, but for the size of the network."""
    model = I3DResNet11()
    printed = readme_blocks("python")[2]
    path = re.search(r'weights="(.*?)"', printed).group(1)
    write_release(tmp_path / path, values_of(model))
    assert printed.count("I3DResNet50(") == 2
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(printed.replace("I3DResNet50(", "I3DResNet11(non_local=2, "), names)
    assert names["long_clips"].get_layer("nonlocal_conv3_0").window == (4, None, None)
    for name in ("model", "long_clips"):
        for path, value in values_of(names[name]).items():
            np.testing.assert_array_equal(value, values_of(model)[path])


def test_readme_table_of_networks():
    """Line by line what tests/test_summary.py holds the networks to."""
    expected = []
    for name, non_local, options, parameters, short, long, activations, shares in TABLE:
        options = "".join(f', {key}="{value}"' for key, value in options.items())
        network = f"`{name}(non_local={non_local}{options})`"
        expected.append(f"| {network} | {parameters} M | {short} | {long} | {activations} MiB | {shares} |")
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith(("| `C2DResNet", "| `I3DResNet"))] == expected


def test_readme_commands_parse():
    """Every `keras-nonlocal …` line is one that the parser takes."""
    lines = [line for block in readme_blocks("bash") for line in block.splitlines()]
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("keras-nonlocal ")]
    assert len(commands) == 16
    for command in commands:
        cli._parser().parse_args(command)
