"""Which network a foreign weight file holds, and that network as a file of Keras.

Shape letters: T, H, W the sizes of a kernel; I input channels, O output channels.
"""

import dataclasses
import os
import pathlib
import re
import tempfile

from keras_nonlocal import checkpoints
from keras_nonlocal.applications import weights as network_weights
from keras_nonlocal.applications.resnet import ARRANGEMENTS, NETWORKS


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What `convert_checkpoint` found and did. `str()` of it is a report.

    Args:
        source: Path of the checkpoint.
        out: Path of the file that was written.
        checkpoint: `keras_nonlocal.checkpoints.Checkpoint`: format, arrays, what was ignored and what is unknown.
        network: Name of the network, a key of `NETWORKS`.
        options: Arguments with which its function builds it.
        filling: `keras_nonlocal.applications.weights.Filling`: every weight of the model and array of the file.
    """

    source: str
    out: str
    checkpoint: checkpoints.Checkpoint
    network: str
    options: dict
    filling: network_weights.Filling

    @property
    def code(self):
        """The Python expression that builds the network with the weights that were written."""
        if self.out.endswith(".keras"):
            return f"keras.saving.load_model({self.out!r})"
        options = {"weights": self.out} | self.options
        arguments = ", ".join(f"{name}={value!r}" for name, value in options.items())
        return f"{NETWORKS[self.network].__name__}({arguments})"

    def __str__(self):
        checkpoint, filling = self.checkpoint, self.filling
        lines = [
            f"{self.source}: {checkpoint.format} file, {len(checkpoint.weights)} arrays"
            f"{' of an image network' if checkpoint.images else ''}",
            f"{self.network}: {len(filling.filled)} weights filled, {len(filling.inflated)} of them inflated in time",
        ]
        lines += _listing("filled with a normalization taken in or left neutral", filling.folded)
        lines += _listing("not filled, as the file has no such weights", filling.not_filled)
        lines += _listing("not used, as the network has no such weights", filling.not_used)
        reasons = {}
        for name, reason in checkpoint.ignored.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            lines += _listing(f"ignored, {reason}", map(repr, names))
        unknown = [f"{name!r} {shape}" for name, shape in checkpoint.unknown.items()]
        lines += _listing("not used, as the format has no such name", unknown)
        lines += [f"Wrote {self.out}: {self.code}"]
        return "\n".join(lines)


def identify(checkpoint):
    """Finds out which network a checkpoint is of.

    Args:
        checkpoint: `keras_nonlocal.checkpoints.Checkpoint`.

    Returns:
        The network's name, a key of `NETWORKS`, and the arguments that its function needs.

    Raises:
        ValueError: if its blocks are those of no network here.
    """
    arrays = checkpoint.weights
    blocks = {}
    for path in arrays:
        if match := re.fullmatch(r"res(\d)_(\d+)_branch2a/kernel", path):
            stage, block = map(int, match.groups())
            blocks.setdefault(stage, set()).add(block)
    counts = tuple(len(blocks[stage]) for stage in sorted(blocks))
    stem = arrays.get("conv1/kernel")
    width = None if stem is None else stem.shape[-1]
    depth = next((d for d, row in ARRANGEMENTS.items() if (row.blocks, row.width) == (counts, width)), None)
    if depth is None:
        known = "; ".join(f"ResNet-{d}: {row.blocks} blocks, width {row.width}" for d, row in ARRANGEMENTS.items())
        raise ValueError(
            f"The {checkpoint.format} file must hold one of these networks: {known}. "
            f"Received: {counts} blocks, width {width}"
        )
    temporal = {
        branch: any(array.shape[0] > 1 for path, array in arrays.items() if path.endswith(f"{branch}/kernel"))
        for branch in ("branch2a", "branch2b")
    }
    inflated = any(temporal.values())
    options = {}
    if temporal["branch2b"]:
        options["inflation"] = "3x3x3"
    placement = {}
    for path in arrays:
        if match := re.fullmatch(r"nonlocal_conv(\d)_(\d+)/g/kernel", path):
            stage, block = map(int, match.groups())
            placement.setdefault(stage, []).append(block)
    options["non_local"] = {stage: sorted(indices) for stage, indices in sorted(placement.items())}
    for number, rows in ARRANGEMENTS[depth].non_local.items():
        if options["non_local"] == {stage: sorted(indices) for stage, indices in rows.items()}:
            options["non_local"] = number
    if not placement:
        options["non_local"] = 0
    head = arrays.get("pred/kernel")
    if head is None:
        options["include_top"] = False
    else:
        options["classes"] = head.shape[-1]
    return f"{'i3d' if inflated else 'c2d'}_resnet{depth}", options


def convert_checkpoint(source, out, model=None):
    """Writes a foreign weight file as one of Keras.

    The network is found out from the file. Nothing is written unless every weight of the network was filled, but for
    those that the file cannot have: non-local blocks, which start as the identity, and for image networks the head.

    Args:
        source: Path of a file that `keras_nonlocal.checkpoints.read` reads.
        out: Path to write, `.weights.h5` or `.keras`; must not exist.
        model: Name of the network to fill, such as `"i3d_resnet50"` for a file of an image network. `None`: the one
            that the file is of.

    Returns:
        A `Conversion`, which prints as a report.

    Raises:
        ValueError: if the file is of no known format, or the network does not fit it, or `out` exists.

    Example:

    >>> conversion = convert_checkpoint("i3d_nonlocal_8x8_IN_pretrain_400k.pkl", "i3d.weights.h5")  # doctest: +SKIP
    """
    source, out = os.fspath(source), pathlib.Path(out)
    if not out.name.endswith((".weights.h5", ".keras")):
        raise ValueError(f"`out` must end with .weights.h5 or .keras. Received: out={str(out)!r}")
    if out.exists():
        raise ValueError(f"`out` must not exist yet. Received: out={str(out)!r}")
    if not out.parent.is_dir():
        raise ValueError(f"`out` must be in a folder that exists. Received: out={str(out)!r}")
    if not os.path.isfile(source):
        raise ValueError(f"The checkpoint must be a file. Received: {source!r}")
    checkpoint = checkpoints.read(source)
    name, options = identify(checkpoint)
    if model is not None:
        depth = name.split("_")[1]
        fitting = [network for network in NETWORKS if network.endswith("_" + depth)]
        if model not in fitting:
            raise ValueError(
                f"`model` must be {' or '.join(fitting)}, as the file is of a {depth}. Received: model={model!r}"
            )
        name = model
    if checkpoint.images:  # of which a video network takes the backbone
        options.pop("classes", None)
        options["include_top"] = False
    options = options | checkpoint.settings
    network = NETWORKS[name](**options)
    filling = network_weights.load(network, checkpoint)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        written = pathlib.Path(scratch) / out.name
        if out.suffix == ".keras":
            network.save(written)
        else:
            network.save_weights(written)
            checkpoints.keras3.write_settings(written, checkpoint.settings)
        _publish(written, out)
    return Conversion(source, str(out), checkpoint, name, options, filling)


def _publish(written, out):
    """Gives a file that is whole its name, which nobody may have taken meanwhile."""
    try:
        os.link(written, out)
    except FileExistsError as error:
        raise ValueError(f"`out` must not exist yet. Received: out={str(out)!r}") from error
    except OSError:  # a file system without links
        os.replace(written, out)


def _listing(title, names):
    names = list(names)
    return [f"  {title} ({len(names)}):", *(f"    {name}" for name in names)] if names else []
