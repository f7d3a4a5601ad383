import copy
from functools import partial
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
from moco.models.heads import build_head


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm2d(3), (12, 3, 5, 5)),
        (nn.BatchNorm1d(3), (12, 3)),
        (nn.BatchNorm2d(3), (4, 3, 2, 2)),
    ],
)
@pytest.mark.parametrize(
    ("in_blocks", "way"),
    [
        (False, "of_all"),
        (False, "by_formula"),
        (True, "by_formula"),
        (True, "of_blocks"),
        (True, "of_blocks_in_place"),
    ],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_split_equals_separate_batch_norms_on_every_nth_sample(
    layer, shape, in_blocks, way, memory_format, monkeypatch
):
    monkeypatch.setattr(SplitBatchNorm, "way", lambda norm, device_type: getattr(norm, way))
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    separate = [copy.deepcopy(layer) for _ in range(4)]
    split = SplitBatchNorm(copy.deepcopy(layer), num_splits=4, in_blocks=in_blocks)
    for _ in range(3):  # running statistics move each time
        images = torch.randn(*shape)
        if len(shape) == 4:
            images = images.to(memory_format=memory_format)
        leaf, reference_leaf = images.clone().requires_grad_(), images.clone().requires_grad_()
        expected = torch.empty_like(images)
        for number, norm in enumerate(separate):
            norm.running_mean, norm.running_var = (
                split.running_mean.clone(),
                split.running_var.clone(),
            )
            expected[number::4] = norm(reference_leaf[number::4])
        output = in_batch_order(split(sorted_by_group(leaf, 4)), 4) if in_blocks else split(leaf)
        torch.testing.assert_close(output, expected)
        weights = torch.randn_like(output)
        (output * weights).sum().backward()
        (expected * weights).sum().backward()
        torch.testing.assert_close(leaf.grad, reference_leaf.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            split.running_mean, torch.stack([n.running_mean for n in separate]).mean(0)
        )
        torch.testing.assert_close(
            split.running_var, torch.stack([n.running_var for n in separate]).mean(0)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind", [{}, {"affine": False}, {"track_running_stats": False}, {"momentum": 0.5}]
)
@pytest.mark.parametrize("is_trained", [True, False])
def test_blocks_in_place_are_the_blocks_joined_to_the_last_bit(dtype, kind, is_trained):
    norm = nn.BatchNorm2d(6, **kind).requires_grad_(is_trained)
    images = torch.randn(8, 6, 5, 5).to(dtype, memory_format=torch.channels_last)
    weights, results = torch.randn(8, 6, 5, 5).to(dtype), []
    for way in ("of_blocks", "of_blocks_in_place"):
        split = SplitBatchNorm(copy.deepcopy(norm), num_splits=4, in_blocks=True)
        split.way = lambda device_type, split=split, way=way: getattr(split, way)
        leaf = images.clone().requires_grad_()
        output = split(leaf)
        (output * weights).sum().backward()
        assert output.is_contiguous(memory_format=torch.channels_last)
        results.append([output.detach(), leaf.grad, *split.buffers()])
        results[-1] += [parameter.grad for parameter in split.parameters() if is_trained]
    assert all(torch.equal(*pair) for pair in zip(*[result[:2] for result in results], strict=True))
    torch.testing.assert_close(*results)  # sums of parameters' gradients in another order


@pytest.mark.parametrize("momentum", [None, 0.1, 0.5, 1.0])
def test_momenta_from_group_to_group_move_as_one_does_by_the_mean(momentum):
    norm, start = (
        SplitBatchNorm(nn.BatchNorm2d(3, momentum=momentum), 8),
        torch.randn(5, dtype=torch.float64),
    )
    groups, moved = torch.randn(8, 5, dtype=torch.float64), start.clone()
    for group, own in zip(groups, norm.momenta(), strict=True):
        moved.lerp_(group, own)
    torch.testing.assert_close(moved, start.lerp(groups.mean(dim=0), momentum or 0.0))


def test_the_formula_takes_float64():
    norm = nn.BatchNorm2d(3).double()
    images = torch.randn(8, 3, 4, 4, dtype=torch.float64)
    results = []
    for way in ("by_formula", "of_all"):
        split = SplitBatchNorm(copy.deepcopy(norm), 4)
        results.append([getattr(split, way)(images), split.running_mean, split.running_var])
    torch.testing.assert_close(*results)


def test_each_device_has_its_way(monkeypatch):
    usual, sorted_by_groups = (
        SplitBatchNorm(nn.BatchNorm2d(3), 4, in_blocks) for in_blocks in (False, True)
    )
    assert {usual.way("cpu"), usual.way("cuda")} == {usual.of_all}
    assert sorted_by_groups.way("cpu") == sorted_by_groups.of_blocks_in_place
    assert sorted_by_groups.way("cuda") == sorted_by_groups.of_blocks
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert usual.way("cuda") == usual.by_formula
    assert sorted_by_groups.way("cuda") == sorted_by_groups.by_formula


@pytest.mark.parametrize("in_blocks", [False, True])
def test_a_group_with_one_value_of_a_channel_is_named(in_blocks):
    split = SplitBatchNorm(nn.BatchNorm1d(3), num_splits=4, in_blocks=in_blocks)
    with pytest.raises(
        InputError,
        match=r"batch_norm_splits=4: a group is 1 of the 4 images.*larger data.batch_size",
    ):
        split(torch.randn(4, 3))


def test_split_works_on_channels_last_images():
    norm, images = nn.BatchNorm2d(3), torch.randn(8, 3, 4, 4)
    split, same = (SplitBatchNorm(copy.deepcopy(norm), 4) for _ in range(2))
    torch.testing.assert_close(split(images.to(memory_format=torch.channels_last)), same(images))


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
    for broken in (SplitBatchNorm(nn.BatchNorm2d(3), 8), partial(sorted_by_group, splits=8)):
        with pytest.raises(
            InputError, match=r"method\.batch_norm_splits=8 does not divide the 12 images"
        ):
            broken(torch.randn(12, 3, 2, 2))


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
        ("shuffle", WITH, 1, "shuffle", "prevents nothing on one device"),
        ("plain", WITH, 1, "plain", "plain, which leaks the positive"),
        ("split", WITH, 1, "split", "split, so that it cannot leak"),
        ("sync", IN_THE_HEAD, 1, "plain", "plain, which leaks the positive"),
        ("sync", IN_THE_HEAD, 8, "sync", "sync, which leaks the positive"),
    ],
)
def test_the_mode_in_force_is_chosen_and_said(mode, encoder, devices, expected, said, caplog):
    caplog.set_level("INFO")
    in_force = batch_norm_mode(mode, encoder, devices, "cuda")
    assert in_force == expected
    log_batch_norm(in_force, encoder, devices)
    assert len(caplog.messages) == 1
    assert said in caplog.messages[0]


@pytest.mark.parametrize(
    ("mode", "devices", "device_type", "expected", "said"),
    [
        ("auto", 1, "cuda", "plain", "plain, with which the keys of a batch cannot be told apart"),
        ("auto", 8, "cuda", "sync", "sync, with which the keys"),
        ("auto", 2, "cpu", "plain", "tells a query the keys of its own device"),
        ("sync", 1, "cpu", "plain", "plain, with which the keys"),
        ("sync", 8, "cuda", "sync", "sync, with which the keys"),
        ("shuffle", 2, "cpu", "shuffle", "shuffle, with which the keys"),
    ],
)
def test_negatives_of_the_batch_have_modes_of_their_own(
    mode, devices, device_type, expected, said, caplog
):
    caplog.set_level("INFO")
    in_force = batch_norm_mode(mode, WITH, devices, device_type, negatives="batch")
    assert in_force == expected
    log_batch_norm(in_force, WITH, devices, negatives="batch")
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
        layers = [
            layer
            for layer in module.modules()
            if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        ]
        assert layers
        assert all(isinstance(layer, nn.SyncBatchNorm) for layer in layers)
    assert method.state_dict().keys() == names
    assert all(parameter is parameters[name] for name, parameter in method.named_parameters())
