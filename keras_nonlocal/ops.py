"""The non-local operation on `(batch, positions, channels)` arrays.

`y_i = 1/C(x) Σ_j f(x_i, x_j) g(x_j)` (Wang et al., "Non-local Neural Networks", CVPR 2018, section 3),
for the pairwise functions f in the table `PAIRWISE`. Everything is `keras.ops`, so it runs on every backend.

Shape letters:
    B: batch (or batch × windows)
    N: query positions, index i
    M: key positions, index j (fewer than N after sub-sampling)
    C: channels of theta and phi
    D: channels of g
"""

import dataclasses
from collections.abc import Callable

import keras
from keras import ops

# Scores of one sample that are held whole before "auto" cuts the queries into chunks (float32: 16 MiB).
AUTO_MAX_SCORES = 2**22


@dataclasses.dataclass(frozen=True)
class PairwiseFunction:
    """One row of the table of pairwise functions.

    Args:
        scores: `(theta, phi, score_kernel) -> (B, N, M)`. The exponent of f where `softmax`, else f itself.
        softmax: `True` where f = exp(scores) and C(x) = Σ_j f, so that f / C is a softmax over the keys;
            `False` where f = scores and C(x) is the number of keys.
        embedded: whether θ and φ are learned projections of x, or x itself.
        has_score_kernel: whether f has a weight vector w_f of its own, of shape `(2 * C, 1)`.
        reassociate: an exact form that needs no scores, `(theta, phi, g) -> (B, N, D)`, or `None`.
    """

    scores: Callable
    softmax: bool
    embedded: bool = True
    has_score_kernel: bool = False
    reassociate: Callable | None = None


def _dot_scores(theta, phi, score_kernel=None):
    return ops.matmul(theta, ops.transpose(phi, (0, 2, 1)))  # B N M


def _concatenation_scores(theta, phi, score_kernel):
    # w_f·[θ_i, φ_j] = w_θ·θ_i + w_φ·φ_j: the (B, N, M, 2C) concatenation never exists.
    channels = theta.shape[-1]
    a = ops.matmul(theta, score_kernel[:channels])  # B N 1
    b = ops.matmul(phi, score_kernel[channels:])  # B M 1
    return ops.relu(a + ops.transpose(b, (0, 2, 1)))  # B N M


def _dot_reassociated(theta, phi, g):
    # (θ φᵀ) g = θ (φᵀ g): linear in the number of positions.
    return ops.matmul(theta, ops.matmul(ops.transpose(phi, (0, 2, 1)), g))


PAIRWISE = {
    "gaussian": PairwiseFunction(_dot_scores, softmax=True, embedded=False),
    "embedded_gaussian": PairwiseFunction(_dot_scores, softmax=True),
    "dot_product": PairwiseFunction(_dot_scores, softmax=False, reassociate=_dot_reassociated),
    "concatenation": PairwiseFunction(_concatenation_scores, softmax=False, has_score_kernel=True),
}


def get_pairwise(pairwise):
    """Returns the row of `PAIRWISE` with the name `pairwise`, or raises a `ValueError`."""
    if not isinstance(pairwise, str) or pairwise not in PAIRWISE:
        raise ValueError(f"`pairwise` must be one of {', '.join(map(repr, PAIRWISE))}. Received: pairwise={pairwise!r}")
    return PAIRWISE[pairwise]


def get_scale(scale, channels):
    """Returns the factor on the softmax scores that `scale` (`None`, `"sqrt"` or a number) names."""
    if scale is None:
        return 1.0
    if scale == "sqrt":
        return channels**-0.5
    if isinstance(scale, (int, float)) and not isinstance(scale, bool):
        return float(scale)
    raise ValueError(f'`scale` must be `None`, "sqrt" or a number. Received: scale={scale!r}')


