"""moco.export, and the attention windows that evaluate and export change."""

import dataclasses
import hashlib
import json
import sys

import pytest
import torch

from moco.config.data import EvaluateDataConfig
from moco.config.pretrained import (
    EvaluateConfig,
    EvaluationConfig,
    ExportConfig,
    PretrainedBackboneConfig,
)
from moco.errors import InputError, RunError
from moco.export import run
from moco.extras import install_command
from moco.models.backbones import build_backbone
from moco.models.swin.window_change import rewindow
from moco.weights.exporting import deviation, export_content, loading_lines
from moco.weights.load_encoder import load_pretrained
from tests.configs import composed
from tests.conftest import run_program, thinned

SMALL_SWIN = ["backbone=swin_v2_tiny_patch2", "data=synthetic", "data.image_size=32"]


def write_checkpoint(runner, path, *overrides):
    """Write a checkpoint as training does, of untrained encoders whose every tensor matters.

    The key encoder's backbone is half of the query encoder's.
    """
    config = runner.config(*overrides)
    method = runner.method(config)
    for name, tensor in method.query_encoder.named_parameters():
        if tensor.ndim == 1 or "cpb_mlp" in name:
            torch.nn.init.normal_(tensor, 0.5, 0.3)
    query_parameters = method.query_encoder.backbone.parameters()
    key_parameters = method.key_encoder.backbone.parameters()
    with torch.no_grad():
        for query, key in zip(query_parameters, key_parameters, strict=True):
            key.copy_(query / 2)
    checkpoint = {
        "state_dict": method.state_dict(),
        "hyper_parameters": dict(method.hparams),
        "config": dataclasses.asdict(config),
        "figures": {"epoch": 3},
        "random_states": [],
        "global_step": 12,
    }
    torch.save(checkpoint, path)


