"""The programs end to end, as processes, the way a user runs them."""

import json
import os

import pytest

from moco.training.board_layout import tag_of
from tests.conftest import run_program

SMALL = [
    "+experiment=quickstart",
    "method.queue_size=200",
    "data.batch_size=64",
    "evaluation.every_n_epochs=1",
    "evaluation.baselines=false",
    "checkpoint.every_n_epochs=1",
    "evaluation.projector_images=0",
]


def train(folder, *arguments, cwd):
    return run_program("moco.train", *SMALL, f"hydra.run.dir={folder}", *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two epochs."""
    cwd = tmp_path_factory.mktemp("finished")
    done = train("run", "trainer.max_epochs=2", "evaluation.baselines=true", cwd=cwd)
    assert done.returncode == 0, done.stderr
    return cwd, done


def test_a_run_leaves_its_folder_as_promised(finished):
    cwd, _ = finished
    run = cwd / "run"
    assert {".hydra", "checkpoints", "metrics.json"} <= set(os.listdir(run))
    assert set(os.listdir(run / ".hydra")) == {
        "config.yaml",
        "hydra.yaml",
        "lock",
        "overrides.yaml",
    }
    assert set(os.listdir(run / "checkpoints")) == {
        "last.ckpt",
        "previous.ckpt",
        "best.ckpt",
        "backbone.pth",
    }
    assert len(list(run.glob("events.out.tfevents*"))) == 1
    figures = json.loads((run / "metrics.json").read_text())
    assert (figures["epoch"], figures["step"]) == (2, 44)
    assert {
        "knn/top1",
        "knn/top5",
        "train/loss",
        "images_per_second",
        "knn/num_neighbors",
        "knn/temperature",
    } <= set(figures)
    assert (figures["knn/feature"], figures["knn/bank_size"]) == ("backbone", 1437)


def test_the_closing_table_shows_three_knn_figures_and_the_next_command(finished):
    _, done = finished
    for line in ("raw pixels", "untrained backbone", "pretrained backbone", "k 5, T 0.1"):
        assert line in done.stdout
    assert "next: python -m moco.evaluate checkpoint=run/checkpoints/last.ckpt" in done.stdout
    assert "batch norm: split" in done.stdout
    assert "WARNING method.queue_size=200 is more than a tenth of the 1437 images" in done.stdout
    assert "weights_only" not in done.stdout  # Lightning would log a default at every checkpoint
    assert done.stderr == ""


def test_tensorboard_holds_scalars_and_the_view_pairs(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished[0] / "run"))
    events.Reload()
    names = (
        "train/loss", "train/loss_of_chance", "train/learning_rate", "train/key_momentum", "knn/top1", "data_wait",
        "images_per_second", "label_free/embedding_std", "label_free/positive_similarity", "contrast/top1",
        "label_free/negative_similarity", "label_free/queue_fill", "contrast/top5",
    )  # fmt: skip
    assert set(map(tag_of, names)) <= set(events.Tags()["scalars"])
    groups = {tag.split("/")[0] for tag in events.Tags()["scalars"]}
    assert groups <= {"1_main", "2_health", "3_time", "4_debug"}
    plots = ("views/query_above_key", "knn/neighbors", "knn/confusion")
    assert set(events.Tags()["images"]) == set(map(tag_of, plots))


def test_the_parts_of_an_epochs_time_add_up_to_it(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished[0] / "run"))
    events.Reload()
    names = ("steps", "data_wait", "monitors", "checkpoints", "logging")
    parts = {name: events.Scalars(tag_of(f"time/{name}")) for name in names}
    first, second = parts["steps"][:2]
    assert (first.step, second.step) == (22, 44)
    seconds = {tag: laps[1].value for tag, laps in parts.items()}
    assert sum(seconds.values()) == pytest.approx(
        second.wall_time - first.wall_time, rel=0.1, abs=0.2
    )
    assert all(seconds[name] > 0 for name in ("steps", "monitors", "checkpoints", "logging"))
    assert "time of its epochs" in finished[1].stdout
    assert "kNN and other monitors" in finished[1].stdout


def test_evaluate_repeats_the_monitors_figure_to_the_last_digit(finished):
    cwd, _ = finished
    done = run_program(
        "moco.evaluate",
        "checkpoint=run/checkpoints/last.ckpt",
        "data=digits",
        "evaluation.plots=false",
        "evaluation.label_free=false",
        "output=x.json",
        cwd=cwd,
    )
    assert done.returncode == 0, done.stderr
    figures, trained = (
        json.loads((cwd / name).read_text()) for name in ("x.json", "run/metrics.json")
    )
    for key in (
        "knn/top1",
        "knn/top5",
        "knn/num_neighbors",
        "knn/temperature",
        "knn/feature",
        "knn/bank_size",
        "step",
    ):
        assert figures[key] == trained[key]
    assert f"{figures['knn/top1']:.4f}" in done.stdout
    assert "key" not in figures["knn/encoder"]


def test_evaluate_takes_another_protocol_and_the_key_encoder(finished):
    from moco.config.data import EvaluateDataConfig
    from moco.config.pretrained import EvaluateConfig, EvaluationConfig
    from moco.evaluate import run

    cwd, _ = finished
    settings = EvaluationConfig(
        encoder="key",
        num_neighbors=5,
        temperature=0.5,
        feature="embedding",
        plots=False,
        label_free=False,
    )
    output = cwd / "key.json"
    checkpoint = str(cwd / "run/checkpoints/best.ckpt")
    config = EvaluateConfig(checkpoint, EvaluateDataConfig(), settings, "cpu", str(output))
    run(config, cwd)
    figures = json.loads(output.read_text())
    assert (figures["knn/encoder"], figures["knn/num_neighbors"], figures["knn/temperature"]) == (
        "key",
        5,
        0.5,
    )
    assert figures["knn/feature"] == "embedding"


def test_a_finished_run_started_again_is_done_at_once_and_longer_goes_on(finished):
    cwd, _ = finished
    again = train("run", "trainer.max_epochs=3", "evaluation.baselines=true", cwd=cwd)
    assert again.returncode == 0, again.stderr
    assert "going on from" in again.stdout
    assert "epoch    3/3" in again.stdout
    assert "epoch    2/3" not in again.stdout
    assert json.loads((cwd / "run" / "metrics.json").read_text())["step"] == 66


def test_a_folder_with_another_configuration_is_left_alone(finished):
    cwd, _ = finished
    before = (cwd / "run" / ".hydra" / "config.yaml").read_text()
    done = train("run", "method.temperature=0.5", "evaluation.baselines=true", cwd=cwd)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "another configuration: method.temperature: 0.1 there, 0.5 here" in done.stderr
    assert (cwd / "run" / ".hydra" / "config.yaml").read_text() == before


@pytest.mark.slow
def test_a_sweep_gives_each_job_its_folder_and_a_bad_job_does_not_end_it(tmp_path):
    done = run_program(
        "moco.train", "-m", *SMALL, "trainer.max_steps=2", "method.temperature=0.1,-1,0.2", "hydra.sweep.dir=sweep",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.strip() == "error: method.temperature=-1.0: expected a number above 0"
    assert (tmp_path / "sweep" / "method.temperature-0.1" / "metrics.json").is_file()
    assert (tmp_path / "sweep" / "method.temperature-0.2" / "metrics.json").is_file()


def test_evaluate_names_what_it_cannot_read(tmp_path):
    done = run_program("moco.evaluate", "checkpoint=none.ckpt", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "error: checkpoint=none.ckpt: no such file\n")
    done = run_program("moco.evaluate", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        "error: checkpoint: missing; give checkpoint=VALUE\n",
    )
