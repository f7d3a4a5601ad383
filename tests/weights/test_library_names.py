"""Our weights give the same outputs in the other libraries' own models."""

import copy
import functools

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models import swin_transformer, vision_transformer

from moco.errors import InputError
from moco.models.backbones import build_backbone
from moco.models.swin.window_change import rewindow
from moco.weights.architecture import settings_of
from moco.weights.exporting import export_content
from moco.weights.library_names import (
    TIMM_MODELS,
    counterpart,
    pretrained_windows,
    saved_coordinates,
    to_our_names,
    to_timm,
    to_torchvision,
)
from moco.weights.load_encoder import load_pretrained
from tests.conftest import thinned

ABOUT = {
    "image_size": 32,
    "mean": [0.5] * 3,
    "std": [0.3] * 3,
    "encoder": "query",
    "epoch": 3,
    "step": 12,
}
SMALL = ["resnet18", "swin_t", "swin_v2_t", "vit_small"]
EVERY = [
    pytest.param(name, marks=[] if name in SMALL else [pytest.mark.slow]) for name in TIMM_MODELS
]


@functools.cache
def randomised(name, window=None):
    """Return a backbone in eval mode whose every tensor changes the outputs.

    Swin V2 starts as the identity, with almost constant biases. Some of its temperatures are drawn
    beyond their limit, log 100 = 4.6. Training never changes its biases of keys, which stay zero.
    """
    backbone = build_backbone(name, window_size=window)
    for key, tensor in backbone.state_dict().items():
        if key.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.ndim == 1 or key == "class_token":
            tensor.normal_(1 if key.endswith("weight") else 0, 0.3)
        elif key.endswith("logit_scale"):
            tensor.uniform_(0, 6)
        elif "cpb_mlp" in key or key.endswith("relative_position_bias_table"):
            tensor.normal_(0, 0.5)
        if "v2" in name and key.endswith("qkv.bias"):
            _, bias_of_keys, _ = tensor.chunk(3)
            bias_of_keys.zero_()
    return backbone.eval()


def torchvision_swin(name, window):
    """Return torchvision's tiny Swin with another window than its builders have."""
    suffix = "V2" if name.startswith("swin_v2") else ""
    return swin_transformer.SwinTransformer(
        patch_size=[4, 4],
        embed_dim=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=[window, window],
        block=getattr(swin_transformer, f"SwinTransformerBlock{suffix}"),
        downsample_layer=getattr(swin_transformer, f"PatchMerging{suffix}"),
    )


def torchvision_model(name, weights, window=None, image_size=224):
    """Return torchvision's model with the weights and without classifier."""
    # On the meta device, all tensors have to come from the weights.
    with torch.device("meta"):
        if name == "vit_small":
            model = vision_transformer.VisionTransformer(image_size, 16, 12, 12, 384, 1536)
        elif name == "vit_b_16":
            model = torchvision.models.vit_b_16(image_size=image_size)
        elif window is None:
            model = torchvision.models.get_model(name)
        else:
            model = torchvision_swin(name, window)
        if "resnet" in name:
            model.fc = nn.Identity()
        elif "vit" in name:
            model.heads = nn.Identity()
        else:
            model.head = nn.Identity()
    if weights is not None:
        model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


def timm_model(name, weights, **settings):
    if "vit" in name:
        settings["num_heads"] = 12  # timm's own vit_small has 6
    model = pytest.importorskip("timm").create_model(TIMM_MODELS[name], num_classes=0, **settings)
    model.load_state_dict(weights, strict=True)
    return model.eval()


def difference(model, backbone, size):
    """Return the largest difference of the features over the largest feature."""
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = backbone(images)
        got = model(images)
    assert got.shape == (2, backbone.feature_dim)
    return float((got - expected).abs().max() / expected.abs().max())


# With these image sizes nothing is padded; 128 px is the smallest for window 4.
CASES = [("resnet18", None, 65), ("resnet50", None, 64), ("swin_t", 4, 128), ("swin_v2_t", 4, 128)]


@pytest.mark.parametrize(("name", "window", "size"), thinned(CASES, every=3))
def test_torchvisions_own_model_gives_our_outputs(name, window, size):
    backbone = randomised(name, window)
    model = torchvision_model(name, to_torchvision(backbone), window)
    assert difference(model, backbone, size) < 1e-5


