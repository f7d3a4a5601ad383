"""What a user of ``moco.evaluate evaluation=dense`` sees."""

import json

import numpy as np
import pytest
import torch

from moco.config.pretrained import EvaluateConfig, EvaluateDataConfig, EvaluationConfig
from moco.errors import InputError
from tests.evaluation.test_dense import draw_quarters
from tests.segmentation.shapes import save


@pytest.fixture(scope="module")
def quarters(tmp_path_factory):
    root = draw_quarters(tmp_path_factory.mktemp("quarters"), [(32, 40), (40, 32), (33, 47)] * 4)
    (root / "classes.txt").write_text("wall\ndisc\nsquare\n")
    return root


@pytest.fixture
def evaluated(checkpoint, tmp_path, capsys):
    """Evaluates the checkpoint: the figures, and what was printed."""
    from moco.evaluate import run

    def call(root, data=None, **settings):
        settings = {
            "num_neighbors": 10,
            "temperature": 0.02,
            "batch_size": 16,
            "maps": [1],
        } | settings
        config = EvaluateConfig(
            str(checkpoint),
            EvaluateDataConfig(
                **{"name": "segmentation_folder", "root": str(root), "image_size": 32}
                | (data or {})
            ),
            EvaluationConfig(name="dense", **settings),
            "cpu",
        )
        run(config, tmp_path / "out")
        return json.loads((tmp_path / "out" / "metrics.json").read_text()), capsys.readouterr().out

    return call


def test_figures_protocol_and_classes_are_written_and_shown(evaluated, quarters, checkpoint):
    figures, printed = evaluated(quarters, bank_size=400)
    for kind in ("knn", "linear"):
        ious = [figures[f"dense/{kind}_iou/{name}"] for name in ("wall", "disc", "square")]
        assert figures[f"dense/{kind}_miou"] == pytest.approx(np.mean(ious))
        assert 0.9 < figures[f"dense/{kind}_miou"] < figures[f"dense/{kind}_pixel_accuracy"] <= 1
        assert f"{figures[f'dense/{kind}_miou']:.4f}" in printed
        assert f"{ious[1]:.4f}" in printed
    assert figures | {
        "dense/num_neighbors": 10, "dense/temperature": 0.02, "dense/maps": [1], "dense/bank_size": 400,
        "dense/sampling": "balanced", "dense/seed": 0, "dense/image_size": 32, "dense/num_images": 9, "dense/num_queries": 3,
        "dense/num_classes": 3, "dense/encoder": "query", "data": "segmentation_folder", "checkpoint": str(checkpoint),
    } == figures  # fmt: skip
    assert figures["dense/linear_weight_decay"] in (1e-1, 1e-2, 1e-3, 1e-4)


def test_the_seed_decides_and_a_bank_smaller_than_k_is_said(evaluated, quarters, caplog):
    few = {"bank_size": 9, "num_neighbors": 20}
    first, again, other = (evaluated(quarters, seed=seed, **few)[0] for seed in (0, 0, 1))
    assert first == again
    assert first["dense/knn_pixel_accuracy"] != other["dense/knn_pixel_accuracy"]
    assert first["dense/num_neighbors"] == 9
    assert "evaluation.num_neighbors=20 is more than the bank's 9" in caplog.text


def test_a_class_that_is_nowhere_held_out_or_predicted_is_said(evaluated, quarters):
    (quarters / "classes.txt").write_text("wall\ndisc\nsquare\nghost\n")
    figures, printed = evaluated(quarters, bank_size=400)
    (quarters / "classes.txt").write_text("wall\ndisc\nsquare\n")
    assert figures["dense/knn_iou/ghost"] is None
    assert "not there" in printed


def test_data_that_do_not_suit_are_one_line(evaluated, quarters, tmp_path):
    def error(*arguments, **settings):
        with pytest.raises(InputError) as raised:
            evaluated(*arguments, **settings)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    assert "data=digits: this set has no masks (choices: segmentation_folder, voc2012)" in error(
        quarters, {"name": "digits"}
    )
    assert "evaluation.maps=[7]: expected numbers from 1" in error(quarters, maps=[7])
    save(tmp_path / "bare/images/a.png", np.zeros((8, 8, 3), np.uint8))
    assert "no folder masks in there" in error(tmp_path / "bare")
    for name in "ab":
        save(tmp_path / f"one/images/{name}.png", np.zeros((8, 8, 3), np.uint8))
        save(tmp_path / f"one/masks/{name}.png", np.full((8, 8), 3, np.uint8))
    assert "at least two classes are needed" in error(tmp_path / "one")
    (tmp_path / "one/masks/a.png").unlink()
    assert "a.png: no mask" in error(tmp_path / "one")
    assert "evaluation.index: a setting of evaluation=knn" in error(quarters, index="ivf")


def test_features_that_are_not_finite_name_checkpoint_and_image(
    evaluated, quarters, checkpoint, monkeypatch
):
    from moco.models.backbones import ResNet

    maps = ResNet.feature_maps
    monkeypatch.setattr(
        ResNet,
        "feature_maps",
        lambda self, images: [part * torch.nan for part in maps(self, images)],
    )
    with pytest.raises(
        InputError, match=rf"checkpoint={checkpoint}: the features of .*train/03.png are not finite"
    ):
        evaluated(quarters)
