"""What is decided by the hardware, and that it changes nothing but rounding."""

import ctypes
import dataclasses
import math
import sys
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from moco.callbacks.bad_steps import BadSteps
from moco.callbacks.collapse_watch import CollapseWatch
from moco.callbacks.label_free_monitor import LabelFreeMonitor
from moco.callbacks.training_monitor import TrainingMonitor
from moco.data.loading.workers import loader_options
from moco.errors import InputError
from moco.models.backbones import build_backbone
from moco.training import hardware_fit
from moco.training.hardware import choose_device, choose_memory_format, choose_precision
from moco.training.hardware_fit import HardwareFit
from moco.training.trainer import build_trainer
from scripts.gpu_parts.waiting_operations import WAITING_OPERATIONS
from tests.methods.test_moco import Losses
from tests.processes import run_to_end

CPU = torch.device("cpu")
PLAIN = ["method.batch_norm=plain", "method.queue_start=random", "optimizer.lr=0.06"]


@pytest.mark.parametrize(
    ("reported", "expected"),
    [
        ({"avx2": True}, "32-true"),
        ({"avx512_f": True, "avx512_bf16": True}, "32-true"),  # a Xeon without AMX
        ({"avx512_bf16": True, "amx_tile": True, "amx_bf16": True}, "bf16-mixed"),
        ({"avx512_bf16": True, "sse4a": True}, "bf16-mixed"),  # AMD's
        ({"avx512_bf16": False, "sse4a": True}, "32-true"),
        ({"neon": True, "bf16": True}, "bf16-mixed"),
        ({"neon": True, "bf16": False}, "32-true"),
    ],
)
def test_the_precision_of_a_cpu_is_decided_by_the_instructions_that_it_reports(
    reported, expected, monkeypatch
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: reported)
    assert choose_precision("auto", CPU) == expected
    assert choose_precision("16-mixed", CPU) == "16-mixed"


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_more_gpus_than_there_are_is_one_line(two_gpus):
    assert choose_device("auto", 2).type == "cuda"
    with pytest.raises(
        InputError, match=r"^trainer\.devices=3: GPUs that can be used on this machine: 2$"
    ):
        choose_device("gpu", 3)
    assert choose_device("cpu", 3).type == "cpu"


def test_apples_gpus_are_refused_in_one_line_and_never_chosen(monkeypatch, runner, tmp_path):
    with pytest.raises(
        InputError,
        match=r"^accelerator=mps: Apple's GPUs are not supported, since they have no float64",
    ):
        choose_device("mps")
    monkeypatch.setattr(
        "lightning_fabric.accelerators.mps.MPSAccelerator.is_available", lambda: True
    )
    monkeypatch.setattr(
        "pytorch_lightning.accelerators.mps.MPSAccelerator.is_available", lambda: True
    )
    settings = dataclasses.asdict(runner.config("trainer.accelerator=auto").trainer)
    assert build_trainer(settings, tmp_path, [], []).strategy.root_device.type == "cpu"


def test_batches_are_pinned_for_cuda_alone(two_gpus):
    assert loader_options(0, CPU)["pin_memory"] is False
    assert loader_options(0, torch.device("cuda", 1))["pin_memory"] is True


def test_this_cpu_reports_what_is_asked_for():
    reported = torch.cpu.get_capabilities()
    assert {"amx_bf16", "avx512_bf16", "sse4a"} <= reported.keys() or "bf16" in reported
    assert choose_precision("auto", CPU) in ("32-true", "bf16-mixed")


@pytest.mark.parametrize(
    ("backbone", "expected"),
    [
        ("resnet18", "channels_last"),
        ("resnet50", "channels_last"),
        ("resnet_tiny", "channels_last"),
        ("swin_v2_t", "contiguous"),
        ("swin_t", "contiguous"),
        ("vit_small", "contiguous"),
    ],
)
def test_nets_of_convolutions_are_channels_last_and_others_are_left_as_they_are(backbone, expected):
    with torch.device("meta"):
        net = build_backbone(backbone)
    assert choose_memory_format("auto", net) == expected
    assert choose_memory_format("channels_last", net) == "channels_last"
    assert choose_memory_format("contiguous", net) == "contiguous"


