"""What a position attends to, over all frames of a clip: as arrays, as pictures and video, and in TensorBoard."""

from keras_nonlocal.visualization.attention import Attention, attend
from keras_nonlocal.visualization.drawing import draw_arrows, draw_attention, write_attention_video
from keras_nonlocal.visualization.geometry import non_local_layers
from keras_nonlocal.visualization.logger import AttentionLogger

__all__ = [
    "Attention",
    "AttentionLogger",
    "attend",
    "draw_arrows",
    "draw_attention",
    "non_local_layers",
    "write_attention_video",
]
