"""Training on several devices and machines: every worker takes its share of a batch, and all make the same step.

Of a step on W workers the gradients, the statistics of batch normalization, the loss and the metrics are those of the
whole batch, so that the weights are the same in all workers, and those of one process that takes the whole batch.
"""

import contextlib
import inspect
import json
import os

import keras
import numpy as np

from .batch_norm import batch_norms
from .checkpoints import TrainingError
from .loop import LocalStep

# What the backends raise where a worker is gone, or the connection to it: classes, and what is in the message.
_LOST = {name: ("",) for name in ("UnavailableError", "AbortedError", "CancelledError", "DeadlineExceededError")}
_LOST |= dict.fromkeys(
    ("JaxRuntimeError", "XlaRuntimeError"),
    ("UNAVAILABLE", "ABORTED", "CANCELLED", "DEADLINE_EXCEEDED", "Connection", "Gloo"),
)
# Seconds after which JAX takes a worker that is not heard of for gone, and one that ends alone waits for the others.
JAX_TIMEOUTS = {"heartbeat_timeout_seconds": 60, "shutdown_timeout_seconds": 15}

# What says to a process which worker it is.
VARIABLES = {"tensorflow": "TF_CONFIG", "jax": "KERAS_DISTRIBUTION_JOB_ADDRESSES"}


@contextlib.contextmanager
def distribute(strategy=None):
    """Joins the workers of a training, as the environment says; everything else goes inside of the block.

    Every worker is a process of its own, started with the same command:

    - TensorFlow: `TF_CONFIG` names the addresses of all workers and which of them this is, and
      `tf.distribute.MultiWorkerMirroredStrategy` joins them. Without it, the GPUs of this machine are used.
    - JAX: `KERAS_DISTRIBUTION_JOB_ADDRESSES` names the address of the first worker,
      `KERAS_DISTRIBUTION_NUM_PROCESSES` and `KERAS_DISTRIBUTION_PROCESS_ID` the others, and
      `keras.distribution.DataParallel` shares the batches among them. Without them, the devices of this machine are.

    It must come before TensorFlow or JAX compute anything. A process without these variables and with one device is
    alone, and trains as without this function.

    Args:
        strategy: A `tf.distribute.Strategy` whose devices make every step together, or a
            `keras.distribution.DataParallel(auto_shard_dataset=False)`. `None`: as the environment says.

    Returns:
        A context manager that gives the `Workers`.

    Raises:
        ValueError: If the environment is made for another backend, or does not say a cluster of workers.
        TrainingError: If TensorFlow or JAX have begun already, or another worker does not come.

    Example:

    >>> with distribute() as workers:
    ...     print(workers.num_workers, workers.index, workers.shard)
    1 0 None

    ```python
    with distribute() as workers:
        batch_size = 64 // workers.num_workers
        model = ...  # built and compiled here

        def dataset(start):
            return video_dataset_from_directory(
                "videos", batch_size=batch_size, shard=workers.shard, on_error="black", seed=1, with_paths=True,
                start=start,
            )

        train(model, workers.dataset(dataset, batch_size), "run", epochs=10, step=workers.step(model))
    ```
    """
    backend = keras.backend.backend()
    if backend == "jax":
        _check_jax_environment()
    for name, variable in VARIABLES.items():
        if name != backend and os.environ.get(variable):
            raise ValueError(
                f"`{variable}` is for the backend {name!r}. Received: {variable}={os.environ[variable]!r} with the "
                f"backend {backend!r}"
            )
    with _WORKERS.get(backend, _alone)(strategy) as workers:
        yield workers


