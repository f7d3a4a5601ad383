"""What goes wrong in a run that was set up correctly: steps without a finite gradient, and machines that give out."""

import errno
import logging
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from moco.errors import RunError
from moco.runs.run_folder import last_good

log = logging.getLogger(__name__)

RUN_FOLDER = "hydra.run.dir=PATH"


class BadSteps(pl.Callback):
    """Leaves out optimizer steps whose loss or gradients are not finite, and ends the run after too many in a row.

    A bad step counts as a step but changes no weight, no state of the optimizer and no running statistics of BatchNorm.
    `KeyQueue` takes none of its keys that are not finite. The key encoder is averaged with the unchanged weights as
    after any other step, which does no harm and is what fp16's loss scaling does in steps that it leaves out.

    Over several devices each decides the same without a word: the gradients that it looks at are the averaged ones.

    On a GPU nobody waits for the decision. It stays on the device, where the optimizer's kernel looks at it, and is
    read when figures are logged, at an epoch's end and for a checkpoint: what is said of bad steps comes that much
    later. LARS has no such kernel, and the loss scale of 16-mixed is looked at in every step: with them each waits.

    Args:
        figures: gets ``skipped_steps``, the bad steps of the whole run.
        max_bad_steps: so many in a row end the run.
        log_every_n_steps: optimizer steps between two rows of ``train/gradient_norm`` (before clipping) and
            ``train/skipped_steps``.
        last_good: names the newest checkpoint.
    """

    def __init__(
        self,
        figures: dict[str, Any],
        max_bad_steps: int,
        log_every_n_steps: int,
        last_good: Callable[[], str],
    ) -> None:
        self.figures = figures
        self.max_bad_steps = max_bad_steps
        self.log_every_n_steps = log_every_n_steps
        self.last_good = last_good
        self.skipped = 0
        self.in_a_row = 0
        self.unread: list[tuple[int, Tensor]] = []  # steps, and whether each was bad
        self.precision = "32-true"
        # A tensor on the device while training: keeping it does not wait for the device.
        self.last_finite_loss: Tensor | float = float("nan")

    def state_dict(self) -> dict[str, Any]:
        self._read()
        return {
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "last_finite_loss": float(self.last_finite_loss),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]
        self.in_a_row = state_dict["in_a_row"]
        self.last_finite_loss = state_dict["last_finite_loss"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.figures["skipped_steps"] = self.skipped
        self.precision = trainer.precision
        self.trained = [
            parameter for parameter in pl_module.parameters() if parameter.requires_grad
        ]
        layers = [
            layer
            for layer in pl_module.modules()
            if isinstance(layer, _BatchNorm) and layer.track_running_stats
        ]
        # One list for each kind: buffers of one dtype are copied in one go. Rows of the buffers' own memory, made once: to
        # make them in every step would take a host longer than a small net takes its GPU.
        kinds = ("running_mean", "running_var", "num_batches_tracked")
        self.statistics = [
            [getattr(layer, kind).view(-1) for layer in layers] for kind in kinds if layers
        ]
        self.before = [torch.cat(rows) for rows in self.statistics]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.before = [torch.cat(rows) for rows in self.statistics]

    def on_before_backward(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor
    ) -> None:
        # An infinite loss can have finite gradients, and is one device's alone. This makes them NaN, on all devices once
        # they are averaged; to the gradients of a finite loss it adds nothing. The hook may not hold the loss itself: the
        # two would keep each other, and the step's whole graph, until Python looks for such rings.
        value = loss.detach()
        loss.register_hook(lambda gradient: gradient + 0 * value)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        gradients = [parameter.grad for parameter in self.trained if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        is_bad = ~norm.isfinite()
        step = trainer.global_step + 1
        self.unread.append((step, is_bad))
        on_device = is_decided_on_device(optimizer, norm)
        if on_device:
            optimizer.found_inf = is_bad.float()  # type: ignore[attr-defined]
            self._put_back(is_bad)
        elif bool(is_bad):
            self._put_back(is_bad)
            # The optimizer is left nothing to do, weight decay and momentum included.
            for parameter in self.trained:
                parameter.grad = None
        is_logged = step % self.log_every_n_steps == 0
        if is_logged or not on_device:
            self._read()
        if is_logged and trainer.logger:
            scalars = {"train/gradient_norm": float(norm), "train/skipped_steps": self.skipped}
            trainer.logger.log_metrics(scalars, step=step)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        loss = (
            outputs["loss"].detach() * trainer.accumulate_grad_batches
        )  # Lightning has divided it by them
        self.last_finite_loss = torch.where(loss.isfinite(), loss, self.last_finite_loss)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._read()

    def _put_back(self, is_bad: Tensor) -> None:
        """The statistics, if the step is bad."""
        for before, rows in zip(self.before, self.statistics, strict=True):
            kept = torch.where(is_bad, before, torch.cat(rows)).split([len(row) for row in rows])
            torch._foreach_copy_(rows, kept)

    def _read(self) -> None:
        """Count the bad ones among the steps since the last time; waits for the device."""
        steps, self.unread = self.unread, []
        flags = torch.stack([is_bad for _, is_bad in steps]).tolist() if steps else []
        for (step, _), is_bad in zip(steps, flags, strict=True):
            if is_bad:
                self._count(step)
            else:
                self.in_a_row = 0

    def _count(self, step: int) -> None:
        self.skipped += 1
        self.in_a_row += 1
        self.figures["skipped_steps"] = self.skipped
        if self.in_a_row >= self.max_bad_steps:
            raise RunError(
                f"the loss or its gradients were not finite in {self.in_a_row} steps in a row, up to step {step} "
                f"(trainer.max_bad_steps={self.max_bad_steps}); the last finite loss was "
                f"{float(self.last_finite_loss):.4g}. Usual causes: optimizer.lr too high, or too short a warm-up; "
                "trainer.precision=16-mixed, where bf16-mixed has the range; gradients that trainer.gradient_clip_val "
                f"would hold; values in the data that are not finite; {self.last_good()}"
            )
        if self.in_a_row == 1:
            usual = (
                "; usual with 16-mixed while it looks for its loss scale"
                if self.precision == "16-mixed"
                else ""
            )
            log.warning("step %d left out: its loss or gradients are not finite%s", step, usual)


def is_decided_on_device(optimizer: torch.optim.Optimizer, norm: Tensor) -> bool:
    """Whether a step can be left out without a wait: on a GPU, by a kernel that looks at ``found_inf``."""
    return norm.is_cuda and all(group.get("fused") for group in optimizer.param_groups)


@contextmanager
def failures_without_training_named(
    batch_size: str, kept: str | None = None, place: str = RUN_FOLDER
) -> Iterator[None]:
    """`failures_named` for programs that compute features: inside, the same failures become a `RunError`.

    Args:
        batch_size: the setting's key.
        kept: what is left of the work done.
        place: the setting that says where its files go.
    """
    try:
        yield
    except (EOFError, MemoryError, OSError, RuntimeError) as error:
        said = None if isinstance(error, RunError) else explained(error, batch_size, "", place)
        if said is None:
            raise
        raise RunError("; ".join(filter(None, (said, kept)))) from error


@contextmanager
def failures_named(folder: Path) -> Iterator[None]:
    """Inside, a full GPU, disk or memory, or a lost loader process, becomes a `RunError` that says what to change.

    It names the run's last good checkpoint. What is none of these, such as a defect in a data set's code, passes as it is.
    """
    show = threading.excepthook
    # A disk that is full is first met by the thread that writes TensorBoard's files. What it meets is raised at the next
    # point of a curve; its own traceback would only hide the one line.
    threading.excepthook = lambda args: None if is_of_tensorboard(args.thread) else show(args)
    try:
        yield
    except (EOFError, MemoryError, OSError, RuntimeError) as error:
        said = None if isinstance(error, RunError) else explained(error)
        if said is None:
            raise
        raise RunError(f"{said}; in the run {folder}; {last_good(folder)}") from error
    finally:
        threading.excepthook = show


def is_of_tensorboard(thread: threading.Thread | None) -> bool:
    return type(thread).__module__.startswith("tensorboard.")


# {batch_size} stands for the setting's key, which is not the same in all programs.
GPU_IS_FULL = "the GPU is out of memory; a smaller {batch_size}{or_in_training} needs less"
OR_IN_TRAINING = (
    ", more trainer.accumulate_grad_batches, trainer.precision=bf16-mixed or, of a Swin, "
    "backbone.gradient_checkpointing=true"
)
MEMORY_IS_FULL = "the machine is out of memory; fewer data.num_workers or a smaller {batch_size} needs less, or give the job more"
TOO_MANY_FILES = "too many files are open; raise the limit with 'ulimit -n 65536' before the start, or use fewer data.num_workers"
# Found in the message of a RuntimeError, or of what a loader process raised; the first that is there counts.
SIGNS = (
    (
        r"shared memory|/torch_\d+|bus error",
        "the loader processes have used up the shared memory; use fewer data.num_workers or a smaller {batch_size}, or "
        "give the container more (docker run --shm-size=8g, or a memory volume on /dev/shm)",
    ),
    (
        r"DataLoader worker .*(exited unexpectedly|killed by signal)|^EOFError",  # the end of a pipe to a process
        "a loader process was ended from outside, mostly by the kernel because the memory was full; use fewer "
        "data.num_workers or a smaller {batch_size}, or give the job more memory",
    ),
    (r"Too many open files|received 0 items of ancdata", TOO_MANY_FILES),
    (r"(CUDA|HIP).* out of memory|(CUBLAS|CUDNN|CUFFT|CUSOLVER)_STATUS_ALLOC_FAILED", GPU_IS_FULL),
    (
        r"^BackendCompilerFailed|^InductorError|^TorchRuntimeError",
        "torch.compile fails at these encoders; trainer.compile=false does without",
    ),
    (r"MemoryError|can('t|not) allocate memory|not enough memory|std::bad_alloc", MEMORY_IS_FULL),
)
# What to do about an OSError that is nobody's mistake.
REMEDIES = {
    errno.ENOSPC: "free some space and start again",
    errno.EDQUOT: "free some of your quota and start again",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f) and start again",
    errno.EROFS: "make the file system writable and start again, or choose another {place}",
    errno.EACCES: "make it writable for you and start again, or choose another {place}",
    errno.EIO: "the disk or the network file system fails; start again where it works",
    errno.ESTALE: "the network file system was lost; start again where it is mounted",
}


def explained(
    error: BaseException,
    batch_size: str = "data.batch_size",
    or_in_training: str = OR_IN_TRAINING,
    place: str = RUN_FOLDER,
) -> str | None:
    """What happened and what to change; None if the error is no sign of a machine that gave out.

    Args:
        batch_size: the setting's key.
        or_in_training: what else helps when a GPU is full.
        place: the setting that says where the program's files go.
    """
    keys = {"batch_size": batch_size, "or_in_training": or_in_training}
    if isinstance(error, torch.OutOfMemoryError):
        return GPU_IS_FULL.format(**keys)
    text = str(error)
    if "PytorchStreamWriter" in text and isinstance(error.__context__, OSError):
        return explained(
            error.__context__, **keys, place=place
        )  # a full disk, under the zip writer's complaint about it
    if isinstance(error, OSError) and error.errno is not None:
        return explained_os_error(error, batch_size, place)
    for sign, said in SIGNS:
        if re.search(sign, f"{type(error).__name__}: {text}", re.IGNORECASE):
            last_read = re.search(
                r"; it was reading .*$", text
            )  # what a lost loader process was at
            return said.format(**keys) + (last_read[0] if last_read else "")
    if isinstance(
        error, OSError
    ):  # of a loader process, which hands on no more than its traceback as text
        return f"in a loader process, {text.splitlines()[-1]}"
    return None


def explained_os_error(error: OSError, batch_size: str, place: str) -> str:
    """The same of an error that the operating system reported."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return TOO_MANY_FILES
    if error.errno == errno.ENOMEM:
        return MEMORY_IS_FULL.format(batch_size=batch_size)
    remedy = REMEDIES.get(error.errno or 0)
    return f"{error}; {remedy.format(place=place)}" if remedy else str(error)
