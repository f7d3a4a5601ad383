"""``--help``, ``--help-all`` and ``--version`` of every program.

A page needs the schema, the YAML files and `moco.cli.program_texts`, and nothing that computes.
"""

import os
import platform
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from moco import __version__
from moco.cli.program_texts import PROGRAMS
from moco.config.parsing import SCHEMAS, unknown_key
from moco.config.setting_texts import NO_DEFAULT, SettingText, as_given, setting_texts
from moco.config_folder import CONFIG_DIR
from moco.errors import InputError
from moco.screen import let_stdout_escape, new_console

WIDTH = 80
"""Columns of a page; fewer in a narrower terminal."""
LONGEST_DEFAULT = 44
"""A longer default is not printed if a YAML file sets it: the page names the file's choice."""
QUESTIONS = ("--help", "-h", "--help-all", "--version")
LIBRARIES = ("torch", "torchvision", "pytorch-lightning", "hydra-core", "faiss-cpu")
"""Whose versions ``--version`` says."""
Line = list[tuple[str, str]]
"""The parts of a line, each with its style in a terminal (of rich)."""


def answer_question(program: str, arguments: Sequence[str]) -> bool:
    """Print what ``--help``, ``--help-all`` or ``--version`` ask for. Return whether one did.

    Args:
        program: a key of `PROGRAMS`.
        arguments: the command line after the program's name.

    Raises:
        InputError: help was asked for a word that is neither a setting nor a group.
        HydraException: what was chosen beside the question is wrong.
    """
    asked = [argument for argument in arguments if argument in QUESTIONS]
    if not asked:
        return False
    if "--version" in asked:
        show([[(line, "")] for line in version_lines()])
        return True
    words = []
    for previous, word in zip(["", *arguments], arguments, strict=False):
        is_of_option = previous.startswith("-") and previous not in QUESTIONS
        if not word.startswith("-") and "=" not in word and not is_of_option:
            words.append(word)
    own_choices = config_dirs(arguments)
    chosen: Sequence[str] = ()
    if program in SCHEMAS:
        chosen = [word for word in arguments if "=" in word and not word.startswith("-")]
    if words and program in SCHEMAS:
        show(topic_page(program, words, own_choices, chosen))
    elif "--help-all" in asked:
        show(long_page(program, own_choices, chosen))
    else:
        show(short_page(program, own_choices, chosen))
    return True


def version_lines() -> list[str]:
    """Return the versions of the project, of Python and of the libraries that matter."""
    from importlib.metadata import PackageNotFoundError, version  # slow to import

    lines = [f"moco-ssl {__version__}", f"Python {platform.python_version()}"]
    for library in LIBRARIES:
        try:
            lines.append(f"{library} {version(library)}")
        except PackageNotFoundError:
            lines.append(f"{library} is not installed")
    return lines


def short_page(
    program: str, folders: Sequence[Path] = (CONFIG_DIR,), chosen: Sequence[str] = ()
) -> list[Line]:
    """Return the page of ``--help``: the settings that matter, and where the others are.

    Args:
        program: a key of `PROGRAMS`.
        folders: where the YAML files are.
        chosen: overrides beside the question, such as ``+experiment=quickstart``. The page shows
            the values that they give.
    """
    texts = {text.key: text for text in program_settings(program)}
    matter = [texts[key] for key in PROGRAMS[program].settings]
    num_settings = sum(not text.is_group for text in texts.values())
    lines = introduction(program)
    if matter:
        lines += section(
            f"the settings that matter, {whose_values(chosen)} (all {num_settings}: --help-all)"
        )
        lines += origin_of_values(program, chosen)
        lines += settings_lines(program, matter, folders, chosen)
        lines += groups_lines(program, folders, chosen)
    lines += closing_lines(program)
    return lines


def long_page(
    program: str, folders: Sequence[Path] = (CONFIG_DIR,), chosen: Sequence[str] = ()
) -> list[Line]:
    """Return the page of ``--help-all``: every setting, and the choices of every group.

    The arguments are those of `short_page`.
    """
    lines = introduction(program)
    if program in SCHEMAS:
        lines += section(f"all settings, {whose_values(chosen)}")
        lines += origin_of_values(program, chosen)
        lines += settings_lines(program, program_settings(program), folders, chosen)
        lines += groups_lines(program, folders, chosen)
    lines += closing_lines(program)
    return lines


