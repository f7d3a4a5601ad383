"""Other projects' files of weights: each is made here as the project makes it, and gives the outputs of its own model."""

import copy
import functools
import itertools
import logging
import math
import re
import sys
from argparse import Namespace
from collections import OrderedDict
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models import swin_transformer, vision_transformer

from moco.errors import InputError
from moco.methods.moco import MoCo
from moco.models.backbones import build_backbone
from moco.weights.architecture import fitting_backbones, windows_in_name
from moco.weights.backbone_files import read_backbone
from moco.weights.init_from import start_from
from moco.weights.loading import load_pretrained
from moco.weights.reading import read_content, read_weight_file
from moco.weights.recognise import listed, renumber_layers, rows_of_unit_norm
from tests.conftest import run_program
from tests.runs.test_hostile_checkpoints import Calls

C, K = 16, 48


def randomised(module):
    """Every tensor matters, statistics of BatchNorm included."""
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif "position" not in name and "coords" not in name and tensor.ndim == 1:
            tensor.normal_(0 if name.endswith("bias") else 1, 0.3)
        elif "cpb_mlp" in name or name.endswith("position_bias_table"):
            tensor.normal_(0, 0.5)
    return module.eval()


def mlp(*widths, last_norm=False, norm=False, bias=True):
    """Linear layers, ReLU between them."""
    layers = []
    for number, (before, after) in enumerate(itertools.pairwise(widths)):
        is_last = number == len(widths) - 2
        layers.append(nn.Linear(before, after, bias=bias))
        if (is_last and last_norm) or (not is_last and norm):
            layers.append(nn.BatchNorm1d(after, affine=not is_last))
        layers += [] if is_last else [nn.ReLU()]
    return nn.Sequential(*layers)


@functools.cache
def resnet18():
    model = torchvision.models.resnet18(num_classes=C)
    return randomised(model)


def resnet(fc):
    """torchvision's ResNet-18 with another last layer."""
    model = copy.deepcopy(resnet18())
    model.fc = fc
    return model


def query_and_key(build):
    """Two encoders with different weights."""
    query, key = build(), build()
    return randomised(query), randomised(key)


def as_parts(**parts):
    """A state dict as if the modules and tensors were attributes of one module."""
    state = {}
    for name, part in parts.items():
        items = part.state_dict().items() if isinstance(part, nn.Module) else [("", part)]
        state |= {f"{name}.{inner}".rstrip("."): tensor for inner, tensor in items}
    return state


def queue():
    return F.normalize(torch.randn(C, K), dim=0)  # (C, K)


def prefixed(state, prefix="module."):
    return {prefix + name: tensor for name, tensor in state.items()}


def pointer(value):
    return torch.tensor([value])


def official(fc):
    query, key = query_and_key(lambda: resnet(fc()))
    state = as_parts(encoder_q=query, encoder_k=key, queue=queue(), queue_ptr=pointer(32))
    content = {
        "epoch": 200,
        "arch": "resnet18",
        "state_dict": prefixed(state),
        "optimizer": {"state": {}},
    }
    return content, query, key


def moco_v1():
    return official(lambda: nn.Linear(512, C))


def moco_v2():
    return official(lambda: mlp(512, 512, C))


class SplitNorm(nn.BatchNorm2d):
    """Stands for the notebook's, which has a setting more and no tensor."""

    def __init__(self, num_features):
        super().__init__(num_features)
        self.num_splits = 8


def notebook():
    """model_last.pth of the official notebook: torchvision's children with another conv1 and without max-pool."""

    def build():
        whole = torchvision.models.resnet18(num_classes=C, norm_layer=SplitNorm)
        children = dict(whole.named_children())
        children["conv1"] = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        fc = children.pop("fc")
        del children["maxpool"]
        return nn.Sequential(
            OrderedDict({"net": nn.Sequential(*children.values(), nn.Flatten(1), fc)})
        )

    query, key = query_and_key(build)
    state = as_parts(encoder_q=query, encoder_k=key, queue=queue(), queue_ptr=pointer(16))
    return (
        {"epoch": 200, "state_dict": state, "optimizer": {"state": {}, "param_groups": []}},
        query,
        key,
    )


def moco_v3():
    query, key = query_and_key(
        lambda: resnet(mlp(512, 64, C, norm=True, last_norm=True, bias=False))
    )
    predictor = randomised(mlp(C, 64, C, norm=True, bias=False))
    state = as_parts(base_encoder=query, momentum_encoder=key, predictor=predictor)
    return (
        {"epoch": 300, "arch": "resnet18", "state_dict": prefixed(state), "scaler": {"scale": 1.0}},
        query,
        key,
    )


def moco_v3_vit():
    timm = pytest.importorskip("timm")

    def build():
        model = timm.models.vision_transformer.VisionTransformer(
            32, 4, embed_dim=64, depth=4, num_heads=4
        )
        model.head = mlp(64, 32, 32, C, norm=True, last_norm=True, bias=False)
        positions = torch.zeros(1, 65, 64)
        for place in range(64):
            for axis, cell in enumerate(divmod(place, 8)):  # row, then column
                for number in range(16):
                    angle = cell / 10000 ** (number / 16)
                    positions[0, 1 + place, 32 * axis + number] = math.sin(angle)
                    positions[0, 1 + place, 32 * axis + 16 + number] = math.cos(angle)
        model.pos_embed.data = positions
        return model

    query, key = query_and_key(build)
    state = as_parts(
        base_encoder=query, momentum_encoder=key, predictor=mlp(C, 32, C, norm=True, bias=False)
    )
    return {"state_dict": prefixed(state)}, query, key


class MoBYHead(nn.Module):
    """Its numbers begin at 1, and the last layer has none."""

    def __init__(self, before, inside, after):
        super().__init__()
        self.linear_hidden = nn.Sequential(
            nn.Identity(), nn.Linear(before, inside), nn.BatchNorm1d(inside), nn.ReLU(inplace=True)
        )
        self.linear_out = nn.Linear(inside, after)

    def forward(self, x):
        return self.linear_out(self.linear_hidden(x))


def microsoft_names(swin):
    """timm's Swin with the names that Microsoft's has: merging in the stage before, and tables of the windows."""
    state = {}
    for name, tensor in swin.state_dict().items():
        place = re.match(r"layers\.(\d)\.downsample(.*)", name)
        state[f"layers.{int(place[1]) - 1}.downsample{place[2]}" if place else name] = tensor
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(16, 16, 16)
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
    return state


