"""One page of HTML with the tables and plots of an evaluation."""

from collections.abc import Iterable, Sequence
from html import escape

from rich.table import Table
from rich.text import Text

CAPTIONS = {
    "confusion.png": "Which classes (rows) were taken for which classes (columns)",
    "feature_maps.png": "Images beside their last two feature maps. The colours are the first "
    "three principal components of all cells.",
    "map.png": "Images with similar features are near one another. Axes have no meaning.",
    "neighbors.png": "Images on the left, each with the images whose features are most similar. "
    "Without labels, each has its cosine and the end of its file's name below.",
    "predictions.png": "Held-out images, their masks and the predictions, from the image with the "
    "lowest mIoU to the one with the highest",
    "similarities.png": "Cosines of two views of one image, and of views of different images",
}
STYLE = """
body { font-family: sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1.5em 0 }
caption { text-align: left; font-weight: bold; padding-bottom: 0.4em }
th, td { border-bottom: 1px solid #ddd; padding: 0.2em 0.8em; text-align: right }
.text { text-align: left }
figure { margin: 2em 0 }
img { max-width: 100% }
.headline { font-size: 1.3em }
"""


def report_page(title: str, headline: str, tables: Iterable[Table], plots: Iterable[str]) -> str:
    """Return a page that needs nothing but the plots, which are linked by their file names.

    Args:
        title: of the measurement.
        headline: its result in one line.
        tables: the tables that were printed.
        plots: names of PNG files in the page's own folder.
    """
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f"<title>{escaped(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escaped(title)}</h1>",
        f'<p class="headline">{escaped(headline)}</p>',
    ]
    names = sorted(plots)
    for name in names:
        caption = CAPTIONS.get(name, name)
        parts.append(
            f'<figure><figcaption>{escaped(caption)}</figcaption><img src="{escaped(name)}" '
            f'alt="{escaped(caption)}"></figure>'
        )
    parts += [table_as_html(table) for table in tables]
    parts.append("</body></html>")
    return "\n".join(parts) + "\n"


def table_as_html(table: Table) -> str:
    """Return a table of rich as HTML, with the same alignment."""
    are_texts = [column.justify == "left" for column in table.columns]
    lines = ["<table>"]
    if table.title:
        lines.append(f"<caption>{escaped(plain(table.title))}</caption>")
    if table.show_header:
        headers = [plain(column.header) for column in table.columns]
        lines.append(html_row("th", headers, are_texts))
    cells = [list(column.cells) for column in table.columns]
    for row in zip(*cells, strict=True):
        lines.append(html_row("td", [plain(cell) for cell in row], are_texts))
    lines.append("</table>")
    return "\n".join(lines)


def html_row(tag: str, cells: Sequence[str], are_texts: Sequence[bool]) -> str:
    """Return a row of cells with the tag ``th`` or ``td``; cells of text are marked."""
    content = ""
    for cell, is_text in zip(cells, are_texts, strict=True):
        kind = ' class="text"' if is_text else ""
        content += f"<{tag}{kind}>{escaped(cell)}</{tag}>"
    return f"<tr>{content}</tr>"


def plain(cell: object) -> str:
    """Return the text of a cell of rich without its markup."""
    if isinstance(cell, Text):
        return cell.plain
    return Text.from_markup(str(cell)).plain


def escaped(text: str) -> str:
    """Return text as HTML. Names of files that are not UTF-8 become escapes."""
    return escape(text.encode("utf-8", "backslashreplace").decode())
