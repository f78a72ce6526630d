"""Non-local blocks and temporal kernels for networks that are trained already.

Shape letters: T, H, W the sizes of a kernel; I input channels, O output channels.
"""

import difflib
import tempfile
from collections.abc import Iterable

import keras
import numpy as np

from keras_nonlocal.applications.rematerialization import RematerializedModel
from keras_nonlocal.layers import NonLocal1D, NonLocal2D, NonLocal3D

_BY_RANK = {3: NonLocal1D, 4: NonLocal2D, 5: NonLocal3D}
# Dtype policies of blocks behind outputs of half precision: their variables stay float32.
_POLICIES = {"float16": "mixed_float16", "bfloat16": "mixed_bfloat16"}


def insert_non_local(model, after, **options):
    """Returns a copy of a functional model with non-local blocks after the named layers.

    The copy has variables of its own, with the values of `model`'s; `model` stays as it is. As a non-local block starts
    as the identity, the copy also has the outputs of `model`, until it is trained. Layers that are frozen in `model`
    are frozen in the copy; the blocks train.

    The copy is a plain functional model, not compiled. A subclass, such as a backbone of KerasHub, leaves its
    attributes behind. What is needed of them must be an output: for a feature pyramid, insert into
    `keras.Model(backbone.input, backbone.pyramid_outputs)`.

    Args:
        model: Functional (or sequential) Keras model of any rank. Its layers must come back from their configuration,
            as for saving.
        after: Names of the layers after which a block shall stand, each once. Their outputs must be
            `(batch, steps, channels)`, `(batch, height, width, channels)` or `(batch, time, height, width, channels)`,
            or channels first. A layer inside of a model in the model is `"inner_model/layer"`; if that model stands in
            several places, the block does too. Operations such as `x + y` have names too; `model.summary()` prints
            them.
        **options: Arguments of `NonLocal1D`, `NonLocal2D` or `NonLocal3D`, except `name`. By default, `data_format` is
            that of the layer, or of all others, and `dtype` keeps the precision of the layer's output.

    Returns:
        A new `keras.Model`. The block after the layer `"conv3"` has the name `"conv3_non_local"`. A layer that is
        called several times shares its block.

    Raises:
        ValueError: if `model` is not functional, has a `call` of its own or does not come back from its configuration;
            if it has no layer of such a name, or one whose output is no such map; if a name comes twice, or that of a
            block is taken; if the model's layers do not agree on a `data_format`.

    Reference:
        [Non-local Neural Networks](https://arxiv.org/abs/1711.07971), section 3.3: "we can insert a new non-local
        block into any pre-trained model, without breaking its initial behavior".

    Example:

    >>> inputs = keras.Input((16, 16, 3))
    >>> x = keras.layers.Conv2D(8, 3, name="conv")(inputs)
    >>> model = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(x))
    >>> new = insert_non_local(model, after=["conv"], pool_size=2)
    >>> new.get_layer("conv_non_local").pool_size
    (2, 2)
    """
    if isinstance(after, Iterable):
        after = [after] if isinstance(after, str) else list(after)
    if not isinstance(after, list) or not after or not all(isinstance(path, str) for path in after):
        raise ValueError(f"`after` must be a list of one or more names of layers. Received: after={after!r}")
    if not _is_functional(model):
        raise ValueError(
            f"`model` must be a functional Keras model, or a sequential one that is built. Received: model={model!r}"
        )
    if "name" in options:
        raise ValueError(f"The names of the blocks come from the layers'. Received: name={options['name']!r}")
    insertion = _Insertion(after, _find_places(model, after), options)
    new = insertion.copy_model(model)
    for original, copy in insertion.copied:
        _copy_state(original, copy)
    return new


