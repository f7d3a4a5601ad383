"""Local crops against a loop that is written from the rule, and in both engines."""

import numpy as np
import pytest
import torch
from PIL import Image

from moco.cli.build_pretraining import build_data, local_crops_of
from moco.config.train import TrainConfig
from moco.data.augment.draws import uniforms
from moco.data.augment.local_crops import FIRST_LOCAL_VIEW, NUM_TRIES, LocalCrops
from moco.data.augment.resolution_ramp import ResolutionRamp
from moco.data.augment.views import ViewPair
from moco.errors import InputError
from tests.data.augment.test_views import assert_equal_within_rounding, settings, smooth

CROP_ALONE = {"random_resized_crop": {"scale": [0.08, 0.6]}}


def shared_area(box, other):
    """Pixels that two boxes share, one by one."""
    rows = set(range(box[0], box[0] + box[2])) & set(range(other[0], other[0] + other[2]))
    columns = set(range(box[1], box[1] + box[3])) & set(range(other[1], other[1] + other[3]))
    return len(rows) * len(columns)


def nearest(value, ends):
    return min(max(value, min(ends)), max(ends))


def expected_box(drawn, box, anchors, size, overlap):
    """The rule in words of Python: the first of ten corners, else the first one moved inside."""
    height, width = box[2:]
    corners = []
    for down, right in drawn:
        top = int(np.floor(down * (size[0] - height + 1)))
        left = int(np.floor(right * (size[1] - width + 1)))
        corners.append((top, left))
    for corner in corners:
        here = (*corner, height, width)
        if all(shared_area(here, other) >= overlap * height * width for other in anchors):
            return here
    key = anchors[-1]
    top = nearest(corners[0][0], (key[0], key[0] + key[2] - height))
    left = nearest(corners[0][1], (key[1], key[1] + key[3] - width))
    return (nearest(top, (0, size[0] - height)), nearest(left, (0, size[1] - width)), height, width)


@pytest.mark.parametrize("in_both", [False, True])
@pytest.mark.parametrize("overlap", [0.2, 1.0])
def test_every_local_crop_is_where_the_rule_puts_it(in_both, overlap):
    local = LocalCrops(2, scale=(0.05, 0.3), overlap=overlap, in_both=in_both)
    pair = ViewPair(CROP_ALONE, image_size=32, local=local)
    indices = torch.arange(60)
    sizes = torch.tensor([[40, 60], [33, 20], [50, 50]]).repeat(20, 1)
    boxes = [numbers[0]["box"] for numbers in pair.draw(3, indices, sizes)]
    num_moved = 0
    for number, numbers in enumerate(pair.draw_local_crops(3, indices, sizes)):
        draws = uniforms(0, 3, indices, FIRST_LOCAL_VIEW + number, 1 + 20 + 2 * NUM_TRIES)
        for row in range(len(indices)):
            anchors = [tuple(box[row].tolist()) for box in boxes]
            anchors = anchors if in_both else anchors[1:]
            size = tuple(sizes[row].tolist())
            drawn = draws[row, 21:].view(-1, 2).tolist()
            box = tuple(numbers[0]["box"][row].tolist())
            assert box == expected_box(drawn, box, anchors, size, overlap)
            area = box[2] * box[3]
            assert 0 <= box[0] <= size[0] - box[2]
            assert 0 <= box[1] <= size[1] - box[3]
            assert 0.04 < area / (size[0] * size[1]) < 0.33
            first = int(np.floor(drawn[0][0] * (size[0] - box[2] + 1)))
            num_moved += first != box[0]
    assert num_moved > 10  # the constraint did something


def test_local_crops_are_the_same_in_both_engines_and_for_one_image(generator):
    arrays = [smooth(generator, 60, 60) for _ in range(40)]
    local = LocalCrops(3, scale=(0.2, 0.4))
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    indices = torch.arange(40)
    made = {}
    for engine in ("worker", "batch"):
        pair = ViewPair(**settings(), image_size=64, engine=engine, local=local)
        crops = pair.empty_local_crops(40)
        pair.local_crops_on_images(arrays, 2, indices, crops)
        made[engine] = torch.stack(pair.finished_local_crops(tuple(crops), 2, indices))
        assert made[engine].shape == (3, 40, 3, 24, 24)
    whole = torch.stack(pair.local_crops_on_batch(pixels, 2, indices))
    assert_equal_within_rounding(made["worker"], made["batch"], pair.std)
    assert_equal_within_rounding(made["worker"], whole, pair.std)
    pair = ViewPair(**settings(), image_size=64, local=local)
    alone = pair(Image.fromarray(arrays[7]), 2, 7)
    assert len(alone) == 5
    assert alone[1].shape == (3, 64, 64)
    for number in range(3):
        assert torch.equal(alone[2 + number], made["worker"][number, 7])
    without = ViewPair(**settings(), image_size=64)(Image.fromarray(arrays[7]), 2, 7)
    assert torch.equal(alone[0], without[0])
    assert torch.equal(alone[1], without[1])


def test_local_crops_grow_with_the_views():
    ramp = ResolutionRamp(64, 32, 32, 1)
    pair = ViewPair(CROP_ALONE, image_size=64, ramp=ramp, local=LocalCrops(1))
    assert pair.empty_local_crops(2, epoch=0).shape == (1, 2, 3, 16, 16)
    assert pair.empty_local_crops(2, epoch=1).shape == (1, 2, 3, 24, 24)
    assert LocalCrops(1).side(224) == 96
    assert LocalCrops(1).side(8) == 8


@pytest.mark.parametrize(
    ("operations", "local", "message"),
    [
        (
            {"horizontal_flip": {}, **CROP_ALONE},
            LocalCrops(1),
            r"augmentation\.query\.horizontal_flip may move pixels before the crop",
        ),
        (lambda image: image, LocalCrops(1), "makes one view of one size; expected operations"),
        (CROP_ALONE, LocalCrops(1, scale=[0.3]), r"augmentation\.local\.scale=\[0\.3\]: expected"),
    ],
)
def test_views_without_local_crops_are_refused(operations, local, message):
    with pytest.raises(InputError, match=message):
        ViewPair(operations, image_size=16, local=local)


def test_settings_of_local_crops_without_any_are_warned_of(caplog):
    config = TrainConfig()
    assert local_crops_of(config) is None
    assert caplog.messages == []
    config.augmentation.local.size = 0.3
    assert local_crops_of(config) is None
    assert caplog.messages == ["augmentation.local has no effect: method.local_crops=0"]


@pytest.mark.parametrize("engine", ["batch", pytest.param("worker", marks=pytest.mark.slow)])
def test_a_run_gets_the_local_crops_of_its_pair(engine, runner):
    config = runner.config("method.local_crops=2", f"data.engine={engine}")
    data = build_data(config)
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    side = data.augment.local.side(data.image_size)
    assert [crops.shape for crops in batch.local_crops] == [(32, 3, side, side)] * 2
    row = 3
    image = data.source.train.prepared(int(batch.indices[row])).pixels()
    by_hand = data.augment(image, 0, int(batch.indices[row]))
    assert_equal_within_rounding(
        torch.stack([crops[row] for crops in batch.local_crops]),
        torch.stack(by_hand[2:]),
        data.augment.std,
    )
