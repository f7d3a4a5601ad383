"""What a measurement was taken on and with: without it no figure means anything."""

import datetime
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import moco

PACKAGES = ("torchvision", "pytorch-lightning", "numpy", "faiss-cpu", "opencv-python-headless")
FLAGS = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_tile",
    "asimd",
    "bf16",
    "sve",
)
"""Of a CPU, those that decide how fast it multiplies matrices, in fp32 and in bf16, on x86-64 and on ARM."""


def describe(device: torch.device, num_threads: int) -> dict[str, Any]:
    """The machine, the date, and the versions of what computes."""
    said = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", said, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", said, re.MULTILINE)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cpu_flags": [flag for flag in FLAGS if flags and flag in flags[1].split()],
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "threads": num_threads,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "python": platform.python_version(),
        "moco-ssl": moco.__version__,
        "torch": torch.__version__,
    } | {package: found for package in PACKAGES if (found := version_of(package))}


def version_of(package: str) -> str | None:
    """Of an installed package; None: it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
