"""The formats of `moco.export`: the content of a file, and the Python lines that load it."""

import io
import json
from pathlib import Path
from typing import Any

import torch

from moco.errors import InputError
from moco.models.contract import PatchBackbone
from moco.models.swin.backbone import Swin, map_sides, one_or_each
from moco.models.timm_backbone import TimmBackbone
from moco.models.vit import VisionTransformer
from moco.weights.architecture import described
from moco.weights.backbone_files import as_safetensors
from moco.weights.inflation import RGB_BANDS, first_convolution
from moco.weights.library_names import counterpart, to_timm, to_torchvision

ENDINGS = {
    "safetensors": (".safetensors",),
    "smp": (".pt", ".pth", ".safetensors"),
    "timm": (".pt", ".pth", ".safetensors"),
    "torchvision": (".pt", ".pth", ".safetensors"),
}


def check_ending(output: Path, file_format: str) -> None:
    """Raise InputError if the output cannot be a file of the format."""
    endings = ENDINGS[file_format]
    if output.suffix not in endings:
        raise InputError(
            f"output={output}: unknown ending '{output.suffix}' of a file for "
            f"format={file_format} (choices: {', '.join(endings)})"
        )


def export_content(
    file_format: str, output: Path, backbone: Any, settings: dict[str, Any], about: dict[str, Any]
) -> bytes:
    """Return the content of the exported file.

    Args:
        settings: the arguments of `build_backbone` that the backbone was made with.
        about: what to say about the weights; `image_size` is the side of the images, px.

    Raises:
        InputError: the library has no such model, or safetensors is needed and not installed.
    """
    if file_format == "safetensors":
        return as_safetensors(backbone.state_dict(), {"backbone": settings, **about})
    if file_format == "timm" and isinstance(backbone, TimmBackbone):
        weights = backbone.net.state_dict()
    else:
        counterpart(settings, file_format)  # Raises where the library has no such model.
        image_size = about["image_size"]
        if file_format == "timm":
            weights = to_timm(backbone, image_size)
        else:
            # smp's encoders are torchvision's ResNets without the classifier.
            weights = to_torchvision(backbone, image_size)
    if output.suffix == ".safetensors":
        return as_safetensors(weights, {})
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    return buffer.getvalue()


def summary_rows(
    backbone: Any, settings: dict[str, Any], about: dict[str, Any]
) -> list[tuple[str, str]]:
    """Return what is in the file, for the table."""
    num_parameters = sum(parameter.numel() for parameter in backbone.parameters())
    return [
        ("backbone", described(settings)),
        ("parameters", f"{num_parameters:,}"),
        ("encoder", f"{about['encoder']}, epoch {about['epoch']}, step {about['step']}"),
        ("checkpoint", about["checkpoint"]),
        ("feature_dim", str(backbone.feature_dim)),
        ("image_size", f"{about['image_size']} px"),
        ("mean, std", f"{about['mean']}, {about['std']} of pixels in 0..1"),
    ]


def loading_lines(
    file_format: str, output: Path, backbone: Any, settings: dict[str, Any], image_size: int
) -> list[str]:
    """Return Python lines that load the file into a model without classifier.

    For smp it is a model that segments, whose encoder gets the weights.

    Args:
        settings: the arguments of `build_backbone` that the backbone was made with.
        image_size: side of the images, px.
    """
    path = json.dumps(str(output))
    if file_format == "safetensors":
        return [
            "from moco.weights.load_encoder import load_pretrained",
            f'model = load_pretrained({path}, "query", {{}}).encoder',
        ]
    if file_format == "timm" and isinstance(backbone, TimmBackbone):
        name = backbone.model
    else:
        name = counterpart(settings, file_format)
    module = "model"
    if file_format == "smp":
        module = "model.encoder"
        lines = [
            "import segmentation_models_pytorch as smp, torch",
            f'model = smp.Unet("{name}", encoder_weights=None, '
            f"in_channels={bands_of(backbone)}, classes=2)",
        ]
    elif file_format == "timm":
        arguments = {"num_classes": 0} | timm_arguments(backbone, image_size)
        lines = ["import timm, torch", f'model = timm.create_model("{name}", {listed(arguments)})']
    else:
        lines = torchvision_lines(name, backbone, image_size)
    if output.suffix == ".safetensors":
        lines.append("from safetensors.torch import load_file")
        weights = f"load_file({path})"
    else:
        weights = f"torch.load({path}, weights_only=True)"
    return [*lines, f"{module}.load_state_dict({weights}, strict=True)"]


def timm_arguments(backbone: Any, image_size: int) -> dict[str, Any]:
    """Return the arguments of timm's constructor for the image size, the heads and the windows."""
    arguments: dict[str, Any] = {}
    if isinstance(backbone, TimmBackbone):
        arguments |= backbone.arguments
    elif bands_of(backbone) != RGB_BANDS:
        arguments["in_chans"] = bands_of(backbone)
    if isinstance(backbone, VisionTransformer):
        arguments["num_heads"] = backbone.num_heads
    if isinstance(backbone, PatchBackbone):
        arguments["img_size"] = whole_patches(backbone, image_size)
    if isinstance(backbone, Swin):
        arguments["window_size"] = one_or_each(backbone.window_size)
        if backbone.switches["position_bias"] != "table":
            arguments["pretrained_window_sizes"] = list(backbone.pretrained_window_size)
    return arguments


