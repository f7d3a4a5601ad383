"""Skip optimizer steps whose loss or gradients are not finite, and end a run that has only such."""

import logging
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from moco.callbacks.running_trainer import log_scalars
from moco.errors import RunError

log = logging.getLogger(__name__)

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""The buffers of every kind of BatchNorm that a training step changes."""


class BadSteps(pl.Callback):
    """Skips steps whose loss or gradients are not finite; too many in a row end the run.

    A skipped step counts as a step, but changes no weight, no state of the optimizer and no running
    statistics of BatchNorm. `KeyQueue` ignores its keys that are not finite. The key encoder is
    averaged with the unchanged weights, which does no harm: fp16's loss scaling does the same.

    With several devices, each comes to the same decision on its own, because it looks at the
    averaged gradients.

    On a GPU the host does not wait for the decision. It stays on the device, where the optimizer's
    fused kernel reads it. The host reads it when figures are logged, at the end of an epoch and for
    a checkpoint, so that messages about skipped steps come later than the steps. LARS has no such
    kernel, and 16-mixed reads its loss scale in every step: both wait in every step.

    Args:
        figures: gets ``skipped_steps``, the number of skipped steps in the whole run.
        max_bad_steps: this many in a row end the run.
        log_every_n_steps: optimizer steps between two points of ``train/gradient_norm`` (before
            clipping) and ``train/skipped_steps``.
        last_good: returns a phrase that names the newest checkpoint.
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
        self.unread: list[tuple[int, Tensor]] = []  # steps, and on the device whether each is bad
        # A tensor on the device while training, so that keeping it does not wait for the device.
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

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.figures["skipped_steps"] = self.skipped
        self.trained = [weight for weight in pl_module.parameters() if weight.requires_grad]
        # One list for each kind of statistics: its buffers have one dtype, and are copied as one.
        self.statistics: list[list[Tensor]] = []
        for kind in STATISTICS:
            buffers = [getattr(layer, kind, None) for layer in pl_module.modules()]
            rows = [buffer.view(-1) for buffer in buffers if isinstance(buffer, Tensor)]
            if rows:
                self.statistics.append(rows)
        self._remember_statistics()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._remember_statistics()

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: Tensor) -> None:
        # An infinite loss can have finite gradients, and only one device sees it. Adding 0 * loss
        # makes its gradients NaN, on all devices after averaging. A finite loss adds nothing. The
        # hook must not hold the loss itself: the two would keep each other and the step's whole
        # graph alive until Python's garbage collector runs.
        value = loss.detach()
        loss.register_hook(lambda gradient: gradient + 0 * value)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: Any, optimizer: torch.optim.Optimizer
    ) -> None:
        gradients = [weight.grad for weight in self.trained if weight.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        is_bad = ~norm.isfinite()
        step = trainer.global_step + 1
        self.unread.append((step, is_bad))
        on_device = is_decided_on_device(optimizer, norm)
        if on_device:
            optimizer.found_inf = is_bad.float()  # type: ignore[attr-defined]
            self._restore_statistics(is_bad)
        elif bool(is_bad):
            self._restore_statistics(is_bad)
            # Without gradients the optimizer does nothing, also no weight decay and momentum.
            for weight in self.trained:
                weight.grad = None
        is_logged = step % self.log_every_n_steps == 0
        if is_logged or not on_device:
            self._read()
        if is_logged and trainer.logger:
            scalars = {"train/gradient_norm": float(norm), "train/skipped_steps": self.skipped}
            log_scalars(trainer, scalars, step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Lightning has divided the loss by the number of accumulated batches.
        loss = outputs["loss"].detach() * trainer.accumulate_grad_batches
        self.last_finite_loss = torch.where(loss.isfinite(), loss, self.last_finite_loss)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._read()

    def _remember_statistics(self) -> None:
        self.before = [torch.cat(rows) for rows in self.statistics]

    def _restore_statistics(self, is_bad: Tensor) -> None:
        """Put back the statistics from before the step if it is bad, without waiting for it."""
        for before, rows in zip(self.before, self.statistics, strict=True):
            kept = torch.where(is_bad, before, torch.cat(rows))
            sizes = [len(row) for row in rows]
            for row, value in zip(rows, kept.split(sizes), strict=True):
                row.copy_(value)

    def _read(self) -> None:
        """Count the bad steps since the last call; this waits for the device."""
        if not self.unread:
            return
        steps, flags = zip(*self.unread, strict=True)
        self.unread = []
        for step, is_bad in zip(steps, torch.stack(flags).tolist(), strict=True):
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
                f"the loss or its gradients were not finite in {self.in_a_row} steps in a row, "
                f"up to step {step} (trainer.max_bad_steps={self.max_bad_steps}); the last finite "
                f"loss was {float(self.last_finite_loss):.4g}. Usual causes: optimizer.lr is too "
                "high or the warm-up too short; trainer.precision=16-mixed, where bf16-mixed has "
                "the range; large gradients, which trainer.gradient_clip_val limits; values in the "
                f"data that are not finite; {self.last_good()}"
            )
        if self.in_a_row == 1:
            log.warning(
                "step %d skipped: its loss or gradients are not finite "
                "(16-mixed skips some steps while it looks for its loss scale)",
                step,
            )


def is_decided_on_device(optimizer: torch.optim.Optimizer, norm: Tensor) -> bool:
    """Return whether a step can be skipped without waiting for the device.

    That is so on a GPU with fused optimizers, whose kernel looks at ``found_inf``.
    """
    return norm.is_cuda and all(group.get("fused") for group in optimizer.param_groups)
