"""Training in less memory: a network that keeps the outputs of its blocks, and computes what is inside once more.

A training step holds the outputs of nearly every layer until the backward pass has used them: with long clips, more
than all else. Here a step keeps what goes from one block to the next, and the backward pass begins each block with its
forward pass. That is about a third more arithmetic; `benchmarks/training.py` measures time and memory.
"""

import keras
from keras import ops

# What the names of layers begin or end with whose outputs are kept, besides inputs and scores.
KEPT = {"begin": ("nonlocal_",), "end": ("pool1", "_out")}


@keras.saving.register_keras_serializable(package="keras_nonlocal")
class RematerializedModel(keras.Model):
    """A network of the builders that computes its blocks once more in the backward pass.

    The layers, their names and weights, what is saved and the results are those of the plain `keras.Model` of the same
    graph. A part of the graph begins and ends where all goes through one layer that `KEPT` names.
    """

    def call(self, inputs, training=None, mask=None):
        if not training:
            return super().call(inputs, training=training, mask=mask)
        if not hasattr(self, "parts"):
            self.parts = _Parts(self)
        return self.parts.call(inputs)


class _Parts:
    """The parts of a model, and what follows the last of them. No layer, so that the model has no weight twice."""

    def __init__(self, model):
        self.inputs = keras.tree.flatten(model.input)
        kept = [layer.output for layer in kept_layers(model)]
        starts = [model.input, *kept]
        self.parts = [_Part(start, end) for start, end in zip(starts, kept, strict=False)]
        self.head = keras.Model(starts[-1], model.output)

    def call(self, inputs):
        tensors = [
            ops.convert_to_tensor(x, own.dtype) for x, own in zip(keras.tree.flatten(inputs), self.inputs, strict=True)
        ]
        for part in self.parts:
            tensors = [part(*tensors)]
        return self.head(*tensors, training=True)


def kept_layers(model):
    """Where a network of the builders may be cut in parts, each of which is computed once more by itself.

    Args:
        model: Functional Keras model.

    Returns:
        The layers that `KEPT` names and nothing goes past, in order: none in one of several branches.
    """
    operations = model.operations  # in an order of computation
    last_use = {id(x): number for number, operation in enumerate(operations) for x in _tensors(operation, "input")}
    last_use |= {id(x): len(operations) for x in model.outputs}
    kept, awaited = [], 0
    for number, operation in enumerate(operations[:-1]):
        is_named = operation.name.startswith(KEPT["begin"]) or operation.name.endswith(KEPT["end"])
        if is_named and awaited <= number:
            kept.append(operation)
        awaited = max([awaited, *(last_use.get(id(x), 0) for x in _tensors(operation, "output"))])
    return kept


def _tensors(operation, name):
    return keras.tree.flatten(getattr(operation, name))


class _Part(keras.layers.Layer):
    """From some tensors of a graph to another, of which nothing but the inputs is kept for the backward pass."""

    def __init__(self, inputs, outputs):
        super().__init__(autocast=False)  # the part's layers round their weights, if they do, and not all of them do
        self.graph = keras.Model(inputs, outputs)

    def call(self, *inputs):
        weights = self.graph.trainable_variables
        state = self.graph.non_trainable_variables
        # Tensors and not variables, which TensorFlow would follow on its own too: gradients would count twice.
        values = [ops.copy(variable) for variable in (*weights, *state)]
        updated = []

        def run(*tensors):
            # Without side effects: else the backward pass would update the moving statistics a second time.
            arguments, values = tensors[: len(inputs)], tensors[len(inputs) :]
            before = values[len(weights) :]
            x = keras.tree.pack_sequence_as(self.graph.input, arguments)
            outputs, after = self.graph.stateless_call(values[: len(weights)], before, x, training=True)
            updated[:] = [i for i, pair in enumerate(zip(before, after, strict=True)) if pair[0] is not pair[1]]
            return (outputs, *(after[i] for i in updated))

        outputs, *after = keras.remat(run)(*inputs, *values)
        for i, value in zip(updated, after, strict=True):
            state[i].assign(value)
        return outputs
