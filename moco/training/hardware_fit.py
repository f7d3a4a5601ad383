"""The nets of a training as the device takes them best."""

import logging
import warnings
from typing import Any

import pytorch_lightning as pl
import torch

from moco.training.hardware import choose_memory_format, keep_freed_memory

log = logging.getLogger(__name__)

FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
KEYS = {
    "precision": "trainer.precision",
    "memory_format": "trainer.memory_format",
    "compiled": "trainer.compile",
}
WITH_GRAPHS = "yes, with CUDA graphs"
SIZES_AT_MOST = 64
"""That are compiled: each size of views counts twice, for queries and for keys. What comes after runs as it is."""


class HardwareFit(pl.Callback):
    """Before training, fits the nets to the device that computes, and says in one line how they run.

    A run that goes on from its checkpoint elsewhere is fitted to what is there: weights are fp32 whatever the precision, so
    that the checkpoint serves both. It warns when that is another way than the run began.

    Args:
        device: that computes.
        precision: of `choose_precision`.
        memory_format: see `choose_memory_format`.
        compile: let the module compile its encoders, by its method ``compile_encoders``. None: on one GPU, if the module
            says that it ``has_one_view_per_encoder`` and most of its weights are convolutions'.
        cuda_graphs: of compiled encoders on one GPU. None: where ``compile=None`` compiles.
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
            if state_dict.get(name, value) != value:
                log.warning(
                    "%s: the run began with '%s' and goes on with '%s', by this hardware or these settings; the same "
                    "images, but no longer the same to the last bit", KEYS[name], state_dict[name], value,
                )  # fmt: skip

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.device.type == "cpu":
            keep_freed_memory()
        memory_format = choose_memory_format(self.memory_format, pl_module)
        pl_module.to(memory_format=FORMATS[memory_format])
        self.way["memory_format"] = memory_format
        is_one_gpu = self.device.type == "cuda" and trainer.world_size == 1
        is_of_convolutions = choose_memory_format("auto", pl_module) == "channels_last"
        is_default = (
            is_one_gpu
            and is_of_convolutions
            and getattr(pl_module, "has_one_view_per_encoder", False)
        )
        compile, graphs = (
            is_default if given is None else given for given in (self.compile, self.cuda_graphs)
        )
        obstacle = obstacle_to_compiling(self.device) if compile else None
        self.way["compiled"] = "no"
        if compile and obstacle is None:
            # What a graph wrote is written over by its next start: gradients that several passes add up would be lost.
            graphs &= is_one_gpu and trainer.accumulate_grad_batches == 1
            self.way["compiled"] = WITH_GRAPHS if graphs else "yes"
            torch.compiler.reset()  # an earlier training in this process counts as well
            torch._dynamo.config.recompile_limit = SIZES_AT_MOST
            # The tracer looks at the gradient of all that it is given, the projector's input among it.
            warnings.filterwarnings(
                "ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning
            )
            pl_module.compile_encoders(compiler_options(self.device, graphs))  # type: ignore[operator]
        if self.cuda_graphs and self.way["compiled"] != WITH_GRAPHS:
            log.warning(
                "trainer.cuda_graphs=true has no effect: it takes compiled encoders, one GPU, and no "
                "trainer.accumulate_grad_batches above 1"
            )
        where = (
            torch.cuda.get_device_name()
            if self.device.type == "cuda"
            else f"CPU, {torch.get_num_threads()} threads"
        )
        more = (
            f", {obstacle}"
            if obstacle
            else ", which takes a while at the first steps"
            if compile
            else ""
        )
        log.info("device: %s; %s%s", where, described(self.way), more)


def described(way: dict[str, str]) -> str:
    return "; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in way.items())


def compiler_options(device: torch.device, cuda_graphs: bool) -> dict[str, Any]:
    """Of torch.compile's own compiler, those that are not as it has them."""
    if device.type != "cuda":
        return {}
    # Of reductions in two orders it makes one kernel, and fails at the groups of split BatchNorm (torch 2.11).
    without = {"triton.mix_order_reduction": False}
    known = torch._inductor.list_options()
    return {"triton.cudagraphs": cuda_graphs} | {
        name: value for name, value in without.items() if name in known
    }


def obstacle_to_compiling(device: torch.device) -> str | None:
    """Why torch.compile does not work here, in a few words, by compiling next to nothing; None if it does."""
    try:
        torch.compile(torch.neg, dynamic=False)(torch.ones(2, device=device))
    except (
        Exception
    ) as error:  # of many kinds: no compiler, a Python that it does not know, an old GPU
        said = str(error).strip().splitlines() or [type(error).__name__]
        return f"torch.compile fails ({said[0]})"
    return None
