"""Words that can be pasted into a shell."""

import subprocess

import pytest

from moco.runs.shell_quotes import shell_quoted


@pytest.mark.parametrize(
    "text", ["plain", "two words", "O'Neil", "caf\udce9", "a\nb\\c'd", "写真\udcff", "a[/b]", ""]
)
def test_a_shell_reads_back_what_was_quoted(text):
    command = f"printf %s {shell_quoted(text)}"
    read = subprocess.run(["bash", "-c", command], capture_output=True, check=True).stdout
    assert read == text.encode("utf-8", "surrogateescape")
    assert shell_quoted(text).isprintable()
