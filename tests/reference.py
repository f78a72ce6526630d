"""The paper's equations in float64 NumPy: slow, plain, and without a line of the package.

Maps are channels-last, `(batch, *positions, channels)`. Loops are on purpose.
"""

import itertools
import math

import numpy as np

SOFTMAX = ("gaussian", "embedded_gaussian", "euclidean_gaussian")


def attention(theta, phi, pairwise, score_kernel=None, scale=None, mask=None):
    """f(x_i, x_j) / C(x), one pair at a time."""
    theta, phi = np.float64(theta), np.float64(phi)
    batch, num_queries, channels = theta.shape
    num_keys = phi.shape[1]
    factor = 1.0 if scale is None else channels**-0.5 if scale == "sqrt" else scale
    weights = np.zeros((batch, num_queries, num_keys))
    for b in range(batch):
        valid = [j for j in range(num_keys) if mask is None or mask[b, j]]
        if not valid:
            continue
        for i in range(num_queries):
            f = {}
            for j in valid:
                if pairwise == "euclidean_gaussian":
                    f[j] = -factor * np.sum(np.square(theta[b, i] - phi[b, j]))
                elif pairwise in SOFTMAX:
                    f[j] = factor * np.dot(theta[b, i], phi[b, j])
                elif pairwise == "dot_product":
                    f[j] = np.dot(theta[b, i], phi[b, j])
                elif pairwise == "concatenation":
                    pair = np.concatenate([theta[b, i], phi[b, j]])
                    f[j] = max(np.dot(np.float64(score_kernel)[:, 0], pair), 0.0)
                else:
                    raise AssertionError(pairwise)
            if pairwise in SOFTMAX:
                largest = max(f.values())
                f = {j: np.exp(value - largest) for j, value in f.items()}
                normalizer = sum(f.values())
            else:
                normalizer = len(valid)
            for j in valid:
                weights[b, i, j] = f[j] / normalizer
    return weights


def non_local(theta, phi, g, pairwise, score_kernel=None, scale=None, mask=None):
    """y_i = 1/C(x) Σ_j f(x_i, x_j) g(x_j)."""
    weights = attention(theta, phi, pairwise, score_kernel, scale, mask)
    y = np.zeros((*weights.shape[:2], g.shape[-1]))
    for b, i, j in np.ndindex(weights.shape):
        y[b, i] += weights[b, i, j] * np.float64(g)[b, j]
    return y


