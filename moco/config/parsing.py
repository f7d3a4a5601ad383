"""From what Hydra composes out of the YAML files under ``conf/`` to the dataclasses of the schema, every value checked.

A value has one name from the YAML key to the dataclass field to the keyword argument. Below the programs nothing sees an
OmegaConf object.
"""

import dataclasses
import difflib
import math
from pathlib import Path
from typing import Any, TypeVar, cast

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from moco.config.pack import PackConfig
from moco.config.pretrained import EmbedConfig, EvaluateConfig, ExportConfig
from moco.config.segment import SegmentConfig
from moco.config.train import PreviewConfig, TrainConfig
from moco.errors import InputError, unknown_name

_PACKAGE = Path(__file__).resolve().parents[1]
# A wheel carries conf/ inside the package; a checkout or an editable install has it beside the package.
CONFIG_DIR = next(path for path in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if path.is_dir())

T = TypeVar("T")


def register_schemas() -> None:
    """Make the schemas known to Hydra under the names that ``conf/*.yaml`` refer to."""
    store = ConfigStore.instance()
    store.store("train_schema", TrainConfig)
    store.store("evaluate_schema", EvaluateConfig)
    store.store("segment_schema", SegmentConfig)
    store.store("preview_schema", PreviewConfig)
    store.store("embed_schema", EmbedConfig)
    store.store("pack_schema", PackConfig)
    store.store("export_schema", ExportConfig)


def parse(composed: DictConfig, schema: type[T]) -> T:
    """The composed config as an instance of `schema`, every value checked.

    Composing already refuses unknown keys, but ``+key=value`` adds one all the same; merging the plain values into a
    fresh schema refuses that too.

    Raises:
        InputError: names the key, what was expected and what came.
    """
    try:
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), plain))
    except MissingMandatoryValue as error:
        raise InputError(f"{error.full_key}: missing; give {error.full_key}=VALUE") from error
    except ConfigKeyError as error:
        raise InputError(unknown_key(str(error.full_key), schema)) from error
    except OmegaConfBaseException as error:
        raise InputError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    check_limits(config)
    return cast(T, config)


def check_limits(config: Any, prefix: str = "") -> None:
    """Hold every value of a config dataclass to its `setting`.

    Raises:
        InputError: for the first value that is out of range.
    """
    for item in dataclasses.fields(config):
        key, value, limits = prefix + item.name, getattr(config, item.name), item.metadata
        if dataclasses.is_dataclass(value):
            check_limits(value, key + ".")
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{key}={value}: expected a finite number")
        if value is None or not limits:
            continue
        if "choices" in limits:
            if value not in limits["choices"]:
                raise InputError(f"{key}: {unknown_name('value', value, limits['choices'])}")
        elif not (
            value > limits.get("above", -float("inf"))
            and value >= limits.get("at_least", -float("inf"))
            and ("below" not in limits or value < limits["below"])
            and value <= limits.get("at_most", float("inf"))
        ):
            words = " and ".join(
                f"{name.replace('_', ' ')} {limit}" for name, limit in limits.items()
            )
            raise InputError(f"{key}={value}: expected a number {words}")


def unknown_key(full_key: str, schema: type) -> str:
    """A sentence for a key that the schema does not have, with the nearest one that it does."""
    parent, _, name = full_key.rpartition(".")
    every = {key: key.rpartition(".") for key in keys(schema)}
    siblings = [key for key, (above, _, _) in every.items() if above == parent]
    for candidates in (
        siblings,
        list(every),
    ):  # a slip of the pen, else the right name under the wrong parent
        names = [every[key][2] for key in candidates]
        nearest = [
            candidates[names.index(match)] for match in difflib.get_close_matches(name, names, n=1)
        ]
        if nearest:
            break
    hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
    return f"unknown key '{full_key}'{hint} (keys here: {', '.join(siblings)})"


def keys(schema: type, prefix: str = "") -> list[str]:
    """All dotted keys of a schema, groups included."""
    names = []
    for item in dataclasses.fields(schema):
        names.append(prefix + item.name)
        if isinstance(item.type, type) and dataclasses.is_dataclass(item.type):
            names += keys(item.type, prefix + item.name + ".")
    return names
