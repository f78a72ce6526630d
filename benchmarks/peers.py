"""The non-local block of every peer, and the process in which `layers.py` runs one of them.

Every peer does the whole block, and with the same weights the same function:
`z = W_z y + x`, `y_i = 1/C(x) Σ_j f(x_i, x_j) g(x_j)`, θ, φ, g and W_z with biases, keys and values max-pooled by
(1, 2, 2) or not at all, no normalisation layer. Before anything is timed, the peer's output and the gradient of its
inputs are compared with `formula` in float64 on a small map.

A worker reads one JSON request a line and answers each with one line: `{"do": "describe"}`, then
`{"do": "build", "pairwise": …, "embedded": …, "shape": …, "pool": …}` and `{"do": "run", "mode": …, "probe": …}`.
"""

import ctypes
import gc
import importlib.metadata
import json
import os
import sys
import time

import numpy as np

TINY_SHAPE = (4, 16, 16, 8)  # as large as it must be for the sorted form of the concatenation
TOLERANCE = 1e-4  # of the largest entry, float32 against float64
POOL = (1, 2, 2)

# Peer: the pairwise functions that it has, and the packages whose versions the report names.
PEERS = {
    "ours": (None, ("tensorflow", "keras")),  # all of keras_nonlocal.ops.PAIRWISE
    "mmcv": (("gaussian", "embedded_gaussian", "dot_product", "concatenation"), ("torch", "mmcv-lite")),
    "pytorchvideo": (("embedded_gaussian", "dot_product"), ("torch", "pytorchvideo")),
    "sdpa": (("gaussian", "embedded_gaussian"), ("torch",)),
    "mha": (("embedded_gaussian",), ("tensorflow", "keras")),
    "naive": (None, ("tensorflow",)),
    "broadcast": (("concatenation",), ("tensorflow",)),
}
TORCH = ("mmcv", "pytorchvideo", "sdpa")
# pytorchvideo and mha divide the scores by √D; θ takes the factor back: the same function at the same cost.


def pools_projections(peer, pairwise, pool):
    """Whether the peer pools φ(x) and g(x) instead of x: where there is pooling, another function (footnoted)."""
    return pool and peer == "mmcv"


# The function, in float64


def make_inputs(shape, seed):
    """Inputs and the fixed tensor that the output is multiplied by. Scores have a variance of about 1, so that no
    softmax saturates: exponentials that underflow would be slow for reasons of their own."""
    rng = np.random.default_rng(seed)
    size = (1, *shape)
    x = rng.standard_normal(size, dtype="float32") * np.float32(shape[-1] ** -0.25)
    return x, rng.standard_normal(size, dtype="float32")


def make_weights(channels, embedded, has_score_kernel):
    """Weights by name, kernels as `(inputs, outputs)`; the same in every process."""
    rng, inner = np.random.default_rng(1), channels // 2
    sizes = {"theta": (channels, inner), "phi": (channels, inner), "g": (channels, inner), "out": (inner, channels)}
    if not embedded:
        del sizes["theta"], sizes["phi"]
    weights = {}
    for name, (inputs, outputs) in sizes.items():
        weights[f"{name}_kernel"] = rng.normal(size=(inputs, outputs), scale=inputs**-0.5).astype("float32")
        weights[f"{name}_bias"] = rng.normal(size=outputs, scale=0.1).astype("float32")
    if has_score_kernel:
        weights["score_kernel"] = rng.normal(size=(2 * inner, 1), scale=0.1).astype("float32")
    return weights


