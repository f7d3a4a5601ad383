"""The programs take other projects' files of weights."""

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from moco import embed, export
from moco.cli.starting_backbone import find_backbone
from moco.config.pretrained import ExportConfig
from moco.errors import InputError
from moco.weights.load_encoder import load_pretrained
from tests.configs import composed
from tests.weights.projects import as_moby_saves, moby, moco_v2


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """MoCo v2's ResNet-18 as the official code saves it, and torchvision's model of it."""
    path = tmp_path_factory.mktemp("official") / "moco_v2.pth.tar"
    torch.manual_seed(0)
    content, query, _ = moco_v2()
    torch.save(content, path, _use_new_zipfile_serialization=False)
    query.fc = torch.nn.Identity()
    return path, query


def embedded(tmp_path, *overrides):
    """Return the features that moco.embed writes, and the names of their images."""
    output = tmp_path / "x.npz"
    given = [*overrides, f"output={output}", "accelerator=cpu"]
    embed.run(composed("embed", *given), tmp_path / "run")
    with np.load(output) as file:
        return file["features"], file["names"]


def middle_of(path):
    """Return the middle 16 x 16 px of an image of 20 x 16 px, in 0..1."""
    return np.asarray(Image.open(path))[:, 2:18] / 255


IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@pytest.mark.parametrize(
    ("given", "mean", "std"),
    [
        ([], *IMAGENET),
        (
            ["augmentation.mean=[0.5,0.5,0.5]", "augmentation.std=[0.25,0.25,0.25]"],
            [0.5] * 3,
            [0.25] * 3,
        ),
    ],
    ids=["usual", "given"],
)
def test_other_projects_weights_are_embedded_with_imagenets_normalisation(
    given, mean, std, official, image_tree, tmp_path
):
    path, model = official
    data = ["data=images", f"data.root={image_tree}", "data.image_size=16"]
    features, names = embedded(tmp_path, f"checkpoint={path}", *data, *given)
    pixels = np.stack([middle_of(name) for name in names[:3]])
    images = torch.from_numpy((pixels - mean) / std).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        expected = model(images).numpy()
    tolerance = 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(features[:3], expected, rtol=1e-3, atol=tolerance)


def test_the_data_of_other_projects_weights_have_to_be_given(official, tmp_path):
    path, _ = official
    with pytest.raises(InputError) as error:
        embedded(tmp_path, f"checkpoint={path}")
    assert str(error.value) == f"data: missing; {path} does not say it, give data=NAME"


@pytest.mark.slow
def test_other_projects_weights_start_a_segmentation(official):
    path, model = official
    given = [f"checkpoint={path}", "data.root=nowhere"]
    with pytest.raises(InputError) as error:
        find_backbone(composed("segment", *given))
    message = f"image_size: missing; {path} does not say it, give image_size=PIXELS"
    assert str(error.value) == message

    start = find_backbone(composed("segment", *given, "image_size=64"))
    assert (start.settings["name"], start.image_size, start.mean[0]) == ("resnet18", 64, 0.485)
    weights = model.state_dict()
    for name, tensor in start.backbone.state_dict().items():
        assert torch.equal(tensor, weights[name])


def exported(path, tmp_path, *overrides):
    """Export a file to torchvision and return the new file's weights."""
    output = tmp_path / "x.pth"
    given = [f"checkpoint={path}", "format=torchvision", f"output={output}", *overrides]
    export.run(composed("export", *given), tmp_path / "run")
    return torch.load(output, weights_only=True)


@pytest.mark.slow
def test_other_projects_weights_are_exported_to_a_third(official, tmp_path, capsys):
    path, model = official
    with pytest.raises(InputError, match="image_size: missing"):
        exported(path, tmp_path)
    weights = exported(path, tmp_path, "image_size=224", "backbone=resnet18")
    assert "query, epoch 200, step 0" in capsys.readouterr().out
    library_model = torchvision.models.resnet18()
    library_model.fc = torch.nn.Identity()
    library_model.load_state_dict(weights, strict=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(library_model.eval()(images), model(images))


@pytest.mark.slow
def test_a_swin_v2_is_exported_with_the_window_that_its_file_does_not_tell(tmp_path):
    swin = pytest.importorskip("timm").models.swin_transformer_v2.SwinTransformerV2
    with torch.device("meta"):
        model = swin(img_size=256, window_size=8, num_classes=0)
    path = tmp_path / "timm.pth"
    torch.save({name: torch.zeros(x.shape) for name, x in model.state_dict().items()}, path)
    with pytest.raises(InputError, match=r"give backbone\.window_size"):
        exported(path, tmp_path, "image_size=256")
    assert exported(path, tmp_path, "image_size=256", "backbone.window_size=8")


@pytest.mark.slow
def test_checkpoints_of_the_official_moby_code_are_exported(tmp_path, monkeypatch):
    content, _, _ = moby()
    path = tmp_path / "checkpoint.pth"
    output = tmp_path / "x.safetensors"
    as_moby_saves(content, path, monkeypatch)
    export.run(ExportConfig(str(path), "safetensors", str(output), image_size=32), tmp_path / "run")
    exported_again = load_pretrained(str(output), "query", {})
    assert exported_again.settings["window_size"] == [4, 4, 4, 2]
    patches = content["model"]["encoder.patch_embed.proj.weight"]
    assert torch.equal(exported_again.encoder.backbone.features[0][0].weight, patches)
