"""How many unreadable images are too many."""

from collections.abc import Collection

from moco.errors import InputError, printable


def check_bad_fraction(names: Collection[str], num_images: int, max_bad_fraction: float) -> None:
    """Raises InputError if the unreadable images are more than `max_bad_fraction` of all, or all; names the first ten."""
    if (names and len(names) == num_images) or len(names) > max_bad_fraction * num_images:
        first = ", ".join(printable(name) for name in sorted(names)[:10])
        raise InputError(
            f"{len(names)} of {num_images} images cannot be read, more than "
            f"data.max_bad_fraction={max_bad_fraction}; the first are {first}"
        )
