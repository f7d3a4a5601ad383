"""A decoder that was pretrained with the backbone: who takes it over, and who leaves it out."""

import logging
import sys

import pytest
import torch

import moco
from moco.cli.starting_backbone import find_backbone
from moco.cli.starting_decoder import find_decoder
from moco.errors import InputError
from moco.methods.moco import MoCo
from moco.runs.checkpoint_files import read_checkpoint
from moco.segment import run
from moco.weights.backbone_files import write_backbone_file
from moco.weights.init_from import start_from
from moco.weights.pretrained_decoder import decoder_in
from moco.weights.weight_files import WeightFile
from tests.conftest import thinned
from tests.segmentation.shapes import draw_shapes
from tests.segmentation.test_segment import (
    config_of,
    figures_in,
    last_checkpoint,
    pretraining_checkpoint,
    segmenter_of,
)

pytest.importorskip("segmentation_models_pytorch")

DENSE = ["method.dense_weight=0.5", "method.decoder=fpn", "method.decoder_channels=128"]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return draw_shapes(tmp_path_factory.mktemp("data"), num_train=8, num_val=4)


@pytest.fixture(scope="module")
def swin(tmp_path_factory):
    """A checkpoint of a small Swin V2 with an FPN of 128 channels, different in both encoders."""
    path = tmp_path_factory.mktemp("pretrained") / "swin.ckpt"
    return pretraining_checkpoint(path, "backbone=swin_v2_tiny_patch2", *DENSE)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A checkpoint without a decoder."""
    return pretraining_checkpoint(tmp_path_factory.mktemp("plain") / "plain.ckpt")


def decoder_of(shapes, path, *overrides):
    """The decoder that fine-tuning starts with, from the checkpoint and a config."""
    config = config_of(shapes, f"checkpoint={path}", *overrides)
    return segmenter_of(config).model.decoder


@pytest.mark.parametrize(("name", "which"), thinned([("fpn", "key"), ("auto", "query")], every=2))
def test_fine_tuning_starts_with_the_decoder_of_its_encoder(name, which, shapes, swin, caplog):
    caplog.set_level(logging.INFO)
    decoder = decoder_of(shapes, swin, f"decoder={name}", f"encoder={which}")
    pretrained = read_checkpoint(swin)["state_dict"]
    taken = 0
    for key, tensor in decoder.state_dict().items():
        if not key.startswith("head."):
            assert torch.equal(tensor, pretrained[f"{which}_encoder.decoder.{key}"]), key
            taken += 1
    assert taken == sum(key.startswith(f"{which}_encoder.decoder.") for key in pretrained)
    assert decoder.decoder.dropout.p == 0.2
    line = "decoder: the pretrained fpn of the checkpoint, 128 channels wide, with a new head"
    assert caplog.messages.count(line) == 1


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (["decoder=fpn", "decoder.channels=128", "decoder.from_checkpoint=false"], "fpn"),
        (["decoder=auto", "decoder.from_checkpoint=false"], "upernet"),
        (["decoder=auto", "freeze_backbone=true"], "linear"),
        (["decoder=unet", "decoder.channels=128"], "unet"),
    ],
)
def test_other_decoders_and_refused_ones_are_new(overrides, name, shapes, swin):
    config = config_of(shapes, f"checkpoint={swin}", *overrides)
    found = find_decoder(config, find_backbone(config))
    assert (found.name, found.pretrained) == (name, None)


@pytest.mark.slow
def test_a_new_decoder_is_the_same_with_and_without_a_pretrained_one_in_the_file(shapes, swin):
    settings = ["decoder=fpn", "decoder.channels=128"]
    new = decoder_of(shapes, swin, *settings, "decoder.from_checkpoint=false")
    scratch = ["backbone=swin_v2_tiny_patch2", *settings]
    expected = decoder_of(shapes, "null", *scratch).state_dict()
    head = decoder_of(shapes, swin, *settings).head
    assert torch.equal(head.weight, expected["head.weight"])
    for key, tensor in new.state_dict().items():
        assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize(
    ("file", "overrides", "expected"),
    [
        (
            "swin",
            ["decoder=fpn", "decoder.channels=256"],
            "decoder.channels=256: the pretrained decoder of checkpoint={path} has 128; leave "
            "decoder.channels out, or give decoder.from_checkpoint=false for a new decoder",
        ),
        (
            "swin",
            ["decoder=unet", "decoder.from_checkpoint=true"],
            "decoder.from_checkpoint=true: checkpoint={path} holds no pretrained decoder of the "
            "kind unet; a run of moco.train with method.dense_weight=0.5 method.decoder=fpn leaves "
            "one in its last.ckpt, not in backbone.pth",
        ),
        (
            "plain",
            ["decoder=fpn", "decoder.from_checkpoint=true"],
            "decoder.from_checkpoint=true: checkpoint={path} holds no pretrained decoder of the "
            "kind fpn; a run of moco.train with method.dense_weight=0.5 method.decoder=fpn leaves "
            "one in its last.ckpt, not in backbone.pth",
        ),
        (
            None,
            ["decoder=fpn", "decoder.from_checkpoint=true", "backbone=resnet_tiny"],
            "decoder.from_checkpoint=true: checkpoint=null has no decoder",
        ),
    ],
)
def test_a_decoder_that_cannot_be_taken_over_is_named(file, overrides, expected, shapes, request):
    path = "null" if file is None else request.getfixturevalue(file)
    with pytest.raises(InputError) as error:
        decoder_of(shapes, path, *overrides)
    assert str(error.value) == expected.format(path=path)


def test_a_decoder_of_another_backbone_is_named(shapes, swin, tmp_path):
    content = read_checkpoint(swin)
    other = MoCo(**content["hyper_parameters"] | {"backbone": {"name": "resnet_tiny"}})
    state = {
        key: tensor
        for key, tensor in content["state_dict"].items()
        if not key.startswith("query_encoder.decoder.")
    }
    for key, tensor in other.query_encoder.decoder.state_dict().items():
        state[f"query_encoder.decoder.{key}"] = tensor
    path = tmp_path / "mixed.ckpt"
    torch.save(content | {"state_dict": state}, path)
    with pytest.raises(InputError) as error:
        decoder_of(shapes, path, "decoder=fpn")
    start = f"checkpoint={path}: its pretrained decoder does not fit the backbone ("
    end = "more differ); decoder.from_checkpoint=false starts with a new one"
    assert str(error.value).startswith(start)
    assert str(error.value).endswith(end)


@pytest.mark.slow
def test_a_run_says_that_its_decoder_is_pretrained_and_goes_on(shapes, swin, tmp_path):
    for steps in (1, 2):
        overrides = ["decoder=fpn", "image_size=32", f"trainer.max_steps={steps}"]
        run(config_of(shapes, f"checkpoint={swin}", *overrides), tmp_path)
        assert figures_in(tmp_path)["segment/decoder_from_checkpoint"] is True
        end = last_checkpoint(tmp_path)
        assert end["hyper_parameters"]["decoder"] == {"name": "fpn", "channels": 128}
        assert end["global_step"] == steps
    # A checkpoint of moco.segment gives its backbone alone, as before.
    assert decoder_of(shapes, tmp_path / "checkpoints" / "last.ckpt", "decoder=linear")
    config = config_of(shapes, f"checkpoint={tmp_path}/checkpoints/last.ckpt", "decoder=auto")
    assert find_decoder(config, find_backbone(config)).name == "upernet"


# Everyone else needs the encoder alone.


@pytest.mark.parametrize("which", ["query", "key"])
def test_an_encoder_is_loaded_without_the_decoder_and_its_package(which, swin, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    encoder = moco.load_encoder(swin, encoder=which)
    assert (encoder.decoder, encoder.dense_projector) == (None, None)
    assert "decoder" not in caplog.text
    pretrained = read_checkpoint(swin)["state_dict"]
    for key, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, pretrained[f"{which}_encoder.{key}"]), key


@pytest.mark.parametrize("made_up", [{"decoder": "gru"}, {"decoder_channels": "wide"}])
def test_a_decoder_that_no_run_has_is_none(made_up):
    hyper_parameters = {"decoder": "fpn", "decoder_channels": 128} | made_up
    file = WeightFile("a file", {}, {}, hyper_parameters=hyper_parameters)
    assert decoder_in(file, "query") is None


def test_the_backbone_file_holds_no_decoder(swin, tmp_path):
    content = read_checkpoint(swin)
    method = MoCo(**content["hyper_parameters"])
    write_backbone_file(
        tmp_path / "backbone.pth", method, content["config"], {"epoch": 1, "step": 1}
    )
    weights = torch.load(tmp_path / "backbone.pth", weights_only=True)["state_dict"]
    assert weights.keys() == method.query_encoder.backbone.state_dict().keys()
    config = config_of("x", f"checkpoint={tmp_path}/backbone.pth", "decoder=auto")
    assert find_decoder(config, find_backbone(config)).name == "upernet"


def test_a_new_run_starts_with_the_decoder_of_a_file(swin, caplog):
    caplog.set_level(logging.INFO)
    content = read_checkpoint(swin)
    method = MoCo(**content["hyper_parameters"])
    start_from(method, str(swin))
    for key, tensor in method.state_dict().items():
        assert torch.equal(tensor, content["state_dict"][key]), key
    assert "decoder (" in caplog.text
    assert "key encoder's decoder (" in caplog.text
