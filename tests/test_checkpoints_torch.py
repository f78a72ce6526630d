"""Files that PyTorch itself wrote, read without it."""

import argparse
import collections
import datetime
import os
import pathlib

import numpy as np
import pytest
import torch

from keras_nonlocal import checkpoints
from tests import checkpoint_files as write
from tests.test_checkpoints import FIRST, assert_same

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def save(tree, path, zipped):
    torch.save(tree, path, _use_new_zipfile_serialization=zipped)


class Bottleneck(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = torch.nn.Conv2d(4, 3, 1, bias=False), torch.nn.BatchNorm2d(3)
        self.conv2, self.bn2 = torch.nn.Conv2d(3, 3, 3, bias=False), torch.nn.BatchNorm2d(3)
        self.downsample = torch.nn.Sequential(torch.nn.Conv2d(4, 3, 1, bias=False), torch.nn.BatchNorm2d(3))


class Network(torch.nn.Module):
    """With torchvision's names."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = torch.nn.Conv2d(3, 4, 7, bias=False), torch.nn.BatchNorm2d(4)
        self.layer1 = torch.nn.Sequential(Bottleneck())
        self.fc = torch.nn.Linear(3, 5)


@FORMATS
@pytest.mark.parametrize("name", ["pyslowfast", "mmaction2", "torchvision"])
def test_state_dictionaries(name, zipped, tmp_path):
    arrays, expected = write.file_of(name, FIRST, image=name == "torchvision")
    state = collections.OrderedDict((key, torch.from_numpy(array)) for key, array in arrays.items())
    key = {"pyslowfast": "model_state", "mmaction2": "state_dict", "torchvision": "model"}[name]
    save({"epoch": 1, key: state}, tmp_path / "a.pth", zipped)
    checkpoint = checkpoints.read(tmp_path / "a.pth")
    assert checkpoint.format == name
    assert_same(checkpoint.weights, expected)
    assert checkpoint.ignored == {"epoch": f"not among the weights, which are in {key!r}"}


@FORMATS
def test_modules_and_what_is_beside_them(zipped, tmp_path):
    network = torch.nn.DataParallel(Network())
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    sum(parameter.sum() for parameter in network.parameters()).backward()
    optimizer.step()
    tree = {
        "state_dict": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(lr=0.1, out=pathlib.PosixPath("x")),
        "meta": collections.defaultdict(list, time=[datetime.datetime(2020, 1, 1)], loss=[np.float64(0.5)]),
        "history": np.arange(3.0),
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "sizes": torch.Size([1, 2]),
        "seen": {1, 2},
    }
    save(tree, tmp_path / "a.pth", zipped)
    checkpoint = checkpoints.read(tmp_path / "a.pth")
    state = {name.removeprefix("module."): tensor.numpy() for name, tensor in network.state_dict().items()}
    weights = checkpoint.weights
    assert weights["conv1/kernel"].shape == (1, 7, 7, 3, 4)
    np.testing.assert_array_equal(weights["conv1/kernel"][0], np.einsum("oihw->hwio", state["conv1.weight"]))
    np.testing.assert_array_equal(
        weights["res2_0_branch1/kernel"][0, 0, 0], state["layer1.0.downsample.0.weight"][:, :, 0, 0].T
    )
    np.testing.assert_array_equal(weights["pred/kernel"], state["fc.weight"].T)
    np.testing.assert_array_equal(weights["res2_0_branch2b_bn/moving_variance"], np.ones(3))
    counters = {"module." + name for name in state if name.endswith("num_batches_tracked")}
    assert set(checkpoint.ignored) == counters | set(tree) - {"state_dict"}
    assert len(weights) == len(state) - len(counters) and checkpoint.unknown == {}


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.uint8])
def test_dtypes(dtype, zipped, tmp_path):
    kernel = torch.arange(24).reshape(2, 3, 4, 1).to(dtype)
    save({"layer1.0.conv1.weight": kernel}, tmp_path / "a", zipped)
    weights = checkpoints.read(tmp_path / "a").weights
    expected = np.arange(24.0).reshape(2, 3, 4, 1).transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(weights["res2_0_branch2a/kernel"][0], expected)


@FORMATS
def test_views(zipped, tmp_path):
    """Tensors that share a storage, channels last, or transposed."""
    numbers = torch.arange(200.0)
    kernel = numbers[5:29].reshape(2, 3, 4, 1)
    tree = {
        "layer1.0.conv1.weight": kernel.permute(1, 0, 2, 3),
        "layer1.0.conv2.weight": kernel.contiguous(memory_format=torch.channels_last),
        "layer1.0.conv3.weight": torch.nn.Parameter(kernel[:, ::2]),
        "fc.weight": numbers[:6].reshape(3, 2).t(),
    }
    save(tree, tmp_path / "a", zipped)
    weights = checkpoints.read(tmp_path / "a").weights
    for path, name in (
        ("res2_0_branch2a", "layer1.0.conv1.weight"),
        ("res2_0_branch2b", "layer1.0.conv2.weight"),
        ("res2_0_branch2c", "layer1.0.conv3.weight"),
    ):
        expected = tree[name].detach().numpy().transpose(2, 3, 1, 0)
        np.testing.assert_array_equal(weights[path + "/kernel"][0], expected)
    np.testing.assert_array_equal(weights["pred/kernel"], [[0, 1], [2, 3], [4, 5]])


@FORMATS
@pytest.mark.parametrize("protocol", [2, 4])
def test_functions_are_refused(zipped, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Evil:
        def __reduce__(self):
            return os.system, ("touch PWNED",)

    tree = {"state_dict": {"layer1.0.conv1.weight": torch.zeros(2, 3, 1, 1)}, "meta": [Evil()]}
    torch.save(tree, "evil.pth", _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    match = "asks for 'posix.system', which is no array.*nothing was run.*Received: path="
    with pytest.raises(ValueError, match=match):
        checkpoints.read("evil.pth")
    assert os.listdir() == ["evil.pth"]


@FORMATS
def test_whole_modules_are_refused(zipped, tmp_path):
    save(torch.nn.Linear(2, 3), tmp_path / "a", zipped)
    with pytest.raises(ValueError, match="asks for 'torch.nn.modules.linear.Linear'"):
        checkpoints.read(tmp_path / "a")


def test_torchscript_is_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 3)).save(tmp_path / "a")
    with pytest.raises(ValueError, match="asks for '__torch__.torch.nn.modules.linear.Linear'"):
        checkpoints.read(tmp_path / "a")