def strides(module):
    convolutions = [layer.weight for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    return {weight.is_contiguous(memory_format=torch.channels_last) for weight in convolutions}


class Maps(pl.Callback):
    """Whether the maps of the last stage were channels_last."""

    def __init__(self):
        self.seen = []

    def on_train_start(self, trainer, pl_module):
        for encoder in (pl_module.query_encoder, pl_module.key_encoder):
            encoder.backbone.layer4.register_forward_hook(
                lambda module, inputs, output: self.seen.append(
                    output.is_contiguous(memory_format=torch.channels_last)
                )
            )


@pytest.fixture
def double(monkeypatch):
    """Compute in float64, where another order of sums changes nothing within a few steps."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr("moco.training.trainer.choose_precision", lambda *_: "64-true")


@pytest.mark.slow
def test_channels_last_goes_through_both_encoders_and_changes_the_losses_by_rounding_only(
    runner, double
):
    maps, losses = Maps(), [Losses(), Losses()]
    config = runner.config(
        *PLAIN, "data.image_size=32"
    )  # where the last maps have more than one cell
    fit = HardwareFit(CPU, "64-true", "auto", False)
    method = runner.fit(config, [fit, maps, losses[0]], precision="64-true")
    runner.fit(config, [losses[1]], precision="64-true")
    assert losses[0].values == pytest.approx(losses[1].values, rel=1e-9)
    assert maps.seen == [True] * 6
    assert strides(method.query_encoder) == strides(method.key_encoder) == {True}


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [False, True])
def test_split_batch_norm_has_the_same_groups_in_either_layout(symmetric, runner, double):
    losses = [Losses(), Losses()]
    split = [
        "method.batch_norm=split",
        "data.image_size=32",
        f"method.symmetric={symmetric}",
        *PLAIN[1:],
    ]
    config = runner.config(*split, "trainer.memory_format=auto")
    fit = HardwareFit(CPU, "64-true", "auto", False)
    method = runner.fit(config, [fit, losses[0]], precision="64-true")
    assert (fit.way["memory_format"], method.sorts_by_group) == ("channels_last", True)
    method = runner.fit(config, [losses[1]], precision="64-true")
    assert not method.sorts_by_group
    assert losses[0].values == pytest.approx(losses[1].values, rel=1e-9)


def test_the_contiguous_layout_keeps_the_recorded_losses(runner):
    from tests.methods.test_moco import RECORDED

    losses, fit = Losses(), HardwareFit(CPU, "32-true", "contiguous", False)
    runner.fit(runner.config("method.queue_start=random", "optimizer.lr=0.06"), [fit, losses])
    assert losses.values == pytest.approx(RECORDED, rel=1e-3)


def test_the_log_says_in_one_line_how_the_run_computes(runner, caplog):
    caplog.set_level("INFO")
    runner.fit(
        runner.config(*PLAIN, "trainer.max_steps=1"), [HardwareFit(CPU, "32-true", "auto", False)]
    )
    lines = [
        record.getMessage() for record in caplog.records if record.name == hardware_fit.__name__
    ]
    assert lines == [
        "device: CPU, 1 thread; precision: 32-true; memory format: channels_last; compiled: no"
    ]


@pytest.mark.slow
def test_a_resume_where_the_hardware_decides_otherwise_goes_on_and_says_so(
    runner, tmp_path, monkeypatch, caplog
):
    from moco.train import run

    def config(max_steps):
        # At a low learning rate and in one step more, what is rounded otherwise does not grow into
        # another result.
        settings = [
            "optimizer.schedule=constant",
            "optimizer.lr=1e-3",
            "data.batch_size=96",
            f"trainer.max_steps={max_steps}",
        ]
        return runner.config(
            *PLAIN[:2], *settings, "trainer.memory_format=auto", "trainer.precision=32-true"
        )

    def decide(memory_format):
        monkeypatch.setattr(hardware_fit, "choose_memory_format", lambda *_: memory_format)

    def state(name):
        return torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)

    decide("contiguous")
    run(config(4), tmp_path / "straight")
    run(config(3), tmp_path / "resumed")
    halfway = state("resumed")["state_dict"]
    assert "the run began" not in caplog.text
    decide("channels_last")
    run(config(4), tmp_path / "resumed")
    assert (
        "trainer.memory_format: the run began with 'contiguous' and goes on with 'channels_last'"
        in caplog.text
    )
    resumed, straight = state("resumed"), state("straight")
    assert resumed["callbacks"]["HardwareFit"] == {
        "precision": "32-true",
        "memory_format": "contiguous",
        "compiled": "no",
    }
    for name, parameter in runner.method(config(4)).named_parameters():
        if name.startswith("query_encoder") and parameter.ndim == 4:
            theirs, ours = straight["state_dict"][name], resumed["state_dict"][name]
            assert ours.is_contiguous(memory_format=torch.channels_last)
            assert (ours - theirs).norm() < 0.02 * (theirs - halfway[name]).norm(), name


@pytest.mark.slow
def test_bf16_trains_on_a_cpu_with_the_loss_and_statistics_in_fp32(runner):
    losses, fp32 = Losses(), Losses()
    method = runner.fit(runner.config(*PLAIN), [losses], precision="bf16-mixed")
    runner.fit(runner.config(*PLAIN), [fp32])
    assert losses.values == pytest.approx(fp32.values, rel=0.02)
    assert losses.values != fp32.values
    assert {value.dtype for value in method.state_dict().values()} == {torch.float32, torch.int64}
    assert all(math.isfinite(value) for value in losses.values)


class Waits(TorchDispatchMode):
    """Notes the operations for which the host would wait if they ran on a GPU."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in WAITING_OPERATIONS:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


class InSteps(pl.Callback):
    """What the steps made the host wait for, of each from its batch to the end of its callbacks."""

    def __init__(self, waits):
        self.waits, self.of_steps = waits, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.waits.seen.clear()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.of_steps.append(list(self.waits.seen))


@pytest.mark.parametrize(
    "settings",
    [
        ["method.queue_start=empty"],
        pytest.param(
            ["optimizer=adamw", "optimizer.lr_for_batch_size=null", "trainer.gradient_clip_val=1"],
            marks=pytest.mark.slow,
        ),
        ["method.symmetric=true", "method.dense_weight=0.5"],
        pytest.param(["method.negatives=batch", "method.queue_size=null"], marks=pytest.mark.slow),
    ],
    ids=["queue that fills up", "adamw, clipped", "symmetric, dense", "batch"],
)
def test_between_logged_steps_nothing_waits_for_the_device(settings, runner, monkeypatch):
    monkeypatch.setattr(
        "moco.callbacks.bad_steps.is_decided_on_device", lambda optimizer, norm: True
    )  # as on a GPU
    config = runner.config("trainer.log_every_n_steps=3", "trainer.max_steps=4", *settings)
    with Waits() as waits:
        steps = InSteps(waits)
        monitors = [
            TrainingMonitor({}, 3),
            BadSteps({}, 10, 3, lambda: ""),
            CollapseWatch(),
            LabelFreeMonitor(100),
        ]
        runner.fit(config, [*monitors, steps])
    assert [bool(seen) for seen in steps.of_steps] == [False, False, True, False]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_itself_finds_no_wait_between_logged_steps(runner):
    class Strict(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            torch.cuda.set_sync_debug_mode("error" if 0 < batch_idx < 4 else "default")

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            torch.cuda.set_sync_debug_mode("default")

    config = runner.config(
        "trainer.accelerator=cuda", "trainer.log_every_n_steps=5", "trainer.max_steps=6"
    )
    runner.fit(
        config, [TrainingMonitor({}, 5), BadSteps({}, 10, 5, lambda: ""), CollapseWatch(), Strict()]
    )


@pytest.mark.slow
def test_without_a_compiler_the_nets_run_as_they_are_and_one_line_says_why(
    runner, monkeypatch, caplog
):
    def fail(*args, **kwargs):
        raise torch._dynamo.exc.BackendCompilerFailed(
            lambda: None, RuntimeError("no g++ here\nsecond line"), None
        )

    caplog.set_level("INFO")
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: fail)
    losses, expected = Losses(), Losses()
    runner.fit(runner.config(*PLAIN), [HardwareFit(CPU, "32-true", "contiguous", True), losses])
    runner.fit(runner.config(*PLAIN), [expected])
    assert losses.values == expected.values
    (line,) = [
        record.getMessage() for record in caplog.records if record.name == hardware_fit.__name__
    ]
    assert line.count("\n") == 0
    assert "; compiled: no, torch.compile fails (" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["method.dense_weight=0.5", "method.symmetric=true"],
        ["method.batch_norm=split"],
        ["method.batch_norm=split", "trainer.memory_format=channels_last"],
    ],
)
def test_compiled_nets_have_the_same_losses_names_and_evaluation(settings, runner):
    losses, expected = Losses(), Losses()
    memory_format = (
        "channels_last" if "trainer.memory_format=channels_last" in settings else "contiguous"
    )
    fit = HardwareFit(CPU, "32-true", memory_format, True)
    assert hardware_fit.obstacle_to_compiling(CPU) is None
    # At a low learning rate what is rounded otherwise does not grow into another result.
    config = runner.config(*PLAIN, "optimizer.lr=1e-3", *settings)
    method = runner.fit(config, [fit, losses])
    plain = runner.fit(config, [expected])
    assert losses.values == pytest.approx(expected.values, rel=1e-4)
    assert method.state_dict().keys() == plain.state_dict().keys()
    torch._dynamo.utils.counters.clear()
    images = torch.randn(5, 3, 16, 16)
    method.eval().query_encoder.encode(images)
    method.query_encoder.encode(images, "embedding")
    assert not torch._dynamo.utils.counters["frames"]  # evaluation compiles nothing


