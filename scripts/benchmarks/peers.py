"""Whom a run is compared with: packages as they are installed, and the official code from a checkout."""

from collections.abc import Sequence

from benchmarks import official
from benchmarks.machine import version_of
from moco.errors import InputError, unknown_name

INSTALLED = ("lightly",)
"""Those that are packages; left to choose, all that are installed take part."""

UNINSTALLABLE = {
    "solo-learn": "its newest release, 1.0.2, asks for torch 1.9.1 and cannot be installed beside this project"
}

Peers = dict[str, str]
"""By name: the package's version, or the official code's checkout."""


def peers_of(asked: Sequence[str]) -> Peers:
    """Those that take part.

    Args:
        asked: ``lightly`` or ``official=PATH``; none: all that are installed.

    Raises:
        InputError: one that was asked for is unknown or not there.
    """
    if not asked:
        return {name: version for name in INSTALLED if (version := version_of(name))}
    peers = {}
    for one in asked:
        name, _, path = one.partition("=")
        if name == "official":
            official.builder_of(path)
            peers[name] = path
        elif name in UNINSTALLABLE:
            raise InputError(f"--against {one}: {UNINSTALLABLE[name]}")
        elif name not in INSTALLED:
            raise InputError(
                f"--against {one}: {unknown_name('peer', name, [*INSTALLED, 'official=PATH'])}"
            )
        elif (version := version_of(name)) is None:
            raise InputError(f"--against {one}: {name} is not installed here")
        else:
            peers[name] = version
    return peers


def versions(peers: Peers) -> dict[str, str]:
    return {
        name: official.version(found) if name == "official" else found
        for name, found in peers.items()
    }
