"""moco.segment from start to end on shapes that the tests draw."""

import contextlib
import csv
import dataclasses
import importlib.util
import json
import os
import re
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from moco.cli.build_segmentation import build_data, build_segmenter
from moco.cli.starting_backbone import find_backbone
from moco.cli.starting_decoder import find_decoder
from moco.errors import InputError, Interrupted
from moco.models.swin.window_change import rewindow
from moco.segment import run
from moco.segmentation.metrics import SegmentationCounts
from moco.segmentation.segmenter import Segmenter
from moco.training.board_layout import tag_of
from moco.training.random_states import random_states
from moco.weights.load_encoder import load_pretrained
from tests.configs import composed
from tests.conftest import run_program, thinned
from tests.segmentation.shapes import draw_shapes, save
from tests.segmentation.test_decoders import hide_segmentation_models

SMALL = [
    "image_size=32",
    "decoder=linear",
    "data.batch_size=8",
    "data.num_workers=0",
    "evaluation.batch_size=8",
    "optimizer.lr=0.005",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1",
    "augmentation.scale=[0.8,1.2]",
]
FROM_SCRATCH = ["checkpoint=null", "backbone=resnet_tiny"]


def config_of(root, *overrides):
    return composed("segment", *SMALL, f"data.root={root}", *overrides)


def pretraining_checkpoint(path, *overrides):
    """Write a file as moco.train leaves it, of random weights, different in both encoders."""
    from moco.cli.build_pretraining import build_method

    config = composed(
        "train",
        "+experiment=quickstart",
        "method.queue_size=48",
        "data.image_size=32",
        *overrides,
    )
    plain = dataclasses.asdict(config)
    torch.manual_seed(1)
    method = build_method(plain)
    for name, parameter in method.named_parameters():
        if "logit_scale" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    content = {
        "state_dict": method.state_dict(),
        "hyper_parameters": dict(method.hparams),
        "config": plain,
        "figures": {},
        "random_states": [random_states()],
        "global_step": 0,
    }
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return draw_shapes(tmp_path_factory.mktemp("data"), num_train=24, num_val=8)


@pytest.fixture(scope="module")
def swin(tmp_path_factory):
    """A checkpoint of a small Swin V2 in windows of 4, for 32 px."""
    path = tmp_path_factory.mktemp("pretrained") / "swin.ckpt"
    overrides = ["backbone=swin_v2_tiny_patch2", "backbone.stochastic_depth=0.1"]
    return pretraining_checkpoint(path, *overrides)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shapes):
    """A run from scratch that is long enough for the shapes: its folder and its figures."""
    folder = tmp_path_factory.mktemp("trained")
    torch.set_num_threads(1)
    config = config_of(
        shapes, *FROM_SCRATCH, "trainer.max_epochs=10", "data.class_names=[wall,disc,square]"
    )
    with (folder / "shown.txt").open("w") as shown, contextlib.redirect_stdout(shown):
        run(config, folder)
    return folder, figures_in(folder)


def figures_in(folder):
    return json.loads((folder / "metrics.json").read_text())


