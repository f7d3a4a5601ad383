"""What a program shows on a terminal: one console, and the lines at its foot that change.

Everything that a program prints goes through one console, so that a line of text and a moving bar
do not overwrite one another. rich is imported when something is drawn.
"""

import io
import os
import re
import sys
import threading
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any

from moco.errors import encodable

if TYPE_CHECKING:
    from rich.console import Console

PIPE_WIDTH = 160
"""Columns where the output is no terminal: a table there rarely has to break a path."""
INDENT = " " * 9
"""Before the further lines of a message: as wide as the time of a message."""
DRAWINGS_PER_SECOND = 4
"""Drawing takes milliseconds of the other threads' time."""
WORD = re.compile(r"""(?:(?<![^\s=])(?:'[^']*'|"[^"]*")|\S)+""")
"""A word, in which quotes can hold spaces. An apostrophe inside a word is no quote."""
COLORS = {"WARNING": "yellow", "ERROR": "bold red", "CRITICAL": "bold red"}
"""Of the level of a message, where there are colours: not in a pipe, nor with NO_COLOR."""


def new_console(**options: Any) -> "Console":
    """Return a console that takes no text for markup: paths and class names can hold brackets.

    Args:
        options: of rich's ``Console``.
    """
    from rich.console import Console

    class LastingConsole(Console):
        """Goes on when nobody reads its output any more, as after ``moco.train | head``.

        rich would end the program, and a run that it ends between two epochs has saved nothing.
        """

        def on_broken_pipe(self) -> None:
            discard_output(self.file)

    console = LastingConsole(markup=False, highlight=False, emoji=False, **options)
    is_pipe = not console.is_terminal and not console.is_jupyter
    if is_pipe and "COLUMNS" not in os.environ and "width" not in options:
        console.width = PIPE_WIDTH
    return console


def discard_output(broken: IO[str]) -> None:
    """Let what is written to a broken pipe vanish, whether it goes there by stdout or by stderr."""
    pipe = os.fstat(broken.fileno())
    devnull = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr, broken):
        with suppress(OSError):  # a stream without a file, in somebody else's program
            if os.path.samestat(os.fstat(stream.fileno()), pipe):
                os.dup2(devnull, stream.fileno())
    os.close(devnull)


def wrapped(text: str, width: int, indent: str = "") -> str:
    """Return text broken at its spaces, on lines of at most `width` columns where that is possible.

    A path or a quoted argument stays whole, however long it is, so that it can be copied.

    Args:
        text: may have several lines.
        width: columns.
        indent: before every line but the first.
    """
    lines = []
    for paragraph in text.splitlines():
        line = ""
        for word in WORD.findall(paragraph):
            if line.strip() and len(line) + 1 + len(word) > width:
                lines.append(line)
                line = indent + word
            else:
                line = f"{line} {word}" if line.strip() else line + word
        lines.append(line)
    return "\n".join(lines)


class Screen:
    """The terminal of this process. While it is off, nothing is drawn.

    A program turns it on. For a library that is used inside somebody else's program it is off.
    """

    def __init__(self) -> None:
        self.is_on = False
        self._console: Console | None = None
        self._live: Any = None
        self._lines: list[Any] = []
        self._lock = threading.RLock()

    @property
    def console(self) -> "Console":
        """The console for everything that this process prints to stdout."""
        if self._console is None:
            self._console = new_console()
        return self._console

    @property
    def moves(self) -> bool:
        """Whether lines can change, which takes a terminal."""
        return self.is_terminal and self.console.is_terminal and not self.console.is_dumb_terminal

    @property
    def is_terminal(self) -> bool:
        """Whether somebody reads stdout on a terminal. It does not import rich to find out."""
        return self.is_on and (self._live is not None or sys.stdout.isatty())

    def turn_on(self) -> None:
        """Draw from now on, on the present stdout."""
        self.turn_off()
        self._console = None
        self.is_on = True

    def turn_off(self) -> None:
        """Remove what moves, and draw nothing more."""
        self.clear()
        self.is_on = False

    def add(self, line: Any) -> None:
        """Show a line at the foot of the terminal, below the others.

        Args:
            line: anything that rich can draw. It is drawn anew several times a second.
        """
        from rich.console import Group
        from rich.live import Live

        with self._lock:
            self._lines.append(line)
            if self._live is None:
                self._live = Live(
                    get_renderable=lambda: Group(*self._lines),
                    console=self.console,
                    refresh_per_second=DRAWINGS_PER_SECOND,
                    transient=True,
                )
                self._live.start()

    def remove(self, line: Any) -> None:
        """Remove a line, if it is there."""
        with self._lock:
            with suppress(ValueError):
                self._lines.remove(line)
            if not self._lines:
                self.clear()

    def clear(self) -> None:
        """Remove all lines."""
        with self._lock:
            self._lines = []
            if self._live is not None:
                self._live.stop()
                self._live = None

    def print_message(self, text: str, level: str) -> None:
        """Print a message of the log above the moving lines, broken at its words.

        Args:
            text: the message.
            level: ``WARNING`` or another, whose word in the text is coloured.
        """
        print_words(self.console, text, level, COLORS.get(level, ""))


def let_stdout_escape() -> None:
    """Let stdout show what its encoding lacks, such as a letter or a byte of a name, as escapes."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


screen = Screen()
"""The terminal of this process."""


def show_error(line: str) -> None:
    """Print the line that says why the program ends on stderr, with its first word in colour.

    Args:
        line: such as ``error: no such folder``.
    """
    screen.clear()
    if not sys.stderr.isatty():
        print(line, file=sys.stderr)
        return
    print_words(new_console(stderr=True), line, line.partition(":")[0], COLORS["ERROR"])


def print_words(console: "Console", text: str, word: str, color: str) -> None:
    """Print text broken at its words, with the first of these words in a colour."""
    from rich.text import Text

    shown = Text(wrapped(encodable(text), console.width, INDENT))
    start = shown.plain.find(word)
    if start >= 0:
        shown.stylize(color, start, start + len(word))
    console.print(shown, soft_wrap=True)
