"""Who may import whom, and how files are named."""

import ast
import sys
from collections import Counter
from functools import cache

import pytest

from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "moco"
PROGRAMS = {
    "train",
    "evaluate",
    "segment",
    "predict",
    "embed",
    "preview",
    "export",
    "pack",
    "stats",
    "sweep",
}
# Files that every package may import.
FOR_ALL = ("config_folder", "errors", "extras", "phases", "screen", "targets")
# The packages that a package may import, beside itself and these files.
ALLOWED = {
    "config_folder": set(),
    "errors": set(),
    "phases": set(),
    "screen": set(),
    "extras": set(),
    "targets": set(),
    "__init__": {"callbacks", "cli", "data", "evaluation", "methods", "models", "weights"},
    "config": set(),
    "runs": set(),
    "models": set(),
    "data": set(),
    "training": {"runs"},
    "methods": {"models", "training"},
    "segmentation": {"data", "models", "runs", "training"},
    "weights": {"methods", "models", "runs", "segmentation"},
    "evaluation": {"data", "runs", "segmentation"},
    "callbacks": {"data", "evaluation", "runs", "segmentation", "training"},
    "cli": {
        "callbacks",
        "config",
        "data",
        "evaluation",
        "methods",
        "models",
        "runs",
        "segmentation",
        "training",
        "weights",
    },
}
# The only files of another package that these packages may import.
ONLY = {
    ("methods", "training"): {
        "moco.training.distributed.collectives",
        "moco.training.optimizers",
        "moco.training.schedules",
    },
    ("segmentation", "training"): {"moco.training.optimizers", "moco.training.schedules"},
}
# Pure functions of tensors and arrays: these files import nothing of ours.
LEAVES = [
    "evaluation/collapse.py",
    "evaluation/diagnostics.py",
    "evaluation/features.py",
    "evaluation/neighbors.py",
    "evaluation/reports/plots.py",
    "methods/key_queue.py",
    "methods/losses.py",
    "methods/momentum.py",
    "segmentation/averaged_views.py",
    "segmentation/comparison_plot.py",
    "segmentation/inference.py",
    "segmentation/metrics.py",
]
MODULES = sorted(PACKAGE.rglob("*.py"))


def module_name(path):
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    if parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts)


NAMES = {module_name(path) for path in MODULES}


@cache
def imports(path):
    """Return the names of all modules that a file imports, also inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by full name"
            for alias in node.names:
                full_name = f"{node.module}.{alias.name}"
                found.append(full_name if full_name in NAMES else node.module)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_packages_import_only_what_they_may(path):
    package = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if package in PROGRAMS:
        return
    for name in imports(path):
        if name.startswith("moco."):
            target = name.split(".")[1]
            allowed = ALLOWED[package] | {package, *FOR_ALL}
            assert target in allowed, f"{package} imports {name}"
            only = ONLY.get((package, target))
            assert only is None or name in only, f"{package} imports {name}"
        if package not in ("config", "cli"):
            library = name.split(".")[0]
            assert library not in ("hydra", "omegaconf"), f"{path} knows about config files"


def test_no_two_files_import_each_other_even_through_others():
    graph = {}
    for path in MODULES:
        name = module_name(path)
        graph[name] = {target for target in imports(path) if target in NAMES and target != name}
    graph["moco"] = set()  # it imports its public names when they are used
    done = set()

    def visit(name, way):
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name not in done:
            for target in graph[name]:
                visit(target, [*way, name])
            done.add(name)

    for name in graph:
        visit(name, [])


@pytest.mark.parametrize("leaf", LEAVES)
def test_leaves_import_nothing_of_ours_but_errors(leaf):
    ours = {name for name in imports(PACKAGE / leaf) if name.startswith("moco.")}
    assert ours <= {"moco.errors"}


def test_methods_know_neither_the_trainer_nor_tensorboard():
    for path in (PACKAGE / "methods").glob("*.py"):
        text = path.read_text()
        assert "tensorboard" not in text.lower(), path
        assert "pl.Trainer(" not in text, path


def test_every_package_says_what_it_is():
    for path in PACKAGE.rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_a_file_name_is_used_once_and_says_something():
    stems = Counter(path.stem for path in MODULES if path.stem != "__init__")
    in_use_by_config = {path.stem for path in (PACKAGE / "config").glob("*.py")}
    twice = {name for name, count in stems.items() if count > 1} - in_use_by_config
    assert not twice
    assert not set(stems) & {"utils", "common", "helpers", "misc"}
    assert not set(stems) & set(sys.stdlib_module_names)
