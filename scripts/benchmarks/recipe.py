"""MoCo v2's numbers (arXiv 2003.04297), the same for all contenders."""

EMBEDDING_DIM, TEMPERATURE, KEY_MOMENTUM = 128, 0.2, 0.999
SGD = {"lr": 1e-4, "momentum": 0.9, "weight_decay": 1e-4}
"""Published but for lr: noise is learned from without a schedule, and weights that overflow would cost other times."""
