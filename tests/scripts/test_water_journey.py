"""scripts/water_journey.py: its settings, and that finished backbones are not measured again."""

import json
import sys

import pytest

from moco.models.backbones import build_backbone
from moco.segmentation.decoders import build_decoder
from tests.configs import composed
from tests.conftest import REPOSITORY


@pytest.fixture
def journey(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    import water_journey

    return water_journey


@pytest.fixture
def calls(monkeypatch, journey):
    """The runs that the script asks for; each one's mIoU is its number."""
    pytest.importorskip("segmentation_models_pytorch")
    found = []

    def call(program, name, schema, folder, overrides):
        config = composed(name, *overrides)
        if name == "segment":
            net = build_backbone("resnet_tiny", stem="cifar")
            build_decoder(config.decoder.name, net, 2, config.decoder.channels)
        found.append((name, folder.name))
        return {"segment/miou": len(found), "dense/knn_miou": len(found)}

    monkeypatch.setattr(journey, "call", call)
    return found


@pytest.mark.slow
def test_every_backbone_is_measured_once_and_the_figures_are_enough_to_go_on(
    journey, calls, tmp_path, monkeypatch, capsys
):
    arguments = ["--patches", "p.npy", "--water", "w", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["water_journey.py", *arguments, "--seeds", "2"])
    journey.main()
    assert sum(name == "train" for name, _ in calls) == 4  # two seeds, all bands and three
    assert sum(name == "segment" for name, _ in calls) == 16
    assert len(set(calls)) == len(calls)
    records = json.loads((tmp_path / "journey.json").read_text())
    assert [(record["row"], record["seed"]) for record in records[:4]] == [
        ("7 bands, pretrained", 0),
        ("7 bands, from scratch", 0),
        ("RGB, pretrained", 0),
        ("RGB, from scratch", 0),
    ]
    assert "pretrained" in capsys.readouterr().out
    (tmp_path / "journey.json").write_text(json.dumps(records[:-1]))
    calls.clear()
    journey.main()
    assert [name for name, _ in calls] == ["segment", "segment"]
    monkeypatch.setattr(sys, "argv", ["water_journey.py", *arguments, "--epochs", "3"])
    with pytest.raises(SystemExit, match="figures of other lengths"):
        journey.main()
