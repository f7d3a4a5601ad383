"""A backbone's weights under the names of torchvision and timm, and back; and a file of our own that describes itself.

A backbone has no classifier. Its weights load with ``strict=True`` into the library's model without one:

    model = torchvision.models.resnet50()
    model.fc = torch.nn.Identity()  # Swin: model.head, ViT: model.heads

    model = timm.create_model("resnet50", num_classes=0)

`moco.export` prints the lines for a certain file, the arguments for the backbone's windows and heads included.

Letters: D feature width, L cells of a window, P tokens of a ViT.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moco.errors import InputError
from moco.models.backbones import build_backbone
from moco.models.size_constants import Size
from moco.models.swin.attention import WindowAttention, WindowAttentionV2, check_pretrained_window
from moco.models.swin.backbone import Swin, map_sides
from moco.models.swin.windows import relative_positions
from moco.models.vit import VisionTransformer, learned_grid_side, resized_positions
from moco.weights.safetensors_files import as_safetensors, read_safetensors

Weights = dict[str, Tensor]

# torchvision's names are ours; it has a class for vit_small, but no such name.
TIMM_MODELS = {
    **{
        name: name
        for name in (
            "resnet18",
            "resnet34",
            "resnet50",
            "resnet101",
            "resnet152",
            "wide_resnet50_2",
        )
    },
    "swin_t": "swin_tiny_patch4_window7_224",
    "swin_s": "swin_small_patch4_window7_224",
    "swin_b": "swin_base_patch4_window7_224",
    "swin_v2_t": "swinv2_tiny_window8_256",
    "swin_v2_s": "swinv2_small_window8_256",
    "swin_v2_b": "swinv2_base_window8_256",
    "vit_small": "vit_small_patch16_224",
    "vit_b_16": "vit_base_patch16_224",
}
CLASSIFIERS = ("fc.", "head.", "heads.")
INDEX, COORDINATES = "relative_position_index", "relative_coords_table"
POSITIONS = "encoder.pos_embedding"
VIT_IN_TIMM = (  # no ResNet has such names
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^class_token$", "cls_token"),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^encoder\.ln\.", "norm."),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
    (r"\.ln_(\d)\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
)
DEFAULT_IMAGE_SIZE = 224  # px, of both libraries' ViTs


def counterpart(settings: dict[str, Any], library: str) -> str:
    """The name of the model of ``torchvision`` or ``timm`` that takes the weights of a backbone of these settings.

    Raises:
        InputError: the library has no such model.
    """
    name = settings["name"]
    stem = settings.get("stem") or "imagenet"
    if name not in TIMM_MODELS or stem != "imagenet":
        model = f"{name} with stem={stem}" if name in TIMM_MODELS else name
        raise InputError(
            f"format={library}: {library} has no {model}; format=safetensors keeps the names of this project"
        )
    return TIMM_MODELS[name] if library == "timm" else name


def to_torchvision(backbone: nn.Module, image_size: int | None = None) -> Weights:
    """The state dict that torchvision's model of the same architecture, window and image size loads.

    The names are ours; torchvision's Swin also saves which offset each pair of cells has, and V2 the coordinates of the
    offsets. Those are normalised by the pretraining window, which torchvision does not know of: with them its model keeps
    the learned biases in other windows too, where its own would stretch them. Its ViT has learned positions for one image
    size, which are filled with ours.

    Args:
        image_size: px, for ViT, of which an incomplete patch counts as in the backbone. None: 224.

    Raises:
        InputError: a window that differs between the stages, which torchvision's models cannot have.
    """
    weights = dict(backbone.state_dict())
    if isinstance(backbone, VisionTransformer):
        weights[POSITIONS] = positions_for(backbone, image_size or DEFAULT_IMAGE_SIZE)
    if isinstance(backbone, Swin) and len(set(backbone.window_size)) > 1:
        raise InputError(
            f"backbone.window_size={list(backbone.window_size)}: torchvision's models have one window for all stages; "
            "format=timm and format=safetensors take one for each"
        )
    for name, attention in backbone.named_modules():
        if isinstance(attention, WindowAttention):
            window = attention.window_size
            index = relative_positions(window, torch.device("cpu"))  # (L, L), shared by all blocks
            weights[f"{name}.{INDEX}"] = index.flatten().clone()
        if isinstance(attention, WindowAttentionV2):
            weights[f"{name}.{COORDINATES}"] = saved_coordinates(
                window, attention.pretrained_window_size
            )
    return weights


def positions_for(backbone: VisionTransformer, image_size: int) -> Tensor:
    """A ViT's positions for square images of `image_size` px: (1, P, D)."""
    cells = backbone.cells(image_size)
    return backbone.positions((cells, cells)).detach().clone()