def last_checkpoint(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.slow
def test_shapes_are_learned(trained):
    _, figures = trained
    assert figures["segment/miou"] > 0.8
    assert figures["segment/pixel_accuracy"] > 0.95
    assert figures["train/loss"] < 0.4
    assert (figures["epoch"], figures["step"], figures["segment/epoch"]) == (10, 30, 10)
    ious = [figures[f"segment/iou/{name}"] for name in ("wall", "disc", "square")]
    assert figures["segment/miou"] == pytest.approx(np.mean(ious))


def test_the_run_folder_is_as_promised(trained):
    folder, figures = trained
    assert {".hydra", "checkpoints", "metrics.json"} <= set(os.listdir(folder))
    assert set(os.listdir(folder / "checkpoints")) == {"last.ckpt", "previous.ckpt", "best.ckpt"}
    assert figures["segment/decoder"] == "linear"
    assert figures["segment/checkpoint"] is None
    assert (figures["segment/inference"], figures["segment/num_images"]) == ("whole", 8)
    best = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["figures"]["segment/miou"] >= figures["segment/miou"]


@pytest.fixture(scope="module")
def events(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = trained
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def test_tensorboard_shows_figures_plots_and_config(events, trained):
    _, figures = trained
    tags = events.Tags()
    expected = ["train/loss", "segment/miou", "segment/iou/disc", "data_wait"]
    assert set(map(tag_of, expected)) <= set(tags["scalars"])
    plots = [f"image_truth_prediction/{number}" for number in range(4)]
    assert tags["images"] == [*map(tag_of, plots), tag_of("segment/confusion")]
    groups = {tag.split("/")[0] for tag in tags["scalars"]}
    assert groups == {"1_main", "2_health", "3_time", "4_debug"}
    assert "custom_scalars__config__" in tags["tensors"]
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "image_size: 32\n" in text
    assert events.Scalars(tag_of("segment/miou"))[-1].value == pytest.approx(
        figures["segment/miou"]
    )
    losses = [event.value for event in events.Scalars(tag_of("epoch/loss"))]
    assert losses[-1] < losses[0] / 2
    rates = [event.value for event in events.Scalars(tag_of("train/learning_rate"))]
    poly = [0.005 * (1 - step / 29) for step in range(29)]
    np.testing.assert_allclose(rates[1:], poly, rtol=1e-5)


def test_tensorboard_shows_settings_beside_the_miou(events):
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    content = events.PluginTagToContent("hparams")
    start = HParamsPluginData.FromString(content["_hparams_/session_start_info"])
    assert start.session_start_info.hparams["optimizer.lr"].number_value == 0.005
    experiment = HParamsPluginData.FromString(content["_hparams_/experiment"]).experiment
    names = [metric.display_name for metric in experiment.metric_infos]
    assert names == ["segment/miou", "epoch/loss"]
    settings = sorted(info.name for info in experiment.hparam_infos if info.display_name)
    shown = [name.partition("_")[2] for name in settings]
    assert shown == ["decoder", "backbone", "lr", "batch", "epochs"]


def predicted_as_in_the_docs(segmenter, path):
    """The classes of an image's pixels by the Python lines of docs/segmentation.md."""
    pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255
    mean = torch.tensor(segmenter.hparams["mean"]).view(3, 1, 1)
    std = torch.tensor(segmenter.hparams["std"]).view(3, 1, 1)
    return segmenter(((pixels - mean) / std)[None]).argmax(dim=1)[0].numpy()


def test_the_figures_equal_a_slow_count_over_the_checkpoints_predictions(trained, shapes):
    folder, figures = trained
    segmenter = Segmenter.load_from_checkpoint(
        folder / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True
    ).eval()
    confusion = np.zeros((3, 3))
    for path in sorted(shapes.glob("images/val/*.png")):
        predicted = predicted_as_in_the_docs(segmenter, path)
        truth = np.array(Image.open(shapes / "masks/val" / path.name))
        for row, column in zip(*np.nonzero(truth != 255), strict=True):
            confusion[truth[row, column], predicted[row, column]] += 1
    right = confusion.diagonal()
    ious = right / (confusion.sum(axis=0) + confusion.sum(axis=1) - right)
    # A pixel between two classes may get either, because a batch of one sums in another order.
    accuracy = right.sum() / confusion.sum()
    assert figures["segment/pixel_accuracy"] == pytest.approx(accuracy, abs=1e-3)
    assert figures["segment/miou"] == pytest.approx(ious.mean(), abs=5e-3)
    assert segmenter.hparams["class_names"] == ["wall", "disc", "square"]


def test_the_closing_table_shows_every_class(trained):
    folder, figures = trained
    shown = (folder / "shown.txt").read_text()
    assert re.search(rf"IoU, disc +│ {figures['segment/iou/disc']:.4f}", shown)
    assert "8 images, inference=whole" in shown
    assert f"after epoch {figures['segment/best_epoch']}" in shown
    best = os.path.relpath(folder / "checkpoints/best.ckpt")
    last_lines = shown.splitlines()[-3:]
    assert last_lines[0] == (
        f"next: python -m moco.predict checkpoint={best} data=images data.root=PATH"
    )
    assert last_lines[1] == (
        f"or: python -m moco.evaluate checkpoint={best} evaluation=segmentation"
    )
    assert last_lines[2].startswith("or: tensorboard --logdir")


def test_the_start_panel_says_what_is_trained(trained):
    shown = (trained[0] / "shown.txt").read_text()
    for row in (
        r"backbone +resnet_tiny, .* million parameters, random weights",
        r"images +24 to train on, 8 held out",
        r"classes +3: wall, disc, square",
        r"crops +32 px; held-out images whole",
        r"steps +3 an epoch x 10 epochs = 30",
        r"batch +8 images on CPU",
        r"best\.ckpt by +mIoU",
    ):
        assert re.search(f"^{row}", shown, re.MULTILINE), row


def interrupt_at(step, context):
    """Send Ctrl-C after an optimizer step, once."""
    sent = []

    def on_train_batch_end(self, *_):
        if self.trainer.global_step == step and not sent:
            sent.append(step)
            signal.raise_signal(signal.SIGINT)

    context.setattr(Segmenter, "on_train_batch_end", on_train_batch_end)


def assert_equal_weights(one, other):
    for name, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][name]), name


