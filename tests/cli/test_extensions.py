"""The user's callbacks and loggers, as the command line names them."""

import csv
import sys

import pytest
import pytorch_lightning as pl
from hydra import compose, initialize_config_dir

from moco.cli.error_lines import CONFIG_ERRORS, explain_config
from moco.cli.extensions import build_callbacks, build_loggers, check_callbacks, check_loggers
from moco.config.parsing import CONFIG_DIR, parse, register_schemas
from moco.config.train import TrainConfig
from moco.errors import InputError
from moco.extras import install_command
from moco.train import run

MODULE = """
import pytorch_lightning as pl

class Counter(pl.Callback):
    def __init__(self, start=0):
        self.count = start
    def on_train_batch_end(self, *_):
        self.count += 1
    def on_train_end(self, trainer, *_):
        self.log_to = [type(logger).__name__ for logger in trainer.loggers]
        seen.append((self.count, self.log_to))
    def state_dict(self):
        return {"count": self.count}
    def load_state_dict(self, state):
        self.count = state["count"]

class Stateless(pl.Callback):
    pass

def wrong():
    return 3

seen = []
"""


@pytest.fixture
def my_callbacks(tmp_path, monkeypatch):
    (tmp_path / "my_callbacks.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("my_callbacks", None)


def config_of(*overrides):
    register_schemas()
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            return parse(compose("train", ["+experiment=quickstart", *overrides]), TrainConfig)
    except CONFIG_ERRORS as error:
        raise InputError(explain_config(error, TrainConfig)) from error


@pytest.mark.parametrize(
    "overrides",
    [
        ["callbacks.a.target=my_callbacks:Counter", "callbacks.a.options.start=5"],
        ["callbacks.a={target: my_callbacks:Counter, options: {start: 5}}"],
        ["+callbacks.a.target=my_callbacks:Counter", "callbacks.a.options={start: 5}"],
    ],
)
def test_a_callback_needs_no_plus_on_the_command_line(overrides, my_callbacks):
    config = config_of(*overrides)
    check_callbacks(config.callbacks)
    (callback,) = build_callbacks(config.callbacks)
    assert callback.count == 5


COUNTER = {"target": "my_callbacks:Counter"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "callbacks.a=3: expected {target"),
        ({"taget": "x:y"}, "callbacks.a.taget: unknown key 'taget'; did you mean 'target'"),
        ({"options": {}}, "callbacks.a.target: missing"),
        (
            {"target": "my_callback:Counter"},
            "no module named 'my_callback'; did you mean 'my_callb",
        ),
        ({**COUNTER, "options": {"strat": 1}}, r"callbacks.a.options.strat: .* mean 'start'"),
        ({**COUNTER, "options": 3}, r"callbacks.a.options=3: expected {name: value}"),
        ({"target": "my_callbacks:pl.Trainer"}, "expected a pytorch_lightning.Callback, got Train"),
    ],
)
def test_a_callback_that_cannot_be_built_is_one_line(given, message, my_callbacks):
    with pytest.raises(InputError, match=message):
        check_callbacks({"a": given})


def test_what_a_target_returns_is_a_callback_with_a_state_key_of_its_own(my_callbacks):
    with pytest.raises(InputError, match="got int"):
        build_callbacks({"a": {"target": "my_callbacks:wrong"}})
    with pytest.raises(InputError, match=r"callbacks.b: callbacks.a has the state_key 'Counter'"):
        build_callbacks({"a": COUNTER, "b": COUNTER})
    (mine,) = build_callbacks({"a": COUNTER})
    with pytest.raises(InputError, match="moco's own Counter has the state_key"):
        build_callbacks({"a": COUNTER}, ours=[mine])
    stateless = {"target": "my_callbacks:Stateless"}
    assert len(build_callbacks({"a": stateless, "b": stateless, "c": None}, [pl.Callback()])) == 3


@pytest.mark.slow
def test_a_callbacks_state_and_the_table_survive_a_resume(runner, tmp_path, my_callbacks):
    folder = tmp_path / "run"
    for setting, steps in ((["csv"], 1), ([], 2), (["csv"], 3)):
        config = runner.config("data.image_size=8", f"trainer.max_steps={steps}")
        config.trainer.log_every_n_steps = 1
        config.evaluation.every_n_epochs = 100
        config.callbacks = {"count": {**COUNTER, "options": {"start": 10}}}
        config.logger = setting
        run(config, folder)
    assert sys.modules["my_callbacks"].seen == [
        (11, ["MetricsFile"]), (12, ["MetricsFile"]), (13, ["MetricsFile"]),
    ]  # fmt: skip
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3"]  # the table is there in any case
    assert all(float(row["train/loss"]) >= 0 for row in rows)
    assert not list(folder.glob("events*"))


NO_OPTIONS = {"mlflow": {}, "wandb": {}}


@pytest.mark.parametrize(
    ("setting", "options", "message"),
    [
        ("wanb", {}, "logger: unknown value 'wanb'; did you mean 'wandb'"),
        ([3], {}, "logger: unknown value '3'"),
        ({"csv": 1}, {}, "logger={'csv': 1}: expected a list of csv, mlflow"),
        (["csv"], {"wandb": {"project": "x"}}, "logger_options.wandb: without wandb in logger"),
    ],
)
def test_a_logger_that_does_not_exist_is_one_line(setting, options, message):
    with pytest.raises(InputError, match=message):
        check_loggers(setting, {**NO_OPTIONS, **options})


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_one_line_even_where_a_folder_has_its_name(
    name, tmp_path, monkeypatch
):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    sys.path_importer_cache.clear()
    monkeypatch.delitem(sys.modules, name, raising=False)
    for _ in range(2):
        with pytest.raises(InputError) as error:
            check_loggers([name], NO_OPTIONS)
        assert str(error.value) == f"logger={name} needs {name}: {install_command(name)}"
        (tmp_path / name).mkdir(exist_ok=True)
        sys.path_importer_cache.clear()


def test_an_option_that_lightnings_class_lacks_is_one_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: sys)
    monkeypatch.setattr(sys, "origin", "there", raising=False)
    options = {**NO_OPTIONS, "mlflow": {"experiment": "x"}}
    with pytest.raises(
        InputError, match=r"^logger_options.mlflow.experiment: .* 'experiment_name'"
    ):
        check_loggers("mlflow", options)


def test_a_logger_that_cannot_start_is_one_line(tmp_path, monkeypatch):
    def refuse(*_):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("moco.training.experiment_trackers.start_mlflow", refuse)
    with pytest.raises(InputError, match="logger=mlflow: it cannot start: ConnectionError: no rou"):
        build_loggers(["mlflow"], NO_OPTIONS, tmp_path, {}, [], None)


def test_the_table_is_always_there_and_tensorboard_where_it_can_write(tmp_path, caplog):
    for names in ([], ["csv"], ["tensorboard"]):
        loggers = build_loggers(names, NO_OPTIONS, tmp_path / "caf\udce9", {}, [], None)
        assert [type(logger).__name__ for logger in loggers] == ["MetricsFile"]
    assert "TensorBoard cannot write to a folder whose name is not UTF-8" in caplog.text
