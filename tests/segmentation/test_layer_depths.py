"""The depth of each layer of a backbone, and the learning rate that follows from it."""

import pytest
import torch

from moco.errors import InputError
from moco.models.backbones import build_backbone
from moco.segmentation.decoders import SegmentationModel, build_decoder
from moco.segmentation.layer_depths import depths_from_the_top
from moco.training.optimizers import build_layered_optimizer


def linear_model(name, freeze_backbone=False, **settings):
    backbone = build_backbone(name, **settings)
    decoder = build_decoder("linear", backbone, num_classes=3)
    return SegmentationModel(backbone, decoder, freeze_backbone)


def depths_by_name(backbone):
    depths = depths_from_the_top(backbone)
    return {name: depths[parameter] for name, parameter in backbone.named_parameters()}


def test_depths_of_swin_count_blocks_from_the_top():
    # It has two blocks in each of four stages.
    depths = depths_by_name(build_backbone("swin_v2_tiny_patch2", window_size=4))
    assert depths["features.0.0.weight"] == 9
    assert depths["features.1.0.mlp.0.weight"] == 8
    assert depths["features.1.1.norm1.bias"] == 7
    assert depths["features.2.reduction.weight"] == 6
    assert depths["features.3.0.attn.qkv.weight"] == 6
    assert depths["features.7.1.attn.logit_scale"] == 1
    assert depths["norm.weight"] == 1
    assert set(depths.values()) == set(range(1, 10))


def test_depths_of_resnet_count_stages_from_the_top():
    depths = depths_by_name(build_backbone("resnet_tiny"))
    assert (depths["conv1.weight"], depths["bn1.bias"]) == (5, 5)
    assert [depths[f"layer{stage}.0.conv1.weight"] for stage in (1, 2, 3, 4)] == [4, 3, 2, 1]


def test_depths_of_vit_count_blocks_from_the_top():
    depths = depths_by_name(build_backbone("vit_tiny_patch4", learned_positions=8))
    for name in ("conv_proj.weight", "class_token", "encoder.pos_embedding"):
        assert depths[name] == 5
    blocks = [depths[f"encoder.layers.encoder_layer_{number}.ln_1.weight"] for number in range(4)]
    assert blocks == [4, 3, 2, 1]
    assert depths["encoder.ln.weight"] == 1


def test_depths_of_vit_without_learned_positions_are_known_too():
    assert depths_by_name(build_backbone("vit_tiny_patch4"))["class_token"] == 5


def test_an_unknown_kind_of_backbone_is_named():
    message = r"optimizer.layer_decay: the layers of Linear are not known; set it to 1"
    with pytest.raises(InputError, match=message):
        depths_from_the_top(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("name", "depth", "weight_decay"),
    [
        ("decoder.layers.0.1.weight", 0, 0.5),
        ("decoder.layers.0.1.bias", 0, 0.0),
        ("backbone.norm.weight", 1, 0.0),
        ("backbone.features.7.1.mlp.0.weight", 1, 0.5),
        ("backbone.features.7.1.attn.logit_scale", 1, 0.0),
        ("backbone.features.7.1.attn.cpb_mlp.0.weight", 1, 0.0),
        ("backbone.features.0.0.weight", 9, 0.5),
    ],
)
def test_every_parameter_has_the_rate_of_its_layer_and_its_weight_decay(name, depth, weight_decay):
    model = linear_model("swin_v2_tiny_patch2", window_size=4)
    depths = depths_from_the_top(model.backbone)
    optimizer = build_layered_optimizer(model, depths, lr=0.1, weight_decay=0.5, layer_decay=0.8)
    parameter = model.get_parameter(name)
    (group,) = [
        group
        for group in optimizer.param_groups
        if any(held is parameter for held in group["params"])
    ]
    assert group["lr"] == pytest.approx(0.1 * 0.8**depth)
    assert group["weight_decay"] == weight_decay
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_the_optimizer_holds_every_trained_parameter_once():
    model = linear_model("swin_v2_tiny_patch2", window_size=4)
    depths = depths_from_the_top(model.backbone)
    optimizer = build_layered_optimizer(model, depths, lr=0.1, weight_decay=0.5, layer_decay=0.8)
    held = []
    for group in optimizer.param_groups:
        held += group["params"]
    assert len(held) == len(set(held))
    assert set(held) == set(model.parameters())


def test_frozen_parameters_are_not_in_the_optimizer():
    model = linear_model("resnet_tiny", freeze_backbone=True)
    optimizer = build_layered_optimizer(model, {}, lr=0.1, weight_decay=0.5, layer_decay=1.0)
    held = set()
    for group in optimizer.param_groups:
        held.update(group["params"])
    assert held == set(model.decoder.parameters())
