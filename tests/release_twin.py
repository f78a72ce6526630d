"""The authors' release without the authors' files: what one holds, and the network that it means, in PyTorch.

Written from the facts in the issue tracker's reference alone, without the package: names and layouts of the files, and
the graph. `random_blobs` and `write_release` need NumPy only.
"""

import pickle
import struct

import numpy as np

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
EPSILON = 1.0000001e-5
NON_LOCAL = {
    (50, 1): {4: [4]},
    (50, 5): {3: [1, 3], 4: [1, 3, 5]},
    (50, 10): {3: [0, 1, 2, 3], 4: [0, 1, 2, 3, 4, 5]},
    (101, 1): {4: [21]},
    (101, 5): {3: [1, 3], 4: [6, 13, 20]},
    (101, 10): {3: [0, 1, 2, 3], 4: [2, 6, 10, 14, 18, 22]},
}
TRAINING = ("_momentum", "lr", "model_iter")


def positions(depth, non_local):
    """Stage → the residual blocks after which a non-local block stands."""
    if isinstance(non_local, dict):
        return non_local
    return NON_LOCAL[depth, non_local] if non_local else {}


def is_inflated(stage, block):
    """[1,1,1], [1,0,1,0], [1,0,1,0,...], [0,1,0] of an I3D's four stages."""
    return {2: True, 3: block % 2 == 0, 4: block % 2 == 0, 5: block == 1}[stage]


# Files


def random_clips(shape, count=2, seed=0):
    """Normalised clips `(count, *shape)` that differ as videos do: colours, contrast, moving patterns, noise."""
    rng = np.random.default_rng([seed, 7])
    at = np.meshgrid(*[np.arange(size) for size in shape[:3]], indexing="ij", sparse=True)
    clips = []
    for _ in range(count):
        clip = 0.3 * rng.normal(size=shape) + rng.uniform(-0.6, 0.6, 3)
        for _ in range(6):
            speed, period, phase = rng.uniform(-1, 1), rng.uniform(6, 40, 2), rng.uniform(0, 6)
            wave = np.sin(speed * at[0] + 6.28 * (at[1] / period[0] + at[2] / period[1]) + phase)
            clip += rng.uniform(-0.6, 0.6, 3) * wave[..., None]
        clips.append(clip)
    return np.float32(np.clip(clips, -2, 2.2))


