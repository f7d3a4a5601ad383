"""An image of pairs as the model will see them: ``python -m moco.preview +experiment=NAME output=FILE.png``.

It takes every setting of ``moco.train``. The pairs are the first ones of a run with these settings, made by its own engine.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from moco.cli.launch import launch
from moco.config.train import PreviewConfig
from moco.errors import InputError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from moco.data.files.decoding import EncodedImage
    from moco.data.loading.datamodule import PretrainingData

SMALLEST = 112  # px; smaller views are enlarged, so that what is written beside them has room
LINE, MARGIN, TEXT = (
    15,
    8,
    430,
)  # px: height of a line of text, space around, width of a column of text


def run(config: PreviewConfig, folder: Path) -> None:
    """Draw the image; nothing is kept in `folder`.

    Raises:
        InputError: something in the config does not fit the data, or the image cannot be written.
    """
    output = Path(config.output)
    if output.suffix.lower() != ".png":
        raise InputError(f"output={config.output}: expected a name that ends in .png")

    from moco.cli.build_pretraining import build_data

    data = build_data(config)
    images = data.first_images(config.num_pairs)
    image = sheet(data, images)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        image.save(output)
    except OSError as error:
        raise InputError(f"output={config.output}: {error.strerror or error}") from error
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()  # made by Hydra
    print(f"{len(images)} pairs in {output}")


def sheet(data: "PretrainingData", images: "list[tuple[int, EncodedImage, str]]") -> "Image.Image":
    """A row for each pair: query view, its numbers, key view, its numbers."""
    from PIL import Image, ImageDraw, ImageFont

    columns = [as_images(views, data) for views in data.pairs(images)]
    words = [data.augment.described(0, index, encoded.size) for index, encoded, _ in images]
    lines = max(len(described) for row in words for described in row) + 2
    side_length = columns[0][0].height
    height, width = max(side_length, lines * LINE) + MARGIN, side_length + 2 * MARGIN + TEXT
    image = Image.new("RGB", (2 * width, len(words) * height + MARGIN), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(12)
    for row, described in enumerate(words):
        for side, name in enumerate(("query", "key")):
            left, top = side * width + MARGIN, row * height + MARGIN
            image.paste(columns[side][row], (left, top))
            for number, text in enumerate(
                [f"{name} of {Path(images[row][2]).name}", *described[side]]
            ):
                place = (left + side_length + MARGIN, top + number * LINE)
                pen.text(place, text.replace("_", " "), "black" if number else "gray", font)
    return image


def as_images(views: "Tensor", data: "PretrainingData") -> "list[Image.Image]":
    """Normalised views (N, 3, S, S) as what they show."""
    import torch
    from torchvision.transforms.v2.functional import to_pil_image

    mean, std = (
        torch.tensor(values).view(1, 3, 1, 1) for values in (data.augment.mean, data.augment.std)
    )
    times = -(-SMALLEST // views.shape[3])
    shown = (views * std + mean).clamp(0, 1).repeat_interleave(times, 2).repeat_interleave(times, 3)
    return [to_pil_image(view) for view in shown]


def main() -> None:
    """Entry point of ``moco-preview``."""
    launch(run, PreviewConfig, "preview")


if __name__ == "__main__":
    main()
