"""Features on disk as they come, and the files that are made of them."""

import io
import os
import re
import tracemalloc
from types import SimpleNamespace

import faiss
import numpy as np
import pytest
import torch

from moco.data.loading.every_image import ImageBatch
from moco.errors import InputError
from moco.evaluation.embedding import add_features, write_index, write_npz
from moco.evaluation.resumable_features import FILES, FeatureParts, taken

ABOUT = {
    "settings": {"feature": "backbone", "data": {"name": "images"}},
    "weights": "w",
    "data": "d",
}
EXOTIC = [
    "a\nb.png",
    "\udcff.png",
    "日本/漢字.png",
    '"quoted"\\',
    "pages.tif#2",
    "x" * 300,
    "🙂",
    "plain.png",
]


def batch(generator, number, size=4):
    features = generator.normal(size=(size, 8)).astype(np.float32)
    names = [f"{EXOTIC[(number + row) % len(EXOTIC)]}{number}" for row in range(size)]
    return features, names, np.arange(size) + number, [f"bad {number}"], [number + 1]


@pytest.fixture
def batches(generator):
    return [batch(generator, number) for number in range(20)]


def written(folder, batches, about=ABOUT):
    folder.mkdir(exist_ok=True)
    parts = FeatureParts(folder, about, [0])
    with parts:
        for one in batches[parts.state.end[0] :]:
            parts.add(*one)
    return parts


def npz(parts, has_labels=True):
    file = io.BytesIO()
    write_npz(file, parts, has_labels)
    return file.getvalue()


def index(parts, kind):
    """The index, and what is said of it."""
    path = parts.folder / "f.faiss"
    said = write_index(path, parts, kind)
    return faiss.read_index(str(path)), said


def contents(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


def test_the_file_is_the_one_that_numpy_writes(tmp_path, batches):
    features, names, labels = (
        np.concatenate([np.array(one[column]) for one in batches]) for column in range(3)
    )
    expected = io.BytesIO()
    np.savez(expected, features=features, names=names, labels=labels)
    parts = written(tmp_path / "parts", batches)
    found, there = np.load(io.BytesIO(npz(parts))), np.load(io.BytesIO(expected.getvalue()))
    assert found.files == there.files
    for name in found.files:
        assert found[name].dtype == there[name].dtype
        assert np.array_equal(found[name], there[name])
    assert np.load(io.BytesIO(npz(parts, has_labels=False))).files == ["features", "names"]


def test_what_a_killed_process_left_behind_its_last_commit_does_not_count(tmp_path, batches):
    straight = written(tmp_path / "straight", batches)
    (tmp_path / "parts").mkdir()
    parts = FeatureParts(tmp_path / "parts", ABOUT, [0]).__enter__()
    for number, one in enumerate(batches[:9]):
        parts.add(*one)
        if number == 5:
            parts.commit()
    for file in parts.files.values():
        file.write(b"half a row")
        file.close()
    again = FeatureParts(tmp_path / "parts", ABOUT, [0])
    assert (again.state.end, again.state.num_rows) == ([6], 24)
    assert again.unreadable() == [f"bad {number}" for number in range(6)]
    again = written(tmp_path / "parts", batches)
    assert contents(tmp_path / "parts") == contents(tmp_path / "straight")
    assert npz(again) == npz(straight)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weights": "other"}, "checkpoint: other weights"),
        ({"data": "other"}, "data: other images, names or labels, or in another order"),
        (
            {"settings": {"feature": "embedding", "data": {"name": "images"}}},
            "feature: backbone there, embedding here",
        ),
        (
            {"settings": {"feature": "backbone", "data": {"name": "hf"}}},
            "data.name: images there, hf here",
        ),
    ],
)
def test_the_beginning_of_another_run_is_refused_with_what_differs(
    tmp_path, batches, changed, message
):
    written(tmp_path / "parts", batches[:3])
    with pytest.raises(InputError) as error:
        FeatureParts(tmp_path / "parts", ABOUT | changed, [0])
    assert str(error.value) == (
        f"{tmp_path / 'parts'} holds the first 12 features of another run: {message}; "
        "remove that folder to start anew, or choose another output"
    )


def test_a_beginning_without_features_is_in_nobodys_way(tmp_path):
    written(tmp_path / "parts", [])
    assert FeatureParts(tmp_path / "parts", ABOUT | {"weights": "other"}, [0]).state.num_rows == 0


def test_parts_that_were_cut_short_are_named(tmp_path, batches):
    folder = written(tmp_path / "parts", batches[:3]).folder
    os.truncate(folder / "features.bin", 5)
    with pytest.raises(InputError, match=r"parts: damaged; remove that folder to start anew"):
        FeatureParts(folder, ABOUT, [0])


