"""Choose device, precision and memory layout by what the hardware reports, not by timing."""

import ctypes
import sys

import torch
from torch import nn

from moco.errors import InputError

TRIM_THRESHOLD = -1  # from malloc.h
MMAP_THRESHOLD = -3
LARGEST_THRESHOLD = 2**31 - 1  # bytes
NEVER = -1


def choose_device(accelerator: str, num_devices: int = 1) -> torch.device:
    """Return the device that ``auto``, ``cpu``, ``gpu`` or ``cuda`` stands for here.

    Apple's GPUs (``mps``) are never chosen: they have no float64, in which views are drawn and Swin
    V2's position biases are computed.

    Args:
        accelerator: the setting.
        num_devices: devices of this machine that the run needs.

    Raises:
        InputError: a GPU was asked for and there is none, or there are too few.
    """
    if accelerator == "mps":
        raise InputError(
            "accelerator=mps: Apple's GPUs are not supported, since they have no float64; "
            "accelerator=cpu works"
        )
    has_cuda = torch.cuda.is_available()
    if accelerator == "cpu" or (accelerator == "auto" and not has_cuda):
        return torch.device("cpu")
    if not has_cuda:
        raise InputError(
            f"accelerator={accelerator}: no CUDA device can be used here; auto takes what there is"
        )
    found = torch.cuda.device_count()
    if num_devices > found:
        raise InputError(
            f"trainer.devices={num_devices}: GPUs that can be used on this machine: {found}"
        )
    return torch.device("cuda")


def choose_precision(precision: str, device: torch.device) -> str:
    """Return Lightning's name of a precision.

    ``auto`` is bf16-mixed on a device that is faster in bf16, otherwise 32-true.
    """
    if precision != "auto":
        return precision
    return "bf16-mixed" if is_faster_in_bf16(device) else "32-true"


def is_faster_in_bf16(device: torch.device) -> bool:
    """Return whether the device multiplies more numbers at once in bf16 than in fp32.

    CPUs that do are Intel's with AMX, AMD's with AVX-512 in bf16, and ARM's with bf16. Intel's
    AVX-512 in bf16 does not count: on a Xeon that has it without AMX, a matrix product takes 1.9
    times as long as in fp32, and a step of a ResNet-18 1.5 times as long.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    reported = torch.cpu.get_capabilities()
    if reported.get("amx_bf16") or reported.get("bf16"):
        return True
    is_amd = reported.get("sse4a", False)  # no other maker has this instruction
    return bool(is_amd and reported.get("avx512_bf16"))


def choose_memory_format(memory_format: str, module: nn.Module) -> str:
    """Return ``channels_last`` or ``contiguous``.

    ``auto`` is channels_last if most of the trained weights belong to convolutions.
    """
    if memory_format != "auto":
        return memory_format
    trained = sum(weight.numel() for weight in module.parameters() if weight.requires_grad)
    in_convolutions = 0
    for layer in module.modules():
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and layer.weight.requires_grad:
            in_convolutions += layer.weight.numel()
    return "channels_last" if 2 * in_convolutions > trained else "contiguous"


def keep_freed_memory() -> None:
    """Let this process keep freed memory, where glibc would return large blocks to the kernel.

    Every step frees the feature maps and needs them again. On a CPU, the kernel's clearing of their
    pages takes up to a quarter of the step, see docs/performance.md. The process then stays as
    large as it once was. This does nothing on systems without glibc.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, LARGEST_THRESHOLD)
        mallopt(TRIM_THRESHOLD, NEVER)
