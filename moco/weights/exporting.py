"""The formats of `moco.export`: the content of a file, and the Python lines that load it."""

import errno
import io
import json
from pathlib import Path
from typing import Any

import torch

from moco.errors import InputError, RunError
from moco.models.swin.backbone import Swin
from moco.models.vit import VisionTransformer
from moco.runs.atomic_files import write_atomically
from moco.weights.architecture import described, one_or_each
from moco.weights.backbone_files import as_safetensors, write_backbone
from moco.weights.library_names import counterpart, library_map_sides, to_timm, to_torchvision

ENDINGS = {
    "safetensors": (".safetensors",),
    "timm": (".pt", ".pth", ".safetensors"),
    "torchvision": (".pt", ".pth", ".safetensors"),
}
# The window of torchvision's builders, by version of Swin. They take no other.
TORCHVISION_WINDOWS = {1: 7, 2: 8}
TORCHVISION_HEADS = 12  # of torchvision's vit_b_16


def check_output(output: Path, file_format: str) -> None:
    """Raise InputError if the output cannot be a file of the format."""
    if output.is_dir():
        raise InputError(f"output={output}: a folder; expected the name of a file")
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
        return write_backbone(backbone, settings, about)
    counterpart(settings, file_format)  # Raises where the library has no such model.
    if file_format == "torchvision":
        weights = to_torchvision(backbone, about["image_size"])
    else:
        weights = to_timm(backbone, about["image_size"])
    if output.suffix == ".safetensors":
        return as_safetensors(weights)
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    return buffer.getvalue()


def write_export(output: Path, content: bytes) -> None:
    """Write the file, as a whole or not at all.

    Raises:
        InputError: no file can be written there.
        RunError: the disk is full.
    """
    try:
        write_atomically(output, lambda file: file.write(content))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(f"output={output}: {error.strerror}") from error
        raise InputError(f"output={output}: cannot be written ({error.strerror})") from error


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

    Args:
        settings: the arguments of `build_backbone` that the backbone was made with.
        image_size: side of the images, px.
    """
    path = json.dumps(str(output))
    if file_format == "safetensors":
        return [
            "from moco.weights.backbone_files import read_backbone",
            f"model, about = read_backbone({path})",
        ]
    name = counterpart(settings, file_format)
    if file_format == "timm":
        arguments = timm_arguments(backbone, image_size)
        lines = [
            "import timm, torch",
            f'model = timm.create_model("{name}", num_classes=0{arguments})',
        ]
    else:
        lines = torchvision_model(name, backbone, image_size)
        lines.append(f"model.{torchvision_classifier(backbone)} = torch.nn.Identity()")
    if output.suffix == ".safetensors":
        lines.insert(0, "from safetensors.torch import load_file")
        lines.append(f"model.load_state_dict(load_file({path}), strict=True)")
    else:
        weights = f"torch.load({path}, weights_only=True)"
        lines.append(f"model.load_state_dict({weights}, strict=True)")
    return lines


def timm_arguments(backbone: Any, image_size: int) -> str:
    """Return the arguments of timm's constructor for the image size, the heads and the windows."""
    if isinstance(backbone, VisionTransformer):
        side = whole_patches(backbone, image_size)
        return f", num_heads={backbone.num_heads}, img_size={side}"
    if not isinstance(backbone, Swin):
        return ""
    arguments = f", img_size={image_size}, window_size={one_or_each(backbone.window_size)}"
    if backbone.version == 2:
        arguments += f", pretrained_window_sizes={list(backbone.pretrained_window_size)}"
    return arguments


def whole_patches(backbone: VisionTransformer, image_size: int) -> int:
    """Return the side of the images that a ViT sees, px: a whole number of patches."""
    return backbone.cells(image_size) * backbone.patch_size


def torchvision_classifier(backbone: Any) -> str:
    """Return torchvision's name of the classifier."""
    if isinstance(backbone, VisionTransformer):
        return "heads"
    if isinstance(backbone, Swin):
        return "head"
    return "fc"


