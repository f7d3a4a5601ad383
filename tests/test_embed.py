"""Features of any images in one file, and an index beside it."""

import errno
import json
import os
import resource
import signal
import sys
import tarfile
from contextlib import suppress
from functools import partial

import faiss
import numpy as np
import pytest
import torch
from PIL import Image

from moco.data.augment.views import EvaluationView
from moco.data.sources.registry import build_source
from moco.data.sources.source import FileImages
from moco.embed import run
from moco.errors import InputError, Interrupted, RunError
from moco.evaluation.embedding import choose_images
from moco.evaluation.resumable_features import FeatureParts
from moco.methods.moco import MoCo
from moco.models.swin.window_change import rewindow
from moco.weights.load_encoder import load_pretrained
from tests.configs import composed
from tests.processes import started, wait_until

slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Write the checkpoint of an untrained small Swin V2, as training writes it."""
    torch.manual_seed(0)
    hparams = {
        "backbone": {"name": "swin_v2_tiny_patch2", "window_size": 2},
        "optimizer": {"name": "adamw"},
        "projector": {"num_layers": 2},
        "predictor": {"num_layers": 0},
        "queue_size": 8,
    }
    config = {
        "data": {
            "name": "digits",
            "root": None,
            "image_size": 32,
            "crop_ratio": 1.0,
            "num_images": 1024,
        },
        "augmentation": {"mean": [0.5] * 3, "std": [0.5] * 3},
        "evaluation": {},
    }
    path = tmp_path_factory.mktemp("checkpoint") / "last.ckpt"
    made = MoCo(**hparams)
    for name, parameter in made.named_parameters():
        # An untrained block is the identity, whatever its window.
        if "norm" in name or "cpb_mlp" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    state = {
        "state_dict": made.state_dict(),
        "hyper_parameters": dict(made.hparams),
        "config": config,
    }
    torch.save(state | {"figures": {}, "random_states": [], "global_step": 0}, path)
    return path


def embed(checkpoint, folder, *overrides):
    """Run the program in this process, and return the arrays that it has written."""
    given = [f"checkpoint={checkpoint}", f"output={folder / 'f.npz'}", "data.num_workers=0"]
    run(composed("embed", *given, *overrides), folder / "run")
    with np.load(folder / "f.npz") as file:
        return dict(file)


@torch.no_grad()
def features(checkpoint, images, places, image_size, feature, window=2):
    """Return features of images by their places, one image at a time."""
    encoder = load_pretrained(str(checkpoint), "query", {}).encoder
    rewindow(encoder.backbone, window)
    view = EvaluationView(image_size, 1.0, [0.5] * 3, [0.5] * 3)
    return torch.cat([encoder.encode(view(images[place])[None], feature) for place in places])


def test_features_names_and_labels_go_together(checkpoint, tmp_path):
    test = embed(checkpoint, tmp_path, "split=test", "feature=embedding", "batch_size=100")
    queries = build_source("digits").queries
    assert test["labels"].tolist() == queries.labels.tolist()
    assert test["names"].tolist() == [f"digits: test_images[{index}]" for index in range(360)]
    expected = features(checkpoint, queries.images, (0, 1, 359), 32, "embedding")
    torch.testing.assert_close(torch.from_numpy(test["features"][[0, 1, 359]]), expected)


def test_files_are_named_by_their_paths_and_the_unreadable_are_left_out(
    checkpoint, tmp_path, image_tree
):
    (image_tree / "a" / "broken.png").write_bytes(b"no image")
    given = [
        f"data.root={image_tree}",
        "data=images",
        "data.max_bad_fraction=0.1",
        "data.image_size=40",
    ]
    found = embed(checkpoint, tmp_path, *given)
    assert found["features"].shape == (24, 256)
    assert "labels" not in found
    assert found["names"].tolist() == sorted(str(path) for path in image_tree.rglob("[0-9]*.png"))
    widened = embed(checkpoint, tmp_path, *given, "backbone.window_size=5")
    images = FileImages(found["names"].tolist())
    for file, window in ((found, 2), (widened, 5)):
        expected = features(checkpoint, images, range(24), 40, "backbone", window)
        torch.testing.assert_close(torch.from_numpy(file["features"]), expected)
    assert not np.allclose(found["features"], widened["features"], atol=1e-3)


def test_class_folders_without_a_validation_folder_keep_the_labels_of_all_images(tmp_path):
    for number in range(60):
        folder = tmp_path / "abc"[number % 3]
        folder.mkdir(exist_ok=True)
        (folder / f"{number}.png").touch()
    source = build_source("image_folder", str(tmp_path))
    assert 0 < len(source.queries.labels) < 60
    images = choose_images(source, "train", "image_folder")
    assert images.has_labels
    classes = [source.train.name(row).split("/")[-2] for row in range(60)]
    assert images.labels.tolist() == ["abc".index(name) for name in classes]
    assert images.class_names == ("a", "b", "c")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["output=features.npy"], "output=features.npy: expected a file that ends in .npz"),
        (
            ["backbone.window_size=0"],
            "backbone.window_size=0: expected a whole number of cells from 1 to 64",
        ),
        (["data=images", "data.root=nowhere"], "data.root=nowhere: no such folder"),
        (["output=/dev/null/f.npz"], "output=/dev/null/f.npz: cannot write to /dev/null"),
    ],
)
def test_mistakes_are_named(checkpoint, tmp_path, overrides, message):
    with pytest.raises(InputError) as error:
        embed(checkpoint, tmp_path, *overrides)
    assert str(error.value).startswith(message)


def test_a_set_without_held_out_images_has_no_test_split(checkpoint, tmp_path, image_tree):
    with pytest.raises(InputError, match="split=test: data=images has no images that are held out"):
        embed(checkpoint, tmp_path, "data=images", f"data.root={image_tree}", "split=test")


def bytes_of(folder):
    return {name: (folder / name).read_bytes() for name in ("f.npz", "f.faiss")}


class After:
    """A stand-in for a method that works a number of times, then raises."""

    def __init__(self, method, times, error):
        self.method = method
        self.times = times
        self.error = error

    def __get__(self, instance, owner):
        return partial(self, instance)

    def __call__(self, *arguments):
        if self.times == 0:
            raise self.error
        self.times -= 1
        return self.method(*arguments)


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
SMALL = ["split=test", "batch_size=100", "data.image_size=8"]
ENDED = Interrupted(signal.SIGTERM, "ended")


def ended_after(num_batches, checkpoint, folder, *overrides, error=ENDED):
    """Run the program until it ends with an error after some batches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureParts, "add", After(FeatureParts.add, num_batches, error))
        with pytest.raises((Interrupted, KeyboardInterrupt, RunError)):
            embed(checkpoint, folder, *overrides)


