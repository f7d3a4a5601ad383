import math
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from moco.errors import InputError
from moco.extras import install_command
from moco.training.optimizers import build_optimizer, without_decay
from moco.training.schedules import learning_rate_at, scaled_to_batch


def official(epoch, epochs, lr=0.06):
    """adjust_learning_rate of the official CIFAR notebook, epochs counted from 1."""
    return lr * 0.5 * (1.0 + math.cos(math.pi * epoch / epochs))


@pytest.mark.parametrize("epoch", [1, 2, 100, 199, 200])
def test_cosine_by_epoch_equals_the_official_notebook(epoch):
    step = (epoch - 1) * 97 + 50
    ours = learning_rate_at(
        step,
        200 * 97,
        97,
        lr=0.06,
        schedule="cosine",
        schedule_interval="epoch",
        schedule_offset_epochs=1,
    )
    assert ours == pytest.approx(official(epoch, 200), abs=1e-12)


def test_cosine_by_step_goes_from_lr_to_zero():
    rates = [learning_rate_at(step, 100, 10, lr=1.0, schedule="cosine") for step in (0, 50, 100)]
    assert rates == pytest.approx([1.0, 0.5, 0.0])


@pytest.mark.parametrize("epoch", [0, 1, 120, 199])
def test_cosine_by_epoch_equals_the_official_main_program(epoch):
    """The learning rate of --cos in facebookresearch/moco's main_moco.py, epochs counted from 0."""
    ours = learning_rate_at(
        epoch * 50 + 49, 200 * 50, 50, lr=0.03, schedule="cosine", schedule_interval="epoch"
    )
    assert ours == pytest.approx(official(epoch, 200, lr=0.03), abs=1e-12)


@pytest.mark.parametrize("step", [0, 1, 499, 500, 501, 2_750, 4_999])
def test_warmup_and_cosine_by_step_equal_moco_v3s(step):
    """The official main_moco.py, which counts epochs in fractions: 10 of 100 to warm up."""
    epoch = step / 50
    expected = 4.8 * epoch / 10 if epoch < 10 else official(epoch - 10, 90, lr=4.8)
    ours = learning_rate_at(step, 5_000, 50, lr=4.8, schedule="cosine", warmup_epochs=10)
    assert ours == pytest.approx(expected, abs=1e-12)


def test_step_schedule_drops_at_its_milestones():
    rates = [
        learning_rate_at(
            epoch * 5,
            1000,
            5,
            lr=0.03,
            schedule="step",
            schedule_interval="epoch",
            milestones=[120, 160],
        )
        for epoch in (0, 119, 120, 159, 160, 199)
    ]
    assert rates == pytest.approx([0.03, 0.03, 0.003, 0.003, 0.0003, 0.0003])


def test_warmup_is_linear_from_zero_and_the_cosine_starts_after_it():
    rates = [
        learning_rate_at(step, 110, 10, lr=1.0, schedule="cosine", warmup_epochs=1)
        for step in (0, 5, 10, 60, 110)
    ]
    assert rates == pytest.approx([0.0, 0.5, 1.0, 0.5, 0.0])


def test_constant_schedule_stays():
    assert learning_rate_at(77, 100, 10, lr=0.3, schedule="constant") == 0.3


def test_warmup_and_cosine_have_their_own_ends():
    rates = [
        learning_rate_at(
            step,
            110,
            10,
            lr=1.0,
            schedule="cosine",
            warmup_epochs=1,
            warmup_start_lr=0.2,
            final_lr=0.1,
        )
        for step in (0, 5, 10, 60, 110)
    ]
    assert rates == pytest.approx([0.2, 0.6, 1.0, 0.55, 0.1])


def test_mobys_schedule_differs_from_the_official_one_by_as_much_as_its_file_says():
    """There the cosine counts from the first step, so that it has begun when the warm-up ends."""
    epochs, differences = 300, []
    for epoch in range(5, epochs + 1):
        theirs = 5e-6 + (1e-3 - 5e-6) * (1 + math.cos(math.pi * epoch / epochs)) / 2
        ours = learning_rate_at(
            epoch * 10, epochs * 10, 10, lr=1e-3, schedule="cosine", warmup_epochs=5, final_lr=5e-6
        )
        differences.append((ours - theirs) / 1e-3)
    assert min(differences) > -1e-12
    assert 0.015 < max(differences) < 0.0155


class Body(nn.Module):
    no_weight_decay_keywords = ("scale", "table")

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.table = nn.Parameter(torch.randn(2, 2))
        self.mlp_scale = nn.Linear(2, 2)
        self.frozen = nn.Parameter(torch.randn(3, 3), requires_grad=False)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = Body()
        self.table = nn.Parameter(
            torch.randn(5, 5)
        )  # the keyword is the body's, so this is decayed


