"""Files of weights as other projects make them, each with the models that give its right outputs.

A builder returns what the file holds, the query model and the key model. A builder of a backbone
alone returns what the file holds, the model, and the settings that should be recognised.
"""

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
from moco.weights.load_encoder import load_pretrained

EMBEDDING_DIM = 16
QUEUE_SIZE = 48
SMALL_SWIN = {"patch_size": 2, "embed_dim": 32, "depths": (2,) * 4, "num_heads": (1, 2, 4, 8)}

PADS_OTHERWISE = (
    "solo-learn pads the first convolution by 2 pixels and stem=cifar by 1, which changes "
    "the features; if the weights are solo-learn's give backbone.stem=solo_cifar"
)


@torch.no_grad()
def assert_same(encoder, model, feature, size=64):
    """Compare an encoder of ours with another project's model on random images."""
    images = torch.randn(2, 3, size, size)
    expected = model(images)
    tolerance = 1e-5 * float(expected.abs().max())
    got = encoder.encode(images, feature)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=tolerance)


def refused(path, given=(), which="query", feature="backbone"):
    """Return the error about a file, without its beginning."""
    with pytest.raises(InputError) as error:
        load_pretrained(str(path), which, dict(given), feature)
    message = str(error.value)
    assert message.startswith(f"checkpoint={path}: ")
    assert "\n" not in message
    return message.removeprefix(f"checkpoint={path}: ")


def randomised(module):
    """Draw the tensors that start as constants, so that each of them changes the outputs."""
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif "position" not in name and "coords" not in name and tensor.ndim == 1:
            tensor.normal_(0 if name.endswith("bias") else 1, 0.3)
        elif "cpb_mlp" in name or name.endswith("position_bias_table"):
            tensor.normal_(0, 0.5)
    return module.eval()


def query_and_key(build):
    """Build two models with different weights."""
    query = randomised(build())
    key = randomised(build())
    return query, key


def encoders_of(backbones, heads):
    """Join the query's and the key's backbone and head."""
    query = nn.Sequential(backbones[0], heads[0])
    key = nn.Sequential(backbones[1], heads[1])
    return query, key


def as_parts(**parts):
    """Return a state dict as if the modules and tensors were attributes of one module."""
    state = {}
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            state |= prefixed(part.state_dict(), f"{name}.")
        else:
            state[name] = part
    return state


def prefixed(state, prefix="module."):
    return {prefix + name: tensor for name, tensor in state.items()}


def queue():
    """Return a queue as nearly all projects store it: (embedding width, queue size)."""
    return F.normalize(torch.randn(EMBEDDING_DIM, QUEUE_SIZE), dim=0)


def pointer(value):
    return torch.tensor([value])


def mlp(*widths, last_norm=False, norm=False, bias=True):
    """Return linear layers with ReLU between them, and BatchNorm where it is asked for."""
    layers = []
    num_layers = len(widths) - 1
    for number, (before, after) in enumerate(itertools.pairwise(widths), 1):
        layers.append(nn.Linear(before, after, bias=bias))
        if number == num_layers:
            if last_norm:
                layers.append(nn.BatchNorm1d(after, affine=False))
        else:
            if norm:
                layers.append(nn.BatchNorm1d(after))
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


@functools.cache
def resnet18():
    return randomised(torchvision.models.resnet18(num_classes=EMBEDDING_DIM))


def resnet(fc):
    """Return torchvision's ResNet-18 with another last layer."""
    model = copy.deepcopy(resnet18())
    model.fc = fc
    return model


def headless_resnet():
    return resnet(nn.Identity())


def official_content(build_fc):
    query, key = query_and_key(lambda: resnet(build_fc()))
    state = as_parts(encoder_q=query, encoder_k=key, queue=queue(), queue_ptr=pointer(32))
    content = {
        "epoch": 200,
        "arch": "resnet18",
        "state_dict": prefixed(state),
        "optimizer": {"state": {}},
    }
    return content, query, key


def moco_v1():
    return official_content(lambda: nn.Linear(512, EMBEDDING_DIM))


def moco_v2():
    return official_content(lambda: mlp(512, 512, EMBEDDING_DIM))


class SplitNorm(nn.BatchNorm2d):
    """Stand for the notebook's BatchNorm, which has one more setting and no more tensors."""

    def __init__(self, num_features):
        super().__init__(num_features)
        self.num_splits = 8


