"""Views that grow during the run: their sizes, both engines, resuming, and mistakes in one line."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from moco.cli.build_pretraining import build_data
from moco.cli.checks import check_resolution_ramp
from moco.data.augment.resolution_ramp import ResolutionRamp
from moco.data.augment.views import ViewPair
from moco.errors import InputError, Interrupted
from moco.train import run
from tests.runs.test_resume import assert_same_end, interrupt_at, last

RAMP = [
    "augmentation.start_image_size=8",
    "augmentation.image_size_step=4",
    "augmentation.ramp_epochs=2",
]
PLAIN = {"random_resized_crop": {"scale": [1.0, 1.0], "ratio": [1.0, 1.0]}}


@pytest.mark.parametrize(
    ("numbers", "sizes"),
    [
        ((32, 16, 8, 4), [16, 16, 24, 24, 32, 32]),
        ((32, 16, 8, 5), [16, 16, 16, 24, 24, 32]),  # as even as whole epochs allow
        ((224, 160, 32, 2), [160, 192, 224, 224]),
        ((30, 16, 8, 4), [16, 16, 24, 24, 30]),  # the last step is smaller
        ((32, 31, 8, 1), [31, 32, 32]),
        ((224, 160, None, 2), [160, 192, 224, 224]),
        ((32, None, None, None), [32, 32]),
    ],
)
def test_the_size_of_every_epoch(numbers, sizes):
    assert [ResolutionRamp(*numbers).size_at(epoch) for epoch in range(len(sizes))] == sizes


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (
            (32, None, 8, None),
            "augmentation.image_size_step=8: it has no effect without augmentation.start_image_size",
        ),
        (
            (32, None, None, 5),
            "augmentation.ramp_epochs=5: it has no effect without augmentation.start_image_size",
        ),
        (
            (32, 32, 8, 5),
            "augmentation.start_image_size=32: expected less than data.image_size, 32, or null",
        ),
        (
            (32, 16, 8, None),
            "augmentation.ramp_epochs: missing; augmentation.start_image_size needs the number",
        ),
        ((32, 16, 4, 3), r"ramp_epochs=3: expected at least one .* \(16, 20, 24, 28, 32 px\)"),
    ],
)
def test_numbers_that_contradict_each_other_are_named(numbers, message):
    with pytest.raises(InputError, match=message):
        ResolutionRamp(*numbers)


@pytest.mark.parametrize("engine", ["worker", "batch"])
def test_small_views_are_the_whole_images_shrunk(engine, generator):
    coarse = torch.from_numpy(generator.random((6, 3, 8, 8), dtype=np.float32))
    images = (
        (interpolate(coarse, size=32, mode="bicubic").clamp(0, 1) * 255).round().to(torch.uint8)
    )
    pair = ViewPair(PLAIN, PLAIN, [0.0] * 3, [1.0] * 3, 32, 0, engine, ResolutionRamp(32, 8, 8, 3))
    for epoch, size in ((0, 8), (1, 16), (2, 24), (3, 32)):
        views = views_by(engine, pair, images, epoch)
        expected = interpolate(images / 255, size=size, mode="bilinear", antialias=True)
        for view in views:
            torch.testing.assert_close(view, expected, atol=1.5 / 255, rtol=0)


def views_by(engine, pair, images, epoch):
    """Both views of images in memory, (N, 3, S, S), as the engine makes them."""
    indices = torch.arange(len(images))
    if engine == "batch":
        return pair.on_batch(images, epoch, indices)
    arrays = images.permute(0, 2, 3, 1).contiguous().numpy()
    encoded = [
        SimpleNamespace(size=array.shape[:2], pixels=lambda _, array=array: array)
        for array in arrays
    ]
    views = pair.empty_views(len(images), epoch)
    assert pair.on_images(encoded, epoch, indices, views) == []
    return pair.finished(views, epoch, indices)


def test_an_image_is_decoded_no_smaller_than_the_views_of_its_epoch_need():
    pair = ViewPair(PLAIN, PLAIN, [0.0] * 3, [1.0] * 3, 64, 0, ramp=ResolutionRamp(64, 16, 48, 1))
    asked = []
    image = SimpleNamespace(
        size=(128, 128),
        pixels=lambda by: asked.append(by) or np.zeros((128 // by,) * 2 + (3,), "u1"),
    )
    for epoch in (0, 1):
        pair.on_images([image], epoch, torch.tensor([0]), pair.empty_views(1, epoch))
    assert asked == [8, 2]


@pytest.mark.parametrize(("engine", "num_workers"), [("batch", 0), ("worker", 0), ("worker", 2)])
def test_loaders_and_their_processes_follow_the_epoch_also_after_a_resume(
    runner, engine, num_workers
):
    config = runner.config(*RAMP, f"data.engine={engine}", f"data.num_workers={num_workers}")

    def batches(epochs, state=None):
        data = build_data(config)
        loader = data.train_dataloader()
        if state:
            loader.load_state_dict(state)
        for epoch in epochs:
            loader.sampler.set_epoch(epoch)
            yield from (data.on_after_batch_transfer(batch, 0).views for batch in loader)

    whole = list(batches((1, 2)))
    half = len(whole) // 2
    assert [query.shape[-1] for query, _ in whole] == [12] * half + [16] * half
    resumed = list(batches((1, 2), {"epoch": 1, "images": 32 * (half - 1)}))
    assert len(resumed) == half + 1
    for ours, theirs in zip(resumed, whole[half - 1 :], strict=True):
        torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), atol=0, rtol=0)


def test_the_preview_and_the_first_image_of_a_run_show_the_first_epoch(runner):
    data = build_data(runner.config(*RAMP))
    assert [view.shape for view in data.pairs(data.first_images(3))] == [(3, 3, 8, 8)] * 2


def test_training_goes_through_all_sizes_and_is_evaluated_at_the_full_one(runner):
    from pytorch_lightning import Callback

    class Sizes(Callback):
        def __init__(self):
            self.seen = []

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.seen.append((trainer.current_epoch, batch.views[0].shape[-1]))

    sizes = Sizes()
    runner.fit(
        runner.config(*RAMP, "trainer.max_steps=-1", "trainer.max_epochs=3", "data.batch_size=512"),
        [sizes],
    )
    assert dict(sizes.seen) == {0: 8, 1: 12, 2: 16}


def test_views_have_to_be_whole_patches_of_the_backbone(caplog):
    from moco.models.backbones import build_backbone

    caplog.set_level("INFO")
    swin = build_backbone("swin_v2_tiny_patch2")
    with pytest.raises(
        InputError, match=r"views of 19 px are no multiple of the backbone's patches of 2 px"
    ):
        check_resolution_ramp(ResolutionRamp(32, 16, 3, 9), swin, 20)
    check_resolution_ramp(ResolutionRamp(32, 16, 8, 9), swin, 20)
    check_resolution_ramp(ResolutionRamp(32, 15, 8, 9), build_backbone("resnet_tiny"), 20)
    assert caplog.messages == [
        "views grow over 9 epochs: 16, 24, 32 px",
        "views grow over 9 epochs: 15, 23, 31, 32 px",
    ]
    assert swin(torch.zeros(2, 3, 24, 24)).shape == (2, swin.feature_dim)


def test_a_run_that_ends_before_its_views_are_full_says_so(caplog):
    from moco.models.backbones import build_backbone

    caplog.set_level("INFO")
    check_resolution_ramp(ResolutionRamp(32, 16, 8, 9), build_backbone("resnet_tiny"), 9)
    assert caplog.messages == [
        "views grow over 9 epochs: 16, 24, 32 px",
        "augmentation.ramp_epochs=9: the run has 9 epochs and no view of 32 px, at which it is evaluated",
    ]


def test_a_run_that_is_stopped_between_two_sizes_ends_in_the_same_bits(
    runner, tmp_path, monkeypatch
):
    config = runner.config(
        *RAMP, "augmentation.ramp_epochs=3", "trainer.max_epochs=4", "trainer.max_steps=-1", "data.batch_size=704",
        "method.queue_size=500", "evaluation.every_n_epochs=100", "checkpoint.every_n_epochs=100",
    )  # fmt: skip
    run(config, tmp_path / "whole")
    for step in (1, 3, 6):  # two steps an epoch; 8, 8, 12 and 16 px
        with monkeypatch.context() as context:
            interrupt_at(step, context)
            with pytest.raises(Interrupted):
                run(config, tmp_path / "parts")
    run(config, tmp_path / "parts")
    assert_same_end(last(tmp_path / "whole"), last(tmp_path / "parts"))


def test_a_mistake_is_told_before_anything_is_trained(runner):
    with pytest.raises(
        InputError,
        match=r"augmentation.start_image_size=16: expected less than data.image_size, 16",
    ):
        build_data(runner.config("augmentation.start_image_size=16", "augmentation.ramp_epochs=3"))
