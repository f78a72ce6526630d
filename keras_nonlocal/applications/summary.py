"""What a model costs: parameters, multiply-adds, memory of activations, and how much of it are non-local blocks."""

import dataclasses
import math

import keras

from keras_nonlocal import layers, ops
from keras_nonlocal.applications.resnet import is_integer

NON_LOCAL = (layers.NonLocal1D, layers.NonLocal2D, layers.NonLocal3D)
# What follows the data or an optimizer and is no parameter: of batch normalization.
STATISTICS = ("moving_mean", "moving_variance")


@dataclasses.dataclass(frozen=True)
class SummaryRow:
    """One call of one layer.

    Args:
        name: Name of the layer; of a layer in a model that is a layer itself, `"model/layer"`.
        kind: Name of its class.
        output_shape: Shape of its outputs without the batch; of several outputs, a tuple of shapes.
        parameters: Its parameters, 0 where a layer is called again.
        macs: Its multiply-adds.
        activation_bytes: Its activations.
    """

    name: str
    kind: str
    output_shape: tuple
    parameters: int
    macs: int
    activation_bytes: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """What `summarize` counts, for one sample; `print` shows a table.

    Args:
        name: Name of the model.
        parameters: Weights that training fits, frozen ones included; not the moving statistics of batch normalization.
        macs: Multiply-adds of the forward pass.
        activation_bytes: Memory of all activations.
        non_local_parameters: Of these, those of the non-local blocks.
        non_local_macs: Likewise.
        non_local_activation_bytes: Likewise.
        rows: A `SummaryRow` for each call of a layer, in order.
        not_counted: Names of layers whose multiply-adds are not known here and count as 0: those with weights that are
            no row of the table `COUNTS`, and products of tensors.
    """

    name: str
    parameters: int
    macs: int
    activation_bytes: int
    non_local_parameters: int
    non_local_macs: int
    non_local_activation_bytes: int
    rows: tuple
    not_counted: tuple

    def __str__(self):
        lines = [f"{self.name:<24}{'all':>12}{'non-local blocks':>26}"]
        for title, field, divisor, unit in (
            ("parameters", "parameters", 1e6, "M"),
            ("multiply-adds", "macs", 1e9, "G"),
            ("activations", "activation_bytes", 2**20, "MiB"),
        ):
            of_all, of_blocks = getattr(self, field), getattr(self, "non_local_" + field)
            share = of_blocks / of_all if of_all else 0.0
            lines.append(
                f"{title + ', ' + unit:<24}{of_all / divisor:>12.2f}{of_blocks / divisor:>16.2f}{share:>10.1%}"
            )
        if self.not_counted:
            lines.append(f"not counted: {', '.join(self.not_counted)}")
        return "\n".join(lines)


def summarize(model, input_shape=None):
    """Counts parameters, multiply-adds and activations of a model, and the share of its non-local blocks.

    Counted from the built model, for one sample:

    - parameters: all weights but the moving statistics of batch normalization;
    - multiply-adds ("MACs", which papers often call FLOPs) of convolutions, dense layers and non-local blocks; biases,
      normalization, activations, pooling and sums count 0. A non-local block counts as its equations read: the
      projections, and for every query and key a product of their channels for the score (of w_f's length for the
      concatenation) and one of g's channels for the sum. The faster forms of `keras_nonlocal.ops`, which give the same
      result, do less;
    - activations: 4 bytes (float32) for every entry of every layer's outputs, inputs not included. Of a non-local block
      also what is inside: sub-sampled keys, θ, φ, g, the weighted sum, W_z's outputs, and the scores held at a time
      (none in the linear forms of the dot product and of the concatenation). What a framework holds lies below where it
      computes in place, and above where it keeps copies for the backward pass.

    Args:
        model: Functional (or sequential) Keras model.
        input_shape: Shape of the input without the batch, such as `(32, 224, 224, 3)`, or a list of them for a model
            with several inputs. `None`: the model's own, which must be known.

    Returns:
        A `Summary`.

    Raises:
        ValueError: if `model` is not functional, or a size of its input is unknown.

    Example:

    >>> from keras_nonlocal.applications import C2DResNet11
    >>> print(summarize(C2DResNet11(classes=5), input_shape=(8, 224, 224, 3)))
    c2d_resnet11                     all          non-local blocks
    parameters, M                   0.12            0.07     57.2%
    multiply-adds, G                1.25            0.76     60.5%
    activations, MiB              129.28           32.54     25.2%
    """
    if not _is_graph(model):
        raise ValueError(f"`model` must be a functional Keras model. Received: model={model!r}")
    own = keras.tree.flatten(model.inputs)
    if input_shape is None:
        shapes = [tuple(x.shape[1:]) for x in own]
    else:
        several = isinstance(input_shape, (tuple, list)) and any(isinstance(x, (tuple, list)) for x in input_shape)
        shapes = list(input_shape) if several else [input_shape]
    if not _are_known(shapes, [len(x.shape) - 1 for x in own]):
        raise ValueError(
            "`input_shape` must give all sizes of the model's input without the batch; the model takes "
            f"{', '.join(str(tuple(x.shape[1:])) for x in own)}. Received: input_shape={input_shape!r}"
        )
    calls = []
    _walk(model, [keras.KerasTensor((1, *shape), x.dtype) for shape, x in zip(shapes, own, strict=True)], "", calls)

    rows, not_counted, blocks, seen = [], [], [], set()
    for name, layer, inputs, outputs in calls:
        macs, parameters = _macs(layer, inputs, outputs), 0
        if macs is None and name not in not_counted:
            not_counted.append(name)
        if id(layer) not in seen:
            seen.add(id(layer))
            parameters = _parameters(layer)
        rows.append(
            SummaryRow(
                name=name,
                kind=type(layer).__name__,
                output_shape=outputs[0][1:] if len(outputs) == 1 else tuple(shape[1:] for shape in outputs),
                parameters=parameters,
                macs=macs or 0,
                activation_bytes=4 * (sum(map(_size, outputs)) + _inner_activations(layer, inputs)),
            )
        )
        if _is_non_local(layer):
            blocks.append(rows[-1])
    totals = {
        prefix + field: sum(getattr(row, field) for row in of)
        for prefix, of in (("", rows), ("non_local_", blocks))
        for field in ("parameters", "macs", "activation_bytes")
    }
    return Summary(model.name, **totals, rows=tuple(rows), not_counted=tuple(not_counted))


