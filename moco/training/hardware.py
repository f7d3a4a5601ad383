"""Which device computes, in what precision and layout: decided by what there is, never by timing."""

import ctypes
import sys

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from moco.errors import InputError

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Of ``malloc.h``."""


def choose_device(accelerator: str, num_devices: int = 1) -> torch.device:
    """Return the device that ``auto``, ``cpu``, ``gpu`` or ``cuda`` stands for here.

    Apple's GPUs (``mps``) are never chosen: they have no float64, in which views are drawn and Swin V2's position biases are
    computed.

    Args:
        num_devices: devices of this machine that the run wants.

    Raises:
        InputError: a GPU was asked for and there is none, or there are fewer than the run wants.
    """
    if accelerator == "mps":
        raise InputError(
            "accelerator=mps: Apple's GPUs are not supported, since they have no float64; accelerator=cpu works"
        )
    if accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError(
            f"accelerator={accelerator}: no CUDA device can be used here; auto takes what there is"
        )
    found = torch.cuda.device_count()
    if num_devices > found:
        gpus = "1 GPU" if found == 1 else f"{found} GPUs"
        raise InputError(f"trainer.devices={num_devices}: only {gpus} can be used on this machine")
    return torch.device("cuda")


def choose_precision(precision: str, device: torch.device) -> str:
    """Lightning's name of a precision; ``auto`` is bf16-mixed on a device that is faster in bf16, else 32-true."""
    if precision != "auto":
        return precision
    return "bf16-mixed" if is_faster_in_bf16(device) else "32-true"


def is_faster_in_bf16(device: torch.device) -> bool:
    """Whether the device reports instructions that multiply more numbers in bf16 than in fp32 at once.

    Of CPUs these are Intel's with AMX, AMD's with AVX-512 in bf16 and ARM's with bf16. Intel's AVX-512 in bf16 is no such
    instruction: a Xeon that has it without AMX takes 1.9 times as long for a matrix product as in fp32, and 1.5 times as
    long for a step of a ResNet-18.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    reported = torch.cpu.get_capabilities()
    is_amd = reported.get("sse4a", False)  # which no other maker has
    return any(
        reported.get(name, False)
        for name in ("amx_bf16", "bf16", *(["avx512_bf16"] if is_amd else []))
    )


def choose_memory_format(memory_format: str, module: nn.Module) -> str:
    """``channels_last`` or ``contiguous``; ``auto`` is channels_last if most of the trained weights are convolutions'."""
    if memory_format != "auto":
        return memory_format
    convolutions = (layer.weight for layer in module.modules() if isinstance(layer, _ConvNd))
    in_convolutions = sum(weight.numel() for weight in convolutions if weight.requires_grad)
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    return "channels_last" if 2 * in_convolutions > trained else "contiguous"


def keep_freed_memory() -> None:
    """Let this process use freed memory again, where glibc would give large blocks back to the kernel.

    The maps of a net are freed and needed again in every step, and on a CPU the kernel's work of clearing their pages takes
    up to a quarter of it, see docs/performance.md. The process then stays as large as it once was. Does nothing elsewhere.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, 2**31 - 1)
        mallopt(TRIM_THRESHOLD, -1)  # never
