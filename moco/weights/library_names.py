"""Rename a backbone's weights from our names to those of torchvision or timm, and back.

A backbone has no classifier. Its renamed weights load with ``strict=True`` into the library's
model without one:

    model = torchvision.models.resnet50()
    model.fc = torch.nn.Identity()  # Swin: model.head, ViT: model.heads

    model = timm.create_model("resnet50", num_classes=0)

`moco.export` prints these lines for a file, with the arguments for its windows and heads.
"""

import re
from typing import Any

import torch
from torch import Tensor, nn

from moco.errors import InputError
from moco.models.size_constants import Size
from moco.models.swin.attention import (
    WindowAttention,
    WindowAttentionV2,
    check_pretrained_windows,
)
from moco.models.swin.backbone import Swin, map_sides
from moco.models.swin.windows import log_coordinates, relative_positions
from moco.models.vit import VisionTransformer, learned_grid_side, resized_positions

Weights = dict[str, Tensor]

# torchvision has a class for vit_small, but no such name. Its other names are ours.
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2")
TIMM_MODELS = {
    **{name: name for name in RESNETS},
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

# Swin's names end with these where a library saves what its windows are computed from.
INDEX = "relative_position_index"
COORDINATES = "relative_coords_table"
COMPUTED = (f".{INDEX}", f".{COORDINATES}", ".attn_mask")

POSITIONS = "encoder.pos_embedding"  # of a ViT
VIT_IN_TIMM = (
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
DEFAULT_IMAGE_SIZE = 224  # px, the default of both libraries' ViTs


def counterpart(settings: dict[str, Any], library: str) -> str:
    """Return the name of a library's model that takes the weights of a backbone.

    Args:
        settings: the arguments of `build_backbone`.
        library: ``torchvision`` or ``timm``.

    Raises:
        InputError: the library has no such model.
    """
    name = settings["name"]
    stem = settings.get("stem") or "imagenet"
    model = name
    if name in TIMM_MODELS:
        if stem == "imagenet":
            return TIMM_MODELS[name] if library == "timm" else name
        model = f"{name} with stem={stem}"
    raise InputError(
        f"format={library}: {library} has no {model}; "
        "format=safetensors keeps the names of this project"
    )


def to_torchvision(backbone: nn.Module, image_size: int | None = None) -> Weights:
    """Return the state dict that torchvision's model of the same architecture loads.

    The names are ours. torchvision's Swin also saves which offset each pair of cells has, and its
    Swin V2 saves the coordinates of the offsets. Ours are normalised by the pretraining window,
    which torchvision does not know. With them, its model keeps the learned biases in other windows
    too, where its own coordinates would stretch them. torchvision's ViT has learned positions for
    one image size, so ours are computed for that size.

    Args:
        image_size: side of the images, px, for ViT. None means 224.

    Raises:
        InputError: the window differs between the stages, which torchvision cannot have.
    """
    weights = dict(backbone.state_dict())
    if isinstance(backbone, VisionTransformer):
        weights[POSITIONS] = positions_for(backbone, image_size or DEFAULT_IMAGE_SIZE)
    if isinstance(backbone, Swin):
        windows = list(backbone.window_size)
        if len(set(windows)) > 1:
            raise InputError(
                f"backbone.window_size={windows}: torchvision's models have one window for all "
                "stages; format=timm and format=safetensors take one for each"
            )
        weights |= window_tables(backbone)
    return weights


def window_tables(backbone: Swin) -> Weights:
    """Return what torchvision's Swin computes from its windows and saves with the weights."""
    tables = {}
    for name, module in backbone.named_modules():
        if isinstance(module, WindowAttention):
            # (cells of a window, cells of a window); all blocks share one tensor.
            index = relative_positions(module.window_size, torch.device("cpu"))
            tables[f"{name}.{INDEX}"] = index.clone()
        if isinstance(module, WindowAttentionV2):
            windows = (module.window_size, module.pretrained_window_size)
            tables[f"{name}.{COORDINATES}"] = saved_coordinates(*windows)
    return tables


def saved_coordinates(window: Size, pretrained: Size) -> Tensor:
    """Return V2's log coordinates as torchvision saves them: float32 (1, rows, columns, 2)."""
    return log_coordinates(window, pretrained, torch.device("cpu")).float()[None]


def positions_for(backbone: VisionTransformer, image_size: int) -> Tensor:
    """Return a ViT's positions for square images of `image_size` px: (1, tokens, width)."""
    cells = backbone.cells(image_size)
    return backbone.positions((cells, cells)).detach().clone()


def from_torchvision(weights: Weights, backbone: nn.Module) -> Weights:
    """Return the state dict that `backbone` loads; this undoes `to_torchvision`.

    Raises:
        InputError: the weights were pretrained with another window than the backbone assumes
            (Swin V2), or with learned positions where it has fixed ones (ViT).
    """
    check_coordinates(weights, backbone)
    kept = {}
    for name, tensor in weights.items():
        if not name.startswith(CLASSIFIERS) and not name.endswith((INDEX, COORDINATES)):
            kept[name] = tensor
    return with_fitting_positions(kept, backbone)


def check_coordinates(weights: Weights, backbone: nn.Module) -> None:
    """Raise InputError if a Swin V2's weights were pretrained with other windows than assumed."""
    tables = first_of_each_stage(weights, COORDINATES)
    if isinstance(backbone, Swin) and len(tables) == len(backbone.pretrained_window_size):
        check_pretrained_windows(tables, backbone.pretrained_window_size)


def with_fitting_positions(weights: Weights, backbone: nn.Module) -> Weights:
    """Return the weights with the positions that a ViT has.

    Learned positions are resized to the backbone's grid. Fixed ones are left out, as the backbone
    computes its own.

    Raises:
        InputError: the weights have learned positions, and the backbone has fixed ones.
    """
    if not isinstance(backbone, VisionTransformer) or POSITIONS not in weights:
        return weights
    positions = weights[POSITIONS]
    if backbone.learned_positions:
        grid = (backbone.learned_positions, backbone.learned_positions)
        return weights | {POSITIONS: resized_positions(positions, grid)}
    side = learned_grid_side(positions)
    if side is not None:
        raise InputError(
            f"the weights have learned positions on a grid of {side} x {side} cells, and this "
            f"backbone has fixed ones; set backbone.learned_positions={side}"
        )
    return {name: tensor for name, tensor in weights.items() if name != POSITIONS}


def to_timm(backbone: nn.Module, image_size: int | None = None) -> Weights:
    """Return the state dict that timm's model of the same architecture and windows loads.

    timm's Swin V2 has no bias for keys, which ours does not use. It computes its coordinates from
    the constructor's ``pretrained_window_sizes``.

    Args:
        image_size: timm's ``img_size``, px. Where a map is smaller than its window, timm's Swin V1
            has only the middle of the table of position biases (None: all maps are larger). timm's
            ViT has positions for this size (None: 224).
    """
    weights = {}
    for name, tensor in backbone.state_dict().items():
        theirs = timm_name(name)
        if isinstance(backbone, Swin) and backbone.version == 2 and name.endswith(".qkv.bias"):
            query, _, value = tensor.chunk(3)
            # A view would be saved with the whole tensor, so the parts are copied.
            weights[theirs.replace("qkv.bias", "q_bias")] = query.clone()
            weights[theirs.replace("qkv.bias", "v_bias")] = value.clone()
        else:
            weights[theirs] = tensor
    if image_size and isinstance(backbone, Swin) and backbone.version == 1:
        weights |= clipped_bias_tables(backbone, image_size)
    if isinstance(backbone, VisionTransformer):
        weights[timm_name(POSITIONS)] = positions_for(backbone, image_size or DEFAULT_IMAGE_SIZE)
    return weights


def clipped_bias_tables(backbone: Swin, image_size: int) -> Weights:
    """Return Swin V1's tables of position biases, under timm's names, as timm clips them."""
    tables = {}
    stages: list[Any] = list(backbone.stages())
    sides = library_map_sides(backbone, image_size)
    for stage, blocks in enumerate(stages):
        window = min(backbone.window_size[stage], sides[stage])
        for number, block in enumerate(blocks):
            table = block.attn.bias_table((window, window)).detach().clone()
            tables[f"layers.{stage}.blocks.{number}.attn.relative_position_bias_table"] = table
    return tables


def library_map_sides(backbone: Swin, image_size: int) -> list[int]:
    """Return the sides of the four stages' maps, in cells, in torchvision and timm.

    Both libraries drop the last pixels if a patch is incomplete.
    """
    whole_patches = image_size // backbone.patch_size * backbone.patch_size
    return map_sides(whole_patches, backbone.patch_size)


def from_timm(weights: Weights, backbone: nn.Module) -> Weights:
    """Return the state dict that `backbone` loads; this undoes `to_timm`.

    timm's weights do not tell the window that they were pretrained with, or a ViT's heads, so the
    backbone's have to be right. The official MoCo v3 weights of ViT have the same names.

    Raises:
        InputError: the weights have learned positions, and the backbone has fixed ones (ViT).
        KeyError: the weights have a Swin V2's biases, and the backbone has no place for them.
    """
    # Fixed positions of a ViT are not in the backbone's state dict, but in timm's weights.
    our_names = {timm_name(POSITIONS): POSITIONS}
    for name in backbone.state_dict():
        our_names[timm_name(name)] = name

    renamed = {}
    for name, tensor in weights.items():
        if name.startswith(CLASSIFIERS) or name.endswith(".v_bias"):
            continue
        if name.endswith(".q_bias"):
            value = weights[name.replace("q_bias", "v_bias")]
            joined = torch.cat([tensor, torch.zeros_like(tensor), value])
            renamed[our_names[name.replace("q_bias", "qkv.bias")]] = joined
        else:
            renamed[our_names.get(name, name)] = tensor
    return with_fitting_positions(renamed, backbone)


def timm_name(name: str) -> str:
    """Return timm's name of one of our tensors. The ResNets' names are the same.

    torchvision numbers Swin's patches, stages and mergings in one row. timm counts a merging to
    the stage that follows it.
    """
    found = re.match(r"features\.(\d)\.(?:(\d+)\.)?(.+)", name)
    if found is None:
        for pattern, replacement in VIT_IN_TIMM:
            name = re.sub(pattern, replacement, name)
        return name

    place, block, rest = int(found[1]), found[2], found[3]
    stage = place // 2
    if place == 0:
        layer = "proj" if block == "0" else "norm"
        return f"patch_embed.{layer}.{rest}"
    if place % 2 == 0:
        return f"layers.{stage}.downsample.{rest}"
    # Numbers 1 and 2 of torchvision's MLP are activation and dropout.
    rest = re.sub(r"^mlp\.0\.", "mlp.fc1.", rest)
    rest = re.sub(r"^mlp\.3\.", "mlp.fc2.", rest)
    return f"layers.{stage}.blocks.{block}.{rest}"


def to_our_names(weights: Weights, backbone: nn.Module) -> Weights:
    """Return the state dict that `backbone` should load, from any library's names or ours.

    Nothing makes sure that it fits: see `moco.weights.architecture.misfit`.

    Raises:
        InputError: the weights were pretrained with another window, or with other positions, than
            the backbone has.
    """
    weights = merging_after_its_stage(from_sequential(weights))
    check_coordinates(weights, backbone)
    learned = {name: x for name, x in weights.items() if not name.endswith(COMPUTED)}

    # Microsoft's and timm's models begin with `patch_embed`, torchvision's never do.
    if any(name.startswith("patch_embed.") for name in learned):
        try:
            renamed = from_timm(learned, backbone)
        except KeyError:
            # The weights are a Swin V2's and the backbone is not. `misfit` names the tensors that
            # do not fit, so they keep their names.
            return learned
    else:
        renamed = from_torchvision(learned, backbone)

    # Files that are older than PyTorch 0.4.1 have no such counters.
    for name, tensor in backbone.state_dict().items():
        if name.endswith("num_batches_tracked") and name not in renamed:
            renamed[name] = torch.zeros_like(tensor, device="cpu")
    return renamed


def from_sequential(weights: Weights) -> Weights:
    """Return a ResNet's names, where it was made an nn.Sequential of its children.

    The first two are conv1 and bn1. The four layers are those that hold blocks. Where they begin
    depends on the modules without tensors before them: torchvision's children have ReLU and
    max-pool there (lightly's examples), the official notebook has ReLU alone, and lightly's own
    ResNet has neither. The last one calls a downsample shortcut.
    """
    if "0.weight" not in weights:
        return weights
    stages = []
    for name in weights:
        if re.match(r"\d+\.\d+\.", name):
            stages.append(int(name.partition(".")[0]))
    first = min(stages, default=4)
    children = {"0": "conv1", "1": "bn1"}
    for number in range(4):
        children[str(first + number)] = f"layer{number + 1}"

    renamed = {}
    for name, tensor in weights.items():
        child, _, rest = name.partition(".")
        child = children.get(child, child)
        rest = rest.replace("shortcut.", "downsample.")
        renamed[f"{child}.{rest}"] = tensor
    return renamed


def merging_after_its_stage(weights: Weights) -> Weights:
    """Return a Swin's names as timm has had them since version 0.9.

    Microsoft and older versions of timm count a merging to the stage before it.
    """
    if not any(name.startswith("layers.0.downsample.") for name in weights):
        return weights
    renamed = {}
    for name, tensor in weights.items():
        found = re.match(r"layers\.(\d)\.downsample\.(.+)", name)
        if found is not None:
            name = f"layers.{int(found[1]) + 1}.downsample.{found[2]}"
        renamed[name] = tensor
    return renamed


def first_of_each_stage(weights: Weights, ending: str) -> list[Tensor]:
    """Return one tensor of each stage of a Swin: the first whose name has this ending."""
    first: Weights = {}
    for name in sorted(weights):
        found = re.match(rf"(?:features|layers)\.(\d)\..*\.{ending}$", name)
        if found is not None:
            first.setdefault(found[1], weights[name])
    return list(first.values())
