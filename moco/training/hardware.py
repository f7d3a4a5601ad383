"""Which device computes, and in what precision: decided by what there is, never by timing."""

import torch

from moco.errors import InputError


def choose_device(accelerator: str) -> torch.device:
    """The device that ``auto``, ``cpu``, ``gpu`` or ``cuda`` stands for here.

    Raises:
        InputError: a GPU was asked for and there is none.
    """
    if accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError(f"accelerator={accelerator}: no CUDA device can be used here; auto takes what there is")
    return torch.device("cuda")


def choose_precision(precision: str, device: torch.device) -> str:
    """Lightning's name of a precision; ``auto`` is bf16-mixed on a GPU that computes in bf16, else 32-true."""
    if precision != "auto":
        return precision
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16-mixed" if has_bf16 else "32-true"
