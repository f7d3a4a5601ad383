import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moco.data.sources.registry import build_source
from moco.errors import InputError


def test_digits_are_split_once_and_for_all():
    source = build_source("digits")
    assert (len(source.train), len(source.bank.labels), len(source.queries.labels)) == (
        1437,
        1437,
        360,
    )
    assert source.image_size == 8
    assert np.bincount(source.bank.labels).sum() == 1437
    assert source.queries.labels[:8].tolist() == DIGITS
    assert set(np.unique(source.queries.labels)) == set(range(10))
    train = {source.train[i].tobytes() for i in range(1437)}
    test = {source.queries.images[i].tobytes() for i in range(360)}
    assert not train & test


DIGITS = [7, 9, 4, 7, 0, 2, 6, 1]


def test_images_takes_a_tree_and_sub_folders_are_no_classes(image_tree):
    source = build_source("images", str(image_tree))
    assert len(source.train) == 24
    assert source.bank is None
    assert source.queries is None
    assert source.train[0].shape == (16, 20, 3)


def test_loader_processes_are_handed_images_as_shared_memory(image_tree):
    from multiprocessing.reduction import ForkingPickler

    import torch.multiprocessing  # noqa: F401  (registers how tensors travel)

    for images in (build_source("digits").train, build_source("images", str(image_tree)).train):
        assert len(ForkingPickler.dumps(images)) < 1500


def test_names_with_odd_characters_survive(tmp_path):
    names = ["ü ber.png", "new\nline.png", os.fsdecode(b"\xff.png")]
    for name in names:
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    source = build_source("images", str(tmp_path))
    assert sorted(source.train.name(i) for i in range(3)) == sorted(
        str(tmp_path / name) for name in names
    )
    assert source.train[2].shape == (4, 4, 3)


def test_images_takes_several_trees(image_tree):
    source = build_source("images", [str(image_tree / "a"), str(image_tree / "b" / "deeper")])
    assert len(source.train) == 16


@pytest.mark.parametrize(
    ("first", "second"), [(".", "a"), ("a", "."), ("a", "a/"), ("link", "b/deeper"), (".", ".")]
)
def test_trees_that_overlap_are_refused_with_both_names(image_tree, first, second):
    (image_tree / "link").symlink_to(image_tree / "b")
    first, second = (f"{image_tree}/{name}" for name in (first, second))
    with pytest.raises(
        InputError, match=r"is .* or lies below it, and its images would be listed twice"
    ) as error:
        build_source("images", [first, second])
    assert first in str(error.value)
    assert second in str(error.value)


def test_trees_whose_names_begin_alike_do_not_overlap(image_tree):
    (image_tree / "a").rename(image_tree / "bb")
    assert len(build_source("images", [str(image_tree / "b"), str(image_tree / "bb")]).train) == 24


@pytest.mark.parametrize("root", [[], [3], {"a": 1}])
def test_images_refuses_other_roots(root):
    with pytest.raises(InputError, match=r"data\.root=.*expected a folder or a list of folders"):
        build_source("images", root)


def class_folders(root, count, classes=("cat", "dog")):
    for number in range(count):
        folder = root / classes[number % len(classes)] / "deeper"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")


def test_image_folder_reads_train_and_val(tmp_path):
    class_folders(tmp_path / "train", 10)
    class_folders(tmp_path / "val", 4, classes=("dog",))
    source = build_source("image_folder", str(tmp_path))
    assert len(source.train) == 10
    assert sorted(source.bank.labels.tolist()) == [0] * 5 + [1] * 5
    assert source.queries.labels.tolist() == [1] * 4


def test_image_folder_without_val_keeps_a_tenth_out_of_the_bank_but_trains_on_it(tmp_path):
    class_folders(tmp_path, 200)
    source = build_source("image_folder", str(tmp_path))
    assert len(source.train) == 200
    assert len(source.bank.labels) + len(source.queries.labels) == 200
    assert 8 <= len(source.queries.labels) <= 35
    paths = {source.bank.images.name(i) for i in range(len(source.bank.images))}
    assert not paths & {source.queries.images.name(i) for i in range(len(source.queries.images))}
    for labelled in (source.bank, source.queries):
        names = [
            Path(labelled.images.name(i)).relative_to(tmp_path).parts[0]
            for i in range(len(labelled.labels))
        ]
        assert [("cat", "dog")[label] for label in labelled.labels] == names


def test_image_folder_train_alone_has_no_monitor(tmp_path):
    class_folders(tmp_path / "train", 4)
    assert build_source("image_folder", str(tmp_path)).queries is None


def test_image_folder_names_unknown_classes_and_missing_class_folders(tmp_path):
    class_folders(tmp_path / "train", 4)
    class_folders(tmp_path / "val", 4, classes=("eel",))
    with pytest.raises(InputError, match=r"val: classes that the training images do not have: eel"):
        build_source("image_folder", str(tmp_path))
    with pytest.raises(
        InputError, match=r"no class sub-folders with images; data=images takes a plain folder"
    ):
        build_source("image_folder", str(tmp_path / "train" / "cat" / "deeper"))


def save_npz(path, **changes):
    arrays = {
        "train_images": np.zeros((6, 28, 28), np.uint8),
        "train_labels": np.arange(6)[:, None],
        "test_images": np.zeros((2, 28, 28), np.uint8),
        "test_labels": np.array([[7], [900]]),
    } | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return str(path)