def notebook_encoder():
    """Return torchvision's children with another conv1 and without max-pool."""
    whole = torchvision.models.resnet18(num_classes=EMBEDDING_DIM, norm_layer=SplitNorm)
    children = dict(whole.named_children())
    children["conv1"] = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    fc = children.pop("fc")
    del children["maxpool"]
    net = nn.Sequential(*children.values(), nn.Flatten(1), fc)
    return nn.Sequential(OrderedDict({"net": net}))


def notebook():
    """Make model_last.pth of the official notebook."""
    query, key = query_and_key(notebook_encoder)
    state = as_parts(encoder_q=query, encoder_k=key, queue=queue(), queue_ptr=pointer(16))
    optimizer = {"state": {}, "param_groups": []}
    return {"epoch": 200, "state_dict": state, "optimizer": optimizer}, query, key


def moco_v3():
    def build():
        return resnet(mlp(512, 64, EMBEDDING_DIM, norm=True, last_norm=True, bias=False))

    query, key = query_and_key(build)
    predictor = randomised(mlp(EMBEDDING_DIM, 64, EMBEDDING_DIM, norm=True, bias=False))
    state = as_parts(base_encoder=query, momentum_encoder=key, predictor=predictor)
    content = {
        "epoch": 300,
        "arch": "resnet18",
        "state_dict": prefixed(state),
        "scaler": {"scale": 1.0},
    }
    return content, query, key


def sine_cosine_positions():
    """Return MoCo v3's positions for 8 x 8 cells and width 64, after a zero for the class token."""
    positions = torch.zeros(1, 65, 64)
    for place in range(64):
        row_and_column = divmod(place, 8)
        for axis, cell in enumerate(row_and_column):
            for number in range(16):
                angle = cell / 10000 ** (number / 16)
                positions[0, 1 + place, 32 * axis + number] = math.sin(angle)
                positions[0, 1 + place, 32 * axis + 16 + number] = math.cos(angle)
    return positions


def moco_v3_vit():
    classes = pytest.importorskip("timm").models.vision_transformer

    def build():
        model = classes.VisionTransformer(32, 4, embed_dim=64, depth=4, num_heads=4)
        model.head = mlp(64, 32, 32, EMBEDDING_DIM, norm=True, last_norm=True, bias=False)
        model.pos_embed.data = sine_cosine_positions()
        return model

    query, key = query_and_key(build)
    predictor = mlp(EMBEDDING_DIM, 32, EMBEDDING_DIM, norm=True, bias=False)
    state = as_parts(base_encoder=query, momentum_encoder=key, predictor=predictor)
    return {"state_dict": prefixed(state)}, query, key


class MoBYHead(nn.Module):
    """A head whose numbers begin at 1, and whose last layer has no number."""

    def __init__(self, input_dim, hidden_dim, output_dim):
        super().__init__()
        self.linear_hidden = nn.Sequential(
            nn.Identity(),
            nn.Linear(input_dim, hidden_dim),
            nn.BatchNorm1d(hidden_dim),
            nn.ReLU(inplace=True),
        )
        self.linear_out = nn.Linear(hidden_dim, output_dim)

    def forward(self, x):
        return self.linear_out(self.linear_hidden(x))


def microsoft_names(swin):
    """Return a Swin of timm under Microsoft's names.

    A merging belongs to the stage before it, and tables of the windows are saved.
    """
    state = {}
    for name, tensor in swin.state_dict().items():
        found = re.match(r"layers\.(\d)\.downsample(.*)", name)
        if found:
            name = f"layers.{int(found[1]) - 1}.downsample{found[2]}"
        state[name] = tensor
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(16, 16, 16)
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
    return state


def moby():
    swin = pytest.importorskip("timm").models.swin_transformer.SwinTransformer

    def build():
        return swin(**SMALL_SWIN, img_size=32, window_size=4, num_classes=0)

    backbones = query_and_key(build)
    heads = query_and_key(lambda: MoBYHead(256, 64, EMBEDDING_DIM))
    state = as_parts(
        projector=heads[0],
        projector_k=heads[1],
        predictor=MoBYHead(EMBEDDING_DIM, 64, EMBEDDING_DIM),
        queue1=queue(),
        queue2=queue(),
        queue_ptr=pointer(16),
    )
    state |= prefixed(microsoft_names(backbones[0]), "encoder.")
    state |= prefixed(microsoft_names(backbones[1]), "encoder_k.")
    content = {"model": state, "epoch": 299, "config": Namespace(seed=0)}
    return content, *encoders_of(backbones, heads)