@pytest.fixture(scope="module")
def straight(checkpoint, tmp_path_factory):
    """Return the files of an uninterrupted run over the 360 queries of the digits."""
    folder = tmp_path_factory.mktemp("straight")
    embed(checkpoint, folder, *SMALL)
    return bytes_of(folder)


@pytest.mark.parametrize(
    ("error", "num_batches"),
    [(ENDED, 1), slow(KeyboardInterrupt(), 0), slow(FULL, 3)],
)
def test_an_interrupted_and_continued_run_ends_in_the_same_bytes(
    checkpoint, tmp_path, straight, error, num_batches
):
    ended_after(num_batches, checkpoint, tmp_path, *SMALL, error=error)
    state = json.loads((tmp_path / "f.npz.part" / "state.json").read_text())["state"]
    assert state["num_bytes"]["labels.bin"] == 8 * 100 * num_batches
    assert not (tmp_path / "f.npz").exists()
    embed(checkpoint, tmp_path, *SMALL)
    assert bytes_of(tmp_path) == straight
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "f.duplicates.csv",
        "f.faiss",
        "f.npz",
        "run",
    ]


@pytest.mark.slow
def test_a_disk_that_is_full_when_the_files_are_made_is_one_line_and_no_feature_is_computed_again(
    checkpoint, tmp_path, straight, monkeypatch
):
    def full(file, **arrays):
        raise FULL

    with monkeypatch.context() as patch:
        patch.setattr("numpy.savez", full)
        with pytest.raises(RunError) as error:
            embed(checkpoint, tmp_path, *SMALL)
    assert str(error.value) == (
        "[Errno 28] No space left on device; free some space and start again; "
        "what is done is kept in "
        f"{tmp_path / 'f.npz.part'}, and the same command goes on there"
    )
    monkeypatch.setattr(FeatureParts, "add", After(None, 0, AssertionError("computed again")))
    embed(checkpoint, tmp_path, *SMALL)
    assert bytes_of(tmp_path) == straight