def pool_map(x, mask, pool_size):
    """Max pooling without padding, over valid positions only, and which cells have any."""
    sizes = [size // p for size, p in zip(x.shape[1:-1], pool_size, strict=True)]
    pooled = np.zeros((x.shape[0], *sizes, x.shape[-1]))
    valid = np.zeros((x.shape[0], *sizes), bool)
    for b in range(x.shape[0]):
        for cell in np.ndindex(*sizes):
            steps = [range(c * p, c * p + p) for c, p in zip(cell, pool_size, strict=True)]
            inside = [x[(b, *at)] for at in itertools.product(*steps) if mask[(b, *at)]]
            if inside:
                pooled[(b, *cell)] = np.max(inside, axis=0)
                valid[(b, *cell)] = True
    return pooled, valid


def full_mask(mask, x):
    """A mask of the leading dimensions, on every position."""
    positions = x.shape[:-1]
    if mask is None:
        return np.ones(positions, bool)
    mask = np.asarray(mask, bool)
    return np.broadcast_to(mask.reshape(mask.shape + (1,) * (len(positions) - mask.ndim)), positions)


def dense(x, weights):
    kernel, bias = weights
    return x @ np.float64(kernel) + np.float64(bias)


def batch_norm(x, weights, epsilon=1e-5):
    """Inference."""
    gamma, beta, mean, variance = (np.float64(w) for w in weights)
    return (x - mean) / np.sqrt(variance + epsilon) * gamma + beta


def _windows(sizes, window):
    """Every window's number per dimension, and its slices."""
    window = [s if w is None else w for s, w in zip(sizes, window or [None] * len(sizes), strict=True)]
    for number in np.ndindex(*[s // w for s, w in zip(sizes, window, strict=True)]):
        yield number, tuple(slice(n * w, n * w + w) for n, w in zip(number, window, strict=True))


def keys_of(x, mask, weights, name, pool_size, pool_after_projection=False):
    """φ or g of the keys' map, and which keys are valid."""
    pool_size = pool_size or (1,) * (x.ndim - 2)

    def project(x):
        return dense(x, weights[name]) if name in weights else x

    if pool_after_projection:
        return pool_map(project(x), mask, pool_size)
    pooled, valid = pool_map(x, mask, pool_size)
    return project(pooled), valid


def _window_attention(x, mask, weights, pairwise, pool_size, scale, pool_after_projection):
    """Of one window's map: f / C `(B, N, M)`, g of the keys, and the sizes of the key map."""
    phi, valid = keys_of(x, mask, weights, "phi", pool_size, pool_after_projection)
    g, _ = keys_of(x, mask, weights, "g", pool_size, pool_after_projection)
    key_sizes = valid.shape[1:]
    num_keys = math.prod(key_sizes)
    phi, g, valid = (keys.reshape(len(x), num_keys, *keys.shape[x.ndim - 1 :]) for keys in (phi, g, valid))
    queries = x.reshape(len(x), math.prod(x.shape[1:-1]), x.shape[-1])
    theta = dense(queries, weights["theta"]) if "theta" in weights else queries
    return attention(theta, phi, pairwise, weights.get("score_kernel"), scale, valid), g, key_sizes


def block(x, weights, pairwise, pool_size=None, window=None, scale=None, mask=None, pool_after_projection=False):
    """A whole non-local block at inference: z = norm(W_z y) + x.

    `weights`: theta, phi, g, out → (kernel, bias); score_kernel; norm → (γ, β, mean, variance).
    """
    x = np.float64(x)
    mask = full_mask(mask, x)
    y = np.zeros((*x.shape[:-1], weights["g"][0].shape[-1]))
    for _, part in _windows(x.shape[1:-1], window):
        at = (slice(None), *part)
        f, g, _ = _window_attention(x[at], mask[at], weights, pairwise, pool_size, scale, pool_after_projection)
        y[at] = np.einsum("bij,bjc->bic", f, g).reshape(y[at].shape)
    z = dense(y, weights["out"])
    if "norm" in weights:
        z = batch_norm(z, weights["norm"])
    return z + x


def block_attention(
    x, queries, weights, pairwise, pool_size=None, window=None, scale=None, mask=None, pool_after_projection=False
):
    """f / C of the chosen positions, over the whole map of keys: `(B, Q, *key_map)`."""
    x = np.float64(x)
    mask = full_mask(mask, x)
    sizes = x.shape[1:-1]
    result = None
    for number, part in _windows(sizes, window):
        at = (slice(None), *part)
        f, _, key_sizes = _window_attention(x[at], mask[at], weights, pairwise, pool_size, scale, pool_after_projection)
        window_sizes = x[at].shape[1:-1]
        if result is None:
            key_map = [s // w * k for s, w, k in zip(sizes, window_sizes, key_sizes, strict=True)]
            result = np.zeros((len(x), len(queries), *key_map))
        keys = tuple(slice(n * k, n * k + k) for n, k in zip(number, key_sizes, strict=True))
        for q, query in enumerate(queries):
            if all(s.start <= p < s.stop for s, p in zip(part, query, strict=True)):
                local = [p - s.start for s, p in zip(part, query, strict=True)]
                i = np.ravel_multi_index(local, window_sizes)
                result[(slice(None), q, *keys)] = f[:, i].reshape(len(x), *key_sizes)
    return result


# Networks


def conv3d(x, kernel, strides):
    """Convolution with symmetric zero padding of k // 2, one kernel tap at a time."""
    kernel = np.float64(kernel)
    taps = kernel.shape[:3]
    x = np.pad(x, [(0, 0), *[(k // 2, k // 2) for k in taps], (0, 0)])
    sizes = [(n - k) // s + 1 for n, k, s in zip(x.shape[1:4], taps, strides, strict=True)]
    result = np.zeros((len(x), *sizes, kernel.shape[-1]))
    for tap in np.ndindex(*taps):
        part = [slice(t, t + (n - 1) * s + 1, s) for t, n, s in zip(tap, sizes, strides, strict=True)]
        result += x[(slice(None), *part)] @ kernel[tap]
    return result


def max_pool3d(x, pool_size, strides):
    """Max pooling without padding."""
    sizes = [(n - k) // s + 1 for n, k, s in zip(x.shape[1:4], pool_size, strides, strict=True)]
    result = np.zeros((len(x), *sizes, x.shape[-1]))
    for cell in np.ndindex(*sizes):
        at = [slice(c * s, c * s + k) for c, s, k in zip(cell, strides, pool_size, strict=True)]
        result[(slice(None), *cell)] = x[(slice(None), *at)].max((1, 2, 3))
    return result


def relu(x):
    return np.maximum(x, 0.0)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def resnet11(x, weights, inflated, temporal_strides=(1, 1, 2)):
    """The small network with one non-local block (after res3's last), by hand.

    `weights`: layer name → list of arrays; of the non-local block a dictionary as `block` takes it.
    I3D inflates, by the table: conv1 to 5, res2_0 to 3, res3_0 to 3, and not res3_1.
    """

    def conv(x, name, strides, taps):
        (kernel,) = weights[name]
        assert kernel.shape[:3] == taps, (name, kernel.shape)
        return batch_norm(conv3d(x, kernel, strides), weights[names[name]])

    names = {"conv1": "res_conv1_bn"}
    for unit in ("res2_0", "res3_0", "res3_1"):
        for branch in ("branch1", "branch2a", "branch2b", "branch2c"):
            names[f"{unit}_{branch}"] = f"{unit}_{branch}_bn"
    one, half = (1, 1, 1), (1, 2, 2)
    three = (3, 1, 1) if inflated else one
    x = np.float64(x)
    x = relu(conv(x, "conv1", (temporal_strides[0], 2, 2), (5 if inflated else 1, 7, 7)))
    x = max_pool3d(x, (temporal_strides[1], 3, 3), (temporal_strides[1], 2, 2))
    # res2_0
    y = relu(conv(x, "res2_0_branch2a", one, three))
    y = relu(conv(y, "res2_0_branch2b", one, (1, 3, 3)))
    y = conv(y, "res2_0_branch2c", one, one)
    x = relu(conv(x, "res2_0_branch1", one, one) + y)
    x = max_pool3d(x, (temporal_strides[2], 1, 1), (temporal_strides[2], 1, 1))  # pool2
    # res3_0
    y = relu(conv(x, "res3_0_branch2a", one, three))
    y = relu(conv(y, "res3_0_branch2b", half, (1, 3, 3)))
    y = conv(y, "res3_0_branch2c", one, one)
    x = relu(conv(x, "res3_0_branch1", half, one) + y)
    # res3_1
    y = relu(conv(x, "res3_1_branch2a", one, one))
    y = relu(conv(y, "res3_1_branch2b", one, (1, 3, 3)))
    y = conv(y, "res3_1_branch2c", one, one)
    x = relu(x + y)
    x = block(x, weights["nonlocal_conv3_1"], "embedded_gaussian", pool_size=(1, 2, 2), scale="sqrt")
    return softmax(dense(x.mean((1, 2, 3)), weights["pred"]))


def batch_normalization(x, gamma, beta, epsilon, direction):
    """γ (x - m) / √(v + ε) + β over the rows of `x`, and the gradients of its product with `direction` to x, γ and β.

    By the chain rule through m and v, with all products of rows and rows.
    """
    x, gamma, beta, direction = map(np.float64, (x, gamma, beta, direction))
    count = len(x)
    mean, deviation = x.mean(axis=0), np.sqrt(x.var(axis=0) + epsilon)
    normal = (x - mean) / deviation
    d_normal = direction * gamma
    d_x = np.zeros_like(x)
    for i, j in np.ndindex(count, count):  # what row i of x does to row j of the result
        d_x[i] += d_normal[j] * ((i == j) - 1 / count - normal[i] * normal[j] / count) / deviation
    return normal * gamma + beta, (d_x, (direction * normal).sum(axis=0), direction.sum(axis=0))
