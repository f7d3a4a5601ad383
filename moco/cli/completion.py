"""Shell completion: what the tab key offers, and the code that a shell needs for it.

A shell runs ``python -m moco.cli.completion PROGRAM WORD LINE`` at each press of the key. Hydra's
completion does the same with the whole program. It takes seconds, knows no ``python -m`` and
completes no paths.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from moco.cli.help_pages import (
    choices_of_group,
    composed_defaults,
    config_dirs,
    default_and_note,
    program_settings,
)
from moco.cli.program_texts import PROGRAMS
from moco.config.parsing import SCHEMAS
from moco.errors import InputError, unknown_name

SHELLS = ("bash", "fish", "zsh")
REQUESTS = ("--shell-completion", "-sc")
OPTIONS = (
    "--cfg", "--config-dir=", "--help", "--help-all", "--hydra-help", "--multirun", "--package=",
    "--resolve", "--shell-completion", "--version", "-m",
)  # fmt: skip
OF_HYDRA = ("hydra.run.dir=", "hydra.sweep.dir=")
"""Hydra's own settings that a user of these programs needs."""


def answer_shell(arguments: Sequence[str]) -> bool:
    """Print the shell code that ``--shell-completion install=bash`` asks for.

    Args:
        arguments: the command line after the program's name.

    Returns:
        Whether it was asked for.

    Raises:
        InputError: there is no such shell.
    """
    if not any(argument in REQUESTS for argument in arguments):
        return False
    for argument in arguments:
        action, _, shell = argument.partition("=")
        if action == "install":
            print(shell_code(shell), end="")
            return True
    shells = ", ".join(f"install={shell}" for shell in SHELLS)
    raise InputError(f"--shell-completion: expected one of {shells}; see docs/shell_completion.md")


def shell_code(shell: str) -> str:
    """Return the code that a shell has to run to complete all programs.

    It names this Python and this package, so it works from every folder.

    Raises:
        InputError: there is no such shell.
    """
    if shell not in SHELLS:
        raise InputError(f"--shell-completion: {unknown_name('shell', shell, SHELLS)}")
    package = Path(__file__).resolve().parents[1]
    code = (package / "cli" / f"completion.{shell}").read_text(encoding="utf-8")
    code = code.replace("@PYTHON@", sys.executable)
    code = code.replace("@ROOT@", str(package.parent))
    return code.replace("@PROGRAMS@", " ".join(PROGRAMS))


def offers(program: str, word: str, words: Sequence[str] = ()) -> list[str]:
    """Return how a word may go on. The list is empty where the shell should offer files.

    Args:
        program: a key of `PROGRAMS`.
        word: the part of the word before the cursor.
        words: the whole command line, which may name a folder of the user's YAML files.
    """
    if program not in SCHEMAS:
        options = (*PROGRAMS[program].options, "--help")
        candidates = [option.partition(" ")[0] for option in options if word.startswith("-")]
    elif word.startswith("-"):
        candidates = list(OPTIONS)
    elif "=" in word:
        candidates = values_offered(program, word, config_dirs(words))
    else:
        candidates = keys_offered(program, word)
    return sorted({candidate for candidate in candidates if candidate.startswith(word)})


def keys_offered(program: str, word: str) -> list[str]:
    """Return keys, level by level: ``data.`` and ``data=`` first, then ``data.root=``."""
    key = word.lstrip("+~")
    sign = word[: len(word) - len(key)]
    base = key[: key.rfind(".") + 1]
    candidates = [f"{sign}{group}=" for group in PROGRAMS[program].groups]
    candidates += [sign + name for name in OF_HYDRA]
    for text in program_settings(program):
        if text.is_group or not text.key.startswith(base):
            continue
        part, dot, _ = text.key.removeprefix(base).partition(".")
        candidates.append(f"{sign}{base}{part}{dot or '='}")
    return candidates


def values_offered(program: str, word: str, folders: Sequence[Path]) -> list[str]:
    """Return a key with each value that can be listed; in a sweep, with one more value.

    Args:
        program: a key of `PROGRAMS`.
        word: such as ``method=moco_v1,mo``.
        folders: where the YAML files are.
    """
    given, _, value = word.partition("=")
    key = given.lstrip("+~")
    first_values = value[: value.rfind(",") + 1]
    values = list(choices_of_group(program, key, folders))
    for text in program_settings(program):
        if text.key != key or text.is_group:
            continue
        values += text.choices
        default, _ = default_and_note(text, *composed_defaults(program))
        if not values and default and (default != "null" or "number" in text.values):
            values.append(default)
    return [f"{given}={first_values}{choice}" for choice in values]


def main() -> None:
    """Print what the shell's code asks for: program, word and line are the arguments."""
    program, word, line = sys.argv[1:]
    if program in PROGRAMS:
        print("\n".join(offers(program, word, line.split())))


if __name__ == "__main__":
    main()
