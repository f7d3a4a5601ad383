"""What the schema says of every setting: its values, its default and its meaning.

The meaning is the string under the field in the schema's file. Python drops such strings, so they
are read from the source.
"""

import ast
import dataclasses
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Union, get_args, get_origin

NO_DEFAULT = "???"
"""The default of a setting that has to be given; OmegaConf writes it like this, too."""
WORDS = {int: "whole number", float: "number", bool: "true or false", str: "text"}
LIMIT_WORDS = {
    "at_least": "at least",
    "above": "above",
    "at_most": "at most",
    "below": "below",
}


@dataclass(frozen=True)
class SettingText:
    """One setting of a program, or a group of settings."""

    key: str
    """The dotted name, such as ``data.batch_size``."""
    values: str
    """What may be given, in words: ``whole number, at least 1``. Empty for a group."""
    default: Any
    """The schema's default; `NO_DEFAULT` if the setting has to be given; None for a group."""
    meaning: str
    """The text of the schema on one line, with its ``code`` marks."""
    choices: tuple[str, ...] = ()
    """The values that can be listed."""
    is_group: bool = False


def setting_texts(schema: type, prefix: str = "") -> list[SettingText]:
    """Return every setting of a schema in its order. A group comes before its settings.

    Args:
        schema: a dataclass of ``moco.config``.
        prefix: the dotted key of the schema with a dot at its end.
    """
    found = []
    for item in dataclasses.fields(schema):
        key = prefix + item.name
        meaning = meaning_of(schema, item.name)
        if dataclasses.is_dataclass(item.type):
            kind: Any = item.type
            group_meaning = " ".join([*class_text(kind).split(), *meaning.split()])
            found.append(SettingText(key, "", None, group_meaning, is_group=True))
            found += setting_texts(kind, key + ".")
        else:
            default = item.default
            if item.default_factory is not dataclasses.MISSING:
                default = item.default_factory()
            found.append(SettingText(key, values_of(item), default, meaning, choices_of(item)))
    return found


def meaning_of(schema: type, name: str) -> str:
    """Return the string under a field on one line. A base class may hold it."""
    for kind in schema.__mro__:
        meaning = field_strings(kind.__module__).get((kind.__name__, name))
        if meaning:
            return " ".join(meaning.split())
    return ""


def class_text(schema: type) -> str:
    """Return the docstring of a schema; not the signature that `dataclass` puts in its place."""
    text = schema.__doc__ or ""
    if text.startswith(f"{schema.__name__}("):
        return ""
    return text


@cache
def field_strings(module: str) -> dict[tuple[str, str], str]:
    """Return the strings under the fields of a module's classes, by class and field."""
    if module == "builtins":
        return {}
    source = Path(str(sys.modules[module].__file__)).read_text(encoding="utf-8")
    strings = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for statement, following in zip(node.body, node.body[1:], strict=False):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(following, ast.Expr):
                continue
            text = following.value
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                name = ast.unparse(statement.target)
                strings[node.name, name] = text.value
    return strings


def choices_of(item: "dataclasses.Field[Any]") -> tuple[str, ...]:
    """Return the values of a field if they can be listed: choices, true and false, null."""
    kind, may_be_null = without_null(item.type)
    choices: tuple[str, ...] = item.metadata.get("choices", ())
    if kind is bool:
        choices = ("true", "false")
    if choices and may_be_null:
        choices = (*choices, "null")
    return choices


def values_of(item: "dataclasses.Field[Any]") -> str:
    """Return in words what may be given to a field."""
    choices = choices_of(item)
    if choices:
        return " | ".join(choices)
    kind, may_be_null = without_null(item.type)
    words = [kind_in_words(kind)]
    limits = item.metadata
    if set(limits) == {"at_least", "at_most"}:
        words.append(f"{limits['at_least']} to {limits['at_most']}")
    else:
        words += [f"{LIMIT_WORDS[name]} {limit}" for name, limit in limits.items()]
    text = ", ".join(filter(None, words))
    if may_be_null:
        text += "; or null"
    return text


def without_null(kind: Any) -> tuple[Any, bool]:
    """Return the type without its None, and whether it had one."""
    if get_origin(kind) is Union and NoneType in get_args(kind):
        return get_args(kind)[0], True
    return kind, False


def kind_in_words(kind: Any) -> str:
    """Return what a type is called in a help text."""
    if get_origin(kind) is list:
        return f"list, each a {kind_in_words(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return "{name: value}"
    return WORDS.get(kind, "")


def as_given(value: Any) -> str:
    """Return a value as the command line takes it: null, true, [a,b]."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        pairs = [f"{key}: {as_given(of_key)}" for key, of_key in value.items()]
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(as_given, value)) + "]"
    return str(value)
