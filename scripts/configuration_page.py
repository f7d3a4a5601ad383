"""Write docs/configuration.md: every setting of every program, from the schema.

    python -m scripts.configuration_page        (make docs-configuration does the same)

The page is what `--help-all` prints, in Markdown. A test compares it with the schema.
"""

import textwrap
from pathlib import Path

from moco.cli.help_pages import (
    choices_of_group,
    composed_defaults,
    default_and_note,
    program_settings,
    typed_group,
)
from moco.cli.program_texts import PROGRAMS
from moco.config.parsing import SCHEMAS
from moco.config.setting_texts import SettingText
from moco.config_folder import CONFIG_DIR

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"
WIDTH = 100
INTRODUCTION = """\
# Settings

<!-- Written by scripts/configuration_page.py: change moco/config/, then make docs-configuration -->

Every setting of every program, with the value that it has when nothing is chosen. A name of a
config group (`method=moco_v3`, `+experiment=quickstart`) sets several of them at once, and a
value on the command line comes last. `experiment=NAME` without the plus works as well. The same is
in the terminal:

```sh
python -m moco.train --help                # the settings that matter
python -m moco.train --help data           # a group, or one setting: --help data.root
python -m moco.train --help-all            # all settings
python -m moco.train +experiment=quickstart --cfg job --resolve     # the values of one command
```
"""


def page() -> str:
    """Return the text of the page."""
    parts = [INTRODUCTION]
    of_training: dict[str, tuple[str, str]] = {}
    for program in SCHEMAS:
        rows = {}
        for text in program_settings(program):
            if not text.is_group:
                rows[text.key] = row_of(program, text)
        parts += program_part(program, rows, of_training)
        if program == "train":
            of_training = rows
    return "\n".join(parts)


def program_part(
    program: str, rows: dict[str, tuple[str, str]], known: dict[str, tuple[str, str]]
) -> list[str]:
    """Return the part of one program: its choices, and its settings in a table for each group.

    Args:
        program: its name.
        rows: the table rows by key, see `row_of`.
        known: those of moco.train. A row that is the same is not printed again.
    """
    parts = [f"## moco.{program}\n", wrapped(PROGRAMS[program].purpose)]
    parts.append("| group | choices |\n|---|---|")
    _, chosen = composed_defaults(program)
    for group in PROGRAMS[program].groups:
        names = choices_of_group(program, group, [CONFIG_DIR])
        marked = [f"**{name}**" if name == chosen.get(group) else name for name in names]
        parts.append(f"| `{typed_group(group)}=` | {' '.join(marked)} |")
    parts.append("")
    tables: dict[str, list[str]] = {"": []}
    headings = {"": ""}
    repeated = []
    for text in program_settings(program):
        if text.is_group:
            headings[text.key] = text.meaning
            tables[text.key] = []
            continue
        if known.get(text.key) == rows[text.key]:
            repeated.append(text.key)
            continue
        tables[text.key.rpartition(".")[0]].append(rows[text.key][1])
    for group, lines in tables.items():
        if not lines:
            continue
        if group:
            parts += [f"### `{group}` of moco.{program}\n", wrapped(single_marks(headings[group]))]
        parts.append("| setting | default | values | meaning |\n|---|---|---|---|")
        parts += [*lines, ""]
    if repeated:
        names = ", ".join(f"`{name}`" for name in joined(repeated, list(rows)))
        parts.append(wrapped(f"As in [moco.train](#mocotrain): {names}."))
    return parts


def joined(keys: list[str], all_keys: list[str]) -> list[str]:
    """Return keys of a program; a group of which there are all is named once, as ``data.*``."""
    names: list[str] = []
    for key in keys:
        group = key.partition(".")[0] + "."
        others = [other for other in all_keys if other.startswith(group)]
        name = f"{group}*" if others and set(others) <= set(keys) else key
        if name not in names:
            names.append(name)
    return names


def row_of(program: str, text: SettingText) -> tuple[str, str]:
    """Return a setting's values, default and meaning as a key to compare, and its table row."""
    default, note = default_and_note(text, *composed_defaults(program))
    shown = f"`{default}`" if default else note
    cells = (f"`{text.key}`", shown, text.values, single_marks(text.meaning))
    row = "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    return f"{shown} {text.values} {text.meaning}", row


def single_marks(text: str) -> str:
    """Return a docstring's text with Markdown's marks of code."""
    return text.replace("``", "`")


def wrapped(text: str) -> str:
    """Return a paragraph with an empty line after it."""
    lines = textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
