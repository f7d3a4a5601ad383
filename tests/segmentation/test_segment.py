"""moco.segment end to end on shapes that the test draws: learning, measuring, resuming, mistakes."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import signal

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

from moco.config.parsing import CONFIG_DIR, parse, register_schemas
from moco.config.segment import SegmentConfig
from moco.config.train import TrainConfig
from moco.errors import InputError, Interrupted
from moco.segment import build_data, build_segmenter, decoder_settings, run, starting_point
from moco.segmentation.segmenter import Segmenter, pixel_cross_entropy
from moco.training.random_states import random_states
from tests.conftest import run_program
from tests.segmentation.shapes import draw_shapes, save

SMALL = [
    "image_size=32", "decoder=linear", "data.batch_size=8", "data.num_workers=0", "evaluation.batch_size=8",
    "optimizer.lr=0.005", "trainer.accelerator=cpu", "trainer.log_every_n_steps=1", "augmentation.scale=[0.8,1.2]",
]  # fmt: skip
FROM_SCRATCH = ["checkpoint=null", "backbone=resnet_tiny"]


def composed(name, schema, *overrides):
    register_schemas()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return parse(compose(name, list(overrides)), schema)


def config_of(root, *overrides):
    return composed("segment", SegmentConfig, *SMALL, f"data.root={root}", *overrides)


def pretraining_checkpoint(path, *overrides):
    """A file as moco.train leaves it, of a method whose weights are all random, both encoders' different."""
    from moco.train import build_method

    config = composed(
        "train",
        TrainConfig,
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
    torch.save(
        {
            "state_dict": method.state_dict(),
            "hyper_parameters": dict(method.hparams),
            "config": plain,
            "figures": {},
            "random_states": [random_states()],
            "global_step": 0,
        },
        path,
    )
    return path


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return draw_shapes(tmp_path_factory.mktemp("data"), num_train=24, num_val=8)


@pytest.fixture(scope="module")
def swin(tmp_path_factory):
    """A checkpoint of a small Swin V2 in windows of 4, for 32 px."""
    path = tmp_path_factory.mktemp("pretrained") / "swin.ckpt"
    return pretraining_checkpoint(
        path, "backbone=swin_v2_tiny_patch2", "backbone.stochastic_depth=0.1"
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shapes):
    """A run from scratch that is long enough for the shapes."""
    folder = tmp_path_factory.mktemp("trained")
    torch.set_num_threads(1)
    with (folder / "shown.txt").open("w") as shown, contextlib.redirect_stdout(shown):
        run(
            config_of(
                shapes,
                *FROM_SCRATCH,
                "trainer.max_epochs=10",
                "data.class_names=[wall,disc,square]",
            ),
            folder,
        )
    return folder, json.loads((folder / "metrics.json").read_text())


def last(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def test_shapes_are_learned(trained):
    _, figures = trained
    assert figures["segment/miou"] > 0.8
    assert figures["segment/pixel_accuracy"] > 0.95
    assert figures["train/loss"] < 0.4
    assert (figures["epoch"], figures["step"], figures["segment/epoch"]) == (10, 30, 10)
    assert figures["segment/miou"] == pytest.approx(
        np.mean([figures[f"segment/iou/{name}"] for name in ("wall", "disc", "square")])
    )


def test_the_run_folder_is_as_promised(trained):
    folder, figures = trained
    assert {".hydra", "checkpoints", "metrics.json"} <= set(os.listdir(folder))
    assert set(os.listdir(folder / "checkpoints")) == {"last.ckpt", "previous.ckpt", "best.ckpt"}
    assert figures["segment/decoder"] == "linear"
    assert figures["segment/checkpoint"] is None
    assert (figures["segment/inference"], figures["segment/num_images"]) == ("whole", 8)
    best = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["figures"]["segment/miou"] >= figures["segment/miou"]


def test_tensorboard_shows_the_figures_and_the_images(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = EventAccumulator(str(trained[0]))
    events.Reload()
    tags = events.Tags()
    assert {
        "train/loss",
        "train/learning_rate",
        "segment/miou",
        "segment/iou/disc",
        "data_wait",
    } <= set(tags["scalars"])
    assert tags["images"] == [f"image_truth_prediction/{number}" for number in range(4)]
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "image_size: 32\n" in text
    hparams = events.PluginTagToContent("hparams")
    session = HParamsPluginData.FromString(
        hparams["_hparams_/session_start_info"]
    ).session_start_info
    assert session.hparams["optimizer.lr"].number_value == 0.005
    metrics = HParamsPluginData.FromString(hparams["_hparams_/experiment"]).experiment.metric_infos
    assert [metric.name.tag for metric in metrics] == ["segment/miou", "epoch/loss"]
    assert events.Scalars("segment/miou")[-1].value == pytest.approx(trained[1]["segment/miou"])
    losses = [event.value for event in events.Scalars("epoch/loss")]
    assert losses[-1] < losses[0] / 2
    rates = [event.value for event in events.Scalars("train/learning_rate")]
    np.testing.assert_allclose(
        rates[1:], [0.005 * (1 - (step - 1) / 29) for step in range(1, 30)], rtol=1e-5
    )


def test_the_figures_are_a_slow_count_over_the_checkpoints_predictions(trained, shapes):
    """The README's lines for Python, too."""
    from PIL import Image

    folder, figures = trained
    segmenter = Segmenter.load_from_checkpoint(
        folder / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True
    ).eval()
    hits = total = 0
    found, there, both = np.zeros(3), np.zeros(3), np.zeros(3)
    for path in sorted(shapes.glob("images/val/*.png")):
        pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) / 255
        mean, std = (
            torch.tensor(segmenter.hparams[name]).view(3, 1, 1) for name in ("mean", "std")
        )
        predicted = segmenter(((pixels - mean) / std)[None]).argmax(dim=1)[0].numpy()
        truth = np.array(Image.open(shapes / "masks/val" / path.name))
        for row, column in zip(*np.nonzero(truth != 255), strict=True):
            found[predicted[row, column]] += 1
            there[truth[row, column]] += 1
            both[truth[row, column]] += predicted[row, column] == truth[row, column]
            hits += predicted[row, column] == truth[row, column]
            total += 1
    # A pixel between two classes may fall to either, since a batch of one is added up in another order.
    assert figures["segment/pixel_accuracy"] == pytest.approx(hits / total, abs=1e-3)
    assert figures["segment/miou"] == pytest.approx(
        (both / (found + there - both)).mean(), abs=5e-3
    )
    assert segmenter.hparams["class_names"] == ["wall", "disc", "square"]


def test_the_closing_table_shows_every_class(trained):
    folder, figures = trained
    shown = (folder / "shown.txt").read_text()
    assert re.search(rf"IoU, disc +│ {figures['segment/iou/disc']:.4f}", shown)
    assert "8 images, inference=whole" in shown
    assert "next: tensorboard --logdir" in shown


def interrupt_at(step, context):
    """Ctrl-C after so many optimizer steps, once."""
    sent = []

    def on_train_batch_end(self, *_):
        if self.trainer.global_step == step and not sent:
            sent.append(step)
            signal.raise_signal(signal.SIGINT)

    context.setattr(Segmenter, "on_train_batch_end", on_train_batch_end)


def test_stopping_anywhere_changes_nothing(shapes, tmp_path, monkeypatch):
    """Interrupts in the middle of an epoch and in its last step, with accumulation and sliding windows."""
    settings = [
        *FROM_SCRATCH, "trainer.max_epochs=3", "trainer.accumulate_grad_batches=2", "image_size=24", "inference=slide",
    ]  # fmt: skip

    run(config_of(shapes, *settings), tmp_path / "whole")
    for step, stopped in ((1, 2), (5, 6)):  # of three steps an epoch
        with monkeypatch.context() as context:
            interrupt_at(step, context)
            with pytest.raises(Interrupted, match=rf"step {stopped};"):
                run(config_of(shapes, *settings), tmp_path / "parts")
    run(config_of(shapes, *settings), tmp_path / "parts")
    one, other = last(tmp_path / "whole"), last(tmp_path / "parts")
    assert one["global_step"] == other["global_step"] == 9
    for name, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][name]), name
    for state, other_state in zip(
        *(end["optimizer_states"][0]["state"].values() for end in (one, other)), strict=True
    ):
        assert torch.equal(state["exp_avg_sq"], other_state["exp_avg_sq"])
    figures = [
        json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "parts")
    ]
    for key in ("segment/miou", "segment/iou/1", "train/loss", "segment/epoch", "step"):
        assert figures[0][key] == figures[1][key]
    with pytest.raises(
        InputError,
        match="holds a run with another configuration: freeze_backbone: False there, True here",
    ):
        run(config_of(shapes, *settings, "freeze_backbone=true"), tmp_path / "parts")


