"""The peers of a benchmark: installed packages, and the official code from a checkout."""

from collections.abc import Sequence

from benchmarks import official
from benchmarks.machine import version_of
from moco.errors import InputError, unknown_name

INSTALLED = ("lightly",)
"""Peers that are packages. By default, all that are installed take part."""

UNINSTALLABLE = {
    "solo-learn": "its newest release, 1.0.2, requires torch 1.9.1 and cannot be installed "
    "with this project"
}

Peers = dict[str, str]
"""By name: the version of the package, or the path of the official checkout."""


def peers_of(asked: Sequence[str]) -> Peers:
    """Return the peers that take part.

    Args:
        asked: ``lightly`` or ``official=PATH``; if it is empty, all that are installed.

    Raises:
        InputError: a peer is unknown or not available.
    """
    peers = {}
    if not asked:
        for name in INSTALLED:
            version = version_of(name)
            if version is not None:
                peers[name] = version
    for one in asked:
        name, _, path = one.partition("=")
        if name == "official":
            official.builder_of(path)
            peers[name] = path
        elif name in UNINSTALLABLE:
            raise InputError(f"--against {one}: {UNINSTALLABLE[name]}")
        elif name not in INSTALLED:
            problem = unknown_name("peer", name, [*INSTALLED, "official=PATH"])
            raise InputError(f"--against {one}: {problem}")
        else:
            version = version_of(name)
            if version is None:
                raise InputError(f"--against {one}: {name} is not installed")
            peers[name] = version
    return peers


def versions(peers: Peers) -> dict[str, str]:
    """Return what identifies the code of each peer."""
    found = dict(peers)
    if "official" in peers:
        found["official"] = official.version(peers["official"])
    return found
