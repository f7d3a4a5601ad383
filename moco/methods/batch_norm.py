"""How BatchNorm is kept from leaking which key belongs to which query.

A query and its key that are normalised with the statistics of the same images can be matched by those statistics alone:
the loss falls and nothing is learned (arXiv 1911.05722, section 3.3, "Shuffling BN"). The modes:

- ``shuffle``: the keys' batch is shuffled over all devices, so a query and its key meet different company. On one device
  the company stays the same, and it prevents nothing.
- ``split``: the batch is normalised in groups, as if each were on its own device, and the keys are shuffled: the same
  remedy on one device, from the official CIFAR-10 notebook.
- ``sync``: every batch is normalised with the statistics of all devices, keys in their order. With a queue this prevents
  nothing: a query and its key still meet the same company, and the keys of the queue met another. On one device it is plain.
- ``plain``: each device normalises its own batch; right for encoders without BatchNorm.
- ``auto``, with a queue: plain without BatchNorm, split on one device, shuffle on several.
- ``auto``, with negatives of the same batch: sync on several GPUs, otherwise plain. All keys that a query is compared with
  are then normalised together, and the statistics tell none from another. Without sync they would tell the keys of the
  query's own device from the others.

BatchNorm in the projector alone, as under MoBY's Swin, leaks as well, so ``auto`` takes it like any other. Tried with keys
that share nothing with their queries but the batch, of 8: a two-layer head brought the loss from log(1 + K) = 7.6 down to
5.7; in groups of 8 with shuffled keys it stayed at 7.6. What a key cannot tell is safe: a BatchNorm in the predictor alone.

N batch, S splits, C channels.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from moco.errors import InputError
from moco.models.encoder import has_batch_norm

log = logging.getLogger(__name__)


class SplitBatchNorm(_BatchNorm):
    """BatchNorm that in training normalises S groups of the batch separately: sample i is in group i mod S.

    Running statistics move by the mean over the groups; evaluation is ordinary BatchNorm. Parameters, buffers and their
    names are BatchNorm's.

    Args:
        in_blocks: the batches come sorted by group, see `sorted_by_group`. In channels_last a group is then a part of the
            memory, where otherwise all have to be copied to another layout.
    """

    def __init__(self, wrapped: _BatchNorm, num_splits: int, in_blocks: bool = False) -> None:
        super().__init__(
            wrapped.num_features,
            wrapped.eps,
            wrapped.momentum,
            wrapped.affine,
            wrapped.track_running_stats,
        )
        self.num_splits = num_splits
        self.in_blocks = in_blocks
        self._parameters = wrapped._parameters
        self._buffers = wrapped._buffers

    def _check_input_dim(self, input: Tensor) -> None:
        """Any (N, C, ...)."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        splits = self.num_splits
        check_groups(len(input), splits)
        if input.numel() == splits * input.shape[1]:
            raise InputError(
                f"method.batch_norm_splits={splits}: a group is 1 of the {len(input)} images that one device gets at once, "
                "and its only value of a channel has no variance; expected a larger data.batch_size or fewer groups"
            )
        return self.way(input.device.type)(input)

    def way(self, device_type: str) -> Callable[[Tensor], Tensor]:
        """Which of the methods below is the fastest."""
        if torch.compiler.is_compiling():
            return self.by_formula
        if not self.in_blocks:
            return self.of_all
        return self.of_blocks_in_place if device_type == "cpu" else self.of_blocks

    def of_all(self, input: Tensor) -> Tensor:
        """(N, C, ...) seen as (N / S, S * C, ...): BatchNorm of S * C channels."""
        grouped = input.reshape(-1, self.num_splits * self.num_features, *input.shape[2:])
        mean, variance, weight, bias = (
            None if each is None else each.repeat(self.num_splits)
            for each in (self.running_mean, self.running_var, self.weight, self.bias)
        )
        output = F.batch_norm(
            grouped, mean, variance, weight, bias, True, self.momentum or 0.0, self.eps
        )
        with torch.no_grad():
            for buffer, moved in ((self.running_mean, mean), (self.running_var, variance)):
                if buffer is not None and moved is not None:
                    buffer.copy_(moved.view(self.num_splits, -1).mean(dim=0))
        return output.view_as(input)

    def of_blocks(self, input: Tensor) -> Tensor:
        """The same of a batch that is sorted by group, block by block."""
        statistics = (self.running_mean, self.running_var)
        blocks = zip(input.chunk(self.num_splits), self.momenta(), strict=True)
        return torch.cat(
            [
                F.batch_norm(block, *statistics, self.weight, self.bias, True, momentum, self.eps)
                for block, momentum in blocks
            ]
        )

    def of_blocks_in_place(self, input: Tensor) -> Tensor:
        """The same, each block to its place: to join them afterwards takes a CPU as long as to normalise them."""
        statistics = (self.running_mean, self.running_var)
        return NormalizedBlocks.apply(
            input, self.weight, self.bias, *statistics, self.momenta(), self.eps
        )

    def momenta(self) -> list[float]:
        """What moves the running statistics by one group after the other as `momentum` does by the mean of all."""
        momentum = self.momentum or 0.0
        return [
            momentum / (self.num_splits - later * momentum)
            for later in reversed(range(self.num_splits))
        ]

    def by_formula(self, input: Tensor) -> Tensor:
        """The same as a compiler takes it best: all groups in one kernel, whatever the layout."""
        shape = (self.num_splits, -1) if self.in_blocks else (-1, self.num_splits)
        side = (
            1 if self.in_blocks else 0
        )  # of the images of a group, in (S, N / S, C, ...) or (N / S, S, C, ...)
        groups = input.unflatten(0, shape).to(torch.promote_types(input.dtype, torch.float32))
        over = (side, *range(3, groups.ndim))
        own_variance, own_mean = torch.var_mean(groups, over, correction=0, keepdim=True)
        normed = (groups - own_mean) * torch.rsqrt(own_variance + self.eps)
        if self.running_mean is not None and self.running_var is not None:
            count = groups.numel() // own_mean.numel()
            for running, own in (
                (self.running_mean, own_mean),
                (self.running_var, own_variance * (count / (count - 1))),
            ):
                mean_of_groups = own.detach().view(self.num_splits, -1).mean(dim=0)
                running.lerp_(mean_of_groups.to(running.dtype), self.momentum or 0.0)
        if self.weight is not None:
            of_channel = (-1, *[1] * (groups.ndim - 3))
            normed = normed * self.weight.view(of_channel) + self.bias.view(of_channel)
        return normed.to(input.dtype).flatten(0, 1)


