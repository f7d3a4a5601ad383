"""Run programs and training steps on the stand-in GPU, case by case.

    python -m tests.stand_in.sweep FOLDER quick|full [PATTERN]

Prints one JSON object a line: the case, its seconds, the error that ended it if there was one, and
what would have made the host wait between two steps that are not logged.
It needs a process of its own, see `tests.stand_in.gpu`.
"""

import argparse
import contextlib
import fnmatch
import json
import math
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytorch_lightning as pl
import torch

import moco.methods.moco as method_module
from moco import evaluate, segment, train
from moco.callbacks import progress
from moco.cli import pretraining
from moco.config.data import EvaluateDataConfig
from moco.config.pretrained import EvaluateConfig, EvaluationConfig
from moco.methods.batch_norm import batch_norm_mode
from moco.methods.momentum import update_key_encoder
from moco.models.swin.attention import WindowAttention
from moco.training.distributed import collectives as distributed
from tests.configs import composed
from tests.conftest import Runner
from tests.segmentation.shapes import draw_shapes
from tests.stand_in.gpu import StandInGPU

METHODS = {
    "moco_v1": [],
    "moco_v2": [],
    "moco_v2_plus": [],
    "moco_v3": [
        "method.queue_size=null",
        "method.projector.hidden_dim=32",
        "method.predictor.hidden_dim=32",
    ],
    "moby": ["method.projector.hidden_dim=32", "method.predictor.hidden_dim=32"],
    # With BatchNorm in the head, keys are shuffled. Cells of a Swin or ViT have unusual strides.
    "densecl": ["method.dense_grid=2", "method.projector.hidden_batch_norm=true"],
}
FAMILIES = {
    "resnet": ["backbone=resnet_tiny"],
    "vit": ["backbone=vit_tiny_patch4"],
    "swin": ["backbone=swin_tiny_patch2"],
    "swin_v2": ["backbone=swin_v2_tiny_patch2"],
}
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
SWITCHES = {
    "adamw, clipped": [
        "optimizer=adamw",
        "optimizer.warmup_epochs=0",
        "trainer.gradient_clip_val=1",
    ],
    "lars": ["optimizer=lars", "optimizer.warmup_epochs=0"],
    "accumulated": ["trainer.accumulate_grad_batches=2"],
    "random queue": ["method.queue_start=random"],
    "two queues": ["method.symmetric=true", "method.num_queues=2"],
    "dense, symmetric": ["method.dense_weight=0.5", "method.symmetric=true", "method.dense_grid=2"],
    "plain BatchNorm": ["method.batch_norm=plain"],
    "shuffled BatchNorm": ["method.batch_norm=shuffle"],
    "channels_last": ["trainer.memory_format=channels_last"],
    "online probe": ["evaluation.online_probe=true"],
    "embedding": ["evaluation.feature=embedding"],
    "worker engine": ["data.engine=worker"],
    "growing views": [
        "augmentation.start_image_size=16",
        "augmentation.image_size_step=8",
        "augmentation.ramp_epochs=2",
        "trainer.max_epochs=3",
        "trainer.max_steps=-1",
        "data.batch_size=512",
    ],
}
FOR_RESNETS = ("channels_last", "plain BatchNorm", "shuffled BatchNorm")
SMALL = [
    "data.image_size=32",
    "evaluation.batch_size=1024",
    "trainer.accelerator=cuda",
    "trainer.compile=false",
    "trainer.log_every_n_steps=3",
]
QUICK = {
    "training: moco_v2, resnet, bf16-mixed",
    "training: moco_v3, vit, 32-true",
    "training: moby, swin_v2, bf16-mixed",
    "evaluate: resnet",
    "biases: adamw",
    "biases: sgd",
    "biases: lars",
    "one of two: densecl, resnet, shuffle",
    "one of two: densecl, swin_v2, shuffle",
    "one of two: moby, swin, shuffle",
}
SHAPE = (8, 3, 32, 32)


class WaitsBetweenSteps(pl.Callback):
    """Notes the waits between the end of the first step and the end of the second.

    The third step is logged.
    """

    def __init__(self, gpu):
        self.gpu = gpu
        self.span = [0, 0]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 0 and batch_idx < 2:
            self.span[batch_idx] = len(self.gpu.waits)

    @property
    def waits(self):
        return self.gpu.waits[self.span[0] : self.span[1]]


