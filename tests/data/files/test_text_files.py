"""Text that users wrote, in the encodings in which common programs save it."""

import pytest

from moco.data.files.text_files import read_text
from moco.errors import InputError

ENCODINGS = {
    "plain": "utf-8",
    "Notepad, UTF-8 with BOM": "utf-8-sig",
    "Notepad, Unicode": "utf-16",
    "PowerShell on another machine": "utf-32",
}


@pytest.mark.parametrize("encoding", ENCODINGS.values(), ids=ENCODINGS)
def test_marks_decide_the_encoding_and_are_no_text(encoding, tmp_path):
    path = tmp_path / "classes.txt"
    path.write_bytes("Straße\r\n空\n".encode(encoding))
    assert read_text(path) == "Straße\r\n空\n"


def test_big_endian_text_is_read(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_bytes("\ufeffStraße\n".encode("utf-16-be"))
    assert read_text(path) == "Straße\n"


def test_other_text_is_refused_in_one_line(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_bytes("Straße\n".encode("latin-1"))
    with pytest.raises(InputError, match="cannot be read as text in UTF-8 or UTF-16"):
        read_text(path)