@pytest.mark.slow
def test_interrupts_do_not_change_the_result(shapes, tmp_path, monkeypatch):
    """Interrupts in the middle of an epoch and in its last step, with accumulation and windows."""
    settings = [
        *FROM_SCRATCH,
        "trainer.max_epochs=3",
        "trainer.accumulate_grad_batches=2",
        "image_size=24",
        "inference=slide",
    ]
    run(config_of(shapes, *settings), tmp_path / "whole")
    for step, stopped_after in ((1, 2), (5, 6)):  # of three steps an epoch
        with monkeypatch.context() as context:
            interrupt_at(step, context)
            with pytest.raises(Interrupted, match=rf"step {stopped_after};"):
                run(config_of(shapes, *settings), tmp_path / "parts")
    run(config_of(shapes, *settings), tmp_path / "parts")
    whole, parts = last_checkpoint(tmp_path / "whole"), last_checkpoint(tmp_path / "parts")
    assert whole["global_step"] == parts["global_step"] == 9
    assert_equal_weights(whole, parts)
    states = whole["optimizer_states"][0]["state"]
    for key, state in parts["optimizer_states"][0]["state"].items():
        assert torch.equal(state["exp_avg_sq"], states[key]["exp_avg_sq"])
    figures, expected = figures_in(tmp_path / "parts"), figures_in(tmp_path / "whole")
    for key in ("segment/miou", "segment/iou/1", "train/loss", "segment/epoch", "step"):
        assert figures[key] == expected[key]
    message = "another configuration: freeze_backbone: False there, True here"
    with pytest.raises(InputError, match=message):
        run(config_of(shapes, *settings, "freeze_backbone=true"), tmp_path / "parts")


FEW_LABELS = [
    *FROM_SCRATCH,
    "num_images=3",
    "class_weights=auto",
    "loss=focal",
    "evaluation.metric=dice/disc",
    "data.class_names=[wall,disc,square]",
]


def test_a_run_on_few_labels_says_which_and_keeps_the_best_by_its_metric(shapes, tmp_path, caplog):
    caplog.set_level("INFO")
    run(config_of(shapes, *FEW_LABELS, "trainer.max_epochs=2"), tmp_path)
    figures = figures_in(tmp_path)
    assert (figures["segment/num_train_images"], figures["segment/label_fraction"]) == (3, 1 / 8)
    assert (figures["step"], figures["segment/label_seed"]) == (2, 0)
    names = (tmp_path / "train_images.txt").read_text().splitlines()
    assert len(names) == 3
    assert all((shapes / name).is_file() for name in names)
    assert "num_images=3: 3 of 24 training images, drawn by their names" in caplog.text
    assert (
        "an epoch has 1 step instead of 3; it is measured and saved every 3 epochs; "
        "to train as long as with all images: trainer.max_epochs=6"
    ) in caplog.text

    assert (figures["segment/metric"], figures["segment/loss"]) == ("dice/disc", "focal")
    hparams = last_checkpoint(tmp_path)["hyper_parameters"]
    assert hparams["class_weights"] == figures["segment/class_weights"]
    pixels = np.zeros(3)
    for name in names:
        mask = np.array(Image.open(shapes / name.replace("images", "masks")))
        pixels += np.bincount(mask[mask != 255], minlength=3)
    shares = pixels / pixels.sum()
    np.testing.assert_allclose(hparams["class_weights"], 1 / np.log(1.02 + shares))
    best = torch.load(tmp_path / "checkpoints/best.ckpt", weights_only=True)["figures"]
    assert best["segment/dice/disc"] == figures["segment/best_dice/disc"]
    assert best["epoch"] == figures["segment/best_epoch"]


