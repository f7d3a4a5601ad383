"""Rename a backbone's weights from our names to those of torchvision or timm, and back.

A backbone has no classifier. Its renamed weights load with ``strict=True`` into the library's
model without one:

    model = torchvision.models.resnet50()
    model.fc = torch.nn.Identity()  # Swin: model.head, ViT: model.heads

    model = timm.create_model("resnet50", num_classes=0)

`moco.export` prints these lines for a file, with the arguments for its windows and heads.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moco.errors import InputError
from moco.models.backbones import SWIN_V1, SWIN_V2, switches_of_swin, usual_name
from moco.models.size_constants import Size
from moco.models.swin.attention import WindowAttention
from moco.models.swin.backbone import Swin, clipped_windows, one_or_each
from moco.models.swin.windows import offset_coordinates, relative_positions
from moco.models.timm_backbone import TimmBackbone
from moco.models.vit import VisionTransformer, learned_grid_side, resized_positions

Weights = dict[str, Tensor]

# torchvision has a class for vit_small, but no such name. Its other names are ours.
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2")
# segmentation_models_pytorch takes all other networks from timm, by names that begin with tu-.
SMP_ENCODERS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
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
COMPUTED = (INDEX, COORDINATES, ".attn_mask")

POSITIONS = "encoder.pos_embedding"  # of a ViT
# Parts of our names of a ViT, and of every MLP, whose numbers 1 and 2 are activation and dropout.
IN_TIMM = (
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


def counterpart(settings: dict[str, Any], library: str) -> str:
    """Return the name of a library's model that takes the weights of a backbone.

    Args:
        settings: the arguments of `build_backbone`.
        library: ``torchvision``, ``timm`` or ``smp`` (segmentation_models_pytorch).

    Raises:
        InputError: the library has no such model.
    """
    switches = switches_of_swin(settings)
    if switches and library == "torchvision":
        check_torchvision_has(switches)
    elif switches and library == "timm":
        check_timm_has(switches)
    name = usual_name(settings)
    stem = settings.get("stem") or "imagenet"
    if name in TIMM_MODELS and stem != "imagenet":
        name += f" with stem={stem}"
    if library == "smp" and name not in SMP_ENCODERS:
        raise InputError(
            f"format=smp: {name} is none of the encoders of segmentation_models_pytorch that have "
            f"weights of their own ({', '.join(SMP_ENCODERS)}, with stem=imagenet); moco.segment "
            "trains decoders on every backbone"
        )
    if name not in TIMM_MODELS:
        raise InputError(
            f"format={library}: {library} has no {name}; "
            "format=safetensors keeps the names of this project"
        )
    if library == "timm":
        return TIMM_MODELS[name]
    return name


def to_torchvision(backbone: nn.Module, image_size: int = 224) -> Weights:
    """Return the state dict that torchvision's model of the same architecture loads.

    The names are ours. torchvision's Swin also saves which offset each pair of cells has, and its
    Swin V2 saves the coordinates of the offsets. Ours are normalised by the pretraining window,
    which torchvision does not know. With them, its model keeps the learned biases in other windows
    too, where its own coordinates would stretch them. torchvision's ViT has learned positions for
    one image size, so ours are computed for that size.

    Args:
        image_size: side of the images, px, for ViT.

    Raises:
        InputError: torchvision has no Swin with these switches, or the window differs between the
            stages, which torchvision cannot have.
    """
    weights = dict(backbone.state_dict())
    if isinstance(backbone, VisionTransformer):
        weights[POSITIONS] = positions_for(backbone, image_size)
    if isinstance(backbone, Swin):
        check_torchvision_has(backbone.switches)
        windows = list(backbone.window_size)
        if len(set(windows)) > 1:
            raise InputError(
                f"backbone.window_size={windows}: torchvision's models have one window for all "
                "stages; format=timm and format=safetensors take one for each"
            )
        weights |= window_tables(backbone)
    return weights


def check_torchvision_has(switches: dict[str, str]) -> None:
    """Raise InputError if no class of torchvision has a Swin's switches.

    torchvision's blocks have either norm and take either attention, but its attention with dot
    products has a table and that with cosines has an MLP. The MLP reads coordinates that are saved
    with the weights, so linear ones are as good as log-spaced ones.
    """
    is_dot = switches["attention"] == "dot"
    has_table = switches["position_bias"] == "table"
    if is_dot != has_table:
        raise InputError(
            f"format=torchvision: torchvision has no Swin with {listed_switches(switches)} (dot "
            "products have a table there, and cosines an MLP); format=safetensors keeps the names "
            "of this project"
        )


def check_timm_has(switches: dict[str, str]) -> None:
    """Raise InputError if timm has no Swin with these switches: it has Swin V1 and Swin V2."""
    if switches not in (SWIN_V1, SWIN_V2):
        raise InputError(
            f"format=timm: timm has no Swin with {listed_switches(switches)}, only Swin V1 and "
            "Swin V2; format=safetensors keeps the names of this project"
        )


def listed_switches(switches: dict[str, str]) -> str:
    """Return switches of a Swin as on a command line."""
    return ", ".join(f"{key}={value}" for key, value in switches.items())


def window_tables(backbone: Swin) -> Weights:
    """Return what torchvision's Swin computes from its windows and saves with the weights."""
    tables = {}
    for name, module in backbone.named_modules():
        if not isinstance(module, WindowAttention):
            continue
        # (cells of a window, cells of a window); all blocks share one tensor.
        index = relative_positions(module.window_size, torch.device("cpu"))
        tables[f"{name}.{INDEX}"] = index.clone()
        if module.position_bias != "table":
            windows = (module.window_size, module.pretrained_window_size)
            tables[f"{name}.{COORDINATES}"] = saved_coordinates(*windows, module.position_bias)
    return tables


