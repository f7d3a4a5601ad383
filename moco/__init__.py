"""Momentum Contrast (MoCo) pretraining: arXiv 1911.05722 and its family."""

__version__ = "0.1.0"