def _are_known(shapes, ranks):
    return len(shapes) == len(ranks) and all(
        isinstance(shape, (tuple, list)) and len(shape) == rank and all(is_integer(size, 1) for size in shape)
        for shape, rank in zip(shapes, ranks, strict=True)
    )


class _Probe(keras.Operation):
    """Stands for a layer in a copy of the graph without weights, and writes down the shapes that it meets."""

    def __init__(self, layer, prefix, calls):
        super().__init__(name=layer.name)
        self.layer, self.prefix, self.calls = layer, prefix, calls

    def compute_output_spec(self, *args, **kwargs):
        name = self.prefix + self.layer.name
        inputs = [x for x in keras.tree.flatten((args, kwargs)) if isinstance(x, keras.KerasTensor)]
        if _is_graph(self.layer):
            return _walk(self.layer, inputs, name + "/", self.calls)
        outputs = self.layer.compute_output_spec(*args, **kwargs)
        shapes = [tuple(x.shape) for x in keras.tree.flatten(outputs) if isinstance(x, keras.KerasTensor)]
        self.calls.append((name, self.layer, [tuple(x.shape) for x in inputs], shapes))
        return outputs


def _walk(model, inputs, prefix, calls):
    """Appends `(name, layer, shapes of inputs, shapes of outputs)` of every call, and returns the model's outputs."""
    # The same layers, whatever the model's class.
    if isinstance(model, keras.Sequential):
        graph = keras.Model(model.inputs[0], model.outputs[0])
    else:
        graph = keras.Model(model.input, model.output)
    own = keras.tree.flatten(graph.input)
    inputs = [keras.Input(batch_shape=x.shape, dtype=x.dtype, name=o.name) for x, o in zip(inputs, own, strict=True)]
    copy = keras.models.clone_model(
        graph,
        input_tensors=keras.tree.pack_sequence_as(graph.input, inputs),
        clone_function=lambda layer: _Probe(layer, prefix, calls),
    )
    return keras.tree.map_structure(lambda x: keras.KerasTensor(x.shape, x.dtype), copy.output)


def _is_graph(layer):
    """Whether it is a model whose graph of layers is known."""
    return isinstance(layer, keras.Model) and (
        hasattr(layer, "operations") or (isinstance(layer, keras.Sequential) and layer.built)
    )


def _is_non_local(layer):
    if isinstance(layer, keras.layers.TimeDistributed):
        return _is_non_local(layer.layer)
    return isinstance(layer, NON_LOCAL)


def _size(shape):
    return math.prod(shape[1:])


def _parameters(layer):
    if isinstance(layer, keras.layers.Normalization):
        return 0  # statistics of the data
    weights = getattr(layer, "weights", [])
    return sum(math.prod(weight.shape) for weight in weights if weight.name not in STATISTICS)


# Multiply-adds


def _macs(layer, inputs, outputs):
    """Multiply-adds of one sample, or `None` if the layer's kind is unknown."""
    for kinds, count in COUNTS:
        if isinstance(layer, kinds):
            return count(layer, inputs[0], outputs[0])
    return None if getattr(layer, "weights", []) or type(layer).__name__ in PRODUCTS else 0


def _no_macs(layer, inputs, outputs):
    return 0


def _convolution(layer, inputs, outputs):
    *taps, channels, _ = layer.kernel.shape  # the channels of one group
    return _size(outputs) * math.prod(taps) * channels


def _transposed_convolution(layer, inputs, outputs):
    *taps, filters, _ = layer.kernel.shape  # every input goes to each of these
    return _size(inputs) * math.prod(taps) * filters


def _depthwise_convolution(layer, inputs, outputs):
    *taps, _, _ = layer.kernel.shape
    return _size(outputs) * math.prod(taps)


