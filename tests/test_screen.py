"""What a program prints: no markup in the user's texts, colours, lines that break at words."""

import ast
import io
import logging
import os

import pytest

from moco.cli.closing_tables import print_plain, print_table
from moco.cli.log_setup import StdoutHandler
from moco.evaluation.subject import table_of
from moco.screen import new_console, screen, show_error, wrapped
from tests.conftest import REPOSITORY

NAMES = ["exp[v2]/last.ckpt", "a[/b]", ":smile:", "[red]x[/red]", "caf\udce9"]


@pytest.mark.parametrize("name", NAMES)
def test_texts_of_users_are_no_markup(name):
    from rich.console import Console

    for console in (new_console(file=io.StringIO()), Console(file=io.StringIO(), width=100)):
        print_table(console, name, [(name, name)])
        console.print(table_of(name, [name], [[name]]))
        print_plain(console, f"next: {name}")
        shown = name.encode("utf-8", "backslashreplace").decode()
        assert console.file.getvalue().count(shown) >= 6


def test_all_that_is_printed_goes_through_one_console():
    for path in (REPOSITORY / "moco").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and path.name != "screen.py":
                name = ast.unparse(node.func)
                assert name not in ("Console", "rich.print"), f"{path}: use moco.screen"


def test_messages_break_at_words_and_paths_stay_whole():
    path = "'output=\"/a folder with spaces/and a long name\"'"
    text = f"12:00:00 WARNING the run's own folder is one thing; to go on, add {path} or wait"
    lines = wrapped(text, 40, " " * 9).splitlines()
    assert lines == [
        "12:00:00 WARNING the run's own folder is",
        "         one thing; to go on, add",
        f"         {path}",
        "         or wait",
    ]
    assert wrapped("a" * 100 + "\n b", 40) == "a" * 100 + "\nb"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("no_color", [False, True])
def test_warnings_have_a_colour_on_a_terminal(monkeypatch, no_color):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr("sys.stderr", terminal)
    screen.turn_on()
    handler = StdoutHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    handler.emit(logging.makeLogRecord({"levelname": "WARNING", "msg": "a [/b] " + "word " * 12}))
    show_error("error: no such folder")
    screen.turn_off()
    shown = terminal.getvalue()
    assert ("\033[33mWARNING" in shown) != no_color
    assert ("31merror" in shown) != no_color
    assert "a [/b] word" in shown
    assert max(len(line) for line in shown.splitlines()) <= 60 + len("\033[33m\033[0m")


def test_a_pipe_gets_messages_as_they_are(monkeypatch):
    pipe = io.StringIO()
    monkeypatch.setattr("sys.stdout", pipe)
    handler = StdoutHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    handler.emit(
        logging.makeLogRecord({"levelname": "WARNING", "msg": "caf\udce9 " + "word " * 30})
    )
    assert pipe.getvalue() == "WARNING caf\\udce9 " + "word " * 30 + "\n"


def test_a_program_goes_on_when_nobody_reads_its_output_any_more():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as file:
        console = new_console(file=file)
        console.print("a line")
        console.print("another")
        file.flush()
