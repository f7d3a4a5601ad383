"""What TensorBoard finds in a run folder."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from moco.train import run
from moco.training.logger import RunLogger, given_keys, hyperparameters


def events_of(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    return events


def test_the_config_is_text_and_hyperparameters_of_the_run_itself(tmp_path):
    logger = RunLogger(tmp_path)
    config = {
        "seed": 3,
        "method": {"temperature": 0.1, "symmetric": True},
        "resume": None,
        "data": {"root": ["a", "b"]},
    }
    logger.describe(config, ["knn/top1"], ["method"], 0)
    logger.finalize("success")
    events = events_of(tmp_path)
    contents = events.PluginTagToContent("hparams")
    session = HParamsPluginData.FromString(
        contents["_hparams_/session_start_info"]
    ).session_start_info
    assert session.hparams["method.temperature"].number_value == 0.1
    assert session.hparams["data.root"].string_value == "['a', 'b']"
    experiment = HParamsPluginData.FromString(contents["_hparams_/experiment"]).experiment
    assert [metric.name.tag for metric in experiment.metric_infos] == ["knn/top1"]
    assert {info.name for info in experiment.hparam_infos if info.differs} == {
        "method.temperature",
        "method.symmetric",
    }
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "temperature: 0.1\n" in text
    assert events.Tags()["scalars"] == []  # no value of a metric was made up
    assert len(list(tmp_path.iterdir())) == 1


def test_hyperparameters_are_numbers_and_texts_under_dotted_names():
    assert hyperparameters({"a": {"b": {"c": 1}, "d": None}, "e": [1, 2], "f": False, "g": "x"}) == {
        "a.b.c": 1, "e": "[1, 2]", "f": "False", "g": "x",
    }  # fmt: skip


def test_keys_of_the_command_line_come_without_values_and_signs(tmp_path):
    assert given_keys(tmp_path) == []
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "overrides.yaml").write_text(
        "- +experiment=quickstart\n- method.temperature=0.1\n- method=moco_v2\n"
    )
    assert given_keys(tmp_path) == ["experiment", "method.temperature", "method"]


@pytest.mark.slow
def test_a_run_that_goes_on_writes_every_tag_once_for_a_step(runner, tmp_path):
    settings = [
        "data.batch_size=240",
        "data.image_size=8",
        "trainer.log_every_n_steps=1",
        "trainer.max_steps=-1",
        "evaluation.diagnostics_every_n_steps=1",
    ]
    images = "evaluation.plots_every_n_epochs=1", "evaluation.projector_images=5000"
    for epochs in (1, 2):
        run(runner.config(*settings, *images, f"trainer.max_epochs={epochs}"), tmp_path)
    events = events_of(tmp_path)
    tags = events.Tags()
    for tag in tags["scalars"]:
        steps = [event.step for event in events.Scalars(tag)]
        assert steps == sorted(set(steps)), tag
    assert [event.step for event in events.Scalars("label_free/rank_me")] == list(range(1, 11))
    assert [event.step for event in events.Images("knn/neighbors")] == [5, 10]
    assert [event.step for event in events.Images("views/query_above_key")] == [0, 5]
    assert [event.step for event in events.Tensors("config/text_summary")] == [0, 5]
    assert {"similarity/positive", "similarity/negative"} == set(tags["histograms"])
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        ".hydra",
        "00000",
        "checkpoints",
    ]
    assert (tmp_path / "projector_config.pbtxt").read_text().count("tensor_path") == 1


def test_the_event_file_of_a_summary_writer_is_public():
    """`RunLogger.describe` writes into it."""
    from torch.utils.tensorboard import FileWriter, SummaryWriter

    assert "file_writer" in SummaryWriter.__init__.__code__.co_names
    assert callable(FileWriter.add_summary)


def test_a_disk_error_while_a_scalar_is_written_stays_one(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    logger = RunLogger(tmp_path)
    monkeypatch.setattr(logger.experiment, "add_scalar", full)
    with pytest.raises(OSError, match="No space left"):
        logger.log_metrics({"train/loss": 0.1}, step=7)


def test_a_path_that_is_not_utf8_is_shown_with_escapes(tmp_path):
    logger = RunLogger(tmp_path)
    config = {"data": {"root": "caf\udce9"}}
    logger.describe(config, ["knn/top1"], ["data"], 0)
    logger.log_metrics({"segment/iou/caf\udce9": 0.5}, 1)
    logger.finalize("success")
    assert hyperparameters(config) == {"data.root": "caf\\udce9"}
    assert "segment/iou/caf\\udce9" in events_of(tmp_path).Tags()["scalars"]
