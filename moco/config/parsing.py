"""Turn the config that Hydra composes into the dataclasses of the schema, and check every value.

A value has one name from the YAML key to the dataclass field to the keyword argument. Nothing below
the programs sees an OmegaConf object.
"""

import copy
import dataclasses
import difflib
import math
import operator
import re
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar, cast, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from moco.config.pack import PackConfig
from moco.config.paths import resolve_paths
from moco.config.predict import PredictConfig
from moco.config.pretrained import EmbedConfig, EvaluateConfig, ExportConfig
from moco.config.segment import SegmentConfig
from moco.config.stats import StatsConfig
from moco.config.train import PreviewConfig, TrainConfig
from moco.config_folder import CONFIG_DIR as CONFIG_DIR
from moco.errors import InputError, unknown_name

T = TypeVar("T")

SCHEMAS = {
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "segment": SegmentConfig,
    "predict": PredictConfig,
    "preview": PreviewConfig,
    "embed": EmbedConfig,
    "pack": PackConfig,
    "export": ExportConfig,
    "stats": StatsConfig,
}
OPEN = ("callbacks", "logger_options.mlflow", "logger_options.wandb")
"""Groups whose keys are the user's: ``callbacks.ema.target=...`` needs no plus. What is in them is
checked in `moco.cli.extensions`."""
LIMITS = {
    "above": operator.gt,
    "at_least": operator.ge,
    "below": operator.lt,
    "at_most": operator.le,
}
"""What has to hold between a value and each limit of `setting`."""
NO_NUMBER = re.compile(r"Value '(.*)' of type '\w+' could not be converted to (Float|Integer)")
"""What OmegaConf says of a value that is no number."""
NUMBER_AND_REST = re.compile(
    r"\s*([+-]?\d*\.?\d+(?:[eE][+-]?\d+)?)\s*(?:/\s*(\d+)|(%)|[A-Za-z]*)\s*"
)
"""A number with a divisor, a percent sign or a unit behind it: ``1/20``, ``5%``, ``224px``."""


def register_schemas() -> None:
    """Register the schemas of all programs with Hydra."""
    for program in SCHEMAS:
        register_schema(program)


@cache
def register_schema(program: str) -> None:
    """Register the schema of a program with Hydra under the name that its YAML file uses.

    A program builds its own schema alone: those of the others were a quarter of the function calls
    of a help page.
    """
    from hydra.core.config_store import ConfigStore  # Hydra takes twice the time of all this

    node = OmegaConf.structured(SCHEMAS[program])
    for key in OPEN:
        group = OmegaConf.select(node, key)
        if group is not None:
            OmegaConf.set_struct(group, False)
    ConfigStore.instance().store(f"{program}_schema", node)


def parse(composed: DictConfig, schema: type[T]) -> T:
    """Return the composed config as an instance of `schema`, with every value checked.

    Paths are resolved, see `moco.config.paths`.

    Composing refuses unknown keys, but ``+key=value`` still adds one. Merging the plain values into
    a fresh schema refuses that too.

    Raises:
        InputError: names the key, what was expected and what was given.
    """
    try:
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        # The first argument of unsafe_merge is used up; in exchange it takes half of merge's time.
        merged = OmegaConf.unsafe_merge(copy.deepcopy(defaults_of(cast(type, schema))), plain)
        config = OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        raise InputError(f"{error.full_key}: missing; give {error.full_key}=VALUE") from error
    except ConfigKeyError as error:
        raise InputError(unknown_key(str(error.full_key), schema)) from error
    except OmegaConfBaseException as error:
        problem = wrong_value(str(error.full_key), str(error).splitlines()[0], schema)
        raise InputError(problem) from error
    check_limits(config)
    resolve_paths(config)
    return cast(T, config)


@cache
def defaults_of(schema: type) -> DictConfig:
    """Return a schema with its defaults, which is not to be changed. To make it takes 40 ms."""
    return cast(DictConfig, OmegaConf.structured(schema))


def check_limits(config: Any, prefix: str = "") -> None:
    """Check every value of a config dataclass against its `setting`.

    Args:
        config: an instance of a schema.
        prefix: the dotted key of `config` with a dot at its end, for messages.

    Raises:
        InputError: names the first value that is out of range.
    """
    for item in dataclasses.fields(config):
        key = prefix + item.name
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            check_limits(value, key + ".")
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{key}={value}: expected a finite number")
        limits = item.metadata
        if value is None:
            continue
        if "choices" in limits:
            if value not in limits["choices"]:
                raise InputError(f"{key}: {unknown_name('value', value, limits['choices'])}")
        elif not is_within(value, limits):
            raise InputError(f"{key}={value}: expected a number{in_words(limits)}")


