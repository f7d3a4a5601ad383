"""The states of all global random generators, which a resumed run puts back."""

import hashlib
import random
from typing import Any

import numpy as np
import torch


def seed_generators(*numbers: int) -> None:
    """Seed every global generator from these numbers; other numbers give unrelated draws."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=4).digest()
    seed = int.from_bytes(digest, "little")
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def random_states() -> dict[str, Any]:
    """Return the states of all global generators, as plain data and tensors."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    keys_tensor = torch.from_numpy(np.asarray(keys).astype(np.int64))
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),  # none without a GPU
        "numpy": [name, keys_tensor, position, has_gauss, cached],
        "python": [version, list(words), gauss],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Put back what `random_states` returned.

    The CUDA states are skipped if this machine has another number of GPUs.
    """
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
