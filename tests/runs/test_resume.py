"""A run that is stopped at any step and started again ends in the same bits as one that was not."""

import json
import shutil
import signal

import pytest
import torch
import yaml

import moco
from moco.errors import InputError, Interrupted, RunError
from moco.methods.moco import MoCo
from moco.runs.run_folder import write_config
from moco.train import run
from tests.conftest import Runner

EPOCH = 5  # steps of 240 of the 1,437 digits


def small_config(runner, *overrides):
    return runner.config(
        "data.batch_size=240",
        "evaluation.every_n_epochs=100",
        "checkpoint.every_n_epochs=100",
        "method.queue_size=500",
        *overrides,
    )


@pytest.fixture
def small(runner):
    def config(*overrides):
        return small_config(runner, *overrides)

    return config


@pytest.fixture(scope="module")
def run_of_one_step(tmp_path_factory):
    """The folder of a run of one step, which is not to be changed."""
    folder = tmp_path_factory.mktemp("one step") / "run"
    run(small_config(Runner(folder.parent), "trainer.max_steps=1"), folder)
    return folder


@pytest.fixture
def one_step(run_of_one_step, tmp_path):
    """A copy of the folder of a run of one step."""
    return shutil.copytree(run_of_one_step, tmp_path / "one")


def interrupt_at(step, monkeypatch):
    """Send SIGINT after that optimizer step. The run sees it after its next step, or epoch."""
    sent = []

    def on_train_batch_end(self, *_):
        if self.trainer.global_step == step and not sent:
            sent.append(step)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(MoCo, "on_train_batch_end", on_train_batch_end)


def last(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same_end(one, other):
    assert one["global_step"] == other["global_step"]
    for name, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][name]), name
    for state, other_state in zip(
        *(end["optimizer_states"][0]["state"].values() for end in (one, other)), strict=True
    ):
        assert torch.equal(state["momentum_buffer"], other_state["momentum_buffer"])
    assert torch.equal(one["random_states"][0]["torch"], other["random_states"][0]["torch"])
    for key in ("epoch", "step", "train/loss", "knn/top1"):
        assert one["figures"][key] == other["figures"][key], key


BY_EPOCHS = ["trainer.max_epochs=3", "trainer.max_steps=-1"]
BY_STEPS = ["trainer.max_epochs=9", "trainer.max_steps=13"]