@pytest.mark.slow
def test_where_the_disk_is_read_only_another_folder_is_the_remedy(checkpoint, tmp_path):
    gone = OSError(errno.EROFS, os.strerror(errno.EROFS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureParts, "add", After(FeatureParts.add, 1, gone))
        with pytest.raises(RunError) as error:
            embed(checkpoint, tmp_path, *SMALL)
    said = str(error.value)
    assert "start again, or choose another folder; what is done is kept in" in said


@pytest.mark.slow
def test_a_run_that_is_ended_while_it_removes_its_parts_can_be_started_again(
    checkpoint, tmp_path, straight, monkeypatch
):
    def interrupted(folder):
        (folder / "names.jsonl").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            embed(checkpoint, tmp_path, *SMALL)
    assert bytes_of(tmp_path) == straight
    embed(checkpoint, tmp_path, *SMALL)
    assert bytes_of(tmp_path) == straight
    assert not (tmp_path / "f.npz.part").exists()


@pytest.mark.slow
def test_a_file_that_may_not_grow_is_one_line_and_the_run_goes_on_later(
    checkpoint, tmp_path, straight
):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    third_batch = 250 * 256 * 4
    resource.setrlimit(resource.RLIMIT_FSIZE, (third_batch, before[1]))
    try:
        with pytest.raises(
            RunError,
            match=r"raise the limit on the size of files \(ulimit -f\).* the same command goes on",
        ):
            embed(checkpoint, tmp_path, *SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    embed(checkpoint, tmp_path, *SMALL)
    assert bytes_of(tmp_path) == straight


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            ["batch_size=50"],
            "batch_size: 100 there, 50 here; "
            "remove that folder to start anew, or choose another output",
        ),
        slow(["feature=embedding"], "feature: backbone there, embedding here"),
        slow(["backbone.window_size=4"], "backbone.window_size: 2 there, 4 here"),
        (["split=train"], "split: test there, train here; data: other images, names or labels"),
    ],
)
def test_a_run_with_other_settings_does_not_go_on(checkpoint, tmp_path, changed, message):
    ended_after(1, checkpoint, tmp_path, *SMALL)
    with pytest.raises(InputError) as error:
        embed(checkpoint, tmp_path, *SMALL, *changed)
    assert f"f.npz.part holds the first 100 features of another run: {message}" in str(error.value)


@pytest.mark.slow
def test_the_same_name_with_other_weights_does_not_go_on(checkpoint, tmp_path, straight):
    own = tmp_path / "own.ckpt"
    state = torch.load(checkpoint)
    torch.save(state, own)
    ended_after(1, checkpoint, tmp_path, *SMALL)
    state["state_dict"]["query_encoder.backbone.norm.bias"][0] += 1
    torch.save(state, tmp_path / "trained_on.ckpt")
    with pytest.raises(
        InputError, match="of another run: checkpoint: other weights; remove that folder"
    ):
        embed(tmp_path / "trained_on.ckpt", tmp_path, *SMALL)
    embed(own, tmp_path, *SMALL)  # the same weights in another place
    assert bytes_of(tmp_path) == straight


