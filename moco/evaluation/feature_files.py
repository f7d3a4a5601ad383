"""The files that a long pass over many images ends with: features as .npz, and a faiss index."""

import shutil
import zipfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from moco.evaluation.feature_parts import FEATURES, LABELS, FeatureParts
from moco.evaluation.indexes import EXACT, build_index, recall, set_search_effort

# Characters of names that are in memory at once.
CHARACTERS_AT_ONCE = 2**20
# Bytes of a file that are copied at once.
COPIED_BYTES = 2**20
# Images whose neighbours are searched to measure what an approximate index finds.
NUM_SAMPLES = 100
# Neighbours of each of them.
NUM_NEIGHBORS = 10


def write_npz(file: BinaryIO, parts: FeatureParts, has_labels: bool) -> None:
    """Write the features as `numpy.savez` would, without having them in memory.

    The file holds ``features`` (images, width) float32, ``names`` (images,) and, with `has_labels`,
    ``labels`` (images,) int64.
    """
    num_rows = parts.state.num_rows
    name_type = f"<U{max(1, parts.state.name_width)}"
    with zipfile.ZipFile(file, "w") as archive:
        with array_in(archive, "features", "<f4", parts.shape) as target:
            copy(parts.folder / FEATURES, target)
        with array_in(archive, "names", name_type, (num_rows,)) as target:
            for names in name_blocks(parts):
                target.write(np.array(names, name_type).tobytes())
        if has_labels:
            with array_in(archive, "labels", "<i8", (num_rows,)) as target:
                copy(parts.folder / LABELS, target)


def array_in(archive: zipfile.ZipFile, name: str, dtype: str, shape: tuple[int, ...]) -> IO[bytes]:
    """Open an array of an .npz file to write its content to."""
    # The size is not known in advance and may be above 4 GB.
    target = archive.open(f"{name}.npy", "w", force_zip64=True)
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(target, header)
    return target


def copy(path: Path, target: IO[bytes]) -> None:
    """Append the content of a file to `target`."""
    with path.open("rb") as source:
        shutil.copyfileobj(source, target, COPIED_BYTES)


def name_blocks(parts: FeatureParts) -> Iterator[list[str]]:
    """Yield the names of all images, as many at a time as memory should hold."""
    block_size = max(1, CHARACTERS_AT_ONCE // max(1, parts.state.name_width))
    names = parts.names()
    block = list(islice(names, block_size))
    while block:
        yield block
        block = list(islice(names, block_size))


def write_index(file: BinaryIO, parts: FeatureParts, name: str) -> str:
    """Write a faiss index of the L2-normalised features; row i is image i.

    It compares by inner product, which is then the cosine. faiss builds it in memory.

    Args:
        file: to write to.
        parts: the features.
        name: ``flat``, which is exact, or a string of ``faiss.index_factory``.

    Returns:
        A description for the closing table.

    Raises:
        InputError: faiss cannot build such an index.
    """
    import faiss

    features = parts.features()
    index = build_index(features, name, "index")
    set_search_effort(index, name)
    swig: Any = faiss  # faiss's type stubs lack the writer
    faiss.write_index(index, swig.PyCallbackIOWriter(file.write))
    if name == EXACT:
        return f"{name}: exact"
    num_neighbors = min(NUM_NEIGHBORS, len(features))
    num_samples = min(NUM_SAMPLES, len(features))
    sample = np.linspace(0, len(features) - 1, num_samples).astype(np.int64)
    share = recall(index, features, features[sample], num_neighbors)
    return f"{name}: finds {share:.1%} of the {num_neighbors} nearest, over {num_samples} images"