SETTINGS = {"lr": 0.1, "weight_decay": 0.2, "schedule": "cosine"}


def names_in(optimizer, model):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        (group["weight_decay"], [names[id(p)] for p in group["params"]])
        for group in optimizer.param_groups
    ]


def test_decay_of_everything_is_one_group_of_all_that_is_trained():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2).requires_grad_(False))
    (group,) = names_in(build_optimizer(model, name="sgd", **SETTINGS), model)
    assert group == (0.2, ["0.weight", "0.bias", "1.weight", "1.bias"])


def test_what_names_its_exceptions_is_spared_even_then():
    model = nn.Sequential(Body(), nn.Linear(2, 2))
    decayed, spared = names_in(
        build_optimizer(model, name="sgd", decay_all=True, **SETTINGS), model
    )
    assert decayed == (0.2, ["0.linear.weight", "1.weight", "1.bias"])
    assert (spared[0], len(spared[1])) == (0.0, 6)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_norms_biases_and_what_the_module_names_are_spared(name):
    model = Model()
    decayed, spared = names_in(
        build_optimizer(model, name=name, decay_all=False, **SETTINGS), model
    )
    assert decayed == (0.2, ["table", "body.linear.weight"])
    assert spared[0] == 0.0
    assert set(spared[1]) == {
        "body.table",
        "body.linear.bias",
        "body.norm.weight",
        "body.norm.bias",
        "body.mlp_scale.weight",
        "body.mlp_scale.bias",
    }


def test_without_norms_there_is_no_empty_group():
    (group,) = build_optimizer(
        nn.Linear(2, 2, bias=False), name="adamw", decay_all=False, **SETTINGS
    ).param_groups
    assert group["weight_decay"] == 0.2


def test_swins_position_biases_are_spared():
    from moco.models.backbones import build_backbone

    for name, words in (
        ("swin_v2_t", ("cpb_mlp", "logit_scale")),
        ("swin_t", ("relative_position_bias_table",)),
    ):
        with torch.device("meta"):
            net = build_backbone(name)
        spared = without_decay(net)
        expected = {
            path
            for path, parameter in net.named_parameters()
            if parameter.ndim == 1 or any(word in path for word in words)
        }
        assert spared == expected
        assert all(any(word in path for path in spared) for word in (*words, "norm", "bias"))


def test_adamw_equals_its_published_algorithm():
    """Algorithm 2 of arXiv 1711.05101, on one number."""
    module = nn.Linear(1, 1, bias=False)
    weight, mean, square = module.weight.item(), 0.0, 0.0
    optimizer = build_optimizer(
        module,
        name="adamw",
        lr=0.1,
        weight_decay=0.2,
        beta1=0.8,
        beta2=0.95,
        eps=1e-3,
        schedule="constant",
    )
    for step in range(1, 6):
        gradient = math.sin(step)
        module.weight.grad = torch.tensor([[gradient]])
        optimizer.step()
        mean = 0.8 * mean + 0.2 * gradient
        square = 0.95 * square + 0.05 * gradient**2
        adaptive = mean / (1 - 0.8**step) / (math.sqrt(square / (1 - 0.95**step)) + 1e-3)
        weight -= 0.1 * adaptive + 0.1 * 0.2 * weight
        assert module.weight.item() == pytest.approx(weight, rel=1e-5)


def take_steps(module, optimizer, steps):
    """With gradients that are the step's own, and lie as the weights do."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in module.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            parameter.grad = torch.empty_like(parameter).copy_(values)
        optimizer.step()


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("before", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("after", [torch.contiguous_format, torch.channels_last])
def test_a_state_of_pytorchs_usual_optimizers_is_gone_on_from_in_any_memory_format(
    name, before, after, tmp_path
):
    """Early runs had such optimizers and contiguous weights; PyTorch's own continue exactly."""
    kind = {"sgd": partial(torch.optim.SGD, momentum=0.9), "adamw": torch.optim.AdamW}[name]
    straight, resumed = (
        nn.Sequential(nn.Conv2d(3, 5, 3), nn.Linear(4, 3)).to(memory_format=before)
        for _ in range(2)
    )
    usual = kind(straight.parameters(), lr=0.1, weight_decay=0.2, foreach=False)
    take_steps(straight, usual, range(3))
    torch.save([straight.state_dict(), usual.state_dict()], tmp_path / "state.pt")
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(weights)
    resumed.to(memory_format=after)
    ours = build_optimizer(resumed, name=name, **SETTINGS)
    ours.load_state_dict(state)
    take_steps(straight, usual, range(3, 6))
    take_steps(resumed, ours, range(3, 6))
    assert all(group["fused"] for group in ours.param_groups)
    for mine, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("bad", [{0}, {1, 2}, {0, 1, 3}])