def formula(x, weights, pairwise, pool, pool_projections):
    """The block, straight from the equations."""
    weights = {name: value.astype("float64") for name, value in weights.items()}

    def project(x, name):
        return x @ weights[f"{name}_kernel"] + weights[f"{name}_bias"] if f"{name}_kernel" in weights else x

    def max_pool(x):
        batch, time, height, width, channels = x.shape
        return x.reshape(batch, time, height // 2, 2, width // 2, 2, channels).max((3, 5)) if pool else x

    def flatten(x):
        return x.reshape(len(x), -1, x.shape[-1])

    theta = flatten(project(x, "theta"))[:, :, None]  # B N 1 D
    if pool_projections:
        phi, g = max_pool(project(x, "phi")), max_pool(project(x, "g"))
    else:
        phi, g = project(max_pool(x), "phi"), project(max_pool(x), "g")
    phi, g = flatten(phi)[:, None], flatten(g)  # B 1 M D, B M D
    if pairwise == "concatenation":
        inner = theta.shape[-1]
        f = (theta * weights["score_kernel"][:inner, 0]).sum(-1) + (phi * weights["score_kernel"][inner:, 0]).sum(-1)
        f = np.maximum(f, 0)
    elif pairwise == "dot_product":
        f = (theta * phi).sum(-1)
    elif pairwise == "euclidean_gaussian":
        f = np.exp(-((theta - phi) ** 2).sum(-1))
    else:
        f = np.exp((theta * phi).sum(-1))
    softmax = pairwise not in ("concatenation", "dot_product")
    y = f @ g / (f.sum(-1, keepdims=True) if softmax else g.shape[1])
    return x + project(y, "out").reshape(x.shape)


# The peers. Each builder returns a function of the inputs, and the weights that need a gradient.


def build_ours(weights, pairwise, embedded, shape, pool):
    import keras_nonlocal

    layer = keras_nonlocal.NonLocal3D(pairwise=pairwise, pool_size=POOL if pool else None, normalization=None)
    layer.build((1, *shape))
    for name in ("theta", "phi", "g", "out"):
        if f"{name}_kernel" in weights:
            getattr(layer, name).set_weights([weights[f"{name}_kernel"], weights[f"{name}_bias"]])
    if "score_kernel" in weights:
        layer.score_kernel.assign(weights["score_kernel"])
    return layer, layer.trainable_variables


def build_mha(weights, pairwise, embedded, shape, pool):
    import keras
    import tensorflow as tf

    channels, inner = weights["g_kernel"].shape
    layer = keras.layers.MultiHeadAttention(num_heads=1, key_dim=inner, value_dim=inner)
    layer.build((1, None, channels), (1, None, channels))
    kernels = [weights["theta_kernel"] * np.float32(inner**0.5), weights["phi_kernel"], weights["g_kernel"]]
    biases = [weights["theta_bias"] * np.float32(inner**0.5), weights["phi_bias"], weights["g_bias"]]
    values = [array for k, b in zip(kernels, biases, strict=True) for array in (k[:, None], b[None])]
    layer.set_weights([*values, weights["out_kernel"][None], weights["out_bias"]])

    def call(x):
        keys = tensorflow_pool(x) if pool else x
        y = layer(flatten(x), flatten(keys))
        return x + tf.reshape(y, x.shape)

    def flatten(x):
        return tf.reshape(x, (x.shape[0], -1, x.shape[-1]))

    return call, layer.trainable_variables


def build_naive(weights, pairwise, embedded, shape, pool, broadcast=False):
    """The formula as one writes it down in TensorFlow, scores whole. The concatenation form repeats and concatenates
    to `(B, N, M, 2D)`, as the published implementations do; with `broadcast`, it adds `(B, N, 1)` and `(B, 1, M)`."""
    import tensorflow as tf

    variables = {name: tf.Variable(value, name=name) for name, value in weights.items()}

    def project(x, name):
        if f"{name}_kernel" not in variables:
            return x
        return tf.tensordot(x, variables[f"{name}_kernel"], 1) + variables[f"{name}_bias"]

    def concatenation(theta, phi):
        if broadcast:
            a, b = tf.split(variables["score_kernel"], 2)
            return tf.nn.relu(tf.matmul(theta, a) + tf.linalg.matrix_transpose(tf.matmul(phi, b)))
        queries, keys = theta.shape[1], phi.shape[1]
        theta = tf.tile(theta[:, :, None], (1, 1, keys, 1))
        phi = tf.tile(phi[:, None], (1, queries, 1, 1))
        pairs = tf.concat([theta, phi], axis=-1)  # B N M 2D
        return tf.nn.relu(tf.matmul(pairs, variables["score_kernel"])[..., 0])

    def call(x):
        batch, *_, channels = x.shape
        queries = tf.reshape(x, (batch, -1, channels))
        keys = tf.reshape(tensorflow_pool(x), (batch, -1, channels)) if pool else queries
        theta, phi, g = project(queries, "theta"), project(keys, "phi"), project(keys, "g")
        if pairwise == "concatenation":
            weights = concatenation(theta, phi) / g.shape[1]
        elif pairwise == "dot_product":
            weights = tf.matmul(theta, phi, transpose_b=True) / g.shape[1]
        else:
            scores = tf.matmul(theta, phi, transpose_b=True)
            if pairwise == "euclidean_gaussian":
                keys_squared = tf.linalg.matrix_transpose(tf.reduce_sum(phi**2, -1, keepdims=True))
                scores = 2 * scores - tf.reduce_sum(theta**2, -1, keepdims=True) - keys_squared
            weights = tf.nn.softmax(scores)
        return x + tf.reshape(project(tf.matmul(weights, g), "out"), x.shape)

    return call, list(variables.values())


def build_broadcast(*arguments):
    return build_naive(*arguments, broadcast=True)


def build_mmcv(weights, pairwise, embedded, shape, pool):
    from mmcv.cnn import NonLocal3d

    module = NonLocal3d(shape[-1], mode=pairwise, use_scale=False, sub_sample=pool)
    set_convolutions(
        weights,
        **{name: getattr(module, name, None) for name in ("theta", "phi", "g")},
        out=module.conv_out,
        score=getattr(module, "concat_project", None),
    )
    return module, list(module.parameters())


def build_pytorchvideo(weights, pairwise, embedded, shape, pool):
    from pytorchvideo.layers.nonlocal_net import create_nonlocal

    channels, inner = weights["g_kernel"].shape
    softmax = pairwise == "embedded_gaussian"
    instantiation = "softmax" if softmax else "dot_product"
    module = create_nonlocal(
        dim_in=channels,
        dim_inner=inner,
        pool_size=POOL if pool else None,
        instantiation=instantiation,
        norm=None,
    )
    set_convolutions(
        weights,
        theta_factor=inner**0.5 if softmax else 1.0,
        theta=module.conv_theta,
        phi=module.conv_phi,
        g=module.conv_g,
        out=module.conv_out,
    )
    return module, list(module.parameters())


def build_sdpa(weights, pairwise, embedded, shape, pool):
    import torch

    class Block(torch.nn.Module):
        def __init__(self, channels, inner):
            super().__init__()
            self.theta = torch.nn.Conv3d(channels, inner, 1) if embedded else torch.nn.Identity()
            self.phi = torch.nn.Conv3d(channels, inner, 1) if embedded else torch.nn.Identity()
            self.g = torch.nn.Conv3d(channels, inner, 1)
            self.out = torch.nn.Conv3d(inner, channels, 1)
            self.pool = torch.nn.MaxPool3d(POOL) if pool else torch.nn.Identity()

        def forward(self, x):
            keys = self.pool(x)
            # One head: (B, 1, N, D).
            theta, phi, g = (
                y.flatten(2).transpose(1, 2)[:, None] for y in (self.theta(x), self.phi(keys), self.g(keys))
            )
            y = torch.nn.functional.scaled_dot_product_attention(theta, phi, g, scale=1.0)
            return x + self.out(y[:, 0].transpose(1, 2).unflatten(2, x.shape[2:]))

    module = Block(*weights["g_kernel"].shape)
    set_convolutions(weights, theta=module.theta, phi=module.phi, g=module.g, out=module.out)
    return module, list(module.parameters())


def tensorflow_pool(x):
    """(1, 2, 2) max pooling of the frames."""
    import tensorflow as tf

    batch, frames, height, width, channels = x.shape
    x = tf.nn.max_pool2d(tf.reshape(x, (batch * frames, height, width, channels)), 2, 2, "VALID")
    return tf.reshape(x, (batch, frames, height // 2, width // 2, channels))


def set_convolutions(weights, theta_factor=1.0, score=None, **modules):
    import torch

    def copy(module, kernel, bias=None):
        # mmcv wraps a convolution, and that together with its pooling.
        convolution = next(m for m in module.modules() if isinstance(m, torch.nn.modules.conv._ConvNd))
        with torch.no_grad():
            convolution.weight.copy_(torch.from_numpy(kernel.T).reshape(convolution.weight.shape))
            if bias is not None:
                convolution.bias.copy_(torch.from_numpy(bias))

    for name, module in modules.items():
        if f"{name}_kernel" in weights:
            factor = np.float32(theta_factor if name == "theta" else 1.0)
            copy(module, weights[f"{name}_kernel"] * factor, weights[f"{name}_bias"] * factor)
    if score is not None:
        copy(score, weights["score_kernel"])


# Passes: forward, and forward + backward to the inputs and all weights, of `sum(output * cotangent)`.


def tensorflow_passes(call, variables, x, cotangent):
    import tensorflow as tf

    x, cotangent = tf.constant(x), tf.constant(cotangent)
    forward = tf.function(call, jit_compile=False)  # what `fit` does on a machine without accelerator

    @tf.function(jit_compile=False)
    def both(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(call(x) * cotangent)
        # The loss too: a graph leaves out what nobody asks for, here the last product of the forward pass.
        return [*tape.gradient(loss, [x, *variables]), loss]

    # Traced here, so that the memory of a run is that of computing.
    return {"forward": lambda: [forward(x)], "both": lambda: both(x)}, {
        "forward": lambda: forward.get_concrete_function(x),
        "both": lambda: both.get_concrete_function(x),
    }


def torch_passes(module, parameters, x, cotangent):
    import torch

    # PyTorch's own layout: channels first.
    x, cotangent = (torch.from_numpy(np.ascontiguousarray(np.moveaxis(a, -1, 1))) for a in (x, cotangent))

    def forward():
        with torch.no_grad():
            return [module(x)]

    def both():
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad((module(leaf) * cotangent).sum(), [leaf, *parameters])

    return {"forward": forward, "both": both}, {"forward": lambda: None, "both": lambda: None}


def check(peer, run, x, cotangent, weights, pairwise, pool, mode):
    """The relative error of one pass on a small map, against `formula`; raises where it is too large."""
    results = run()
    if any(result is None for result in results):
        raise ValueError("a weight has no gradient")
    result = np.asarray(results[0]).astype("float64")
    if peer in TORCH:
        result = np.moveaxis(result, 1, -1)

    def expected(x):
        return formula(x, weights, pairwise, pool, pools_projections(peer, pairwise, pool))

    if mode == "forward":
        # Without the identity path, which would agree in any case.
        difference = (result - x) - (expected(x.astype("float64")) - x)
        error = np.abs(difference).max() / np.abs(result - x).max()
    else:
        # The derivative in a random direction, as a difference quotient: a small one, for ReLU's many kinks.
        direction = np.random.default_rng(2).normal(size=x.shape)
        loss = [(expected(x + sign * 1e-7 * direction) * cotangent).sum() for sign in (1, -1)]
        slope = (loss[0] - loss[1]) / 2e-7
        result = result - cotangent  # again without the identity path
        slope = slope - (cotangent * direction).sum()
        error = np.abs((result * direction).sum() - slope) / np.linalg.norm(result)
    if not error <= TOLERANCE:
        raise ValueError(f"computes another function: {mode} differs by {error:.1e}")
    return float(error)


# Memory


def resident(field):
    """`VmRSS` or, since the last reset, the peak `VmHWM`, in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def reset_peak():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else a run reuses what an earlier one has freed, and seems to need nothing
    with open("/proc/self/clear_refs", "w") as clear_refs:
        clear_refs.write("5")


# The process


def limit_threads(threads, library):
    if library == "torch":
        import torch

        torch.set_num_threads(threads)
    else:
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)


class Worker:
    def __init__(self, peer, threads):
        self.peer, self.threads, self.passes = peer, threads, {}

    def describe(self):
        functions, packages = PEERS[self.peer]
        limit_threads(self.threads, "torch" if self.peer in TORCH else "tensorflow")
        if self.peer in ("mmcv", "pytorchvideo"):
            __import__("mmcv.cnn" if self.peer == "mmcv" else "pytorchvideo.layers.nonlocal_net")
        reply = {"versions": {name: importlib.metadata.version(name) for name in packages}, "functions": functions}
        if self.peer == "ours":
            from keras_nonlocal.ops import PAIRWISE

            reply["table"] = {name: bool(function.projections) for name, function in PAIRWISE.items()}
        return reply

    def build(self, pairwise, embedded, shape, pool):
        self.passes.clear()
        build = globals()[f"build_{self.peer}"]
        passes = torch_passes if self.peer in TORCH else tensorflow_passes
        errors = {}

        def make(shape, check_modes=()):
            weights = make_weights(shape[-1], embedded, pairwise == "concatenation")
            x, cotangent = make_inputs(shape, seed=0)
            call, variables = build(weights, pairwise, embedded, shape, pool)
            runs, traces = passes(call, variables, x, cotangent)
            for mode in check_modes:
                try:
                    errors[mode] = check(self.peer, runs[mode], x, cotangent, weights, pairwise, pool, mode)
                except Exception as error:
                    errors[mode] = describe_error(error)
            return runs, traces

        # The small map also loads kernels and starts threads before anything is measured.
        make(TINY_SHAPE, check_modes=("forward", "both"))
        self.passes, self.traces = make(shape)
        return {"check": errors}

    def run(self, mode, probe):
        """One run. A `probe` also measures memory: the peak of this run above what the process held before it."""
        if probe:
            self.traces[mode]()
            reset_peak()
        before = resident("VmRSS")
        start = time.perf_counter()
        results = self.passes[mode]()
        seconds = time.perf_counter() - start
        extra = resident("VmHWM") - before
        finite = all(
            np.isfinite(np.asarray(result.detach() if hasattr(result, "detach") else result)).all()
            for result in results
        )
        reply = {"seconds": seconds} if finite else {"failure": "result is not finite"}
        return {**reply, "extra_bytes": max(extra, 0)} if probe else reply


def describe_error(error):
    """What the table says of an exception, in a few words."""
    text = " ".join(str(error).split())
    name = type(error).__name__
    if isinstance(error, ImportError):
        return f"not installed ({text})"
    if "inplace operation" in text:
        return "in-place error"
    if "ResourceExhausted" in name or isinstance(error, MemoryError) or "can't allocate memory" in text:
        return "out of memory"
    return f"{name}: {text[:160]}"


def serve(worker):
    """Answers the requests of `layers.Process` by the methods of a worker."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not look like a reply
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = getattr(worker, request.pop("do"))(**request)
        except Exception as error:
            reply = {"failure": describe_error(error)}
        print(json.dumps(reply), file=replies, flush=True)
