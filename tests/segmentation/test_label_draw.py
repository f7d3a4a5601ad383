"""Draws of few labelled images: fixed by name, one inside the other."""

import numpy as np
import pytest
import torch

from moco.errors import InputError
from moco.segmentation.label_draw import LabelDraw, label_draw
from moco.segmentation.mask_sources import build_segmentation_source
from moco.segmentation.segmentation_data import SegmentationData
from tests.segmentation.shapes import draw_shapes
from tests.segmentation.test_mask_augmentation import view

NAMES = [f"city/{number:03}" for number in range(200)]


def drawn(names, **settings):
    return {names[place] for place in LabelDraw(**settings).chosen(names)}


def test_a_smaller_draw_lies_inside_a_larger_one():
    inside = set()
    for fraction, number in ((0.001, 1), (0.05, 10), (0.2, 40), (0.5, 100), (1.0, 200)):
        draw = drawn(NAMES, label_fraction=fraction)
        assert len(draw) == number
        assert inside <= draw
        assert drawn(NAMES, num_images=number) == draw
        inside = draw


def test_a_draw_depends_on_names_and_its_seed_alone():
    twenty = drawn(NAMES, num_images=20)
    assert drawn(NAMES[::-1], num_images=20) == twenty
    # Without images that were not drawn it is the same; a new image pushes out one at most.
    rest = [name for number, name in enumerate(NAMES) if name in twenty or number % 2]
    assert drawn(rest, num_images=20) == twenty
    assert len(twenty - drawn([*NAMES, "new"], num_images=20)) <= 1
    other = drawn(NAMES, num_images=20, label_seed=1)
    assert len(other & twenty) < 10  # 2 are expected


def test_the_draw_of_names_is_fixed_for_ever():
    """Figures of few-label runs are compared between versions."""
    assert sorted(drawn(NAMES, num_images=3)) == ["city/042", "city/080", "city/099"]
    chosen = LabelDraw(num_images=2).chosen(["b\udcff", "a", "c"])
    assert chosen == sorted(chosen)  # names that are not UTF-8 have a place, too


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ((0.1, 5, 0), "label_fraction=0.1 and num_images=5: expected one of them"),
        (
            (None, None, 3),
            "label_seed=3: without label_fraction or num_images it has no effect",
        ),
    ],
)
def test_settings_without_sense_are_named(settings, expected):
    with pytest.raises(InputError) as error:
        label_draw(*settings)
    assert str(error.value) == expected
    assert label_draw(None, None, 0) is None


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return draw_shapes(tmp_path_factory.mktemp("data"), num_train=24, num_val=4)


def source_of(root, **settings):
    return build_segmentation_source("segmentation_folder", str(root), **settings)


def test_a_draw_changes_the_training_images_alone(shapes, tmp_path):
    (shapes / "classes.txt").write_text("ground\ndisc\nsquare\nrare\n")
    whole = source_of(shapes)
    few = source_of(shapes, draw=LabelDraw(num_images=5))
    names = [few.train.name_below(str(shapes), index) for index in range(5)]
    assert len(set(names)) == 5
    assert all(name.startswith("images/train/") for name in names)
    assert (few.num_undrawn, whole.num_undrawn) == (19, 0)
    assert few.class_names == whole.class_names
    assert len(few.validation) == len(whole.validation)
    # The pixels of each class are counted in the drawn masks alone.
    expected = np.zeros(4, int)
    for index in range(5):
        _, mask = few.train[index]
        expected += np.bincount(mask[mask != 255], minlength=4)
    assert few.class_pixels == tuple(expected)
    # In another place they are the same images.
    moved = tmp_path / "moved"
    moved.symlink_to(shapes)
    again = source_of(moved, draw=LabelDraw(num_images=5))
    assert [again.train.name_below(str(moved), index) for index in range(5)] == names
    with pytest.raises(InputError, match="num_images=25: there are only 24 images to train on"):
        source_of(shapes, draw=LabelDraw(num_images=25))


def data_of(source, batch_size):
    return SegmentationData(source, view(16), batch_size=batch_size)


def test_few_images_give_several_crops_to_a_batch(shapes):
    """The batch keeps its size, and an epoch has one step, with other crops of each image."""
    data = data_of(source_of(shapes, draw=LabelDraw(num_images=3)), batch_size=8)
    assert (data.crops_per_image, data.steps_per_epoch) == (3, 1)
    batches = list(data.train_dataloader())
    assert len(batches) == 1
    batch = batches[0]
    assert set(batch.indices.tolist()) == {0, 1, 2}
    assert len(batch.images) == 8
    crops = {image.numpy().tobytes() for image in batch.images}
    assert len(crops) > 3
    # With as many images as a batch holds, crops are those of a run on all of these images.
    whole = data_of(source_of(shapes), batch_size=8)
    drawn = data_of(source_of(shapes, draw=LabelDraw(label_fraction=1.0)), batch_size=8)
    for one, other in zip(whole.train_dataloader(), drawn.train_dataloader(), strict=True):
        assert torch.equal(one.images, other.images)
