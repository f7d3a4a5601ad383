"""The state of every global random generator, to be put back when a run goes on."""

import hashlib
import random
from typing import Any

import numpy as np
import torch


def seed_generators(*numbers: int) -> None:
    """Seed every global generator from these numbers; others give unrelated draws."""
    seed = int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=4).digest(), "little")
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def random_states() -> dict[str, Any]:
    """The state of every global generator, as plain data and tensors."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [
            name,
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            position,
            has_gauss,
            cached,
        ],
        "python": [version, list(words), gauss],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Undo of `random_states`; CUDA's only on as many devices as there were."""
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