class _Insertion:
    """Copies a model with its inner models, and puts the blocks in."""

    def __init__(self, after, places, options):
        self.after = after
        self.places, self.opened = places
        self.options = options
        self.copies = {}  # by the original's id, over all inner models: what stands in two places stays one
        self.names = {}  # of the originals, by the copy's id: not every configuration has the name
        self.copied = []  # pairs whose state is to be copied, once the copies are built

    def copy_model(self, model):
        graph = _graph(model)
        plain = keras.Sequential if isinstance(model, keras.Sequential) else type(graph)
        remat = isinstance(model, RematerializedModel)
        if type(model).call is not plain.call and not remat:
            raise ValueError(
                "A model with a `call` of its own does not come back from its layers; if these do all that is wanted, "
                f"insert into `keras.Model(model.input, model.output)`. Received: {model!r}"
            )
        blocks = {}

        def call(operation, *args, **kwargs):
            outputs, name = operation(*args, **kwargs), self.names[id(operation)]
            if (id(model), name) not in self.places:
                return outputs
            if name not in blocks:  # what is called twice shares its block
                blocks[name] = self.block(graph, operation, name, outputs)
            return blocks[name](outputs)

        # Keras' own copies of the inputs lose their names, and whether they are optional.
        inputs = {id(layer.output): layer for layer in graph.layers if isinstance(layer, keras.layers.InputLayer)}
        copy = keras.models.clone_model(
            graph,
            input_tensors=keras.tree.map_structure(lambda x: _copy_layer(inputs[id(x)]).output, graph.input),
            clone_function=self.copy_operation,
            call_function=call,
        )
        return RematerializedModel(copy.input, copy.output, name=copy.name) if remat else copy

    def copy_operation(self, operation):
        if id(operation) not in self.copies:
            plain = _is_functional(operation) and type(operation) in (keras.Sequential, type(_graph(operation)))
            if plain or id(operation) in self.opened:
                copy = self.copy_model(operation)
            else:
                copy = _copy_layer(operation)
                if isinstance(operation, keras.layers.Layer):  # other operations have no state
                    self.copied.append((operation, copy))
            self.copies[id(operation)] = copy
            self.names[id(copy)] = operation.name
        return self.copies[id(operation)]

    def block(self, model, operation, name, outputs):
        shape = getattr(outputs, "shape", None)
        if shape is None or len(shape) not in _BY_RANK:
            shapes = keras.tree.map_structure(lambda x: x.shape, outputs)
            raise ValueError(
                "`after` must name layers whose output is one map of 1 to 3 dimensions of positions and channels; that "
                f"of {name!r} is {shapes}. Received: after={self.after!r}"
            )
        # Another precision than that of the layer's output would become that of what follows.
        dtype = _POLICIES.get(outputs.dtype, outputs.dtype)
        options = {"dtype": dtype} | self.options
        if options.get("data_format") is None:
            options["data_format"] = _data_format(model, operation, name)
        return _BY_RANK[len(shape)](**options, name=_block_name(name))


def _is_functional(model):
    return isinstance(model, keras.Model) and hasattr(model, "inputs")  # a sequential one has them once it is built


def _graph(model):
    """A plain functional model of the same layers.

    A sequential one lists layers: there are no calls to put something behind. And what is compiled, Keras would copy
    compiled, which fails for losses that are not registered.
    """
    if isinstance(model, keras.Sequential):
        return keras.Model(model.inputs[0], model.outputs[0], name=model.name)
    return keras.Model(model.input, model.output, name=model.name)


def _block_name(name):
    return f"{name}_non_local"


def _places(model, outer=(), prefix=""):
    """All that `after` can name: path → the models that it stands in, from the outermost to its own, and the name."""
    operations = [x for x in _graph(model).operations if not isinstance(x, keras.layers.InputLayer)]
    models = (*outer, model)
    places = {prefix + operation.name: (models, operation.name) for operation in operations}
    for operation in operations:
        if _is_functional(operation):
            places |= _places(operation, models, f"{prefix}{operation.name}/")
    return places


