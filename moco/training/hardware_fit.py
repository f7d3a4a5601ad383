"""Fit the encoders of a training to the device that computes."""

import logging
import warnings
from typing import Any

import pytorch_lightning as pl
import torch

from moco.training.hardware import choose_memory_format, keep_freed_memory

log = logging.getLogger(__name__)

FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
SETTINGS = {
    "precision": "trainer.precision",
    "memory_format": "trainer.memory_format",
    "compiled": "trainer.compile",
}
WITH_GRAPHS = "yes, with CUDA graphs"
MOST_SIZES = 64
"""The number of compiled variants. Each image size needs two, for queries and for keys.

Sizes beyond this limit run without compilation.
"""


class HardwareFit(pl.Callback):
    """Fits the encoders to the device before training, and logs in one line how they run.

    A run that resumes elsewhere is fitted to what is there. Weights are fp32 whatever the
    precision, so that a checkpoint serves both. A warning says if this is another way than the run
    began.

    Args:
        device: the device that computes.
        precision: the answer of `choose_precision`.
        memory_format: see `choose_memory_format`.
        compile: let the module compile its encoders, by its method ``compile_encoders``. None: on
            one GPU, if the module says ``has_one_view_per_encoder`` and most of its weights belong
            to convolutions.
        cuda_graphs: use CUDA graphs for compiled encoders on one GPU. None: where
            ``compile=None`` compiles.
    """

    def __init__(
        self,
        device: torch.device,
        precision: str,
        memory_format: str,
        compile: bool | None,
        cuda_graphs: bool | None = None,
    ) -> None:
        self.device = device
        self.memory_format = memory_format
        self.compile = compile
        self.cuda_graphs = cuda_graphs
        self.way = {"precision": precision}
        self.began: dict[str, str] | None = None

    def state_dict(self) -> dict[str, Any]:
        return self.began or self.way

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.began = state_dict
        for name, value in self.way.items():
            before = state_dict.get(name, value)
            if before != value:
                log.warning(
                    "%s: the run began with '%s' and goes on with '%s', because of this hardware "
                    "or these settings; the images are the same, but the results are no longer "
                    "equal to the last bit",
                    SETTINGS[name],
                    before,
                    value,
                )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.device.type == "cpu":
            keep_freed_memory()
        memory_format = choose_memory_format(self.memory_format, pl_module)
        pl_module.to(memory_format=FORMATS[memory_format])
        self.way["memory_format"] = memory_format

        is_one_gpu = self.device.type == "cuda" and trainer.world_size == 1
        has_one_view = getattr(pl_module, "has_one_view_per_encoder", False)
        is_convolutional = choose_memory_format("auto", pl_module) == "channels_last"
        is_measured_to_gain = is_one_gpu and has_one_view and is_convolutional
        compile = is_measured_to_gain if self.compile is None else self.compile
        graphs = is_measured_to_gain if self.cuda_graphs is None else self.cuda_graphs
        # The next start of a graph overwrites what it wrote before, so that gradients that several
        # passes add up would be lost.
        graphs = graphs and is_one_gpu and trainer.accumulate_grad_batches == 1

        remark = ""
        self.way["compiled"] = "no"
        if compile:
            obstacle = obstacle_to_compiling(self.device)
            if obstacle is None:
                self.way["compiled"] = WITH_GRAPHS if graphs else "yes"
                remark = ", which takes a while at the first steps"
                self.compile_encoders(pl_module, compiler_options(self.device, graphs))
            else:
                remark = f", {obstacle}"
        if self.cuda_graphs and self.way["compiled"] != WITH_GRAPHS:
            log.warning(
                "trainer.cuda_graphs=true has no effect: it needs compiled encoders, one GPU, and "
                "trainer.accumulate_grad_batches=1"
            )
        threads = torch.get_num_threads()
        device = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
        if threads == 1:
            device = "CPU, 1 thread"
        if self.device.type == "cuda":
            device = torch.cuda.get_device_name()
        ways = [f"{name.replace('_', ' ')}: {value}" for name, value in self.way.items()]
        log.info("device: %s; %s%s", device, "; ".join(ways), remark)

    def compile_encoders(self, pl_module: pl.LightningModule, options: dict[str, Any]) -> None:
        """Have the module compile its encoders, with settings that they need."""
        torch.compiler.reset()  # what an earlier training in this process compiled counts as well
        torch.compiler.config.recompile_limit = MOST_SIZES
        # The tracer looks at the gradient of every input, also of the projector's.
        warning = "The .grad attribute of a Tensor that is not a leaf"
        warnings.filterwarnings("ignore", warning, UserWarning)
        pl_module.compile_encoders(options)  # type: ignore[operator]


def compiler_options(device: torch.device, cuda_graphs: bool) -> dict[str, Any]:
    """Return the options of torch.compile that differ from its defaults."""
    if device.type != "cuda":
        return {}
    return {
        "triton.cudagraphs": cuda_graphs,
        # It merges reductions over two axes into one kernel, and fails at the groups of split
        # BatchNorm (torch 2.11).
        "triton.mix_order_reduction": False,
    }


def obstacle_to_compiling(device: torch.device) -> str | None:
    """Return why torch.compile does not work here, in a few words; None if it works.

    It compiles a very small function to find out.
    """
    options = compiler_options(device, cuda_graphs=False)
    try:
        compiled = torch.compile(torch.neg, dynamic=False, options=options)
        compiled(torch.ones(2, device=device))
    except Exception as error:
        # The kinds are many: no C++ compiler, an unknown Python or option, an old GPU.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"torch.compile fails ({lines[0]})"
    return None