def moby():
    swin = pytest.importorskip("timm").models.swin_transformer.SwinTransformer
    settings = {
        "img_size": 32,
        "patch_size": 2,
        "embed_dim": 32,
        "depths": (2, 2, 2, 2),
        "num_heads": (1, 2, 4, 8),
    }
    encoders = query_and_key(lambda: swin(**settings, window_size=4, num_classes=0))
    heads = query_and_key(lambda: MoBYHead(256, 64, C))
    state = as_parts(
        projector=heads[0], projector_k=heads[1], predictor=MoBYHead(C, 64, C), queue1=queue(), queue2=queue(),
        queue_ptr=pointer(16),
    )  # fmt: skip
    for name, encoder in zip(("encoder.", "encoder_k."), encoders, strict=True):
        state |= prefixed(microsoft_names(encoder), name)
    return {"model": state, "epoch": 299, "config": Namespace(seed=0)}, *map(
        nn.Sequential, encoders, heads
    )


class DenseCLNeck(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = mlp(512, 32, C)
        self.mlp2 = nn.Sequential(nn.Conv2d(512, 32, 1), nn.ReLU(), nn.Conv2d(32, C, 1))

    def forward(self, features):
        return self.mlp(features)


def densecl():
    query, key = query_and_key(lambda: nn.Sequential(resnet(nn.Identity()), DenseCLNeck()))
    state = as_parts(
        encoder_q=query, encoder_k=key, backbone=query[0], queue=queue(), queue_ptr=pointer(8), queue2=queue(),
        queue2_ptr=pointer(24),
    )  # fmt: skip
    return {"meta": {"epoch": 200}, "state_dict": state}, query, key


class Averaged(nn.Module):
    """OpenMMLab's holder of a moving average."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.register_buffer("steps", torch.tensor(5))


class NumberedNeck(nn.Module):
    """Of mmselfsup: fc0, bn0, fc1, bn1."""

    def __init__(self):
        super().__init__()
        self.bn0 = nn.BatchNorm1d(32)
        self.fc0 = nn.Linear(512, 32, bias=False)
        self.bn1 = nn.BatchNorm1d(C, affine=False)
        self.fc1 = nn.Linear(32, C, bias=False)

    def forward(self, x):
        return self.bn1(self.fc1(F.relu(self.bn0(self.fc0(x)))))


def mmselfsup():
    query, key = query_and_key(lambda: nn.Sequential(resnet(nn.Identity()), NumberedNeck()))
    return (
        {"state_dict": as_parts(backbone=query[0], neck=query[1], momentum_encoder=Averaged(key))},
        query,
        key,
    )


def solo_learn():
    backbones = query_and_key(lambda: resnet(nn.Identity()))
    heads = query_and_key(lambda: mlp(512, 32, C))
    state = as_parts(
        backbone=backbones[0], classifier=nn.Linear(512, 10), momentum_backbone=backbones[1], projector=heads[0],
        momentum_projector=heads[1], queue=torch.stack([queue(), queue()]), queue_ptr=pointer(40),
    )  # fmt: skip
    content = {
        "state_dict": state,
        "epoch": 99,
        "hyper_parameters": {},
        "callbacks": {},
        "pytorch-lightning_version": "2.1.2",
    }
    return content, *map(nn.Sequential, backbones, heads)


class LightlyHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = mlp(512, 512, C)

    def forward(self, x):
        return self.layers(x.flatten(1))


def lightly():
    backbones = query_and_key(lambda: nn.Sequential(*list(resnet(nn.Identity()).children())[:-1]))
    heads = query_and_key(LightlyHead)
    state = as_parts(
        backbone=backbones[0], projection_head=heads[0], backbone_momentum=backbones[1],
        projection_head_momentum=heads[1],
    )  # fmt: skip
    state |= {"criterion.memory_bank.bank": queue().T, "criterion.memory_bank.bank_ptr": pointer(4)}
    return {"state_dict": state, "epoch": 3}, *map(nn.Sequential, backbones, heads)


def lightly_with_query_backbone():
    """Of its older benchmarks: backbone is the key encoder's."""
    backbones = query_and_key(lambda: resnet(nn.Identity()))
    heads = query_and_key(LightlyHead)
    state = as_parts(
        query_backbone=backbones[0], query_projection_head=heads[0], backbone=backbones[1], projection_head=heads[1],
        online_classifier=nn.Linear(512, 10),
    )  # fmt: skip
    return {"state_dict": state}, *map(nn.Sequential, backbones, heads)


WITH_HEADS = {
    build.__name__: build
    for build in (
        moco_v1, moco_v2, notebook, moco_v3, moco_v3_vit, moby, densecl, mmselfsup, solo_learn, lightly, lightly_with_query_backbone
    )
}  # fmt: skip


@torch.no_grad()
def assert_same(encoder, model, feature, size=64):
    images = torch.randn(2, 3, size, size)
    expected = model(images)
    got = encoder.encode(images, feature)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("build", WITH_HEADS.values(), ids=WITH_HEADS)
def test_both_encoders_of_a_file_give_the_outputs_of_their_models(build, tmp_path):
    content, query, key = build()
    # The official weights of MoCo v1 and v2 are older than today's format.
    torch.save(
        content, tmp_path / "x.pth", _use_new_zipfile_serialization=build not in (moco_v1, moco_v2)
    )
    size = 32 if build in (moco_v3_vit, moby) else 64
    for which, model in (("query", query), ("key", key)):
        pretrained = load_pretrained(str(tmp_path / "x.pth"), which, {}, "embedding")
        assert_same(pretrained.encoder, model, "embedding", size)
        assert pretrained.config == {}
    assert pretrained.epoch == content.get("epoch", 0)


class CfgNode(dict):
    """Stands for yacs' class of 0.1.8: a dict of settings with attributes of its own, and attribute access."""

    def __init__(self, items, deprecated=()):
        super().__init__(
            {key: CfgNode(value) if type(value) is dict else value for key, value in items.items()}
        )
        self.__dict__ |= {
            "__immutable__": True,
            "__deprecated_keys__": set(deprecated),
            "__renamed_keys__": {"OLD.KEY": "NEW.KEY"} if deprecated else {},
            "__new_allowed__": False,
        }

    def __getattr__(self, name):
        if name in self:
            return self[name]
        raise AttributeError(name)


MOBY_CONFIG = {
    "BASE": [""], "DATA": {"BATCH_SIZE": 64, "IMG_SIZE": 32, "ZIP_MODE": False}, "AMP_OPT_LEVEL": "O1",
    "MODEL": {"TYPE": "moby", "SWIN": {"EMBED_DIM": 32, "DEPTHS": [2, 2, 2, 2], "QK_SCALE": None}},
    "TRAIN": {"BASE_LR": 1e-3, "BETAS": (0.9, 0.999)},
}  # fmt: skip


def as_moby_saves(content, path, monkeypatch, **options):
    """What save_checkpoint of the official code's utils.py writes, by a process that has yacs."""
    schedulers = pytest.importorskip("timm.scheduler")
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    lr_scheduler = schedulers.CosineLRScheduler(optimizer, t_initial=300, lr_min=1e-5, warmup_t=5)
    with monkeypatch.context() as patched:
        patched.setattr(CfgNode, "__module__", "yacs.config")
        patched.setitem(sys.modules, "yacs", ModuleType("yacs"))
        patched.setitem(sys.modules, "yacs.config", sys.modules[__name__])
        state = {
            "model": content["model"],
            "optimizer": optimizer.state_dict(),
            "lr_scheduler": lr_scheduler.state_dict(),
            "max_accuracy": 0.0,
            "epoch": 299,
            "config": CfgNode(MOBY_CONFIG, deprecated=["DATA.OLD", "BASE"]),
        }
        torch.save(state, path, **options)
    assert "yacs" not in sys.modules


@pytest.mark.parametrize("legacy", [False, True])
def test_checkpoints_of_the_official_moby_code_load_without_yacs(legacy, tmp_path, monkeypatch):
    """Their config is a yacs node with a set in its state; its class is not imported, and yacs need not be there."""
    content, query, key = moby()
    path = tmp_path / "checkpoint.pth"
    as_moby_saves(content, path, monkeypatch, _use_new_zipfile_serialization=not legacy)
    assert b"yacs.config" in path.read_bytes()
    read = read_content(path, "x")
    assert type(read["config"]) is OrderedDict
    assert read["config"] == MOBY_CONFIG
    assert vars(read["config"])["__deprecated_keys__"] == {"DATA.OLD", "BASE"}
    assert read["optimizer"]["state"][0]["step"] == 1
    for which, model in (("query", query), ("key", key)):
        pretrained = load_pretrained(str(path), which, {}, "embedding")
        assert_same(pretrained.encoder, model, "embedding", 32)
    assert pretrained.epoch == 299
    assert pretrained.settings["window_size"] == [4, 4, 4, 2]  # the last map is 2 x 2 cells
    new = moby_method()
    start_from(new, str(path))
    assert_same(new.eval().query_encoder, query, "embedding", 32)
    torch.testing.assert_close(new.reverse_queue.keys, content["model"]["queue1"].T)
    assert "yacs" not in sys.modules


def test_programs_take_checkpoints_of_the_official_moby_code(tmp_path, monkeypatch):
    content, _, _ = moby()
    as_moby_saves(content, tmp_path / "checkpoint.pth", monkeypatch)
    done = run_program(
        "moco.export", "checkpoint=checkpoint.pth", "format=safetensors", "image_size=32", "output=x.safetensors",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    backbone, about = read_backbone(tmp_path / "x.safetensors")
    assert about["backbone"]["window_size"] == [4, 4, 4, 2]
    patches = content["model"]["encoder.patch_embed.proj.weight"]
    assert torch.equal(backbone.features[0][0].weight, patches)


def test_settings_of_argparse_are_read_as_a_dict(tmp_path):
    content, _, _ = moby()
    torch.save(content | {"config": Namespace(seed=3)}, tmp_path / "x.pth")
    read = read_content(tmp_path / "x.pth", "x")["config"]
    assert type(read) is OrderedDict
    assert read.seed == 3


def without_classifier(model, attribute):
    model = copy.deepcopy(model)
    setattr(model, attribute, nn.Identity())
    return model


def torchvision_resnet():
    return resnet18().state_dict(), without_classifier(resnet18(), "fc"), {"name": "resnet18"}


def old_torchvision_resnet():
    """Of before PyTorch 0.4.1: BatchNorm without counters."""
    state = {
        name: x for name, x in resnet18().state_dict().items() if "num_batches_tracked" not in name
    }
    return state, without_classifier(resnet18(), "fc"), {"name": "resnet18"}


def torchvision_swin():
    settings = {
        "patch_size": [2, 2],
        "embed_dim": 32,
        "depths": [2] * 4,
        "num_heads": [1, 2, 4, 8],
        "window_size": [4, 4],
    }
    model = randomised(swin_transformer.SwinTransformer(**settings))
    return (
        model.state_dict(),
        without_classifier(model, "head"),
        {"name": "swin_tiny_patch2", "window_size": 4},
    )


def torchvision_swin_v2():
    model = swin_transformer.SwinTransformer(
        patch_size=[2, 2], embed_dim=32, depths=[2] * 4, num_heads=[1, 2, 4, 8], window_size=[4, 4],
        block=swin_transformer.SwinTransformerBlockV2, downsample_layer=swin_transformer.PatchMergingV2,
    )  # fmt: skip
    settings = {"name": "swin_v2_tiny_patch2", "window_size": 4, "pretrained_window_size": 4}
    randomised(model)
    state = model.state_dict()
    for name, tensor in state.items():
        if name.endswith("qkv.bias"):
            tensor[len(tensor) // 3 : 2 * len(tensor) // 3] = 0
    return state, without_classifier(model, "head"), settings


def torchvision_vit():
    model = randomised(vision_transformer.VisionTransformer(64, 4, 4, 4, 64, 256))
    settings = {"name": "vit_tiny_patch4", "learned_positions": 16}
    return {"model": model.state_dict()}, without_classifier(model, "heads"), settings


def timm_vit():
    timm = pytest.importorskip("timm")
    model = randomised(
        timm.models.vision_transformer.VisionTransformer(64, 4, embed_dim=64, depth=4, num_heads=4)
    )
    settings = {"name": "vit_tiny_patch4", "learned_positions": 16}
    return model.state_dict(), without_classifier(model, "head"), settings


def lightly_cifar_resnet():
    """lightly's own ResNet, as its examples cut it: shortcut for downsample, no modules for ReLU and pooling."""
    model = randomised(build_backbone("resnet18", stem="cifar"))
    children = {
        "conv1": "0",
        "bn1": "1",
        "layer1": "2",
        "layer2": "3",
        "layer3": "4",
        "layer4": "5",
    }
    state = {}
    for name, tensor in model.state_dict().items():
        child, _, rest = name.partition(".")
        state[f"backbone.{children[child]}.{rest.replace('downsample', 'shortcut')}"] = tensor
    return {"state_dict": state}, model, {"name": "resnet18", "stem": "cifar"}


BACKBONES_ALONE = {
    build.__name__: build
    for build in (
        torchvision_resnet, old_torchvision_resnet, torchvision_swin, torchvision_swin_v2, torchvision_vit, timm_vit,
        lightly_cifar_resnet,
    )
}  # fmt: skip


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("build", BACKBONES_ALONE.values(), ids=BACKBONES_ALONE)
def test_a_backbone_alone_is_recognised_by_its_tensors(build, ending, tmp_path):
    content, model, settings = build()
    path = tmp_path / f"x.{ending}"
    if ending == "pth":
        torch.save(content, path)
    else:
        content = content.get("state_dict", content.get("model", content))
        contiguous = {name: tensor.contiguous() for name, tensor in content.items()}
        pytest.importorskip("safetensors.torch").save_file(contiguous, path, {"format": "pt"})
    pretrained = load_pretrained(str(path), "query", {})
    assert_same(pretrained.encoder, model, "backbone")
    assert {key: pretrained.settings[key] for key in settings} == settings


def test_the_log_says_what_was_recognised_taken_and_left(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    torch.save(moco_v2()[0], tmp_path / "x.pth")
    load_pretrained(str(tmp_path / "x.pth"), "query", {})
    source = f"checkpoint={tmp_path / 'x.pth'}"
    assert caplog.messages == [
        f"{source}: backbone=resnet18, recognised by its tensors' shapes",
        f"{source}: MoCo v1 or v2 (facebookresearch/moco); backbone resnet18",
        "taken: backbone (120)",
        "not used: projector (4), key encoder's backbone (120), key encoder's projector (4), queue (3)",
        "the file says nothing of images: mean and std are ImageNet's where none are given",
    ]
    torch.save(resnet18().state_dict(), tmp_path / "x.pth")
    caplog.clear()
    load_pretrained(str(tmp_path / "x.pth"), "query", {"name": "resnet18", "stem": "imagenet"})
    assert caplog.messages[:-1] == [
        f"{source}: torchvision or timm ResNet; backbone resnet18 (stem imagenet)", "taken: backbone (120)", "not used: fc.weight, fc.bias",
    ]  # fmt: skip


def test_what_shapes_do_not_show_has_to_be_given(tmp_path):
    timm = pytest.importorskip("timm")
    path = str(tmp_path / "x.pth")

    def complaint(given):
        with pytest.raises(InputError) as error:
            load_pretrained(path, "query", given)
        return str(error.value)

    small = timm.models.vision_transformer.VisionTransformer(
        32, 16, embed_dim=384, depth=12, num_heads=6, num_classes=0
    )
    torch.save(randomised(small).state_dict(), path)
    heads = f"checkpoint={path}: does not say how many heads its attention has; give backbone.num_heads: 6 in DeiT"
    assert complaint({}).startswith(heads)
    assert complaint({"name": "vit_small"}).startswith(heads)
    assert_same(load_pretrained(path, "query", {"num_heads": 6}).encoder, small, "backbone", 32)

    settings = {
        "patch_size": 2,
        "embed_dim": 32,
        "depths": (2,) * 4,
        "num_heads": (1, 2, 4, 8),
        "num_classes": 0,
    }
    swin = randomised(
        timm.models.swin_transformer_v2.SwinTransformerV2(img_size=64, window_size=4, **settings)
    )
    torch.save(swin.state_dict(), path)
    for given in ({}, {"name": "swin_v2_tiny_patch2"}):
        assert (
            "does not say which windows it was pretrained with; give backbone.window_size"
            in complaint(given)
        )
    assert_same(load_pretrained(path, "query", {"window_size": 4}).encoder, swin, "backbone")
    widened = timm.models.swin_transformer_v2.SwinTransformerV2(
        img_size=128, window_size=8, pretrained_window_sizes=[4] * 4, **settings
    ).eval()
    widened.load_state_dict(swin.state_dict())
    given = {"pretrained_window_size": 4, "window_size": 8}
    assert_same(load_pretrained(path, "query", given).encoder, widened, "backbone", 128)


SMALL_V2 = {
    "patch_size": 2,
    "embed_dim": 32,
    "depths": (2,) * 4,
    "num_heads": (1, 2, 4, 8),
    "num_classes": 0,
}


def timm_swin_v2(**settings):
    """A small one whose position biases, norms and temperatures are away from their start."""
    classes = pytest.importorskip("timm.models.swin_transformer_v2")
    model = classes.SwinTransformerV2(**SMALL_V2, **settings)
    return away_from_the_start(model)


def away_from_the_start(model):
    for name, tensor in model.state_dict().items():
        if "logit_scale" in name:
            tensor.uniform_(0, 6)
    return randomised(model)


@torch.no_grad()
def relative_error(encoder, model, size):
    images = torch.randn(1, 3, size, size)
    expected = model(images)
    return float((encoder.encode(images) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    ("name", "size", "pretrained"),
    [
        ("swinv2_tiny_window16_256", 256, [16, 16, 16, 8]),
        ("swinv2_base_window12to16_192to256", 256, [12, 12, 12, 6]),
    ],
)
def test_timms_windows_that_are_larger_than_a_map_load_right_by_their_name(
    name, size, pretrained, tmp_path, caplog
):
    """timm and Microsoft clip a window to its map, and then normalise the position biases by it."""
    caplog.set_level(logging.INFO)
    timm = pytest.importorskip("timm")
    model = away_from_the_start(timm.create_model(name, pretrained=False, num_classes=0))
    path = tmp_path / f"{name}.pth"
    torch.save(model.state_dict(), path)
    loaded = load_pretrained(str(path), "query", {})
    assert loaded.settings["window_size"] == 16
    assert loaded.settings["pretrained_window_size"] == pretrained
    assert (
        f"its name says that it looks through windows of 16, and was pretrained with windows of {pretrained}"
        in caplog.text
    )
    assert relative_error(loaded.encoder, model, size) < 1e-4
    # The control: what was advised before.
    whole = load_pretrained(str(path), "query", {"pretrained_window_size": [max(pretrained)] * 4})
    assert relative_error(whole.encoder, model, size) > 1e-3


def test_clipped_pretraining_windows_are_made_of_an_image_size_or_given(tmp_path):
    """In maps of 16, 8, 4 and 2 cells."""
    path = tmp_path / "x.pth"
    model = timm_swin_v2(img_size=32, window_size=8)
    torch.save(model.state_dict(), path)
    for given in (
        {"window_size": 8, "pretrained_image_size": 32},
        {"window_size": 8, "pretrained_window_size": [8, 8, 4, 2]},
        {"window_size": [8, 8, 4, 2]},
    ):
        loaded = load_pretrained(str(path), "query", given)
        assert loaded.settings["pretrained_window_size"] == [8, 8, 4, 2]
        assert relative_error(loaded.encoder, model, 32) < 1e-4
    assert (
        relative_error(load_pretrained(str(path), "query", {"window_size": 8}).encoder, model, 32)
        > 1e-3
    )


def test_windows_that_may_have_been_clipped_have_to_be_explained(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = tmp_path / "x.pth"
    torch.save(timm_swin_v2(img_size=32, window_size=8).state_dict(), path)
    for given in ({"window_size": 16}, {"window_size": 8, "pretrained_window_size": 16}):
        assert refused(path, given) == (
            "does not say on which images its windows of 16 cells were pretrained, and windows are clipped to smaller maps; "
            "give backbone.pretrained_image_size, which is 256 of timm's swinv2_..._window16_256, and 192 with "
            "backbone.pretrained_window_size=12 of swinv2_..._window12to16_192to256"
        )
    load_pretrained(str(path), "query", {"window_size": 8})
    assert (
        "pretraining windows of 8 cells are taken to fit all maps; if its images were smaller give "
        "backbone.pretrained_image_size"
    ) in caplog.text


def test_microsofts_tables_tell_the_pretraining_windows_of_each_stage(tmp_path):
    model = timm_swin_v2(
        img_size=64, window_size=8, pretrained_window_sizes=(6, 6, 6, 3)
    )  # maps of 32, 16, 8 and 4 cells
    state = microsoft_names(model)
    for name, layer in model.named_modules():
        if name.endswith(".attn"):
            state[f"{name}.relative_coords_table"] = layer.relative_coords_table
    path = tmp_path / "swinv2_tiny_window16_256.pth"  # the tables count more than a name
    torch.save({"model": state}, path)
    loaded = load_pretrained(str(path), "query", {})
    assert loaded.settings["window_size"] == [8, 8, 8, 4]
    assert loaded.settings["pretrained_window_size"] == [6, 6, 6, 3]
    assert relative_error(loaded.encoder, model, 64) < 1e-4
    assert refused(path, {"pretrained_window_size": 6}) == (
        "the weights were pretrained with windows of [6, 6, 6, 3] cells in the four stages, and "
        "pretrained_window_size=[6, 6, 6, 6] would stretch their position biases; set pretrained_window_size=[6,6,6,3]"
    )


def test_the_name_of_a_file_tells_its_windows():
    clipped = {"window_size": 16, "pretrained_window_size": [12, 12, 12, 6]}
    assert windows_in_name("swinv2_base_patch4_window12to16_192to256_22kto1k_ft.pth") == clipped
    assert windows_in_name("swinv2_small_window16_256.safetensors")["pretrained_window_size"] == [
        16,
        16,
        16,
        8,
    ]
    assert windows_in_name("swinv2_tiny_window8_256.pth") == {
        "window_size": 8,
        "pretrained_window_size": [8] * 4,
    }
    assert windows_in_name("swinv2_tiny_window16_512.pth")["pretrained_window_size"] == [16] * 4
    for name in (
        "swinv2_tiny_window8_0.pth",
        "swinv2_tiny_window0_256.pth",
        "swinv2_tiny_window100_256.pth",
    ):
        assert windows_in_name(name) == {}
    for name in ("swin_tiny_patch4_window7_224.pth", "swinv2_cr_tiny_ns_224.pth", "last.ckpt"):
        assert windows_in_name(name) == {}


def test_a_run_starts_from_clipped_windows_or_is_told_which(tmp_path):
    model = timm_swin_v2(img_size=32, window_size=8)

    def start(file_name, **settings):
        path = tmp_path / file_name
        torch.save(model.state_dict(), path)
        new = method(backbone={"name": "swin_v2_tiny_patch2", **settings})
        start_from(new, str(path))
        return new.eval().query_encoder

    assert relative_error(start("x.pth", window_size=8, pretrained_image_size=32), model, 32) < 1e-4
    named = "swinv2_tiny_window16_256.pth"
    for settings in ({}, {"window_size": 16}):
        with pytest.raises(InputError) as error:
            start(named, **settings)
        own = [settings.get("window_size", 4)] * 4
        assert str(error.value) == (
            f"init_from={tmp_path / named}: by its name it was pretrained with windows of [16, 16, 16, 8] cells, and this "
            f"backbone's are {own}; set backbone.window_size=16 backbone.pretrained_window_size=[16,16,16,8]"
        )
    start(named, window_size=16, pretrained_window_size=[16, 16, 16, 8])
    # The image size that is given counts more than the one in the name; its maps are 32, 16, 8 and 4 cells.
    given = {"name": "swin_v2_tiny_patch2", "window_size": 16, "pretrained_image_size": 64}
    loaded = load_pretrained(str(tmp_path / named), "query", given)
    assert loaded.settings["pretrained_window_size"] == [16, 16, 8, 4]
    assert relative_error(start(named, window_size=8, pretrained_image_size=32), model, 32) < 1e-4
    with pytest.raises(
        InputError, match="does not say on which images its windows of 16 cells were pretrained"
    ):
        start("x.pth", window_size=16)


def test_a_swin_takes_another_window_after_loading(tmp_path):
    state, _, _ = torchvision_swin_v2()
    torch.save(state, tmp_path / "x.pth")
    pretrained = load_pretrained(str(tmp_path / "x.pth"), "query", {"window_size": 8})
    assert pretrained.settings["window_size"] == 8
    assert pretrained.settings["pretrained_window_size"] == 4


def refused(path, given=(), which="query", feature="backbone"):
    with pytest.raises(InputError) as error:
        load_pretrained(str(path), which, dict(given), feature)
    message = str(error.value)
    assert message.startswith(f"checkpoint={path}: ")
    assert "\n" not in message
    return message.removeprefix(f"checkpoint={path}: ")


def test_another_architecture_is_named_with_tensor_and_shapes(tmp_path):
    path = tmp_path / "x.pth"
    torch.save(resnet18().state_dict(), path)
    assert refused(path, {"name": "resnet50"}).startswith(
        "its weights do not fit backbone=resnet50: layer1.0.conv1.weight is (64, 64, 3, 3) and should be (64, 64, 1, 1), and "
    )
    assert refused(path, {"name": "resnet18", "stem": "cifar"}) == (
        "its weights do not fit backbone=resnet18: conv1.weight is (64, 3, 7, 7) and should be (64, 3, 3, 3)"
    )
    assert refused(path, {"name": "resnet34"}).startswith(
        "its weights do not fit backbone=resnet34: layer1.2.conv1.weight (64, 64, 3, 3) is missing, and "
    )
    deeper = {
        name: x
        for name, x in build_backbone("resnet34").state_dict().items()
        if not name.startswith("layer4.")
    }
    torch.save(
        deeper
        | {name: x for name, x in resnet18().state_dict().items() if name.startswith("layer4.")},
        path,
    )
    assert refused(path) == "no backbone here has tensors of these shapes; give backbone=NAME"
    assert "layer1.2.conv1.weight (64, 64, 3, 3) has no counterpart" in refused(
        path, {"name": "resnet18"}
    )
    missing = {
        name: x for name, x in resnet18().state_dict().items() if name != "layer3.1.bn2.running_var"
    }
    torch.save(missing, path)
    assert refused(path, {"name": "resnet18"}).endswith(
        "layer3.1.bn2.running_var (256,) is missing"
    )
    torch.save(torchvision_swin()[0], path)
    assert "conv1.weight (64, 3, 7, 7) is missing" in refused(path, {"name": "resnet18"})


def test_a_file_lacks_what_is_asked_of_it(tmp_path):
    path = tmp_path / "x.pth"
    torch.save(resnet18().state_dict(), path)
    assert (
        refused(path, which="key") == "torchvision or timm ResNet, without key encoder's backbone"
    )
    assert refused(path, feature="embedding") == "holds no projector, which feature=embedding needs"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weird.0.weight": torch.zeros(2), "other": torch.zeros(1)}, "tensors named weird.0.weight, other are of no known format"),
        ({f"a.{n}": torch.zeros(1) for n in range(9)}, "tensors named a.* (9) are of no known format"),
        ({"state_dict": {"epoch": 3}}, "holds no tensors by name, neither directly nor in an item state_dict or model"),
        ([torch.zeros(3)], "holds no tensors by name"),
        ({"state_dict": {3: 4}, "model": None}, "holds no tensors by name"),
    ],
)  # fmt: skip
def test_unknown_content_is_one_line(content, message, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    assert refused(tmp_path / "x.pth").startswith(message)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_file_is_named_and_never_runs(legacy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = resnet18().state_dict() | {"config": Calls(open, "canary", "w")}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    message = refused(tmp_path / "x.pth")
    assert message.startswith("it holds objects whose loading would run code (")
    assert message.endswith(
        "if you trust its source, write its tensors alone to a new file with torch.save"
    )
    assert not (tmp_path / "canary").exists()


def test_files_that_hold_no_weights_are_one_line(tmp_path):
    path = tmp_path / "x.pth"
    assert refused(path) == "no such file"
    path.write_text("layer1: [0.1, 0.2]\n" * 20)
    assert (
        refused(path)
        == "damaged, or no checkpoint at all (neither torch.save nor safetensors has written it)"
    )
    torch.save(resnet18().state_dict(), path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    for length in generator.integers(1, len(whole), 4):
        path.write_bytes(whole[:length])
        assert refused(path).startswith("damaged")
    for place in generator.integers(100, 20_000, 20):  # in the pickles
        path.write_bytes(whole[:place] + generator.bytes(3) + whole[place + 3 :])
        try:
            load_pretrained(str(path), "query", {})
        except InputError:
            assert "\n" not in refused(path)


def test_what_cannot_be_a_queue_is_left_aside_and_listed(tmp_path):
    content, _, _ = moco_v2()
    for name, tensor in {
        "module.queue": torch.zeros(5), "module.queue_ptr": torch.zeros(2), "module.queue ": torch.zeros(0, 0),
    }.items():  # fmt: skip
        changed = {"state_dict": content["state_dict"] | {name.strip(): tensor}}
        torch.save(changed, tmp_path / "x.pth")
        held = read_weight_file(str(tmp_path / "x.pth"), "checkpoint=x")
        assert held.ignored[-1] == ("queue.pointer" if "ptr" in name else "queue.keys")


def test_two_tensors_of_one_name_are_refused(tmp_path):
    content, _, _ = moco_v2()
    content["state_dict"]["encoder_q.conv1.weight"] = torch.zeros(64, 3, 7, 7)
    torch.save(content, tmp_path / "x.pth")
    assert refused(tmp_path / "x.pth") == "two different tensors stand for encoder_q.conv1.weight"


def test_a_damaged_safetensors_file_is_one_line(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    path = tmp_path / "x.safetensors"
    save_file({"conv1.weight": torch.zeros(3)}, path)
    path.write_bytes(path.read_bytes()[:-4])
    assert refused(path).startswith("damaged, or no safetensors file (")


def method(
    queue_size=K,
    embedding_dim=C,
    num_queues=1,
    dense_weight=0.0,
    backbone=None,
    predictor=None,
    **projector,
):
    torch.manual_seed(7)
    return MoCo(
        backbone=backbone or {"name": "resnet18"},
        optimizer={"name": "sgd"},
        projector={"num_layers": 2} | projector,
        predictor=predictor or {"num_layers": 0},
        embedding_dim=embedding_dim,
        queue_size=queue_size,
        num_queues=num_queues,
        symmetric=num_queues == 2,
        dense_weight=dense_weight,
    )


def moby_method():
    heads = {"num_layers": 2, "hidden_dim": 64, "hidden_batch_norm": True}
    backbone = {"name": "swin_tiny_patch2", "window_size": [4, 4, 4, 2]}
    return method(num_queues=2, backbone=backbone, predictor=heads, **heads)


def started(content, tmp_path, **settings):
    """A new method from a file of this content, its first state, and what the log said."""
    path = tmp_path / "x.pth"
    torch.save(content, path)
    new = method(**settings)
    before = {name: tensor.clone() for name, tensor in new.state_dict().items()}
    logged = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(
        record.getMessage().removeprefix(f"init_from={path}: ")
    )
    logger = logging.getLogger("moco.weights.init_from")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        start_from(new, str(path))
    finally:
        logger.removeHandler(handler)
    return new.eval(), before, logged


def changed(new, before, part):
    return any(
        not torch.equal(x, before[name])
        for name, x in new.state_dict().items()
        if name.startswith(part)
    )


def test_a_run_starts_from_official_weights_with_key_encoder_and_queue(tmp_path):
    content, query, key = moco_v2()
    new, _, logged = started(content, tmp_path)
    assert_same(new.query_encoder, query, "embedding")
    assert_same(new.key_encoder, key, "embedding")
    torch.testing.assert_close(new.queue.keys, content["state_dict"]["module.queue"].T)
    assert (int(new.queue.pointer), int(new.queue.filled)) == (32, K)
    assert logged == [
        "MoCo v1 or v2 (facebookresearch/moco); taken: backbone (120), projector (4), key encoder's backbone (120), key "
        "encoder's projector (4), queue (3)"
    ]


@torch.no_grad()
def test_a_run_goes_on_from_the_official_notebooks_last_file(tmp_path):
    """All of it: backbone, key encoder, projector (its fc), queue."""
    content, query, key = notebook()
    backbone = {"name": "resnet18", "stem": "cifar"}
    new, _, logged = started(content, tmp_path, backbone=backbone, num_layers=1)
    assert logged == [
        "the CIFAR-10 notebook of MoCo (facebookresearch/moco, branch colab-notebook); taken: backbone (120), projector "
        "(2), key encoder's backbone (120), key encoder's projector (2), queue (3)"
    ]
    images = torch.randn(4, 3, 32, 32)
    for encoder, model in ((new.query_encoder, query), (new.key_encoder, key)):
        torch.testing.assert_close(encoder.encode(images, "backbone"), model.net[:9](images))
        torch.testing.assert_close(encoder.encode(images, "embedding"), model(images))
    torch.testing.assert_close(new.queue.keys, content["state_dict"]["queue"].T)
    assert (int(new.queue.pointer), int(new.queue.filled)) == (16, K)
    pretrained = load_pretrained(str(tmp_path / "x.pth"), "query", {})
    assert pretrained.settings == backbone
    assert pretrained.epoch == 200


def test_what_official_releases_lack_is_rebuilt_and_said(tmp_path):
    """The published files hold the query encoder alone."""
    content, query, _ = moco_v2()
    content["state_dict"] = {n: x for n, x in content["state_dict"].items() if "encoder_q" in n}
    new, before, logged = started(content, tmp_path)
    assert_same(new.query_encoder, query, "embedding")
    assert_same(new.key_encoder, query, "embedding")  # its BatchNorm statistics included
    assert not changed(new, before, "queue.")
    assert not any(parameter.requires_grad for parameter in new.key_encoder.parameters())
    assert logged[1:] == [
        "key encoder's backbone: not in the file; as the query's",
        "key encoder's projector: not in the file; as the query's",
        "queue: not in the file; begins anew",
    ]


def test_parts_that_do_not_fit_are_rebuilt_and_said(tmp_path):
    """v1's head and another K: the backbones alone are of use."""
    content, query, key = moco_v1()
    new, before, logged = started(content, tmp_path, queue_size=32)
    assert_same(new.query_encoder, without_classifier(query, "fc"), "backbone")
    assert_same(new.key_encoder, without_classifier(key, "fc"), "backbone")
    assert not changed(new, before, "query_encoder.projector.")
    assert not changed(new, before, "queue.")
    for mine, other in zip(
        new.key_encoder.projector.parameters(),
        new.query_encoder.projector.parameters(),
        strict=True,
    ):
        assert torch.equal(mine, other)
    assert logged[1] == (
        "projector: does not fit: 0.weight (512, 512) is missing, and 5 more differ; begins anew"
    )
    assert logged[-1] == "not used: projector (2), key encoder's projector (2), queue (3)"
    _, before, logged = started(moco_v2()[0], tmp_path, queue_size=32)
    assert logged[1] == "queue: does not fit: keys is (48, 16) and should be (32, 16); begins anew"


def test_the_backbone_has_to_fit(tmp_path):
    torch.save(moco_v2()[0], tmp_path / "x.pth")
    with pytest.raises(InputError) as error:
        start_from(method(backbone={"name": "resnet18", "stem": "cifar"}), str(tmp_path / "x.pth"))
    assert str(error.value) == (
        f"init_from={tmp_path / 'x.pth'}: its weights do not fit backbone=resnet18: conv1.weight is (64, 3, 7, 7) and should "
        "be (64, 3, 3, 3)"
    )


def test_two_queues_hold_the_views_that_they_are_for(tmp_path):
    """The first direction's negatives are the second view's keys, which solo-learn stores second and MoBY as queue2."""
    content, _, _ = solo_learn()
    new, _, _ = started(content, tmp_path, num_queues=2, hidden_dim=32)
    first, second = content["state_dict"]["queue"]
    torch.testing.assert_close(new.queue.keys, second.T)
    torch.testing.assert_close(new.reverse_queue.keys, first.T)
    assert int(new.queue.pointer) == int(new.reverse_queue.pointer) == 40

    content, query, _ = moby()
    backbone = {"name": "swin_tiny_patch2", "window_size": [4, 4, 4, 2]}
    heads = {"num_layers": 2, "hidden_dim": 64, "hidden_batch_norm": True}
    new, before, logged = started(
        content, tmp_path, num_queues=2, backbone=backbone, predictor=heads, **heads
    )
    torch.testing.assert_close(new.queue.keys, content["model"]["queue2"].T)
    torch.testing.assert_close(new.reverse_queue.keys, content["model"]["queue1"].T)
    assert_same(new.query_encoder, query, "embedding", 32)
    assert changed(new, before, "predictor.")
    assert len(logged) == 1


def test_the_dense_parts_are_taken(tmp_path):
    content, query, _ = densecl()
    new, _, logged = started(content, tmp_path, dense_weight=0.5, hidden_dim=32)
    dense_map = torch.randn(2, 512, 3, 3)
    with torch.no_grad():
        expected = query[1].mlp2(dense_map).flatten(2).transpose(1, 2)
        torch.testing.assert_close(
            new.query_encoder.dense_projector(dense_map).embeddings, expected
        )
    torch.testing.assert_close(new.dense_queue.keys, content["state_dict"]["queue2"].T)
    assert (int(new.queue.pointer), int(new.dense_queue.pointer)) == (8, 24)
    assert len(logged) == 1


def test_a_classifier_is_listed_as_not_used(tmp_path):
    _, _, logged = started(solo_learn()[0], tmp_path, hidden_dim=32)
    assert logged[-1] == "not used: reverse queue (3); classifier.weight, classifier.bias"


def solo_learn_on_cifar():
    """solo-learn's, for CIFAR: torchvision's ResNet with a 3x3 convolution that pads by 2, and no max-pool."""
    content, _, _ = solo_learn()

    def build():
        model = resnet(nn.Identity())
        model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=2, bias=False)
        model.maxpool = nn.Identity()
        return model

    query, key = query_and_key(build)
    for model in (
        query,
        key,
    ):  # statistics that fit, with which the padding changes the features most
        for layer in model.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = 1.0
        model.train()(torch.randn(8, 3, 32, 32))
        model.eval()
    state = {name: x for name, x in content["state_dict"].items() if "backbone." not in name}
    return {"state_dict": state | as_parts(backbone=query, momentum_backbone=key)}, query, key


PADS_OTHERWISE = (
    "solo-learn pads the first convolution by 2 pixels and stem=cifar by 1, which changes the features; "
    "backbone.stem=solo_cifar keeps them"
)


def test_solo_learns_stem_for_cifar_is_chosen_by_the_files_origin(tmp_path, caplog):
    content, query, key = solo_learn_on_cifar()
    path = str(tmp_path / "x.pth")
    torch.save(content, path)
    for which, model in (("query", query), ("key", key)):
        for given in ({}, {"name": "resnet18"}):
            pretrained = load_pretrained(path, which, given)
            assert pretrained.settings == {"name": "resnet18", "stem": "solo_cifar"}
            assert_same(pretrained.encoder, model, "backbone", 32)
    assert PADS_OTHERWISE not in caplog.text
    other = load_pretrained(path, "query", {"stem": "cifar"})
    assert PADS_OTHERWISE in caplog.text
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert F.cosine_similarity(other.encoder.encode(images), query(images)).max() < 0.98

    new, _, _ = started(
        content, tmp_path, backbone={"name": "resnet18", "stem": "solo_cifar"}, hidden_dim=32
    )
    assert_same(new.query_encoder, query, "backbone", 32)
    caplog.clear()
    started(content, tmp_path, backbone={"name": "resnet18", "stem": "cifar"}, hidden_dim=32)
    assert PADS_OTHERWISE in caplog.text


def test_a_backbone_alone_does_not_say_how_its_stem_pads(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    content, query, _ = solo_learn_on_cifar()
    path = str(tmp_path / "x.pth")
    alone = {name: x for name, x in content["state_dict"].items() if name.startswith("backbone.")}
    torch.save(alone, path)
    load_pretrained(path, "query", {})
    assert "if the weights are solo-learn's give backbone.stem=solo_cifar" in caplog.text
    assert_same(
        load_pretrained(path, "query", {"stem": "solo_cifar"}).encoder, query, "backbone", 32
    )


def test_a_head_is_put_into_our_order_whatever_the_order_of_its_tensors():
    weights = {
        "bn1.running_mean": torch.zeros(4), "fc1.weight": torch.zeros(4, 5), "bn0.running_mean": torch.zeros(5),
        "fc0.weight": torch.zeros(5, 6),
    }  # fmt: skip
    ours = renumber_layers(weights, is_dense=False)
    assert {name: tuple(x.shape) for name, x in ours.items()} == {
        "0.weight": (5, 6), "1.running_mean": (5,), "3.weight": (4, 5), "4.running_mean": (4,),
    }  # fmt: skip
    assert list(renumber_layers({"layers.0.weight": torch.zeros(2, 3)}, is_dense=False)) == [
        "weight"
    ]
    local = renumber_layers(
        {"layers.0.weight": torch.zeros(5, 6), "layers.2.weight": torch.zeros(4, 5)}, is_dense=True
    )
    assert {name: tuple(x.shape) for name, x in local.items()} == {
        "0.weight": (5, 6, 1, 1),
        "2.weight": (4, 5, 1, 1),
    }


def test_a_queue_is_rows_of_unit_norm_however_it_was_stored():
    keys = queue()
    assert torch.equal(rows_of_unit_norm(keys), keys.T)
    assert torch.equal(rows_of_unit_norm(keys.T), keys.T)


@pytest.mark.parametrize(
    "name", ["resnet50", "resnet101", "wide_resnet50_2", "swin_t", "swin_s", "vit_b_16"]
)
def test_every_published_architecture_has_one_backbone(name):
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    state = {
        key: torch.zeros(tensor.shape) if "pos_embedding" in key else tensor
        for key, tensor in model.state_dict().items()
    }
    assert [settings["name"] for settings in fitting_backbones(state)] == [name]


def test_names_in_a_line_are_grouped_when_there_are_many():
    assert listed(["a.b", "c"]) == "a.b, c"
    assert listed([f"a.{n}" for n in range(7)] + ["b"]) == "a.* (7), b"