def _find_places(model, after):
    """Where blocks shall stand, `(id of the model, name)`, and the ids of the models that hold one.

    By id and not by path, as a model that stands in several places has several.
    """
    places = {path: (models, (id(models[-1]), name)) for path, (models, name) in _places(model).items()}
    names = {place for _, place in places.values()}
    wanted = set()
    for path in after:
        if path not in places:
            inner = [known for known in places if known.endswith(f"/{path}")]
            near = inner or difflib.get_close_matches(path, places)
            raise ValueError(
                f"`after` must hold names of layers of the model {model.name!r} that are no inputs; {path!r} is none"
                f"{f' (near: {near})' if near else ''}. Received: after={after!r}"
            )
        owner, name = place = places[path][1]
        if place in wanted:
            raise ValueError(f"`after` must hold each layer once, and has {path!r} twice. Received: after={after!r}")
        if (owner, _block_name(name)) in names:
            raise ValueError(
                "`after` must hold no name that has its block already; to put one more behind "
                f"{_block_name(name)!r}, name that. Received: after={after!r}"
            )
        wanted.add(place)
    return wanted, {id(holder) for models, place in places.values() if place in wanted for holder in models}


def _data_format(model, operation, name):
    """The data format of an operation's output."""
    own = getattr(operation, "data_format", None)
    formats = {own} if own else {getattr(layer, "data_format", None) for layer in model.layers} - {None}
    if len(formats) > 1:
        raise ValueError(
            f"`data_format` must be given, as the layers of {model.name!r} have different ones and {name!r} "
            "has none. Received: data_format=None"
        )
    return formats.pop() if formats else None


def _copy_layer(layer):
    """A layer or operation as it was before it was called for the first time."""
    if type(layer) is keras.layers.Lambda:
        # Its configuration has the function as bytes, which Keras refuses to run: they could be from anywhere.
        return keras.layers.Lambda(
            layer.function,
            output_shape=layer._output_shape,  # Keras has no public name for it
            mask=layer.mask,
            arguments=layer.arguments,
            name=layer.name,
            trainable=layer.trainable,
            dtype=layer.dtype_policy,
        )
    try:
        return type(layer).from_config(layer.get_config())
    except Exception as error:  # whatever it is that their code raises
        raise ValueError(
            "The layers of `model` must come back from their configuration, `get_config()`; "
            f"{layer.name!r} does not ({type(error).__name__}). Received: {layer!r}"
        ) from error


def _copy_state(original, copy):
    """Copies the variables, seeds included, what trains, and what layers for preprocessing have learned."""
    variables, copies = original.variables, copy.variables
    if [variable.shape for variable in variables] != [variable.shape for variable in copies]:
        raise ValueError(
            f"The layers of `model` must come back from their configuration, `get_config()`; {original.name!r} has the "
            f"variables {[(variable.path, tuple(variable.shape)) for variable in variables]}. Received: "
            f"{[(variable.path, tuple(variable.shape)) for variable in copies]}"
        )
    parts = list(zip(_parts(original), _parts(copy), strict=True))
    for part, part_copy in parts:
        part_copy.trainable = part.trainable  # of outer layers first: it passes to the inner ones
    for variable, variable_copy in zip(variables, copies, strict=True):
        variable_copy.assign(variable)
        variable_copy.trainable = variable.trainable
    for part, part_copy in parts:
        if hasattr(part, "save_assets"):  # vocabularies
            with tempfile.TemporaryDirectory() as folder:
                part.save_assets(folder)
                part_copy.load_assets(folder)
        elif hasattr(part, "finalize_state"):  # `Normalization` computes with what it derives from its variables
            part_copy.finalize_state()


