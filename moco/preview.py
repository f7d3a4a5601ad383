"""Draw pairs of views: ``python -m moco.preview +experiment=NAME [output=FILE.png]``.

It takes every setting of ``moco.train``. The pairs are the first ones of a run with these settings,
made by the engine of that run.
"""

import os
import textwrap
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moco.cli.launch import launch
from moco.config.train import PreviewConfig
from moco.errors import InputError, printable
from moco.phases import LOADING, phase

if TYPE_CHECKING:
    from PIL import Image

# All in px.
SMALLEST_VIEW = 224  # smaller views are enlarged, so that one can judge them
LINE_HEIGHT = 15
MARGIN = 8
TEXT_WIDTH = 330
TITLE_LENGTH = 40  # characters of a name, whose letters are wider
TEXT_LENGTH = 48  # characters of a line in TEXT_WIDTH


def run(config: PreviewConfig, folder: Path) -> None:
    """Draw the pairs into a file. `folder` takes it if no other place is given.

    Raises:
        InputError: a setting does not fit the data, or the file cannot be written.
    """
    output = Path(config.output or os.path.relpath(folder / "pairs.png"))
    if output.suffix.lower() != ".png":
        raise InputError(f"output={output}: expected a name that ends in .png")

    with phase(LOADING, unit=""):
        from PIL.PngImagePlugin import PngInfo

        from moco.cli.build_pretraining import build_data
        from moco.data.files.written_files import SOFTWARE

    data = build_data(config)
    images = data.first_images(config.num_pairs)
    sheet = draw_pairs(data, images)
    # The file may be written among the images of the dataset, and is none of them.
    mark = PngInfo()
    mark.add_text("Software", SOFTWARE)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(output, pnginfo=mark)
    except OSError as error:
        raise InputError(f"output={output}: {error.strerror or error}") from error
    # Hydra made the folder.
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    print(f"{len(images)} pairs in {printable(str(output))}")


def draw_pairs(data: Any, images: list[tuple[int, Any, str]]) -> "Image.Image":
    """Draw a row for each pair: query view, its numbers, key view, its numbers.

    Local crops stand below the pair that they belong to, in the same scale.

    Args:
        data: a `PretrainingData`.
        images: the result of `PretrainingData.first_images`.
    """
    from matplotlib import get_data_path
    from PIL import Image, ImageDraw, ImageFont

    from moco.data.files.images import UnreadableImage

    queries, keys = data.pairs(images)
    columns = {"query": to_images(queries, data), "key": to_images(keys, data)}
    factor = -(-SMALLEST_VIEW // queries.shape[3])
    # A list for each local crop, with an image for each row.
    local_crops = [to_images(crops, data, factor) for crops in data.local_crops(images)]
    texts = []
    names = []
    for index, image, name in images:
        query_lines, key_lines = data.augment.describe(0, index, image.size)
        key_name = name
        key = data.key_image_of(index)
        if key != index:
            key_name = data.source.train.name(key)
            # A file that cannot be read is another image's in the pairs, too.
            with suppress(UnreadableImage):
                key_size = data.source.train.opened(key).size
                _, key_lines = data.augment.describe(0, index, key_size)
        texts.append([wrapped(query_lines), wrapped(key_lines)])
        names.append([name, key_name])
    num_lines = 2 + max(len(lines) for pair in texts for lines in pair)
    side = columns["query"][0].height
    pair_height = max(side, num_lines * LINE_HEIGHT) + MARGIN
    row_height = pair_height
    if local_crops:
        row_height += local_crops[0][0].height + MARGIN
    column_width = side + 2 * MARGIN + TEXT_WIDTH
    sheet_width = 2 * column_width
    if local_crops:
        sheet_width = max(sheet_width, MARGIN + len(local_crops) * (side + MARGIN))
    sheet = Image.new("RGB", (sheet_width, len(images) * row_height + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    # Pillow's own font has no umlauts.
    font = ImageFont.truetype(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), 12)
    for row in range(len(images)):
        top = row * row_height + MARGIN
        for column, name in enumerate(columns):
            left = column * column_width + MARGIN
            sheet.paste(columns[name][row], (left, top))
            text_left = left + side + MARGIN
            title = shortened(f"{name} of {Path(names[row][column]).name}")
            draw.text((text_left, top), title, "gray", font)
            for number, line in enumerate(texts[row][column], start=1):
                place = (text_left, top + number * LINE_HEIGHT)
                draw.text(place, line.replace("_", " "), "black", font)
        for number, crops in enumerate(local_crops):
            left = MARGIN + number * (crops[row].width + MARGIN)
            sheet.paste(crops[row], (left, top + pair_height))
            text_left = left + crops[row].width + MARGIN
        if local_crops:
            draw.text((text_left, top + pair_height), "local crops", "gray", font)
    return sheet


def shortened(title: str) -> str:
    """Return a title that fits beside a view: without the middle of a long name."""
    if len(title) <= TITLE_LENGTH:
        return title
    end = TITLE_LENGTH // 2
    return f"{title[: TITLE_LENGTH - end - 1]}…{title[-end:]}"


def wrapped(lines: list[str]) -> list[str]:
    """Return lines that fit beside a view; the description of a pipeline can be long."""
    short = []
    for line in lines:
        short += textwrap.wrap(line, TEXT_LENGTH, subsequent_indent="  ")
    return short


def to_images(views: Any, data: Any, factor: int | None = None) -> "list[Image.Image]":
    """Return normalised views (images, 3, side, side) as Pillow images, enlarged if small.

    Args:
        factor: by which they are enlarged; None: as much as small views need.
    """
    from PIL import Image

    from moco.callbacks.view_pairs import as_shown

    if factor is None:
        factor = -(-SMALLEST_VIEW // views.shape[3])
    pixels = as_shown(data, views).repeat(factor, axis=1).repeat(factor, axis=2)
    return [Image.fromarray(view) for view in pixels]


def main() -> None:
    """Entry point of ``moco-preview``."""
    launch(run, "preview")


if __name__ == "__main__":
    main()
