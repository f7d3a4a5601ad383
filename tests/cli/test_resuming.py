"""What a run says of the checkpoint that it goes on from: other images, another length or model."""

import json
import shlex
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image

from moco.callbacks.resumed_schedule import ResumedSchedule
from moco.cli.build_pretraining import build_method
from moco.cli.resuming import check_checkpoint
from moco.cli.training_run import Run
from moco.errors import InputError, Interrupted
from moco.runs.training_set import KEY, training_set
from moco.train import run
from tests.runs.test_resume import interrupt_at


def images_named(*numbers):
    names = [f"/pics/{number}.jpg" for number in numbers]
    return training_set(lambda: names, len(names), 8, "/pics")


def given(runner, tmp_path, overrides=(), *, now):
    """A run with these values. They are set afterwards, because composing takes long."""
    config = runner.config("data.batch_size=8", "trainer.max_epochs=4", "trainer.max_steps=-1")
    for override in overrides:
        keys, _, value = override.partition("=")
        *groups, key = keys.split(".")
        section = config
        for group in groups:
            section = getattr(section, group)
        setattr(section, key, yaml.safe_load(value))
    of_hydra = ["hydra.run.dir=a b", "hydra.mode=RUN"]
    typed = {"task": list(overrides), "hydra": of_hydra}
    files = {"hydra.yaml": yaml.safe_dump({"hydra": {"overrides": typed}})}
    return Run(config, tmp_path / "run", None, files, training_set=now)


def checked(run, then, path=None, **content):
    """Check a checkpoint after two epochs on `then`, of a run with the same config."""
    step = 2 * then.steps_per_epoch
    content = {
        "config": run.plain,
        "hyper_parameters": {},
        "global_step": step,
        "figures": {"epoch": 2, "step": step},
        KEY: then.as_plain_data(),
    } | content
    path = path or run.folder / "checkpoints" / "last.ckpt"
    settings = lambda config, hparams: {"method": config["method"]}  # noqa: E731
    return check_checkpoint(run, path, content, {}, settings)


def test_the_same_images_in_another_order_and_place_are_no_change(runner, tmp_path, caplog):
    here = given(runner, tmp_path, now=images_named(*range(32)))
    names = [f"/new/{number}.jpg" for number in reversed(range(32))]
    moved = training_set(lambda: names, 32, 8, "/new/")
    resumed = checked(here, moved)
    assert (resumed.step, resumed.has_own_figures, resumed.has_other_steps) == (8, True, False)
    assert not caplog.records


def test_other_images_with_as_many_steps_are_said(runner, tmp_path, caplog):
    here = given(runner, tmp_path, now=images_named(*range(34)))
    resumed = checked(here, images_named(*range(32)))
    assert (resumed.has_own_figures, resumed.has_other_steps) == (False, False)
    assert "the dataset has 34 images instead of 32 (2 more); the schedule stays" in caplog.text
    checked(here, images_named(*range(1, 35)))
    assert "as many images as before, 34, but not the same ones" in caplog.text


def test_another_number_of_steps_has_to_be_allowed(runner, tmp_path, caplog):
    then, now = images_named(*range(32)), images_named(*range(10))
    with pytest.raises(InputError) as error:
        checked(given(runner, tmp_path, now=now), then)
    assert "10 images instead of 32 (22 fewer), so that an epoch has 1 step instead of 4" in str(
        error.value
    )
    assert "resume_changed_data=true, and the schedule goes on at the same epoch, with 2 steps" in (
        str(error.value)
    )
    allowed = given(runner, tmp_path, ["resume_changed_data=true"], now=now)
    assert checked(allowed, then).has_other_steps
    # Whoever names another dataset knows of the change.
    other = given(runner, tmp_path, ["data.value_range=[0,16]"], now=now)
    config = given(runner, tmp_path, now=now).plain
    assert checked(other, then, tmp_path / "one.ckpt", config=config).has_other_steps
    # Old checkpoints say nothing of their images.
    old = given(runner, tmp_path, now=now)
    for item in (None, {}, {"num_images": "many"}):
        assert not checked(old, then, **{KEY: item}).has_other_steps


def test_an_epoch_that_has_become_too_short_is_refused(runner, tmp_path):
    here = given(runner, tmp_path, ["resume_changed_data=true"], now=images_named(*range(10)))
    loop = {"epoch_loop.batch_progress": {"current": {"processed": 3}}}
    inside = {"global_step": 11, "loops": {"fit_loop": loop}}
    with pytest.raises(InputError, match="of the middle of an epoch, after 3 steps of it"):
        checked(here, images_named(*range(32)), **inside)


def test_a_refused_checkpoint_comes_with_the_command_that_works(runner, tmp_path):
    there = given(runner, tmp_path, now=None).plain
    here = given(runner, tmp_path, ["method.embedding_dim=64", "seed=3"], now=None)
    path = tmp_path / "one.ckpt"
    with pytest.raises(InputError) as error:
        checked(here, images_named(1), path, config=there)
    command = str(error.value).partition(". This works: ")[2]
    assert shlex.split(command) == [
        *("python", "-m", "moco.train", "seed=3", "hydra.run.dir=a b"),
        "method.embedding_dim=128",
    ]


