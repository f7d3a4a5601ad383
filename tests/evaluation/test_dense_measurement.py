"""What a user of ``moco.evaluate evaluation=dense`` sees."""

import json

import numpy as np
import pytest
import torch

from moco.config.data import EvaluateDataConfig
from moco.config.pretrained import EvaluateConfig, EvaluationConfig
from moco.errors import InputError
from tests.evaluation.dense_images import draw_halves
from tests.segmentation.shapes import save


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    root = draw_halves(tmp_path_factory.mktemp("halves"), [(32, 40), (40, 32), (33, 47)] * 4)
    (root / "classes.txt").write_text("wall\ndisc\nsquare\n")
    return root


@pytest.fixture
def evaluate(checkpoint, tmp_path, capsys):
    """A function that evaluates the checkpoint and returns figures and printed text."""
    from moco.evaluate import run

    def call(root, data="segmentation_folder", **settings):
        defaults = {"num_neighbors": 10, "temperature": 0.02, "batch_size": 16, "maps": [1]}
        config = EvaluateConfig(
            str(checkpoint),
            EvaluateDataConfig(name=data, root=str(root), image_size=32),
            EvaluationConfig(name="dense", **(defaults | settings)),
            "cpu",
        )
        run(config, tmp_path / "out")
        figures = json.loads((tmp_path / "out" / "metrics.json").read_text())
        return figures, capsys.readouterr().out

    return call


def test_figures_protocol_and_classes_are_written_and_shown(evaluate, halves, checkpoint):
    figures, printed = evaluate(halves, bank_size=400)
    for kind in ("knn", "linear"):
        ious = [figures[f"dense/{kind}_iou/{name}"] for name in ("wall", "disc", "square")]
        miou = figures[f"dense/{kind}_miou"]
        assert miou == pytest.approx(np.mean(ious))
        assert 0.9 < miou < figures[f"dense/{kind}_pixel_accuracy"] <= 1
        assert f"{miou:.4f}" in printed
        assert f"{ious[1]:.4f}" in printed
    protocol = {
        "dense/num_neighbors": 10,
        "dense/temperature": 0.02,
        "dense/maps": [1],
        "dense/bank_size": 400,
        "dense/sampling": "balanced",
        "dense/seed": 0,
        "dense/image_size": 32,
        "dense/num_images": 9,
        "dense/num_queries": 3,
        "dense/num_classes": 3,
        "dense/encoder": "query",
        "data": "segmentation_folder",
        "checkpoint": str(checkpoint),
    }
    assert figures | protocol == figures
    assert figures["dense/linear_weight_decay"] in (1e-1, 1e-2, 1e-3, 1e-4)


@pytest.mark.slow
def test_the_seed_decides_and_a_bank_smaller_than_k_is_named(evaluate, halves, caplog):
    small = {"bank_size": 9, "num_neighbors": 20}
    first, _ = evaluate(halves, seed=0, **small)
    again, _ = evaluate(halves, seed=0, **small)
    other, _ = evaluate(halves, seed=1, **small)
    assert first == again
    assert first["dense/knn_pixel_accuracy"] != other["dense/knn_pixel_accuracy"]
    assert first["dense/num_neighbors"] == 9
    assert "evaluation.num_neighbors=20 is more than the bank's 9" in caplog.text


def test_a_class_that_is_neither_held_out_nor_predicted_has_no_figure(evaluate, halves):
    (halves / "classes.txt").write_text("wall\ndisc\nsquare\nghost\n")
    figures, printed = evaluate(halves, bank_size=400)
    (halves / "classes.txt").write_text("wall\ndisc\nsquare\n")
    assert figures["dense/knn_iou/ghost"] is None
    assert "not there" in printed


def write_pair(root, name, mask):
    save(root / f"images/{name}.png", np.zeros((8, 8, 3), np.uint8))
    save(root / f"masks/{name}.png", mask)


def test_data_that_cannot_be_used_are_one_line(evaluate, halves, tmp_path):
    save(tmp_path / "bare/images/a.png", np.zeros((8, 8, 3), np.uint8))
    for name in "ab":
        write_pair(tmp_path / "one class", name, np.full((8, 8), 3, np.uint8))
        write_pair(tmp_path / "no mask", name, np.eye(8, dtype=np.uint8))
    (tmp_path / "no mask/masks/a.png").unlink()

    mistakes = [
        (halves, {"data": "digits"}, "data.name: unknown dataset with masks 'digits'"),
        (halves, {"maps": [7]}, "evaluation.maps=[7]: expected numbers from 1"),
        (halves, {"index": "ivf"}, "evaluation.index: a setting of evaluation=knn"),
        (tmp_path / "bare", {}, "there is no folder masks in it"),
        (tmp_path / "one class", {}, "at least two classes are needed"),
        (tmp_path / "no mask", {}, "a.png: there is no mask"),
    ]
    for root, settings, message in mistakes:
        with pytest.raises(InputError) as error:
            evaluate(root, **settings)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_features_that_are_not_finite_name_checkpoint_and_image(
    evaluate, halves, checkpoint, monkeypatch
):
    from moco.models.resnet import ResNet

    original = ResNet.feature_maps

    def broken(self, images):
        return [part * torch.nan for part in original(self, images)]

    monkeypatch.setattr(ResNet, "feature_maps", broken)
    message = rf"checkpoint={checkpoint}: the features of .*train/03.png are not finite"
    with pytest.raises(InputError, match=message):
        evaluate(halves)
