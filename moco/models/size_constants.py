"""Tensors that depend on sizes alone: computed once, and constants for torch.compile."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch

Size = tuple[int, int]
"""Height and width."""

T = TypeVar("T")


def constant_of_sizes(function: Callable[..., T]) -> Callable[..., T]:
    """Keep the results of a pure function of sizes and a device.

    torch.compile takes the results as constants: it does not trace the function, and compiled code
    reads the tensors where they are. The arguments must be hashable. No result may depend on
    anything else, such as weights.
    """
    # A tensor that was made in inference mode could not be used in training.
    without_inference_mode = torch.inference_mode(False)(function)
    cached = lru_cache(maxsize=512)(without_inference_mode)

    # torch.compile wants a plain function, which an lru_cache is not.
    @wraps(function)
    def constant(*arguments: Any) -> T:
        return cached(*arguments)

    return torch.compiler.assume_constant_result(constant)
