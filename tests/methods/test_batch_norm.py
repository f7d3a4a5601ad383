"""BatchNorm modes: split BatchNorm against its closed form, and the choice of a mode."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from moco.cli.checks import check_batch_norm
from moco.errors import InputError
from moco.methods.batch_norm import (
    SplitBatchNorm,
    batch_norm_mode,
    in_batch_order,
    log_batch_norm,
    sorted_by_group,
    split_batch_norm,
)
from moco.models.encoder import BATCH_NORMS
from moco.models.heads import build_head

FORMS = {
    "interleaved": (False, "forward_interleaved"),
    "sorted": (True, "forward_sorted"),
    "interleaved, compiled": (False, "forward_compiled"),
    "sorted, compiled": (True, "forward_compiled"),
}


def split_output(split, form, images):
    """The output for a batch in its own order."""
    is_sorted, name = FORMS[form]
    if not is_sorted:
        return getattr(split, name)(images)
    outputs = getattr(split, name)(sorted_by_group(images, split.num_splits))
    return in_batch_order(outputs, split.num_splits)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm2d(3), (12, 3, 5, 5)),
        (nn.BatchNorm1d(3), (12, 3)),
        (nn.BatchNorm2d(3), (4, 3, 2, 2)),
    ],
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_split_equals_separate_batch_norms_on_every_nth_sample(layer, shape, form, memory_format):
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    separate = [copy.deepcopy(layer) for _ in range(4)]
    split = SplitBatchNorm(copy.deepcopy(layer), num_splits=4, is_sorted=FORMS[form][0])
    for _ in range(3):  # running statistics move each time
        images = torch.randn(*shape)
        if len(shape) == 4:
            images = images.to(memory_format=memory_format)
        leaf = images.clone().requires_grad_()
        reference_leaf = images.clone().requires_grad_()
        expected = torch.empty_like(images)
        for number, norm in enumerate(separate):
            norm.running_mean = split.running_mean.clone()
            norm.running_var = split.running_var.clone()
            expected[number::4] = norm(reference_leaf[number::4])
        output = split_output(split, form, leaf)
        torch.testing.assert_close(output, expected)
        weights = torch.randn_like(output)
        (output * weights).sum().backward()
        (expected * weights).sum().backward()
        torch.testing.assert_close(leaf.grad, reference_leaf.grad, rtol=1e-4, atol=1e-5)
        means = torch.stack([norm.running_mean for norm in separate])
        variances = torch.stack([norm.running_var for norm in separate])
        torch.testing.assert_close(split.running_mean, means.mean(dim=0))
        torch.testing.assert_close(split.running_var, variances.mean(dim=0))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(8, 3), (8, 3, 4, 4)])
def test_split_equals_the_closed_form(form, shape):
    """Sample i is normalised with mean and variance of the samples i mod 4, channel by channel."""
    split = SplitBatchNorm(nn.BatchNorm2d(3), num_splits=4, is_sorted=FORMS[form][0])
    images = torch.randn(shape)
    expected = torch.empty(shape)
    for group in range(4):
        for channel in range(3):
            own = images[group::4, channel]
            deviation = (own.var(correction=0) + 1e-5).sqrt()
            expected[group::4, channel] = (own - own.mean()) / deviation
    torch.testing.assert_close(split_output(split, form, images), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("settings", [{"affine": False}, {"momentum": 0.5}])
def test_all_forms_give_the_same_for_every_kind_of_layer(form, settings):
    images = torch.randn(8, 6, 5, 5)
    results = []
    for each in ("interleaved", form):
        split = SplitBatchNorm(nn.BatchNorm2d(6, **settings), 4, is_sorted=FORMS[each][0])
        results.append([split_output(split, each, images), *split.buffers()])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("momentum", [0.1, 0.5, 1.0])
def test_statistics_move_from_group_to_group_as_by_their_mean(momentum):
    norm = SplitBatchNorm(nn.BatchNorm2d(5, momentum=momentum), 8, is_sorted=True).double()
    norm.running_mean.normal_()
    start = norm.running_mean.clone()
    batch = torch.randn(16, 5, dtype=torch.float64)  # two images a group
    norm.train()(batch)
    of_groups = batch.unflatten(0, (8, 2)).mean(dim=1)
    torch.testing.assert_close(norm.running_mean, start.lerp(of_groups.mean(dim=0), momentum))


def test_the_compiled_form_keeps_float64():
    split = SplitBatchNorm(nn.BatchNorm2d(3).double(), 4)
    output = split.forward_compiled(torch.randn(8, 3, 4, 4, dtype=torch.float64))
    assert output.dtype == torch.float64


@pytest.mark.parametrize(
    ("is_sorted", "is_compiling", "expected"),
    [
        (False, False, "forward_interleaved"),
        (True, False, "forward_sorted"),
        (False, True, "forward_compiled"),
        (True, True, "forward_compiled"),
    ],
)
def test_the_form_follows_the_order_and_the_compiler(
    is_sorted, is_compiling, expected, monkeypatch
):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: is_compiling)
    monkeypatch.setattr(SplitBatchNorm, expected, lambda norm, images: "this one")
    split = SplitBatchNorm(nn.BatchNorm2d(3), 4, is_sorted)
    assert split(torch.randn(8, 3, 4, 4)) == "this one"


def test_evaluation_is_ordinary_batch_norm():
    norm = nn.BatchNorm2d(3)
    norm(torch.randn(8, 3, 4, 4))
    split, images = SplitBatchNorm(norm, 4).eval(), torch.randn(5, 3, 4, 4)
    torch.testing.assert_close(split(images), norm.eval()(images))


def test_converted_network_keeps_parameters_and_their_names():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4)))
    before, parameters = net.state_dict(), dict(net.named_parameters())
    split_batch_norm(net, 2)
    assert isinstance(net[1][0], SplitBatchNorm)
    assert net.state_dict().keys() == before.keys()
    assert all(parameter is parameters[name] for name, parameter in net.named_parameters())


def test_converted_network_copies_and_loads_like_any_other():
    net = nn.Sequential(nn.BatchNorm2d(4))
    split_batch_norm(net, 2)
    twin = copy.deepcopy(net)
    net(torch.randn(4, 4, 2, 2))
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin[0].running_mean, net[0].running_mean)


def test_batch_that_does_not_split_evenly_is_named():
    images = torch.randn(12, 3, 2, 2)
    expected = r"method\.batch_norm_splits=8 does not divide the 12 images"
    with pytest.raises(InputError, match=expected):
        SplitBatchNorm(nn.BatchNorm2d(3), 8)(images)
    with pytest.raises(InputError, match=expected):
        sorted_by_group(images, 8)


WITH, WITHOUT = nn.Sequential(nn.BatchNorm2d(3)), nn.Sequential(nn.LayerNorm(3))
IN_THE_HEAD = nn.Sequential(
    nn.LayerNorm(3), build_head(3, 2, hidden_batch_norm=True)
)  # as with MoBY's Swin


@pytest.mark.parametrize(
    ("mode", "encoder", "devices", "expected", "said"),
    [
        ("auto", WITHOUT, 1, "plain", "the encoder has none"),
        ("split", WITHOUT, 1, "plain", "the encoder has none"),
        ("sync", WITHOUT, 8, "plain", "the encoder has none"),
        ("auto", WITH, 1, "split", "split, so that it cannot leak"),
        ("auto", WITH, 8, "shuffle", "shuffle, so that it cannot leak"),
        ("auto", IN_THE_HEAD, 1, "split", "split, so that it cannot leak"),
        ("auto", IN_THE_HEAD, 8, "shuffle", "shuffle, so that it cannot leak"),
        ("shuffle", WITH, 1, "shuffle", "shuffle, which leaks the positive"),
        ("plain", WITH, 1, "plain", "plain, which leaks the positive"),
        ("split", WITH, 1, "split", "split, so that it cannot leak"),
        ("sync", IN_THE_HEAD, 1, "plain", "plain, which leaks the positive"),
        ("sync", IN_THE_HEAD, 8, "sync", "sync, which leaks the positive"),
    ],
)
def test_the_mode_is_chosen_and_logged(mode, encoder, devices, expected, said, caplog):
    caplog.set_level("INFO")
    chosen = batch_norm_mode(mode, encoder, devices, "cuda")
    assert chosen == expected
    log_batch_norm(chosen, encoder, devices)
    assert len(caplog.messages) == 1
    assert said in caplog.messages[0]


@pytest.mark.parametrize(
    ("mode", "devices", "device_type", "expected", "said"),
    [
        ("auto", 1, "cuda", "plain", "plain, so that all keys of a batch have the same statistics"),
        ("auto", 8, "cuda", "sync", "sync, so that all keys"),
        ("auto", 2, "cpu", "plain", "a query can recognise the keys of its own device"),
        ("sync", 1, "cpu", "plain", "plain, so that all keys"),
        ("sync", 8, "cuda", "sync", "sync, so that all keys"),
        ("shuffle", 2, "cpu", "shuffle", "shuffle, so that all keys"),
    ],
)
def test_negatives_of_the_batch_have_modes_of_their_own(
    mode, devices, device_type, expected, said, caplog
):
    caplog.set_level("INFO")
    chosen = batch_norm_mode(mode, WITH, devices, device_type, negatives="batch")
    assert chosen == expected
    log_batch_norm(chosen, WITH, devices, negatives="batch")
    assert len(caplog.messages) == 1
    assert said in caplog.messages[0]


@pytest.mark.parametrize("negatives", ["batch", "queue"])
def test_sync_on_several_cpu_processes_is_refused_before_the_run_begins(negatives, runner):
    config = runner.config(
        "method.batch_norm=sync", "trainer.devices=2", f"method.negatives={negatives}",
        *(["method.queue_size=null"] if negatives == "batch" else []),
    )  # fmt: skip
    with pytest.raises(
        InputError,
        match=r"^method\.batch_norm=sync: statistics are shared between GPUs only, [^\n]*2 CPU",
    ):
        check_batch_norm(runner.method(config).query_encoder, config)


@pytest.mark.parametrize(
    ("settings", "who"),
    [
        (["data.batch_size=8"], r"each of method\.batch_norm_splits=8 groups"),
        (
            ["data.batch_size=2", "trainer.accumulate_grad_batches=2", "method.batch_norm=plain"],
            "a device",
        ),
    ],
)
def test_a_vector_alone_is_refused_before_the_run_begins(settings, who, runner):
    config = runner.config(
        "method.projector.hidden_batch_norm=true", "method.projector.num_layers=2", *settings
    )
    with pytest.raises(
        InputError,
        match=rf"^data\.batch_size=\d: {who} gets 1 image at once, which has no variance",
    ):
        check_batch_norm(runner.method(config).query_encoder, config)
    without = runner.config(*settings)
    check_batch_norm(runner.method(without).query_encoder, without)


def test_sync_makes_every_batch_norm_one_over_all_devices_and_keeps_the_parameters(runner):
    heads = [f"method.{head}.hidden_batch_norm=true" for head in ("projector", "predictor")]
    method = runner.method(
        runner.config("method=moby", "method.num_queues=1", *heads, "method.batch_norm=sync")
    )
    names, parameters = method.state_dict().keys(), dict(method.named_parameters())
    gpu = SimpleNamespace(root_device=torch.device("cuda"))
    method._trainer = SimpleNamespace(world_size=2, strategy=gpu)
    method.setup("fit")
    assert method.batch_norm == "sync"
    for module in (method.query_encoder, method.key_encoder, method.predictor):
        layers = [layer for layer in module.modules() if isinstance(layer, BATCH_NORMS)]
        assert layers
        assert all(isinstance(layer, nn.SyncBatchNorm) for layer in layers)
    assert method.state_dict().keys() == names
    assert all(parameter is parameters[name] for name, parameter in method.named_parameters())