@pytest.mark.slow
def test_an_interrupt_does_not_change_a_run_on_few_labels(shapes, tmp_path, monkeypatch):
    settings = [*FEW_LABELS, "trainer.max_epochs=3", "num_images=12", "data.batch_size=4"]
    run(config_of(shapes, *settings), tmp_path / "whole")
    with monkeypatch.context() as context:
        interrupt_at(4, context)
        with pytest.raises(Interrupted, match=r"step 5;"):
            run(config_of(shapes, *settings), tmp_path / "parts")
    run(config_of(shapes, *settings), tmp_path / "parts")
    whole, parts = last_checkpoint(tmp_path / "whole"), last_checkpoint(tmp_path / "parts")
    assert whole["global_step"] == parts["global_step"] == 9
    assert_equal_weights(whole, parts)
    key = "segment/best_dice/disc"
    assert figures_in(tmp_path / "whole")[key] == figures_in(tmp_path / "parts")[key]
    with pytest.raises(InputError, match="another configuration: num_images: 12 there, 13 here"):
        run(config_of(shapes, *settings, "num_images=13"), tmp_path / "parts")


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["ce_dice", "dice", "lovasz"])
def test_shapes_are_learned_with_every_loss(loss, shapes, tmp_path):
    pytest.importorskip("segmentation_models_pytorch")
    run(config_of(shapes, *FROM_SCRATCH, "trainer.max_epochs=10", f"loss={loss}"), tmp_path)
    assert figures_in(tmp_path)["segment/miou"] > 0.7


@pytest.mark.slow
def test_a_resumed_run_continues_the_random_numbers_of_dropout_and_stochastic_depth(
    shapes, tmp_path, monkeypatch
):
    settings = [
        "checkpoint=null",
        "backbone=swin_v2_tiny_patch2",
        "backbone.stochastic_depth=0.5",
        "decoder=fcn",
        "trainer.max_epochs=1",
        "image_size=16",
    ]
    run(config_of(shapes, *settings), tmp_path / "whole")
    with monkeypatch.context() as context:
        interrupt_at(1, context)
        with pytest.raises(Interrupted, match=r"step 2;"):
            run(config_of(shapes, *settings), tmp_path / "parts")
    run(config_of(shapes, *settings), tmp_path / "parts")
    whole, parts = last_checkpoint(tmp_path / "whole"), last_checkpoint(tmp_path / "parts")
    assert whole["global_step"] == parts["global_step"] == 3
    assert_equal_weights(whole, parts)


@pytest.mark.slow
def test_an_interrupted_measurement_is_done_after_the_restart(shapes, tmp_path, monkeypatch):
    config = [*FROM_SCRATCH, "trainer.max_epochs=1", "evaluation.batch_size=4"]
    original = SegmentationCounts.add

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return original(*args)

    with monkeypatch.context() as context:
        context.setattr(SegmentationCounts, "add", interrupted)
        with pytest.raises(Interrupted, match="step 3;"):
            run(config_of(shapes, *config), tmp_path)
    assert "segment/miou" not in last_checkpoint(tmp_path)["figures"]
    run(config_of(shapes, *config), tmp_path)
    figures = figures_in(tmp_path)
    assert (figures["segment/epoch"], figures["step"]) == (1, 3)
    assert last_checkpoint(tmp_path)["figures"]["segment/miou"] == figures["segment/miou"]
    assert (tmp_path / "checkpoints" / "best.ckpt").is_file()


def backbone_of(path, encoder="query"):
    return load_pretrained(str(path), encoder, {}).encoder.backbone


def segmenter_of(config):
    start = find_backbone(config)
    class_names = build_data(config, start).source.class_names
    return build_segmenter(config, start, find_decoder(config, start), class_names)


