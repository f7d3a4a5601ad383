"""How many unreadable images are too many."""

from collections.abc import Collection

from moco.errors import InputError, printable

MAX_NAMED = 10


def check_bad_fraction(names: Collection[str], num_images: int, max_bad_fraction: float) -> None:
    """Raise InputError if too many images are unreadable.

    Args:
        names: of the unreadable images; the message names the first ten.
        num_images: number of all images. It is always an error if all are unreadable.
        max_bad_fraction: fraction from 0 to 1.
    """
    are_all_bad = len(names) > 0 and len(names) == num_images
    if are_all_bad or len(names) > max_bad_fraction * num_images:
        first = ", ".join(printable(name) for name in sorted(names)[:MAX_NAMED])
        raise InputError(
            f"{len(names)} of {num_images} images cannot be read, more than "
            f"data.max_bad_fraction={max_bad_fraction}; the first are {first}"
        )