class CfgNode(dict):
    """Stand for yacs' class of 0.1.8: a dict of settings that has attributes too."""

    def __init__(self, items, deprecated=()):
        super().__init__()
        for key, value in items.items():
            self[key] = CfgNode(value) if type(value) is dict else value
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
    "BASE": [""],
    "DATA": {"BATCH_SIZE": 64, "IMG_SIZE": 32, "ZIP_MODE": False},
    "AMP_OPT_LEVEL": "O1",
    "MODEL": {"TYPE": "moby", "SWIN": {"EMBED_DIM": 32, "DEPTHS": [2, 2, 2, 2], "QK_SCALE": None}},
    "TRAIN": {"BASE_LR": 1e-3, "BETAS": (0.9, 0.999)},
}


def as_moby_saves(content, path, monkeypatch, **options):
    """Write what save_checkpoint of the official code's utils.py writes, where yacs is installed."""
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


class DenseCLNeck(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = mlp(512, 32, EMBEDDING_DIM)
        self.mlp2 = nn.Sequential(nn.Conv2d(512, 32, 1), nn.ReLU(), nn.Conv2d(32, EMBEDDING_DIM, 1))

    def forward(self, features):
        return self.mlp(features)


def densecl():
    query, key = query_and_key(lambda: nn.Sequential(headless_resnet(), DenseCLNeck()))
    state = as_parts(
        encoder_q=query,
        encoder_k=key,
        backbone=query[0],
        queue=queue(),
        queue_ptr=pointer(8),
        queue2=queue(),
        queue2_ptr=pointer(24),
    )
    return {"meta": {"epoch": 200}, "state_dict": state}, query, key


class Averaged(nn.Module):
    """OpenMMLab's module that holds a moving average."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.register_buffer("steps", torch.tensor(5))


class NumberedNeck(nn.Module):
    """mmselfsup's head, whose layers are called fc0, bn0, fc1 and bn1."""

    def __init__(self):
        super().__init__()
        self.bn0 = nn.BatchNorm1d(32)
        self.fc0 = nn.Linear(512, 32, bias=False)
        self.bn1 = nn.BatchNorm1d(EMBEDDING_DIM, affine=False)
        self.fc1 = nn.Linear(32, EMBEDDING_DIM, bias=False)

    def forward(self, x):
        hidden = F.relu(self.bn0(self.fc0(x)))
        return self.bn1(self.fc1(hidden))


def mmselfsup():
    query, key = query_and_key(lambda: nn.Sequential(headless_resnet(), NumberedNeck()))
    state = as_parts(backbone=query[0], neck=query[1], momentum_encoder=Averaged(key))
    return {"state_dict": state}, query, key


def solo_learn():
    backbones = query_and_key(headless_resnet)
    heads = query_and_key(lambda: mlp(512, 32, EMBEDDING_DIM))
    state = as_parts(
        backbone=backbones[0],
        classifier=nn.Linear(512, 10),
        momentum_backbone=backbones[1],
        projector=heads[0],
        momentum_projector=heads[1],
        queue=torch.stack([queue(), queue()]),
        queue_ptr=pointer(40),
    )
    content = {
        "state_dict": state,
        "epoch": 99,
        "hyper_parameters": {},
        "callbacks": {},
        "pytorch-lightning_version": "2.1.2",
    }
    return content, *encoders_of(backbones, heads)


def solo_learn_cifar_resnet():
    """Return torchvision's ResNet with a 3x3 convolution that pads by 2, and no max-pool.

    The padding changes the features most where the statistics of BatchNorm fit the images.
    """
    model = headless_resnet()
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=2, bias=False)
    model.maxpool = nn.Identity()
    randomised(model)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    model.train()(torch.randn(8, 3, 32, 32))
    return model.eval()


def solo_learn_on_cifar():
    content, _, _ = solo_learn()
    query = solo_learn_cifar_resnet()
    key = solo_learn_cifar_resnet()
    state = as_parts(backbone=query, momentum_backbone=key)
    for name, tensor in content["state_dict"].items():
        if "backbone." not in name:
            state[name] = tensor
    return {"state_dict": state}, query, key


class LightlyHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = mlp(512, 512, EMBEDDING_DIM)

    def forward(self, x):
        return self.layers(x.flatten(1))


