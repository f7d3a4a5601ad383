"""The command line as people type it, turned into what Hydra reads.

Hydra's grammar has no place for a path such as ``写真``, ``O'Neil``, ``a=b`` or ``~/images``, and
it reads the folder ``2024_05`` as a number. `readable` puts such a value into quotes if its key
takes a text and there is only one way to understand it. Everything else stays as it was typed.
"""

import os
import re
from collections.abc import Sequence
from functools import cache
from typing import get_args, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from moco.config.parsing import keys

HYDRA_FOLDERS = ("hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir")
"""Keys of Hydra that take a path."""
TEXT_KEYS = ("data.root", "data.labels", *HYDRA_FOLDERS)
"""Keys that take a text whatever the type in the schema says. `data.root` also takes a list."""
PATTERN_KEYS = ("data.group",)
"""Keys that take a number or a text. Only what Hydra cannot read is a text for sure."""
OPTIONS_WITH_VALUE = (
    "--cfg", "-c", "--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp",
    "--experimental-rerun", "--info", "-i", "--package", "-p",
)  # fmt: skip
CLOSING = {"[": "]", "{": "}", "(": ")"}
FUNCTION = re.compile(r"(bool|choice|float|glob|int|interval|range|shuffle|sort|str|tag)\s*\(")
"""The start of a function of Hydra's grammar, such as ``choice(a,b)``."""


def readable(arguments: Sequence[str], schema: type) -> list[str]:
    """Return the arguments of a command line so that Hydra reads them as they are meant.

    - Overrides come first and options last, in any order that they were typed in: argparse would
      not read the overrides after ``a=1 -m``.
    - ``experiment=NAME`` becomes ``+experiment=NAME``: a config has no experiment to replace.
    - Texts are quoted, see `readable_value`.

    Args:
        arguments: without the name of the program.
        schema: of the program's config.
    """
    if "--shell-completion" in arguments or "-sc" in arguments:
        return list(arguments)
    overrides: list[str] = []
    options: list[str] = []
    is_value = False
    for argument in arguments:
        if is_value or argument.startswith("-"):
            options.append(argument)
        else:
            overrides.append(argument)
        is_value = not is_value and argument in OPTIONS_WITH_VALUE
    is_sweep = "--multirun" in options or "-m" in options
    return readable_overrides(overrides, schema, is_sweep=is_sweep) + options


def readable_overrides(
    overrides: Sequence[str], schema: type, *, is_sweep: bool = False
) -> list[str]:
    """Return overrides so that Hydra reads them as they are meant; see `readable`.

    Args:
        overrides: ``key=value`` each.
        schema: of the config.
        is_sweep: commas separate the values of a sweep.
    """
    result = []
    for override in overrides:
        key, equals, value = override.partition("=")
        name = key.lstrip("+")
        if key == "experiment" and equals:
            result.append(f"+{override}")
        elif equals and (name in text_keys(schema) or name in PATTERN_KEYS):
            result.append(f"{key}={readable_value(name, value, is_sweep=is_sweep)}")
        else:
            result.append(override)
    return result


@cache
def text_keys(schema: type) -> frozenset[str]:
    """Return the dotted keys that take a text, those of `schema` and of Hydra."""
    found = set(TEXT_KEYS)
    for key in keys(schema):
        kind: object = schema
        for name in key.split("."):
            kind = get_type_hints(kind)[name]
        if kind is str or str in get_args(kind):
            found.add(key)
    return frozenset(found)


def readable_value(key: str, value: str, *, is_sweep: bool) -> str:
    """Return the value of a text key, quoted where Hydra would not read it as a text.

    These stay as they are: what is quoted already, ``null``, functions such as ``choice(a,b)``,
    ``${interpolations}``, and what has a quote or a bracket that does not close. Commas separate
    values, and brackets make a list, unless there is a file of just this name.

    Args:
        key: the dotted key.
        value: as it was typed, after the equals sign.
        is_sweep: commas separate the values of a sweep.
    """
    if "${" in value or FUNCTION.match(value):
        return value
    parts = split(value)
    is_one = not (is_sweep and "," in value)
    if is_one and is_special(value) and os.path.lexists(os.path.expanduser(value)):
        return quoted(key, value)
    if parts is None:
        return value
    return ",".join(readable_element(key, part) for part in parts)


def readable_element(key: str, text: str) -> str:
    """Return one element of a value, quoted if needed; see `readable_value`."""
    if is_enclosed(text, "["):
        parts = split(text[1:-1])
        if parts is None:
            return text
        return f"[{','.join(readable_element(key, part.strip()) for part in parts)}]"
    if text[:1] in ("'", '"') or is_enclosed(text, "{"):
        return text
    if text == "" or text.lower() == "null":
        return text
    is_folder = key in HYDRA_FOLDERS and text.startswith("~")
    if not is_folder and is_text(text, may_be_number=key in PATTERN_KEYS):
        return text
    return quoted(key, text)


def quoted(key: str, text: str) -> str:
    """Return a text in quotes for Hydra."""
    if key in HYDRA_FOLDERS:  # Hydra makes this folder before the config is parsed
        text = os.path.expanduser(text)
    return QuotedString(text, Quote.double).with_quotes()


def is_special(text: str) -> bool:
    """Return whether a text has characters that mean something in Hydra's grammar."""
    return re.search(r"[\[\]{}(),'\"]", text) is not None


def is_text(text: str, *, may_be_number: bool) -> bool:
    """Return whether Hydra reads an unquoted text as a text, and not as a number or not at all."""
    try:
        value = OverridesParser.create().parse_override(f"key={text}").value()
    except HydraException:
        return False
    return may_be_number or isinstance(value, str)


def split(text: str) -> list[str] | None:
    """Return the parts of a text between its commas, or None if a quote or bracket does not close.

    A quote or a bracket counts only where a part begins with it, so ``O'Neil`` and ``exp[v2]`` are
    plain parts.
    """
    parts = [""]
    quote = ""
    closing: list[str] = []
    is_nested = False
    for number, char in enumerate(text):
        at_start = not parts[-1].strip() or (is_nested and text[number - 1] in "[{(,: ")
        if quote:
            if char == quote and text[number - 1] != "\\":
                quote = ""
        elif char in "'\"" and at_start:
            quote = char
        elif char in CLOSING and (at_start or is_nested):
            closing.append(CLOSING[char])
            is_nested = True
        elif closing and char == closing[-1]:
            closing.pop()
        elif char == "," and not closing:
            parts.append("")
            is_nested = False
            continue
        parts[-1] += char
    if quote or closing:
        return None
    return parts


def is_enclosed(text: str, opening: str) -> bool:
    """Return whether a text begins with a bracket that closes at its very end."""
    if not (text.startswith(opening) and text.endswith(CLOSING[opening])):
        return False
    depth = 0
    for number, char in enumerate(text):
        depth += (char == opening) - (char == CLOSING[opening])
        if depth == 0:
            return number == len(text) - 1
    return False