def test_stopping_goes_on_with_what_dropout_and_stochastic_depth_draw(
    shapes, tmp_path, monkeypatch
):
    settings = [
        "checkpoint=null", "backbone=swin_v2_tiny_patch2", "backbone.stochastic_depth=0.5", "decoder=fcn",
        "trainer.max_epochs=2", "image_size=16",
    ]  # fmt: skip
    run(config_of(shapes, *settings), tmp_path / "whole")
    with monkeypatch.context() as context:
        interrupt_at(1, context)
        with pytest.raises(Interrupted, match=r"step 2;"):
            run(config_of(shapes, *settings), tmp_path / "parts")
    run(config_of(shapes, *settings), tmp_path / "parts")
    one, other = last(tmp_path / "whole"), last(tmp_path / "parts")
    assert one["global_step"] == other["global_step"] == 6
    for name, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][name]), name


def test_an_interrupted_measurement_is_made_up_for(shapes, tmp_path, monkeypatch):
    import moco.callbacks.segmentation_monitor as module

    settings = [*FROM_SCRATCH, "trainer.max_epochs=1"]
    original = module.confusion_matrix

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return original(*args)

    with monkeypatch.context() as context:
        context.setattr(module, "confusion_matrix", interrupted)
        with pytest.raises(Interrupted, match="step 3;"):
            run(config_of(shapes, *settings, "evaluation.batch_size=4"), tmp_path)
    assert "segment/miou" not in last(tmp_path)["figures"]
    run(config_of(shapes, *settings, "evaluation.batch_size=4"), tmp_path)
    figures = json.loads((tmp_path / "metrics.json").read_text())
    assert (figures["segment/epoch"], figures["step"]) == (1, 3)
    assert last(tmp_path)["figures"]["segment/miou"] == figures["segment/miou"]
    assert (tmp_path / "checkpoints" / "best.ckpt").is_file()


