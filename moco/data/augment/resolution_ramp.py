"""Progressive resizing: views that are small in the first epochs of a run, and grow.

The cost of an epoch grows with the square of the side. FFCV-SSL (arXiv 2303.01986) pretrains from
160 to 224 px at the accuracy of 224 px throughout. EfficientNetV2 (arXiv 2104.00298, section 4)
does the same for classification.
"""

from dataclasses import dataclass

from moco.errors import InputError

DEFAULT_STEP = 32  # px


@dataclass(frozen=True)
class ResolutionRamp:
    """The side of the views, px, as a function of the epoch alone.

    All sizes below the full one get the same number of epochs, up to rounding.

    Raises:
        InputError: the numbers contradict each other; the message names the key.
    """

    image_size: int
    """The full side, px."""
    start_image_size: int | None = None
    """The side in the first epoch, px; None: all epochs have the full side."""
    image_size_step: int | None = None
    """The difference between two sizes, px; None: 32. The last step may be smaller."""
    ramp_epochs: int | None = None
    """Number of epochs with smaller views, at the start of the run."""

    def __post_init__(self) -> None:
        if self.start_image_size is None:
            for name in ("ramp_epochs", "image_size_step"):
                value = getattr(self, name)
                if value is not None:
                    raise InputError(
                        f"augmentation.{name}={value}: "
                        "it has no effect without augmentation.start_image_size"
                    )
            return
        if self.start_image_size >= self.image_size:
            raise InputError(
                f"augmentation.start_image_size={self.start_image_size}: "
                f"expected less than data.image_size, {self.image_size}, or null"
            )
        if self.ramp_epochs is None:
            raise InputError(
                "augmentation.ramp_epochs: missing; augmentation.start_image_size needs the "
                "number of epochs with smaller views"
            )
        if self.ramp_epochs < len(self.sizes) - 1:
            raise InputError(
                f"augmentation.ramp_epochs={self.ramp_epochs}: expected at least one for each of "
                f"the smaller sizes ({self.in_words()}), or a larger augmentation.image_size_step"
            )

    @property
    def sizes(self) -> list[int]:
        """All sizes in order, the full one last, px."""
        if self.start_image_size is None:
            return [self.image_size]
        step = self.image_size_step or DEFAULT_STEP
        smaller = range(self.start_image_size, self.image_size, step)
        return [*smaller, self.image_size]

    def size_at(self, epoch: int) -> int:
        """Return the side in an epoch, px; epochs are counted from 0."""
        if self.ramp_epochs is None or epoch >= self.ramp_epochs:
            return self.image_size
        num_smaller = len(self.sizes) - 1
        return self.sizes[epoch * num_smaller // self.ramp_epochs]

    def in_words(self) -> str:
        """Return the sizes in order, for a message."""
        return ", ".join(map(str, self.sizes)) + " px"
