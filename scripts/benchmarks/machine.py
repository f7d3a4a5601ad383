"""Describe the machine and the software of a measurement."""

import datetime
import os
import platform
import re
from importlib import metadata
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
"""CPU flags that decide how fast matrices are multiplied in fp32 and bf16, on x86-64 and ARM."""


def describe(device: torch.device, num_threads: int) -> dict[str, Any]:
    """Return the machine, the date, and the versions of the packages that compute."""
    cpu_file = Path("/proc/cpuinfo")
    cpu = cpu_file.read_text() if cpu_file.exists() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", cpu, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpu, re.MULTILINE)
    known_flags = flags[1].split() if flags else []
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count()
    found = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cpu_flags": [flag for flag in FLAGS if flag in known_flags],
        "cores": cores,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "threads": num_threads,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "python": platform.python_version(),
        "moco-ssl": moco.__version__,
        "torch": torch.__version__,
    }
    for package in PACKAGES:
        version = version_of(package)
        if version is not None:
            found[package] = version
    return found


def version_of(package: str) -> str | None:
    """Return the version of a package, or None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
