"""The config of a program, as its command line gives it, in a tenth of Hydra's time."""

import copy
import dataclasses
from functools import cache

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moco.cli.run_names import register_resolvers
from moco.config.parsing import CONFIG_DIR, SCHEMAS, parse, register_schemas


def composed(program, *overrides):
    """The config of a program, every value checked, such as ``composed("train", "seed=1")``.

    Hydra takes a third of a second, whatever is given. So it composes each choice of files once,
    and the other overrides change a copy of that, as Hydra changes it. What this cannot do, and
    every mistake, is left to Hydra.
    """
    register_schemas()
    register_resolvers()
    values = [override for override in overrides if is_value(program, override)]
    choices = tuple(override for override in overrides if override not in values)
    try:
        config = copy.deepcopy(composed_by_hydra(program, choices))
        for override in OverridesParser.create().parse_overrides(values):
            OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
    except (HydraException, OmegaConfBaseException):
        config = composed_by_hydra.__wrapped__(program, overrides)
    return parse(config, SCHEMAS[program])


def is_value(program, override):
    """Whether an override is the value of a setting of the schema, and not the choice of a file."""
    key, assigned, _ = override.partition("=")
    first, *deeper = key.split(".")
    fields = {field.name for field in dataclasses.fields(SCHEMAS[program])}
    return bool(assigned) and first in fields and (bool(deeper) or not (CONFIG_DIR / key).is_dir())


@cache
def composed_by_hydra(program, overrides):
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose(program, list(overrides))
