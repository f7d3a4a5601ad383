"""Write a backbone's weights for other libraries.

``python -m moco.export checkpoint=PATH format=torchvision|timm|safetensors output=FILE``
"""

import dataclasses
import errno
import io
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moco.cli.launch import launch, save_hydra_files
from moco.config.pretrained import ExportConfig, given_settings, with_usual_settings
from moco.errors import InputError, RunError
from moco.weights.pretrained import load_pretrained

if TYPE_CHECKING:
    from moco.models.vit import VisionTransformer

ENDINGS = {
    "safetensors": (".safetensors",),
    "timm": (".pt", ".pth", ".safetensors"),
    "torchvision": (".pt", ".pth", ".safetensors"),
}
TORCHVISION_WINDOWS = {
    1: 7,
    2: 8,
}  # of torchvision's builders, by version of Swin; they take no other
TORCHVISION_HEADS = 12  # of torchvision's vit_b_16


def run(config: ExportConfig, folder: Path) -> None:
    """Write the file; print what is in it and the lines that load it. `folder` keeps a record of the config.

    Raises:
        InputError: the checkpoint cannot be read, the library has no such model, or the file cannot be written.
        RunError: the disk is full.
    """
    import torch
    from rich.console import Console

    from moco.cli.progress import print_table
    from moco.runs.run_folder import claimed

    output = Path(config.output)
    check_output(output, config.format)
    given = given_settings(config.backbone)
    pretrained = load_pretrained(config.checkpoint, config.encoder, given)
    backbone: Any = pretrained.encoder.backbone.to(
        memory_format=torch.contiguous_format
    )  # as any reader expects it
    built_with, of_run = pretrained.settings, with_usual_settings(pretrained.config)
    image_size = of_run["data"]["image_size"] or config.image_size
    if image_size is None:
        raise InputError(
            f"image_size: missing; {config.checkpoint} does not say it, give image_size=PIXELS"
        )
    if pretrained.window_size is not None:
        image_size = round(image_size * backbone.window_size[0] / pretrained.window_size[0])
    image_size = config.image_size or image_size
    about = {
        "image_size": image_size,
        "mean": of_run["augmentation"]["mean"],
        "std": of_run["augmentation"]["std"],
        "encoder": config.encoder,
        "epoch": pretrained.epoch,
        "step": pretrained.step,
        "checkpoint": config.checkpoint,
    }
    write(output, content_of(config.format, output, backbone, built_with, about))
    with claimed(folder, dataclasses.asdict(config)):
        save_hydra_files(folder)

    console = Console()
    print_table(console, f"Exported for {config.format}", rows(backbone, built_with, about))
    print_plain(console, f"written to {os.path.relpath(output)}; to load it:")
    for line in loading_lines(config.format, output, backbone, built_with, image_size):
        print_plain(console, f"    {line}")
    if note := deviation(config.format, backbone, image_size):
        print_plain(console, f"note: {note}")


def check_output(output: Path, file_format: str) -> None:
    """Raises InputError if the output's name is not that of a file of the format."""
    if output.is_dir():
        raise InputError(f"output={output}: a folder; expected the name of a file")
    if output.suffix not in (endings := ENDINGS[file_format]):
        raise InputError(
            f"output={output}: unknown ending '{output.suffix}' of a file for format={file_format} "
            f"(choices: {', '.join(endings)})"
        )


def content_of(
    file_format: str, output: Path, backbone: Any, built_with: dict[str, Any], about: dict[str, Any]
) -> bytes:
    """The file's content.

    Raises:
        InputError: the library has no such model, or safetensors is needed and not installed.
    """
    import torch

    from moco.weights.library_names import counterpart, to_timm, to_torchvision, write_backbone
    from moco.weights.safetensors_files import as_safetensors

    if file_format == "safetensors":
        return write_backbone(backbone, built_with, about)
    counterpart(built_with, file_format)
    renamed = to_torchvision if file_format == "torchvision" else to_timm
    weights = renamed(backbone, about["image_size"])
    if output.suffix == ".safetensors":
        return as_safetensors(weights)
    buffer = io.BytesIO()
    torch.save(weights, buffer)
    return buffer.getvalue()


def write(output: Path, content: bytes) -> None:
    """Put the file in place, whole or not at all.

    Raises:
        InputError: no file can be written there.
        RunError: the disk is full.
    """
    from moco.runs.atomic_files import write_atomically

    try:
        write_atomically(output, lambda file: file.write(content))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(f"output={output}: {error.strerror}") from error
        raise InputError(f"output={output}: cannot be written ({error.strerror})") from error


def rows(backbone: Any, built_with: dict[str, Any], about: dict[str, Any]) -> list[tuple[str, str]]:
    """What is in the file, for the table."""
    from moco.weights.library_names import settings_of

    settings = settings_of(backbone, built_with)
    name = settings.pop("name")
    parameters = sum(parameter.numel() for parameter in backbone.parameters())
    return [
        ("backbone", ", ".join([name, *(f"{key} {value}" for key, value in settings.items())])),
        ("parameters", f"{parameters:,}"),
        ("encoder", f"{about['encoder']}, epoch {about['epoch']}, step {about['step']}"),
        ("checkpoint", about["checkpoint"]),
        ("feature_dim", str(backbone.feature_dim)),
        ("image_size", f"{about['image_size']} px"),
        ("mean, std", f"{about['mean']}, {about['std']} of pixels in 0..1"),
    ]


