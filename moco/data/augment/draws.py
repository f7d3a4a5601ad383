"""Random draws that depend on what they are for, and not on what was drawn before."""

import hashlib
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from torch import Tensor

# The constants of SplitMix64, as the signed numbers that a 64-bit tensor holds.
GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - 2**64
FIRST_FACTOR = 0xBF58476D1CE4E5B9 - 2**64
SECOND_FACTOR = 0x94D049BB133111EB - 2**64


def uniforms(seed: int, epoch: int, indices: Tensor, view: int, count: int) -> Tensor:
    """Return numbers in [0, 1) for each image, the same on every device.

    They are a pure function of (seed, epoch, index, view). Each image has its own stream of
    SplitMix64 (Steele, Lea & Flood 2014, doi.org/10.1145/2660193.2660195). SplitMix64 hashes a
    counter, so that all numbers of a stream are computed at once. Another hash gives the start of
    each stream.

    Args:
        indices: (images,) int64.
        count: numbers for each image.

    Returns:
        (images, count) float64, on the device of `indices`.
    """
    start = indices.new_full((), derived_seed(seed, epoch, view))
    streams = splitmix64(splitmix64(start + indices * GOLDEN_GAMMA) + indices)
    return as_uniforms(stream_bits(streams, count))


def seeds_from(draws: Tensor) -> Tensor:
    """Return an int64 seed for each draw in [0, 1), for operations that need many numbers."""
    return (draws * 2.0**53).long()  # the draws have 53 bits


def seeded_uniforms(seeds: Tensor, count: int) -> Tensor:
    """Return (images, count) float64 in [0, 1) from `seeds`, (images,) int64."""
    return as_uniforms(stream_bits(splitmix64(seeds), count))


def seeded_normals(seeds: Tensor, count: int) -> Tensor:
    """Return numbers of the standard normal distribution, the same bits on every device.

    Each is one of 65,536 equally probable values between -4.3 and 4.3. They come from a table,
    because logarithms and cosines differ between devices in their last bits. Four numbers take 64
    bits of the hash.

    Args:
        seeds: (images,) int64.
        count: numbers for each image.

    Returns:
        (images, count) float32, on the device of `seeds`.
    """
    bits = stream_bits(splitmix64(seeds), -(-count // 4))
    places = bits.view(torch.int16)[:, :count].int() + 2**15
    table = normal_quantiles(seeds.device)
    return table.index_select(0, places.flatten()).view(places.shape)


@cache
def normal_quantiles(device: torch.device) -> Tensor:
    """Return the medians of 65,536 equal shares of the standard normal distribution."""
    shares = (torch.arange(2**16, dtype=torch.float64) + 0.5) / 2**16
    return torch.special.ndtri(shares).float().to(device)


def stream_bits(streams: Tensor, count: int) -> Tensor:
    """Return (images, count) int64 of random bits; `streams` is where each image starts."""
    counters = torch.arange(1, count + 1, device=streams.device) * GOLDEN_GAMMA
    return splitmix64(streams[:, None] + counters)


def as_uniforms(bits: Tensor) -> Tensor:
    """Return random bits as float64 in [0, 1)."""
    return shift_right(bits, 11).double() * 2.0**-53


def splitmix64(numbers: Tensor) -> Tensor:
    """Hash int64 numbers by SplitMix64's output function, which takes them as unsigned."""
    numbers = (numbers ^ shift_right(numbers, 30)) * FIRST_FACTOR
    numbers = (numbers ^ shift_right(numbers, 27)) * SECOND_FACTOR
    return numbers ^ shift_right(numbers, 31)


def shift_right(numbers: Tensor, bits: int) -> Tensor:
    """Shift int64 as unsigned numbers; torch's own shift would copy the sign bit."""
    return (numbers >> bits) & (2 ** (64 - bits) - 1)


def derived_seed(*numbers: int) -> int:
    """Return a 63-bit seed; different numbers give unrelated seeds."""
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


@contextmanager
def draws_from(*numbers: int) -> Iterator[None]:
    """Seed the global generators from `numbers`, and restore their states at the end.

    They are torch's default CPU generator, which torchvision's transforms use, Python's ``random``
    and NumPy's ``np.random``.
    """
    seed = derived_seed(*numbers)
    generator = torch.default_generator
    states = generator.get_state(), random.getstate(), np.random.get_state()
    generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        generator.set_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])
