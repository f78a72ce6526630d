"""Non-local blocks for signals, images and video: one private base, three ranks.

Shape letters:
    B: batch
    S: the positions of the map, one axis per dimension: `time, height, width` for video
    W: windows per sample (1 where `window` is `None`)
    N: query positions of one window
    M: key positions of one window (after sub-sampling)
    C: channels of the inputs
    D: inner channels
    Q: chosen query positions
"""

import math

import keras
import numpy as np
from keras import ops

from keras_nonlocal import ops as nonlocal_ops
from keras_nonlocal.normalization import BatchNormalization


class _NonLocal(keras.layers.Layer):
    """Everything of a non-local block but its rank."""

    rank = None

    def __init__(
        self,
        pairwise="embedded_gaussian",
        inner_channels=None,
        pool_size=None,
        window=None,
        scale=None,
        normalization="batch",
        query_chunk_size="auto",
        pool_after_projection=False,
        data_format=None,
        kernel_initializer="he_normal",
        bias_initializer="zeros",
        kernel_regularizer=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.function = nonlocal_ops.get_pairwise(pairwise)
        if inner_channels is not None and not _is_size(inner_channels):
            raise ValueError(
                "`inner_channels` must be `None` or an integer of at least 1. "
                f"Received: inner_channels={inner_channels!r}"
            )
        nonlocal_ops.get_scale(scale, 1)
        nonlocal_ops.chunk_size(query_chunk_size, None, None)
        if normalization not in ("batch", None):
            raise ValueError(f'`normalization` must be "batch" or `None`. Received: normalization={normalization!r}')
        self.pairwise = pairwise
        self.inner_channels = inner_channels
        self.pool_size = self._sizes("pool_size", pool_size)
        self.window = self._sizes("window", window, allow_none=True)
        self.scale = scale
        self.normalization = normalization
        self.query_chunk_size = query_chunk_size
        self.pool_after_projection = bool(pool_after_projection)
        self.data_format = keras.config.image_data_format() if data_format is None else data_format
        if self.data_format not in ("channels_last", "channels_first"):
            raise ValueError(
                f'`data_format` must be "channels_last" or "channels_first". Received: data_format={data_format!r}'
            )
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.supports_masking = True

    def build(self, input_shape):
        positions, channels = self._split_shape(input_shape)
        self._check_map(positions)
        inner_channels = self._inner_channels(channels)
        self.theta = self.phi = self.score_kernel = self.norm = None
        for name in self.function.projections:
            setattr(self, name, self._projection(inner_channels, channels, name))
        self.g = self._projection(inner_channels, channels, "g")
        if self.function.has_score_kernel:
            self.score_kernel = self.add_weight(
                name="score_kernel",
                shape=(2 * inner_channels, 1),
                initializer=_fresh(self.kernel_initializer, "score_kernel"),
                regularizer=self.kernel_regularizer,
            )
        identity = self.normalization is None  # something must be 0 for the block to start as identity
        self.out = self._projection(channels, inner_channels, "out", kernel_initializer="zeros" if identity else None)
        if self.normalization == "batch":
            self.norm = BatchNormalization(
                momentum=0.9,
                epsilon=1e-5,
                gamma_initializer="zeros",
                name="norm",
                dtype=self._policy("norm"),
                trainable=self.trainable,
            )
            self.norm.build((None,) + positions + (channels,))
        axis = 1 if self.data_format == "channels_first" else -1
        self.input_spec = keras.layers.InputSpec(ndim=self.rank + 2, axes={axis: channels})

    def call(self, inputs, mask=None, training=None):
        x = self._channels_last(inputs)  # B S C
        mask = self._position_mask(mask, x)  # B S
        sizes = self._position_sizes(x)
        x_windows, mask_windows = self._windows(x, mask, sizes)  # BW S' C, BW S'
        (phi, g), _, key_mask = self._keys((self.phi, self.g), x_windows, mask_windows)  # BW M D
        y = nonlocal_ops.non_local(
            _project(self.theta, _flatten(x_windows)),  # BW N D
            phi,
            g,
            self.pairwise,
            score_kernel=self._score_kernel(),
            scale=self.scale,
            mask=key_mask,
            query_chunk_size=self.query_chunk_size,
        )  # BW N D
        y = _unwindow(y, self._window_sizes(sizes), sizes)  # B S D
        z = _project(self.out, y)
        if self.norm is not None:
            # Batch statistics of valid positions only: what the padding holds must not matter.
            z = self.norm(z, training=training, mask=mask)
        if self.data_format == "channels_first":
            z = ops.moveaxis(z, -1, 1)
        return inputs + z

    def attention(self, inputs, queries, mask=None):
        """Normalised weights f(x_i, x_j) / C(x) of chosen positions over the whole map.

        Nothing is stored: the weights are computed anew for just these positions.

        Args:
            inputs: What the layer is called on.
            queries: Integer array of shape `(num_queries, rank)`: positions in the map's own coordinates, such as
                `[[t, y, x]]` for `NonLocal3D`. Positions that are known only as a graph runs are moved inside of the
                map.
            mask: Optional boolean mask, as for `call`.

        Returns:
            Float32 tensor of shape `(batch, num_queries, *key_map)`. The key map is the map of the inputs, sub-sampled
            by `pool_size` (in every window by itself). Keys outside of the query's window have weight 0.

        Raises:
            ValueError: if `queries` has another shape or lies outside of the map.
        """
        inputs = ops.convert_to_tensor(inputs, dtype=self.compute_dtype)
        if not self.built:
            self.build(tuple(inputs.shape))
        x = self._channels_last(inputs)
        mask = self._position_mask(mask, x)
        sizes = self._position_sizes(x)
        window = self._window_sizes(sizes)
        queries = self._check_queries(queries, x.shape[1:-1], sizes)
        batch, channels, num_queries = ops.shape(x)[0], x.shape[-1], ops.shape(queries)[0]
        # Row-major numbers of each query's position in the map, and of its window among the windows.
        query_position = _ravel([queries[:, d] for d in range(self.rank)], sizes)  # Q
        grid = [size // w for size, w in zip(sizes, window, strict=True)]
        query_window = _ravel([queries[:, d] // window[d] for d in range(self.rank)], grid)

        x_windows, mask_windows = self._windows(x, mask, sizes)
        (phi,), key_sizes, key_mask = self._keys((self.phi,), x_windows, mask_windows)  # BW M D
        num_windows, num_keys = math.prod(grid), math.prod(key_sizes)
        x_queries = ops.take(_flatten(x), query_position, axis=1)  # B Q C
        one_window = all(w in (None, size) for w, size in zip(self.window or (None,), x.shape[1:-1], strict=False))
        if not one_window:  # each query has keys of its own
            phi = ops.take(ops.reshape(phi, (batch, num_windows, num_keys, phi.shape[-1])), query_window, axis=1)
            phi = ops.reshape(phi, (batch * num_queries, num_keys, phi.shape[-1]))  # BQ M D
            if key_mask is not None:
                key_mask = ops.take(ops.reshape(key_mask, (batch, num_windows, num_keys)), query_window, axis=1)
                key_mask = ops.reshape(key_mask, (batch * num_queries, num_keys))
            x_queries = ops.reshape(x_queries, (batch * num_queries, 1, channels))
        weights = nonlocal_ops.attention_weights(
            _project(self.theta, x_queries),
            phi,
            self.pairwise,
            score_kernel=self._score_kernel(),
            scale=self.scale,
            mask=key_mask,
        )  # B Q M or BQ 1 M
        if one_window:
            return ops.reshape(weights, (batch, num_queries, *key_sizes))
        weights = ops.reshape(weights, (batch, num_queries, 1, num_keys))
        windows = ops.cast(ops.arange(num_windows) == ops.expand_dims(query_window, -1), "float32")  # Q W
        weights = ops.reshape(windows[None, :, :, None] * weights, (-1, num_keys, 1))  # BQW M 1
        key_map = [n * size for n, size in zip(grid, key_sizes, strict=True)]
        weights = _unwindow(weights, key_sizes, key_map)  # BQ key_map 1
        return ops.reshape(weights, (batch, num_queries, *key_map))

    def compute_output_shape(self, input_shape):
        positions, _ = self._split_shape(input_shape)
        self._check_map(positions)
        return tuple(input_shape)

    def get_config(self):
        config = super().get_config()
        config.update(
            pairwise=self.pairwise,
            inner_channels=self.inner_channels,
            pool_size=self.pool_size,
            window=self.window,
            scale=self.scale,
            normalization=self.normalization,
            query_chunk_size=self.query_chunk_size,
            pool_after_projection=self.pool_after_projection,
            data_format=self.data_format,
            kernel_initializer=keras.initializers.serialize(self.kernel_initializer),
            bias_initializer=keras.initializers.serialize(self.bias_initializer),
            kernel_regularizer=keras.regularizers.serialize(self.kernel_regularizer),
        )
        config["dtype"] = keras.dtype_policies.serialize(self._policies())
        return config

    # Arguments and shapes

    def _sizes(self, name, value, allow_none=False):
        if value is None:
            return None
        sizes = (value,) * self.rank if isinstance(value, int) else value
        valid = isinstance(sizes, (tuple, list)) and len(sizes) == self.rank
        if not valid or not all(_is_size(size) or (allow_none and size is None) for size in sizes):
            entries = "integers of at least 1" + (" or `None`" if allow_none else "")
            raise ValueError(
                f"`{name}` must be `None`, an integer or {self.rank} {entries}. Received: {name}={value!r}"
            )
        return tuple(sizes)

    def _split_shape(self, input_shape):
        """The map's sizes and the channels of an input shape."""
        if len(input_shape) != self.rank + 2:
            raise ValueError(
                f"`{type(self).__name__}` expects inputs of rank {self.rank + 2}: the batch, {self.rank} "
                f"dimension(s) of positions and the channels. Received: input_shape={tuple(input_shape)}"
            )
        shape = tuple(input_shape[1:])
        if self.data_format == "channels_first":
            shape = shape[1:] + shape[:1]
        if shape[-1] is None:
            raise ValueError(
                "The number of channels must be known when the layer is built. "
                f"Received: input_shape={tuple(input_shape)}"
            )
        return shape[:-1], shape[-1]

    def _check_map(self, positions):
        window = self.window or (None,) * self.rank
        for size, w in zip(positions, window, strict=True):
            if isinstance(size, int) and w is not None and size % w:
                raise ValueError(
                    "Each size of `window` must divide that of the map, which has the sizes "
                    f"{tuple(positions)}. Received: window={self.window}"
                )
        pool_size = self.pool_size or (1,) * self.rank
        for size, w, p in zip(positions, window, pool_size, strict=True):
            size = size if w is None else w
            if isinstance(size, int) and p > size > 0:
                raise ValueError(
                    f"`pool_size` must not be larger than the map, which has the sizes {tuple(positions)}, "
                    f"or the window ({self.window}). Received: pool_size={self.pool_size}"
                )

    def _check_queries(self, queries, positions, sizes):
        is_symbolic = False
        if ops.is_tensor(queries):
            dtype = keras.backend.standardize_dtype(queries.dtype)
            try:
                queries = ops.convert_to_numpy(queries)
            except (NotImplementedError, TypeError):  # what TensorFlow and JAX raise while they trace
                is_symbolic = True
        else:
            queries = np.asarray(queries)
            dtype = str(queries.dtype)
        if len(queries.shape) != 2 or queries.shape[1] != self.rank or "int" not in dtype:
            raise ValueError(
                f"`queries` must be integers of shape (num_queries, {self.rank}). Received: queries={queries!r}"
            )
        if is_symbolic:
            last = ops.stack([ops.cast(size, "int32") - 1 for size in sizes])
            return ops.clip(ops.cast(queries, "int32"), 0, last)
        for dimension, size in enumerate(positions):
            column = queries[:, dimension]
            if (column < 0).any() or (isinstance(size, int) and (column >= size).any()):
                raise ValueError(
                    f"`queries` must lie inside of the map, which has the sizes {tuple(positions)}. "
                    f"Received: queries={queries.tolist()}"
                )
        return queries.astype("int32")

    def _inner_channels(self, channels):
        return self.inner_channels or max(channels // 2, 1)

    def _position_sizes(self, x):
        return list(ops.shape(x))[1:-1]

    def _window_sizes(self, sizes):
        window = self.window or (None,) * self.rank
        return [size if w is None else w for size, w in zip(sizes, window, strict=True)]

    # Weights

    def _projection(self, units, channels, name, kernel_initializer=None):
        # A 1×1×1 convolution is a dense layer on the channels, which needs no convolution kernel anywhere.
        dense = keras.layers.Dense(
            units,
            kernel_initializer=_fresh(kernel_initializer or self.kernel_initializer, name),
            bias_initializer=_fresh(self.bias_initializer, name),
            kernel_regularizer=self.kernel_regularizer,
            name=name,
            dtype=self._policy(name),
            trainable=self.trainable,  # Keras passes on what is set later, but not what was set before `build`
        )
        dense.build((None, channels))
        return dense

    def _policy(self, name):
        """The dtype policy of a sublayer."""
        policy = self.dtype_policy
        if not isinstance(policy, keras.dtype_policies.DTypePolicyMap):
            return policy
        return policy[name if name in policy else f"{self.path}/{name}"]

    def _policies(self):
        """The layer's own dtype policy, with those of the projections that `model.quantize` has changed: a copy must
        build its weights as they are here."""
        parts = (self.theta, self.phi, self.g, self.out) if self.built else ()
        quantized = {part.name: part.dtype_policy for part in parts if part is not None and part.quantization_mode}
        policy = self.dtype_policy
        if not quantized:
            return policy
        if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
            quantized = dict(policy) | quantized
            policy = policy.default_policy
        return keras.dtype_policies.DTypePolicyMap(policy.name, quantized)

    def _score_kernel(self):
        # As a tensor of the compute dtype: custom gradients take tensors, not variables.
        if self.score_kernel is None:
            return None
        return ops.cast(ops.convert_to_tensor(self.score_kernel), self.compute_dtype)

    # Layout

    def _channels_last(self, inputs):
        self._check_map(self._split_shape(inputs.shape)[0])
        return ops.moveaxis(inputs, 1, -1) if self.data_format == "channels_first" else inputs

    def _position_mask(self, mask, x):
        """A mask of the leading dimensions, such as `(batch, time)`, on every position: `(B, S)`."""
        if mask is None:
            return None
        mask = ops.cast(mask, "bool")
        expected = tuple(x.shape[:-1])
        fits = 2 <= len(mask.shape) <= len(expected) and all(
            m is None or size is None or m == size for m, size in zip(mask.shape, expected, strict=False)
        )
        if not fits:
            raise ValueError(
                "`mask` must have the shape of the map's positions, or of their leading dimensions: "
                f"{expected} or {expected[:2]}. Received: mask.shape={tuple(mask.shape)}"
            )
        while len(mask.shape) < len(expected):
            mask = ops.expand_dims(mask, -1)
        return ops.broadcast_to(mask, ops.shape(x)[:-1])

    def _windows(self, x, mask, sizes):
        window = self._window_sizes(sizes)
        if mask is not None:
            mask = _window(mask[..., None], window, sizes)[..., 0] if self.window else mask
        return (_window(x, window, sizes) if self.window else x), mask

    def _keys(self, projections, x, mask):
        """The projected and sub-sampled keys `(B, M, D)` of each projection, the sizes of their map, and their flat
        mask."""
        if self.pool_after_projection:
            pooled = [self._pool(_project(dense, x), mask) for dense in projections]
        else:
            keys, key_mask = self._pool(x, mask)
            pooled = [(_project(dense, keys), key_mask) for dense in projections]
        sizes = self._position_sizes(pooled[0][0])
        return [_flatten(keys) for keys, _ in pooled], sizes, pooled[0][1]

    def _pool(self, x, mask):
        """Sub-sampled keys and their flat mask; a pooled key is valid if any of its inputs is."""
        if self.pool_size is None:
            return x, None if mask is None else _flatten(mask[..., None])[..., 0]
        if mask is None:
            return _max_pool(x, self.pool_size), None
        lowest = ops.cast(-6e4 if self.compute_dtype == "float16" else -3e38, x.dtype)
        pooled = _max_pool(ops.where(mask[..., None], x, lowest), self.pool_size)
        pooled_mask = _max_pool(ops.cast(mask[..., None], x.dtype), self.pool_size) > 0
        pooled = ops.where(pooled_mask, pooled, ops.zeros_like(pooled))
        return pooled, _flatten(pooled_mask)[..., 0]


def _is_size(value):
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _fresh(initializer, name):
    """A copy for the weights of that name: one initializer gives the same values at every call, and so does one seed,
    but θ, φ and g must not start equal."""
    initializer = keras.initializers.get(initializer)
    if not isinstance(initializer, keras.initializers.Initializer):
        return initializer  # a function: its values are its own affair
    config = initializer.get_config()
    if isinstance(config.get("seed"), int):
        config["seed"] += ("theta", "phi", "g", "score_kernel", "out").index(name)
    return type(initializer).from_config(config)


def _ravel(columns, sizes):
    index = columns[0]
    for column, size in zip(columns[1:], sizes[1:], strict=True):
        index = index * size + column
    return index


def _project(dense, x):
    """`(…, C)` to `(…, units)`; without a projection, x itself.

    All positions of all samples at once: one plain product is faster than a batched one, above all backward.
    """
    if dense is None:
        return x
    *positions, channels = list(ops.shape(x))
    y = dense(ops.reshape(x, (math.prod(positions), channels)))
    return ops.reshape(y, (*positions, y.shape[-1]))


def _flatten(x):
    """`(B, S, C)` to `(B, N, C)`."""
    sizes = list(ops.shape(x))
    return ops.reshape(x, (sizes[0], math.prod(sizes[1:-1]), x.shape[-1]))


def _window(x, window, sizes):
    """`(B, S, C)` to `(B·W, S', C)`: every window becomes a sample."""
    split = [part for size, w in zip(sizes, window, strict=True) for part in (size // w, w)]
    x = ops.reshape(x, (ops.shape(x)[0], *split, x.shape[-1]))
    rank = len(sizes)
    order = [1 + 2 * d for d in range(rank)] + [2 + 2 * d for d in range(rank)]
    x = ops.transpose(x, (0, *order, 2 * rank + 1))
    windows = math.prod(size // w for size, w in zip(sizes, window, strict=True))
    return ops.reshape(x, (ops.shape(x)[0] * windows, *window, x.shape[-1]))


def _unwindow(x, window, sizes):
    """`(B·W, N, C)` back to `(B, S, C)`, the inverse of `_window`."""
    grid = [size // w for size, w in zip(sizes, window, strict=True)]
    rank = len(sizes)
    batch = ops.shape(x)[0] // math.prod(grid)
    x = ops.reshape(x, (batch, *grid, *window, x.shape[-1]))
    order = [axis for d in range(rank) for axis in (1 + d, 1 + rank + d)]
    x = ops.transpose(x, (0, *order, 2 * rank + 1))
    return ops.reshape(x, (batch, *sizes, x.shape[-1]))


def _max_pool(x, pool_size):
    """Max pooling without padding and with stride `pool_size`: `(B, S, C)` to `(B, S', C)`.

    Maxima are separable, so every rank is done by 2-D poolings: TensorFlow has no float16 kernel for 3-D pooling on
    the CPU, and LiteRT has none at all.
    """
    batch, *sizes, channels = list(ops.shape(x))
    if len(sizes) == 2:
        return _max_pool2d(x, pool_size)
    if len(sizes) == 3 and pool_size[1:] != (1, 1):
        frames = _max_pool2d(ops.reshape(x, (batch * sizes[0], *sizes[1:], channels)), pool_size[1:])
        sizes[1:] = [size // pool for size, pool in zip(sizes[1:], pool_size[1:], strict=True)]
        x = ops.reshape(frames, (batch, *sizes, channels))
    if pool_size[0] != 1:
        steps = ops.reshape(x, (batch, sizes[0], math.prod(sizes[1:]), channels))
        steps = _max_pool2d(steps, (pool_size[0], 1))
        x = ops.reshape(steps, (batch, sizes[0] // pool_size[0], *sizes[1:], channels))
    return x


def _max_pool2d(x, pool_size):
    # The strides are spelled out: on JAX, Keras takes a tuple of sizes without them for something else and fails.
    return ops.max_pool(x, pool_size, strides=pool_size, data_format="channels_last")


_ARGUMENTS = """

    `z_i = W_z y_i + x_i`, where `y_i = 1/C(x) Σ_j f(x_i, x_j) g(x_j)` is a weighted sum over **all** positions j of the
    map (or of the window). The block starts as the identity: it can be put into a trained network without
    changing its outputs.

    Args:
        pairwise: The pairwise function f: `"gaussian"`, `"embedded_gaussian"`, `"euclidean_gaussian"`,
            `"dot_product"` or `"concatenation"`. See `keras_nonlocal.ops.non_local`.
        inner_channels: Channels of θ, φ and g. `None`: half of the input's channels, at least 1.
        pool_size: Sub-sampling of the keys: x is max-pooled by this size, with the same stride and without padding,
            before φ and g; θ is never pooled and the output keeps its size. An integer, one for each dimension, or
            `None` for no sub-sampling.
        window: Per dimension the size of the window inside which positions attend to each other, or `None` for all
            of that dimension. An integer: that size in every dimension. `None`: one window, the whole map.{windows}
        scale: Factor on the scores before the softmax: `None` for 1 (the paper), `"sqrt"` for
            `inner_channels ** -0.5` (the authors' release), or a number. Forms without softmax have none.
        normalization: `"batch"` for batch normalization after W_z, whose γ starts at 0; `None` for no normalization,
            W_z starts at 0.
        query_chunk_size: Rows of scores held at a time, of each sample or window, by forms that need them: `None` for
            all, `"auto"` for all while they are few. Changes memory and speed, not the result.
        pool_after_projection: Whether to sub-sample φ(x) and g(x), as MMAction2 does, in place of x. Another function
            with the same weights; slower.
        data_format: `"channels_last"` or `"channels_first"`. `None`: as in the Keras configuration.
        kernel_initializer: Initializer of θ, φ, g, w_f and W_z.
        bias_initializer: Initializer of the biases.
        kernel_regularizer: Regularizer of the kernels.
        **kwargs: Arguments of every Keras layer, such as `name` and `dtype`.

    Call arguments:
        inputs: {ndim}-D tensor.
        mask: Optional boolean tensor of shape `{mask}`{mask_leading}. Positions that are `False` are no keys, and batch
            normalization leaves them out.
        training: Whether batch normalization uses the statistics of the batch.

    Input shape:
        `{shape}`, or `{shape_first}` with `data_format="channels_first"`. All but the channels may be `None`.

    Output shape: Same as input.

    Raises:
        ValueError: if an argument is none of the above, the rank of the inputs is not {ndim}, the channels are
            unknown, a window does not divide the map, or `pool_size` is larger than the map.

    Reference:
        [Non-local Neural Networks](https://arxiv.org/abs/1711.07971), sections 3.2 and 3.3

    Example:

    >>> x = np.random.default_rng(0).normal(size={example}).astype("float32")
    >>> layer = {name}()
    >>> bool(np.array_equal(layer(x), x))  # the identity, at the start
    True
    """


def _describe(cls):
    """Fills the docstring that the three ranks share."""
    dimensions = ("time", "height", "width")[-cls.rank :] if cls.rank > 1 else ("steps",)
    positions = ", ".join(dimensions)
    windows = {
        1: "",
        2: " `(7, 7)`: blocks of 7×7 positions.",
        3: " `(1, None, None)`: space only, `(None, 1, 1)`: time only, `(4, None, None)`: groups of 4 frames.",
    }
    cls.__doc__ = cls.__doc__.rstrip() + _ARGUMENTS.format(
        rank=cls.rank,
        ndim=cls.rank + 2,
        windows=windows[cls.rank],
        mask=f"(batch, {positions})",
        mask_leading=f", or of its leading dimensions, such as `(batch, {dimensions[0]})`" if cls.rank > 1 else "",
        shape=f"(batch, {positions}, channels)",
        shape_first=f"(batch, channels, {positions})",
        example=(2,) + (4,) * cls.rank + (8,),
        name=cls.__name__,
    )
    return cls


@keras.saving.register_keras_serializable(package="keras_nonlocal")
@_describe
class NonLocal1D(_NonLocal):
    """Non-local block for sequences."""

    rank = 1


@keras.saving.register_keras_serializable(package="keras_nonlocal")
@_describe
class NonLocal2D(_NonLocal):
    """Non-local block for images."""

    rank = 2


@keras.saving.register_keras_serializable(package="keras_nonlocal")
@_describe
class NonLocal3D(_NonLocal):
    """Non-local block for video and volumes."""

    rank = 3
