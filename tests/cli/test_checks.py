"""What a run is held to before its first step."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import moco.evaluate
import moco.predict
import moco.segment
from moco.cli.checks import (
    advise_window,
    check_class_weights,
    check_deterministic,
    check_deterministic_segmentation,
    check_same_images,
)
from moco.config.predict import PredictConfig
from moco.config.pretrained import EvaluateConfig
from moco.config.segment import METRICS, METRICS_OF_A_CLASS, SegmentConfig, SegmentEvaluationConfig
from moco.config.train import TrainerConfig
from moco.data.sources.shards import ShardedImages
from moco.errors import InputError
from moco.models.backbones import build_backbone
from moco.segmentation.metrics import SCORES, SCORES_OF_A_CLASS
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


@pytest.fixture
def no_heavy_imports(monkeypatch):
    """What the programs import after their first checks cannot be imported."""
    for name in ("build_segmentation", "predicted_images", "measured_segmenter"):
        monkeypatch.setitem(sys.modules, f"moco.cli.{name}", None)


def wrong_segmentation(root, **settings):
    """A config of moco.segment with random weights."""
    config = SegmentConfig(checkpoint=None)
    config.data.name, config.data.root = "segmentation_folder", str(root)
    for key, value in settings.items():
        setattr(config, key, value)
    return config


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"label_fraction": 0.1, "num_images": 3}, "label_fraction=0.1 and num_images=3"),
        ({"label_seed": 1}, "label_seed=1: without label_fraction or num_images"),
        (
            {"class_weights": "balanced"},
            "class_weights=balanced: expected auto, null or a list of numbers above 0, one for",
        ),
        ({"class_weights": [1, "a"]}, "class_weights=[1, 'a']: expected auto, null or a list"),
        ({"loss": "lovasz", "class_weights": "auto"}, "class_weights=auto: loss=lovasz has none"),
        ({"checkpoint": "nowhere.ckpt"}, "checkpoint=nowhere.ckpt: no such file"),
        ({"evaluation": SegmentEvaluationConfig(metric="miuo")}, "evaluation.metric: unknown"),
        ({"evaluation": SegmentEvaluationConfig(metric="iou/")}, "evaluation.metric: unknown"),
    ],
)
def test_a_wrong_segmentation_is_refused_before_the_libraries_are_loaded(
    settings, said, tmp_path, no_heavy_imports
):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    with pytest.raises(InputError, match=f"^{re.escape(said)}"):
        moco.segment.run(wrong_segmentation(tmp_path, **settings), tmp_path / "run")


def test_a_wrong_layout_is_refused_before_the_libraries_are_loaded(tmp_path, no_heavy_imports):
    root = tmp_path / "roads"
    config = wrong_segmentation(tmp_path / "rods")
    root.mkdir()
    with pytest.raises(InputError, match=f"rods: no such folder; did you mean '{root}'"):
        moco.segment.run(config, tmp_path / "run")
    (root / "images" / "val").mkdir(parents=True)
    for program, other in (
        (moco.segment, config),
        (moco.predict, PredictConfig(checkpoint=str(root))),
        (moco.evaluate, EvaluateConfig(checkpoint=str(root))),
    ):
        other.data.name, other.data.root = "segmentation_folder", str(root)
        with pytest.raises(InputError, match="there is no folder masks in it"):
            program.run(other, tmp_path / "run")
    (root / "masks").mkdir()
    with pytest.raises(InputError, match=r"images/val, but none to train on; expected images/tr"):
        moco.segment.run(config, tmp_path / "run")


def test_the_checks_of_a_segmentation_import_no_torch():
    code = (
        "import sys, moco.segment, moco.predict, moco.segmentation.mask_layout;"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_figures_that_can_choose_a_checkpoint_are_those_that_there_are():
    assert (*SCORES, "auc") == METRICS
    assert METRICS_OF_A_CLASS == SCORES_OF_A_CLASS


def test_class_weights_are_counted_when_the_classes_are_known():
    check_class_weights([1, 2.5])
    check_class_weights([1, 2.5], 2)
    with pytest.raises(InputError, match=r"expected auto, null or a list of 3 numbers above 0"):
        check_class_weights([1, 2.5], 3)
