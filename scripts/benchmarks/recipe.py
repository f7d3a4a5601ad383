"""MoCo v2's numbers (arXiv 2003.04297), the same for all contenders."""

EMBEDDING_DIM, TEMPERATURE, KEY_MOMENTUM = 128, 0.2, 0.999
SGD = {"lr": 1e-4, "momentum": 0.9, "weight_decay": 1e-4}
"""As published, except for lr. The benchmarks train on noise without a schedule, and a larger rate
could make the weights overflow, which changes the times."""
