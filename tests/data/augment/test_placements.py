"""Where views are in their images, against images whose pixels say where they are."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

import moco
from moco.data.augment.local_crops import LocalCrops
from moco.data.augment.views import ViewPair
from moco.data.loading.datamodule import check_one_image
from moco.errors import InputError

# Every operation that moves pixels, before and after the crop.
MOVING = {
    "vertical_flip": {"probability": 0.5},
    "random_resized_crop": {"scale": [0.3, 1.0]},
    "horizontal_flip": {"probability": 0.5},
    "random_affine": {"degrees": 30, "translate": 0.1, "shear": 10, "probability": 0.5},
    "quarter_turns": {},
}
SIDE = 32


def atlas(height, width):
    """An image whose bands are x and y of each pixel, as fractions, and 1."""
    x = (np.arange(width, dtype=np.float32) + 0.5) / width
    y = (np.arange(height, dtype=np.float32) + 0.5) / height
    xs, ys = np.meshgrid(x, y)
    return np.stack([xs, ys, np.ones_like(xs)], axis=2)


@pytest.mark.parametrize("engine", ["worker", "batch"])
def test_the_pixels_of_a_view_are_from_where_its_placement_says(engine):
    image = atlas(48, 70)
    pair = ViewPair(
        MOVING, MOVING, [0.0], [1.0], SIDE, bands=3, is_float=True, with_placements=True
    )
    indices = torch.arange(40)
    if engine == "batch":
        pixels = torch.from_numpy(image).permute(2, 0, 1).expand(40, -1, -1, -1).contiguous()
        views = torch.stack(pair.on_batch(pixels, 1, indices))
    else:
        views = pair.empty_views(40)
        pair.on_images([image] * 40, 1, indices, views)
    sizes = torch.tensor([image.shape[:2]]).expand(40, -1)
    placements = pair.placements(1, indices, sizes)
    assert placements.shape == (2, 40, 2, 3)

    middles = (torch.arange(SIDE) + 0.5) / SIDE
    y, x = torch.meshgrid(middles, middles, indexing="ij")
    places = torch.stack([x, y, torch.ones_like(x)])  # (3, side, side)
    expected = torch.einsum("vnij,jyx->vniyx", placements, places)
    error = (views[:, :, :2] - expected).abs().amax(2)
    # Resizing repeats the pixels at the edges of a crop, and turning leaves black corners.
    is_known = torch.zeros_like(error, dtype=torch.bool)
    is_known[..., 5:-5, 5:-5] = views[:, :, 2, 5:-5, 5:-5] > 0.999
    is_near = (expected > 0.03).all(2) & (expected < 0.97).all(2)
    is_known &= is_near
    assert is_known.float().mean() > 0.3
    close = error[is_known] < 0.012  # half a pixel of the image
    assert close.float().mean() > 0.99


@dataclass
class Silent(moco.Operation):
    def on_image(self, image, drawn):
        return image


@dataclass
class Unmoved(Silent):
    def source_map(self, drawn, sizes):
        return None


@dataclass
class Wrong(Silent):
    def source_map(self, drawn, sizes):
        return torch.eye(3)


CROP = {"random_resized_crop": {"scale": [0.2, 1.0]}}


@pytest.mark.parametrize(
    ("operations", "message"),
    [
        (
            CROP | {"own": {"target": f"{__name__}:Silent"}},
            r"augmentation\.query\.own does not say whether it moves pixels; define source_map",
        ),
        (
            CROP | {"own": {"target": f"{__name__}:Wrong"}},
            r"augmentation\.query\.own: source_map returned Tensor of .* expected None, or",
        ),
        (lambda image: image, "does not say which part of the image a view shows"),
    ],
)
def test_what_cannot_be_tracked_is_refused(operations, message):
    ViewPair(operations, image_size=16)
    with pytest.raises(InputError, match=message):
        ViewPair(operations, image_size=16, with_placements=True)


def test_an_operation_that_says_that_it_moves_nothing_is_taken():
    own = CROP | {"own": {"target": f"{__name__}:Unmoved"}}
    sizes = torch.tensor([[20, 30]])
    ours = ViewPair(own, image_size=16, with_placements=True).placements(0, torch.arange(1), sizes)
    plain = ViewPair(CROP, image_size=16).placements(0, torch.arange(1), sizes)
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("engine", ["batch", pytest.param("worker", marks=pytest.mark.slow)])
def test_batches_say_where_their_views_are_in_every_engine(engine, runner):
    from moco.cli.build_pretraining import build_data

    switches = ["method.dense_weight=0.5", "method.dense_match=location"]
    data = build_data(runner.config(*switches, f"data.engine={engine}"))
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    sizes = torch.tensor([data.source.train.tensor.shape[1:3]]).expand(len(batch.indices), -1)
    assert torch.equal(batch.placements, data.augment.placements(0, batch.indices, sizes))
    plain = next(iter(build_data(runner.config(f"data.engine={engine}")).train_dataloader()))
    assert plain.placements is None


@pytest.mark.parametrize(
    ("switch", "message"),
    [
        ({"with_placements": True}, r"dense_match=location: with data\.pair=group the two views"),
        ({"local": LocalCrops(2)}, r"local_crops=2: with .* expected data\.pair=same"),
    ],
)
def test_views_of_two_images_have_no_common_place(switch, message):
    check_one_image(ViewPair(CROP, image_size=16), "group")
    with pytest.raises(InputError, match=message):
        check_one_image(ViewPair(CROP, image_size=16, **switch), "group")
