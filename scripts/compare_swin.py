"""Compare how Swins behave when the image and the window grow.

    python scripts/compare_swin.py        (needs timm: pip install -e '.[export]')

Two tables. How far torchvision's features of a 565 px image move when zeros are added around it.
And how far the position biases of the offsets that both windows have move from window 7 to window
18.
"""

import timm
import torch
from bench_swin import torchvisions
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from moco.models.backbones import build_backbone
from moco.models.swin.attention import WindowAttention
from moco.models.swin.backbone import Swin
from moco.models.swin.window_change import rewindow

IMAGE_SIZE, CANVAS = 565, 640
WINDOW, NEW_WINDOW = 7, 18


def trained_alike(model: nn.Module) -> nn.Module:
    """Set scales and position biases to random values as they are after training.

    The seed is fixed.
    """
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            nn.init.normal_(parameter, 0.8, 0.2)
        if "cpb_mlp" in name:
            nn.init.normal_(parameter, std=0.3)
        if "bias_table" in name:
            nn.init.normal_(parameter, std=0.5)
    return model.eval()


def maps_of_torchvision(model: nn.Module, images: Tensor) -> list[Tensor]:
    maps = []
    for place, layer in enumerate(model.features):
        images = layer(images)
        if place % 2:
            maps.append(images.permute(0, 3, 1, 2))
    return maps


@torch.no_grad()
def padding_errors() -> list[tuple[str, list[float]]]:
    """Return the largest relative change of each stage."""
    theirs = trained_alike(torchvisions(NEW_WINDOW))
    image = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    side = IMAGE_SIZE // 4 * 4  # torchvision drops the rest
    canvas = torch.zeros(1, 3, CANVAS, CANVAS)
    canvas[..., :side, :side] = image[..., :side, :side]
    alone, padded = (maps_of_torchvision(theirs, images) for images in (image, canvas))
    return [("torchvision, canvas of zeros", errors(alone, padded))]


def errors(alone: list[Tensor], padded: list[Tensor]) -> list[float]:
    """Return the largest difference of each feature map, relative to its largest value."""
    found = []
    for one, other in zip(alone, padded, strict=True):
        height, width = one.shape[-2:]
        difference = (one - other[..., :height, :width]).abs().max()
        found.append(float(difference / one.abs().max()))
    return found


def table_of(attention: nn.Module, window: int) -> Tensor:
    """Return the position biases by offset, (2 window - 1, 2 window - 1, heads)."""
    side = 2 * window - 1
    if hasattr(attention, "bias_table"):
        table = attention.bias_table((window, window))
    else:  # torchvision and timm
        table = 16 * torch.sigmoid(attention.cpb_mlp(attention.relative_coords_table))
    return table.reshape(side, side, -1)


@torch.no_grad()
def bias_error(before: list[Tensor], after: list[Tensor]) -> float:
    """Return the largest difference at the offsets that both windows have."""
    first, last = NEW_WINDOW - WINDOW, NEW_WINDOW + WINDOW - 1
    largest = 0.0
    for one, other in zip(before, after, strict=True):
        largest = max(largest, float((one - other[first:last, first:last]).abs().max()))
    return largest


def layers_of(backbone: Swin) -> list[WindowAttention]:
    return [block.attn for stage in backbone.stages() for block in stage]


@torch.no_grad()
def bias_errors() -> list[tuple[str, float, str]]:
    rows = []
    narrow, wide = trained_alike(torchvisions(WINDOW)), torchvisions(NEW_WINDOW)
    weights = {name: value for name, value in narrow.state_dict().items() if "relative" not in name}
    wide.load_state_dict(weights, strict=False)
    sides = [
        [table_of(layer, window) for layer in model.modules() if hasattr(layer, "cpb_mlp")]
        for model, window in ((narrow, WINDOW), (wide, NEW_WINDOW))
    ]
    rows.append(
        ("torchvision, built anew", bias_error(*sides), "coordinates normalised by the new window")
    )

    model = trained_alike(
        timm.create_model(
            "swinv2_tiny_window8_256", window_size=WINDOW, img_size=224, num_classes=0
        )
    )
    layers = [layer for layer in model.modules() if hasattr(layer, "cpb_mlp")]
    before = [table_of(layer, WINDOW) for layer in layers]
    model.set_input_size(img_size=576, window_size=(NEW_WINDOW, NEW_WINDOW))
    rows.append(
        (
            f"timm {timm.__version__}, set_input_size",
            bias_error(before, [table_of(layer, NEW_WINDOW) for layer in layers]),
            "the same",
        )
    )

    ours = trained_alike(build_backbone("swin_v2_t", window_size=WINDOW))
    linear = build_backbone("swin_v2_t", window_size=WINDOW, position_bias="linear_cpb")
    older = trained_alike(build_backbone("swin_t", window_size=WINDOW))
    for layer, smooth in zip(layers_of(older), layers_of(ours), strict=True):
        # V1's free tables hold V2's smooth biases.
        layer.relative_position_bias_table.copy_(smooth.bias_table((WINDOW, WINDOW)))
    for name, backbone, how in (
        ("Swin V1", older, "the same biases as a table, resized bicubically"),
        ("this project, Swin V2", ours, "normaliser of the pretraining kept"),
        ("this project, linear coordinates", trained_alike(linear), "the same"),
    ):
        before = [table_of(layer, WINDOW) for layer in layers_of(backbone)]
        rewindow(backbone, NEW_WINDOW)
        after = [table_of(layer, NEW_WINDOW) for layer in layers_of(backbone)]
        rows.append((name, bias_error(before, after), how))
    return rows


def main() -> None:
    console = Console()
    table = Table(
        "features of", "stage 1", "stage 2", "stage 3", "stage 4",
        title=f"Largest relative change, {IMAGE_SIZE} px on {CANVAS} px, window {NEW_WINDOW}",
    )  # fmt: skip
    for name, values in padding_errors():
        table.add_row(name, *(f"{value:.1e}" for value in values))
    console.print(table)
    table = Table(
        "position bias of",
        "largest error",
        "how",
        title=f"Shared offsets, window {WINDOW} to {NEW_WINDOW}",
    )
    for name, value, how in bias_errors():
        table.add_row(name, f"{value:.3g}", how)
    console.print(table)


if __name__ == "__main__":
    main()