class NormalizedBlocks(torch.autograd.Function):
    """BatchNorm of each block of a batch by itself, written to its place in one tensor."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        variance: Tensor | None,
        momenta: list[float],
        eps: float,
    ) -> Tensor:
        """(N, C, ...) as `input`; running `mean`, `variance` (C,) move by one block after the other."""
        splits = len(momenta)
        output = torch.empty_like(input)
        # What it keeps has the parameters' dtype, which autocast leaves in float32.
        like = next((tensor for tensor in (weight, mean) if tensor is not None), input)
        own = like.new_empty(2, splits, input.shape[1])  # means, inverse standard deviations
        places = zip(output.chunk(splits), *own, strict=True)
        for block, momentum, place in zip(input.chunk(splits), momenta, places, strict=True):
            torch.native_batch_norm(
                block, weight, bias, mean, variance, True, momentum, eps, out=place
            )
        ctx.save_for_backward(input, weight, own)
        ctx.eps = eps
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upper: Tensor) -> tuple[Tensor | None, ...]:
        """Of the gradient of the output (N, C, ...): those of the input, the weight and the bias."""
        input, weight, own = ctx.saved_tensors
        splits = own.shape[1]
        gradient = torch.empty_like(input)
        of_parameters = []
        blocks = zip(
            upper.chunk(splits), input.chunk(splits), gradient.chunk(splits), *own, strict=True
        )
        for above, block, place, mean, scale in blocks:
            found = torch.ops.aten.native_batch_norm_backward.default(
                above,
                block,
                weight,
                None,
                None,
                mean,
                scale,
                True,
                ctx.eps,
                [True, *ctx.needs_input_grad[1:3]],
            )
            place.copy_(found[0])  # while the processor's cache holds it
            of_parameters.append(found[1:])
        sums = (
            torch.stack(parts).sum(dim=0) if is_needed else None
            for parts, is_needed in zip(
                zip(*of_parameters, strict=True), ctx.needs_input_grad[1:3], strict=True
            )
        )
        return gradient, *sums, None, None, None, None


def check_groups(num: int, splits: int) -> None:
    """Raises InputError if a batch has no `splits` groups of one size."""
    if num % splits:
        raise InputError(
            f"method.batch_norm_splits={splits} does not divide the {num} images that one device gets at once"
        )


def sorted_by_group(rows: Tensor, splits: int) -> Tensor:
    """The rows 0, S, 2 S, ... of a batch (N, ...), then 1, S + 1, ..."""
    check_groups(len(rows), splits)
    return rows.unflatten(0, (-1, splits)).transpose(0, 1).flatten(0, 1)


def in_batch_order(rows: Tensor, splits: int) -> Tensor:
    """Undo `sorted_by_group`."""
    return rows.unflatten(0, (splits, -1)).transpose(0, 1).flatten(0, 1)


def split_batch_norm(module: nn.Module, num_splits: int, in_blocks: bool = False) -> None:
    """Replace every BatchNorm inside `module` by a `SplitBatchNorm` that shares its parameters and buffers."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm) and not isinstance(child, SplitBatchNorm):
            setattr(module, name, SplitBatchNorm(child, num_splits, in_blocks))
        else:
            split_batch_norm(child, num_splits, in_blocks)