def encoder_of(path, which="query"):
    from moco.runs.checkpoint_files import read_checkpoint
    from moco.weights.pretrained import load_encoder

    return load_encoder(read_checkpoint(path), which, str(path)).backbone


def segmenter_of(config):
    start = starting_point(config)
    return build_segmenter(config, start, decoder_settings(config), build_data(config, start))


@pytest.mark.parametrize("version", [1, 2])
def test_the_backbone_is_the_checkpoints_in_new_windows(version, shapes, swin, tmp_path):
    from moco.models.swin.backbone import rewindow

    if version == 1:
        swin = pretraining_checkpoint(
            tmp_path / "v1.ckpt", "backbone=swin_tiny_patch2", "backbone.stochastic_depth=0.1"
        )
    segmenter = segmenter_of(
        config_of(shapes, f"checkpoint={swin}", "image_size=70", "backbone.window_size=9")
    )
    backbone, expected = segmenter.model.backbone.eval(), rewindow(encoder_of(swin), 9)
    images = torch.randn(1, 3, 70, 70)
    for one, other in zip(
        backbone.feature_maps(images), expected.feature_maps(images), strict=True
    ):
        assert torch.equal(one, other)
    assert backbone.window_size == (9,) * 4
    assert segmenter.hparams["backbone"]["stochastic_depth"] == 0.1
    assert (segmenter.hparams["image_size"], segmenter.hparams["mean"]) == (70, [0.305] * 3)


