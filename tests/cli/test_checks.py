"""What a run is held to before its first step."""

import re
from types import SimpleNamespace

import pytest
import torch

from moco.cli.checks import (
    advise_window,
    check_deterministic,
    check_deterministic_segmentation,
    check_same_images,
)
from moco.config.train import TrainerConfig
from moco.data.sources.shards import ShardedImages
from moco.errors import InputError
from moco.models.backbones import build_backbone
from tests.conftest import thinned


def identity_of(images, monkeypatch):
    """What a process tells the others about its images."""
    told = []
    monkeypatch.setattr("moco.training.distributed.collectives.world_size", lambda: 2)
    monkeypatch.setattr(
        "moco.training.distributed.collectives.gather_objects",
        lambda value: told.append(value) or [value] * 2,
    )
    check_same_images(SimpleNamespace(source=SimpleNamespace(train=images)))
    return told[0]


def sharded(shards, num_images):
    return ShardedImages(shards, num_images, num_streams=1, shuffle_buffer=1, max_image_pixels=1)


@pytest.mark.parametrize(
    ("name", "image_size", "said"),
    [
        ("swin_v2_t", 256, "backbone.window_size=8"),  # its window is 7
        ("swin_v2_t", 224, None),
        ("swin_t", 64, "backbone.window_size=8"),
        ("resnet18", 224, None),
    ],
)
def test_a_window_that_fits_the_images_is_advised(name, image_size, said, caplog):
    caplog.set_level("INFO")
    with torch.device("meta"):
        backbone = build_backbone(name)
    advise_window(backbone, image_size)
    if said is None:
        assert not caplog.messages
    else:
        (message,) = caplog.messages
        assert f": {said} computes" in message


def test_processes_with_other_shards_or_another_number_do_not_see_the_same(monkeypatch):
    identities = [
        identity_of(sharded(*of), monkeypatch)
        for of in (
            (["a.tar", "b.tar"], 8),
            (["a.tar", "c.tar"], 8),
            (["b.tar", "a.tar"], 8),
            (["a.tar", "b.tar"], 9),
        )
    ]
    assert len(set(identities)) == 4
    assert identity_of(sharded(["a.tar", "b.tar"], 8), monkeypatch) == identities[0]
    monkeypatch.setattr(
        "moco.training.distributed.collectives.gather_objects", lambda value: identities[:2]
    )
    with pytest.raises(InputError, match="do not see the same images"):
        check_same_images(SimpleNamespace(source=SimpleNamespace(train=sharded(["a.tar"], 8))))


def test_a_billion_images_in_shards_are_not_gone_through_one_by_one(monkeypatch):
    identity_of(sharded(["a.tar"], 10**9), monkeypatch)


DENSE = ["method.dense_weight=0.5", "method.projector.num_layers=2"]
LEARNED = ["backbone=vit_tiny_patch4", "backbone.learned_positions=4"]


@pytest.mark.parametrize(
    ("settings", "sizes", "said"),
    thinned(
        [
            (
                ["backbone=resnet_tiny", *DENSE],
                [64],
                "pooling of a map of 8 x 8 cells to method.dense_grid=7 (a grid of 8",
            ),
            (["backbone=resnet_tiny", *DENSE], [56], None),  # 7 x 7 cells fit the grid
            (["backbone=resnet_tiny", *DENSE], [64, 56], "a map of 8 x 8 cells"),
            (["backbone=resnet_tiny", *DENSE, "method.dense_grid=1"], [64], None),  # a plain mean
            (["backbone=resnet_tiny"], [64], None),
            (
                ["backbone=resnet_tiny", *DENSE, "method.decoder=fpn"],
                [56],
                "pooling of a map of 56 x 56 cells to method.dense_grid=7 (a grid of 56",
            ),
            (LEARNED, [16], None),
            (LEARNED, [24], "backbone.learned_positions=4 to the 6 x 6 patches of images of 24 px"),
            (["backbone=vit_tiny_patch4"], [24], None),  # fixed positions are computed, not resized
            (["backbone=swin_v2_tiny_patch2"], [24], None),
        ],
        every=3,
    ),
)
@pytest.mark.parametrize("device", ["cuda", pytest.param("cpu", marks=pytest.mark.slow)])
def test_what_has_no_deterministic_form_on_a_gpu_is_said_before_the_run(
    device, settings, sizes, said, runner, monkeypatch
):
    monkeypatch.setattr(
        "moco.training.hardware.choose_device", lambda accelerator: torch.device(device)
    )
    config = runner.config(*settings, "trainer.deterministic=true")
    method = runner.method(config)
    if said is None or device == "cpu":
        check_deterministic(method, config, sizes)
        return
    with pytest.raises(InputError, match=re.escape(said)) as error:
        check_deterministic(method, config, sizes)
    assert str(error.value).startswith("trainer.deterministic=true: ")
    assert "\n" not in str(error.value)
    config.trainer.deterministic = False
    check_deterministic(method, config, sizes)


def test_segmentation_says_it_as_well(monkeypatch):
    monkeypatch.setattr(
        "moco.training.hardware.choose_device", lambda accelerator: torch.device("cuda")
    )
    trainer = TrainerConfig(deterministic=True)
    vit = build_backbone("vit_tiny_patch4", learned_positions=4)
    check_deterministic_segmentation(trainer, vit, "fpn", 16, False)
    check_deterministic_segmentation(trainer, vit, "fpn", 24, True)
    for decoder, said in (
        ("fpn", "learned_positions=4 to the 6 x 6"),
        ("upernet", "decoder=upernet"),
    ):
        with pytest.raises(InputError, match=said):
            check_deterministic_segmentation(trainer, vit, decoder, 24, False)


def test_pytorch_itself_names_the_operations_without_a_deterministic_form():
    refused = torch.use_deterministic_algorithms.__doc__.split(
        ":class:`RuntimeError` when ``mode=True``"
    )[1]
    assert ":class:`torch.nn.AdaptiveAvgPool2d`" in refused
    assert "- ``bicubic``" in refused
