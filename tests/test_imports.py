"""The arrows between the rooms: who may import whom."""

import ast

import pytest

from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "moco"
PROGRAMS = {"train", "evaluate", "segment", "embed", "preview", "export", "pack", "sweep"}
# A room may import itself, moco.errors and these.
ALLOWED = {
    "models": {"weights"},
    "weights": {"methods", "models", "runs"},
    "data": set(),
    "runs": {"callbacks", "weights"},
    "training": {"callbacks", "runs"},
    "methods": {"models", "training"},
    "evaluation": {"callbacks", "data", "runs", "segmentation"},
    "segmentation": {"data", "models", "training"},
    "callbacks": {"data", "evaluation", "runs", "segmentation", "training"},
    "cli": {"callbacks", "config", "data", "methods", "models", "runs", "training"},
    "config": set(),
    "errors": set(),
    "__init__": set(),
}
LEAVES = [
    "evaluation/neighbors.py",
    "evaluation/features.py",
    "evaluation/diagnostics.py",
    "evaluation/reports/drawing.py",
    "segmentation/metrics.py",
    "methods/losses.py",
    "methods/momentum.py",
    "methods/key_queue.py",
]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by full name"
            yield node.module


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_only_what_they_may(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room in PROGRAMS:
        return
    for name in imports(path):
        if name.startswith("moco."):
            target = name.split(".")[1]
            assert target in ALLOWED[room] | {room, "errors"}, f"{room} imports {name}"
        if room not in ("config", "cli"):
            assert name.split(".")[0] not in ("hydra", "omegaconf"), (
                f"{path} knows about config files"
            )


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaves_import_no_other_room(leaf):
    assert not [name for name in imports(PACKAGE / leaf) if name.startswith("moco.")]


def test_no_drawers_and_no_names_of_the_standard_library():
    import sys

    names = {path.stem for path in MODULES if path.stem != "__init__"}
    assert not names & {"utils", "common", "helpers", "misc"}
    assert not names & set(sys.stdlib_module_names)