CHECKPOINTS = {
    "resnet18": ["backbone=resnet18", "data.image_size=64"],
    "swin_v2_t": ["backbone=swin_v2_t", "backbone.window_size=4", "data.image_size=128"],
    "small_swin": SMALL_SWIN,
    "small_resnet": [],
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder with a checkpoint of each kind."""
    from tests.conftest import Runner

    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    for name, overrides in CHECKPOINTS.items():
        write_checkpoint(Runner(folder), folder / f"{name}.ckpt", *overrides)
    return folder


@pytest.fixture
def exported(checkpoints, tmp_path, monkeypatch, capsys):
    """Return a function that exports a checkpoint in a fresh folder, and returns what is printed."""
    monkeypatch.chdir(tmp_path)

    def call(name, file_format, output, window_size=None, **settings):
        backbone = PretrainedBackboneConfig(window_size=window_size)
        path = str(checkpoints / f"{name}.ckpt")
        config = ExportConfig(path, file_format, output, backbone=backbone, **settings)
        run(config, tmp_path / "run")
        return capsys.readouterr().out

    return call


def backbone_of(checkpoints, name, encoder="query"):
    path = checkpoints / f"{name}.ckpt"
    return load_pretrained(str(path), encoder, {}).encoder.backbone


def loaded_as_printed(printed):
    """Return the model that the printed lines make."""
    lines = [line for line in printed.splitlines() if line.startswith("    ")]
    return loaded_by(line.removeprefix("    ") for line in lines)


def loaded_by(lines):
    names = {}
    exec("\n".join(lines), names)
    return names["model"].eval()


def agree(model, backbone, size, tolerance):
    images = torch.randn(1, 3, size, size)
    with torch.no_grad():
        expected, got = backbone.eval()(images), model(images)
    return (got - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize(
    ("file_format", "output"),
    [
        pytest.param("torchvision", "x.pth", marks=pytest.mark.slow),
        pytest.param("torchvision", "x.safetensors", marks=pytest.mark.slow),
        ("timm", "a b/x.pt"),
        pytest.param("safetensors", "x.safetensors", marks=pytest.mark.slow),
    ],
)
def test_the_printed_lines_load_a_resnet_into_the_other_library(
    checkpoints, exported, file_format, output
):
    if file_format == "timm":
        pytest.importorskip("timm")
    if output.endswith(".safetensors"):
        pytest.importorskip("safetensors")
    printed = exported("resnet18", file_format, output)
    assert agree(loaded_as_printed(printed), backbone_of(checkpoints, "resnet18"), 64, 1e-5)
    assert "note:" not in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file_format", "window", "size", "tolerance"),
    [("torchvision", None, 128, 1e-5), ("timm", 8, 256, 1e-4)],
)
def test_the_printed_lines_load_a_swin_v2_with_its_windows(
    checkpoints, exported, file_format, window, size, tolerance
):
    if file_format == "timm":
        pytest.importorskip("timm")
    printed = exported("swin_v2_t", file_format, "x.pth", window)
    backbone = backbone_of(checkpoints, "swin_v2_t")
    if window:
        rewindow(backbone, window)
    assert agree(loaded_as_printed(printed), backbone, size, tolerance)
    assert f"{size} px" in printed  # the images in proportion to the window
    assert "note:" not in printed


# Of the encoders of segmentation_models_pytorch 0.6.0, with three and four bands: the number of
# their tensors, and a digest of the sorted lines "NAME SHAPE".
SMP_ENCODERS = {
    ("resnet18", 3): (120, "4e568edc4263de83"),
    ("resnet18", 4): (120, "38f563742647c879"),
    ("resnet50", 3): (318, "1e375f1394f2e3a3"),
}


@pytest.mark.parametrize(("name", "bands"), thinned(SMP_ENCODERS, every=3))
def test_the_names_for_smp_are_those_of_its_encoders(name, bands, tmp_path):
    settings = {"name": name} if bands == 3 else {"name": name, "in_channels": bands}
    path = tmp_path / "encoder.pth"
    backbone = build_backbone(**settings)
    path.write_bytes(export_content("smp", path, backbone, settings, {"image_size": 64}))
    weights = torch.load(path, weights_only=True)
    names = sorted(f"{key} {tuple(tensor.shape)}" for key, tensor in weights.items())
    digest = hashlib.blake2b("\n".join(names).encode(), digest_size=8).hexdigest()
    assert (len(weights), digest) == SMP_ENCODERS[name, bands]
    lines = loading_lines("smp", path, backbone, settings, 64)
    assert f'smp.Unet("{name}", encoder_weights=None, in_channels={bands}, classes=2)' in lines[1]
    assert lines[-1].startswith("model.encoder.load_state_dict(torch.load(")


def test_backbones_that_smp_takes_from_timm_are_refused(tmp_path):
    settings = {"name": "wide_resnet50_2"}
    with pytest.raises(InputError, match="format=smp: wide_resnet50_2 is none of the encoders"):
        export_content("smp", tmp_path / "x.pth", None, settings, {"image_size": 64})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file_format", "settings", "image_size", "line"),
    [
        ("torchvision", {}, 48, "image_size=48, "),
        ("timm", {"num_heads": 6, "learned_positions": 2}, 40, "num_heads=6, img_size=48)"),
        ("timm", {"partial_patches": "drop"}, 40, "num_heads=12, img_size=32)"),
    ],
)
def test_the_lines_load_a_vit_for_the_images_of_one_size(
    tmp_path, file_format, settings, image_size, line
):
    if file_format == "timm":
        pytest.importorskip("timm")
    settings = {"name": "vit_small"} | settings
    backbone = build_backbone(**settings)
    torch.nn.init.normal_(backbone.class_token)
    path = tmp_path / "x.pth"
    about = {"image_size": image_size}
    path.write_bytes(export_content(file_format, path, backbone, settings, about))
    lines = loading_lines(file_format, path, backbone, settings, image_size)
    assert any(line in printed for printed in lines)
    assert agree(loaded_by(lines), backbone, backbone.cells(image_size) * 16, 1e-5)


@pytest.mark.slow
def test_the_key_encoder_can_be_exported(checkpoints, exported):
    exported("resnet18", "torchvision", "query.pth")
    exported("resnet18", "torchvision", "key.pth", encoder="key")
    query = torch.load("query.pth", weights_only=True)["conv1.weight"]
    key = torch.load("key.pth", weights_only=True)["conv1.weight"]
    assert torch.equal(key, query / 2)


def test_a_file_of_our_own_says_what_it_is(checkpoints, exported):
    pytest.importorskip("safetensors")
    printed = exported("small_swin", "safetensors", "x.safetensors", 8)
    pretrained = load_pretrained("x.safetensors", "query", {})
    rebuilt = pretrained.encoder
    assert agree(rebuilt, rewindow(backbone_of(checkpoints, "small_swin"), 8), 50, 1e-7)
    assert pretrained.settings == {
        "name": "swin_v2_tiny_patch2",
        "window_size": 8,
        "pretrained_window_size": 4,
    }
    assert (pretrained.epoch, pretrained.step) == (3, 12)
    assert pretrained.config["data"] == {"image_size": 64}
    assert agree(loaded_as_printed(printed), rebuilt, 32, 1e-7)


PADS = "lets the padding take part in attention: its outputs differ from this project's"


@pytest.mark.parametrize(
    ("file_format", "image_size", "note"),
    [
        ("torchvision", 128, None),
        (
            "torchvision",
            144,
            f"for 144 px torchvision pads maps (18 to 20, 9 to 12, 5 to 8 cells) and {PADS}",
        ),
        ("timm", 144, f"for 144 px timm pads maps (18 to 20, 9 to 12, 5 to 8 cells) and {PADS}"),
        ("torchvision", 64, f"for 64 px torchvision pads maps (2 to 4 cells) and {PADS}"),
        ("timm", 64, None),
        (
            "torchvision",
            130,
            f"for 130 px torchvision pads maps (33 to 36, 17 to 20, 9 to 12, 5 to 8 cells) and {PADS}",
        ),
        ("safetensors", 144, None),
    ],
)
def test_a_note_says_where_the_library_differs(file_format, image_size, note):
    with torch.device("meta"):
        backbone = build_backbone("swin_v2_t", window_size=4)
    assert deviation(file_format, backbone, image_size) == note


@pytest.mark.parametrize(
    ("partial_patches", "image_size", "note"),
    [
        ("complete", 224, None),
        (
            "complete",
            565,
            "timm's model takes 576 px and not 565 px; for the same outputs "
            "pad the images with zeros at the right and the bottom",
        ),
        (
            "drop",
            565,
            "timm's model takes 560 px and not 565 px; for the same outputs "
            "crop the images at the right and the bottom",
        ),
    ],
)
def test_a_note_says_which_images_a_vit_takes_there(partial_patches, image_size, note):
    with torch.device("meta"):
        backbone = build_backbone("vit_b_16", partial_patches=partial_patches)
    assert deviation("timm", backbone, image_size) == note
    assert deviation("safetensors", backbone, image_size) is None


NO_MODEL = "format=safetensors keeps the names of this project"


@pytest.mark.parametrize(
    ("name", "file_format", "output", "settings", "expected"),
    [
        ("none", "timm", "x.pth", {}, "checkpoint=CKPT: no such file"),
        ("resnet18", "timm", ".", {}, "output=.: a folder; expected the name of a file"),
        (
            "resnet18",
            "timm",
            "x.ckpt",
            {},
            "output=x.ckpt: unknown ending '.ckpt' of a file for format=timm "
            "(choices: .pt, .pth, .safetensors)",
        ),
        (
            "resnet18",
            "safetensors",
            "x.pth",
            {},
            "output=x.pth: unknown ending '.pth' of a file for format=safetensors "
            "(choices: .safetensors)",
        ),
        (
            "resnet18",
            "timm",
            "occupied/x.pth",
            {},
            "output=occupied/x.pth: cannot write to FOLDER/occupied",
        ),
        (
            "resnet18",
            "timm",
            "occupied/y/x.pth",
            {},
            "output=occupied/y/x.pth: cannot write to FOLDER/occupied",
        ),
        (
            "resnet18",
            "timm",
            "x.pth",
            {"window_size": 18},
            "backbone.window_size=18: this backbone has no attention windows",
        ),
        (
            "small_swin",
            "timm",
            "x.pth",
            {},
            f"format=timm: timm has no swin_v2_tiny_patch2; {NO_MODEL}",
        ),
        (
            "small_resnet",
            "torchvision",
            "x.pth",
            {},
            f"format=torchvision: torchvision has no resnet_tiny; {NO_MODEL}",
        ),
    ],
)
def test_mistakes_are_one_line(
    checkpoints, exported, tmp_path, name, file_format, output, settings, expected
):
    (tmp_path / "occupied").write_text("a file")
    with pytest.raises(InputError) as error:
        exported(name, file_format, output, **settings)
    message = str(error.value).replace(str(checkpoints / f"{name}.ckpt"), "CKPT")
    assert message.replace(str(tmp_path), "FOLDER") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["occupied"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            {"state_dict": {}},
            "holds no tensors by name, neither directly nor in an item state_dict or model",
        ),
        (
            {"random_states": []}
            | {key: {} for key in ("state_dict", "config", "figures")}
            | {"hyper_parameters": {"decoder": {}}, "global_step": 0},
            "not written by moco.train (its hyper_parameters have no backbone)",
        ),
    ],
)
def test_a_checkpoint_of_another_kind_is_named(tmp_path, content, expected):
    path = tmp_path / "x.ckpt"
    torch.save(content, path)
    with pytest.raises(InputError) as error:
        run(ExportConfig(str(path), "torchvision", str(tmp_path / "x.pth")), tmp_path / "run")
    assert str(error.value) == f"checkpoint={path}: {expected}"
    assert [file.name for file in tmp_path.iterdir()] == ["x.ckpt"]


def test_a_full_disk_is_a_failed_run(exported, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moco.runs.atomic_files.write_atomically", fail)
    with pytest.raises(RunError, match="free some space and start again"):
        exported("resnet18", "torchvision", "x.pth")


def test_without_safetensors_the_way_out_is_named(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for name, file_format in (("resnet18", "torchvision"), ("small_swin", "safetensors")):
        with pytest.raises(InputError) as error:
            exported(name, file_format, "x.safetensors")
        assert str(error.value) == f"safetensors is not installed: {install_command('export')}"


def test_the_config_composes_and_names_what_is_missing():
    config = composed(
        "export", "checkpoint=x", "format=timm", "output=y.pth", "backbone.window_size=[18,18,18,9]"
    )
    assert (config.encoder, config.backbone.window_size) == ("query", [18, 18, 18, 9])
    for given, expected in (
        (["format=timm", "output=y"], "checkpoint: missing; give checkpoint=VALUE"),
        (["checkpoint=x", "output=y"], "format: missing; give format=VALUE"),
        (
            ["checkpoint=x", "output=y", "format=tim"],
            "format: unknown value 'tim'; did you mean 'timm'? "
            "(choices: safetensors, smp, timm, torchvision)",
        ),
    ):
        with pytest.raises(InputError) as error:
            composed("export", *given)
        assert str(error.value) == expected


@pytest.mark.slow
def test_the_program_leaves_the_file_and_a_record_of_the_command(checkpoints, tmp_path):
    arguments = [
        f"checkpoint={checkpoints}/resnet18.ckpt",
        "format=torchvision",
        "output=out/x.pth",
    ]
    done = run_program("moco.export", *arguments, "hydra.run.dir=run", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "written to out/x.pth; to load it:\n" in done.stdout
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x.pth"]
    assert "output: out/x.pth" in (tmp_path / "run/.hydra/config.yaml").read_text()


def evaluated(checkpoints, name, tmp_path, image_size, window_size=None):
    from moco.evaluate import run as evaluate

    config = EvaluateConfig(
        str(checkpoints / f"{name}.ckpt"),
        EvaluateDataConfig(image_size=image_size, num_images=20),
        EvaluationConfig(num_neighbors=2, label_free=False, plots=False),
        accelerator="cpu",
        backbone=PretrainedBackboneConfig(window_size=window_size),
    )
    evaluate(config, tmp_path / "run")
    return json.loads((tmp_path / "run" / "metrics.json").read_text())


@pytest.mark.slow
def test_evaluate_looks_through_windows_of_another_size(checkpoints, tmp_path, caplog):
    caplog.set_level("INFO", logger="moco")
    figures = evaluated(checkpoints, "small_swin", tmp_path, image_size=64)
    assert (figures["image_size"], figures["window_size"]) == (64, 4)

    def logged():
        """Return the log without the lines of every evaluation."""
        usual = ("embedded ", "the first images have ", "8 of 10 classes have no image")
        return [text for text in caplog.messages if not text.startswith(usual)]

    (advice,) = logged()
    assert advice.startswith("pretrained on 32 px with window 4; window 8 for 64 px: ")
    assert advice.endswith("backbone.window_size=8")
    caplog.clear()
    figures = evaluated(
        checkpoints, "small_swin", tmp_path, image_size=64, window_size=[8, 8, 8, 4]
    )
    assert (figures["image_size"], figures["window_size"], logged()) == (64, [8, 8, 8, 4], [])
    assert evaluated(checkpoints, "small_swin", tmp_path, image_size=32)["window_size"] == 4
    assert logged() == []


def test_evaluate_says_that_a_resnet_has_no_windows(checkpoints, tmp_path):
    with pytest.raises(InputError) as error:
        evaluated(checkpoints, "small_resnet", tmp_path, image_size=16, window_size=18)
    assert str(error.value) == "backbone.window_size=18: this backbone has no attention windows"


@pytest.mark.parametrize(
    ("file_format", "backbone"),
    [
        ("timm", "resnet18"),
        pytest.param("torchvision", "resnet18", marks=pytest.mark.slow),
        pytest.param("torchvision", "swin_t", marks=pytest.mark.slow),
        pytest.param("timm", "vit_b_16", marks=pytest.mark.slow),
        pytest.param("torchvision", "vit_b_16", marks=pytest.mark.slow),
    ],
)
def test_the_lines_of_a_backbone_of_five_bands_load_it(file_format, backbone, tmp_path):
    built = build_backbone(backbone, in_channels=5).eval()
    path = tmp_path / "x.pth"
    settings = {"name": backbone, "in_channels": 5}
    if "vit" in backbone:
        built = build_backbone(backbone, in_channels=5, learned_positions=14).eval()
        settings["learned_positions"] = 14
    path.write_bytes(export_content(file_format, path, built, settings, {"image_size": 224}))
    model = loaded_by(loading_lines(file_format, path, built, settings, 224))
    images = torch.randn(1, 5, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), built(images), atol=1e-4, rtol=1e-4)
