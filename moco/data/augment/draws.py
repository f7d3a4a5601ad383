"""Random draws that depend on what they are for, not on what was drawn before."""

import hashlib
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - 2**64  # as the signed number that a 64-bit tensor holds


def uniforms(seed: int, epoch: int, indices: Tensor, view: int, count: int) -> Tensor:
    """Numbers from 0 up to 1 for each image: a pure function of (seed, epoch, index, view), the same on every device.

    Each image has a stream of SplitMix64 (Steele, Lea & Flood 2014, doi.org/10.1145/2660193.2660195), which is a hash of
    a counter, so that no number waits for the one before it. Where the streams begin is a hash as well.

    Args:
        indices: (N,) int64.

    Returns:
        (N, count) float64, on the device of `indices`.
    """
    start = indices.new_full((), derived_seed(seed, epoch, view))
    begin = mixed(mixed(start + indices * GOLDEN_GAMMA) + indices)
    counters = torch.arange(1, count + 1, device=indices.device) * GOLDEN_GAMMA
    bits = mixed(begin[:, None] + counters)
    return shifted_right(bits, 11).double() * 2.0**-53


def mixed(numbers: Tensor) -> Tensor:
    """The output function of SplitMix64, on int64 taken for unsigned 64-bit numbers."""
    numbers = (numbers ^ shifted_right(numbers, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    numbers = (numbers ^ shifted_right(numbers, 27)) * (0x94D049BB133111EB - 2**64)
    return numbers ^ shifted_right(numbers, 31)


def shifted_right(numbers: Tensor, bits: int) -> Tensor:
    """Zeros come in from the left; torch's own shift of int64 brings in the sign."""
    return (numbers >> bits) & (2 ** (64 - bits) - 1)


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