def loading_lines(
    file_format: str, output: Path, backbone: Any, built_with: dict[str, Any], image_size: int
) -> list[str]:
    """Python that loads the file into a model of the library without classifier, or into ours."""
    from moco.weights.library_names import counterpart

    path = json.dumps(str(output))
    if file_format == "safetensors":
        return [
            "from moco.weights.library_names import read_backbone",
            f"model, about = read_backbone({path})",
        ]
    name = counterpart(built_with, file_format)
    if output.suffix == ".safetensors":
        reading, weights = ["from safetensors.torch import load_file"], f"load_file({path})"
    else:
        reading, weights = [], f"torch.load({path}, weights_only=True)"
    if file_format == "timm":
        arguments = timm_arguments(backbone, image_size)
        model = [
            "import timm, torch",
            f'model = timm.create_model("{name}", num_classes=0{arguments})',
        ]
    else:
        model = [
            *torchvision_model(name, backbone, image_size),
            f"model.{torchvision_head(backbone)} = torch.nn.Identity()",
        ]
    return [*reading, *model, f"model.load_state_dict({weights}, strict=True)"]


def timm_arguments(backbone: Any, image_size: int) -> str:
    """The arguments of timm's constructor for the images, the heads, the windows and what normalises V2's coordinates."""
    from moco.models.swin.backbone import Swin
    from moco.models.vit import VisionTransformer
    from moco.weights.library_names import one_or_each

    if isinstance(backbone, VisionTransformer):
        return f", num_heads={backbone.num_heads}, img_size={whole_patches(backbone, image_size)}"
    if not isinstance(backbone, Swin):
        return ""
    arguments = f", img_size={image_size}, window_size={one_or_each(backbone.window_size)}"
    if backbone.version == 2:
        arguments += f", pretrained_window_sizes={list(backbone.pretrained_window_size)}"
    return arguments


def whole_patches(backbone: "VisionTransformer", image_size: int) -> int:
    """The side of the images that a ViT sees in place of images of `image_size`, px: of whole patches."""
    return backbone.cells(image_size) * backbone.patch_size


def torchvision_head(backbone: Any) -> str:
    """What torchvision calls the classifier."""
    from moco.models.swin.backbone import Swin
    from moco.models.vit import VisionTransformer

    if isinstance(backbone, VisionTransformer):
        return "heads"
    return "head" if isinstance(backbone, Swin) else "fc"


def torchvision_model(name: str, backbone: Any, image_size: int) -> list[str]:
    """Lines that build torchvision's model: by its name, or by its class where it has no such name, window or heads."""
    from moco.models.swin.backbone import Swin
    from moco.models.vit import VisionTransformer

    if isinstance(backbone, VisionTransformer):
        return torchvision_vit(name, backbone, image_size)
    if (
        not isinstance(backbone, Swin)
        or backbone.window_size[0] == TORCHVISION_WINDOWS[backbone.version]
    ):
        return ["import torch, torchvision", f"model = torchvision.models.{name}()"]
    block, merging = (
        ("SwinTransformerBlock", "PatchMerging")
        if backbone.version == 1
        else ("SwinTransformerBlockV2", "PatchMergingV2")
    )
    stages: list[Any] = list(backbone.stages())
    return [
        "import torch",
        "from torchvision.models import swin_transformer",
        "model = swin_transformer.SwinTransformer(",
        f"    patch_size={[backbone.patch_size] * 2},",
        f"    embed_dim={backbone.feature_map_dims[0]},",
        f"    depths={[len(blocks) for blocks in stages]},",
        f"    num_heads={[blocks[0].attn.num_heads for blocks in stages]},",
        f"    window_size={[backbone.window_size[0]] * 2},",
        f"    block=swin_transformer.{block},",
        f"    downsample_layer=swin_transformer.{merging},",
        ")",
    ]


def torchvision_vit(name: str, backbone: "VisionTransformer", image_size: int) -> list[str]:
    """The same for ViT, of which torchvision names none of this width or number of heads but vit_b_16."""
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
    """Why the library's outputs differ from ours for images of this size, if they do.

    Both pad a map to whole windows and let the padding take part in attention; timm cuts a window down to a smaller map, as
    we do, torchvision pads the map. Both leave the last pixels out where a patch is incomplete. Their ViT has positions for
    one image size and takes no other.
    """
    from moco.models.swin.backbone import Swin
    from moco.models.vit import VisionTransformer
    from moco.weights.library_names import sides_there

    if file_format != "safetensors" and isinstance(backbone, VisionTransformer):
        whole = whole_patches(backbone, image_size)
        if whole == image_size:
            return None
        remedy = (
            "fill the images up with zeros at the right and the bottom"
            if whole > image_size
            else "cut the rest off"
        )
        return f"{file_format}'s model takes {whole} px and not {image_size}; for the same outputs {remedy}"
    if file_format == "safetensors" or not isinstance(backbone, Swin):
        return None
    padded = []
    for side, window in zip(sides_there(backbone, image_size), backbone.window_size, strict=True):
        cells = min(side, window) if file_format == "timm" else window
        if side % cells:
            padded.append(f"{side} to {-(-side // cells) * cells}")
    if padded:
        return (
            f"for {image_size} px {file_format} pads maps ({', '.join(padded)} cells) and lets the padding take part in "
            "attention: its outputs differ there from this project's"
        )
    if image_size % backbone.patch_size and backbone.partial_patches == "complete":
        return f"of {image_size} px {file_format} leaves the last {image_size % backbone.patch_size} out: its outputs differ"
    return None


def print_plain(console: Any, line: str) -> None:
    """A line that can be copied: not folded, its brackets no markup."""
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def main() -> None:
    """Entry point of ``moco-export``."""
    launch(run, ExportConfig, "export")


if __name__ == "__main__":
    main()