def random_blobs(depth, inflated, non_local, affine=False, classes=400, image=False, seed=0, momentum=False):
    """What a file of the release holds: name → float32 array; kernels OITHW.

    The weights are random; the statistics of batch norm are near those that some small clips give, so that
    activations neither die nor grow, attention is neither flat nor a single key, and scores differ between clips.
    A few channels hardly vary, as in trained networks: there, ε matters.

    Args:
        depth: 50 or 101.
        inflated: I3D, else C2D.
        non_local: 0, 1, 5, 10 or stage → blocks.
        affine: Batch norm as scale and shift, and non-local blocks without any.
        classes: Number of classes.
        image: The ImageNet file: 4-D kernels, no non-local blocks, no head.
        seed: Of the random numbers.
        momentum: Whether also what only training needs is there.
    """
    if image and (inflated or non_local or affine):
        raise ValueError(f"An image network is plain. Received: {inflated=}, {non_local=}, {affine=}")
    rng = np.random.default_rng(seed)
    blobs = {}

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    def norm(name, y, low, high, alike=False):
        channels = y.shape[-1]
        mean, variance = y.mean((0, 1, 2, 3)), y.var((0, 1, 2, 3))
        if alike:
            # What attention gathers hardly differs within a clip: a few clips are too few for every channel's own.
            variance = np.full_like(variance, 4 * variance.mean())
        mean = mean + 0.1 * np.sqrt(variance) * normal(channels)
        variance = variance * np.exp(0.2 * normal(channels))
        gamma = np.float32(rng.uniform(low, high, channels)) * rng.choice(np.float32([1, 1, 1, -1]), channels)
        beta = 0.2 * normal(channels)
        parts = {"s": gamma, "b": beta, "rm": mean, "riv": variance}
        blobs.update({f"{name}_{part}": value for part, value in parts.items()})
        return (y - mean) * (gamma / np.sqrt(variance + np.float32(EPSILON))) + beta

    def convolution(name, norm_name, x, channels, kernel, stride=1, gamma=(0.5, 1.5)):
        w = normal(channels, x.shape[-1], *kernel) * np.float32((2 / x.shape[-1] / np.prod(kernel)) ** 0.5)
        quiet = rng.random(channels) < 0.02
        w[quiet] *= 0.004
        blobs[f"{name}_w"] = w
        y = 0
        padded = np.pad(x, [(0, 0), *[(k // 2, k // 2) for k in kernel], (0, 0)])
        frames, *sizes = x.shape[1], *[(size - 1) // stride + 1 for size in x.shape[2:4]]
        for t, i, j in np.ndindex(*kernel):
            rows, columns = (slice(k, k + (n - 1) * stride + 1, stride) for k, n in zip((i, j), sizes, strict=True))
            y = y + padded[:, t : t + frames, rows, columns] @ w[:, :, t, i, j].T
        return norm(norm_name, y, *gamma)

    def non_local_block(name, x):
        channels = x.shape[-1]
        keys = _max_pool(x, (1, 2, 2))
        inner = {}
        for part, of in (("theta", x), ("phi", keys), ("g", keys)):
            w, b = normal(channels // 2, channels) * np.float32(channels**-0.5), 0.1 * normal(channels // 2)
            blobs[f"{name}_{part}_w"], blobs[f"{name}_{part}_b"] = w[..., None, None, None], b
            inner[part] = of.reshape(len(x), -1, channels) @ w.T + b
        scores = inner["theta"] @ inner["phi"].transpose(0, 2, 1) * np.float32((channels // 2) ** -0.5)
        sharper = np.float32(1.5 / scores.std(-1).mean())
        for part in ("theta", "phi"):
            blobs[f"{name}_{part}_w"] *= sharper**0.5
            blobs[f"{name}_{part}_b"] *= sharper**0.5
        scores = np.exp(sharper * (scores - scores.max(-1, keepdims=True)))
        y = scores / scores.sum(-1, keepdims=True) @ inner["g"]
        w, b = normal(channels, channels // 2) * np.float32((2 / channels) ** 0.5), 0.1 * normal(channels)
        blobs[f"{name}_out_w"], blobs[f"{name}_out_b"] = w[..., None, None, None], b
        return x + norm(f"{name}_bn", (y @ w.T + b).reshape(x.shape), 0.3, 0.7, alike=True)

    def relu(y):
        return np.maximum(y, 0)

    x = random_clips((8, 48, 48, 3), count=6, seed=seed)
    x = relu(convolution("conv1", "res_conv1_bn", x, 64, (5 if inflated else 1, 7, 7), stride=2))
    x = _max_pool(x, (1, 3, 3), overlap=1)
    for stage, blocks in enumerate(BLOCKS[depth], 2):
        width = 32 * 2 ** (stage - 1)
        for block in range(blocks):
            name = f"res{stage}_{block}_branch"
            stride = 2 if stage > 2 and block == 0 else 1
            taps = 3 if inflated and is_inflated(stage, block) else 1
            y = relu(convolution(f"{name}2a", f"{name}2a_bn", x, width, (taps, 1, 1)))
            y = relu(convolution(f"{name}2b", f"{name}2b_bn", y, width, (1, 3, 3), stride))
            y = convolution(f"{name}2c", f"{name}2c_bn", y, 4 * width, (1, 1, 1), gamma=(0.2, 0.5))
            if block == 0:
                x = convolution(f"{name}1", f"{name}1_bn", x, 4 * width, (1, 1, 1), stride)
            x = relu(x + y)
            if block in positions(depth, non_local).get(stage, ()):
                x = non_local_block(f"nonlocal_conv{stage}_{block}", x)
        if stage == 2:
            x = _max_pool(x, (2, 1, 1))
    if image:
        blobs = {name: blob[:, :, 0] if blob.ndim == 5 else blob for name, blob in blobs.items()}
    else:
        x = x.mean((1, 2, 3))
        w = normal(classes, x.shape[-1])
        scores = (x - x.mean(0)) @ w.T
        w *= np.float32(1 / scores.std())
        blobs["pred_w"], blobs["pred_b"] = w, 0.5 * normal(classes) - w @ x.mean(0)
    if affine:
        blobs = _affine(blobs)
    if momentum:
        trained = [name for name in blobs if not name.endswith(("_rm", "_riv"))]
        blobs.update({f"{name}_momentum": 1e-3 * blobs[name] for name in trained})
        blobs["lr"], blobs["model_iter"] = np.float32([1e-4]), np.int64([400_000])
    return {name: np.asarray(blob, blob.dtype if name == "model_iter" else np.float32) for name, blob in blobs.items()}


def _max_pool(x, size, overlap=0):
    """NumPy, without padding; the windows overlap by so many rows and columns."""
    result, steps = None, (size[0], size[1] - overlap, size[2] - overlap)
    sizes = [(n - k) // s + 1 for n, k, s in zip(x.shape[1:4], size, steps, strict=True)]
    for tap in np.ndindex(*size):
        at = [slice(t, t + (n - 1) * s + 1, s) for t, n, s in zip(tap, sizes, steps, strict=True)]
        part = x[(slice(None), *at)]
        result = part if result is None else np.maximum(result, part)
    return result


def _affine(blobs):
    """Scale s γ/√(v+ε) and shift β − μγ/√(v+ε); a non-local block takes them into its last convolution."""
    result = {name: blob for name, blob in blobs.items() if "_bn_" not in name}
    for name in [name.removesuffix("_s") for name in blobs if name.endswith("_bn_s")]:
        gamma, beta, mean, variance = (np.float64(blobs[f"{name}_{part}"]) for part in ("s", "b", "rm", "riv"))
        scale = gamma / np.sqrt(variance + EPSILON)
        shift = beta - mean * scale
        if name.startswith("nonlocal"):
            out = f"{name.removesuffix('_bn')}_out"
            result[f"{out}_w"] = blobs[f"{out}_w"] * scale[:, None, None, None, None]
            result[f"{out}_b"] = blobs[f"{out}_b"] * scale + shift
        else:
            result[f"{name}_s"], result[f"{name}_b"] = scale, shift
    return result


class _Python2Pickler(pickle._Pickler):
    """Writes what Python 2 wrote: text and bytes are the same `str`, and NumPy's modules have their old names."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_text(self, text):
        data = text.encode("latin1") if isinstance(text, str) else text
        if len(data) < 256:
            self.write(pickle.SHORT_BINSTRING + struct.pack("<B", len(data)) + data)
        else:
            self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(text)

    def save_global(self, obj, name=None):
        module = obj.__module__.replace("numpy._core", "numpy.core")
        self.write(pickle.GLOBAL + f"{module}\n{name or obj.__name__}\n".encode())
        self.memoize(obj)

    dispatch[str] = dispatch[bytes] = save_text
    dispatch[type] = dispatch[type(random_clips)] = save_global


def write_release(path, blobs, affine=False):
    """A file of the release: `{"blobs": {...}}`, or of the affine form `{...}`, as Python 2 pickled it."""
    with open(path, "wb") as file:
        _Python2Pickler(file, protocol=2).dump(dict(blobs) if affine else {"blobs": dict(blobs)})


# The network


class ReleaseTwin:
    """The release's graph in float32, at test time unless `training` is set.

    Args:
        blobs: Name → array, as `random_blobs` gives.
        depth: 50 or 101.
        inflated: I3D, else C2D.
        non_local: 0, 1, 5, 10 or stage → blocks.
        affine: Whether the blobs have scale and shift in the place of batch norm.
        temporal_strides: Of conv1, pool1 and pool2. (2, 2, 2) is the paper's.
        pool1_padding: Rows and columns around the map before pool1.
        groups: Frames that the non-local blocks of res3 see at a time. `None`: all.
        non_local_pool: Sub-sampling before φ and g. `None`: none.
        scaled: Whether scores are multiplied by C_inner^-0.5.
    """

    training = False

    def __init__(
        self,
        blobs,
        depth,
        inflated,
        non_local,
        affine=False,
        temporal_strides=(1, 1, 2),
        pool1_padding=0,
        groups=None,
        non_local_pool=(1, 2, 2),
        scaled=True,
    ):
        self.blobs, self.depth, self.inflated, self.affine = blobs, depth, inflated, affine
        self.non_local = positions(depth, non_local)
        self.temporal_strides, self.pool1_padding, self.groups = temporal_strides, pool1_padding, groups
        self.non_local_pool, self.scaled = non_local_pool, scaled
        self.used = set()

    def __call__(self, clips):
        """Class probabilities of normalised clips `(batch, frames, height, width, 3)`."""
        return self.head(self.features(clips))

    def head(self, features):
        import torch
        from torch.nn import functional

        with torch.inference_mode():
            x = functional.linear(torch.from_numpy(features), self.blob("pred_w"), self.blob("pred_b"))
            left = sorted(name for name in set(self.blobs) - self.used if not name.endswith(TRAINING))
            assert not left, left
            return torch.softmax(x, -1).numpy()

    def features(self, clips):
        """What the head sees of the clips."""
        import torch

        with torch.inference_mode():
            return self.backbone(torch.from_numpy(np.float32(clips)).permute(0, 4, 1, 2, 3)).numpy()

    def backbone(self, x):
        """The same of a tensor `(batch, 3, frames, height, width)`; `benchmarks/networks.py` trains it."""
        import torch
        from torch.nn import functional

        first, second, third = self.temporal_strides
        x = self.convolution("conv1", x, (5 if self.inflated else 1, 7, 7), (first, 2, 2))
        x = torch.relu_(self.norm("res_conv1_bn", x))
        padding = (0, self.pool1_padding, self.pool1_padding)
        x = functional.max_pool3d(x, (second, 3, 3), (second, 2, 2), padding)
        for stage, blocks in enumerate(BLOCKS[self.depth], 2):
            for block in range(blocks):
                x = self.residual_block(stage, block, x)
                if block in self.non_local.get(stage, ()):
                    groups = self.groups if stage == 3 else None
                    x = self.non_local_block(f"nonlocal_conv{stage}_{block}", x, groups)
            if stage == 2:
                x = functional.max_pool3d(x, (third, 1, 1), (third, 1, 1))
        return x.mean((2, 3, 4))

    def blob(self, name):
        import torch

        self.used.add(name)
        return torch.from_numpy(self.blobs[name])

    def convolution(self, name, x, kernel, stride=(1, 1, 1)):
        from torch.nn import functional

        w = self.blob(f"{name}_w")
        assert w.shape[2:] == kernel, (name, w.shape)
        b = self.blob(f"{name}_b") if f"{name}_b" in self.blobs else None
        return functional.conv3d(x, w, b, stride, [k // 2 for k in kernel])

    def norm(self, name, x):
        from torch.nn import functional

        gamma, beta = self.blob(f"{name}_s"), self.blob(f"{name}_b")
        if self.affine:
            return x * gamma[:, None, None, None] + beta[:, None, None, None]
        mean, variance = self.blob(f"{name}_rm"), self.blob(f"{name}_riv")
        return functional.batch_norm(x, mean, variance, gamma, beta, self.training, momentum=0.1, eps=EPSILON)

    def residual_block(self, stage, block, x):
        import torch

        name = f"res{stage}_{block}_branch"
        stride = (1, 2, 2) if stage > 2 and block == 0 else (1, 1, 1)
        taps = 3 if self.inflated and is_inflated(stage, block) else 1
        y = torch.relu_(self.norm(f"{name}2a_bn", self.convolution(f"{name}2a", x, (taps, 1, 1))))
        y = torch.relu_(self.norm(f"{name}2b_bn", self.convolution(f"{name}2b", y, (1, 3, 3), stride)))
        y = self.norm(f"{name}2c_bn", self.convolution(f"{name}2c", y, (1, 1, 1)))
        if block == 0:
            x = self.norm(f"{name}1_bn", self.convolution(f"{name}1", x, (1, 1, 1), stride))
        return torch.relu_(x + y)

    def non_local_block(self, name, x, groups=None):
        """z = norm(W_z y) + x, of all frames or of so many at a time."""
        import torch
        from torch.nn import functional

        if groups is not None:
            assert x.shape[2] % groups == 0, (x.shape, groups)
            return torch.cat([self.non_local_block(name, part) for part in x.split(groups, dim=2)], dim=2)
        keys = x if self.non_local_pool is None else functional.max_pool3d(x, self.non_local_pool)
        theta, phi, g = (
            self.convolution(f"{name}_{part}", of, (1, 1, 1)).flatten(2)
            for part, of in (("theta", x), ("phi", keys), ("g", keys))
        )
        scores = theta.transpose(1, 2) @ phi
        if self.scaled:
            scores = scores * theta.shape[1] ** -0.5
        y = (torch.softmax(scores, -1) @ g.transpose(1, 2)).transpose(1, 2)
        z = self.convolution(f"{name}_out", y.reshape(len(x), -1, *x.shape[2:]), (1, 1, 1))
        return x + (z if self.affine else self.norm(f"{name}_bn", z))
