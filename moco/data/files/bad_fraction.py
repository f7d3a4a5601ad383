"""How many unreadable pictures are too many."""

from collections.abc import Collection

from moco.errors import InputError, printable


def check_bad_fraction(names: Collection[str], num_pictures: int, max_bad_fraction: float) -> None:
    """Raises InputError if the unreadable pictures are more than `max_bad_fraction` of all, or all; names the first ten."""
    if (names and len(names) == num_pictures) or len(names) > max_bad_fraction * num_pictures:
        first = ", ".join(printable(name) for name in sorted(names)[:10])
        raise InputError(
            f"{len(names)} of {num_pictures} pictures cannot be read, more than "
            f"data.max_bad_fraction={max_bad_fraction}; the first are {first}"
        )