def is_within(value: Any, limits: Mapping[str, Any]) -> bool:
    """Return whether a number keeps to the limits of its `setting`."""
    return all(LIMITS[name](value, limit) for name, limit in limits.items())


def in_words(limits: Mapping[str, Any]) -> str:
    """Return the limits of a number as the end of a phrase, such as `` above 0 and at most 1``."""
    words = [f"{name.replace('_', ' ')} {limit}" for name, limit in limits.items()]
    return f" {' and '.join(words)}" if words else ""


def wrong_value(full_key: str, reason: str, schema: type) -> str:
    """Return a sentence about a value of a wrong type: what is expected, and the nearest value.

    Args:
        full_key: the dotted key.
        reason: the first line of what OmegaConf says.
        schema: of the program.
    """
    refused = NO_NUMBER.fullmatch(reason)
    item = field_of(re.sub(r"\[\d+\]$", "", full_key), schema)
    if refused is None or item is None:
        return f"{full_key}: {reason}"
    value, kind = refused.groups()
    whole = "whole " if kind == "Integer" else ""
    expected = f"expected a {whole}number{in_words(item.metadata)}"
    nearest = nearest_number(value, kind == "Integer", item.metadata)
    hint = f"; did you mean {nearest}?" if nearest else ""
    return f"{full_key}={value}: {expected}{hint}"


def field_of(full_key: str, schema: type) -> "dataclasses.Field[Any] | None":
    """Return the field of a dotted key; None if the schema has none of that name."""
    *groups, name = full_key.split(".")
    kind: Any = schema
    for group in groups:
        types = {item.name: item.type for item in dataclasses.fields(kind)}
        kind = types.get(group)
        if not dataclasses.is_dataclass(kind):
            return None
    for item in dataclasses.fields(kind):
        if item.name == name:
            return item
    return None


def nearest_number(value: str, is_whole: bool, limits: Mapping[str, Any]) -> str:
    """Return the number that a text seems to mean, such as 0.05 for ``5%``; empty: there is none.

    Args:
        value: the text.
        is_whole: a whole number is expected.
        limits: of the setting.
    """
    found = NUMBER_AND_REST.fullmatch(value)
    if found is None:
        return ""
    number, divisor, percent = float(found[1]), float(found[2] or 1), found[3]
    if percent:
        divisor = 100
    if divisor == 0:
        return ""
    meant = number / divisor
    if not math.isfinite(meant) or not is_within(meant, limits):
        return ""
    if is_whole:
        return str(int(meant)) if meant.is_integer() and not percent else ""
    return f"{meant:g}"


def unknown_key(full_key: str, schema: type) -> str:
    """Return a sentence about a key that the schema does not have, with the nearest key.

    A key with this very name in another group comes first. Then comes a key of the same group with
    a similar name, which is a typing error, and then a similar name in another group.
    """
    group, _, name = full_key.rpartition(".")
    all_keys = keys(schema)
    if "method" in all_keys:  # these programs also take an experiment, which is no key of a config
        all_keys.append("experiment")
    siblings = [key for key in all_keys if key.rpartition(".")[0] == group]
    if takes_new_keys(group, schema):
        return f"unknown key '{full_key}'; a new one needs a plus: +{full_key}=VALUE"
    hint = ""
    same_name = [key for key in all_keys if key.rpartition(".")[2] == name]
    for candidates in (all_keys, siblings, same_name):
        names = [key.rpartition(".")[2] for key in candidates]
        for match in difflib.get_close_matches(name, names, n=1):
            hint = f"; did you mean '{candidates[names.index(match)]}'?"
    return f"unknown key '{full_key}'{hint} (keys here: {', '.join(siblings)})"


def takes_new_keys(group: str, schema: type) -> bool:
    """Return whether the names in a group are the user's, such as an augmentation's operations."""
    for name in group.split("."):
        types = {item.name: item.type for item in dataclasses.fields(schema)}
        kind: Any = types.get(name)
        if not dataclasses.is_dataclass(kind):
            return kind is Any or get_origin(kind) is dict
        schema = cast(type, kind)
    return False


def keys(schema: type, prefix: str = "") -> list[str]:
    """Return all dotted keys of a schema, groups included."""
    found = []
    for item in dataclasses.fields(schema):
        key = prefix + item.name
        found.append(key)
        if isinstance(item.type, type) and dataclasses.is_dataclass(item.type):
            found += keys(item.type, key + ".")
    return found