@pytest.mark.parametrize("version", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_backbone_is_the_checkpoints_in_new_windows(version, shapes, swin, tmp_path):
    if version == 1:
        overrides = ["backbone=swin_tiny_patch2", "backbone.stochastic_depth=0.1"]
        swin = pretraining_checkpoint(tmp_path / "v1.ckpt", *overrides)
    overrides = [f"checkpoint={swin}", "image_size=70", "backbone.window_size=9"]
    segmenter = segmenter_of(config_of(shapes, *overrides))
    backbone = segmenter.model.backbone.eval()
    expected = rewindow(backbone_of(swin), 9)
    images = torch.randn(1, 3, 70, 70)
    maps, expected_maps = backbone.feature_maps(images), expected.feature_maps(images)
    for one, other in zip(maps, expected_maps, strict=True):
        assert torch.equal(one, other)
    assert backbone.window_size == (9,) * 4
    assert segmenter.hparams["backbone"]["stochastic_depth"] == 0.1
    assert (segmenter.hparams["image_size"], segmenter.hparams["mean"]) == (70, [0.305] * 3)


def test_another_pretraining_window_stretches_the_biases_and_the_log_says_so(shapes, swin, caplog):
    windows = ["backbone.window_size=9", "backbone.pretrained_window_size=9"]
    segmenter = segmenter_of(config_of(shapes, f"checkpoint={swin}", "image_size=70", *windows))
    assert segmenter.model.backbone.pretrained_window_size == (9,) * 4
    assert "stretches the position biases" in caplog.text


def test_the_key_encoder_can_be_used_and_the_image_size_is_the_checkpoints(shapes, swin):
    config = config_of(shapes, f"checkpoint={swin}", "encoder=key", "image_size=null")
    start = find_backbone(config)
    assert start.image_size == 32
    key, query = backbone_of(swin, "key"), backbone_of(swin, "query")
    assert torch.equal(start.backbone.norm.weight, key.norm.weight)
    assert not torch.equal(key.norm.weight, query.norm.weight)


def test_a_window_is_suggested_for_another_image_size(shapes, swin, caplog):
    caplog.set_level("INFO")
    find_backbone(config_of(shapes, f"checkpoint={swin}", "image_size=70"))
    assert "pretrained on 32 px with window 4; window 9 for 70 px" in caplog.text
    assert "backbone.window_size=9" in caplog.text


def test_the_window_is_the_checkpoints_where_only_the_backbone_is_named(shapes, tmp_path):
    overrides = ["backbone=swin_tiny_patch2", "backbone.window_size=8"]
    path = pretraining_checkpoint(tmp_path / "wide.ckpt", *overrides)
    start = find_backbone(config_of(shapes, f"checkpoint={path}", "backbone=swin_tiny_patch2"))
    assert start.backbone.window_size == (8,) * 4


@pytest.fixture(scope="module")
def fine_tuned(shapes, swin, tmp_path_factory):
    """The folder of a run that fine-tunes the Swin for one step in windows of 5."""
    overrides = [
        f"checkpoint={swin}",
        "backbone.window_size=5",
        "image_size=40",
        "trainer.max_steps=1",
        "backbone.gradient_checkpointing=true",
    ]
    if importlib.util.find_spec("segmentation_models_pytorch") is None:
        overrides.append("decoder=fcn")
    else:
        overrides += ["decoder=auto", "decoder.channels=32"]
    folder = tmp_path_factory.mktemp("fine_tuned")
    run(config_of(shapes, *overrides), folder)
    return folder


@pytest.mark.slow
def test_a_pretrained_swin_is_fine_tuned_in_other_windows(fine_tuned, swin):
    end = last_checkpoint(fine_tuned)
    backbone = Segmenter(**end["hyper_parameters"]).model.backbone
    assert (backbone.window_size, backbone.pretrained_window_size) == ((5,) * 4, (4,) * 4)
    assert backbone.gradient_checkpointing
    assert end["hyper_parameters"]["optimizer"]["layer_decay"] == 0.9
    figures = figures_in(fine_tuned)
    assert figures["segment/window_size"] == [5] * 4
    assert figures["segment/decoder"] in ("upernet", "fcn")
    name = "features.7.1.mlp.0.weight"
    before = backbone_of(swin).state_dict()[name]
    change = end["state_dict"][f"model.backbone.{name}"] - before
    assert 0 < change.abs().max() < 0.02


@pytest.mark.slow
def test_the_backbone_of_a_segmenter_is_loaded_like_any_other(fine_tuned, caplog):
    caplog.set_level("INFO")
    path = fine_tuned / "checkpoints/last.ckpt"
    pretrained = load_pretrained(str(path), "query", {}, feature=None)
    assert "its fine-tuned backbone is used, without the decoder" in caplog.text
    weights = last_checkpoint(fine_tuned)["state_dict"]
    for name, tensor in pretrained.encoder.backbone.state_dict().items():
        assert torch.equal(tensor, weights[f"model.backbone.{name}"])
    assert pretrained.encoder.backbone.window_size == (5,) * 4
    assert (
        pretrained.config["data"]["image_size"]
        == last_checkpoint(fine_tuned)["hyper_parameters"]["image_size"]
    )


@pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*")
# With stochastic depth; with BatchNorm.
@pytest.mark.parametrize("kind", [pytest.param("swin", marks=pytest.mark.slow), "resnet"])
def test_a_frozen_backbone_is_not_changed(kind, shapes, swin, tmp_path, monkeypatch):
    modes = []  # of the backbone in each step, also after a measurement

    def on_before_zero_grad(self, _):
        modes.append(any(layer.training for layer in self.model.backbone.modules()))

    monkeypatch.setattr(Segmenter, "on_before_zero_grad", on_before_zero_grad)
    path = swin
    if kind == "resnet":
        path = pretraining_checkpoint(tmp_path / "resnet.ckpt")
    overrides = ["freeze_backbone=true", "decoder=auto", "trainer.max_steps=4"]
    run(config_of(shapes, f"checkpoint={path}", *overrides), tmp_path / "run")
    end = last_checkpoint(tmp_path / "run")
    assert modes == [False] * 4
    assert end["hyper_parameters"]["decoder"]["name"] == "linear"
    for name, value in backbone_of(path).state_dict().items():
        assert torch.equal(end["state_dict"][f"model.backbone.{name}"], value), name
    decoder = Segmenter(**end["hyper_parameters"]).model.decoder
    assert len(end["optimizer_states"][0]["state"]) == len(list(decoder.parameters()))


def test_a_decoder_starts_the_same_with_and_without_a_checkpoint(shapes, swin):
    pretrained = segmenter_of(config_of(shapes, f"checkpoint={swin}"))
    untrained = segmenter_of(config_of(shapes, "checkpoint=null", "backbone=swin_v2_tiny_patch2"))
    assert pretrained.hparams["optimizer"]["layer_decay"] == 0.9
    assert untrained.hparams["optimizer"]["layer_decay"] == 1.0
    weights = untrained.model.decoder.state_dict()
    for name, value in pretrained.model.decoder.state_dict().items():
        assert torch.equal(value, weights[name]), name


# Overrides, and how the message begins.
MISTAKES = [
    (
        ["checkpoint={swin}", "backbone.window_size=0"],
        "backbone.window_size=0: expected a whole number of cells from 1 to 64",
    ),
    (
        ["checkpoint={swin}", "backbone.window_size=65"],
        "backbone.window_size=65: expected a whole number of cells from 1 to 64",
    ),
    (
        ["checkpoint={swin}", "backbone.window_size=many"],
        "backbone.window_size=many: expected a whole number of cells from",
    ),
    (
        ["checkpoint={swin}", "backbone=resnet_tiny"],
        "checkpoint={swin}: has another architecture: "
        "backbone.name: swin_v2_tiny_patch2 there, resnet_tiny here",
    ),
    (
        ["checkpoint={swin}", "backbone.num_heads=6"],
        "checkpoint={swin}: has another architecture: backbone.num_heads: None there, 6 here",
    ),
    (
        ["checkpoint={resnet}", "backbone.window_size=18"],
        "backbone.window_size=18: this backbone has no attention windows",
    ),
    (
        ["checkpoint={resnet}", "backbone.stochastic_depth=0.1"],
        "checkpoint={resnet}: backbone.stochastic_depth=0.1: resnet_tiny has no such setting",
    ),
    (["checkpoint=nowhere.ckpt"], "checkpoint=nowhere.ckpt: no such file"),
    (
        ["checkpoint={shapes}/masks/val/00.png"],
        "checkpoint={shapes}/masks/val/00.png: damaged, or no checkpoint at all",
    ),
    (["checkpoint=null"], "backbone: missing; without a checkpoint give backbone=NAME"),
    (
        ["checkpoint=null", "backbone=resnet_tiny", "image_size=null"],
        "image_size: missing; without a checkpoint give image_size=PIXELS",
    ),
    (
        ["checkpoint={swin}", "image_size=12"],
        "image_size=12: expected at least 16, a cell of the backbone's last map",
    ),
    (
        ["checkpoint={swin}", "data.root=nowhere"],
        "data.root=nowhere: no such folder",
    ),
    (
        ["checkpoint={swin}", "data.num_classes=2"],
        "{shapes}/masks/train/01.png: the mask holds the number 2, "
        "but data.num_classes says 2 classes, 0 to 1 (and 15 more like it)",
    ),
    (["checkpoint={swin}", "data.ignore_index=65536"], "data.ignore_index=65536: "),
    (
        ["checkpoint={swin}", "data.batch_size=25"],
        "data.batch_size=25: there are only 24 images to train on",
    ),
    (
        ["checkpoint={swin}", "decoder=fcn", "decoder.channels=64"],
        "decoder.channels=64: the decoder fcn has no such setting",
    ),
    (
        ["checkpoint={swin}", "resume={swin}"],
        "resume={swin}: the checkpoint has another architecture or optimizer: "
        "backbone.pretrained_window_size:",
    ),
    (
        ["checkpoint={swin}", "trainer.devices=2"],
        "trainer.devices=2: moco.segment trains on one device",
    ),
    (
        ["checkpoint={swin}", "trainer.cuda_graphs=true"],
        "trainer.cuda_graphs=true: moco.segment does not compile its model; expected false",
    ),
    (
        ["checkpoint={swin}", "class_weights=[1,2]"],
        "class_weights=[1, 2]: expected auto, null or a list of 3 numbers above 0, one for each",
    ),
    (
        ["checkpoint={swin}", "class_weights=[1,0,2]"],
        "class_weights=[1, 0, 2]: expected auto, null or a list of numbers above 0; 0 is none",
    ),
    (
        ["checkpoint={swin}", "evaluation.metric=auc"],
        "evaluation.metric=auc: needs two classes, and the dataset has 3",
    ),
    (
        ["checkpoint={swin}", "evaluation.metric=iou/disk", "data.class_names=[wall,disc,box]"],
        "evaluation.metric=iou/disk: unknown class 'disk'; did you mean 'disc'?",
    ),
    (
        ["checkpoint={swin}", "evaluation.metric=mIoU"],
        "evaluation.metric: unknown figure 'mIoU' (choices: auc, class_accuracy, dice, ",
    ),
    (
        ["checkpoint={swin}", "num_images=25"],
        "num_images=25: there are only 24 images to train on",
    ),
    (["checkpoint={swin}", "label_fraction=0"], "label_fraction=0.0: expected a number above 0"),
    (["checkpoint={swin}", "loss=bce"], "loss: unknown value 'bce'; did you mean 'ce'?"),
    # A missing library is named before the data are read.
    (
        ["checkpoint={swin}", "loss=dice", "data.root=nowhere"],
        "loss=dice: segmentation_models_pytorch is not installed",
    ),
    (
        ["checkpoint={swin}", "decoder=auto", "data.num_classes=2"],
        "decoder=upernet: segmentation_models_pytorch is not installed",
    ),
]


@pytest.mark.parametrize(
    ("overrides", "expected"), thinned(MISTAKES, every=6), ids=lambda value: value[-1][-40:]
)
def test_a_mistake_is_found_before_the_run_folder_is_touched(
    overrides, expected, shapes, swin, tmp_path, monkeypatch
):
    hide_segmentation_models(monkeypatch)
    places = {"swin": swin, "shapes": shapes, "resnet": tmp_path / "resnet.ckpt"}
    if "{resnet}" in overrides[0]:
        pretraining_checkpoint(places["resnet"])
    overrides = [word.format(**places) for word in overrides]
    with pytest.raises(InputError) as error:
        run(config_of(shapes, *overrides), tmp_path / "run")
    assert str(error.value).startswith(expected.format(**places))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_program_sweeps_and_a_mistake_is_one_line_and_exit_code_2(shapes, tmp_path):
    bad = tmp_path / "bad"
    save(bad / "images/train/a.png", np.zeros((8, 8, 3), np.uint8))
    save(bad / "masks/train/a.png", np.zeros((8, 9), np.uint8))
    done = run_program(
        "moco.segment",
        "-m",
        *SMALL,
        *FROM_SCRATCH,
        f"data.root={bad},{shapes}",
        "trainer.max_steps=1",
        "hydra.sweep.dir=sweep",
        cwd=tmp_path,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        f"error: {bad}/images/train/a.png: this is the only image; at least one more is needed, "
        "because one is held out\n"
    )
    jobs = [json.loads(path.read_text()) for path in (tmp_path / "sweep").glob("*/status.json")]
    assert sorted(job["exit_code"] for job in jobs) == [0, 2]
    assert len(list((tmp_path / "sweep").glob("*/metrics.json"))) == 1


def evaluated(path, folder, *overrides):
    """The figures of `moco.evaluate evaluation=segmentation`."""
    from moco.evaluate import run as evaluate

    overrides = [f"checkpoint={path}", "evaluation=segmentation", *overrides]
    evaluate(composed("evaluate", *overrides, "accelerator=cpu"), folder)
    return figures_in(folder)


def check_report(folder, figures):
    """Check the pictures, and the table of the images against the figures of all of them."""
    report = folder / "report"
    assert set(os.listdir(report)) == {"confusion.png", "predictions.png", "index.html"}
    with Image.open(report / "predictions.png") as picture:
        assert picture.height > 6 * 32
    with (folder / "per_image.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [f"images/val/{number:02}.png" for number in range(8)]
    num_pixels = np.array([int(row["pixels"]) for row in rows])
    assert num_pixels.tolist() == [31 * 32] * 8  # without the first row
    accuracies = np.array([float(row["pixel_accuracy"]) for row in rows])
    assert figures["segment/pixel_accuracy"] == pytest.approx(np.average(accuracies))
    # An image without a class, in its mask and in its prediction, has no figure of it.
    assert {row["iou/disc"] for row in rows if not row["dice/disc"]} <= {""}
    columns = {"image", "pixels", "miou", "dice", "pixel_accuracy", "class_accuracy"}
    for name in ("wall", "disc", "square"):
        columns |= {f"iou/{name}", f"dice/{name}"}
    assert set(rows[0]) == columns


@pytest.mark.slow
def test_a_finished_run_is_measured_again_without_training(trained, shapes, tmp_path):
    folder, figures = trained
    path = folder / "checkpoints" / "last.ckpt"
    again = evaluated(path, tmp_path / "again")
    for key in ("segment/miou", "segment/pixel_accuracy", "segment/iou/disc", "segment/num_images"):
        assert again[key] == figures[key]
    check_report(tmp_path / "again", again)
    slide = evaluated(path, tmp_path / "slide", "evaluation.inference=slide", "data.image_size=24")
    assert slide["segment/inference"] == "slide"
    assert 0 < slide["segment/miou"] != figures["segment/miou"]
    # A folder that is not divided is measured whole, also if it holds one class.
    for number in range(3):
        save(tmp_path / "other" / "images" / f"{number}.png", np.zeros((32, 32, 3), np.uint8))
        save(tmp_path / "other" / "masks" / f"{number}.png", np.zeros((32, 32), np.uint8))
    other = evaluated(
        path, tmp_path / "out", "data=segmentation_folder", f"data.root={tmp_path}/other"
    )
    assert other["segment/num_images"] == 3
    (tmp_path / "other" / "classes.txt").write_text("sky\ndisc\nsquare\n")
    with pytest.raises(InputError, match="class 0 is sky, but the model learned it as wall"):
        evaluated(path, tmp_path / "no", f"data.root={tmp_path}/other")


def test_another_inference_of_a_finished_run_names_the_command_that_measures(trained, shapes):
    folder, _ = trained
    same = [*FROM_SCRATCH, "trainer.max_epochs=10", "data.class_names=[wall,disc,square]"]
    with pytest.raises(InputError) as error:
        run(config_of(shapes, *same, "inference=slide"), folder)
    assert "inference: whole there, slide here" in str(error.value)
    path = folder / "checkpoints" / "last.ckpt"
    assert str(error.value).endswith(
        f"python -m moco.evaluate checkpoint={path} evaluation=segmentation "
        "evaluation.inference=slide"
    )


def test_only_segmenters_are_measured_as_segmenters(swin, tmp_path):
    with pytest.raises(InputError, match="and this one is of another program; evaluation=dense"):
        evaluated(swin, tmp_path)