def attention_weights(theta, phi, pairwise="embedded_gaussian", *, score_kernel=None, scale=None, mask=None):
    """Normalised weights f(x_i, x_j) / C(x) of every query over every key, in float32.

    Args:
        theta: Queries, tensor of shape `(batch, queries, channels)`.
        phi: Keys, tensor of shape `(batch, keys, channels)`.
        pairwise: The pairwise function f, see `keras_nonlocal.ops.non_local`.
        score_kernel: w_f of the concatenation form, tensor of shape `(2 * channels, 1)`.
        scale: Factor on softmax scores: `None` (1), `"sqrt"` (`channels ** -0.5`) or a number.
        mask: Boolean tensor of shape `(batch, keys)`, `False` removes a key.

    Returns:
        Float32 tensor of shape `(batch, queries, keys)`. A query without any valid key has only zeros.

    Raises:
        ValueError: if `pairwise` or `scale` is unknown.

    Example:

    >>> weights = attention_weights(np.zeros((1, 3, 2), "float32"), np.zeros((1, 4, 2), "float32"))
    >>> np.asarray(weights)[0, 0].tolist()
    [0.25, 0.25, 0.25, 0.25]
    """
    theta, phi = ops.convert_to_tensor(theta), ops.convert_to_tensor(phi)
    function = get_pairwise(pairwise)
    _check_score_kernel(function, score_kernel, theta.shape[-1])
    factor = get_scale(scale, theta.shape[-1])
    key_mask = None if mask is None else ops.expand_dims(mask, 1)  # B 1 M
    if function.softmax:
        # Scaling θ rather than the scores is N·C instead of N·M work, and keeps float16 scores small.
        queries = theta if factor == 1.0 else theta * ops.cast(factor, theta.dtype)
        scores = ops.cast(function.scores(queries, phi, score_kernel), "float32")
        if key_mask is None:
            return _softmax(scores)
        weights = _softmax(ops.where(key_mask, scores, -3e38))
        return ops.where(key_mask, weights, 0.0)  # a row with no valid key is 0, not uniform
    scores = ops.cast(function.scores(theta, phi, score_kernel), "float32")
    if key_mask is None:
        return scores / ops.cast(ops.shape(phi)[1], "float32")
    return ops.where(key_mask, scores, 0.0) / _num_valid(mask)


def non_local(
    theta,
    phi,
    g,
    pairwise="embedded_gaussian",
    *,
    score_kernel=None,
    scale=None,
    mask=None,
    query_chunk_size="auto",
):
    """The non-local operation: each query's weighted sum of g over all keys.

    `y_i = 1/C(x) Σ_j f(x_i, x_j) g(x_j)` with

    | `pairwise`            | f(x_i, x_j)                    | C(x)           |
    |-----------------------|--------------------------------|----------------|
    | `"gaussian"`          | exp(θ_iᵀ φ_j), θ = φ = x       | Σ_j f          |
    | `"embedded_gaussian"` | exp(θ_iᵀ φ_j)                  | Σ_j f          |
    | `"dot_product"`       | θ_iᵀ φ_j                       | number of keys |
    | `"concatenation"`     | ReLU(w_fᵀ [θ_i, φ_j])          | number of keys |

    The dot product is re-associated to θ (φᵀ g) / M wherever that takes fewer operations.
    The other forms hold `query_chunk_size` rows of scores at a time and recompute them in the backward pass.

    Args:
        theta: Queries, tensor of shape `(batch, queries, channels)`.
        phi: Keys, tensor of shape `(batch, keys, channels)`.
        g: Values, tensor of shape `(batch, keys, value_channels)`.
        pairwise: `"gaussian"`, `"embedded_gaussian"`, `"dot_product"` or `"concatenation"`.
        score_kernel: w_f of the concatenation form, tensor of shape `(2 * channels, 1)`.
        scale: Factor on softmax scores: `None` (1), `"sqrt"` (`channels ** -0.5`) or a number. Forms without
            softmax have no scale.
        mask: Boolean tensor of shape `(batch, keys)`, `False` removes a key: softmax ignores it, the other forms
            divide by the number of valid keys.
        query_chunk_size: Rows of scores held at a time. `None`: all. `"auto"`: all while they are few, else chunks.

    Returns:
        Tensor of shape `(batch, queries, value_channels)`, in the dtype of `g`.

    Raises:
        ValueError: if `pairwise`, `scale` or `query_chunk_size` is not one of the above.

    Reference:
        [Non-local Neural Networks, section 3](https://arxiv.org/abs/1711.07971)

    Example:

    >>> x = np.random.default_rng(0).normal(size=(2, 6, 4)).astype("float32")
    >>> y = non_local(x, x, x, pairwise="gaussian")
    >>> tuple(y.shape)
    (2, 6, 4)
    """
    theta, phi, g = (ops.convert_to_tensor(tensor) for tensor in (theta, phi, g))  # PyTorch: no arrays times tensors
    function = get_pairwise(pairwise)
    _check_score_kernel(function, score_kernel, theta.shape[-1])
    num_queries, num_keys = theta.shape[1], phi.shape[1]
    if function.reassociate and _is_cheaper(num_queries, num_keys, phi.shape[-1], g.shape[-1]):
        return _reassociated(function, theta, phi, g, mask)
    chunk = chunk_size(query_chunk_size, num_queries, num_keys)

    # Tensors that need a gradient are positional: rematerialisation sends none to what is closed over.
    # The boolean mask needs none, and TensorFlow's rematerialisation refuses it as an argument.
    arguments = (theta, phi, g) if score_kernel is None else (theta, phi, g, score_kernel)

    def attend(theta, phi, g, score_kernel=None):
        weights = attention_weights(theta, phi, pairwise, score_kernel=score_kernel, scale=scale, mask=mask)
        if function.softmax:
            return ops.matmul(ops.cast(weights, g.dtype), g)  # B N D
        root = _root(phi)
        y = ops.matmul(ops.cast(weights * root, g.dtype), g)
        return y * ops.cast(1.0 / root, g.dtype)

    if chunk is None:
        return attend(*arguments)
    return _in_chunks(attend, chunk, *arguments)


