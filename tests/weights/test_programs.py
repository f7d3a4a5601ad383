"""The programs take other projects' files of weights."""

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from moco import embed, export, segment
from moco.config.pretrained import EmbedConfig, ExportConfig
from moco.config.segment import SegmentConfig
from moco.errors import InputError
from tests.segmentation.test_segment import composed
from tests.weights.projects import (
    moco_v2,
)


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """MoCo v2's ResNet-18 as the official code saves it, and torchvision's model of it."""
    path = tmp_path_factory.mktemp("official") / "moco_v2.pth.tar"
    torch.manual_seed(0)
    content, query, _ = moco_v2()
    torch.save(content, path, _use_new_zipfile_serialization=False)
    query.fc = torch.nn.Identity()
    return path, query


def test_other_projects_weights_are_embedded_with_imagenets_normalisation(
    official, image_tree, tmp_path
):
    path, model = official
    given = [f"checkpoint={path}", f"output={tmp_path / 'x.npz'}", "accelerator=cpu"]
    with pytest.raises(InputError) as error:
        embed.run(composed("embed", EmbedConfig, *given), tmp_path / "run")
    assert str(error.value) == f"data: missing; {path} does not say it, give data=NAME"
    given += ["data=images", f"data.root={image_tree}", "data.image_size=16"]
    for extra, mean, std in (
        ([], [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        (
            ["augmentation.mean=[0.5,0.5,0.5]", "augmentation.std=[0.25,0.25,0.25]"],
            [0.5] * 3,
            [0.25] * 3,
        ),
    ):
        embed.run(composed("embed", EmbedConfig, *given, *extra), tmp_path / "run")
        with np.load(tmp_path / "x.npz") as file:
            features, names = file["features"], file["names"]
        pixels = (
            np.stack([np.asarray(Image.open(name))[:, 2:18] for name in names[:3]]) / 255
        )  # of 20 x 16, the middle
        images = torch.from_numpy((pixels - mean) / std).permute(0, 3, 1, 2).float()
        with torch.no_grad():
            expected = model(images).numpy()
        np.testing.assert_allclose(
            features[:3], expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max()
        )


def test_other_projects_weights_begin_a_segmentation(official):
    path, model = official
    given = [f"checkpoint={path}", "data.root=nowhere"]
    with pytest.raises(InputError) as error:
        segment.starting_point(composed("segment", SegmentConfig, *given))
    assert (
        str(error.value) == f"image_size: missing; {path} does not say it, give image_size=PIXELS"
    )
    start = segment.starting_point(composed("segment", SegmentConfig, *given, "image_size=64"))
    assert (start.settings["name"], start.image_size, start.mean[0]) == ("resnet18", 64, 0.485)
    weights = model.state_dict()
    assert all(
        torch.equal(tensor, weights[name]) for name, tensor in start.backbone.state_dict().items()
    )


def test_other_projects_weights_are_exported_to_a_third(official, tmp_path, capsys):
    path, model = official
    output = tmp_path / "x.pth"
    given = [f"checkpoint={path}", "format=torchvision", f"output={output}"]
    with pytest.raises(InputError, match="image_size: missing"):
        export.run(composed("export", ExportConfig, *given), tmp_path / "run")
    export.run(
        composed("export", ExportConfig, *given, "image_size=224", "backbone=resnet18"),
        tmp_path / "run",
    )
    assert "query, epoch 200, step 0" in capsys.readouterr().out
    exported = torchvision.models.resnet18()
    exported.fc = torch.nn.Identity()
    exported.load_state_dict(torch.load(output, weights_only=True), strict=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(exported.eval()(images), model(images))


def test_another_projects_swin_v2_is_exported_in_the_window_that_it_does_not_tell(tmp_path, capsys):
    timm = pytest.importorskip("timm")
    path, output = tmp_path / "timm.pth", tmp_path / "x.pth"
    torch.save(timm.create_model("swinv2_tiny_window8_256", num_classes=0).state_dict(), path)
    given = [f"checkpoint={path}", "format=torchvision", f"output={output}", "image_size=256"]
    with pytest.raises(InputError, match=r"give backbone\.window_size"):
        export.run(composed("export", ExportConfig, *given), tmp_path / "run")
    export.run(composed("export", ExportConfig, *given, "backbone.window_size=8"), tmp_path / "run")
    assert output.is_file()