def saved_coordinates(window: Size, pretrained: Size, position_bias: str = "log_cpb") -> Tensor:
    """Return an MLP's coordinates as torchvision saves them: float32 (1, rows, columns, 2)."""
    coordinates = offset_coordinates(position_bias, window, pretrained, torch.device("cpu"))
    return coordinates.float()[None]


def positions_for(backbone: VisionTransformer, image_size: int) -> Tensor:
    """Return a ViT's positions for square images of `image_size` px: (1, tokens, width)."""
    cells = backbone.cells(image_size)
    return backbone.positions((cells, cells)).detach().clone()


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
    others = dict(weights)
    del others[POSITIONS]
    return others


def to_timm(backbone: nn.Module, image_size: int = 224) -> Weights:
    """Return the state dict that timm's model of the same architecture and windows loads.

    timm's Swin V2 has no bias for keys, which ours does not use. It computes its coordinates from
    the constructor's ``pretrained_window_sizes``.

    Args:
        image_size: timm's ``img_size``, px. Where a map is smaller than its window, timm's Swin V1
            has only the middle of the table of position biases. timm's ViT has positions for this
            size.

    Raises:
        InputError: timm has no Swin with these switches.
    """
    switches = {}
    if isinstance(backbone, Swin):
        switches = backbone.switches
        check_timm_has(switches)
    weights = {}
    for name, tensor in backbone.state_dict().items():
        theirs = timm_name(name)
        if switches.get("attention") == "cosine" and name.endswith(".qkv.bias"):
            query, _, value = tensor.chunk(3)
            # A view would be saved with the whole tensor, so the parts are copied.
            weights[theirs.replace("qkv.bias", "q_bias")] = query.clone()
            weights[theirs.replace("qkv.bias", "v_bias")] = value.clone()
        else:
            weights[theirs] = tensor
    if isinstance(backbone, Swin) and switches["position_bias"] == "table":
        weights |= clipped_bias_tables(backbone, image_size)
    if isinstance(backbone, VisionTransformer):
        weights[timm_name(POSITIONS)] = positions_for(backbone, image_size)
    return weights


def clipped_bias_tables(backbone: Swin, image_size: int) -> Weights:
    """Return a Swin's tables of position biases, under timm's names, as timm clips them."""
    tables = {}
    whole_patches = backbone.cells(image_size) * backbone.patch_size
    windows = clipped_windows(whole_patches, backbone.window_size, backbone.patch_size)
    for stage, blocks in enumerate(backbone.stages()):
        window = (windows[stage], windows[stage])
        for number, block in enumerate(blocks):
            table = block.attn.bias_table(window).detach().clone()
            tables[f"layers.{stage}.blocks.{number}.attn.relative_position_bias_table"] = table
    return tables


