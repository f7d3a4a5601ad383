"""Call a program as a function, once: a run that is finished is not repeated."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from moco.config.parsing import CONFIG_DIR, parse, register_schemas
from moco.runs.atomic_files import write_json

DONE = "done.json"


def composed(name: str, schema: type, overrides: Sequence[str]) -> Any:
    """Return the config of a program, as its command line would give it.

    Args:
        name: of the program, such as ``train``.
        schema: its config dataclass.
        overrides: ``key=value``, as on the command line.

    Raises:
        InputError: a value is out of range.
        hydra.errors.ConfigCompositionException: a key is unknown.
    """
    register_schemas()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return parse(compose(name, list(overrides)), schema)


def call(
    program: Callable[[Any, Path], None],
    name: str,
    schema: type,
    folder: Path,
    overrides: Sequence[str],
) -> dict[str, Any]:
    """Run a program, unless its folder says that it is done. Return its figures.

    An interrupted run goes on, because the programs resume by themselves. The figure ``seconds`` is
    the time of the process that finished the run.

    Raises:
        SystemExit: the folder holds a finished run with other settings.
    """
    done = folder / DONE
    if done.exists():
        content = json.loads(done.read_text())
        if content["overrides"] != list(overrides):
            changed = sorted(set(content["overrides"]) ^ set(overrides))
            raise SystemExit(
                f"{folder} holds a finished run with other settings ({', '.join(changed)}); "
                "remove the folder, or give another one"
            )
        return dict(content["figures"])
    started = time.monotonic()
    program(composed(name, schema, overrides), folder)
    figures = json.loads((folder / "metrics.json").read_text())
    figures["seconds"] = round(time.monotonic() - started, 1)
    write_json(done, {"overrides": list(overrides), "figures": figures})
    return figures
