"""Swin and Swin V2 for images of any size, with attention windows that can be changed.

`backbone` is the network and the change of its windows, `attention` the attention inside windows,
and `windows` the geometry of windows.
"""

from moco.models.swin.backbone import clipped_windows, rewindow, suggest_window

__all__ = ["clipped_windows", "rewindow", "suggest_window"]