@pytest.mark.parametrize(
    ("length", "accumulate"),
    [
        (BY_STEPS, 3),
        pytest.param(BY_EPOCHS, 1, marks=pytest.mark.slow),
        pytest.param(BY_EPOCHS, 3, marks=pytest.mark.slow),
        pytest.param(BY_STEPS, 1, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_stopping_anywhere_changes_nothing(length, accumulate, small, tmp_path, monkeypatch):
    config = [*length, f"trainer.accumulate_grad_batches={accumulate}"]
    run(small(*config), tmp_path / "whole")
    # During an epoch's last step, in the middle of the next one, and after its last step.
    stops = [(EPOCH - 1, EPOCH), (EPOCH + 2, EPOCH + 3), (2 * EPOCH, 2 * EPOCH)]
    if accumulate == 3:  # the case of the fast suite takes one training less
        stops.pop()
    for step, stopped in stops:
        with monkeypatch.context() as context:
            interrupt_at(step, context)
            with pytest.raises(Interrupted, match=rf"step {stopped};"):
                run(small(*config), tmp_path / "parts")
    run(small(*config), tmp_path / "parts")
    assert_same_end(last(tmp_path / "whole"), last(tmp_path / "parts"))


@pytest.mark.slow
def test_augmentations_of_the_users_resume_with_other_loader_processes(
    small, tmp_path, monkeypatch
):
    augs = "tests.data.augment.my_augs"
    config = [
        "augmentation=custom",
        f"augmentation.query={{transforms: {augs}:build}}",
        f"augmentation.key={{random_resized_crop: {{scale: [0.2, 1]}}, fade: {{target: {augs}:Fade}}}}",
        "trainer.max_steps=7",
    ]
    run(small(*config, "data.num_workers=0"), tmp_path / "whole")
    with monkeypatch.context() as context:
        interrupt_at(2, context)
        with pytest.raises(Interrupted, match="step 3;"):
            run(small(*config, "data.num_workers=2"), tmp_path / "parts")
    run(small(*config, "data.num_workers=1"), tmp_path / "parts")
    assert_same_end(last(tmp_path / "whole"), last(tmp_path / "parts"))
    assert last(tmp_path / "parts")["config"]["augmentation"]["query"] == {
        "transforms": f"{augs}:build"
    }


@pytest.mark.slow
def test_a_run_that_goes_on_at_its_last_step_inside_its_first_epoch_leaves_all_its_files(
    small, tmp_path, monkeypatch
):
    with monkeypatch.context() as context:
        interrupt_at(1, context)
        with pytest.raises(Interrupted, match="in epoch 1, step 2;"):
            run(small("trainer.max_steps=9"), tmp_path)
    run(small("trainer.max_steps=2"), tmp_path)
    figures = json.loads((tmp_path / "metrics.json").read_text())
    assert (figures["epoch"], figures["step"]) == (0, 2)
    assert (tmp_path / "checkpoints" / "backbone.pth").is_file()
    run(small("trainer.max_steps=2"), tmp_path)


@pytest.mark.slow
def test_a_measurement_that_an_interrupt_cut_short_is_made_up_for(small, tmp_path, monkeypatch):
    import moco.callbacks.knn_monitor as module

    config = ["trainer.max_epochs=1", "trainer.max_steps=-1"]
    original = module.embed_together

    def interrupted_embed(*args):
        signal.raise_signal(signal.SIGINT)
        return original(*args)

    with monkeypatch.context() as context:
        context.setattr(module, "embed_together", interrupted_embed)
        with pytest.raises(Interrupted, match=f"step {EPOCH};"):
            run(small(*config), tmp_path)
    assert "knn/top1" not in last(tmp_path)["figures"]
    run(small(*config), tmp_path)
    figures = json.loads((tmp_path / "metrics.json").read_text())
    assert (figures["knn/epoch"], figures["step"]) == (1, EPOCH)
    assert last(tmp_path)["figures"]["knn/top1"] == figures["knn/top1"]
    assert last(tmp_path)["callbacks"]["KNNMonitor"] == {"owed": False}
    assert (tmp_path / "checkpoints" / "best.ckpt").is_file()


def test_a_checkpoint_with_weights_that_are_not_finite_is_not_written(small, one_step, monkeypatch):
    def on_train_batch_end(self, *_):
        torch.nn.init.constant_(self.query_encoder.projector.bias, float("nan"))

    monkeypatch.setattr(MoCo, "on_train_batch_end", on_train_batch_end)
    with pytest.raises(RunError, match=r"not finite.*the last good checkpoint is .*last\.ckpt"):
        run(small("trainer.max_steps=3"), one_step)
    assert last(one_step)["global_step"] == 1


@pytest.mark.slow
def test_predictor_every_queue_and_adamw_go_on_where_they_were(small, tmp_path):
    switches = [
        "method.symmetric=true",
        "method.num_queues=2",
        "method.dense_weight=0.5",
        "method.predictor.num_layers=2",
        "method.predictor.hidden_batch_norm=true",
        "optimizer=adamw",
        "optimizer.schedule=constant",
        "trainer.max_epochs=9",
        "data.batch_size=48",
    ]
    for folder, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        run(small(*switches, f"trainer.max_steps={steps}"), tmp_path / folder)
    whole, parts = (last(tmp_path / name) for name in ("whole", "parts"))
    assert {name.split(".")[0] for name in whole["state_dict"]} == {
        "query_encoder",
        "key_encoder",
        "predictor",
        "queue",
        "reverse_queue",
        "dense_queue",
        "reverse_dense_queue",
    }
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, parts["state_dict"][name]), name
    for one, other in zip(
        *(end["optimizer_states"][0]["state"].values() for end in (whole, parts)), strict=True
    ):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.slow
def test_a_checkpoint_with_other_tensors_is_named(small, run_of_one_step, tmp_path):
    checkpoint = run_of_one_step / "checkpoints" / "last.ckpt"
    for override, said in (
        ("method.embedding_dim=64", "method.embedding_dim: 128 there, 64 here"),
        ("method.predictor.num_layers=2", "method.predictor.num_layers: 0 there, 2 here"),
        ("method.dense_weight=0.5", "method.dense_weight: 0 there, above 0 here"),
        (
            "optimizer=adamw",
            "optimizer.decay_all: True there, False here; optimizer.name: sgd there, adamw here",
        ),
    ):
        with pytest.raises(InputError, match=f"another architecture or optimizer: {said}"):
            run(small(override, f"resume={checkpoint}"), tmp_path / "two")


def test_a_run_from_before_some_keys_existed_goes_on(small, one_step):
    checkpoint = last(one_step)
    stored = yaml.safe_load((one_step / ".hydra" / "config.yaml").read_text())
    for config in (stored, checkpoint["config"]):
        del config["method"]["num_queues"]
        del config["method"]["dense_weight"]
        del config["method"]["predictor"]
        del config["optimizer"]["decay_all"]
        del config["slurm"]
        del config["init_from"]
    write_config(one_step, stored)
    torch.save(checkpoint, one_step / "checkpoints" / "last.ckpt")
    message = r"configuration: method\.num_queues: 1 there, 2 here; method\.symmetric: "
    with pytest.raises(InputError, match=message):
        run(small("trainer.max_steps=2", "method.num_queues=2", "method.symmetric=true"), one_step)
    run(small("trainer.max_steps=2"), one_step)
    assert last(one_step)["global_step"] == 2


@pytest.mark.slow
def test_an_explicit_checkpoint_carries_a_run_into_a_new_folder_also_with_other_settings(
    small, one_step, tmp_path
):
    checkpoint = one_step / "checkpoints" / "last.ckpt"
    length = ["trainer.max_steps=-1", "trainer.max_epochs=2"]
    run(small(*length, "optimizer.lr=0.01", f"resume={checkpoint}"), tmp_path / "two")
    assert last(tmp_path / "two")["global_step"] == 2 * EPOCH


def test_the_readmes_python_lines_work(run_of_one_step):
    encoder = moco.load_encoder(run_of_one_step / "checkpoints" / "last.ckpt")
    images = torch.randn(2, 3, 16, 16)
    assert encoder.encode(images).shape == (2, 128)
    assert len(encoder.backbone.feature_maps(images)) == 4


@pytest.mark.slow
def test_a_best_checkpoint_that_a_crash_left_without_its_name_stays_the_best(small, tmp_path):
    length = ["trainer.max_steps=-1", "evaluation.every_n_epochs=1", "checkpoint.every_n_epochs=1"]
    run(small(*length, "trainer.max_epochs=1"), tmp_path)
    path = tmp_path / "checkpoints" / "last.ckpt"
    checkpoint = last(tmp_path)
    checkpoint["figures"] |= {"knn/top1": 0.9999, "knn/best_top1": 0.9999}
    checkpoint["callbacks"]["Checkpoints"]["best"] = 0.9999
    torch.save(checkpoint, path)
    (tmp_path / "checkpoints" / "best.ckpt").unlink()
    run(small(*length, "trainer.max_epochs=2"), tmp_path)
    best = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["global_step"] == checkpoint["global_step"]
    figures = json.loads((tmp_path / "metrics.json").read_text())
    assert (figures["knn/best_top1"], figures["knn/best_epoch"], figures["knn/epoch"]) == (
        0.9999,
        1,
        2,
    )