def test_another_pretraining_window_stretches_the_biases_and_says_so(shapes, swin, caplog):
    windows = ["backbone.window_size=9", "backbone.pretrained_window_size=9"]
    segmenter = segmenter_of(config_of(shapes, f"checkpoint={swin}", "image_size=70", *windows))
    assert segmenter.model.backbone.pretrained_window_size == (9,) * 4
    assert "another one than the checkpoint's stretches the position biases" in caplog.text


def test_the_key_encoder_can_be_taken_and_the_size_is_the_checkpoints(shapes, swin):
    start = starting_point(
        config_of(shapes, f"checkpoint={swin}", "encoder=key", "image_size=null")
    )
    assert start.image_size == 32
    key, query = encoder_of(swin, "key"), encoder_of(swin, "query")
    assert torch.equal(start.backbone.norm.weight, key.norm.weight)
    assert not torch.equal(key.norm.weight, query.norm.weight)


def test_a_window_is_suggested_for_another_image_size(shapes, swin, caplog):
    caplog.set_level("INFO")
    starting_point(config_of(shapes, f"checkpoint={swin}", "image_size=70"))
    assert "pretrained on 32 px with window 4; window 9 for 70 px" in caplog.text
    assert "backbone.window_size=9" in caplog.text


def test_the_window_is_the_checkpoints_where_only_the_backbone_is_named(shapes, tmp_path):
    path = pretraining_checkpoint(
        tmp_path / "wide.ckpt", "backbone=swin_tiny_patch2", "backbone.window_size=8"
    )
    start = starting_point(config_of(shapes, f"checkpoint={path}", "backbone=swin_tiny_patch2"))
    assert start.backbone.window_size == (8,) * 4


def test_a_pretrained_swin_is_fine_tuned_at_another_window(shapes, swin, tmp_path):
    has_extra = importlib.util.find_spec("segmentation_models_pytorch") is not None
    decoder = "upernet" if has_extra else "fcn"
    width = ["decoder=auto", "decoder.channels=32"] if has_extra else ["decoder=fcn"]
    settings = ["backbone.window_size=5", "image_size=40", "trainer.max_steps=1", *width]
    run(
        config_of(shapes, f"checkpoint={swin}", *settings, "backbone.gradient_checkpointing=true"),
        tmp_path,
    )
    end = last(tmp_path)
    backbone = Segmenter(**end["hyper_parameters"]).model.backbone
    assert (backbone.window_size, backbone.pretrained_window_size) == ((5,) * 4, (4,) * 4)
    assert backbone.gradient_checkpointing
    assert end["hyper_parameters"]["optimizer"]["layer_decay"] == 0.9
    figures = json.loads((tmp_path / "metrics.json").read_text())
    assert (figures["segment/window_size"], figures["segment/decoder"]) == ([5] * 4, decoder)
    weight = "features.7.1.mlp.0.weight"
    moved = end["state_dict"][f"model.backbone.{weight}"] - encoder_of(swin).state_dict()[weight]
    assert 0 < moved.abs().max() < 0.02
    with pytest.raises(
        InputError, match=r"last.ckpt: written by moco.segment, and expected is one of moco.train"
    ):
        run(
            config_of(shapes, f"checkpoint={tmp_path / 'checkpoints/last.ckpt'}"), tmp_path / "next"
        )


@pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training.*")
@pytest.mark.parametrize(
    "kind", ["swin", "resnet"]
)  # with stochastic depth; with BatchNorm, whose buffers count too
def test_linear_segmentation_leaves_the_backbone_as_it_was(
    kind, shapes, swin, tmp_path, monkeypatch
):
    modes = []  # of the backbone's layers in each step, also after a measurement

    def on_before_zero_grad(self, _):
        modes.append(any(layer.training for layer in self.model.backbone.modules()))

    monkeypatch.setattr(Segmenter, "on_before_zero_grad", on_before_zero_grad)
    path = swin if kind == "swin" else pretraining_checkpoint(tmp_path / "resnet.ckpt")
    config = config_of(
        shapes, f"checkpoint={path}", "freeze_backbone=true", "decoder=auto", "trainer.max_steps=4"
    )
    run(config, tmp_path / "run")
    end = last(tmp_path / "run")
    assert modes == [False] * 4
    assert end["hyper_parameters"]["decoder"]["name"] == "linear"
    for name, value in encoder_of(path).state_dict().items():
        assert torch.equal(end["state_dict"][f"model.backbone.{name}"], value), name
    assert len(end["optimizer_states"][0]["state"]) == len(
        [
            name
            for name in end["state_dict"]
            if name.startswith("model.decoder") and name.endswith(("weight", "bias"))
        ]
    )


def test_a_decoder_starts_the_same_with_and_without_a_checkpoint(shapes, swin):
    decoders = []
    for overrides in ([f"checkpoint={swin}"], ["checkpoint=null", "backbone=swin_v2_tiny_patch2"]):
        segmenter = segmenter_of(config_of(shapes, *overrides))
        decoders.append(segmenter.model.decoder.state_dict())
        assert segmenter.hparams["optimizer"]["layer_decay"] == (
            1.0 if "checkpoint=null" in overrides else 0.9
        )
    assert all(torch.equal(value, decoders[1][name]) for name, value in decoders[0].items())


def test_the_loss_is_the_mean_over_pixels_that_have_a_class():
    logits, classes = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    classes[0, :2] = 255
    kept = classes != 255
    rows = logits.permute(0, 2, 3, 1)[kept].double()
    expected = -(rows[torch.arange(len(rows)), classes[kept]] - rows.exp().sum(dim=1).log()).mean()
    assert float(pixel_cross_entropy(logits, classes, 255)) == pytest.approx(
        float(expected), abs=1e-6
    )
    assert float(pixel_cross_entropy(logits, torch.full_like(classes, 255), 255)) == 0.0


def test_a_class_that_is_left_out_is_never_predicted():
    segmenter = Segmenter(
        {"name": "resnet_tiny", "stem": "cifar"}, {"name": "linear"}, {}, 3, 0, False, 32, ["a", "b", "c"], [0.5] * 3, [1.0] * 3
    )  # fmt: skip
    assert not (segmenter.logits(torch.randn(2, 3, 16, 16)).argmax(dim=1) == 0).any()


