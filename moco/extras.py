"""How to install the packages that only some features need."""

import shlex
from pathlib import Path

from moco.config_folder import CONFIG_DIR

PACKAGE = Path(__file__).resolve().parent
CHECKOUT = PACKAGE.parent


def install_command(extra: str) -> str:
    """Return the command that installs an extra of ``pyproject.toml``.

    A checkout installs itself again, together with the extra. An installed package has a published
    name.

    Args:
        extra: such as "hf".
    """
    if CONFIG_DIR.is_relative_to(PACKAGE):
        return f"pip install 'moco-ssl[{extra}]'"
    here = Path("pyproject.toml")
    is_here = here.exists() and here.samefile(CHECKOUT / here)
    folder = "." if is_here else CHECKOUT
    return f"pip install -e {shlex.quote(f'{folder}[{extra}]')}"
