"""Pictures of attention in TensorBoard, while a model trains."""

import io
import os
import socket
import time
import uuid
import warnings

import keras
import numpy as np

from keras_nonlocal.applications import preprocess_input as _preprocess_input
from keras_nonlocal.visualization.attention import Looker
from keras_nonlocal.visualization.drawing import draw_arrows, draw_attention

# What can be logged: `(clip, attention, **options)` to a picture.
PICTURES = {"attention": draw_attention, "arrows": draw_arrows}


class AttentionLogger(keras.callbacks.Callback):
    """Logs pictures of what positions attend to, for TensorBoard.

    Pictures are drawn at the end of epochs and stand under "Images" as `attention/<layer>/<clip>` and
    `arrows/<layer>/<clip>`. They are written by the package `tensorboard`, on every backend of Keras; it comes with the
    extra `keras-nonlocal[viz]`.

    Args:
        log_dir: Folder to write to. One that `keras.callbacks.TensorBoard` writes to will do.
        clips: Dictionary of names to clips, or a list of clips, which are then named by their numbers: arrays of
            pixels in 0..255, of shape `(frames, height, width, 3)`.
        positions: For each clip the position `(t, y, x)` that asks, or `None` for the most attended one of each
            epoch. `None`: that for all clips.
        layer_names: Names of `NonLocal3D` layers, see `non_local_layers`. `None`: the last one.
        every: Number of epochs from one logging to the next. The first epoch is logged.
        pictures: Which to log: `"attention"` (`draw_attention`), `"arrows"` (`draw_arrows`) or both.
        preprocess_input: Function from pixels to what the model takes.
        **options: Arguments of both functions, such as `max_frames` and `frame_height`.

    A layer whose weights are not finite, as of a model that diverged, gives no picture and a warning.

    Raises:
        ImportError: if `tensorboard` is not installed.
        ValueError: if an argument is none of the above; when training begins, if the model has no such layer, or a
            clip, a position or an option does not suit it.

    Example:

    ```python
    logger = AttentionLogger("logs", {"goal": clip}, positions=[(0, 112, 80)], every=5)
    model.fit(dataset, epochs=50, callbacks=[logger])  # then: tensorboard --logdir logs
    ```
    """

    def __init__(
        self,
        log_dir,
        clips,
        positions=None,
        layer_names=None,
        every=1,
        pictures=("attention",),
        preprocess_input=_preprocess_input,
        **options,
    ):
        super().__init__()
        _tensorboard()  # now, not after the first epoch
        clips = clips if isinstance(clips, dict) else {str(number): clip for number, clip in enumerate(clips)}
        positions = [None] * len(clips) if positions is None else list(positions)
        if not clips or len(positions) != len(clips):
            raise ValueError(
                f"`positions` must be one for each clip, of which at least one is needed; there are {len(clips)}. "
                f"Received: positions={positions!r}"
            )
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"`every` must be an integer of at least 1. Received: every={every!r}")
        if not pictures or not set(pictures) <= set(PICTURES):
            raise ValueError(f"`pictures` must be of {', '.join(map(repr, PICTURES))}. Received: pictures={pictures!r}")
        self.log_dir = os.fspath(log_dir)
        self.clips = {name: np.asarray(clip) for name, clip in clips.items()}
        self.positions = dict(zip(clips, positions, strict=True))
        self.layer_names = [None] if layer_names is None else list(layer_names)
        self.every = every
        self.pictures = tuple(pictures)
        self.preprocess_input = preprocess_input
        self.options = options
        self._lookers, self._writer = (), None

    def on_train_begin(self, logs=None):
        self._lookers = [Looker(self.model, name, self.preprocess_input) for name in self.layer_names]
        # What is wrong with a clip, a position or an option is found now, not after the first epoch.
        for _ in self._draw():
            pass
        os.makedirs(self.log_dir, exist_ok=True)
        # Readers take what has "tfevents" in its name, in the order of the names.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{uuid.uuid4().hex}.attention"
        _, _, record_writer = _tensorboard()
        self._writer = record_writer.RecordWriter(open(os.path.join(self.log_dir, name), "wb"))
        self._write(file_version="brain.Event:2")

    def on_epoch_end(self, epoch, logs=None):
        if epoch % self.every:
            return
        _, summary, _ = _tensorboard()
        values = []
        model = self.model  # on JAX this also brings the weights that training holds
        for looker in self._lookers:
            looker.model = model
        for layer_name, name, pictures in self._draw():
            if not pictures:  # which is for other callbacks to end the training for
                warnings.warn(
                    f"Epoch {epoch}: no picture of {layer_name}, whose weights of attention are not finite",
                    stacklevel=2,
                )
            for kind, picture in pictures.items():
                png = io.BytesIO()
                picture.save(png, format="PNG")
                image = summary.Summary.Image(
                    height=picture.height, width=picture.width, colorspace=3, encoded_image_string=png.getvalue()
                )
                values.append(summary.Summary.Value(tag=f"{kind}/{layer_name}/{name}", image=image))
        self._write(step=epoch, summary=summary.Summary(value=values))

    def _draw(self):
        """Name of the layer, name of the clip and `{kind: picture}`, which is empty if weights are not finite."""
        for looker in self._lookers:
            for name, clip in self.clips.items():
                attention = looker(clip, self.positions[name])
                kinds = self.pictures if attention.is_finite() else ()
                yield looker.layer_name, name, {kind: PICTURES[kind](clip, attention, **self.options) for kind in kinds}

    def on_train_end(self, logs=None):
        self._writer.close()

    def _write(self, **content):
        event, _, _ = _tensorboard()
        self._writer.write(event.Event(wall_time=time.time(), **content).SerializeToString())
        self._writer.flush()


def _tensorboard():
    """Its modules of events, of summaries and of the file format."""
    try:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer import record_writer
    except ImportError:
        raise ImportError("Logging to TensorBoard needs its package: pip install 'keras-nonlocal[viz]'") from None
    return event_pb2, summary_pb2, record_writer
