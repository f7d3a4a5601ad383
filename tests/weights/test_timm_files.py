"""Files that timm wrote, loaded into timm's networks as backbones."""

import logging

import pytest
import torch

import moco
from moco.errors import InputError
from moco.methods.moco import MoCo
from moco.weights.init_from import start_from
from tests.conftest import thinned
from tests.weights.projects import prefixed, randomised, refused

timm = pytest.importorskip("timm")
safetensors = pytest.importorskip("safetensors.torch")

# A convnext keeps a norm in the `head` that holds its classifier, a ViT has positions, a distilled
# DeiT has two classifiers, and a MobileNet's classifier has a name of its own.
NETWORKS = {
    "convnext_atto": ["head.fc.weight", "head.fc.bias"],
    "vit_tiny_patch16_224": ["head.weight", "head.bias"],
    "deit_tiny_distilled_patch16_224": [
        "head.weight",
        "head.bias",
        "head_dist.weight",
        "head_dist.bias",
    ],
    "mobilenetv3_small_050": ["classifier.weight", "classifier.bias"],
}


def networks(fast):
    cases = []
    for model in NETWORKS:
        marks = [] if model == fast else [pytest.mark.slow]
        cases.append(pytest.param(model, marks=marks))
    return cases


def as_saved(state):
    return state


def as_trained(state):
    """Return what timm's train.py saves, from several GPUs."""
    return {"epoch": 7, "arch": "any", "state_dict": prefixed(state), "optimizer": {}}


def features(net, images):
    """Return timm's features: those of the last layer, pooled, without the classifier."""
    return net.forward_head(net.forward_features(images), pre_logits=True)


@pytest.mark.parametrize("model", networks("convnext_atto"))
@pytest.mark.parametrize(
    ("ending", "content"),
    thinned([(".pth", as_trained), (".pth", as_saved), (".safetensors", as_saved)], every=3),
)
def test_the_features_are_timms(model, ending, content, tmp_path, caplog):
    theirs = randomised(timm.create_model(model, num_classes=10))
    path = tmp_path / f"model{ending}"
    if ending == ".safetensors":
        safetensors.save_file(theirs.state_dict(), path, {"format": "pt"})
    else:
        torch.save(content(theirs.state_dict()), path)
    caplog.set_level(logging.INFO)
    encoder = moco.load_encoder(path, name="timm", model=model)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = features(theirs, images)
        torch.testing.assert_close(encoder.encode(images), expected, rtol=1e-6, atol=1e-6)
    (line,) = [line for line in caplog.messages if line.startswith("not used: ")]
    unused = line.removeprefix("not used: ").split(", ")
    assert sorted(unused) == sorted(NETWORKS[model])


def test_a_run_starts_from_timms_weights(tmp_path, caplog):
    theirs = randomised(timm.create_model("convnext_atto", num_classes=0))
    torch.save(theirs.state_dict(), tmp_path / "model.pth")
    method = MoCo({"name": "timm", "model": "convnext_atto"}, queue_size=8)
    caplog.set_level(logging.INFO)
    start_from(method, str(tmp_path / "model.pth"))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = features(theirs, images)
        for encoder in (method.query_encoder, method.key_encoder):
            assert torch.equal(encoder.backbone.eval()(images), expected)
    count = len(theirs.state_dict())
    assert f"init_from={tmp_path}/model.pth: timm; loaded: backbone ({count})" in caplog.messages


@pytest.mark.slow
def test_other_projects_can_hold_a_network_of_timm(tmp_path):
    theirs = randomised(timm.create_model("convnext_atto", num_classes=10))
    torch.save(prefixed(theirs.state_dict(), "backbone."), tmp_path / "model.pth")
    encoder = moco.load_encoder(tmp_path / "model.pth", name="timm:convnext_atto")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(encoder.encode(images), features(theirs, images))


def test_what_does_not_fit_is_one_line(tmp_path):
    path = tmp_path / "model.pth"
    given = {"name": "timm", "model": "convnext_atto"}
    state = timm.create_model("convnext_atto", num_classes=10).state_dict()
    torch.save({**state, "extra.weight": torch.zeros(3)}, path)
    problem = "its weights do not fit backbone=timm: "
    assert refused(path, given) == f"{problem}net.extra.weight (3,) has no counterpart"
    del state["head.norm.bias"]
    torch.save(state, path)
    assert refused(path, given) == f"{problem}net.head.norm.bias (320,) is missing"
    assert refused(path, given | {"model": "convnext_ato"}) == (
        "backbone.model=convnext_ato: timm has no such network; did you mean 'convnext_atto'?"
    )
    # Without its name, no network of timm is guessed.
    assert refused(path).endswith("for a network of timm give backbone=timm backbone.model=NAME)")


def test_positions_for_images_of_another_size_are_named(tmp_path):
    path = tmp_path / "model.pth"
    model = "vit_tiny_patch16_224"
    torch.save(timm.create_model(model, depth=1).state_dict(), path)
    settings = {"name": "timm", "model": model, "image_size": 32, "options": {"depth": 1}}
    with pytest.raises(InputError, match=r"^init_from=.*: its weights are for images of another "):
        start_from(MoCo(settings, queue_size=8), str(path))
    assert refused(path, settings) == (
        "its weights are for images of another size: pos_embed is (1, 197, 192) and should be "
        "(1, 5, 192); give their size, px, as backbone.image_size"
    )