def batch_norm_mode(
    mode: str, encoder: nn.Module, num_devices: int, device_type: str, negatives: str = "queue"
) -> str:
    """The mode that is in force: ``plain``, ``shuffle``, ``split`` or ``sync``.

    Args:
        mode: the one asked for, or ``auto``.
        encoder: either encoder; the two have the same layers.
        num_devices: devices that train together.
        device_type: theirs, ``cpu`` or ``cuda``.
        negatives: where they come from, ``queue`` or ``batch``.

    Raises:
        InputError: sync is asked for on several CPU processes.
    """
    several = num_devices > 1
    if not has_batch_norm(encoder) or (mode == "sync" and not several):
        return "plain"
    if mode == "sync" and device_type == "cpu":
        raise InputError(
            "method.batch_norm=sync: statistics are shared between GPUs only, and these are "
            f"{num_devices} CPU processes; expected auto, plain, shuffle or split, or trainer.devices=1"
        )
    if mode != "auto":
        return mode
    if negatives == "batch":
        return "sync" if several and device_type != "cpu" else "plain"
    return "shuffle" if several else "split"


def log_batch_norm(
    mode: str, encoder: nn.Module, num_devices: int, negatives: str = "queue"
) -> None:
    """Say in one line which mode is in force and what that means."""
    if not has_batch_norm(encoder):
        log.info("batch norm: the encoder has none, so the keys need no shuffling")
    elif negatives == "batch":
        log_with_negatives_of_the_batch(mode, num_devices)
    elif mode in ("plain", "sync"):
        log.warning(
            "batch norm: %s, which leaks the positive of each query; method.batch_norm=auto prevents that",
            mode,
        )
    elif mode == "shuffle" and num_devices == 1:
        log.warning(
            "batch norm: shuffle, which prevents nothing on one device; method.batch_norm=split does"
        )
    else:
        log.info("batch norm: %s, so that it cannot leak the positive of each query", mode)


def log_with_negatives_of_the_batch(mode: str, num_devices: int) -> None:
    if mode == "plain" and num_devices > 1:
        log.warning(
            "batch norm: plain, which tells a query the keys of its own device from the others; on GPUs "
            "method.batch_norm=sync prevents that, elsewhere shuffle"
        )
    else:
        log.info("batch norm: %s, with which the keys of a batch cannot be told apart", mode)