@pytest.mark.parametrize(("name", "window", "size"), thinned(CASES, every=3))
def test_timms_own_model_gives_our_outputs(name, window, size):
    backbone = randomised(name, window)
    settings = {"img_size": size, "window_size": window} if window else {}
    model = timm_model(name, to_timm(backbone, size), **settings)
    assert difference(model, backbone, size) < 1e-4


@pytest.mark.slow
@torch.no_grad()
def test_torchvisions_vit_b_16_gives_our_outputs_at_its_own_size():
    backbone = randomised("vit_b_16")
    model = torchvision_model("vit_b_16", to_torchvision(backbone))
    images = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(model(images), backbone(images), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_vit_agrees_at_another_size_in_both_libraries():
    backbone = randomised("vit_small")
    model = torchvision_model("vit_small", to_torchvision(backbone, 64), image_size=64)
    assert difference(model, backbone, 64) < 1e-5
    model = timm_model("vit_small", to_timm(backbone, 64), img_size=64)
    assert difference(model, backbone, 64) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(("partial_patches", "side"), [("complete", 48), ("drop", 32)])
def test_an_incomplete_patch_of_a_vit_counts_as_in_the_backbone(partial_patches, side):
    backbone = build_backbone("vit_small", partial_patches=partial_patches).eval()
    model = torchvision_model("vit_small", to_torchvision(backbone, 40), image_size=side)
    images = torch.randn(1, 3, 40, 40)
    whole_patches = images[..., :32, :32]
    if partial_patches == "complete":
        whole_patches = nn.functional.pad(images, (0, 8, 0, 8))
    torch.testing.assert_close(model(whole_patches), backbone(images), rtol=1e-5, atol=1e-5)


def supervised_vit(side):
    """Return a ViT of torchvision with learned positions and a classifier."""
    model = vision_transformer.VisionTransformer(side * 16, 16, 12, 12, 384, 1536, num_classes=5)
    nn.init.normal_(model.encoder.pos_embedding, std=0.5)
    nn.init.normal_(model.class_token)
    return model.eval()


@torch.no_grad()
@pytest.mark.slow
def test_learned_positions_of_another_library_are_kept_or_refused():
    theirs = supervised_vit(3)
    weights = theirs.state_dict()
    learned = build_backbone("vit_small", learned_positions=3).eval()
    learned.load_state_dict(to_our_names(weights, learned))
    theirs.heads = nn.Identity()
    images = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(learned(images), theirs(images), rtol=1e-5, atol=1e-5)
    exported = torchvision_model("vit_small", to_torchvision(learned, 48), image_size=48)
    torch.testing.assert_close(exported(images), theirs(images), rtol=1e-5, atol=1e-5)

    fixed = build_backbone("vit_small")
    in_timm = to_timm(learned, 48)
    for found in (weights, in_timm):
        with pytest.raises(InputError) as error:
            to_our_names(found, fixed)
        assert str(error.value) == (
            "the weights have learned positions on a grid of 3 x 3 cells, and this backbone has "
            "fixed ones; set backbone.learned_positions=3"
        )


@torch.no_grad()
@pytest.mark.slow
def test_learned_positions_are_resized_to_the_backbones_grid_as_timm_does():
    theirs = supervised_vit(4)
    wider = build_backbone("vit_small", learned_positions=6).eval()
    wider.load_state_dict(to_our_names(theirs.state_dict(), wider))
    same = build_backbone("vit_small", learned_positions=4).eval()
    same.load_state_dict(to_our_names(theirs.state_dict(), same))
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "vit_small_patch16_224", num_classes=0, num_heads=12, img_size=64, dynamic_img_size=True
    )
    model.load_state_dict(to_timm(same, 64))
    images = torch.randn(1, 3, 96, 96)
    for ours in (wider, same):
        torch.testing.assert_close(ours(images), model.eval()(images), rtol=1e-4, atol=1e-4)


def test_our_fixed_positions_are_recognised_in_the_weights_of_others():
    ours = build_backbone("vit_tiny_patch4")
    for there in (to_torchvision, to_timm):
        for image_size in (32, 224):
            assert to_our_names(there(ours, image_size), ours).keys() == ours.state_dict().keys()


