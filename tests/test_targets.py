"""Functions of the user's own, named as package.module:name: what is wrong is one line."""

import sys

import pytest

from moco.errors import InputError
from moco.targets import call_target, import_target

NETS = """
def build(width: int, depth: int = 2):
    if isinstance(depth, str):
        raise TypeError("depth is\\na number")
    return (width, depth)

class Net:
    small = classmethod(lambda cls: "small")

def anything(**options):
    return options

SIZE = 3
"""


@pytest.fixture
def my_package(tmp_path, monkeypatch):
    """A package in the current folder, which is not on Python's path."""
    package = tmp_path / "my_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "nets.py").write_text(NETS)
    (package / "broken.py").write_text("1 / 0")
    (package / "needs.py").write_text("import a_missing_library")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield package
    for name in [name for name in sys.modules if name.split(".")[0] == "my_package"]:
        del sys.modules[name]


def test_a_target_is_called_with_its_options(my_package):
    assert call_target("my_package.nets:build", {"width": 64}, "backbone") == (64, 2)
    assert call_target("my_package.nets:Net.small", None, "backbone") == "small"
    assert call_target("my_package.nets:anything", {"a": 1}, "backbone") == {"a": 1}
    assert import_target("math:sqrt", "x")(4) == 2


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (
            "my_package.nets",
            {},
            "backbone.target=my_package.nets: expected package.module:function",
        ),
        ("my package:x", {}, "backbone.target=my package:x: expected package.module:function"),
        (
            "my_packge.nets:build",
            {},
            "backbone.target=my_packge.nets:build: no module named 'my_packge'; "
            "did you mean 'my_package'?",
        ),
        (
            "my_package.net:build",
            {},
            "backbone.target=my_package.net:build: no module named 'my_package.net'; "
            "did you mean 'my_package.nets'?",
        ),
        (
            "my_package.nets:biuld",
            {},
            "backbone.target=my_package.nets:biuld: my_package.nets has no 'biuld'; "
            "did you mean 'build'?",
        ),
        (
            "my_package.nets:SIZE",
            {},
            "backbone.target=my_package.nets:SIZE: expected a function or a class, got int",
        ),
        (
            "my_package.nets:build",
            {"widht": 1},
            "backbone.options.widht: my_package.nets:build has no such option; "
            "did you mean 'width'? (options: width, depth)",
        ),
        (
            "my_package.nets:build",
            {},
            "backbone.options.width: missing; my_package.nets:build cannot be called without it",
        ),
        (
            "my_package.broken:build",
            {},
            "backbone.target=my_package.broken:build: importing my_package.broken failed: "
            "ZeroDivisionError: division by zero",
        ),
        (
            "my_package.nets:build",
            {"width": 4, "depth": "deep"},
            "backbone.target=my_package.nets:build: raised TypeError: depth is a number",
        ),
        (
            "my_package.needs:build",
            {},
            "backbone.target=my_package.needs:build: importing my_package.needs failed: "
            "No module named 'a_missing_library'",
        ),
    ],
)
def test_what_is_wrong_is_one_line(target, options, message, my_package):
    with pytest.raises(InputError) as raised:
        call_target(target, options, "backbone")
    assert str(raised.value) == message
