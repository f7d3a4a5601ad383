"""The files that a long pass over many images ends with: features as .npz, and a faiss index."""

from typing import Any, BinaryIO

import numpy as np

from moco.evaluation.feature_parts import FeatureParts
from moco.evaluation.indexes import EXACT, build_index, recall, set_search_effort

# Images whose neighbours are searched to measure what an approximate index finds.
NUM_SAMPLES = 100
# Neighbours of each of them.
NUM_NEIGHBORS = 10


def write_npz(file: BinaryIO, parts: FeatureParts, has_labels: bool) -> None:
    """Write ``features`` (images, width), ``names`` (images,) and, with `has_labels`, ``labels``.

    All arrays are mapped from files, so NumPy reads and writes them a block at a time.
    """
    width = max(len(name) for name in parts.names())
    # The suffix marks a file that an interrupted run may leave behind.
    path = parts.folder / "names.tmp"
    names = np.memmap(path, f"<U{width}", "w+", shape=(parts.state.num_rows,))
    for row, name in enumerate(parts.names()):
        names[row] = name
    arrays: dict[str, Any] = {"features": parts.features(), "names": names}
    if has_labels:
        arrays["labels"] = parts.labels()
    np.savez(file, **arrays)
    path.unlink()


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
