"""The commands that a program names when it ends: those that were typed, with changes."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig

from moco.cli.run_names import register_resolvers
from moco.cli.typed_command import after_evaluation, typed_command
from moco.config.parsing import CONFIG_DIR, register_schemas
from moco.config.pretrained import EvaluateConfig, EvaluationConfig


@pytest.fixture
def typed(monkeypatch):
    """Pretends that these overrides were typed."""
    register_schemas()
    register_resolvers()

    def call(program, *overrides):
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            config = compose(program, list(overrides), return_hydra_config=True)
        running = object.__new__(HydraConfig)  # its class would return the one of this process
        running.set_config(config)
        monkeypatch.setattr(HydraConfig, "instance", lambda: running)

    return call


def test_a_command_keeps_what_was_typed_and_can_be_pasted(typed):
    assert typed_command("train") == "python -m moco.train"
    typed("train", 'data.root="a b"', "trainer.max_epochs=6", "hydra.run.dir=x")
    command = typed_command("train", {"hydra.run.dir"}, ["hydra.run.dir=runs/here"])
    assert command == (
        "python -m moco.train 'data.root=\"a b\"' trainer.max_epochs=6 hydra.run.dir=runs/here"
    )


def test_after_an_evaluation_the_commands_are_of_the_same_checkpoint_and_images(typed):
    config = EvaluateConfig("runs/a", evaluation=EvaluationConfig("knn"))
    assert after_evaluation(config, ["knn/top1"]) == []  # from Python
    given = ["checkpoint=runs/a", "data=npz", "data.root=x.npz", "evaluation.num_neighbors=5"]
    typed("evaluate", *given, "output=y.json", "preview.bands=[1]", "hydra.run.dir=z")
    start = "checkpoint=runs/a data=npz data.root=x.npz"
    embed = f"python -m moco.embed {start} output=features.npz"
    assert after_evaluation(config, ["knn/top1"]) == [
        f"python -m moco.evaluate {start} evaluation=linear",
        embed,
    ]
    assert after_evaluation(config, ["knn/top1", "knn/mean_average_precision"]) == [embed]
    config.evaluation.name = "linear"
    assert after_evaluation(config, ["linear/top1"]) == [
        "python -m moco.export checkpoint=runs/a format=safetensors"
    ]
    typed("evaluate", "checkpoint=null", "backbone=resnet18", "data=digits")
    assert after_evaluation(EvaluateConfig(None), []) == [
        "python -m moco.train backbone=resnet18 data=digits"
    ]
