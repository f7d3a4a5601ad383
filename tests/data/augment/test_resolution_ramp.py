"""Views that grow during the run: sizes, both engines, resuming, and mistakes in one line."""

import numpy as np
import pytest
import torch
from pytorch_lightning import Callback
from torch.nn.functional import interpolate

from moco.cli.build_pretraining import build_data
from moco.cli.checks import check_resolution_ramp
from moco.data.augment.resolution_ramp import ResolutionRamp
from moco.data.augment.views import ViewPair
from moco.errors import InputError, Interrupted
from moco.models.backbones import build_backbone
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
    ramp = ResolutionRamp(*numbers)
    assert [ramp.size_at(epoch) for epoch in range(len(sizes))] == sizes


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((32, None, 8, None), "image_size_step=8: it has no effect without .*start_image_size"),
        ((32, None, None, 5), "ramp_epochs=5: it has no effect without .*start_image_size"),
        ((32, 32, 8, 5), "start_image_size=32: expected less than data.image_size, 32, or null"),
        ((32, 16, 8, None), "ramp_epochs: missing; .*start_image_size needs the number"),
        ((32, 16, 4, 3), r"ramp_epochs=3: expected at least one .* \(16, 20, 24, 28, 32 px\)"),
    ],
)
def test_numbers_that_contradict_each_other_are_named(numbers, message):
    with pytest.raises(InputError, match=f"^augmentation.{message}"):
        ResolutionRamp(*numbers)


@pytest.mark.parametrize("engine", ["worker", "batch"])
def test_small_views_are_the_whole_images_shrunk(engine, generator):
    coarse = torch.from_numpy(generator.random((6, 3, 8, 8), dtype=np.float32))
    smooth = interpolate(coarse, size=32, mode="bicubic").clamp(0, 1)
    images = (smooth * 255).round().to(torch.uint8)
    pair = ViewPair(PLAIN, PLAIN, [0.0] * 3, [1.0] * 3, 32, 0, engine, ResolutionRamp(32, 8, 8, 3))
    for epoch, size in ((0, 8), (1, 16), (2, 24), (3, 32)):
        expected = interpolate(images / 255, size=size, mode="bilinear", antialias=True)
        for view in views_by(engine, pair, images, epoch):
            torch.testing.assert_close(view, expected, atol=1.5 / 255, rtol=0)


def views_by(engine, pair, images, epoch):
    """Return both views of images (batch, 3, height, width), as the engine makes them."""
    indices = torch.arange(len(images))
    if engine == "batch":
        return pair.on_batch(images, epoch, indices)
    arrays = list(images.permute(0, 2, 3, 1).contiguous().numpy())
    views = pair.empty_views(len(images), epoch)
    pair.on_images(arrays, epoch, indices, views)
    return pair.finished(views, epoch, indices)


def views_of_epochs(config, epochs, state=None):
    """Yield the finished views of all batches of some epochs."""
    data = build_data(config)
    loader = data.train_dataloader()
    if state:
        loader.load_state_dict(state)
    for epoch in epochs:
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            yield torch.stack(data.on_after_batch_transfer(batch, 0).views)


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "num_workers"), [("batch", 0), ("worker", 0), ("worker", 2)])
def test_loaders_and_their_processes_follow_the_epoch_also_after_a_resume(
    runner, engine, num_workers
):
    # An epoch of two batches.
    options = ["data.batch_size=512", f"data.engine={engine}", f"data.num_workers={num_workers}"]
    config = runner.config(*RAMP, *options)
    whole = list(views_of_epochs(config, (1, 2)))
    assert [views.shape[-1] for views in whole] == [12] * 2 + [16] * 2
    resumed = list(views_of_epochs(config, (1, 2), {"epoch": 1, "images": 512}))
    for ours, theirs in zip(resumed, whole[1:], strict=True):
        assert torch.equal(ours, theirs)


def test_the_preview_and_the_first_plot_of_a_run_show_the_first_epoch(runner):
    data = build_data(runner.config(*RAMP))
    query, key = data.pairs(data.first_images(3))
    assert query.shape == key.shape == (3, 3, 8, 8)


class Sizes(Callback):
    """Notes the side of the views in each epoch."""

    def __init__(self):
        self.seen = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen[trainer.current_epoch] = batch.views[0].shape[-1]


@pytest.mark.slow
def test_training_goes_through_all_sizes(runner):
    sizes = Sizes()
    epochs = ["trainer.max_steps=-1", "trainer.max_epochs=3", "data.batch_size=512"]
    runner.fit(runner.config(*RAMP, *epochs), [sizes])
    assert sizes.seen == {0: 8, 1: 12, 2: 16}


def test_views_have_to_be_whole_patches_of_the_backbone(caplog):
    caplog.set_level("INFO")
    swin = build_backbone("swin_v2_tiny_patch2")
    message = "views of 19 px are no multiple of the backbone's patches of 2 px"
    with pytest.raises(InputError, match=message):
        check_resolution_ramp(ResolutionRamp(32, 16, 3, 9), swin, 20)
    check_resolution_ramp(ResolutionRamp(32, 16, 8, 9), swin, 20)
    check_resolution_ramp(ResolutionRamp(32, 15, 8, 9), build_backbone("resnet_tiny"), 20)
    assert caplog.messages == [
        "views grow over 9 epochs: 16, 24, 32 px",
        "views grow over 9 epochs: 15, 23, 31, 32 px",
    ]
    assert swin(torch.zeros(2, 3, 24, 24)).shape == (2, swin.feature_dim)


def test_a_run_that_ends_before_its_views_are_full_says_so(caplog):
    caplog.set_level("INFO")
    check_resolution_ramp(ResolutionRamp(32, 16, 8, 9), build_backbone("resnet_tiny"), 9)
    assert caplog.messages == [
        "views grow over 9 epochs: 16, 24, 32 px",
        "augmentation.ramp_epochs=9: the run has only 9 epochs, so no view ever has 32 px, "
        "the size at which the run is evaluated",
    ]


@pytest.mark.slow
def test_a_run_that_is_stopped_between_two_sizes_ends_in_the_same_bits(
    runner, tmp_path, monkeypatch
):
    config = runner.config(
        *RAMP,
        "augmentation.ramp_epochs=3",
        "trainer.max_epochs=4",
        "trainer.max_steps=-1",
        "data.batch_size=704",
        "method.queue_size=500",
        "evaluation.every_n_epochs=100",
        "checkpoint.every_n_epochs=100",
    )
    run(config, tmp_path / "whole")
    # Two steps an epoch, of 8, 8, 12 and 16 px.
    for step in (1, 3, 6):
        with monkeypatch.context() as context:
            interrupt_at(step, context)
            with pytest.raises(Interrupted):
                run(config, tmp_path / "parts")
    run(config, tmp_path / "parts")
    assert_same_end(last(tmp_path / "whole"), last(tmp_path / "parts"))


def test_a_mistake_is_told_before_anything_is_trained(runner):
    message = "augmentation.start_image_size=16: expected less than data.image_size, 16"
    config = runner.config("augmentation.start_image_size=16", "augmentation.ramp_epochs=3")
    with pytest.raises(InputError, match=message):
        build_data(config)
