"""The settings of the two linear evaluations."""

from dataclasses import dataclass, field
from typing import Any, Optional

from moco.config.settings import setting


def official_view() -> dict[str, Any]:
    """Return the training augmentation of the official main_lincls.py."""
    return {
        "random_resized_crop": {"scale": [0.08, 1.0]},
        "horizontal_flip": {"probability": 0.5},
    }


@dataclass
class LinearConfig:
    """``evaluation=linear``: one head on frozen features per learning rate and weight decay.

    The best head is chosen on held-out training images.
    """

    lrs: list[float] = field(default_factory=lambda: [0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0])
    """Learning rates of the first step. A cosine schedule takes them to 0."""
    weight_decays: list[float] = field(default_factory=lambda: [0.0, 1e-4, 1e-3, 1e-2, 1e-1])
    """Weight decays, each tried with each learning rate."""
    num_epochs: Optional[int] = setting(None, at_least=1)
    """Passes over the features. Null: 30, or more for small datasets, to reach 2,000 steps."""
    batch_size: int = setting(256, at_least=1)
    """Features per step."""
    held_out: float = setting(0.1, above=0, below=1)
    """Share of each class's training images on which the best head is chosen."""
    seed: int = setting(0, at_least=0, at_most=2**32 - 1)
    """Seed of the choice of these images, and of the order of the others."""


@dataclass
class LinearOfficialConfig:
    """``evaluation=linear_official``: the defaults are those of the official main_lincls.py."""

    lr: float = setting(30.0, above=0)
    """Learning rate of the first step."""
    lr_for_batch_size: Optional[int] = setting(256, at_least=1)
    """The batch size that lr is meant for. It is scaled in proportion to batch_size. Null: it is
    not scaled."""
    batch_size: int = setting(256, at_least=1)
    """Images per step."""
    sgd_momentum: float = setting(0.9, at_least=0, below=1)
    """Momentum of SGD."""
    weight_decay: float = setting(0.0, at_least=0)
    """Weight decay of the head."""
    num_epochs: int = setting(100, at_least=1)
    """Passes over the training images."""
    milestones: list[int] = field(default_factory=lambda: [60, 80])
    """Epochs at which the learning rate is multiplied by step_factor."""
    step_factor: float = setting(0.1, above=0, at_most=1)
    """The learning rate is multiplied by this at each milestone."""
    init_std: float = setting(0.01, at_least=0)
    """Standard deviation of the head's initial weights. Its biases start at 0."""
    view: dict[str, Any] = field(default_factory=official_view)
    """The operations of the training view in order, as in a pretraining's
    ``augmentation.query``."""
    seed: int = setting(0, at_least=0, at_most=2**32 - 1)
    """Seed of the initial weights, the order of the images and the augmentation."""
