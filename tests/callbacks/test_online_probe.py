"""The classifier that learns beside the encoder: it leaves the run alone, and learns."""

import pytest
import torch

from moco.callbacks.online_probe import OnlineProbe, training_classes
from moco.data.sources.source import ArrayImages, DataSource, Labelled
from moco.errors import InputError, Interrupted
from moco.train import run
from moco.training.hardware_fit import HardwareFit
from tests.runs.test_resume import assert_same_end, interrupt_at, last


@pytest.mark.parametrize("overrides", [[], ["method.dense_weight=0.5"], ["method.symmetric=true"]])
@pytest.mark.slow
def test_the_runs_weights_are_those_of_a_run_without_the_probe(overrides, runner):
    config = runner.config(*overrides)
    with_probe = runner.fit(config, [OnlineProbe({}, 1)])
    after_it = torch.rand(3)
    without = runner.fit(config)
    assert torch.equal(after_it, torch.rand(3))  # and so are the random numbers that come next
    for name, value in without.state_dict().items():
        assert torch.equal(value, with_probe.state_dict()[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [[], ["method.symmetric=true"]])
def test_it_learns_the_same_beside_compiled_nets(overrides, runner):
    config, accuracies, weights = runner.config(*overrides, "method.batch_norm=plain"), [], []
    for is_compiled in (False, True):
        figures = {}
        fit = HardwareFit(torch.device("cpu"), "32-true", "contiguous", is_compiled)
        probe = OnlineProbe(figures, 1)
        method = runner.fit(config, [fit, probe])
        assert fit.way["compiled"] == ("yes" if is_compiled else "no")
        accuracies.append(probe._accuracy())
        weights.append((method.state_dict(), probe.head.state_dict()))
    assert accuracies[1] == pytest.approx(accuracies[0], abs=0.02)
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-3, atol=1e-3)


class Shown(OnlineProbe):
    """Keeps the accuracy of each epoch."""

    def on_train_epoch_end(self, trainer, pl_module):
        super().on_train_epoch_end(trainer, pl_module)
        self.shown = [*getattr(self, "shown", []), self.figures["probe/top1"]]


@pytest.mark.slow
def test_it_learns(runner):
    figures = {}
    probe = Shown(figures, 10, lr=0.01)
    runner.fit(runner.config("trainer.max_steps=-1", "trainer.max_epochs=2"), [probe])
    first, second = probe.shown
    assert 0.18 < first < second  # of ten classes, the first guesses included
    assert second > 0.25
    assert (figures["probe/top1"], figures["probe/epoch"]) == (second, 2)


def test_a_step_is_the_gradient_of_softmax_regression_by_hand():
    probe = OnlineProbe({}, 1)
    probe.head = torch.nn.Linear(3, 2)
    torch.nn.init.zeros_(probe.head.weight)
    torch.nn.init.zeros_(probe.head.bias)
    probe.optimizer = torch.optim.SGD(probe.head.parameters(), 1.0)
    feature, classes = torch.randn(5, 3), torch.tensor([0, 1, 1, -1, 0])
    probe._learn(feature, classes)
    rows = (feature - feature.mean(0)) / feature.std(0, correction=0)
    signs = torch.tensor([0.5, -0.5, -0.5, 0, 0.5])  # one-hot minus one half, of class 0
    torch.testing.assert_close(
        probe.head.weight.detach()[0], (signs[:, None] * rows).sum(0) / 4, rtol=1e-3, atol=1e-4
    )
    # Of equal logits the first class is taken.
    assert (float(probe.right), float(probe.seen)) == (2, 4)


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_the_probe(runner, tmp_path, monkeypatch):
    config = runner.config(
        "data.batch_size=240", "data.image_size=8", "evaluation.every_n_epochs=100", "method.queue_size=500", "evaluation.online_probe=true",
        "trainer.max_steps=7",
    )  # fmt: skip
    run(config, tmp_path / "straight")
    interrupt_at(2, monkeypatch)
    with pytest.raises(Interrupted):
        run(config, tmp_path / "stopped")
    run(config, tmp_path / "stopped")
    straight, resumed = last(tmp_path / "straight"), last(tmp_path / "stopped")
    assert_same_end(straight, resumed)
    assert straight["figures"]["probe/top1"] == resumed["figures"]["probe/top1"]
    probes = [end["callbacks"]["OnlineProbe"] for end in (straight, resumed)]
    for name, value in probes[0]["head"].items():
        assert value.any()
        assert torch.equal(value, probes[1]["head"][name])


def test_images_without_labels_are_refused(runner, image_tree):
    config = runner.config(
        "data=images", f"data.root={image_tree}", "data.batch_size=8", "data.num_workers=0"
    )
    with pytest.raises(
        InputError, match=r"^evaluation.online_probe=true: the training images have no labels$"
    ):
        runner.fit(config, [OnlineProbe({}, 1)])


def test_labels_belong_to_the_images_that_are_trained_on(generator):
    def images(what, rows):
        return ArrayImages(generator.integers(0, 256, (rows, 4, 4), "uint8"), what)

    class Renamed(ArrayImages):
        def name(self, index):
            return f"all[{index + 2}]"

    everything = images("all", 6)
    bank = Labelled(Renamed(everything.tensor[2:5].numpy(), "all"), torch.tensor([7, 5, 6]).numpy())
    assert training_classes(DataSource(everything, bank, None, 4)).tolist() == [-1, -1, 7, 5, 6, -1]
    same = Labelled(everything, torch.arange(6).numpy())
    assert training_classes(DataSource(everything, same, None, 4)).tolist() == [0, 1, 2, 3, 4, 5]
