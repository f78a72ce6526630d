"""The non-local operation on `(batch, positions, channels)` arrays.

`y_i = 1/C(x) Σ_j f(x_i, x_j) g(x_j)` (Wang et al., "Non-local Neural Networks", CVPR 2018, section 3),
for the pairwise functions f in the table `PAIRWISE`. Everything is `keras.ops`, so it runs on every backend.

Three algorithms, all exact:

- dot product: θ (φᵀ g), linear in the positions, where that is the cheaper order;
- concatenation: ReLU(a_i + b_j) by sort, prefix sums and look-up, N log N in the positions;
- softmax forms: some rows of scores at a time, computed again in the backward pass, linear in memory.

Shape letters:
    B: batch (or batch × windows)
    N: query positions, index i
    M: key positions, index j (fewer than N after sub-sampling)
    C: channels of theta and phi
    D: channels of g
    K: query positions of one chunk
    E: any channels
"""

import dataclasses
from collections.abc import Callable

import keras
from keras import ops

# Scores of one sample that "auto" holds whole (float32: 64 MiB); of more, it holds a quarter of that at a time.
# Chunks are computed twice in training, which takes a tenth to a third longer.
AUTO_MAX_SCORES = 2**24
# Rows that prefix sums take at once.
PREFIX_BLOCK = 32
# What a removed key adds to its score: its weight is exp of that, which is 0.
REMOVED = -3e38


@dataclasses.dataclass(frozen=True)
class PairwiseFunction:
    """One row of the table of pairwise functions: `scores`, or in its place `bilinear`.

    Args:
        softmax: `True` where f = exp(score) and C(x) = Σ_j f, so that f / C is a softmax over the keys;
            `False` where f = score and C(x) is the number of keys.
        scores: `(theta, phi, score_kernel) -> (B, N, M)`.
        bilinear: `(theta, phi) -> (theta, phi, bias)`, where the score is `theta_i · phi_j + bias_j` up to what is the
            same for all keys of a query; `bias` of shape `(B, M)` in float32, or `None`.
        projections: which of `"theta"` and `"phi"` are learned projections of x; the others are x itself.
        has_score_kernel: whether f has a weight vector w_f of its own, of shape `(2 * C, 1)`.
        linear: an exact form that needs no scores, `(theta, phi, g, score_kernel) -> (B, N, D)`, the sum without
            the division by C(x), in the dtype of g or in float32; or `None`.
        is_linear_cheaper: `(N, M, C, D) -> bool` for known sizes. Unknown ones take the linear form.
    """

    softmax: bool
    scores: Callable | None = None
    bilinear: Callable | None = None
    projections: tuple = ("theta", "phi")
    has_score_kernel: bool = False
    linear: Callable | None = None
    is_linear_cheaper: Callable | None = None


# --- Pairwise functions -----------------------------------------------------------------------------------------------


def _dot_bilinear(theta, phi):
    return theta, phi, None


def _euclidean_bilinear(theta, phi):
    # -‖θ_i - φ_j‖² = 2 θ_i·φ_j - ‖φ_j‖² - ‖θ_i‖², of which the softmax over j does not see the last. Distances do not
    # depend on the origin: at the keys' mean, the first two are small, and little of their difference is rounded off.
    theta, phi = ops.cast(theta, "float32"), ops.cast(phi, "float32")
    origin = ops.stop_gradient(ops.mean(phi, axis=1, keepdims=True))
    theta, phi = theta - origin, phi - origin
    return 2.0 * theta, phi, -ops.sum(ops.square(phi), axis=-1)


def _dot_scores(theta, phi, score_kernel=None):
    return _product(theta, phi, transpose_y=True)  # B N M


def _dot_linear(theta, phi, g, score_kernel=None):
    return _product(theta, _product(phi, g, transpose_x=True))  # (θ φᵀ) g = θ (φᵀ g)


def _is_dot_linear_cheaper(num_queries, num_keys, channels, value_channels):
    linear = (num_queries + num_keys) * channels * value_channels
    quadratic = num_queries * num_keys * (channels + value_channels)
    return linear <= quadratic


def _concatenation_terms(theta, phi, score_kernel):
    # w_f·[θ_i, φ_j] = w_θ·θ_i + w_φ·φ_j: the (B, N, M, 2C) concatenation never exists.
    channels = theta.shape[-1]
    a = ops.matmul(theta, score_kernel[:channels])  # B N 1
    b = ops.matmul(phi, score_kernel[channels:])  # B M 1
    return a, b