def with_fitting_positions(weights: Weights, backbone: nn.Module) -> Weights:
    """The weights, under our names, with the positions that a ViT has: learned ones on its grid, or none if its are fixed.

    Raises:
        InputError: the weights have learned positions, and the backbone has fixed ones.
    """
    if not isinstance(backbone, VisionTransformer) or POSITIONS not in weights:
        return weights
    positions = weights[POSITIONS]
    if backbone.learned_positions:
        grid = (backbone.learned_positions, backbone.learned_positions)
        return weights | {POSITIONS: resized_positions(positions, grid)}
    if side := learned_grid_side(positions):
        raise InputError(
            f"the weights have learned positions on a grid of {side} x {side} cells, and this backbone has fixed ones; set "
            f"backbone.learned_positions={side}"
        )
    return {name: tensor for name, tensor in weights.items() if name != POSITIONS}


def saved_coordinates(window: Size, pretrained: Size) -> Tensor:
    """The table of log coordinates that torchvision saves, to the bit if the windows are the same.

    (1, 2 window_h - 1, 2 window_w - 1, 2) float32; `moco.models.swin.windows.log_coordinates` in torchvision's
    precision and order of operations.
    """
    axes = [torch.arange(1 - cells, cells, dtype=torch.float32) for cells in window]
    table = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    table = table / torch.tensor([max(cells - 1, 1) for cells in pretrained]) * 8
    return (table.sign() * torch.log2(table.abs() + 1) / 3)[None]


def from_torchvision(weights: Weights, backbone: nn.Module) -> Weights:
    """The state dict that `backbone` loads, of one of torchvision's; undo of `to_torchvision`.

    Raises:
        InputError: the weights were pretrained with another window than the backbone assumes (Swin V2), or with learned
            positions where it has fixed ones (ViT).
    """
    for name, attention in backbone.named_modules():
        coordinates = weights.get(f"{name}.{COORDINATES}")
        if coordinates is not None and isinstance(attention, WindowAttentionV2):
            check_pretrained_window(coordinates, attention.pretrained_window_size)
    tables = (f".{INDEX}", f".{COORDINATES}")
    kept = {
        name: x
        for name, x in weights.items()
        if not name.startswith(CLASSIFIERS) and not name.endswith(tables)
    }
    return with_fitting_positions(kept, backbone)


def to_timm(backbone: nn.Module, image_size: int | None = None) -> Weights:
    """The state dict that timm's model of the same architecture, windows and image size loads.

    timm's Swin V2 has no bias for keys, which ours does not use, and computes coordinates from its constructor's
    ``pretrained_window_sizes``.

    Args:
        image_size: px; timm's ``img_size``. Where a map is smaller than its window timm's Swin V1 has the middle of the
            table of position biases only (None: nowhere). Its ViT has positions for this size (None: 224; see
            `to_torchvision`).
    """
    weights = {}
    for name, tensor in backbone.state_dict().items():
        theirs = timm_name(name)
        if isinstance(backbone, Swin) and backbone.version == 2 and name.endswith(".qkv.bias"):
            query, _, value = tensor.chunk(3)
            weights[theirs.replace("qkv.bias", "q_bias")] = (
                query.clone()
            )  # a view would take the whole along
            weights[theirs.replace("qkv.bias", "v_bias")] = value.clone()
        else:
            weights[theirs] = tensor
    if image_size and isinstance(backbone, Swin) and backbone.version == 1:
        stages: list[Any] = list(backbone.stages())
        for stage, side in enumerate(sides_there(backbone, image_size)):
            window = min(backbone.window_size[stage], side)
            for place, block in enumerate(stages[stage]):
                table = block.attn.bias_table((window, window)).detach().clone()
                weights[f"layers.{stage}.blocks.{place}.attn.relative_position_bias_table"] = table
    if isinstance(backbone, VisionTransformer):
        weights[timm_name(POSITIONS)] = positions_for(backbone, image_size or DEFAULT_IMAGE_SIZE)
    return weights