def _check_score_kernel(function, score_kernel, channels):
    expected = (2 * channels, 1) if function.has_score_kernel else None
    received = None if score_kernel is None else tuple(score_kernel.shape)
    if received != expected:
        raise ValueError(
            f"`score_kernel` must be a tensor of the shape {expected} with this pairwise function. "
            f"Received: score_kernel.shape={received}"
            if expected
            else f"Only the concatenation form has a `score_kernel`. Received: score_kernel.shape={received}"
        )


def _softmax(scores):
    # Keras warns about a softmax over one key, which pooling a small window makes a regular case here.
    return ops.ones_like(scores) if scores.shape[-1] == 1 else ops.softmax(scores, axis=-1)


def _num_valid(mask):
    # (B, M) -> (B, 1, 1); at least 1, so that a sample without valid keys gives 0 / 1.
    return ops.maximum(ops.sum(ops.cast(mask, "float32"), axis=-1), 1.0)[:, None, None]


def _is_cheaper(num_queries, num_keys, channels, value_channels):
    if num_queries is None or num_keys is None:
        return True  # unknown sizes: the order that cannot blow up
    linear = (num_queries + num_keys) * channels * value_channels
    quadratic = num_queries * num_keys * (channels + value_channels)
    return linear <= quadratic


def _reassociated(function, theta, phi, g, mask):
    root = _root(phi)
    if mask is not None:
        g = ops.where(mask[:, :, None], g, ops.zeros_like(g))
    y = function.reassociate(theta, phi, g * ops.cast(1.0 / root, g.dtype))
    return y * ops.cast(1.0 / root if mask is None else root / _num_valid(mask), g.dtype)


def _root(phi):
    # √M. 1/M at once underflows in float16 for large maps, and a sum over M keys overflows: half of it goes before the
    # sum, half behind.
    return ops.sqrt(ops.cast(ops.shape(phi)[1], "float32"))


def chunk_size(query_chunk_size, num_queries, num_keys):
    """Rows of scores at a time, or `None` for all of them."""
    if query_chunk_size is None:
        return None
    if query_chunk_size == "auto":
        if num_queries is not None and num_keys is not None and num_queries * num_keys <= AUTO_MAX_SCORES:
            return None
        return 1024 if num_keys is None else max(AUTO_MAX_SCORES // 4 // num_keys, 32)
    if isinstance(query_chunk_size, bool) or not isinstance(query_chunk_size, int) or query_chunk_size < 1:
        raise ValueError(
            '`query_chunk_size` must be `None`, "auto" or a positive integer. '
            f"Received: query_chunk_size={query_chunk_size!r}"
        )
    if num_queries is not None and num_queries <= query_chunk_size:
        return None
    return query_chunk_size


def _in_chunks(attend, chunk, theta, *keys):
    """`attend(theta, *keys)`, `chunk` queries at a time, recomputed in the backward pass."""
    batch, num_queries, channels = ops.shape(theta)
    if isinstance(num_queries, int):
        chunk = max(min(num_queries, chunk), 1)
    else:
        chunk = ops.maximum(ops.minimum(num_queries, chunk), 1)
    num_chunks = (num_queries + chunk - 1) // chunk
    padding = ops.zeros((batch, num_chunks * chunk - num_queries, channels), dtype=theta.dtype)
    rows = ops.concatenate([theta, padding], axis=1)
    rows = ops.reshape(rows, (batch, num_chunks, chunk, channels))
    rows = ops.transpose(rows, (1, 0, 2, 3))  # chunks B chunk C
    attend = keras.remat(attend)
    result = ops.map(lambda theta: attend(theta, *keys), rows)  # chunks B chunk D
    result = ops.transpose(result, (1, 0, 2, 3))
    result = ops.reshape(result, (batch, num_chunks * chunk, result.shape[-1]))
    return result[:, :num_queries]
