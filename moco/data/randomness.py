"""Random draws that depend on what they are for, not on what was drawn before."""

import hashlib
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derived_seed(*numbers: int) -> int:
    """A 63-bit seed from integers; different integers give unrelated seeds."""
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


@contextmanager
def draws_from(*numbers: int) -> Iterator[None]:
    """Inside, torch's default CPU generator draws from the seed derived from `numbers`; afterwards it goes on as before.

    torchvision's transforms know no other generator.
    """
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(derived_seed(*numbers))
    try:
        yield
    finally:
        generator.set_state(state)
