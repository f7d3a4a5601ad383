"""Where the YAML files are."""

from pathlib import Path

# A wheel carries the YAML files inside the package. A checkout has them beside the package.
CONFIG_DIR = Path(__file__).resolve().parent / "conf"
if not CONFIG_DIR.is_dir():
    CONFIG_DIR = CONFIG_DIR.parents[1] / "conf"