def children_of_resnet():
    """Return a ResNet as lightly's examples make it: an nn.Sequential without the last layer."""
    children = list(headless_resnet().children())
    return nn.Sequential(*children[:-1])


def lightly():
    backbones = query_and_key(children_of_resnet)
    heads = query_and_key(LightlyHead)
    state = as_parts(
        backbone=backbones[0],
        projection_head=heads[0],
        backbone_momentum=backbones[1],
        projection_head_momentum=heads[1],
    )
    state["criterion.memory_bank.bank"] = queue().T
    state["criterion.memory_bank.bank_ptr"] = pointer(4)
    return {"state_dict": state, "epoch": 3}, *encoders_of(backbones, heads)


def lightly_with_query_backbone():
    """Make a file of lightly's older benchmarks, where `backbone` is the key encoder's."""
    backbones = query_and_key(headless_resnet)
    heads = query_and_key(LightlyHead)
    state = as_parts(
        query_backbone=backbones[0],
        query_projection_head=heads[0],
        backbone=backbones[1],
        projection_head=heads[1],
        online_classifier=nn.Linear(512, 10),
    )
    return {"state_dict": state}, *encoders_of(backbones, heads)


WITH_HEADS = (
    moco_v1,
    moco_v2,
    notebook,
    moco_v3,
    moco_v3_vit,
    moby,
    densecl,
    mmselfsup,
    solo_learn,
    lightly,
    lightly_with_query_backbone,
)


def without_classifier(model, attribute):
    model = copy.deepcopy(model)
    setattr(model, attribute, nn.Identity())
    return model


def torchvision_resnet():
    state = resnet18().state_dict()
    return state, without_classifier(resnet18(), "fc"), {"name": "resnet18"}


def old_torchvision_resnet():
    """Make a file from before PyTorch 0.4.1, when BatchNorm had no counters."""
    state, model, settings = torchvision_resnet()
    state = {name: x for name, x in state.items() if "num_batches_tracked" not in name}
    return state, model, settings


def torchvision_swin():
    small = SMALL_SWIN | {"patch_size": [2, 2]}
    model = randomised(swin_transformer.SwinTransformer(**small, window_size=[4, 4]))
    settings = {"name": "swin_tiny_patch2", "window_size": 4}
    return model.state_dict(), without_classifier(model, "head"), settings


def torchvision_swin_v2():
    small = SMALL_SWIN | {"patch_size": [2, 2]}
    model = swin_transformer.SwinTransformer(
        **small,
        window_size=[4, 4],
        block=swin_transformer.SwinTransformerBlockV2,
        downsample_layer=swin_transformer.PatchMergingV2,
    )
    state = randomised(model).state_dict()
    for name, tensor in state.items():
        if name.endswith("qkv.bias"):
            # Swin V2 has no bias for keys.
            _, key, _ = tensor.chunk(3)
            key.zero_()
    settings = {"name": "swin_v2_tiny_patch2", "window_size": 4, "pretrained_window_size": 4}
    return state, without_classifier(model, "head"), settings


def torchvision_vit():
    model = randomised(vision_transformer.VisionTransformer(64, 4, 4, 4, 64, 256))
    settings = {"name": "vit_tiny_patch4", "learned_positions": 16}
    return {"model": model.state_dict()}, without_classifier(model, "heads"), settings


def timm_vit():
    classes = pytest.importorskip("timm").models.vision_transformer
    model = randomised(classes.VisionTransformer(64, 4, embed_dim=64, depth=4, num_heads=4))
    settings = {"name": "vit_tiny_patch4", "learned_positions": 16}
    return model.state_dict(), without_classifier(model, "head"), settings


def lightly_cifar_resnet():
    """Make a file of lightly's own ResNet, as its examples cut it.

    A downsample layer is called shortcut, and ReLU and pooling are no modules.
    """
    model = randomised(build_backbone("resnet18", stem="cifar"))
    children = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]
    state = {}
    for name, tensor in model.state_dict().items():
        child, _, rest = name.partition(".")
        rest = rest.replace("downsample", "shortcut")
        state[f"backbone.{children.index(child)}.{rest}"] = tensor
    return {"state_dict": state}, model, {"name": "resnet18", "stem": "cifar"}


BACKBONES_ALONE = (
    torchvision_resnet,
    old_torchvision_resnet,
    torchvision_swin,
    torchvision_swin_v2,
    torchvision_vit,
    timm_vit,
    lightly_cifar_resnet,
)
