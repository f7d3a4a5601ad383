"""What moco.segment and moco.predict say of attention windows before they start."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moco.cli.predicted_images import say_clipped_windows
from moco.cli.segmentation_panel import rows_of_window
from moco.config.segment import SegmentConfig
from moco.data.loading.every_image import image_set
from moco.data.sources.source import ArrayImages
from moco.models.backbones import build_backbone
from moco.segmentation.pixel_classifier import Inference


def swin(window_size):
    """A Swin V2 whose maps have 1/2, 1/4, 1/8 and 1/16 of the side of an image."""
    with torch.device("meta"):
        return build_backbone("swin_v2_tiny_patch2", window_size=window_size)


def window_row(crop, held_out, window_size=8, **settings):
    """The panel's row for square crops and a held-out image (height, width)."""
    segmenter = SimpleNamespace(model=SimpleNamespace(backbone=swin(window_size)))
    data = SimpleNamespace(
        view=SimpleNamespace(image_size=crop),
        source=SimpleNamespace(validation=SimpleNamespace(sizes=np.array([held_out]))),
    )
    rows = rows_of_window(SegmentConfig(checkpoint=None, **settings), segmenter, data)
    return [f"{name}: {text}" for name, text in rows]


def test_the_panel_names_the_stages_whose_map_is_smaller_than_a_window():
    assert window_row(32, (100, 100)) == [
        "window: larger than the maps of stages 3 and 4 (4 and 2 cells wide) for crops of 32 px: "
        "each is one window"
    ]
    assert window_row(128, (128, 128)) == []
    # A shorter side of a held-out image counts, unless windows of the crops' size are predicted.
    assert window_row(128, (200, 100)) == [
        "window: larger than the map of stage 4 (7 cells wide) for held-out images of 100 px: "
        "it is one window"
    ]
    assert window_row(128, (200, 100), inference="slide") == []
    only_first = window_row(32, (32, 32), window_size=[32, 8, 4, 2])
    assert "the map of stage 1 (16 cells wide) for" in only_first[0]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (Inference("whole", 128), ["images of 40 px"]),
        (Inference("slide", 128), ["images of 40 px"]),
        (Inference("slide", 24), ["windows of 24 px"]),
    ],
)
def test_a_prediction_names_them_for_its_windows_or_its_smallest_images(how, expected, caplog):
    images = ArrayImages(np.zeros((3, 50, 40, 3), np.uint8), "three")
    found = SimpleNamespace(images=image_set(images))
    caplog.set_level("INFO")
    say_clipped_windows(swin(8), how, found)
    say_clipped_windows(build_backbone("resnet_tiny"), how, found)
    said = [record.getMessage() for record in caplog.records]
    assert [line.partition(" for ")[2].partition(":")[0] for line in said] == expected
    assert said[0].startswith("attention window: larger than the maps of stages ")
