import pytest
from PIL import Image

from moco.data.sources.registry import build_source
from tests.data.sources.test_datasets import class_folders


@pytest.mark.parametrize(
    ("train", "validation", "others"),
    [
        ("Train", "Val", ()),
        ("training", "validation", ()),
        ("TRAIN", "Testing", ()),
        ("train", "valid", ("Test", "test")),
    ],
)
def test_splits_are_told_in_any_case(train, validation, others, tmp_path, caplog):
    caplog.set_level("INFO")
    class_folders(tmp_path / train, 10)
    class_folders(tmp_path / validation, 4)
    for name in others:
        class_folders(tmp_path / name, 6)
    source = build_source("image_folder", str(tmp_path))
    assert (len(source.train), len(source.queries.labels)) == (10, 4)
    assert source.bank.class_names == source.queries.class_names == ("cat", "dog")
    assert f"{tmp_path}: {train} is trained on, {validation} is held out" in caplog.text
    assert "2 classes: cat, dog" in caplog.text
    assert f"{tmp_path}: 10 training images; 14 files: .png 14" in caplog.text
    assert "WARNING" not in caplog.text


def test_where_only_part_of_a_split_is_known_the_log_says_what_was_taken_for_what(tmp_path, caplog):
    class_folders(tmp_path / "train", 10)
    class_folders(tmp_path / "heldout", 4)
    assert build_source("image_folder", str(tmp_path)).queries is None
    assert "train is trained on, and the other folders are not used: heldout" in caplog.text
    (tmp_path / "train").rename(tmp_path / "trn")
    (tmp_path / "heldout").rename(tmp_path / "val")
    assert build_source("image_folder", str(tmp_path)).bank.class_names == ("trn", "val")
    assert "there is a folder val, but none to train on (train or training)" in caplog.text
    assert "it is a class as the others: trn" in caplog.text


def test_classes_may_be_called_train_and_test(tmp_path, caplog):
    for name in ("car", "train", "test"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "1.png")
    assert build_source("image_folder", str(tmp_path)).bank.class_names == ("car", "test", "train")
    assert not caplog.records


def test_classes_have_numbers_in_natural_order_and_keep_their_names(tmp_path):
    class_folders(tmp_path, 24, classes=tuple(map(str, range(12))))
    bank = build_source("image_folder", str(tmp_path), held_out=0.0).bank
    folders = [bank.images.name(index).split("/")[-3] for index in range(len(bank.labels))]
    assert [bank.class_name(label) for label in bank.labels] == folders
    assert [str(label) for label in bank.labels] == folders


def test_a_class_without_images_on_one_side_is_a_warning(tmp_path, caplog):
    class_folders(tmp_path / "train", 12, classes=tuple("abcdef"))
    class_folders(tmp_path / "val", 4, classes=("a", "c"))
    build_source("image_folder", str(tmp_path))
    assert "4 of 6 classes have no image among the queries: b, d, e, f" in caplog.text
    assert "among the bank" not in caplog.text


def test_masks_beside_the_images_are_warned_of(tmp_path, caplog):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / folder / "1.png")
    assert len(build_source("images", str(tmp_path)).train) == 2
    assert f"data.root={tmp_path / 'images'} leaves them out" in caplog.text
    caplog.clear()
    assert len(build_source("images", str(tmp_path / "images")).train) == 1
    assert not caplog.text
