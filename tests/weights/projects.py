"""Files of weights as other projects make them, each with the models that give its right outputs."""

import copy
import functools
import itertools
import math
import re
import sys
from argparse import Namespace
from collections import OrderedDict
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models import swin_transformer, vision_transformer

from moco.errors import InputError
from moco.models.backbones import build_backbone
from moco.weights.loading import load_pretrained

EMBEDDING_DIM = 16
QUEUE_SIZE = 48


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
    model = torchvision.models.resnet18(num_classes=EMBEDDING_DIM)
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
    return F.normalize(torch.randn(EMBEDDING_DIM, QUEUE_SIZE), dim=0)  # (EMBEDDING_DIM, QUEUE_SIZE)


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
    return official(lambda: nn.Linear(512, EMBEDDING_DIM))


def moco_v2():
    return official(lambda: mlp(512, 512, EMBEDDING_DIM))


class SplitNorm(nn.BatchNorm2d):
    """Stands for the notebook's, which has a setting more and no tensor."""

    def __init__(self, num_features):
        super().__init__(num_features)
        self.num_splits = 8


def notebook():
    """model_last.pth of the official notebook: torchvision's children with another conv1 and without max-pool."""

    def build():
        whole = torchvision.models.resnet18(num_classes=EMBEDDING_DIM, norm_layer=SplitNorm)
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
        lambda: resnet(mlp(512, 64, EMBEDDING_DIM, norm=True, last_norm=True, bias=False))
    )
    predictor = randomised(mlp(EMBEDDING_DIM, 64, EMBEDDING_DIM, norm=True, bias=False))
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
        model.head = mlp(64, 32, 32, EMBEDDING_DIM, norm=True, last_norm=True, bias=False)
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
        base_encoder=query,
        momentum_encoder=key,
        predictor=mlp(EMBEDDING_DIM, 32, EMBEDDING_DIM, norm=True, bias=False),
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
    heads = query_and_key(lambda: MoBYHead(256, 64, EMBEDDING_DIM))
    state = as_parts(
        projector=heads[0], projector_k=heads[1], predictor=MoBYHead(EMBEDDING_DIM, 64, EMBEDDING_DIM), queue1=queue(), queue2=queue(),
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
        self.mlp = mlp(512, 32, EMBEDDING_DIM)
        self.mlp2 = nn.Sequential(nn.Conv2d(512, 32, 1), nn.ReLU(), nn.Conv2d(32, EMBEDDING_DIM, 1))

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
        self.bn1 = nn.BatchNorm1d(EMBEDDING_DIM, affine=False)
        self.fc1 = nn.Linear(32, EMBEDDING_DIM, bias=False)

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
    heads = query_and_key(lambda: mlp(512, 32, EMBEDDING_DIM))
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


class LightlyHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = mlp(512, 512, EMBEDDING_DIM)

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


@torch.no_grad()
def assert_same(encoder, model, feature, size=64):
    images = torch.randn(2, 3, size, size)
    expected = model(images)
    got = encoder.encode(images, feature)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def refused(path, given=(), which="query", feature="backbone"):
    with pytest.raises(InputError) as error:
        load_pretrained(str(path), which, dict(given), feature)
    message = str(error.value)
    assert message.startswith(f"checkpoint={path}: ")
    assert "\n" not in message
    return message.removeprefix(f"checkpoint={path}: ")


PADS_OTHERWISE = (
    "solo-learn pads the first convolution by 2 pixels and stem=cifar by 1, which changes the features; "
    "backbone.stem=solo_cifar keeps them"
)