@pytest.mark.parametrize(
    ("name", "normaliser"), [("swin_t", {}), ("swin_v2_t", {"pretrained_window_sizes": [4] * 4})]
)
@pytest.mark.slow
def test_timm_agrees_where_it_cuts_the_window_down_to_the_map(name, normaliser):
    """The maps have 16, 8, 4 and 2 cells."""
    backbone = randomised(name, 4)
    model = timm_model(name, to_timm(backbone, 64), img_size=64, window_size=4, **normaliser)
    assert difference(model, backbone, 64) < 1e-4


@pytest.mark.slow
def test_rewindowed_weights_keep_their_biases_in_both_libraries():
    backbone = rewindow(copy.deepcopy(randomised("swin_v2_t", 4)), 8)
    weights = to_torchvision(backbone)
    assert difference(torchvision_model("swin_v2_t", weights), backbone, 256) < 1e-5
    settings = {"img_size": 256, "window_size": 8, "pretrained_window_sizes": [4] * 4}
    assert difference(timm_model("swin_v2_t", to_timm(backbone), **settings), backbone, 256) < 1e-4


def test_torchvisions_own_coordinates_stretch_the_biases():
    """This shows that the test above would find a table normalised by the new window."""
    backbone = rewindow(copy.deepcopy(randomised("swin_v2_t", 4)), 8)
    stretched = saved_coordinates((8, 8), (8, 8))
    weights = to_torchvision(backbone)
    for name in weights:
        if name.endswith("coords_table"):
            weights[name] = stretched
    assert difference(torchvision_model("swin_v2_t", weights), backbone, 128) > 1e-3


@pytest.mark.slow
def test_timm_takes_a_window_for_each_stage():
    backbone = rewindow(copy.deepcopy(randomised("swin_v2_t", 4)), [8, 4, 4, 2])
    settings = {"img_size": 128, "window_size": [8, 4, 4, 2], "pretrained_window_sizes": [4] * 4}
    model = timm_model("swin_v2_t", to_timm(backbone, 128), **settings)
    assert difference(model, backbone, 128) < 1e-4


def shapes(weights):
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


@pytest.mark.parametrize("name", EVERY)
def test_names_and_shapes_are_torchvisions(name):
    theirs = torchvision_model(name, None).state_dict()
    with torch.device("meta"):
        backbone = build_backbone(name, window_size=8 if "v2" in name else None)
    weights = to_torchvision(backbone)
    assert shapes(weights) == shapes(theirs)
    # `weights` brings positions that are not on the meta device, whose values are looked at.
    ours = to_our_names(theirs | weights, backbone)
    assert shapes(ours) == shapes(backbone.state_dict())


@pytest.mark.parametrize("name", EVERY)
def test_names_and_shapes_are_timms(name):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        backbone = build_backbone(name, window_size=8 if "v2" in name else None)
        theirs = timm.create_model(TIMM_MODELS[name], num_classes=0).state_dict()
    weights = to_timm(backbone)
    assert shapes(weights) == shapes(theirs)
    if "vit" in name:
        theirs["pos_embed"] = weights["pos_embed"]
    ours = to_our_names(theirs, backbone)
    assert shapes(ours) == shapes(backbone.state_dict())


@pytest.mark.parametrize("name", thinned(SMALL, every=2))
def test_weights_come_back_to_the_bit(name):
    backbone = randomised(name)
    ours = backbone.state_dict()
    classifier = {"fc.weight": torch.zeros(1), "head.bias": torch.zeros(1)}
    for rename in (to_torchvision, to_timm):
        returned = to_our_names(rename(backbone) | classifier, backbone)
        assert returned.keys() == ours.keys()
        assert all(torch.equal(returned[key], ours[key]) for key in ours)


def test_the_tables_for_torchvision_are_its_own():
    ours = to_torchvision(build_backbone("swin_v2_tiny_patch2", window_size=7))
    theirs = swin_transformer.ShiftedWindowAttentionV2(8, [7, 7], [0, 0], num_heads=2).state_dict()
    for name in ("relative_coords_table", "relative_position_index"):
        found = ours[f"features.1.0.attn.{name}"]
        torch.testing.assert_close(found, theirs[name], rtol=1e-6, atol=1e-6)


