"""Reading .npz archives that may be damaged or hostile: no code is run, and memory is limited.

NumPy refuses Python objects and headers that claim more than the file holds; zipfile compares the
checksums. What they do not refuse is checked here.
"""

import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

# What zipfile and NumPy raise on damaged archives. zipfile raises RuntimeError for encrypted files
# and for unknown compressions.
DAMAGED = (
    ValueError,
    OSError,
    EOFError,
    RuntimeError,
    MemoryError,
    OverflowError,
    KeyError,
    zipfile.BadZipFile,
    zlib.error,
)
NUMPY_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def read_arrays(path: str | Path, names: Sequence[str]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return those of the named arrays that an archive holds, and the names of all its arrays.

    Raises:
        DAMAGED: it is not an archive of plain arrays, or the arrays do not fit into memory.
    """
    arrays: dict[str, np.ndarray] = {}
    with zipfile.ZipFile(path) as archive:
        present = []
        for member in archive.namelist():
            present.append(member.removesuffix(".npy"))
        wanted = [name for name in names if name in present]
        check_memory(archive, wanted)
        for name in wanted:
            with archive.open(f"{name}.npy") as file:
                arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
                # zipfile compares the checksum only when a member is read to its end.
                if file.read(1):
                    raise ValueError(f"{name} holds more than its header says")
    return arrays, present


def check_memory(archive: zipfile.ZipFile, names: Sequence[str]) -> None:
    """Raise ValueError if unpacking the arrays may take more memory than the machine has.

    zipfile unpacks no more of a member than its size in the archive's directory, but only for the
    compressions that NumPy uses: a few kilobytes of bzip2 can become gigabytes at once.
    """
    num_bytes = 0
    for name in names:
        member = archive.getinfo(f"{name}.npy")
        if member.compress_type not in NUMPY_COMPRESSIONS:
            raise ValueError(f"{name} is compressed in another way than NumPy does")
        num_bytes += member.file_size
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if num_bytes > memory:
        raise ValueError(
            f"its arrays take {num_bytes / 1e9:,.1f} GB, and this machine has {memory / 1e9:,.1f}"
        )