def torchvision_model(name: str, backbone: Any, image_size: int) -> list[str]:
    """Return the lines that build torchvision's model.

    torchvision's class builds it where no name gives this window or number of heads.
    """
    if isinstance(backbone, VisionTransformer):
        return torchvision_vit(name, backbone, image_size)
    if isinstance(backbone, Swin):
        has_builder = backbone.window_size[0] == TORCHVISION_WINDOWS[backbone.version]
        if not has_builder:
            return torchvision_swin(backbone)
    return ["import torch, torchvision", f"model = torchvision.models.{name}()"]


def torchvision_swin(backbone: Swin) -> list[str]:
    """Return the lines that build a Swin with another window than torchvision's builders have."""
    suffix = "V2" if backbone.version == 2 else ""
    stages: list[Any] = list(backbone.stages())
    depths = [len(blocks) for blocks in stages]
    num_heads = [blocks[0].attn.num_heads for blocks in stages]
    return [
        "import torch",
        "from torchvision.models import swin_transformer",
        "model = swin_transformer.SwinTransformer(",
        f"    patch_size={[backbone.patch_size] * 2},",
        f"    embed_dim={backbone.feature_map_dims[0]},",
        f"    depths={depths},",
        f"    num_heads={num_heads},",
        f"    window_size={[backbone.window_size[0]] * 2},",
        f"    block=swin_transformer.SwinTransformerBlock{suffix},",
        f"    downsample_layer=swin_transformer.PatchMerging{suffix},",
        ")",
    ]


def torchvision_vit(name: str, backbone: VisionTransformer, image_size: int) -> list[str]:
    """Return the lines that build a ViT. Of ours, torchvision has a name only for vit_b_16."""
    side = whole_patches(backbone, image_size)
    if name == "vit_b_16" and backbone.num_heads == TORCHVISION_HEADS:
        return [
            "import torch, torchvision",
            f"model = torchvision.models.{name}(image_size={side})",
        ]
    return [
        "import torch",
        "from torchvision.models.vision_transformer import VisionTransformer",
        "model = VisionTransformer(",
        f"    image_size={side},",
        f"    patch_size={backbone.patch_size},",
        f"    num_layers={len(list(backbone.blocks()))},",
        f"    num_heads={backbone.num_heads},",
        f"    hidden_dim={backbone.feature_dim},",
        f"    mlp_dim={4 * backbone.feature_dim},",
        ")",
    ]


def deviation(file_format: str, backbone: Any, image_size: int) -> str | None:
    """Return why the library's outputs differ from ours for images of this size, if they do."""
    if file_format == "safetensors":
        return None
    if isinstance(backbone, VisionTransformer):
        return deviation_of_vit(file_format, backbone, image_size)
    if isinstance(backbone, Swin):
        return deviation_of_swin(file_format, backbone, image_size)
    return None


def deviation_of_vit(library: str, backbone: VisionTransformer, image_size: int) -> str | None:
    """Return `deviation` of a ViT. The libraries' ViTs take one image size, of whole patches."""
    whole = whole_patches(backbone, image_size)
    if whole == image_size:
        return None
    if whole > image_size:
        remedy = "pad the images with zeros at the right and the bottom"
    else:
        remedy = "crop the images at the right and the bottom"
    return (
        f"{library}'s model takes {whole} px and not {image_size} px; for the same outputs {remedy}"
    )


def deviation_of_swin(library: str, backbone: Swin, image_size: int) -> str | None:
    """Return `deviation` of a Swin.

    Both libraries pad a map to whole windows and let the padding take part in attention. timm
    reduces a window to a smaller map, as we do, but torchvision pads the map. Both drop the last
    pixels where a patch is incomplete.
    """
    padded = []
    sides = library_map_sides(backbone, image_size)
    for side, window in zip(sides, backbone.window_size, strict=True):
        if library == "timm":
            window = min(side, window)
        if side % window:
            filled = -(-side // window) * window
            padded.append(f"{side} to {filled}")
    if padded:
        return (
            f"for {image_size} px {library} pads maps ({', '.join(padded)} cells) and lets the "
            "padding take part in attention: its outputs differ from this project's"
        )
    dropped = image_size % backbone.patch_size
    if dropped and backbone.partial_patches == "complete":
        return (
            f"{library} drops the last {dropped} of {image_size} px: "
            "its outputs differ from this project's"
        )
    return None