def trained(gpu, folder, overrides):
    """Train on the digits as `moco.train` does; return the waits between two steps."""
    runner = Runner(folder)
    config = runner.config(*SMALL, "trainer.max_steps=4", *overrides)
    between = WaitsBetweenSteps(gpu)
    build = pretraining.build_trainer

    def build_trainer(*arguments, **options):
        made = build(*arguments, **options)
        made.callbacks.append(between)
        return made

    # The schedules and the verdict take it for the beginning of a longer run. The verdict looks at a
    # run when a tenth of it ends, which each of four steps would.
    as_in_a_long_run = mock.patch.object(method_module.MoCo, "num_steps", 100)
    # After ten seconds a line shows the loss, which waits for it. A slow machine must not print one.
    without_lines = mock.patch.object(progress, "SECONDS_BEFORE_LINE", math.inf)
    trainer_built = mock.patch.object(pretraining, "build_trainer", build_trainer)
    with as_in_a_long_run, without_lines, trainer_built:
        train.run(config, folder / "run")
    return between.waits


def evaluated(gpu, folder, overrides, name):
    """Train on the stand-in, then run `moco.evaluate`."""
    trained(gpu, folder, overrides)
    only_knn = {"plots": False} if name == "knn" else {}
    measured = EvaluationConfig(name=name, **only_knn)
    path = str(folder / "run" / "checkpoints" / "last.ckpt")
    evaluate.run(
        EvaluateConfig(path, EvaluateDataConfig(), measured, "cuda"), folder / "evaluation"
    )


def segmented(gpu, folder, overrides):
    """Run `moco.segment` from scratch on drawn shapes."""
    root = draw_shapes(folder / "shapes")
    small = [
        "image_size=32",
        "decoder=linear",
        "data.batch_size=8",
        "data.num_workers=0",
        "evaluation.batch_size=8",
        "trainer.accelerator=cuda",
        "trainer.max_epochs=1",
        "checkpoint=null",
    ]
    config = composed("segment", *small, f"data.root={root}", *overrides)
    segment.run(config, folder / "segment")


def on_gpu(folder, overrides):
    """Return a method on the stand-in, a batch for it, and its config."""
    runner = Runner(folder)
    config = runner.config(*SMALL, *overrides)
    method = runner.method(config)
    if "backbone=resnet_tiny" in overrides:
        method = method.to(memory_format=torch.channels_last)
    views = [torch.empty(SHAPE, device="cuda") for _ in range(2)]
    return method.cuda(), SimpleNamespace(views=views), config


def waits_of_second_step(gpu, method, batch):
    """Take two training steps without a Trainer; return the waits of the second.

    The first step fills the caches.
    """
    for _ in range(2):
        before = len(gpu.waits)
        method.training_step(batch, 0)["loss"].backward()
    return gpu.waits[before:]


def with_fault(gpu, folder, fault):
    """Take two steps whose loss has a planted fault; return the waits in the second."""
    info_nce = method_module.efficient_info_nce

    def faulty(query, key, negatives, temperature):
        return info_nce(query, key, negatives, temperature) + 0 * fault(query, negatives)

    method, batch, _ = on_gpu(folder, FAMILIES["resnet"])
    method.install_batch_norm("plain")
    with mock.patch.object(method_module, "efficient_info_nce", faulty):
        return waits_of_second_step(gpu, method, batch)


FAULTS: dict[str, Callable] = {
    "a tensor that is no buffer": lambda query, negatives: (
        query + torch.ones(query.shape[1])
    ).sum(),
    "a number that is read": lambda query, negatives: query.sum().item(),
    "a tensor made on the host": lambda query, negatives: query.mul(torch.rand(query.shape)).sum(),
    "a mask as index": lambda query, negatives: query[query[:, 0] > 0].sum(),
    "a blocking copy": lambda query, negatives: torch.ones(3).to(query.device).sum(),
    "an index on the host": lambda query, negatives: query[torch.tensor([0, 1])].sum(),
    "a copy to the host": lambda query, negatives: (
        query.detach().cpu().sum().to(query.device, non_blocking=True)
    ),
    "two types in a product": lambda query, negatives: (query @ negatives.double().T).sum(),
}


def with_fresh_biases(gpu, folder, optimizer):
    """Take steps of a Swin in which every pass must compute its position biases again."""
    counts = {"passes": 0, "biases": 0}
    forward, pair_biases = WindowAttention.forward, WindowAttention.pair_biases

    def counted_forward(self, *arguments):
        counts["passes"] += 1
        return forward(self, *arguments)

    def counted_bias(self, window):
        counts["biases"] += 1
        return pair_biases(self, window)

    method, batch, _ = on_gpu(folder, [*FAMILIES["swin_v2"], *optimizer])
    method.install_batch_norm("plain")
    steps = method.configure_optimizers()
    with (
        mock.patch.object(WindowAttention, "forward", counted_forward),
        mock.patch.object(WindowAttention, "pair_biases", counted_bias),
    ):
        for _ in range(2):
            method.training_step(batch, 0)["loss"].backward()
            steps.step()
            update_key_encoder(method.key_encoder, method.query_encoder, 0.9)
            with torch.no_grad():
                method.query_encoder.encode(batch.views[0])
    # Each step runs both encoders, and the query encoder once more. Each has eight blocks.
    assert counts["passes"] == counts["biases"] == 2 * 3 * 8, counts