def topic_page(
    program: str,
    words: Iterable[str],
    folders: Sequence[Path] = (CONFIG_DIR,),
    chosen: Sequence[str] = (),
) -> list[Line]:
    """Return the settings and the choices that ``--help WORD`` asks for.

    Args:
        program: a key of `PROGRAMS`.
        words: keys such as ``data.root``, groups such as ``data``, or the last parts of keys.
        folders, chosen: see `short_page`.

    Raises:
        InputError: a word is none of these.
    """
    texts = program_settings(program)
    lines: list[Line] = []
    for word in words:
        word = word.lstrip("+~").rstrip(".")
        choices = choices_of_group(program, word, folders)
        inside = [text for text in texts if f"{text.key}.".startswith(f"{word}.")]
        if not inside:
            inside = [text for text in texts if text.key.rpartition(".")[2] == word]
        if not inside and not choices:
            raise InputError(unknown_key(word, SCHEMAS[program]))
        if choices:
            lines += section(f"the choices of {typed_group(word)}=NAME")
            for name, meaning in choices.items():
                lines.append([(f"  {name}", "cyan")])
                lines += paragraph(meaning, indent=6)
        if inside:
            values = "with these choices" if chosen else "with defaults"
            lines += section(f"{word}, {values}")
            lines += settings_lines(program, inside, folders, chosen)
    return lines[1:]  # a section begins with an empty line


def introduction(program: str) -> list[Line]:
    """Return what the program is, its usage and its examples."""
    text = PROGRAMS[program]
    command = command_name(program)
    lines = paragraph(f"moco.{program}: {text.purpose}", indent=0, hanging=4, style="bold")
    lines += section("usage")
    lines += paragraph(f"{command} {text.usage}", indent=2, hanging=6)
    lines += section("examples")
    for arguments, meaning in text.examples.items():
        lines += [[(part, "cyan")] for part in command_lines(f"{command} {arguments}")]
        lines += paragraph(meaning, indent=6)
    return lines


def command_lines(command: str) -> list[str]:
    """Return a command that can be pasted; a long one is continued by a backslash."""
    parts = textwrap.wrap(command, page_width() - 4, break_long_words=False, break_on_hyphens=False)
    lines = [f"  {part} \\" for part in parts]
    lines[1:] = [f"    {line}" for line in lines[1:]]
    lines[-1] = lines[-1].removesuffix(" \\")
    return lines


def whose_values(chosen: Sequence[str]) -> str:
    """Return whether the values of a page are defaults, in words."""
    return "with these choices" if chosen else "with their defaults"


def origin_of_values(program: str, chosen: Sequence[str]) -> list[Line]:
    """Return where the values of a page come from, if a program has experiments."""
    if "experiment" not in PROGRAMS[program].groups:
        return []
    what = " ".join(chosen) or "a run"
    if any(override.lstrip("+").startswith("experiment=") for override in chosen):
        return [*paragraph(f"The values are those of {what}.", indent=2), []]
    lines = paragraph(
        f"The values are those of {what} without an experiment. +experiment=NAME --help shows "
        "those of an experiment. data.root=DIR without an experiment takes own_images_small, "
        "own_images_medium or own_images_large, by the number of images.",
        indent=2,
    )
    return [*lines, []]


def settings_lines(
    program: str,
    texts: Iterable[SettingText],
    folders: Sequence[Path] = (CONFIG_DIR,),
    chosen: Sequence[str] = (),
) -> list[Line]:
    """Return the lines of settings: key, default and values, then the meaning."""
    lines: list[Line] = []
    composed = composed_values(program, folders, chosen)
    for text in texts:
        if text.is_group:
            lines += [[], [(f"  {text.key}.*", "bold")]]
            lines += paragraph(plain(text.meaning), indent=6)
            continue
        default, note = default_and_note(text, *composed)
        given = f"={default}" if default else ""
        if len(text.key) + len(given) + 2 > page_width():
            given = ""
            note = f"default {default}"
        values = "; ".join(filter(None, (note, text.values)))
        line = [(f"  {text.key}", "cyan"), (given, "")]
        room = page_width() - len(text.key) - len(given) - 2
        if values and len(values) + 4 <= room:
            line.append((f"    {values}", "dim"))
            values = ""
        lines.append(line)
        lines += paragraph(values, indent=6, style="dim")
        lines += paragraph(plain(text.meaning), indent=6)
    return lines


