"""Read text that users wrote: in UTF-8 or UTF-16, with or without a byte order mark."""

import codecs
from pathlib import Path

from moco.errors import InputError, printable

# Programs of Microsoft begin a file with such a mark. UTF-32 comes first, because its mark begins
# with that of UTF-16.
ENCODING_OF_MARK = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_text(path: str | Path) -> str:
    """Return the text of a file without its byte order mark. Line ends stay as they are.

    A file without a mark is UTF-8.

    Raises:
        InputError: the file cannot be read, or is no such text.
    """
    try:
        content = Path(path).read_bytes()
        encoding = "utf-8"
        for mark, of_mark in ENCODING_OF_MARK.items():
            if content.startswith(mark):
                encoding = of_mark
                break
        return content.decode(encoding)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{printable(str(path))}: cannot be read as text in UTF-8 or UTF-16 "
            f"({printable(str(error))})"
        ) from error
