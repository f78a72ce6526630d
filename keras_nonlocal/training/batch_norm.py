"""Batch normalization that is frozen, or evaluated with exact statistics."""

import contextlib
import itertools

import keras
import numpy as np

NORMS = (keras.layers.BatchNormalization,)


def freeze_batch_norm(model):
    """Freezes batch normalization: its statistics, γ and β stay as they are.

    Layers inside of other layers are frozen too, such as those of non-local blocks. Call it before `compile`; and again
    on a model that was loaded, as a layer does not save what was frozen inside of it.

    Args:
        model: Keras model or layer, changed in place.

    Returns:
        The number of layers that it has frozen.

    Example:

    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.BatchNormalization()])
    >>> freeze_batch_norm(model)
    1
    >>> [weight.name for weight in model.trainable_weights]
    ['kernel', 'bias']
    """
    norms = batch_norms(model)
    for norm in norms:
        norm.trainable = False
    return len(norms)


def batch_norms(layer):
    """All layers of batch normalization in a model or a layer, however deep.

    Args:
        layer: Keras layer or model.

    Returns:
        A list of layers, each once.
    """
    return [inner for inner in _layers_of(layer, {}).values() if isinstance(inner, NORMS)]


def _layers_of(value, found):
    """`{id: layer}` of `value` and of all layers that it holds as attributes, or in lists and dictionaries of them."""
    if isinstance(value, keras.Layer):
        if id(value) not in found:
            found[id(value)] = value
            _layers_of(vars(value), found)
    elif isinstance(value, dict):
        _layers_of(list(value.values()), found)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            _layers_of(inner, found)
    return found


@contextlib.contextmanager
def precise_batch_norm(model, dataset, num_batches=200):
    """Inside of the block, batch normalization has the statistics of `num_batches` batches for the weights as they are.

    The moving averages lag behind the weights. Here the network runs on the batches as in training, without learning
    from them, and each layer gets the mean and the variance of all that it has normalized. As in the paper's release
    and in PySlowFast (fvcore), that variance is the mean of the batches' variances plus the variance of their means; it
    is over N, as Keras has it, not N - 1. Afterwards the moving averages, and all else that such a run changes, are as
    they were, bit for bit. Frozen layers keep what they have.

    Args:
        model: Keras model.
        dataset: Training batches, `inputs` or `(inputs, labels, …)`: anything that can be iterated over, or a function
            without arguments that returns such a thing.
        num_batches: Integer; fewer if `dataset` ends before.

    Returns:
        A context manager.

    Raises:
        ValueError: if `num_batches` is not positive, or `dataset` is empty.

    Reference:
        [Rethinking "Batch" in BatchNorm](https://arxiv.org/abs/2105.07576), section 3

    Example:

    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.BatchNormalization()])
    >>> batches = [np.array([[1.0], [3.0]], "float32"), np.array([[5.0], [7.0]], "float32")]
    >>> with precise_batch_norm(model, batches):
    ...     print([float(weight[0]) for weight in model.layers[0].non_trainable_weights])
    [4.0, 5.0]
    >>> [float(weight[0]) for weight in model.layers[0].non_trainable_weights]
    [0.0, 1.0]
    """
    with _PreciseStatistics(model, num_batches).of(dataset):
        yield


class PreciseBatchNormalization(keras.callbacks.Callback):
    """Evaluates with the statistics of `precise_batch_norm`, and trains on with the moving averages.

    A dataset that draws new clips in every pass counts the passes: give one that is used for nothing else.

    Args:
        dataset: Training batches, as for `precise_batch_norm`.
        num_batches: Integer.

    Example:

    ```python
    model.fit(train, validation_data=validation, callbacks=[PreciseBatchNormalization(train)])
    ```
    """

    def __init__(self, dataset, num_batches=200):
        super().__init__()
        _check_num_batches(num_batches)
        self.dataset = dataset
        self.num_batches = num_batches
        self._statistics = None
        self._inside = contextlib.ExitStack()

    def set_model(self, model):
        super().set_model(model)
        self._statistics = _PreciseStatistics(model, self.num_batches)

    def precise(self):
        """`precise_batch_norm` of the callback's model, with what it has compiled: to save the model, for example.

        Returns:
            A context manager.
        """
        return self._statistics.of(self.dataset)

    def on_test_begin(self, logs=None):
        self._inside.close()  # of an evaluation that was broken off
        self._inside.enter_context(self.precise())

    def on_test_end(self, logs=None):
        self._inside.close()

    def on_train_batch_begin(self, batch, logs=None):
        self._inside.close()

    def on_train_end(self, logs=None):
        self._inside.close()


def _check_num_batches(num_batches):
    if not isinstance(num_batches, int) or isinstance(num_batches, bool) or num_batches < 1:
        raise ValueError(f"`num_batches` must be a positive integer. Received: num_batches={num_batches!r}")


class _PreciseStatistics:
    """Holds the compiled network from one evaluation to the next."""

    def __init__(self, model, num_batches):
        _check_num_batches(num_batches)
        self.model = model
        self.num_batches = num_batches
        self.in_training = _InTraining(model)

    @contextlib.contextmanager
    def of(self, dataset):
        norms = [norm for norm in batch_norms(self.model) if norm.trainable]
        if not norms:
            yield
            return
        moving = [weight for norm in norms for weight in (norm.moving_mean, norm.moving_variance)]
        averages = [_array(weight) for weight in moving]
        try:
            _assign(moving, self._moments(norms, dataset))
            yield
        finally:
            _assign(moving, averages)

    def _moments(self, norms, dataset):
        """The moving means and variances to evaluate with, in the order of `norms`."""
        state = self.model.non_trainable_variables  # of dropout's random numbers, too
        before = [_array(weight) for weight in state]
        momenta = [norm.momentum for norm in norms]
        total = 0
        means, variances = [0.0] * len(norms), [0.0] * len(norms)
        try:
            for norm in norms:
                norm.momentum = 0.0  # what moves becomes the statistics of the last batch
            for batch in itertools.islice(dataset() if callable(dataset) else dataset, self.num_batches):
                inputs = keras.tree.map_structure(np.asarray, batch[0] if isinstance(batch, (tuple, list)) else batch)
                with random_numbers_kept():
                    self.in_training.predict_on_batch(inputs)
                size = len(keras.tree.flatten(inputs)[0])
                total += size
                share = size / total
                # Of two sets of values: Chan et al., 1979.
                for index, norm in enumerate(norms):
                    difference = _array(norm.moving_mean).astype("float64") - means[index]
                    variance = _array(norm.moving_variance).astype("float64")
                    variances[index] += share * (variance - variances[index] + (1 - share) * difference**2)
                    means[index] += share * difference
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
            _assign(state, before)
        if not total:
            raise ValueError(f"`dataset` must hold a batch. Received: dataset={dataset!r}")
        return [value for pair in zip(means, variances, strict=True) for value in pair]


class _InTraining(keras.Model):
    """A model whose prediction is its forward pass in training: each backend compiles it as it does predictions."""

    def __init__(self, model):
        super().__init__(name="in_training")
        self.model = model

    def call(self, inputs):
        return self.model(inputs, training=True)


def random_numbers_kept():
    """A block that leaves PyTorch's generator as it was, which is one for all and no variable of the model."""
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.random.fork_rng()


def _array(weight):
    return np.array(keras.ops.convert_to_numpy(weight))  # a copy: some backends give a view


def _assign(weights, values):
    for weight, value in zip(weights, values, strict=True):
        weight.assign(value)