def _parts(layer):
    """The layer and all layers in it, outer ones first."""
    parts = {}  # by id: some stand in several attributes
    waiting = [layer]
    while waiting:
        part = waiting.pop(0)
        if id(part) not in parts:
            parts[id(part)] = part
            attributes = part.layers if isinstance(part, keras.Model) else list(vars(part).values())
            waiting += [x for x in keras.tree.flatten(attributes) if isinstance(x, keras.layers.Layer)]
    return list(parts.values())


def inflate_weights(image_model, video_model, method="average"):
    """Fills a video network with the weights of an image network of the same family.

    Layers are matched by name. A kernel that is wider in time than the image network's is its copy at every one of its
    T time steps, divided by T: on a video of one repeated image both give the same responses, away from the ends of
    the clip, where convolutions are padded with zeros. That is the paper's way; `method="center"` leaves the video
    network with the image network's responses to each frame.

    Args:
        image_model: The trained network: kernels of `H×W×I×O`, or of `1×H×W×I×O` as in a C2D network built with
            `temporal_strides=(1, 1, 1)` on clips of one frame.
        video_model: The network to fill, in place.
        method: What a kernel that is wider in time is filled with: `"average"`, the image network's kernel divided by
            T at every time step, or `"center"`, that kernel at the middle step and zeros at the others.

    Returns:
        The names of the layers of `video_model` that have weights and were not filled: those that `image_model`
        does not have, such as the non-local blocks, and a head with another number of classes.

    Raises:
        ValueError: if a layer of the same name has weights of other shapes (the head excepted), no layer matches, or
            `method` is unknown.

    Reference:
        [Non-local Neural Networks](https://arxiv.org/abs/1711.07971), section 4, "Inflated 3D ConvNet"

    Example:

    >>> from keras_nonlocal.applications import C2DResNet11, I3DResNet11
    >>> image_model = C2DResNet11(temporal_strides=(1, 1, 1), non_local=0, classes=10)
    >>> inflate_weights(image_model, I3DResNet11(non_local=1, classes=4))
    ['nonlocal_conv3_1', 'pred']
    """
    if method not in ("average", "center"):
        raise ValueError(f'`method` must be "average" or "center". Received: method={method!r}')
    sources = {layer.name: layer for layer in image_model.layers if layer.weights}
    targets = [layer for layer in video_model.layers if layer.weights]
    head = targets[-1] if targets else None
    planned, not_filled = [], []
    for layer in targets:
        if layer.name not in sources:
            not_filled.append(layer.name)
            continue
        source, shapes = sources[layer.name], [tuple(weight.shape) for weight in layer.weights]
        values = [
            inflate_kernel(value, shape, method) for value, shape in zip(source.get_weights(), shapes, strict=False)
        ]
        if len(source.weights) == len(shapes) and all(value is not None for value in values):
            planned.append((layer, values))
        elif layer is head and isinstance(layer, keras.layers.Dense):
            not_filled.append(layer.name)
        else:
            received = [tuple(weight.shape) for weight in source.weights]
            raise ValueError(
                f"The layer {layer.name!r} needs weights of the shapes {shapes}. Received: {received} from the "
                "layer of the same name in `image_model`"
            )
    if not planned:
        raise ValueError(
            "`image_model` must have layers with the names of `video_model`'s, and has none. "
            f"Received: image_model={image_model.name!r}, video_model={video_model.name!r}"
        )
    for layer, values in planned:  # only now: a mismatch leaves the network as it was
        layer.set_weights(values)
    return not_filled


def inflate_kernel(value, shape, method="average"):
    """The value in the target's shape, repeated along time if it has one step there; `None` if it does not fit."""
    if value.shape == shape:
        return value
    if value.ndim == 4 and len(shape) == 5:
        value = value[None]
    if value.ndim == 5 and len(shape) == 5 and value.shape[0] == 1 and value.shape[1:] == shape[1:]:
        if method == "average":
            return np.repeat(value, shape[0], axis=0) / shape[0]
        inflated = np.zeros(shape, value.dtype)
        inflated[shape[0] // 2] = value[0]
        return inflated
    return None