@functools.cache
def timm_name(name: str) -> str:
    """Return timm's name of one of our tensors. The ResNets' names are the same.

    torchvision numbers Swin's patches, stages and mergings in one row. timm counts a merging to
    the stage that follows it.
    """
    found = re.match(r"features\.(\d)\.(?:(\d+)\.)?(.+)", name)
    if found is not None:
        place, block, rest = int(found[1]), found[2], found[3]
        if place == 0:
            layer = "norm"
            if block == "0":
                layer = "proj"
            name = f"patch_embed.{layer}.{rest}"
        elif place % 2 == 0:
            name = f"layers.{place // 2}.downsample.{rest}"
        else:
            name = f"layers.{place // 2}.blocks.{block}.{rest}"
    for pattern, replacement in IN_TIMM:
        name = re.sub(pattern, replacement, name)
    return name


def to_our_names(weights: Weights, backbone: nn.Module) -> Weights:
    """Return the state dict that `backbone` loads, from the names of any library or ours.

    This undoes `to_torchvision` and `to_timm`. Nothing makes sure that the tensors fit: see
    `moco.weights.architecture.misfit`. timm's weights do not tell the window that they were
    pretrained with, or a ViT's heads, so the backbone's have to be right.

    Raises:
        InputError: the weights were pretrained with another window, with other positions, or with
            other switches of a Swin, than the backbone has.
    """
    if isinstance(backbone, TimmBackbone):
        return in_timm_backbone(weights, backbone)
    weights = merging_after_its_stage(from_sequential(weights))
    if isinstance(backbone, Swin):
        check_switches(switches_seen(weights), backbone.switches)
    check_coordinates(weights, backbone)
    # torchvision's names are ours. Fixed positions of a ViT are in timm's weights alone.
    our_names = {timm_name(POSITIONS): POSITIONS}
    expected = backbone.state_dict()
    for name in expected:
        our_names[timm_name(name)] = name

    ours = {}
    for name, tensor in weights.items():
        if name.startswith(CLASSIFIERS) or name.endswith(COMPUTED):
            continue
        if name.endswith("q_bias"):
            # Without the other part the shape is wrong, which `misfit` finds.
            value = weights.get(name.replace("q_bias", "v_bias"), tensor[:0])
            tensor = torch.cat([tensor, torch.zeros_like(tensor), value])
            name = name.replace("q_bias", "qkv.bias")
        if not name.endswith("v_bias"):
            ours[our_names.get(name, name)] = tensor
    # Files that are older than PyTorch 0.4.1 have no such counters.
    for name, tensor in expected.items():
        if name.endswith("num_batches_tracked") and name not in ours:
            ours[name] = torch.zeros_like(tensor, device="cpu")
    return with_fitting_positions(ours, backbone)


def in_timm_backbone(weights: Weights, backbone: TimmBackbone) -> Weights:
    """Return the state dict that a network of timm loads as a backbone, from timm's own names.

    Raises:
        InputError: positions alone differ in shape, so the weights are for another image size.
    """
    own = backbone.net.state_dict()
    others = []
    for name, tensor in weights.items():
        if name in own and tensor.shape != own[name].shape:
            others.append(name)
    if others and weights.keys() == own.keys() and all("pos" in name for name in others):
        raise InputError(
            f"its weights are for images of another size: {others[0]} is "
            f"{tuple(weights[others[0]].shape)} and should be {tuple(own[others[0]].shape)}; give "
            "their size, px, as backbone.image_size"
        )
    return {f"net.{name}": tensor for name, tensor in weights.items()}


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
        found = re.match(r"(\d+)\.\d+\.", name)
        if found is not None:
            stages.append(int(found[1]))
    first = min(stages, default=4)
    children = {"0": "conv1", "1": "bn1"}
    for number in range(4):
        children[str(first + number)] = f"layer{number + 1}"

    renamed = {}
    for name, tensor in weights.items():
        child, _, rest = name.replace("shortcut.", "downsample.").partition(".")
        renamed[f"{children.get(child, child)}.{rest}"] = tensor
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


