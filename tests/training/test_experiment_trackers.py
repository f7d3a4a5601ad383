"""W&B and MLflow know a run again after a resume, and only that run."""

import json
from types import SimpleNamespace

import pytest

from moco.training import experiment_trackers
from moco.training.experiment_trackers import start_mlflow, start_wandb

CONFIG = {"seed": 3, "method": {"temperature": 0.1}, "trainer": {"max_epochs": 1}}
LONGER = {**CONFIG, "trainer": {"max_epochs": 2}}


@pytest.fixture(autouse=True)
def no_settings_of_the_user(monkeypatch):
    for name in ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)


class StandIn:
    """Counts runs, and knows the ids of both services."""

    started = 0

    def __init__(self, **settings):
        self.settings = settings
        self.run_id = settings.get("id") or settings.get("run_id")
        if self.run_id is None:
            StandIn.started += 1
            self.run_id = f"run {StandIn.started}"
        self.config = None
        self.experiment = SimpleNamespace(id=self.run_id, update_run=lambda *_, **__: None)

    def log_hyperparams(self, config):
        self.config = config


@pytest.mark.parametrize("start", [start_wandb, start_mlflow])
def test_a_run_keeps_its_id_in_its_folder(start, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment_trackers, "WandbRun", StandIn)
    monkeypatch.setattr(experiment_trackers, "MLFlowLogger", StandIn)
    first = start(tmp_path / "a", CONFIG, {})
    again = start(tmp_path / "a", LONGER, {})
    other = start(tmp_path / "b", CONFIG, {})
    assert first.run_id == again.run_id != other.run_id
    assert first.config == CONFIG
    # MLflow would refuse a changed parameter.
    assert again.config == (LONGER if start is start_wandb else None)
    key = "name" if start is start_wandb else "run_name"
    assert first.settings[key] == f"{tmp_path.name}/a"


def test_the_users_options_and_environment_come_first(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment_trackers, "WandbRun", StandIn)
    monkeypatch.setattr(experiment_trackers, "MLFlowLogger", StandIn)
    assert start_wandb(tmp_path, CONFIG, {}).settings["mode"] == "offline"
    given = start_wandb(tmp_path, CONFIG, {"mode": "online", "project": "x"}).settings
    assert (given["mode"], given["project"]) == ("online", "x")
    monkeypatch.setenv("WANDB_MODE", "online")
    assert "mode" not in start_wandb(tmp_path, CONFIG, {}).settings
    own = start_mlflow(tmp_path, CONFIG, {}).settings["tracking_uri"]
    assert own == f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server")
    assert start_mlflow(tmp_path, CONFIG, {}).settings["tracking_uri"] == "http://server"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_mlflow_itself_has_one_run_with_all_steps(tmp_path):
    pytest.importorskip("mlflow", reason="needs mlflow: pip install -e '.[mlflow]'")
    for step, config in enumerate((CONFIG, LONGER)):
        logger = start_mlflow(tmp_path, config, {})
        logger.log_metrics({"train/loss": 0.5, "knn/top1": float("nan")}, step)
        logger.finalize("success")
    client = logger.experiment
    (run,) = client.search_runs([logger.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["method/temperature"] == "0.1"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [metric.step for metric in history] == [0, 1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logger_ids.json", "mlflow.db"]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_wandb_itself_goes_on_with_the_run_offline(tmp_path):
    wandb = pytest.importorskip("wandb", reason="needs wandb: pip install -e '.[wandb]'")
    ids = []
    for step, config in enumerate((CONFIG, LONGER)):
        logger = start_wandb(tmp_path, config, {})
        logger.log_metrics({"train/loss": 0.5}, step)
        ids.append(logger.experiment.id)
        assert dict(logger.experiment.config)["trainer"] == config["trainer"]
        logger.finalize("success")
        assert wandb.run is None  # the next training gets a run of its own
    assert ids[0] == ids[1] == json.loads((tmp_path / "logger_ids.json").read_text())["wandb"]
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{ids[0]}"))) == 2
