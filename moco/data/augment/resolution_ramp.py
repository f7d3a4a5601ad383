"""Views that are small in a run's first epochs and grow: progressive resizing.

The work of an epoch goes with the square of the side. FFCV-SSL (arXiv 2303.01986) pretrains from 160 to 224 px at the
accuracy of 224 px throughout; EfficientNetV2 (arXiv 2104.00298, section 4) has the same for classification.
"""

from dataclasses import dataclass

from moco.errors import InputError


@dataclass(frozen=True)
class ResolutionRamp:
    """The side of the views, px, as a function of the epoch alone.

    All sizes below the full one get the same number of epochs, up to rounding.

    Raises:
        InputError: the numbers contradict each other; it names the key.
    """

    image_size: int
    """The full side."""
    start_image_size: int | None = None
    """Of the first epoch; None: all epochs have the full side."""
    image_size_step: int | None = None
    """Between one size and the next; the last step may be smaller. None: 32."""
    ramp_epochs: int | None = None
    """Epochs of smaller views, at the beginning."""

    def __post_init__(self) -> None:
        start, epochs = self.start_image_size, self.ramp_epochs
        if start is None:
            for name in ("ramp_epochs", "image_size_step"):
                if (value := getattr(self, name)) is not None:
                    raise InputError(
                        f"augmentation.{name}={value}: it has no effect without augmentation.start_image_size"
                    )
            return
        if start >= self.image_size:
            raise InputError(
                f"augmentation.start_image_size={start}: expected less than data.image_size, {self.image_size}, or null"
            )
        if epochs is None:
            raise InputError(
                "augmentation.ramp_epochs: missing; augmentation.start_image_size needs the number of epochs with smaller "
                "views"
            )
        if epochs < len(self.sizes) - 1:
            raise InputError(
                f"augmentation.ramp_epochs={epochs}: expected at least one for each of the smaller sizes "
                f"({self.in_words()}); or a larger augmentation.image_size_step"
            )

    @property
    def sizes(self) -> list[int]:
        """All of them, the full one last."""
        start, step = self.start_image_size, self.image_size_step or 32
        return [*([] if start is None else range(start, self.image_size, step)), self.image_size]

    def size_at(self, epoch: int) -> int:
        """The side in an epoch, counted from 0."""
        sizes = self.sizes
        if self.ramp_epochs is None or epoch >= self.ramp_epochs:
            return sizes[-1]
        return sizes[epoch * (len(sizes) - 1) // self.ramp_epochs]

    def in_words(self) -> str:
        """The sizes in order."""
        return ", ".join(map(str, self.sizes)) + " px"