@pytest.fixture
def resumed_trainer():
    """A Trainer of four epochs after two, with what the schedule asks of it."""

    def trainer(steps_per_epoch, step, **changes):
        return SimpleNamespace(
            **{
                "num_training_batches": steps_per_epoch,
                "accumulate_grad_batches": 1,
                "estimated_stepping_batches": 4 * steps_per_epoch,
                "max_epochs": 4,
                "max_steps": -1,
                "current_epoch": 2,
                "global_step": step,
                "ckpt_path": "one.ckpt",
                **changes,
            }
        )

    return trainer


def resume_schedule(trainer, method, lr, max_epochs, **options):
    callback = ResumedSchedule(**options)
    content = {
        "optimizer_states": [{"param_groups": [{"lr": lr}]}],
        "config": {"trainer": {"max_epochs": max_epochs, "max_steps": -1}},
    }
    callback.on_load_checkpoint(trainer, method, content)
    # Lightning's property, which asks the Trainer's strategy.
    method._trainer = trainer
    callback.on_train_start(trainer, method)
    return callback


@pytest.fixture
def method(runner, monkeypatch):
    import dataclasses

    built = build_method(dataclasses.asdict(runner.config()))
    monkeypatch.setattr(type(built), "trainer", property(lambda module: module._trainer))
    return built


def test_a_longer_run_says_how_the_learning_rate_jumps(method, resumed_trainer, caplog):
    trainer = resumed_trainer(4, 8)
    resume_schedule(trainer, method, 1e-5, 2, has_other_steps=False, steps_in_epoch=0)
    after = method.learning_rate_at(8)
    assert f"trainer.max_epochs=4 instead of 2: {'the schedule is another one'}" in caplog.text
    assert f"jumps up from 1e-05 to {after:.3g} at step 9" in caplog.text
    assert "init_from=one.ckpt" in caplog.text


def test_a_schedule_that_does_not_jump_says_nothing(method, resumed_trainer, caplog):
    trainer = resumed_trainer(4, 8)
    resume_schedule(
        trainer,
        method,
        method.hparams["optimizer"]["lr"] / 2,
        4,
        has_other_steps=False,
        steps_in_epoch=0,
    )
    assert not caplog.records


def test_with_other_steps_the_schedule_goes_on_at_its_epoch_and_ends_with_the_run(
    method, resumed_trainer
):
    trainer = resumed_trainer(1, 8)
    callback = resume_schedule(trainer, method, 0.01, 4, has_other_steps=True, steps_in_epoch=0)
    lr = method.hparams["optimizer"]["lr"]
    assert method.learning_rate_at(8) == pytest.approx(lr / 2)
    assert method.learning_rate_at(10) == 0
    checkpoint = {}
    callback.on_save_checkpoint(trainer, method, checkpoint)
    assert checkpoint == {"schedule_offset": -6}


def write_images(folder, number):
    folder.mkdir(exist_ok=True)
    for index in range(number):
        Image.new("L", (8, 8), index).save(folder / f"{index}.png")


@pytest.mark.slow
def test_a_run_that_was_stopped_inside_an_epoch_goes_on_with_more_images(
    runner, tmp_path, monkeypatch, caplog
):
    config = runner.config("method.queue_size=16", "trainer.max_steps=-1", "trainer.max_epochs=2")
    config.data.name, config.data.root, config.data.batch_size = "images", str(tmp_path / "pics"), 8
    write_images(tmp_path / "pics", 32)
    with monkeypatch.context() as context:
        interrupt_at(1, context)
        with pytest.raises(Interrupted, match="in epoch 1, step 2;"):
            run(config, tmp_path / "run")
    write_images(tmp_path / "pics", 48)
    with pytest.raises(InputError, match="an epoch has 6 steps instead of 4"):
        run(config, tmp_path / "run")
    config.resume_changed_data = True
    run(config, tmp_path / "run")
    end = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert (end["global_step"], end[KEY]["num_images"]) == (12, 48)
    # The last step of a cosine over twelve steps.
    assert "with 10 steps left" in caplog.text
    lr = end["optimizer_states"][0]["param_groups"][0]["lr"]
    assert 0 < lr < 0.03 * end["hyper_parameters"]["optimizer"]["lr"]


@pytest.mark.slow
def test_figures_of_another_run_and_other_images_are_left_out(runner, tmp_path, caplog):
    two_steps = ["data.batch_size=240", "method.queue_size=240", "trainer.max_steps=2"]
    run(runner.config(*two_steps), tmp_path / "one")
    assert "knn/top1" in json.loads((tmp_path / "one" / "metrics.json").read_text())
    write_images(tmp_path / "pics", 16)
    config = runner.config(
        *two_steps, "trainer.max_steps=3", f"resume={tmp_path}/one/checkpoints/last.ckpt"
    )
    config.data.name, config.data.root, config.data.batch_size = "images", str(tmp_path / "pics"), 8
    run(config, tmp_path / "two")
    figures = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert figures["step"] == 3
    assert not [key for key in figures if key.startswith("knn")]
    assert "the dataset has 16 images instead of 1,437" in caplog.text
    content = torch.load(tmp_path / "two" / "checkpoints" / "last.ckpt", weights_only=True)
    assert content[KEY]["num_images"] == 16