@pytest.mark.parametrize(
    ("shape", "bands"),
    [((6, 28, 28), 3), ((6, 28, 28, 1), 3), ((6, 28, 28, 3), 3), ((6, 28, 28, 4), 4)],
)
def test_npz_reads_the_medmnist_layout(shape, bands, tmp_path):
    source = build_source(
        "npz", save_npz(tmp_path / "set.npz", train_images=np.full(shape, 200, np.uint8))
    )
    assert len(source.train) == 6
    assert source.train.opened(0).pixels().shape == (28, 28, bands)
    assert source.image_size == 28
    assert source.bank.labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert source.queries.labels.tolist() == [7, 900]


def test_npz_without_labels_or_test_images_trains_without_a_monitor(tmp_path):
    assert build_source("npz", save_npz(tmp_path / "a.npz", train_labels=None)).bank is None
    assert build_source("npz", save_npz(tmp_path / "b.npz", test_labels=None)).queries is None
    assert build_source("npz", save_npz(tmp_path / "c.npz", test_images=None)).queries is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train_images": None},
            "no array train_images in there (found train_labels, test_images, test_labels)",
        ),
        ({"train_images": np.zeros((6, 28, 28), np.int64)}, "int64; expected one of uint8, uint16"),
        ({"train_images": np.zeros((6, 28), np.uint8)}, "expected images of shape (M, H, W), "),
        (
            {"train_images": np.zeros((0, 28, 28), np.uint8), "train_labels": None},
            "expected images of shape (M, H, W), ",
        ),
        ({"train_labels": np.arange(5)}, "train_labels must hold one class number"),
        ({"train_labels": np.arange(6) - 1}, "train_labels must hold one class number"),
        ({"train_labels": np.arange(6.0)}, "train_labels must hold one class number"),
    ],
)
def test_npz_with_other_content_is_named(changes, message, tmp_path):
    with pytest.raises(InputError) as error:
        build_source("npz", save_npz(tmp_path / "set.npz", **changes))
    assert message in str(error.value)
    assert "set.npz" in str(error.value)


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


@pytest.mark.parametrize("kind", ["text", "cut", "flipped", "pickle", "missing", "npy"])
def test_npz_that_is_none_is_refused(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "set.npz"
    if kind == "text":
        path.write_text("hello")
    elif kind == "cut":
        save_npz(path)
        path.write_bytes(path.read_bytes()[:400])
    elif kind == "flipped":
        np.savez_compressed(
            path, train_images=np.random.default_rng(0).integers(0, 9, (6, 28, 28), dtype=np.uint8)
        )
        content = bytearray(path.read_bytes())
        content[100:140] = bytes(40)
        path.write_bytes(content)
    elif kind == "pickle":
        np.savez(path, train_images=np.array([Bomb()], dtype=object))
    elif kind == "npy":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    with pytest.raises(InputError, match=r"data\.root=.*set\.npz: "):
        build_source("npz", str(path))
    assert not (tmp_path / "exploded").exists()


def cifar_batch(count, label_key):
    return {
        "data": np.arange(count * 3072, dtype=np.int64).reshape(count, 3072).astype(np.uint8),
        label_key: [number % 10 for number in range(count)],
    }


def test_cifar10_is_read_by_torchvisions_own_class(tmp_path, monkeypatch):
    import torchvision.datasets

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_load_meta", lambda self: None)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [
        "data_batch_1",
        "data_batch_2",
        "data_batch_3",
        "data_batch_4",
        "data_batch_5",
        "test_batch",
    ]:
        (folder / name).write_bytes(pickle.dumps(cifar_batch(4, "labels")))
    source = build_source("cifar10", str(tmp_path))
    assert (len(source.train), len(source.queries.labels), source.image_size) == (20, 4, 32)
    assert source.train[0][0, 0].tolist() == [0, 1024 % 256, 2048 % 256]


def test_fashion_mnist_is_read_by_torchvisions_own_class(tmp_path):
    import struct

    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for part, count in (("train", 5), ("t10k", 3)):
        images = struct.pack(">IIII", 0x803, count, 28, 28) + bytes(count * 784)
        labels = struct.pack(">II", 0x801, count) + bytes(range(count))
        (folder / f"{part}-images-idx3-ubyte").write_bytes(images)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    source = build_source("fashion_mnist", str(tmp_path))
    assert (len(source.train), source.queries.labels.tolist(), source.image_size) == (
        5,
        [0, 1, 2],
        28,
    )


def test_stl10_trains_on_its_unlabelled_split_too(tmp_path, monkeypatch):
    import torchvision.datasets

    monkeypatch.setattr(torchvision.datasets.STL10, "_check_integrity", lambda self: True)
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    for part, count in (("train", 4), ("test", 3), ("unlabeled", 6)):
        (folder / f"{part}_X.bin").write_bytes(bytes(count * 3 * 96 * 96))
        if part != "unlabeled":
            (folder / f"{part}_y.bin").write_bytes(bytes(range(1, count + 1)))
    source = build_source("stl10", str(tmp_path))
    assert (len(source.train), len(source.bank.labels), len(source.queries.labels)) == (10, 4, 3)
    assert source.bank.labels.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion_mnist", "stl10"])
def test_torchvision_sets_that_are_not_there_say_how_to_fetch_them(name, tmp_path):
    with pytest.raises(
        InputError, match=r"is not there or damaged \(.*data\.download=true fetches it"
    ):
        build_source(name, str(tmp_path))


def test_unknown_dataset_suggests_the_nearest():
    with pytest.raises(InputError, match="unknown dataset 'cifar1'; did you mean 'cifar10'"):
        build_source("cifar1")


def test_synthetic_has_the_size_asked_for():
    source = build_source("synthetic", num_images=20)
    assert (len(source.train), len(source.queries.labels), source.image_size) == (20, 2, 224)