def test_two_processes_do_not_write_the_same_parts(tmp_path):
    with (
        taken(tmp_path / "parts"),
        pytest.raises(InputError, match="another process is at work there"),
        taken(tmp_path / "parts"),
    ):
        pass


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with (
        pytest.raises(InputError, match="holds other files; choose another output"),
        taken(tmp_path),
    ):
        pass


def test_a_flat_index_holds_the_normalised_features_in_their_order(tmp_path, batches, monkeypatch):
    monkeypatch.setattr("moco.evaluation.indexes.BANK_BYTES", 7 * 8 * 4)  # blocks of seven rows
    parts = written(tmp_path / "parts", batches)
    features = np.concatenate([one[0] for one in batches])
    faiss.normalize_L2(features)
    found, description = index(parts, "flat")
    assert description == "flat: exact"
    assert (found.ntotal, found.metric_type) == (80, faiss.METRIC_INNER_PRODUCT)
    np.testing.assert_allclose(found.reconstruct_n(0, 80), features, rtol=1e-6)


@pytest.mark.parametrize("kind", ["IVF4,Flat", "HNSW32"])
@pytest.mark.parametrize("num_batches", [20, 400])
def test_an_approximate_index_finds_each_image_itself_and_says_how_much_it_finds(
    tmp_path, generator, kind, num_batches
):
    batches = [batch(generator, number) for number in range(num_batches)]
    features = np.concatenate([one[0] for one in batches])
    faiss.normalize_L2(features)
    found, description = index(written(tmp_path / "parts", batches), kind)
    similarities, rows = found.search(features, 1)
    is_itself = rows[:, 0] == np.arange(len(features))
    assert is_itself.mean() > 0.98
    np.testing.assert_allclose(similarities[is_itself, 0], 1, atol=1e-5)
    _, found_rows = found.search(features, 10)
    exact = np.argsort(-features @ features.T, axis=1)[:, :10]
    num_hits = 0
    for expected, rows in zip(exact, found_rows, strict=True):
        num_hits += len({*expected} & {*rows})
    told = re.fullmatch(rf"{kind}: finds (.*)% of the 10 nearest", description)
    # With more than 1,000 images it is of a sample.
    assert float(told[1]) == pytest.approx(100 * num_hits / exact.size, abs=1)


def test_an_index_that_needs_more_images_is_refused(tmp_path, batches):
    parts = written(tmp_path / "parts", batches)
    with pytest.raises(InputError) as error:
        index(parts, "IVF1024,Flat")
    assert str(error.value).startswith(
        "index=IVF1024,Flat: faiss cannot build this index of 80 rows"
    )
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    def loader(number):
        for start in range(0, 256 * number, 256):
            names = [f"{row:09}.png" for row in range(start, start + 256)]
            yield ImageBatch(
                torch.empty(256, 1), names, torch.zeros(256, dtype=torch.int64), [], [start + 256]
            )

    def encode(images):
        return np.ones((len(images), 256), np.float32)  # 256 KB a batch

    def peak(number):
        (tmp_path / str(number)).mkdir()
        parts = FeatureParts(tmp_path / str(number), ABOUT, [0])
        tracemalloc.start()
        with parts:
            add_features(encode, loader(number), parts, 256 * number, 0.0, lambda done: None)
        with (tmp_path / "f.npz").open("wb") as file:
            write_npz(file, parts, has_labels=True)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert (tmp_path / "f.npz").stat().st_size > number * 2**18
        return most

    first, second = peak(256), peak(512)
    assert first < 40 * 2**20  # of 64 MB; NumPy writes 16 MB at once
    assert second < 1.1 * first


def test_images_whose_features_are_not_finite_are_named(tmp_path):
    from moco.errors import RunError

    names = [f"{number}\n.png" for number in range(30)]
    one = ImageBatch(torch.zeros(30, 1), names, torch.zeros(30, dtype=torch.int64), [], [30])

    def encode(images):
        features = np.zeros((30, 2), np.float32)
        features[[3, 7], 1] = np.nan, np.inf
        return features

    parts = FeatureParts(tmp_path, ABOUT, [0])
    message = r"features of 2 images are not finite: 3\\n\.png, 7\\n\.png; the checkpoint"
    with pytest.raises(RunError, match=message), parts:
        add_features(encode, [one], parts, 30, 0.0, lambda done: None)
    assert parts.state.num_rows == 0


def test_a_batch_of_unreadable_images_alone_adds_nothing_but_their_names(tmp_path):
    problem = SimpleNamespace(name="bad.png", reason="bad.png: empty", is_shard=False)
    nothing = ImageBatch(
        torch.empty(0, 3, 2, 2), [], torch.empty(0, dtype=torch.int64), [problem], [1]
    )
    parts = FeatureParts(tmp_path, ABOUT, [0])
    with parts:
        add_features(None, [nothing], parts, 30, 0.1, lambda done: None)
    assert parts.state.num_rows == 0
    assert parts.unreadable() == ["bad.png"]