@pytest.mark.parametrize("kind", ["flat", slow("'IVF4,Flat'"), slow("HNSW32")])
def test_row_i_of_the_index_is_image_i(checkpoint, tmp_path, kind, capsys):
    file = embed(checkpoint, tmp_path, *SMALL, f"index={kind}")
    index = faiss.read_index(str(tmp_path / "f.faiss"))
    if "IVF" in kind:
        index.make_direct_map()
    features = file["features"]
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    np.testing.assert_allclose(index.reconstruct_n(0, 360), unit, atol=1e-6)
    similarities, _ = index.search(unit, 1)
    np.testing.assert_allclose(similarities, 1, atol=1e-5)
    assert "f.npz and" in capsys.readouterr().out


@pytest.mark.slow
def test_no_index_is_written_when_none_is_wanted_and_an_old_one_is_named(
    checkpoint, tmp_path, caplog
):
    embed(checkpoint, tmp_path, *SMALL, "index=none")
    assert not (tmp_path / "f.faiss").exists()
    (tmp_path / "f.faiss").write_bytes(b"old")
    embed(checkpoint, tmp_path, *SMALL, "index=none")
    assert "f.faiss is of an earlier run and does not go with the new file" in caplog.text
    assert (tmp_path / "f.faiss").read_bytes() == b"old"


def test_names_that_no_encoding_has_come_back_as_paths(checkpoint, tmp_path, image_tree):
    odd = ["a\nb.png", os.fsdecode(b"\xff.png"), "漢字 🙂.png", "' \"\\.png"]
    paths = sorted(image_tree.rglob("*.png"))
    for path, name in zip(paths, odd, strict=False):
        path.rename(path.with_name(name))
    found = embed(
        checkpoint, tmp_path, "data=images", f"data.root={image_tree}", "data.image_size=16"
    )
    assert {*map(str, image_tree.rglob("*.png"))} == {*found["names"].tolist()}
    assert all(os.path.isfile(name) for name in found["names"].tolist())


@pytest.mark.slow
def test_too_many_unreadable_images_end_the_run_early_and_a_higher_limit_goes_on(
    checkpoint, tmp_path, image_tree, caplog
):
    for name in ("00.png", "02.png"):
        next(image_tree.rglob(name)).write_bytes(b"no image")
    given = ["data=images", f"data.root={image_tree}", "data.image_size=16", "batch_size=6"]
    with pytest.raises(
        InputError, match=r"1 of 24 images cannot be read, more than data\.max_bad_fraction=0\.01"
    ):
        embed(checkpoint, tmp_path, *given)
    with pytest.raises(
        InputError, match=r"2 of 24 images cannot be read, more than data\.max_bad_fraction=0\.05"
    ):
        embed(checkpoint, tmp_path, *given, "data.max_bad_fraction=0.05")
    found = embed(checkpoint, tmp_path, *given, "data.max_bad_fraction=0.1")
    assert len(found["features"]) == len(found["names"]) == 22
    skipped = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert [message.split(":")[0:2] for message in skipped] == [
        ["skipped", f" {next(image_tree.rglob(name))}"] for name in ("00.png", "02.png")
    ]


@pytest.mark.slow
def test_features_that_are_not_finite_name_their_images(checkpoint, tmp_path):
    state = torch.load(checkpoint)
    state["state_dict"]["query_encoder.backbone.norm.bias"][0] = float("nan")
    torch.save(state, tmp_path / "bad.ckpt")
    with pytest.raises(RunError) as error:
        embed(tmp_path / "bad.ckpt", tmp_path, *SMALL)
    first = ", ".join(f"digits: test_images[{number}]" for number in range(10))
    assert str(error.value) == (
        f"the features of 100 images are not finite: {first}; "
        "the checkpoint's weights are damaged, or too large for these images"
    )


