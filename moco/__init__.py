"""Momentum Contrast (MoCo) pretraining: arXiv 1911.05722 and its family."""

import os

__version__ = "0.1.0"

# Large tensors in pages of 2 MiB: a step on a CPU then has a thirteenth of the page faults, and takes up to a tenth less of
# the processor (docs/performance.md). torch reads it at its first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