MISTAKES = [
    (["checkpoint={swin}", "backbone.window_size=0"],
     "backbone.window_size=0: expected a whole number of cells from 1 to 64, or a list of four, one for each stage"),
    (["checkpoint={swin}", "backbone.window_size=65"], "backbone.window_size=65: expected a whole number of cells from 1 to 64"),
    (["checkpoint={swin}", "backbone.window_size=many"], "backbone.window_size=many: expected a whole number of cells from"),
    (["checkpoint={swin}", "backbone=resnet_tiny"],
     "checkpoint={swin}: of another architecture: backbone.name: swin_v2_tiny_patch2 there, resnet_tiny here; backbone.stem:"),
    (["checkpoint={swin}", "backbone.num_heads=6"],
     "checkpoint={swin}: of another architecture: backbone.num_heads: None there, 6 here"),
    (["checkpoint={resnet}", "backbone.window_size=18"], "backbone.window_size=18: this backbone has no attention windows"),
    (["checkpoint={resnet}", "backbone.stochastic_depth=0.1"],
     "backbone.stochastic_depth=0.1: resnet_tiny has no such setting (it has stem"),
    (["checkpoint=nowhere.ckpt"], "checkpoint=nowhere.ckpt: no such file"),
    (["checkpoint={shapes}/masks/val/00.png"], "checkpoint={shapes}/masks/val/00.png: damaged, or no checkpoint at all"),
    (["checkpoint=null"], "backbone: missing; without a checkpoint give backbone=NAME"),
    (["checkpoint=null", "backbone=resnet_tiny", "image_size=null"],
     "image_size: missing; without a checkpoint give image_size=PIXELS"),
    (["checkpoint={swin}", "image_size=12"], "image_size=12: expected at least 16, a cell of the backbone's last map"),
    (["checkpoint={swin}", "data.root=nowhere"], "data.root=nowhere: no such folder"),
    (["checkpoint={swin}", "data.num_classes=2"],
     "{shapes}/masks/train/01.png: holds the number 2, and data.num_classes says 2 classes, 0 to 1 (and 11 more like it)"),
    (["checkpoint={swin}", "data.ignore_index=65536"], "data.ignore_index=65536: "),
    (["checkpoint={swin}", "data.batch_size=25"], "data.batch_size=25: there are only 24 images to train on"),
    (["checkpoint={swin}", "decoder=fcn", "decoder.channels=64"], "decoder.channels=64: the decoder fcn has no such setting"),
    (["checkpoint={swin}", "resume={swin}"],
     "resume={swin}: the checkpoint is of another model or optimizer: backbone.pretrained_window_size:"),
    (["checkpoint={swin}", "trainer.devices=2"], "trainer.devices=2: moco.segment trains on one device"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "expected"), MISTAKES, ids=lambda value: " ".join(value)[-40:]
)
def test_a_mistake_is_found_before_the_run_folder_is_touched(
    overrides, expected, shapes, swin, tmp_path
):
    resnet = pretraining_checkpoint(tmp_path / "resnet.ckpt") if "resnet}" in overrides[0] else None
    places = {"swin": swin, "resnet": resnet, "shapes": shapes}
    with pytest.raises(InputError) as error:
        run(config_of(shapes, *(word.format(**places) for word in overrides)), tmp_path / "run")
    assert str(error.value).startswith(expected.format(**places))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_library_that_is_missing_is_named_before_the_data_are_read(
    shapes, swin, tmp_path, monkeypatch
):
    import sys

    for name in [name for name in sys.modules if name.startswith("segmentation_models_pytorch")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(
        InputError,
        match=r"decoder=upernet: .* is not installed: pip install moco-ssl\[segment\]; decoder=fcn",
    ):
        run(config_of(shapes, f"checkpoint={swin}", "decoder=auto", "data.root=nowhere"), tmp_path)


def test_the_program_sweeps_and_a_mistake_is_one_line_and_exit_code_2(shapes, tmp_path):
    image = shapes / "images/val/00.png"
    bad = tmp_path / "bad"
    save(bad / "images/train/a.png", np.zeros((8, 8, 3), np.uint8))
    save(bad / "masks/train/a.png", np.zeros((8, 9), np.uint8))
    assert image.is_file()
    done = run_program(
        "moco.segment", "-m", *SMALL, *FROM_SCRATCH, f"data.root={bad},{shapes}", "trainer.max_steps=1",
        "hydra.sweep.dir=sweep", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert (
        done.stderr
        == f"error: {bad}/images/train/a.png: the only image; at least one more is needed, to hold out\n"
    )
    jobs = [json.loads(path.read_text()) for path in (tmp_path / "sweep").glob("*/status.json")]
    assert sorted(job["exit_code"] for job in jobs) == [0, 2]
    assert len(list((tmp_path / "sweep").glob("*/metrics.json"))) == 1