def test_steps_left_out_by_the_kernel_are_as_if_they_had_not_been(name, bad):
    """From the first on; as `BadSteps` does on a GPU."""
    ours, expected = Mixed(), Mixed()
    ours.load_state_dict(expected.state_dict())
    optimizers = [build_optimizer(module, name=name, **SETTINGS) for module in (ours, expected)]
    for step in range(5):
        optimizers[0].found_inf = torch.tensor(float(step in bad))
        take_steps(ours, optimizers[0], [step])
        if step not in bad:
            take_steps(expected, optimizers[1], [step])
    assert all(map(torch.equal, ours.parameters(), expected.parameters()))


def test_learning_rates_are_scaled_to_the_batch():
    given = {
        "lr": 1e-3,
        "final_lr": 5e-6,
        "warmup_start_lr": 5e-7,
        "lr_for_batch_size": 512,
        "weight_decay": 0.05,
    }
    scaled = scaled_to_batch(given, 128)
    assert scaled == {
        "lr": 2.5e-4,
        "final_lr": 1.25e-6,
        "warmup_start_lr": 1.25e-7,
        "lr_for_batch_size": None,
        "weight_decay": 0.05,
    }
    assert scaled_to_batch(scaled, 64) == scaled


def lars_by_loop(weights, gradients, lr, momentum, decay, eta, clip=False, moco_v3=False):
    """Return LARS (arXiv 1708.03888, section 4) with PyTorch's momentum; vectors take SGD.

    Args:
        moco_v3: the denominator of MoCo v3's official code, the norm of gradient plus decay.
    """
    speeds = [np.zeros_like(weight) for weight in weights]
    for of_step in gradients:
        for weight, gradient, speed in zip(weights, of_step, speeds, strict=True):
            step, rate = gradient, lr
            if weight.ndim > 1:
                size = math.sqrt(sum(value**2 for value in weight.flat))
                slope = math.sqrt(sum(value**2 for value in gradient.flat))
                step = gradient + decay * weight
                whole = (
                    math.sqrt(sum(value**2 for value in step.flat))
                    if moco_v3
                    else slope + decay * size
                )
                trust = eta * size / whole if size > 0 and slope > 0 else 1.0
                rate = min(lr, trust) if clip else lr * trust
            speed *= momentum
            speed += step * rate / lr
            weight -= lr * speed
    return weights


class Mixed(nn.Module):
    """A matrix, a convolution, a layer that starts at zero, and parameters of one dimension."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 3))
        self.bias = nn.Parameter(torch.randn(4))
        self.convolution = nn.Parameter(10 * torch.randn(2, 3, 3, 3))
        self.zero = nn.Parameter(torch.zeros(2, 2))
        self.scale = nn.Parameter(torch.ones(5))


def stepped(num_steps, **settings):
    """Return parameters after steps of LARS, those before, and each step's gradients."""
    module = Mixed().double()
    before = [parameter.detach().numpy().copy() for parameter in module.parameters()]
    optimizer = build_optimizer(module, name="lars", schedule="constant", **settings)
    gradients = []
    for _ in range(num_steps):
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter)
        gradients.append([parameter.grad.numpy().copy() for parameter in module.parameters()])
        optimizer.step()
    return [parameter.detach().numpy() for parameter in module.parameters()], before, gradients


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("trust_clip", [False, True])
def test_lars_equals_its_published_formula(weight_decay, trust_clip):
    pytest.importorskip("timm")
    settings = {
        "lr": 0.2,
        "weight_decay": weight_decay,
        "trust_coefficient": 0.1,
        "trust_clip": trust_clip,
    }
    after, before, gradients = stepped(4, **settings)
    expected = lars_by_loop(before, gradients, 0.2, 0.9, weight_decay, eta=0.1, clip=trust_clip)
    for ours, theirs in zip(after, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-7, atol=1e-9)


def test_lars_at_moco_v3s_weight_decay_is_the_official_codes_to_a_ten_thousandth():
    """The denominators differ by at most twice the decay's share, here 1.5e-6 * 70 / 7."""
    pytest.importorskip("timm")
    after, start, gradients = stepped(5, lr=4.8, weight_decay=1.5e-6)
    expected = lars_by_loop(
        [weight.copy() for weight in start], gradients, 4.8, 0.9, 1.5e-6, eta=1e-3, moco_v3=True
    )
    for ours, theirs, before in zip(after, expected, start, strict=True):
        assert abs(ours - theirs).max() <= 1e-4 * abs(theirs - before).max()


