"""What a long pass over many images leaves: features as .npz, and an index for their neighbours, written in blocks.

Letters: M images, D feature width.
"""

import logging
import shutil
import struct
import zipfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any, BinaryIO

import faiss
import numpy as np

from moco.evaluation.feature_parts import FEATURES, LABELS, FeatureParts
from moco.evaluation.neighbors import normalized

log = logging.getLogger(__name__)

BLOCK = 2**20  # values that are in memory at once
POINTS_PER_LIST = (
    64  # rows that each list of an IVF index is trained on; faiss asks for 39 at least
)
NUM_LINKS = 32  # of each row in an HNSW index
NUM_SAMPLES, NUM_NEIGHBORS = 100, 10  # of the search that measures what an approximate index finds


def write_npz(file: BinaryIO, parts: FeatureParts, has_labels: bool) -> None:
    """Write ``features`` (M, D) float32, ``names`` (M,) and, with `has_labels`, ``labels`` (M,) int64, as numpy does."""
    num_rows = parts.state.num_rows
    width = max(1, parts.state.name_width)
    with zipfile.ZipFile(file, "w") as archive:
        with member(archive, "features", "<f4", (num_rows, parts.state.feature_dim)) as target:
            copy(parts.folder / FEATURES, target)
        with member(archive, "names", f"<U{width}", (num_rows,)) as target:
            names = parts.names()
            while block := list(islice(names, max(1, BLOCK // width))):
                target.write(np.array(block, f"<U{width}").tobytes())
        if has_labels:
            with member(archive, "labels", "<i8", (num_rows,)) as target:
                copy(parts.folder / LABELS, target)


def member(archive: zipfile.ZipFile, name: str, dtype: str, shape: tuple[int, ...]) -> IO[bytes]:
    """An array of an .npz file, to which its content is to be written."""
    target = archive.open(f"{name}.npy", "w", force_zip64=True)
    np.lib.format.write_array_header_1_0(
        target, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    return target


def copy(path: Path, target: IO[bytes]) -> None:
    with path.open("rb") as source:
        shutil.copyfileobj(source, target, 2**20)


def write_index(file: BinaryIO, parts: FeatureParts, kind: str) -> str:
    """Write a faiss index of the L2-normalised features by inner product, which is then the cosine; row i is image i.

    Args:
        kind: ``flat``: exact, written in blocks; ``ivf`` or ``hnsw``: approximate, held in memory while it is built.

    Returns:
        What it is, in words.
    """
    if kind == "flat":
        file.write(flat_header(parts.state.num_rows, parts.state.feature_dim))
        for block in blocks(parts):
            file.write(block.data)
        return "flat: exact"
    index = ivf(parts) if kind == "ivf" else faiss.IndexHNSWFlat(
        parts.state.feature_dim, NUM_LINKS, faiss.METRIC_INNER_PRODUCT
    )  # fmt: skip
    for block in blocks(parts):
        index.add(block)
    swig: Any = faiss  # whose type stubs lack the writer
    faiss.write_index(index, swig.PyCallbackIOWriter(file.write))
    count = min(NUM_NEIGHBORS, parts.state.num_rows)
    num_queries = min(NUM_SAMPLES, parts.state.num_rows)
    return f"{kind}: finds {recall(index, parts, count):.1%} of the {count} nearest, over {num_queries} images"


def blocks(parts: FeatureParts) -> Iterator[np.ndarray]:
    """All features of unit norm, some rows at a time."""
    return map(normalized, parts.blocks(max(1, BLOCK // parts.state.feature_dim)))


def flat_header(num_rows: int, feature_dim: int) -> bytes:
    """What faiss writes before the rows of an IndexFlatIP.

    Four letters and the width (int32), then the number of rows (int64); at the end the number of values (uint64).
    """
    header = bytearray(faiss.serialize_index(faiss.IndexFlatIP(feature_dim)).tobytes())
    struct.pack_into("<q", header, 8, num_rows)
    struct.pack_into("<Q", header, len(header) - 8, num_rows * feature_dim)
    return bytes(header)


def ivf(parts: FeatureParts) -> Any:
    """An empty inverted-file index, trained on a fixed random sample; a search looks into a sixteenth of the lists."""
    num_rows, feature_dim = parts.state.num_rows, parts.state.feature_dim
    num_lists = max(1, min(int(4 * num_rows**0.5), num_rows // POINTS_PER_LIST))
    index = faiss.IndexIVFFlat(
        faiss.IndexFlatIP(feature_dim), feature_dim, num_lists, faiss.METRIC_INNER_PRODUCT
    )
    index.cp.spherical = True  # the lists' centres are of unit norm, as the rows are
    index.cp.min_points_per_centroid = 1  # of a small set faiss would complain
    index.nprobe = -(-num_lists // 16)
    size = min(num_rows, POINTS_PER_LIST * num_lists)
    index.train(
        normalized(
            parts.rows(np.sort(np.random.default_rng(0).choice(num_rows, size, replace=False)))
        )
    )
    return index


def recall(index: Any, parts: FeatureParts, count: int) -> float:
    """Share of the `count` nearest rows of some that the index finds; of rows that are equally near any will do."""
    num_rows = parts.state.num_rows
    queries = normalized(
        parts.rows(np.linspace(0, num_rows - 1, min(NUM_SAMPLES, num_rows), dtype=np.int64))
    )
    best = np.full((len(queries), count), -np.inf, np.float32)
    for block in blocks(parts):
        both = np.concatenate([best, queries @ block.T], axis=1)
        best = -np.partition(-both, count - 1, axis=1)[:, :count]
    found, _ = index.search(queries, count)
    return float((found >= best.min(axis=1, keepdims=True) - 1e-5).mean())