def default_and_note(
    text: SettingText, settings: dict[str, Any], choices: dict[str, str]
) -> tuple[str, str]:
    """Return the default of a setting as it would be given, or else what takes its place.

    Args:
        text: of the setting.
        settings: from `composed_defaults`.
        choices: from `composed_defaults`.
    """
    default = default_of(text, settings)
    if default == NO_DEFAULT:
        return "", "has to be given"
    given = as_given(default)
    group = text.key.partition(".")[0]
    if group in choices and (len(given) > LONGEST_DEFAULT or "${" in given):
        return "", f"as in {group}={choices[group]}"
    return given, ""


def groups_lines(program: str, folders: Sequence[Path], chosen: Sequence[str] = ()) -> list[Line]:
    """Return the config groups of the program with the names of their choices."""
    lines = section("choices: a name stands for a file of settings, as in backbone=resnet18")
    _, defaults = composed_values(program, folders, chosen)
    for group in PROGRAMS[program].groups:
        names = " ".join(choices_of_group(program, group, folders))
        lines.append([(f"  {typed_group(group)}={defaults.get(group, '')}", "cyan")])
        lines += paragraph(names, indent=6)
    return lines


def typed_group(group: str) -> str:
    """Return a config group as the documentation types it, with the plus of ``+experiment=``."""
    return f"+{group}" if group == "experiment" else group


def closing_lines(program: str) -> list[Line]:
    """Return where the results are, and what else can be asked for."""
    lines: list[Line] = []
    if PROGRAMS[program].output:
        lines += section("results")
        lines += paragraph(PROGRAMS[program].output, indent=2)
    lines += section("more")
    options = PROGRAMS[program].options
    column = max(map(len, options)) + 4
    for option, meaning in options.items():
        parts = paragraph(meaning, indent=column)
        lines.append([(f"  {option}".ljust(column), "cyan"), (parts[0][0][0].lstrip(), "")])
        lines += parts[1:]
    if program in SCHEMAS:
        lines += paragraph("docs/configuration.md has all settings on one page.", indent=2)
    return lines


def program_settings(program: str) -> list[SettingText]:
    """Return all settings of a program; `moco.sweep` has none."""
    if program not in SCHEMAS:
        return []
    return setting_texts(SCHEMAS[program])


