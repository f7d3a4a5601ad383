"""Momentum Contrast (MoCo): self-supervised pretraining, arXiv 1911.05722 and its successors."""

__version__ = "0.1.0"
