"""The augmentation of an image and its mask together."""

import numpy as np
import pytest
import torch
from PIL import Image

from moco.errors import InputError
from moco.segmentation.mask_augmentation import SegmentationView


def view(image_size, **settings):
    defaults = {
        "scale": [1.0, 1.0],
        "horizontal_flip": 0.0,
        "color_jitter": None,
        "mean": [0.5, 0.5, 0.5],
        "std": [1.0, 1.0, 1.0],
        "ignore_index": 255,
        "seed": 0,
    }
    return SegmentationView(image_size, **(defaults | settings))


def coordinates(height, width):
    """An image and a mask whose pixels say where they are.

    Red is 4 times the column, green 4 times the row; the mask is row * 64 + column.
    """
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([4 * columns, 4 * rows, np.zeros_like(rows)], axis=2).astype(np.uint8)
    return Image.fromarray(image), (rows * 64 + columns).astype(np.int32)


@pytest.mark.parametrize(
    ("scale", "tolerance"),
    # In px of the source. Bilinear and nearest resizing differ by up to half a pixel.
    [([1.0, 1.0], 0.01), ([0.5, 2.0], 0.8)],
)
def test_image_and_mask_move_together(scale, tolerance):
    raw, mask = coordinates(60, 50)
    augment = view(24, scale=scale, horizontal_flip=0.5, mean=[0, 0, 0], ignore_index=60000)
    flips, places = set(), set()
    for index in range(40):
        image, classes = augment(raw, mask, epoch=0, index=index)
        assert image.shape == (3, 24, 24)
        assert (classes.dtype, classes.shape) == (torch.int64, (24, 24))
        column_error = (classes % 64 - image[0] * 255 / 4).abs()
        row_error = (classes // 64 - image[1] * 255 / 4).abs()
        # At the borders the bilinear image is made of fewer pixels.
        assert column_error[2:-2, 2:-2].max() < tolerance
        assert row_error[2:-2, 2:-2].max() < tolerance
        flips.add(bool(classes[12, 4] > classes[12, 20]))
        places.add(int(classes[12, 12]))
    assert flips == {False, True}
    assert len(places) > 20


@pytest.mark.parametrize("factor", [0.7, 1.6])
def test_resized_masks_stay_where_their_images_are(factor):
    raw, mask = coordinates(60, 50)
    augment = view(24, scale=[factor, factor], mean=[0, 0, 0])
    shifts = []
    for index in range(20):
        image, classes = augment(raw, mask, 0, index)
        shift = classes % 64 - image[0] * 255 / 4
        shifts.append(shift[4:-4, 4:-4].mean())
    # Torchvision's own resizing of masks is off by 0.2 here.
    assert abs(torch.stack(shifts).mean()) < 0.08


def test_pixels_outside_the_image_are_its_mean_and_have_no_class():
    raw, mask = coordinates(20, 50)
    image, classes = view(40, scale=[0.5, 0.5], mean=[0.2, 0.4, 0.6])(raw, mask, 0, 0)
    assert (classes[:10, :25] != 255).all()
    assert (classes[10:] == 255).all()
    assert (classes[:, 25:] == 255).all()
    assert image[:, 10:].abs().max() < 1 / 255
    assert image[:, :, 25:].abs().max() < 1 / 255


def test_a_mask_of_8_bits_can_be_filled_with_a_larger_ignore_index():
    raw, mask = coordinates(20, 50)
    mask = (mask % 200).astype(np.uint8)
    _, classes = view(40, scale=[0.5, 0.5], ignore_index=300)(raw, mask, 0, 0)
    assert (classes[:10, :25] < 200).all()
    assert (classes[10:] == 300).all()
    assert (classes[:, 25:] == 300).all()


def test_random_numbers_depend_on_seed_epoch_and_index_alone():
    raw, mask = coordinates(60, 60)
    settings = {
        "scale": [0.5, 2.0],
        "horizontal_flip": 0.5,
        "color_jitter": {"brightness": 0.5, "probability": 0.5},
    }
    augment = view(24, **settings)
    image, classes = augment(raw, mask, 1, 5)
    torch.rand(7)
    augment(raw, mask, 0, 0)
    same_image, same_classes = view(24, **settings)(raw, mask, 1, 5)
    assert torch.equal(image, same_image)
    assert torch.equal(classes, same_classes)
    for seed, epoch, index in ((1, 1, 5), (0, 2, 5), (0, 1, 6)):
        other_image, _ = view(24, **settings, seed=seed)(raw, mask, epoch, index)
        assert not torch.equal(image, other_image)


def test_colour_jitter_leaves_the_mask_alone():
    raw, mask = coordinates(24, 24)
    jitter = {"brightness": 0.5, "saturation": 0.5, "hue": 0.1}
    image, classes = view(24)(raw, mask, 0, 0)
    jittered_image, jittered_classes = view(24, color_jitter=jitter)(raw, mask, 0, 0)
    assert not torch.allclose(image, jittered_image)
    assert torch.equal(classes, jittered_classes)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"scale": [2.0, 0.5]},
            "augmentation.scale=[2.0, 0.5]: expected two factors, 0 < low <= high",
        ),
        (
            {"scale": [1.0]},
            "augmentation.scale=[1.0]: expected two factors, 0 < low <= high",
        ),
        ({"color_jitter": {"hues": 1}}, "augmentation.color_jitter: unknown setting 'hues'"),
        ({"color_jitter": {"hue": 2}}, "augmentation.color_jitter: hue=2: expected a number"),
        ({"std": [0, 1, 1]}, "augmentation.std=[0, 1, 1]: "),
    ],
)
def test_wrong_augmentation_settings_name_their_key(settings, expected):
    with pytest.raises(InputError) as error:
        view(24, **settings)
    assert str(error.value).startswith(expected)