def _separable_convolution(layer, inputs, outputs):
    *taps, channels, multiplier = layer.depthwise_kernel.shape
    positions = _size(outputs) // layer.filters
    return positions * channels * multiplier * (math.prod(taps) + layer.filters)


def _dense(layer, inputs, outputs):
    return _size(inputs) * layer.units


def _einsum_dense(layer, inputs, outputs):
    letters, kernel = layer.equation.split("->")[0].split(",")
    letters = letters.replace("...", "." * (len(inputs) - len(letters.replace("...", ""))))
    others = [size for letter, size in zip(letters[1:], inputs[1:], strict=True) if letter not in kernel]
    return math.prod(others) * math.prod(layer.kernel.shape)


def _time_distributed(layer, inputs, outputs):
    batch, steps, *one = inputs
    macs = _macs(layer.layer, [(batch, *one)], [(batch, *outputs[2:])])
    return None if macs is None else steps * macs


def _non_local(layer, inputs, outputs):
    block = _Block.of(layer, inputs)
    projections = block.queries + block.queries * block.has_theta  # W_z, θ
    projections += block.projected_keys * (1 + block.has_theta)  # g, φ
    score = block.inner if block.has_theta else block.channels
    if layer.function.has_score_kernel:
        score = 2 * block.inner  # w_f · [θ_i, φ_j]
    products = block.queries * block.keys * (score + block.inner)
    return block.windows * (projections * block.channels * block.inner + products)


@dataclasses.dataclass(frozen=True)
class _Block:
    """Sizes of one non-local block; positions are those of one window.

    Args:
        windows: Number of windows.
        queries: Query positions.
        keys: Key positions, sub-sampled.
        projected_keys: Positions on which φ and g are computed.
        channels: Channels of the inputs.
        inner: Channels of θ, φ and g.
        has_theta: Whether θ and φ are learned.
    """

    windows: int
    queries: int
    keys: int
    projected_keys: int
    channels: int
    inner: int
    has_theta: bool

    @classmethod
    def of(cls, layer, input_shape):
        first = layer.data_format == "channels_first"
        channels = input_shape[1] if first else input_shape[-1]
        sizes = input_shape[2:] if first else input_shape[1:-1]
        none = (None,) * len(sizes)
        window = [w or size for size, w in zip(sizes, layer.window or none, strict=True)]
        pooled = [size // (p or 1) for size, p in zip(window, layer.pool_size or none, strict=True)]
        queries, keys = math.prod(window), math.prod(pooled)
        return cls(
            windows=math.prod(sizes) // queries,
            queries=queries,
            keys=keys,
            projected_keys=queries if layer.pool_after_projection else keys,
            channels=channels,
            inner=layer.inner_channels or max(channels // 2, 1),
            has_theta=bool(layer.function.projections),
        )


# One row a kind of layer: its classes and how to count. The first that fits counts.
COUNTS = (
    (NON_LOCAL, _non_local),
    ((keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D), _convolution),
    (
        (keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose),
        _transposed_convolution,
    ),
    ((keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D), _depthwise_convolution),
    ((keras.layers.SeparableConv1D, keras.layers.SeparableConv2D), _separable_convolution),
    (keras.layers.Dense, _dense),
    (keras.layers.EinsumDense, _einsum_dense),
    (keras.layers.TimeDistributed, _time_distributed),
    (
        (
            keras.layers.BatchNormalization,
            keras.layers.GroupNormalization,
            keras.layers.LayerNormalization,
            keras.layers.Normalization,
            keras.layers.PReLU,
            keras.layers.Embedding,
        ),
        _no_macs,
    ),
)
# Layers and operations without weights that multiply and add all the same.
PRODUCTS = (
    "AdditiveAttention",
    "Attention",
    "Conv",
    "ConvTranspose",
    "Correlate",
    "DepthwiseConv",
    "Dot",
    "DotProductAttention",
    "Einsum",
    "Inner",
    "Kron",
    "Matmul",
    "Outer",
    "SeparableConv",
    "Tensordot",
    "Vdot",
)


# Activations inside of layers


def _inner_activations(layer, inputs):
    """Entries inside of a non-local block; of other layers only the outputs count."""
    if isinstance(layer, keras.layers.TimeDistributed):
        batch, steps, *one = inputs[0]
        return steps * _inner_activations(layer.layer, [(batch, *one)])
    if not isinstance(layer, NON_LOCAL):
        return 0
    block = _Block.of(layer, inputs[0])
    of_keys = block.inner * (1 + block.has_theta)  # g, φ
    entries = block.queries * block.inner * (1 + block.has_theta)  # the weighted sum, θ
    entries += block.projected_keys * of_keys
    if layer.pool_size is not None:
        entries += block.keys * (of_keys if layer.pool_after_projection else block.channels)
    entries += block.queries * block.channels * (2 if layer.norm is not None else 1)  # W_z, its normalization
    return block.windows * (entries + _held_scores(layer, block))


def _held_scores(layer, block):
    function = layer.function
    if function.linear and function.is_linear_cheaper(block.queries, block.keys, block.inner, block.inner):
        return 0
    return block.keys * (ops.chunk_size(layer.query_chunk_size, block.queries, block.keys) or block.queries)
