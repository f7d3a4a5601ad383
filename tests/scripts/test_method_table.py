"""The table of docs/methods.md agrees with conf/."""

import dataclasses
import importlib.util

import pytest

from moco.config.parsing import CONFIG_DIR
from moco.config.train import MethodConfig
from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location(
        "method_table", REPOSITORY / "scripts" / "method_table.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_table_in_the_docs_is_the_one_that_conf_gives(script):
    page = script.PAGE.read_text()
    assert script.renewed(page) == page, "run python scripts/method_table.py"


@pytest.mark.slow
def test_every_method_has_a_row(script):
    methods = {path.stem for path in (CONFIG_DIR / "method").glob("*.yaml")}
    assert {f"`{method}`" for method in methods} == {
        script.row(name)["method"] for name in script.EXPERIMENTS
    }


def test_every_switch_of_the_method_is_explained(script):
    page = script.PAGE.read_text()
    assert not [
        item.name for item in dataclasses.fields(MethodConfig) if f"`{item.name}" not in page
    ]