@pytest.mark.slow
def test_every_size_of_a_long_ramp_is_compiled(runner, monkeypatch):
    compile_module, seen = nn.Module.compile, []

    def backend(graph, inputs):
        seen.append(graph)
        return graph

    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **_: compile_module(self, dynamic=False, backend=backend)
    )
    monkeypatch.setattr(torch.compiler.config, "fail_on_recompile_limit_hit", True)
    sizes = [
        "augmentation.start_image_size=4",
        "augmentation.image_size_step=2",
        "augmentation.ramp_epochs=6",
    ]
    config = runner.config(
        *PLAIN, *sizes, "trainer.max_steps=-1", "trainer.max_epochs=7", "data.batch_size=256"
    )
    steps = Losses()
    runner.fit(config, [HardwareFit(CPU, "32-true", "auto", True), steps])
    assert len(steps.values) >= 7  # 4, 6, 8, 10, 12, 14 and 16 px
    assert len(seen) >= 2 * 7


@pytest.mark.slow
def test_files_of_channels_last_weights_give_the_features_of_the_run_and_are_exported(
    runner, tmp_path
):
    from moco.config.pretrained import ExportConfig
    from moco.export import run as export
    from moco.train import run
    from moco.weights.load_encoder import load_pretrained

    config = runner.config(*PLAIN, "trainer.max_steps=2", "trainer.memory_format=auto")
    run(config, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    method = runner.method(config).to(memory_format=torch.channels_last)
    method.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    images = torch.randn(3, 3, 16, 16)
    for file in (path, path.with_name("backbone.pth")):
        encoder = load_pretrained(str(file), "query", {}).encoder
        assert strides(encoder.backbone) == {True}
        assert torch.equal(encoder.encode(images), method.query_encoder.eval().encode(images))
    export(
        ExportConfig(str(path), "safetensors", str(tmp_path / "x.safetensors")), tmp_path / "export"
    )
    assert (tmp_path / "x.safetensors").is_file()


def test_segmentation_does_not_compile_and_says_so(tmp_path):
    from moco.config.segment import SegmentConfig
    from moco.errors import InputError
    from moco.segment import run

    for key in ("compile", "cuda_graphs"):
        config = SegmentConfig()
        config.trainer = dataclasses.replace(config.trainer, **{key: True})
        with pytest.raises(
            InputError, match=rf"trainer\.{key}=true: moco\.segment does not compile"
        ):
            run(config, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="no glibc")
def test_freed_memory_is_used_again():
    program = """
import resource
import numpy as np
from moco.training.hardware import keep_freed_memory

def faults(num_mib):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(num_mib << 20, np.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
print(faults(200), faults(200), faults(150))
"""
    done = run_to_end(sys.executable, "-c", program)
    assert done.returncode == 0, done.stderr
    first, *others = map(int, done.stdout.split())
    assert first > 50
    assert max(others) < first / 10


class Compiled(nn.Module):
    """Takes down with which options it is told to compile."""

    options = None

    def __init__(self, layer, has_one_view_per_encoder):
        super().__init__()
        self.layer = layer
        self.has_one_view_per_encoder = has_one_view_per_encoder

    def compile_encoders(self, options):
        self.options = options


@pytest.mark.parametrize(
    ("device", "compile", "settings", "way"),
    [
        ("cuda", None, {}, "yes, with CUDA graphs"),
        ("cuda", True, {}, "yes, with CUDA graphs"),
        ("cuda", False, {}, "no"),
        ("cuda", None, {"cuda_graphs": False}, "yes"),
        # A graph overwrites the gradients of its last start.
        ("cuda", None, {"accumulate": 2}, "yes"),
        ("cuda", None, {"devices": 2}, "no"),
        ("cuda", True, {"devices": 2}, "yes"),
        ("cuda", None, {"layer": nn.Linear(2, 2)}, "no"),  # not measured, as is the next
        ("cuda", None, {"one": False}, "no"),
        ("cuda", True, {"one": False}, "yes"),
        ("cuda", True, {"layer": nn.Linear(2, 2)}, "yes"),
        ("cuda", True, {"layer": nn.Linear(2, 2), "cuda_graphs": True}, "yes, with CUDA graphs"),
        ("cpu", None, {}, "no"),
        ("cpu", True, {}, "yes"),
    ],
)
def test_one_gpu_compiles_and_starts_whole_passes_at_once(
    device, compile, settings, way, monkeypatch
):
    monkeypatch.setattr(hardware_fit, "obstacle_to_compiling", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    given = {
        "cuda_graphs": None,
        "accumulate": 1,
        "devices": 1,
        "layer": nn.Conv2d(1, 1, 3),
        "one": True,
    } | settings
    trainer = SimpleNamespace(
        world_size=given["devices"], accumulate_grad_batches=given["accumulate"]
    )
    fit = HardwareFit(torch.device(device), "32-true", "auto", compile, given["cuda_graphs"])
    module = Compiled(given["layer"], given["one"])
    fit.setup(trainer, module, "fit")
    assert fit.way["compiled"] == way
    assert (module.options is not None) == (way != "no")
    graphs = (module.options or {}).get("triton.cudagraphs")
    assert graphs is (
        (way == "yes, with CUDA graphs") if device == "cuda" and way != "no" else None
    )


@pytest.mark.slow
def test_torch_knows_the_options_for_its_compiler():
    options = hardware_fit.compiler_options(torch.device("cuda"), cuda_graphs=True)
    torch.compile(torch.neg, options=options)  # it refuses unknown ones here
    with pytest.raises(RuntimeError, match="optimization option"):
        torch.compile(torch.neg, options={"no_such_option": True})


@pytest.mark.parametrize(
    ("settings", "expected"), [({}, 0), ({"accumulate": 2}, 1), ({"devices": 2}, 1)]
)
def test_cuda_graphs_that_were_asked_for_in_vain_are_said(settings, expected, monkeypatch, caplog):
    monkeypatch.setattr(hardware_fit, "obstacle_to_compiling", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    given = {"accumulate": 1, "devices": 1} | settings
    trainer = SimpleNamespace(
        world_size=given["devices"], accumulate_grad_batches=given["accumulate"]
    )
    HardwareFit(torch.device("cuda"), "32-true", "auto", True, True).setup(
        trainer, Compiled(nn.Conv2d(1, 1, 3), True), ""
    )
    assert (
        sum("trainer.cuda_graphs=true has no effect" in message for message in caplog.messages)
        == expected
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([], True),
        (["method.symmetric=true"], False),
        (["method.dense_weight=0.5"], False),
        (["method=moco_v3", "method.queue_size=null"], False),
    ],
)
def test_the_method_knows_how_many_views_an_encoder_gets(settings, expected, runner):
    assert runner.method(runner.config(*settings)).has_one_view_per_encoder is expected


def test_what_cannot_compile_does_not(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    fit = HardwareFit(torch.device("cuda"), "32-true", "auto", None)
    fit.setup(SimpleNamespace(world_size=1, accumulate_grad_batches=1), nn.Conv2d(1, 1, 3), "fit")
    assert fit.way["compiled"] == "no"