class Workers:
    """The processes that train one model together. This is what `distribute` gives.

    Args:
        num_workers: Integer, how many they are.
        index: Integer, which of them this process is.
        num_devices: Integer, on how many devices this process computes.

    Attributes:
        num_workers: As above.
        index: As above.
        num_devices: As above.
    """

    def __init__(self, num_workers=1, index=0, num_devices=1):
        self.num_workers = num_workers
        self.index = index
        self.num_devices = num_devices

    @property
    def is_chief(self):
        """Whether this is the first worker, the only one that writes checkpoints, logs and models."""
        return self.index == 0

    @property
    def shard(self):
        """What `video_dataset_from_directory` takes as `shard`: this worker's share of the videos."""
        return None if self.num_workers == 1 else (self.num_workers, self.index)

    def dataset(self, dataset, batch_size):
        """Makes all workers begin and end every pass together.

        A pass ends for all of them where one of them has no whole batch left: of N videos, the last N modulo
        `num_workers * batch_size` of a pass are left out, which are others in each pass. Places count the videos of all
        workers, so that a training may go on with another number of workers: with the same clips in a batch, if they
        are of files (shards are dealt out before they are shuffled) and broken ones are black.

        Args:
            dataset: Function from a place to batches as `train` takes it, of this worker's share.
            batch_size: Integer, the clips of a batch of this worker.

        Returns:
            Such a function. A process with one device gets back its own.

        Raises:
            ValueError: If the devices of this worker cannot share a batch equally.
        """
        if self.num_workers * self.num_devices == 1:
            return dataset
        if batch_size % self.num_devices:
            raise ValueError(
                f"`batch_size` must be divisible by the {self.num_devices} devices of a worker. "
                f"Received: batch_size={batch_size}"
            )

        def shared(start):
            number, position = start
            return _Together(dataset((number, position // self.num_workers)), batch_size, self)

        return shared

    def step(self, model):
        """The steps of a model, for `train`.

        Args:
            model: Keras model, built and compiled inside of the block of `distribute`.

        Returns:
            An object like `LocalStep(model)`.
        """
        return LocalStep(model)

    def gather(self, values):
        """The numbers of all workers. All must call it, and wait here for each other.

        Args:
            values: List of integers.

        Returns:
            An int64 array of shape `(num_workers, len(values))`.
        """
        return np.asarray([values], "int64")


class _Together:
    """The batches of this worker, as long as every worker has a whole one."""

    def __init__(self, source, batch_size, workers):
        self._source = source
        self._batch_size = batch_size
        self._workers = workers

    def __iter__(self):
        workers = self._workers
        batches = iter(self._source)
        while True:
            batch = next(batches, None)
            size = 0 if batch is None else len(keras.tree.flatten(batch[0])[0])
            place = (0, 0)
            if batch is not None and len(batch) == 4:
                # The batches of all workers make one of the single process, in which this is the place of the last.
                places = (np.asarray(batch[3]) + (0, 1)) * (1, workers.num_workers) - (0, 1)
                place = places[-1]
                batch = (*batch[:3], places)
            found = workers.gather([size, *place])
            if found[:, 0].min() < self._batch_size:
                return
            if (found != found[0]).any():
                raise TrainingError(
                    'All workers must be at the same place: with `on_error="black"`, one `seed`, and a directory of '
                    "the training that all of them see. Received: (clips, pass, position of the last) of the workers: "
                    f"{', '.join(str(tuple(row)) for row in found.tolist())}"
                )
            yield batch


class _DistributedStep(LocalStep):
    """Steps that all workers make together."""

    def __init__(self, model, workers):
        super().__init__(model)
        self._workers = workers

    is_alone = False

    @property
    def is_chief(self):
        return self._workers.is_chief

    def gather(self, values):
        return self._workers.gather(values).tolist()

    def run(self, x, y):
        with others_needed():
            return self._run(x, y)

    def evaluate(self, validation_data, callbacks):
        """Every worker evaluates what it is given, and what they have counted is added."""
        model = self._model
        callbacks.on_test_begin()
        model.stop_evaluating = False
        with others_needed():
            self._begin_evaluation()
            for number, (x, y, sample_weight) in enumerate(_evaluated(validation_data)):
                callbacks.on_test_batch_begin(number)
                self._evaluate_on(x, y, sample_weight)
                callbacks.on_test_batch_end(number)
            logs = self._end_evaluation()
        callbacks.on_test_end(logs)
        return logs

    def finish(self):
        super().finish()
        self._workers.gather([0])  # nobody leaves while others need them


def _evaluated(validation_data):
    """Batches `(x, y, sample_weight)` of what `model.evaluate` takes."""
    if isinstance(validation_data, (tuple, list)):
        validation_data = _batched(*keras.utils.unpack_x_y_sample_weight(validation_data))
    for batch in validation_data:
        yield keras.utils.unpack_x_y_sample_weight(batch)


def _batched(x, y, sample_weight, batch_size=32):
    for start in range(0, len(keras.tree.flatten(x)[0]), batch_size):
        cut = slice(start, start + batch_size)
        yield keras.tree.map_structure(
            lambda values, cut=cut: None if values is None else values[cut], (x, y, sample_weight)
        )


@contextlib.contextmanager
def others_needed():
    """Says what an error of the connection means."""
    try:
        yield
    except Exception as error:
        if not any(text in str(error) for text in _LOST.get(type(error).__name__, ())):
            raise
        raise TrainingError(
            "All workers must be there at every step. Start all of them again, and they go on from the last "
            f"checkpoint. Received: {type(error).__name__}: {error}"
        ) from error


def _alone(strategy):
    """On a backend that joins no workers."""
    if strategy is not None:
        raise ValueError(
            f"`strategy` must be `None` on the backend {keras.backend.backend()!r}. Received: strategy={strategy}"
        )
    return contextlib.nullcontext(Workers())


# TensorFlow


@contextlib.contextmanager
def _strategy_workers(strategy):
    import tensorflow as tf

    if strategy is None and os.environ.get("TF_CONFIG"):
        _check_cluster(os.environ["TF_CONFIG"])
        strategy = _joined(tf.distribute.MultiWorkerMirroredStrategy, RuntimeError, tf.errors.OpError)
    if strategy is None:
        gpus = tf.config.list_logical_devices("GPU")
        if len(gpus) < 2:
            yield Workers()
            return
        strategy = tf.distribute.MirroredStrategy(gpus)
    with strategy.scope():
        yield _StrategyWorkers(strategy)


def _check_cluster(text):
    """Of the errors in `TF_CONFIG` TensorFlow reports few, and waits for ever for workers that it does not name."""
    try:
        config = json.loads(text)
        cluster, task = config["cluster"], config["task"]
        is_known = 0 <= int(task["index"]) < len(cluster[task["type"]]) and set(cluster) <= {"chief", "worker"}
    except (ValueError, KeyError, TypeError):
        is_known = False
    if not is_known:
        raise ValueError(
            '`TF_CONFIG` must be JSON such as {"cluster": {"worker": ["host1:2222", "host2:2222"]}, '
            f'"task": {{"type": "worker", "index": 0}}}}. Received: TF_CONFIG={text!r}'
        )


def _joined(join, *errors):
    try:
        return join()
    except errors as error:
        raise TrainingError(
            "`distribute` must come before anything is computed, and all workers must be started. "
            f"Received: {type(error).__name__}: {error}"
        ) from error


class _StrategyWorkers(Workers):
    def __init__(self, strategy):
        import tensorflow as tf

        resolver = strategy.cluster_resolver
        cluster = resolver.cluster_spec().as_dict() if resolver else {}
        chiefs = len(cluster.get("chief", ()))
        num_workers = max(1, chiefs + len(cluster.get("worker", ())))
        index = (resolver.task_id or 0) + (chiefs if resolver.task_type == "worker" else 0) if cluster else 0
        super().__init__(num_workers, index, strategy.num_replicas_in_sync // num_workers)
        self.strategy = strategy

        def sum_rows(row):
            def own(row):
                context = tf.distribute.get_replica_context()
                # A row for each device of all workers, of which all of a worker's are the same.
                return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.identity(row))  # an argument is on no device

            return strategy.experimental_local_results(strategy.run(own, args=(row,)))[0]

        self._sum_rows = tf.function(sum_rows, autograph=False)

    def step(self, model):
        return _StrategyStep(model, self)

    def gather(self, values):
        if self.num_workers == 1:
            return super().gather(values)
        rows = np.zeros((self.num_workers, len(values)), "int64")
        rows[self.index] = values
        with others_needed():
            found = self._sum_rows(rows).numpy()
        return found // self.num_devices


class _StrategyStep(_DistributedStep):
    """The steps of a model whose variables are on every device, in the scope of a `tf.distribute.Strategy`."""

    def __init__(self, model, workers):
        super().__init__(model, workers)
        import tensorflow as tf

        is_own = workers.strategy.extended.variable_created_in_scope
        if not all(is_own(variable.value) for variable in model.variables):
            raise ValueError(f"`model` must be built inside of the block of `distribute`. Received: model={model!r}")
        # Inside of that which scales the loss, in half precision.
        steps = getattr(model.optimizer, "inner_optimizer", model.optimizer).gradient_accumulation_steps
        if steps:  # TensorFlow refuses: the devices cannot meet in a branch of the graph
            raise ValueError(
                "`gradient_accumulation_steps` must be `None` where a `tf.distribute.Strategy` makes the steps: more "
                f"workers do as much. Received: gradient_accumulation_steps={steps}"
            )
        self._strategy = workers.strategy
        self._norms = batch_norms(model)
        self._has_metrics = False
        # Not by XLA, which does not compile what the devices say to each other.
        self._train = tf.function(self._train_step, autograph=False, reduce_retracing=True)
        self._test = tf.function(self._test_step, autograph=False, reduce_retracing=True)

    def _run(self, x, y):
        self._make_metrics(x, y, None)
        self._model.reset_metrics()
        self._train(*self._shared(x, y))
        return self._figures()

    def _train_step(self, x, y):
        """Keras' own step, in which gradients are added up over all devices, each with its share in the mean."""
        with _synchronized(self._norms):
            self._on_devices(self._model.train_step, (x, y))

    def _on_devices(self, step, data):
        def on_device(*data):
            step(data)  # what it returns counts the clips of this device only

        self._strategy.run(on_device, args=data)

    def _make_metrics(self, *data):
        """Their variables, which Keras makes at the first batch, cannot be made on each device by itself."""
        if self._has_metrics:
            return
        x, y, sample_weight = keras.tree.map_structure(lambda values: None if values is None else values[:1], data)
        with keras.StatelessScope([(weight, weight.value) for weight in self._model.trainable_variables]):
            y_pred = self._model(x, training=False)
            self._model.compute_loss(x, y, y_pred, sample_weight, training=False)
            self._model.compute_metrics(x, y, y_pred, sample_weight)
        self._has_metrics = True

    def _begin_evaluation(self):
        self._model.reset_metrics()

    def _evaluate_on(self, x, y, sample_weight):
        self._make_metrics(x, y, sample_weight)
        self._test(*self._shared(x, y, sample_weight))

    def _test_step(self, *data):
        self._on_devices(self._model.test_step, data)

    def _end_evaluation(self):
        return self._figures()

    def _figures(self):
        """The metrics of all workers: what they have counted is added as it is read."""
        return {name: float(value) for name, value in self._model.get_metrics_result().items()}

    def _shared(self, *data):
        """A part of the batch for each device of this worker."""
        import tensorflow as tf

        count = self._workers.num_devices
        parts = [
            keras.tree.map_structure(
                lambda values, first=first: None if values is None else tf.convert_to_tensor(values[first::count]), data
            )
            for first in range(count)
        ]
        if count == 1:
            return parts[0]
        return self._strategy.experimental_distribute_values_from_function(
            lambda context: parts[context.replica_id_in_sync_group % count]
        )


@contextlib.contextmanager
def _synchronized(norms):
    """Inside of the block, batch normalization takes the statistics of all devices.

    Not for longer: a model that is saved so could not be loaded on another backend.
    """
    before = [norm.synchronized for norm in norms]
    for norm in norms:
        norm.synchronized = True
    try:
        yield
    finally:
        for norm, value in zip(norms, before, strict=True):
            norm.synchronized = value


# JAX


@contextlib.contextmanager
def _parallel_workers(strategy):
    import jax

    if os.environ.get(VARIABLES["jax"]) and not jax.distributed.is_initialized():
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        _joined(_join_jax, RuntimeError)
    if strategy is None:
        if jax.device_count() == 1:
            yield Workers()
            return
        strategy = keras.distribution.DataParallel(auto_shard_dataset=False)
    with strategy.scope():
        yield _ParallelWorkers(jax.process_count(), jax.process_index(), jax.local_device_count())


def _check_jax_environment():
    """Without one of them, each process would train alone."""
    names = [VARIABLES["jax"], "KERAS_DISTRIBUTION_NUM_PROCESSES", "KERAS_DISTRIBUTION_PROCESS_ID"]
    values = [os.environ.get(name) for name in names]
    is_cluster = all(values) and all(value.isdecimal() for value in values[1:]) and int(values[2]) < int(values[1])
    if any(values) and not is_cluster:
        raise ValueError(
            f"{', '.join(f'`{name}`' for name in names)} must be an address, the number of workers and which of them "
            f"this is, from 0 on. Received: {', '.join(map(repr, values))}"
        )


def _join_jax():
    """As `keras.distribution.initialize`, which leaves JAX's timeouts of minutes."""
    import jax

    known = inspect.signature(jax.distributed.initialize).parameters
    jax.distributed.initialize(
        os.environ[VARIABLES["jax"]].split(",")[0],
        int(os.environ["KERAS_DISTRIBUTION_NUM_PROCESSES"]),
        int(os.environ["KERAS_DISTRIBUTION_PROCESS_ID"]),
        **{name: value for name, value in JAX_TIMEOUTS.items() if name in known},
    )


class _ParallelWorkers(Workers):
    def step(self, model):
        return _ParallelStep(model, self)

    def gather(self, values):
        from jax.experimental import multihost_utils

        with others_needed():
            found = multihost_utils.process_allgather(np.asarray(values, "int32"))
        return np.asarray(found, "int64").reshape(self.num_workers, len(values))


class _ParallelStep(_DistributedStep):
    """The steps of a model whose variables are on every device, in the scope of `keras.distribution.DataParallel`.

    A batch is one array that lies on all devices, so that all that is computed is of the whole batch.
    """

    def __init__(self, model, workers):
        super().__init__(model, workers)
        import jax

        self._test = jax.jit(model.test_step)

    def _run(self, x, y):
        return LocalStep.run(self, x, y)

    # Evaluations are of each worker alone, which may have more batches than another or smaller ones.

    def _begin_evaluation(self):
        self._model.reset_metrics()
        model = self._model
        self._state = [
            [np.asarray(variable) for variable in variables]
            for variables in (model.trainable_variables, model.non_trainable_variables, model.metrics_variables)
        ]

    def _evaluate_on(self, x, y, sample_weight):
        data = keras.tree.map_structure(
            lambda values: None if values is None else np.asarray(values), (x, y, sample_weight)
        )
        _, self._state = self._test(self._state, data)

    def _end_evaluation(self):
        from jax.experimental import multihost_utils

        counted = [np.asarray(values) for values in self._state[2]]
        self._state = None
        for variable, values in zip(self._model.metrics_variables, counted, strict=True):
            variable.assign(np.reshape(multihost_utils.process_allgather(values), (-1, *values.shape)).sum(axis=0))
        return {name: float(value) for name, value in self._model.get_metrics_result().items()}


_WORKERS = {"tensorflow": _strategy_workers, "jax": _parallel_workers}
