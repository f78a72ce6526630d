"""The peers of `benchmarks/models.py` compute what ours does, in inference and in a training step.

Needs the extra `bench`.
"""

import pathlib
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import models  # noqa: E402
import networks  # noqa: E402

SHAPE = (4, 64, 64)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return networks.make_weights(tmp_path_factory.mktemp("weights"), "I3D R50")


@pytest.mark.parametrize("blocks", models.BLOCKS)
def test_workers_agree(weights, blocks):
    """As the command builds them; and another file of weights is told apart."""
    built, passes = {}, {}
    for peer in networks.PEERS:
        worker = networks.Worker(peer, threads=2)
        built[peer, blocks] = worker.build("I3D R50", blocks, SHAPE, batch=1, weights=weights[blocks])
        passes[peer] = worker.passes
    failures, costs, differences = models.compare(built)
    assert failures == {} and set(differences[str(blocks)]) == {"pytorchvideo", "twin"}
    assert costs[str(blocks)]["macs"]["same"] > costs[str(blocks)]["macs"]["valid"]
    # With the other's padding, neither would pass.
    for peer, padding in (("pytorchvideo", "valid"), ("twin", "same")):
        theirs, ours = built[peer, blocks]["scores"], built["ours", blocks]["scores"][padding]
        assert networks.difference(theirs, ours) > 100 * models.TOLERANCE
    for peer in networks.PEERS:
        assert all(np.isfinite(float(np.asarray(passes[peer]["inference"]()[0]).max())) for _ in range(2))


@pytest.mark.parametrize("peer", ["pytorchvideo", "twin"])
def test_training_steps_do_the_same(weights, peer):
    """Without dropout: the losses of two steps, and what they change in the first, a middle and the last layer."""
    import torch

    padding = networks.PEERS[peer][2]
    clips, labels, _ = networks.make_clips(2, SHAPE)
    ours = networks.build_ours("I3D R50", 5, SHAPE, weights[5], padding, dropout=0.0)
    build = networks.build_twin if peer == "twin" else networks.build_pytorchvideo
    theirs = build("I3D R50", 5, SHAPE, weights[5], dropout=0.0)
    block = ours.get_layer("nonlocal_conv4_3")
    kernels = [ours.get_layer("conv1").kernel, block.theta.kernel, ours.get_layer("pred").kernel]
    if peer == "twin":
        parameters = [theirs.conv1_w, theirs.nonlocal_conv4_3_theta_w, theirs.pred_w]
    else:
        first, *_, res4, _, last = theirs.blocks
        parameters = [first.conv.weight, res4.res_blocks[3][1].conv_theta.weight, last.proj.weight]

    def values():
        """Both sides' kernels as (inputs, outputs) of all taps."""
        for kernel, parameter in zip(kernels, parameters, strict=True):
            a, b = np.array(kernel), np.moveaxis(parameter.detach().numpy(), (0, 1), (-1, -2))
            yield a.reshape(-1, a.shape[-1]).copy(), b.reshape(-1, b.shape[-1]).copy()

    before = list(values())
    our_step = networks.keras_passes(ours, clips, labels)["training"]
    their_step = networks.torch_passes(theirs, torch.from_numpy(clips).permute(0, 4, 1, 2, 3), labels)["training"]
    for _ in range(2):
        assert float(our_step()[0]) == pytest.approx(their_step()[0].item(), rel=1e-3)
        for (a, b), (a_before, b_before) in zip(values(), before, strict=True):
            change = np.linalg.norm(a - a_before)
            assert change > 0
            assert np.linalg.norm((a - a_before) - (b - b_before)) < 0.02 * change