def torchvision_lines(name: str, backbone: Any, image_size: int) -> list[str]:
    """Return the lines that build torchvision's model without its classifier.

    For Swin and ViT they call torchvision's classes. Its functions by name cannot give them other
    windows or heads.
    """
    arguments: dict[str, Any] = {}
    if isinstance(backbone, VisionTransformer):
        function = "vision_transformer.VisionTransformer"
        classifier = "heads"
        arguments = {
            "image_size": whole_patches(backbone, image_size),
            "patch_size": backbone.patch_size,
            "num_layers": len(list(backbone.blocks())),
            "num_heads": backbone.num_heads,
            "hidden_dim": backbone.feature_dim,
            "mlp_dim": 4 * backbone.feature_dim,
        }
    elif isinstance(backbone, Swin):
        function = "swin_transformer.SwinTransformer"
        classifier = "head"
        block, merging = torchvision_parts(backbone.switches)
        depths = []
        num_heads = []
        for blocks in backbone.stages():
            depths.append(len(blocks))
            num_heads.append(blocks[0].attn.num_heads)
        arguments = {
            "patch_size": [backbone.patch_size] * 2,
            "embed_dim": backbone.feature_map_dims[0],
            "depths": depths,
            "num_heads": num_heads,
            "window_size": [backbone.window_size[0]] * 2,
            "block": block,
            "downsample_layer": merging,
        }
    else:
        function = name
        classifier = "fc"
    lines = ["import torch"]
    if arguments.get("block", "").startswith("partial("):
        lines.append("from functools import partial")
    lines += [
        "from torchvision import models",
        f"model = models.{function}({listed(arguments)})",
        f"model.{classifier} = torch.nn.Identity()",
    ]
    if bands_of(backbone) != RGB_BANDS:
        lines.append(stem_line(backbone))
    return lines


def torchvision_parts(switches: dict[str, str]) -> tuple[str, str]:
    """Return torchvision's classes for the blocks and the patch merging of a Swin, as Python code.

    A block has the attention of its own version of Swin, or is given the other one.

    Args:
        switches: of the `Swin`, which torchvision has.
    """
    norm_suffix = "V2"
    if switches["norm"] == "pre":
        norm_suffix = ""
    attention_suffix = "V2"
    if switches["attention"] == "dot":
        attention_suffix = ""
    module = "models.swin_transformer"
    block = f"{module}.SwinTransformerBlock{norm_suffix}"
    if attention_suffix != norm_suffix:
        attention = f"{module}.ShiftedWindowAttention{attention_suffix}"
        block = f"partial({block}, attn_layer={attention})"
    return block, f"{module}.PatchMerging{norm_suffix}"


def bands_of(backbone: Any) -> int:
    """Return the number of bands of the images that a backbone of this project reads."""
    found = first_convolution(backbone)
    if found is None:
        return RGB_BANDS
    _, stem = found
    return stem.in_channels


def stem_line(backbone: Any) -> str:
    """Return the line that gives torchvision's model a first convolution for other bands."""
    found = first_convolution(backbone)
    assert found is not None  # `bands_of` is not 3
    name, stem = found
    place = "model"
    for part in name.split("."):
        if part.isdecimal():  # of a list of modules
            place += f"[{part}]"
        else:
            place += f".{part}"
    arguments = {
        "kernel_size": stem.kernel_size,
        "stride": stem.stride,
        "padding": stem.padding,
        "bias": stem.bias is not None,
    }
    channels = f"{stem.in_channels}, {stem.out_channels}"
    return f"{place} = torch.nn.Conv2d({channels}, {listed(arguments)})"


def listed(arguments: dict[str, Any]) -> str:
    """Return keyword arguments as Python code."""
    return ", ".join(f"{key}={value}" for key, value in arguments.items())


def whole_patches(backbone: PatchBackbone, image_size: int) -> int:
    """Return the side of the images that a backbone sees, px: a whole number of patches."""
    return backbone.cells(image_size) * backbone.patch_size


def deviation(library: str, backbone: Any, image_size: int) -> str | None:
    """Return why the library's outputs differ from ours for images of this size, if they do.

    The libraries take images of whole patches. In a Swin, both pad a map to whole windows and let
    the padding take part in attention. timm reduces a window to a smaller map, as we do, but
    torchvision pads the map.
    """
    if library == "safetensors" or not isinstance(backbone, PatchBackbone):
        return None
    whole = whole_patches(backbone, image_size)
    padded = []
    if isinstance(backbone, Swin):
        sides = map_sides(whole, backbone.patch_size)
        for side, window in zip(sides, backbone.window_size, strict=True):
            if library == "timm":
                window = min(side, window)
            if side % window:
                padded.append(f"{side} to {-(-side // window) * window}")
    if padded:
        return (
            f"for {image_size} px {library} pads maps ({', '.join(padded)} cells) and lets "
            "the padding take part in attention: its outputs differ from this project's"
        )
    if whole == image_size:
        return None
    remedy = "crop the images"
    if whole > image_size:
        remedy = "pad the images with zeros"
    return (
        f"{library}'s model takes {whole} px and not {image_size} px; "
        f"for the same outputs {remedy} at the right and the bottom"
    )