@pytest.mark.slow
def test_shards_are_embedded_in_their_order_and_gone_on_with(checkpoint, tmp_path, image_tree):
    pytest.importorskip("webdataset")
    paths = sorted(image_tree.rglob("*.png"))
    for number in range(3):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as archive:
            for path in paths[8 * number : 8 * number + 8]:
                archive.add(path, f"folder/{path.name}")
    given = ["data=webdataset", f"data.root={tmp_path}", "data.image_size=16", "batch_size=5"]
    ended_after(2, checkpoint, tmp_path, *given)
    found = embed(checkpoint, tmp_path, *given)
    assert found["names"].tolist() == [
        f"{row // 8}.tar/folder/{path.stem}" for row, path in enumerate(paths)
    ]
    assert "labels" not in found
    plain = embed(
        checkpoint,
        tmp_path,
        "data=images",
        f"data.root={image_tree}",
        "data.image_size=16",
        "batch_size=5",
    )
    assert np.array_equal(found["features"], plain["features"])
    with pytest.raises(
        InputError, match="split=test: data=webdataset has no images that are held out"
    ):
        embed(checkpoint, tmp_path, *given, "split=test")


SAID = "interrupted: the parts that are whole are kept; the same command goes on there"


def sends(number):
    """A stand-in for `FeatureParts.add` that adds the batch, then sends this process a signal."""

    def add(parts, *arguments):
        add_batch(parts, *arguments)
        signal.raise_signal(number)

    add_batch = FeatureParts.add
    return add


@pytest.mark.parametrize("number", [slow(signal.SIGINT), signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_line_and_the_run_goes_on(
    checkpoint, tmp_path, straight, number
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureParts, "add", sends(number))
        with pytest.raises(Interrupted) as error:
            embed(checkpoint, tmp_path, *SMALL)
    assert error.value.signal_number == number
    assert f"interrupted: {error.value}" == SAID
    state = json.loads((tmp_path / "f.npz.part" / "state.json").read_text())["state"]
    assert state["num_bytes"]["labels.bin"] == 8 * 100
    embed(checkpoint, tmp_path, *SMALL)
    assert bytes_of(tmp_path) == straight


def size_of(file):
    """Return the size of a file in bytes; 0 if there is none (any more)."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0


def ended_in_the_middle(folder, number, *arguments):
    """Send the program a signal, as a terminal does, when it has written more features than before.

    Returns its exit code and what it wrote to stderr.
    """
    file = folder / "f.npz.part" / "features.bin"
    size_before = size_of(file)
    command = ["-m", "moco.embed", f"output={folder / 'f.npz'}", *arguments]
    with started(sys.executable, *command, cwd=folder) as program:
        wait_until(
            lambda: program.poll() is not None or size_of(file) > size_before, "more features"
        )
        with suppress(ProcessLookupError):
            program.signal_group(number)
        return program.wait(), program.errors().strip()


@pytest.mark.slow
def test_a_program_that_is_killed_again_and_again_ends_in_the_same_bytes(
    checkpoint, tmp_path, image_tree, generator
):
    for number in range(100, 2000):
        Image.fromarray(generator.integers(0, 256, (30, 30, 3), dtype=np.uint8)).save(
            image_tree / f"{number}.png"
        )
    arguments = ["batch_size=8", "data=images", f"data.root={image_tree}", "data.image_size=32"]
    arguments += [f"checkpoint={checkpoint}", "data.num_workers=2"]
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT):
        code, said = ended_in_the_middle(tmp_path, number, *arguments)
        if number == signal.SIGKILL:  # then Python's own resource tracker has something to say
            assert code == -number
        else:
            assert (code, said) == (128 + number, SAID)
    arguments = arguments[:-2]
    (tmp_path / "straight").mkdir()
    for folder in (tmp_path, tmp_path / "straight"):
        embed(checkpoint, folder, *arguments)
    assert bytes_of(tmp_path) == bytes_of(tmp_path / "straight")
