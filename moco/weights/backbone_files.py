"""Files in the safetensors format, in and out: tensors by name, and a dict of strings about them."""

from pathlib import Path
from typing import TYPE_CHECKING

from moco.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

NOT_INSTALLED = "safetensors is not installed: pip install moco-ssl[export]"


def as_safetensors(weights: "dict[str, Tensor]", metadata: dict[str, str] | None = None) -> bytes:
    """The content of a safetensors file.

    Raises:
        InputError: safetensors is not installed.
    """
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise InputError(NOT_INSTALLED) from error
    return save(
        weights, {"format": "pt", **(metadata or {})}
    )  # "pt" is what other readers of the format look for


def read_safetensors(path: str | Path, source: str) -> "tuple[dict[str, Tensor], dict[str, str]]":
    """The tensors of a file, on the CPU, and its metadata without the item ``format``.

    Args:
        source: what the errors begin with.

    Raises:
        InputError: no such file, damaged, or safetensors is not installed.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise InputError(f"{source}: {NOT_INSTALLED}") from error
    if not Path(path).is_file():
        raise InputError(f"{source}: no such file")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    except (SafetensorError, ValueError) as error:
        raise InputError(f"{source}: damaged, or no safetensors file ({error})") from error
    return weights, {key: value for key, value in metadata.items() if key != "format"}