@cache
def composed_defaults(program: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what the YAML files of a program set when nothing is chosen.

    Hydra composes the same in ten times the time.

    Returns:
        The settings that the files hold, nested; and the choice of each config group.
    """
    body = read_yaml(CONFIG_DIR / f"{program}.yaml")
    choices = {}
    settings: dict[str, Any] = {}
    for entry in body.pop("defaults"):
        if not isinstance(entry, dict):
            continue
        for group, choice in entry.items():
            if choice is not None and not group.startswith("override "):
                choices[group] = choice
                settings[group] = read_yaml(CONFIG_DIR / group / f"{choice}.yaml")
    del body["hydra"]
    for key, value in body.items():
        if isinstance(value, dict):
            settings.setdefault(key, {}).update(value)
        else:
            settings[key] = value
    return settings, choices


def composed_values(
    program: str, folders: Sequence[Path], chosen: Sequence[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values of a program with some choices, in the form of `composed_defaults`.

    Hydra composes them, which takes longer.

    Args:
        program: a key of `SCHEMAS`.
        folders: where the YAML files are: the project's folder, then the user's.
        chosen: overrides as they were typed.

    Raises:
        HydraException: an override is wrong.
    """
    if not chosen:
        return composed_defaults(program)

    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf, open_dict

    from moco.cli.command_line import readable_overrides
    from moco.cli.run_names import register_resolvers
    from moco.config.parsing import register_schema

    register_schema(program)
    register_resolvers()
    overrides = readable_overrides(chosen, SCHEMAS[program])
    own = [f'"file://{folder.absolute()}"' for folder in folders if folder != CONFIG_DIR]
    if own:
        overrides.append(f"hydra.searchpath=[{','.join(own)}]")
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        whole = compose(program, overrides, return_hydra_config=True)
    choices = {}
    for group, choice in whole.hydra.runtime.choices.items():
        if choice is not None:
            choices[str(group)] = str(choice)
    with open_dict(whole):
        del whole["hydra"]
    settings: Any = OmegaConf.to_container(whole, resolve=False)
    return settings, choices


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the content of one of the project's YAML files."""
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content


def default_of(text: SettingText, settings: dict[str, Any]) -> Any:
    """Return the value of a setting when nothing is chosen.

    Args:
        text: of the setting.
        settings: from `composed_defaults`.
    """
    found: Any = settings
    for part in text.key.split("."):
        if not isinstance(found, dict) or part not in found:
            return text.default
        found = found[part]
    if isinstance(text.default, float) and found is not None:
        return float(found)  # YAML 1.1 reads 1e-3 as text
    return found


def choices_of_group(program: str, group: str, folders: Sequence[Path]) -> dict[str, str]:
    """Return the choices of a config group that belong to a program, each with what it is.

    Args:
        program: a key of `PROGRAMS`.
        group: the name of the group; one that the program does not have gives an empty dict.
        folders: where the YAML files are: the project's folder, then the user's.
    """
    groups = PROGRAMS[program].groups
    if group not in groups:
        return {}
    allowed = groups[group]
    found = {}
    for folder in folders:
        is_own = folder == CONFIG_DIR
        for path in sorted((folder / group).glob("*.yaml")):
            if not is_own or allowed is None or path.stem in allowed:
                found[path.stem] = first_comment(path)
    return found


def first_comment(path: Path) -> str:
    """Return the first sentence of the comment at the beginning of a YAML file."""
    words: list[str] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        text = line.removeprefix("#").strip()
        if not line.startswith("#") or (words and line.startswith("#  ")):
            break
        if not text.startswith("@package"):
            words.append(text)
    sentence, dot, _ = " ".join(words).partition(". ")
    return sentence + dot.strip()


def config_dirs(arguments: Sequence[str]) -> list[Path]:
    """Return where the YAML files are: the project's folder, and that of ``--config-dir``."""
    folders = [CONFIG_DIR]
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        option, equals, value = argument.partition("=")
        if option in ("--config-dir", "-cd"):
            folders.append(Path(value if equals else following))
    return folders


def command_name(program: str) -> str:
    """Return how the program was started: ``moco-train`` or ``python -m moco.train``."""
    script = f"moco-{program}"
    if Path(sys.argv[0]).name == script:
        return script
    return f"python -m moco.{program}"


def section(heading: str) -> list[Line]:
    """Return an empty line and a heading."""
    return [[], *paragraph(heading, indent=0, style="bold")]


def paragraph(text: str, indent: int, hanging: int | None = None, style: str = "") -> list[Line]:
    """Return text wrapped to the width of the page.

    Args:
        text: words; may be empty.
        indent: columns before each line.
        hanging: columns before the second and later lines, if others.
        style: of rich.
    """
    wrapped = textwrap.wrap(
        text,
        page_width(),
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent if hanging is None else hanging),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [[(line, style)] for line in wrapped]


def plain(text: str) -> str:
    """Return the text of a docstring without its marks of code."""
    return text.replace("`", "")


def page_width() -> int:
    """Return the columns that a page may have."""
    return max(40, min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns))


def show(lines: Iterable[Line]) -> None:
    """Print lines; in a terminal with colours."""
    # A comment in the user's YAML may hold what the terminal cannot show.
    let_stdout_escape()
    try:
        if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
            show_in_colour(lines)
        else:
            for line in lines:
                print("".join(part for part, _ in line))
        sys.stdout.flush()
    except BrokenPipeError:
        # `--help-all | head` has read enough. Python would try again when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show_in_colour(lines: Iterable[Line]) -> None:
    """Print lines with their styles."""
    from rich.text import Text

    console = new_console()
    for line in lines:
        console.print(Text.assemble(*line), soft_wrap=True)