def official_lars_step(weight, gradient, lr, decay, eta):
    """Return the first step of MoCo v3's official code on a matrix."""
    step = gradient + decay * weight
    norm = np.linalg.norm(step)
    ratio = eta * np.linalg.norm(weight) / norm if np.linalg.norm(weight) > 0 and norm > 0 else 1.0
    return lr * ratio * step


@pytest.mark.parametrize(
    ("weight_decay", "gradient", "ours", "official"),
    [
        (1e-6, 0.0, 0.6 * 1e-6, 0.6 * 1e-3),  # shares of the weights: decay alone here, eta there
        (1e-6, 1e-3, 0.6 * 1e-3, 0.6 * 1e-3),
        (0.0, 0.0, 0.0, 0.0),
        (0.0, 1e-3, 0.6 * 1e-3, 0.6 * 1e-3),
    ],
)
def test_lars_decays_a_layer_without_gradient_less_than_moco_v3s_code(
    weight_decay, gradient, ours, official
):
    """See docs/methods.md; `gradient` and the steps are in units of the weights."""
    pytest.importorskip("timm")
    module = nn.Linear(4, 3, bias=False).double()
    before = module.weight.detach().numpy().copy()
    module.weight.grad = gradient * module.weight.detach()
    build_optimizer(
        module, name="lars", lr=0.6, weight_decay=weight_decay, schedule="constant"
    ).step()
    np.testing.assert_allclose(
        before - module.weight.detach().numpy(), ours * before, rtol=1e-3, atol=1e-15
    )
    there = official_lars_step(before, gradient * before, 0.6, weight_decay, 1e-3)
    np.testing.assert_allclose(there, official * before, rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("decay_all", [False, True])
def test_lars_spares_what_has_one_dimension_whatever_else_is_decayed(decay_all):
    pytest.importorskip("timm")
    model = Model()
    optimizer = build_optimizer(model, name="lars", decay_all=decay_all, **SETTINGS)
    (decayed, adapted), (spared, plain) = (
        (group["weight_decay"], group["always_adapt"]) for group in optimizer.param_groups
    )
    assert (decayed, adapted, spared, plain) == (0.2, True, 0.0, False)
    assert names_in(optimizer, model)[0][1] == ["table", "body.linear.weight"]


def test_lars_goes_on_from_its_state_in_a_file_to_the_same_bits(tmp_path):
    pytest.importorskip("timm")

    def take_steps(module, optimizer, steps):
        for step in steps:
            torch.manual_seed(step)
            for parameter in module.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()

    settings = {"name": "lars", "lr": 0.2, "weight_decay": 1e-6, "schedule": "constant"}
    straight, resumed = Mixed(), Mixed()
    optimizer = build_optimizer(straight, **settings)
    take_steps(straight, optimizer, range(2))
    torch.save([straight.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(weights)
    again = build_optimizer(resumed, **settings)
    again.load_state_dict(state)
    take_steps(straight, optimizer, range(2, 4))
    take_steps(resumed, again, range(2, 4))
    assert all(map(torch.equal, straight.parameters(), resumed.parameters()))


def test_lars_sees_the_gradients_as_they_were_clipped(runner):
    pytest.importorskip("timm")
    import pytorch_lightning as pl

    norms = []

    class Steps(pl.Callback):
        def on_fit_start(self, trainer, pl_module):
            optimizer = trainer.optimizers[
                0
            ]  # its step begins with the backward pass, so the norm is taken after it
            optimizer.register_step_post_hook(lambda *_: norms.append(total_norm(optimizer)))

    def total_norm(optimizer):
        gradients = [
            parameter.grad for group in optimizer.param_groups for parameter in group["params"]
        ]
        return float(
            torch.linalg.vector_norm(torch.stack([gradient.norm() for gradient in gradients]))
        )

    config = runner.config(
        "optimizer=lars",
        "optimizer.warmup_epochs=0",
        "trainer.gradient_clip_val=0.05",
        "method.queue_start=random",
    )
    method = runner.fit(config, [Steps()])
    assert norms == pytest.approx([0.05] * 3, rel=1e-4)
    assert all(parameter.isfinite().all() for parameter in method.parameters())


def test_lars_without_timm_says_what_to_install(runner, monkeypatch, tmp_path):
    from moco.train import run

    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError) as error:
        run(
            runner.config("optimizer=lars", "data.name=nowhere"), tmp_path
        )  # before the data are looked at
    assert str(error.value) == f"optimizer.name=lars needs timm: {install_command('lars')}"
