"""Swin and Swin V2 for images of any size, with attention windows that can be changed.

`backbone` is the network, `attention` the attention inside windows, `windows` the geometry of
windows, and `window_change` changes the windows after pretraining.
"""

from moco.models.swin.backbone import clipped_windows
from moco.models.swin.window_change import rewindow, suggest_window

__all__ = ["clipped_windows", "rewindow", "suggest_window"]