def _concatenation_scores(theta, phi, score_kernel):
    a, b = _concatenation_terms(theta, phi, score_kernel)
    return ops.relu(a + ops.transpose(b, (0, 2, 1)))  # B N M


def _concatenation_linear(theta, phi, g, score_kernel):
    a, b = _concatenation_terms(theta, phi, score_kernel)
    a, b = (ops.squeeze(ops.cast(x, "float32"), axis=-1) for x in (a, b))
    return _relu_sum(a, b, ops.cast(g, "float32"))


def _is_concatenation_linear_cheaper(num_queries, num_keys, channels, value_channels):
    # Measured, not counted: below, sorting and looking up take longer than the scores do.
    return num_queries * num_keys > 160 * (num_queries + num_keys)


PAIRWISE = {
    "gaussian": PairwiseFunction(softmax=True, bilinear=_dot_bilinear, projections=()),
    "embedded_gaussian": PairwiseFunction(softmax=True, bilinear=_dot_bilinear),
    "euclidean_gaussian": PairwiseFunction(softmax=True, bilinear=_euclidean_bilinear, projections=()),
    "dot_product": PairwiseFunction(
        softmax=False, scores=_dot_scores, linear=_dot_linear, is_linear_cheaper=_is_dot_linear_cheaper
    ),
    "concatenation": PairwiseFunction(
        softmax=False,
        scores=_concatenation_scores,
        has_score_kernel=True,
        linear=_concatenation_linear,
        is_linear_cheaper=_is_concatenation_linear_cheaper,
    ),
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


_DIMENSIONS = {
    "theta": ("batch", "queries", "channels"),
    "phi": ("batch", "keys", "channels"),
    "g": ("batch", "keys", "value_channels"),
    "mask": ("batch", "keys"),
}


def _check_symbolic(**tensors):
    for name, tensor in tensors.items():
        if isinstance(tensor, keras.KerasTensor):
            raise ValueError(
                f"`{name}` must be an array or tensor; in a functional model, call a non-local layer or one of your "
                f"own. Received: {name}={tensor}"
            )


def _check_shapes(**tensors):
    """Raises a `ValueError` unless the sizes of one name, as far as they are known, are one; `None` is no tensor."""
    sizes = {}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        shape, dimensions = tuple(tensor.shape), _DIMENSIONS[name]
        fits = len(shape) == len(dimensions)
        for dimension, size in zip(dimensions, shape, strict=False):
            fits = fits and (size is None or sizes.setdefault(dimension, size) == size)
        if not fits:
            known = ", ".join(str(sizes.get(dimension, dimension)) for dimension in dimensions)
            wanted = f"({', '.join(dimensions)}), here ({known})"
            raise ValueError(f"`{name}` must have the shape {wanted}. Received: {name}.shape={shape}")


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
        ValueError: if `pairwise` or `scale` is unknown, `score_kernel` does not belong to the pairwise function, or a
            tensor has another shape.

    Example:

    >>> weights = attention_weights(np.zeros((1, 3, 2), "float32"), np.zeros((1, 4, 2), "float32"))
    >>> np.asarray(weights)[0, 0].tolist()
    [0.25, 0.25, 0.25, 0.25]
    """
    _check_symbolic(theta=theta, phi=phi)
    theta, phi = ops.convert_to_tensor(theta), ops.convert_to_tensor(phi)
    _check_shapes(theta=theta, phi=phi, mask=mask)
    function = get_pairwise(pairwise)
    _check_score_kernel(function, score_kernel, theta.shape[-1])
    factor = get_scale(scale, theta.shape[-1])
    if mask is not None:
        phi = _without_removed(phi, mask)
    scores = _scores(function, theta, phi, score_kernel, factor)  # B N M
    key_mask = None if mask is None else ops.expand_dims(mask, 1)  # B 1 M
    if function.softmax:
        if mask is None:
            return _softmax(scores)
        weights = _softmax(ops.where(key_mask, scores, REMOVED))
        return ops.where(key_mask, weights, 0.0)  # a row with no valid key is 0, not uniform
    if mask is None:
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
    | `"euclidean_gaussian"`| exp(-‖θ_i - φ_j‖²), θ = φ = x  | Σ_j f          |
    | `"dot_product"`       | θ_iᵀ φ_j                       | number of keys |
    | `"concatenation"`     | ReLU(w_fᵀ [θ_i, φ_j])          | number of keys |

    The dot product is re-associated to θ (φᵀ g) / M wherever that takes fewer operations: linear in the positions. The
    concatenation form sorts w_φᵀ φ_j and looks its sums up among prefix sums of g: O(N log N) time, O(N) memory. The
    softmax forms hold `query_chunk_size` rows of scores at a time and compute them again in the backward pass. All of
    that is exact, up to rounding.

    Args:
        theta: Queries, tensor of shape `(batch, queries, channels)`.
        phi: Keys, tensor of shape `(batch, keys, channels)`.
        g: Values, tensor of shape `(batch, keys, value_channels)`.
        pairwise: `"gaussian"`, `"embedded_gaussian"`, `"euclidean_gaussian"`, `"dot_product"` or `"concatenation"`.
        score_kernel: w_f of the concatenation form, tensor of shape `(2 * channels, 1)`.
        scale: Factor on softmax scores: `None` (1), `"sqrt"` (`channels ** -0.5`) or a number. Forms without
            softmax have no scale.
        mask: Boolean tensor of shape `(batch, keys)`, `False` removes a key: softmax ignores it, the other forms
            divide by the number of valid keys.
        query_chunk_size: Rows of scores of one sample held at a time. `None`: all. `"auto"`: all while they are few,
            else chunks.

    Returns:
        Tensor of shape `(batch, queries, value_channels)`, in the dtype of `g`.

    Raises:
        ValueError: if `pairwise`, `scale` or `query_chunk_size` is not one of the above, `score_kernel` does not belong
            to the pairwise function, or a tensor has another shape or is symbolic (`keras.Input`).

    Reference:
        [Non-local Neural Networks, section 3](https://arxiv.org/abs/1711.07971)

    Example:

    >>> x = np.random.default_rng(0).normal(size=(2, 6, 4)).astype("float32")
    >>> y = non_local(x, x, x, pairwise="gaussian")
    >>> tuple(y.shape)
    (2, 6, 4)
    """
    _check_symbolic(theta=theta, phi=phi, g=g)
    theta, phi, g = (ops.convert_to_tensor(tensor) for tensor in (theta, phi, g))  # PyTorch: no arrays times tensors
    _check_shapes(theta=theta, phi=phi, g=g, mask=mask)
    score_kernel = None if score_kernel is None else ops.convert_to_tensor(score_kernel)
    function = get_pairwise(pairwise)
    num_queries, num_keys, channels, value_channels = theta.shape[1], phi.shape[1], theta.shape[-1], g.shape[-1]
    _check_score_kernel(function, score_kernel, channels)
    factor = get_scale(scale, channels)
    chunk = chunk_size(query_chunk_size, num_queries, num_keys)
    if mask is not None:
        phi = _without_removed(phi, mask)
        g = ops.where(mask[:, :, None], g, ops.zeros_like(g))

    if function.bilinear:
        theta, phi, bias = _scaled_bilinear(function, theta, phi, factor)
        if mask is not None:
            bias = ops.where(mask, ops.zeros(ops.shape(mask), dtype="float32") if bias is None else bias, REMOVED)
        return _softmax_sum(theta, phi, g, bias, chunk)

    if function.softmax:
        return _score_sum(function, theta, phi, g, score_kernel, factor, mask, chunk)

    # √M: 1/M at once underflows in float16 for large maps, and a sum over M keys overflows. Half of it goes before the
    # sum, half behind.
    root = ops.sqrt(ops.cast(ops.shape(phi)[1], "float32"))
    g = g * ops.cast(1.0 / root, g.dtype)
    known = num_queries is not None and num_keys is not None
    if function.linear and (not known or function.is_linear_cheaper(num_queries, num_keys, channels, value_channels)):
        y = function.linear(theta, phi, g, score_kernel)
    else:
        y = _score_sum(function, theta, phi, g, score_kernel, factor, mask, chunk)
    return ops.cast(y * ops.cast(1.0 / root if mask is None else root / _num_valid(mask), y.dtype), g.dtype)


# --- The softmax forms ------------------------------------------------------------------------------------------------


def _softmax_sum(theta, phi, g, bias, chunk):
    """Σ_j softmax_j(θ_i·φ_j + bias_j) g_j, `chunk` queries at a time.

    Its gradient is written out: it takes fewer passes over the scores than the one that a backend derives, and of
    chunks it computes the weights again without the rest.
    """

    @ops.custom_gradient
    def operation(theta, phi, g, *bias):
        def attend(theta):
            weights = _softmax(_bilinear_scores(theta, phi, *bias))  # B K M
            return weights, _product(ops.cast(weights, g.dtype), g)  # B K D

        if chunk is None:
            weights, y = attend(theta)
        else:
            y = _by_chunks(lambda theta: attend(theta)[1], theta, chunk)
        # On PyTorch, the result itself would hold its own graph, until garbage is collected.
        kept = ops.stop_gradient(y)

        def gradient(*arguments, upstream=None):
            upstream = arguments[-1] if upstream is None else upstream  # PyTorch passes the inputs before it
            # Σ_j weights_ij (dy_i·g_j) = dy_i·y_i
            shift = ops.sum(ops.cast(upstream, "float32") * ops.cast(kept, "float32"), axis=-1, keepdims=True)  # B N 1
            if chunk is None:
                gradients = _weights_gradients(weights, theta, phi, g, bias, upstream, shift)
            else:
                gradients = _chunks_gradients(chunk, theta, phi, g, bias, upstream, shift)
            return tuple(ops.cast(d, x.dtype) for d, x in zip(gradients, (theta, phi, g, *bias), strict=True))

        return y, gradient

    return operation(theta, phi, g) if bias is None else operation(theta, phi, g, bias)


def _weights_gradients(weights, theta, phi, g, bias, upstream, shift):
    """The gradients to theta, phi, g and, where there is one, bias, of some rows of weights `(B, K, M)`."""
    d_weights = ops.cast(_product(upstream, g, transpose_y=True), "float32")  # B K M
    d_scores = weights * (d_weights - shift)
    d_scores_in = ops.cast(d_scores, theta.dtype)
    return (
        _product(d_scores_in, phi),
        _product(d_scores_in, theta, transpose_x=True),
        _product(ops.cast(weights, g.dtype), upstream, transpose_x=True),
        *(ops.sum(d_scores, axis=1) for _ in bias),
    )


def _chunks_gradients(chunk, theta, phi, g, bias, upstream, shift):
    """The same, by chunks: one after the other, so that only one is held."""
    num_queries = ops.shape(theta)[1]
    rows = [_split(x, chunk) for x in (theta, upstream, shift)]  # chunks B K E

    def step(index, d_theta, *sums):
        theta, upstream, shift = (ops.take(x, index, axis=0) for x in rows)
        weights = _softmax(_bilinear_scores(theta, phi, *bias))
        d_chunk, *parts = _weights_gradients(weights, theta, phi, g, bias, upstream, shift)
        d_theta = ops.slice_update(d_theta, (index, 0, 0, 0), ops.expand_dims(d_chunk, 0))
        sums = [total + ops.cast(part, "float32") for total, part in zip(sums, parts, strict=True)]
        # TensorFlow computes up to ten steps of a loop at once, as far as they do not wait for each other. So that they
        # do, the next index is known only when the sums are: this adds 0.
        wait = ops.minimum(ops.cast(ops.isnan(ops.sum(sums[0][:, :1])), "int32"), 0)
        return index + 1 + wait, d_theta, *sums

    num_chunks = ops.shape(rows[0])[0]
    sums = [ops.zeros(ops.shape(x), dtype="float32") for x in (phi, g, *bias)]
    start = (ops.convert_to_tensor(0, dtype="int32"), ops.zeros_like(rows[0]), *sums)
    _, d_theta, *sums = ops.while_loop(lambda index, *_: index < num_chunks, step, start)
    return _join(d_theta, num_queries), *sums


def _bilinear_scores(theta, phi, bias=None):
    scores = ops.cast(_product(theta, phi, transpose_y=True), "float32")  # B N M
    return scores if bias is None else scores + ops.expand_dims(bias, 1)


def _scaled_bilinear(function, theta, phi, factor):
    theta, phi, bias = function.bilinear(theta, phi)
    if factor != 1.0:
        # Scaling θ rather than the scores is N·C instead of N·M work, and keeps float16 scores small.
        theta = theta * ops.cast(factor, theta.dtype)
        bias = None if bias is None else bias * factor
    return theta, phi, bias


def _softmax(scores):
    # Keras warns about a softmax over one key, which pooling a small window makes a regular case here.
    return ops.ones_like(scores) if scores.shape[-1] == 1 else ops.softmax(scores, axis=-1)


# --- Concatenation ----------------------------------------------------------------------------------------------------


@ops.custom_gradient
def _relu_sum(a, b, g):
    """Σ_j ReLU(a_i + b_j) g_j for `a` (B, N), `b` (B, M), `g` (B, M, D), in float32.

    With S0(i) and S1(i) the sums of g_j and of b_j g_j over the keys with b_j > -a_i, it is a_i S0(i) + S1(i). Those
    keys are the first ones in descending order of b, so that prefix sums hold both. The gradient to g is the same with
    the roles of queries and keys exchanged.
    """
    active_keys, active_queries = _count_active(a, b)  # B N, B M
    sum_g, y = _active_sums(a, b, g, active_keys)

    def gradient(*arguments, upstream=None):
        upstream = arguments[-1] if upstream is None else upstream
        sum_upstream, d_g = _active_sums(b, a, upstream, active_queries)
        return ops.sum(sum_g * upstream, axis=-1), ops.sum(sum_upstream * g, axis=-1), d_g

    return y, gradient


def _active_sums(a, b, g, num_active):
    """Σ_j g_j and Σ_j (a_i + b_j) g_j over the `num_active` first keys of each query, in descending order of b."""
    order = ops.argsort(-b, axis=1)  # B M
    origin = ops.mean(b, axis=1, keepdims=True)  # near 0, a_i S0 + S1 loses less in the difference
    b = ops.expand_dims(ops.take_along_axis(b - origin, order, axis=1), -1)
    g = _take_rows(g, order)  # B M D
    sum_g, sum_bg = (_take_rows(_prefix_sums(x), num_active) for x in (g, b * g))  # B N D
    return sum_g, ops.expand_dims(a + origin, -1) * sum_g + sum_bg


def _prefix_sums(x):
    """`(B, M, E)` to at least `(B, M + 1, E)`: row k is the sum of the first k rows.

    Within blocks by a product with a triangle of ones: on a CPU this takes a fifth to a tenth of TensorFlow's `cumsum`,
    and it rounds less than adding up one by one.
    """
    batch, num_rows, channels = ops.shape(x)
    num_blocks = num_rows // PREFIX_BLOCK + 1
    zeros = ops.zeros((batch, num_blocks * PREFIX_BLOCK - num_rows, channels), dtype=x.dtype)
    x = ops.reshape(ops.concatenate([x, zeros], axis=1), (batch, num_blocks, PREFIX_BLOCK, channels))
    within = ops.matmul(ops.tri(PREFIX_BLOCK, k=-1, dtype=x.dtype), x)
    totals = ops.sum(x, axis=2, keepdims=True)
    before = ops.cumsum(totals, axis=1) - totals
    return ops.reshape(within + before, (batch, num_blocks * PREFIX_BLOCK, channels))


def _count_active(a, b):
    """Of each query the number of keys, and of each key the number of queries, with a_i + b_j > 0."""
    num_queries = ops.shape(a)[1]
    # Ascending, b_j > -a_i means that -b_j stands before a_i. Sorting is stable: at a_i + b_j = 0, a_i stands first.
    values = ops.concatenate([a, -b], axis=1)  # B N+M
    values = ops.where(values == 0.0, 0.0, values)  # XLA sorts -0 before 0
    order = ops.argsort(values, axis=1)
    rank = ops.argsort(order, axis=1)  # the inverse permutation
    keys_so_far = ops.cumsum(ops.cast(order >= num_queries, "int32"), axis=1)
    keys_so_far = ops.take_along_axis(keys_so_far, rank, axis=1)
    queries_so_far = rank + 1 - keys_so_far
    return keys_so_far[:, :num_queries], num_queries - queries_so_far[:, num_queries:]


def _take_rows(x, rows):
    """`(B, M, E)` and row numbers `(B, N)` to `(B, N, E)`."""
    batch, num_rows, channels = ops.shape(x)
    first = ops.arange(batch, dtype="int32")[:, None] * num_rows
    return ops.take(ops.reshape(x, (batch * num_rows, channels)), first + ops.cast(rows, "int32"), axis=0)


# --- Any scores -------------------------------------------------------------------------------------------------------


def _score_sum(function, theta, phi, g, score_kernel, factor, mask, chunk):
    """Σ_j f(x_i, x_j) g_j, or the softmax's mean, from scores; chunks are recomputed in the backward pass."""

    # Tensors that need a gradient are positional: rematerialisation sends none to what is closed over.
    # The boolean mask needs none, and TensorFlow's rematerialisation refuses it as an argument.
    def attend(theta, phi, g, *score_kernel):
        scores = _scores(function, theta, phi, *(score_kernel or (None,)), factor)  # B K M
        if mask is not None:
            scores = ops.where(ops.expand_dims(mask, 1), scores, REMOVED if function.softmax else 0.0)
        weights = _softmax(scores) if function.softmax else scores
        return ops.matmul(ops.cast(weights, g.dtype), g)  # B K D

    arguments = (phi, g) if score_kernel is None else (phi, g, score_kernel)
    if chunk is None:
        return attend(theta, *arguments)
    attend = keras.remat(attend)
    return _by_chunks(lambda theta: attend(theta, *arguments), theta, chunk)


def _scores(function, theta, phi, score_kernel, factor):
    """Scores in float32, `(B, N, M)`."""
    if function.bilinear:
        return _bilinear_scores(*_scaled_bilinear(function, theta, phi, factor))
    scores = ops.cast(function.scores(theta, phi, score_kernel), "float32")
    return scores * factor if function.softmax and factor != 1.0 else scores


# --- Shared -----------------------------------------------------------------------------------------------------------


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


def _num_valid(mask):
    # (B, M) -> (B, 1, 1); at least 1, so that a sample without valid keys gives 0 / 1.
    return ops.maximum(ops.sum(ops.cast(mask, "float32"), axis=-1), 1.0)[:, None, None]


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


def _product(x, y, transpose_x=False, transpose_y=False):
    """`x @ y` of each sample, transposed or not. Of one sample without the batch: TensorFlow's plain product is a tenth
    faster."""
    single = x.shape[0] == 1 and y.shape[0] == 1
    if single:
        x, y = ops.squeeze(x, axis=0), ops.squeeze(y, axis=0)
    axes = (1, 0) if single else (0, 2, 1)
    # Next to the product: there, TensorFlow makes it part of that.
    x = ops.transpose(x, axes) if transpose_x else x
    y = ops.transpose(y, axes) if transpose_y else y
    z = ops.matmul(x, y)
    return ops.expand_dims(z, 0) if single else z


def _without_removed(phi, mask):
    """The keys with the mean of the valid ones in place of those removed.

    What removed keys hold does not matter so, be it infinite, and the mean of all keys, where some forms put the
    origin, is that of the valid ones.
    """
    valid = mask[:, :, None]
    kept = ops.where(valid, phi, ops.zeros_like(phi))
    mean = ops.sum(ops.cast(kept, "float32"), axis=1, keepdims=True) / _num_valid(mask)
    return ops.where(valid, phi, ops.cast(ops.stop_gradient(mean), phi.dtype))


def _by_chunks(attend, theta, chunk):
    """`attend(theta)` of `(B, N, C)`, at most `chunk` queries at a time."""
    return _join(ops.map(attend, _split(theta, chunk)), ops.shape(theta)[1])


def _split(x, chunk):
    """`(B, N, E)` to `(chunks, B, K, E)`: K is at most `chunk`, as even as can be; the last is filled with zeros."""
    batch, length, channels = ops.shape(x)
    num_chunks = (length + chunk - 1) // chunk
    if isinstance(length, int):
        num_chunks = max(num_chunks, 1)
    else:
        num_chunks = ops.maximum(num_chunks, 1)
    rows = (length + num_chunks - 1) // num_chunks
    x = ops.concatenate([x, ops.zeros((batch, num_chunks * rows - length, channels), dtype=x.dtype)], axis=1)
    return ops.transpose(ops.reshape(x, (batch, num_chunks, rows, channels)), (1, 0, 2, 3))


def _join(x, length):
    """`(chunks, B, K, E)` back to `(B, N, E)`, the inverse of `_split`."""
    num_chunks, batch, rows, channels = ops.shape(x)
    return ops.reshape(ops.transpose(x, (1, 0, 2, 3)), (batch, num_chunks * rows, channels))[:, :length]