def from_timm(weights: Weights, backbone: nn.Module) -> Weights:
    """The state dict that `backbone` loads, of one of timm's; undo of `to_timm` without clipped tables.

    Nothing in timm's weights tells the window that they were pretrained with, or a ViT's heads: the backbone's have to be
    right. The official MoCo v3 weights of ViT have the same names.

    Raises:
        InputError: the weights have learned positions, and the backbone has fixed ones (ViT).
    """
    ours = {timm_name(name): name for name in [*backbone.state_dict(), POSITIONS]}
    renamed = {}
    for name, tensor in weights.items():
        if name.endswith(".q_bias"):
            value = weights[name.replace("q_bias", "v_bias")]
            joined = torch.cat([tensor, torch.zeros_like(tensor), value])
            renamed[ours[name.replace("q_bias", "qkv.bias")]] = joined
        elif not name.startswith(CLASSIFIERS) and not name.endswith(".v_bias"):
            renamed[ours.get(name, name)] = tensor
    return with_fitting_positions(renamed, backbone)


def timm_name(name: str) -> str:
    """The name in timm of one of our tensors; the ResNets' are the same.

    torchvision numbers Swin's patches, stages and mergings through; timm counts a merging to the stage that it leads to.
    """
    found = re.match(r"features\.(\d)\.(?:(\d+)\.)?(.+)", name)
    if not found:
        for ours, theirs in VIT_IN_TIMM:
            name = re.sub(ours, theirs, name)
        return name
    place, block, rest = int(found[1]), found[2], found[3]
    if place == 0:
        return f"patch_embed.{'proj' if block == '0' else 'norm'}.{rest}"
    if place % 2 == 0:
        return f"layers.{place // 2}.downsample.{rest}"
    rest = re.sub(r"^mlp\.0\.", "mlp.fc1.", rest)
    rest = re.sub(r"^mlp\.3\.", "mlp.fc2.", rest)
    return f"layers.{place // 2}.blocks.{block}.{rest}"


def sides_there(backbone: Swin, image_size: int) -> list[int]:
    """Side of the four stages' maps, cells, in torchvision and timm: they drop the last pixels if a patch is incomplete."""
    whole_patches = image_size // backbone.patch_size * backbone.patch_size
    return map_sides(whole_patches, backbone.patch_size)


def settings_of(backbone: nn.Module, built_with: dict[str, Any]) -> dict[str, Any]:
    """The arguments with which `build_backbone` makes a backbone of the same windows.

    Args:
        built_with: those it was made with; its windows may have been changed since.
    """
    settings = {key: value for key, value in built_with.items() if value is not None}
    if isinstance(backbone, Swin):
        settings["window_size"] = one_or_each(backbone.window_size)
        if backbone.version == 2:
            settings["pretrained_window_size"] = one_or_each(backbone.pretrained_window_size)
            settings.pop("pretrained_image_size", None)  # they are clipped to its maps already
    return settings


def one_or_each(windows: Sequence[int]) -> int | list[int]:
    """The stages' windows as one writes them: one number if they are the same."""
    return windows[0] if len(set(windows)) == 1 else list(windows)


def write_backbone(backbone: nn.Module, settings: dict[str, Any], about: dict[str, Any]) -> bytes:
    """The content of a safetensors file that `read_backbone` rebuilds the backbone from.

    Args:
        settings: the arguments of `build_backbone` that the backbone was made with.
        about: plain data to keep beside the weights. All of it, and the settings, is in the file's metadata, which holds
            strings: each value is JSON.

    Raises:
        InputError: safetensors is not installed.
    """
    metadata = {"backbone": settings_of(backbone, settings), **about}
    return as_safetensors(
        dict(backbone.state_dict()), {key: json.dumps(value) for key, value in metadata.items()}
    )


def read_backbone(path: str | Path) -> tuple[Any, dict[str, Any]]:
    """The backbone of a file that ``moco.export format=safetensors`` wrote, in eval mode, and what the file says of it.

    Raises:
        InputError: no such file, damaged, written by something else, or safetensors is not installed.
    """
    weights, metadata = read_safetensors(path, str(path))
    try:
        about = {key: json.loads(value) for key, value in metadata.items()}
        backbone = build_backbone(**about["backbone"])
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"{path}: not written by moco.export format=safetensors (its metadata describe no backbone)"
        ) from error
    try:
        backbone.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(
            f"{path}: the weights do not fit the backbone that its metadata describe ({error})"
        ) from error
    return backbone.eval(), about
