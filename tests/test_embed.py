"""Features of any pictures in one file."""

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

from moco.config.parsing import CONFIG_DIR, parse, register_schemas
from moco.config.pretrained import EmbedConfig
from moco.data.datasets import FilePictures, build_source
from moco.data.views import build_evaluation_view
from moco.embed import run
from moco.errors import InputError
from moco.methods.moco import MoCo
from moco.methods.pretrained import load_encoder
from moco.models.swin import rewindow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of an untrained small Swin V2, as training writes it."""
    torch.manual_seed(0)
    hparams = {
        "backbone": {"name": "swin_v2_tiny_patch2", "window_size": 2},
        "optimizer": {"name": "adamw"},
        "projector": {"num_layers": 2},
        "predictor": {"num_layers": 0},
        "queue_size": 8,
    }
    config = {
        "data": {"name": "digits", "root": None, "image_size": 32, "crop_ratio": 1.0, "num_images": 1024},
        "augmentation": {"mean": [0.5] * 3, "std": [0.5] * 3},
        "evaluation": {},
    }
    path = tmp_path_factory.mktemp("checkpoint") / "last.ckpt"
    made = MoCo(**hparams)
    for name, parameter in made.named_parameters():
        if "norm" in name or "cpb_mlp" in name:  # an untrained block is the identity, whatever its window
            torch.nn.init.normal_(parameter, std=0.5)
    state = {"state_dict": made.state_dict(), "hyper_parameters": dict(made.hparams), "config": config}
    torch.save(state | {"figures": {}, "random_states": [], "global_step": 0}, path)
    return path


def embed(checkpoint, folder, *overrides):
    register_schemas()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        config = parse(
            compose(
                "embed", [f"checkpoint={checkpoint}", f"output={folder / 'f.npz'}", "data.num_workers=0", *overrides]
            ),
            EmbedConfig,
        )
    run(config, folder / "run")
    with np.load(folder / "f.npz") as file:
        return dict(file)


@torch.no_grad()
def features(checkpoint, pictures, places, image_size, feature, window=2):
    """Of pictures by their places, one at a time."""
    encoder = load_encoder(torch.load(checkpoint), "query", "")
    rewindow(encoder.backbone, window)
    view = build_evaluation_view(image_size, 1.0, [0.5] * 3, [0.5] * 3)
    return torch.cat([encoder.encode(view(pictures[place])[None], feature) for place in places])


def test_features_names_and_labels_go_together(checkpoint, tmp_path):
    test = embed(checkpoint, tmp_path, "split=test", "feature=embedding", "batch_size=100")
    queries = build_source("digits").queries
    assert test["labels"].tolist() == queries.labels.tolist()
    assert test["names"].tolist() == [f"digits: test_images[{index}]" for index in range(360)]
    expected = features(checkpoint, queries.pictures, (0, 1, 359), 32, "embedding")
    torch.testing.assert_close(torch.from_numpy(test["features"][[0, 1, 359]]), expected)


def test_files_are_named_by_their_paths_and_the_unreadable_are_left_out(checkpoint, tmp_path, picture_tree):
    (picture_tree / "a" / "broken.png").write_bytes(b"no picture")
    given = [f"data.root={picture_tree}", "data=images", "data.max_bad_fraction=0.1", "data.image_size=40"]
    found = embed(checkpoint, tmp_path, *given)
    assert found["features"].shape == (24, 256)
    assert "labels" not in found
    assert found["names"].tolist() == sorted(str(path) for path in picture_tree.rglob("[0-9]*.png"))
    widened = embed(checkpoint, tmp_path, *given, "backbone.window_size=5")
    pictures = FilePictures(found["names"].tolist())
    for file, window in ((found, 2), (widened, 5)):
        expected = features(checkpoint, pictures, range(24), 40, "backbone", window)
        torch.testing.assert_close(torch.from_numpy(file["features"]), expected)
    assert not np.allclose(found["features"], widened["features"], atol=1e-3)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["output=features.npy"], "output=features.npy: expected a file that ends in .npz"),
        (["backbone.window_size=0"], "backbone.window_size=0: expected a whole number of cells from 1 to 64"),
        (["data=images", "data.root=nowhere"], "data.root=nowhere: no such folder"),
        (["output=/dev/null/f.npz"], "output=/dev/null/f.npz: cannot write to /dev/null"),
    ],
)
def test_mistakes_are_named(checkpoint, tmp_path, overrides, message):
    with pytest.raises(InputError) as error:
        embed(checkpoint, tmp_path, *overrides)
    assert str(error.value).startswith(message)


def test_a_set_without_held_out_pictures_has_no_test_split(checkpoint, tmp_path, picture_tree):
    with pytest.raises(InputError, match="split=test: data=images has no pictures that are held out"):
        embed(checkpoint, tmp_path, "data=images", f"data.root={picture_tree}", "split=test")