def switches_seen(weights: Weights) -> dict[str, str]:
    """Return the switches of a Swin that show in its weights, under any library's names.

    An MLP of the position bias may read linear or log-spaced coordinates, which shows only where
    they are saved with it.
    """
    switches = {}
    for name, norm in weights.items():
        if re.search(r"(features\.[246]|layers\.\d\.downsample)\.norm\.weight$", name):
            # Patch merging projects 4 C channels to 2 C.
            projection = weights.get(name.replace("norm", "reduction"))
            if projection is None:
                continue
            if norm.shape == projection.shape[1:]:
                switches["norm"] = "pre"
            elif norm.shape == projection.shape[:1]:
                switches["norm"] = "res_post"
    if not switches:
        return {}  # not a Swin
    switches["attention"] = "dot"
    for name in weights:
        if name.endswith("attn.logit_scale"):
            switches["attention"] = "cosine"
        elif name.endswith("attn.relative_position_bias_table"):
            switches["position_bias"] = "table"
    kind = kind_of_coordinates(first_of_each_stage(weights, COORDINATES))
    if kind is not None:
        switches["position_bias"] = kind
    return switches


def check_switches(theirs: dict[str, str], own: dict[str, str]) -> None:
    """Raise InputError if the weights of a Swin have other switches than the backbone.

    Args:
        theirs: the switches of the weights, as far as they are known.
        own: those of the backbone.
    """
    wanted = {}
    for key, value in theirs.items():
        if key in own and own[key] != value:
            wanted[key] = value
    if wanted:
        here = {key: own[key] for key in wanted}
        remedy = " ".join(f"backbone.{key}={value}" for key, value in wanted.items())
        raise InputError(
            f"its weights are of a Swin with {listed_switches(wanted)}, and the backbone has "
            f"{listed_switches(here)}; set {remedy}"
        )


def check_coordinates(weights: Weights, backbone: nn.Module) -> None:
    """Raise InputError if a Swin's weights were pretrained with other windows than assumed."""
    tables = first_of_each_stage(weights, COORDINATES)
    if not isinstance(backbone, Swin) or len(tables) != 4:
        return
    assumed = list(backbone.pretrained_window_size)
    found = pretrained_windows(tables, assumed)
    if found != assumed:
        right = one_or_each(found)
        raise InputError(
            f"the weights were pretrained with windows of {right} cells, and "
            f"pretrained_window_size={one_or_each(assumed)} would stretch their position "
            f"biases; set pretrained_window_size={str(right).replace(' ', '')}"
        )


def kind_of_coordinates(tables: Sequence[Tensor]) -> str | None:
    """Return the position_bias whose MLP reads tables of coordinates.

    On a linear scale two cells lie twice as far as one. On a log scale they lie at most 1.9 times
    as far, for windows of up to 64 cells.

    Args:
        tables: (1, 2 window - 1, 2 window - 1, 2) each, as torchvision saves them. Without one of a
            window of at least three cells the result is None.
    """
    for table in tables:
        middle = table.shape[1] // 2
        if middle >= 2:
            one_cell = float(table[0, middle + 1, middle, 0])
            two_cells = float(table[0, middle + 2, middle, 0])
            if two_cells > 1.95 * one_cell:
                return "linear_cpb"
            return "log_cpb"
    return None


def pretrained_windows(tables: Sequence[Tensor], usual: Sequence[int]) -> list[int]:
    """Return the windows that normalise tables of coordinates, as torchvision saves them.

    The offset of one cell tells. A window of a single cell has no such offset, so it is the usual
    one.

    Args:
        tables: (1, 2 window - 1, 2 window - 1, 2) each.
        usual: one window for each table, cells.
    """
    is_linear = kind_of_coordinates(tables) == "linear_cpb"
    windows = []
    for table, window in zip(tables, usual, strict=True):
        middle = table.shape[1] // 2
        if middle > 0:
            one_cell = float(table[0, middle + 1, middle, 0])
            if not is_linear:
                one_cell = (2 ** (3 * one_cell) - 1) / 8
            window = round(1 / one_cell + 1)
        windows.append(window)
    return windows