def stand_in_collective(call, output, *inputs, **options):
    """Check the tensors of a collective for what NCCL and gloo require; transfer nothing."""
    device = "cuda" if options.get("group") is None else "cpu"  # other groups are gloo's
    for tensor in (output, *inputs):
        strides = tensor.stride()
        assert tensor.is_contiguous(), f"{call}: tensors must be contiguous, got strides {strides}"
        assert tensor.device.type == device, f"{call}: {tensor.device}, expected {device}"
    if call == "all_to_all_single":
        assert sum(options["input_split_sizes"]) == len(inputs[0])
        assert sum(options["output_split_sizes"]) == len(output)
    if call == "all_gather_into_tensor":
        assert output.shape == (2 * len(inputs[0]), *inputs[0].shape[1:])


def one_of_two(gpu, folder, overrides, mode):
    """Take two training steps as the second of two GPUs; return the waits in the second."""
    method, batch, config = on_gpu(folder, overrides)
    mode = batch_norm_mode(mode, method.key_encoder, 2, "cuda", config.method.negatives)
    method.install_batch_norm(mode)
    names = ("all_gather_into_tensor", "all_to_all_single", "broadcast")
    with contextlib.ExitStack() as patches:
        for module in (distributed, method_module):
            patches.enter_context(mock.patch.object(module, "rank", return_value=1))
        patches.enter_context(mock.patch.object(distributed, "world_size", return_value=2))
        patches.enter_context(mock.patch.object(distributed, "_steps", "gloo"))
        for name in names:
            call = partial(stand_in_collective, name)
            patches.enter_context(mock.patch.object(distributed.dist, name, call))
        return waits_of_second_step(gpu, method, batch)


def cases():
    """Return every case by name: a function of the stand-in and a folder, and its arguments."""
    found = {}
    for method, settings in METHODS.items():
        chosen = [f"method={method}", *settings]
        for family, backbone in FAMILIES.items():
            for precision in PRECISIONS:
                overrides = [*chosen, *backbone, f"trainer.precision={precision}"]
                found[f"training: {method}, {family}, {precision}"] = (trained, overrides)
            for mode in ("auto", "shuffle", "plain"):
                name = f"one of two: {method}, {family}, {mode}"
                found[name] = (one_of_two, [*chosen, *backbone], mode)
    for family, backbone in FAMILIES.items():
        for switch, settings in SWITCHES.items():
            if family != "resnet" and switch in FOR_RESNETS:
                continue
            found[f"switch: {family}, {switch}"] = (trained, [*backbone, *settings])
        found[f"evaluate: {family}"] = (evaluated, backbone, "knn")
        found[f"segment: {family}"] = (segmented, backbone)
    found["evaluate linear: vit"] = (evaluated, FAMILIES["vit"], "linear")
    for optimizer in ("sgd", "adamw", "lars"):
        settings = [f"optimizer={optimizer}", "optimizer.warmup_epochs=0"]
        found[f"biases: {optimizer}"] = (with_fresh_biases, settings)
    for fault, function in FAULTS.items():
        found[f"fault: {fault}"] = (with_fault, function)
    # With negatives from the batch, auto means SyncBatchNorm on several GPUs. The stand-in cannot
    # show that.
    for family in FAMILIES:
        del found[f"one of two: moco_v3, {family}, auto"]
    return found


def run_case(case, folder):
    """Run a case on a new stand-in; return its seconds, error and waits."""
    work, *arguments = case
    started = time.perf_counter()
    torch.manual_seed(0)
    error, waits = None, []
    with StandInGPU() as gpu, contextlib.redirect_stdout(sys.stderr):
        try:
            waits = work(gpu, folder, *arguments) or []
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"
            traceback.print_exc()
    found = [f"{wait.what} in {wait.where}" for wait in waits]
    return {
        "seconds": round(time.perf_counter() - started, 2),
        "error": error,
        "waits": sorted(set(found)),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("size", choices=("quick", "full"))
    parser.add_argument("pattern", nargs="?", default="*")
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for number, (name, case) in enumerate(cases().items()):
        is_quick = name in QUICK or name.startswith("fault: ")
        if (given.size == "full" or is_quick) and fnmatch.fnmatchcase(name, given.pattern):
            folder = given.folder / str(number)
            folder.mkdir(parents=True)
            print(json.dumps({"case": name, **run_case(case, folder)}), flush=True)


if __name__ == "__main__":
    main()