def test_the_pretraining_window_is_read_off_the_coordinates():
    for pretrained in range(2, 65):
        for window in (2, pretrained, 64):
            coordinates = saved_coordinates((window, window), (pretrained, pretrained))
            assert pretrained_windows([coordinates], [1]) == [pretrained]
    assert pretrained_windows([saved_coordinates((1, 1), (1, 1))], [5]) == [5]


def test_weights_of_another_pretraining_window_are_refused():
    weights = to_torchvision(rewindow(build_backbone("swin_v2_tiny_patch2", window_size=4), 8))
    right = build_backbone("swin_v2_tiny_patch2", window_size=8, pretrained_window_size=4)
    right.load_state_dict(to_our_names(weights, right))
    with pytest.raises(InputError) as error:
        to_our_names(weights, build_backbone("swin_v2_tiny_patch2", window_size=8))
    assert str(error.value) == (
        "the weights were pretrained with windows of 4 cells, and pretrained_window_size=8 "
        "would stretch their position biases; set pretrained_window_size=4"
    )


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"name": "resnet18", "stem": "cifar"}, "resnet18 with stem=cifar"),
        ({"name": "resnet18", "stem": "solo_cifar"}, "resnet18 with stem=solo_cifar"),
        ({"name": "resnet_tiny", "stem": None}, "resnet_tiny"),
        ({"name": "swin_v2_tiny_patch2"}, "swin_v2_tiny_patch2"),
        ({"name": "vit_tiny_patch4"}, "vit_tiny_patch4"),
    ],
)
@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_an_architecture_without_counterpart_is_named(settings, named, library):
    with pytest.raises(InputError) as error:
        counterpart(settings, library)
    assert str(error.value) == (
        f"format={library}: {library} has no {named}; "
        "format=safetensors keeps the names of this project"
    )


def test_torchvision_has_one_window_for_all_stages():
    with pytest.raises(InputError) as error:
        to_torchvision(build_backbone("swin_v2_tiny_patch2", window_size=[8, 8, 4, 4]))
    assert str(error.value) == (
        "backbone.window_size=[8, 8, 4, 4]: torchvision's models have one window for all stages; "
        "format=timm and format=safetensors take one for each"
    )


@pytest.mark.parametrize(
    ("settings", "window"),
    thinned(
        [
            ({"name": "resnet_tiny", "stem": "cifar", "window_size": None}, None),
            ({"name": "resnet_tiny", "stem": "solo_cifar"}, None),
            ({"name": "swin_tiny_patch2", "window_size": 4}, 6),
            (
                {"name": "swin_v2_tiny_patch2", "window_size": 4, "stochastic_depth": 0.1},
                [8, 8, 6, 4],
            ),
            (
                {
                    "name": "swin_v2_tiny_patch2",
                    "window_size": 4,
                    "norm": "pre",
                    "attention": "dot",
                },
                8,
            ),
            ({"name": "vit_tiny_patch4", "learned_positions": 5, "num_heads": 2}, None),
        ],
        every=2,
    ),
)
def test_a_file_of_our_own_rebuilds_the_backbone(settings, window, tmp_path):
    pytest.importorskip("safetensors")
    backbone = build_backbone(**settings).eval()
    for tensor in backbone.parameters():
        nn.init.normal_(tensor, std=0.1)
    if window:
        rewindow(backbone, window)
    path = tmp_path / "backbone.safetensors"
    settings = settings_of(backbone, settings)
    path.write_bytes(export_content("safetensors", path, backbone, settings, ABOUT))
    rebuilt = load_pretrained(str(path), "query", {})
    images = torch.randn(2, 3, 40, 33)
    with torch.no_grad():
        assert torch.equal(rebuilt.encoder(images), backbone(images))
    assert rebuilt.config["data"] == {"image_size": 32}
    assert rebuilt.config["augmentation"] == {"mean": [0.5] * 3, "std": [0.3] * 3}
    assert rebuilt.settings.get("window_size") == window
    assert rebuilt.settings.get("pretrained_window_size") == (
        4 if "v2" in settings["name"] else None
    )
