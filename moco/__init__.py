"""Momentum Contrast (MoCo) pretraining: arXiv 1911.05722 and its family."""

import os

__version__ = "0.1.0"

# Large tensors in pages of 2 MiB: on a CPU the first touch of new memory then costs a fraction of what it does in pages of
# 4 KiB. torch reads it at its first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
