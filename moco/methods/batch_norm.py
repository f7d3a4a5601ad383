"""How BatchNorm is kept from leaking which key belongs to which query.

If a query and its key are normalised with the statistics of the same images, the encoder can match
them by those statistics: the loss falls and nothing is learned (arXiv 1911.05722, section 3.3,
"Shuffling BN"). The modes are:

- ``shuffle``: the keys' batch is shuffled over all devices, so that a query and its key are
  normalised with different images. On one device the images are the same, and nothing is prevented.
- ``split``: the batch is normalised in groups, as if each group were on its own device, and the
  keys are shuffled. This is the remedy for one device, from the official CIFAR-10 notebook.
- ``sync``: every batch is normalised with the statistics of all devices, and the keys stay in
  order. With a queue this prevents nothing: a query and its key still share their statistics, and
  the keys in the queue have others. On one device it is the same as ``plain``.
- ``plain``: each device normalises its own batch. Encoders without BatchNorm need nothing else.
- ``auto`` with a queue: ``plain`` without BatchNorm, ``split`` on one device, ``shuffle`` on
  several.
- ``auto`` with negatives of the same batch: ``sync`` on several GPUs, otherwise ``plain``. All keys
  that a query is compared with then share their statistics, which tell none of them apart.

A BatchNorm in the projector alone (MoBY's Swin) leaks as well, so ``auto`` treats it like any
other. In a trial the keys shared nothing with their queries but the batch of 8: with a two-layer
head the loss fell from log(1 + K) = 7.6 to 5.7, and in groups of 8 with shuffled keys it stayed at
7.6. A BatchNorm in the predictor alone is safe, because keys do not pass it.
"""

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco.errors import InputError
from moco.models.encoder import BATCH_NORMS, has_batch_norm

log = logging.getLogger(__name__)


class SplitBatchNorm(nn.BatchNorm2d):
    """BatchNorm that in training normalises the groups of a batch separately.

    With S groups, sample i is in group i mod S. The running statistics move by the mean over the
    groups. Evaluation is ordinary BatchNorm. Inputs are (N, C, ...) of any number of dimensions.

    Args:
        wrapped: any BatchNorm with running statistics. Its parameters and buffers are shared, under
            their names.
        num_splits: S.
        is_sorted: the batches come sorted by group, see `sorted_by_group`. In the channels_last
            layout each group is then one part of the memory. Otherwise the whole batch would have
            to be copied to another layout: a step of ResNet-50 then takes 1.5 times as long.
    """

    momentum: float
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, wrapped: Any, num_splits: int, is_sorted: bool = False) -> None:
        super().__init__(wrapped.num_features, wrapped.eps, wrapped.momentum, wrapped.affine)
        self.num_splits = num_splits
        self.is_sorted = is_sorted
        self.weight = wrapped.weight
        self.bias = wrapped.bias
        self.running_mean = wrapped.running_mean
        self.running_var = wrapped.running_var
        self.num_batches_tracked = wrapped.num_batches_tracked
        # A layer of timm also has dropout and an activation.
        self.after: nn.Module | None = None
        if hasattr(wrapped, "act"):
            self.after = nn.Sequential(wrapped.drop, wrapped.act)

    def forward(self, input: Tensor) -> Tensor:
        output = self.normalize_groups(input)
        if self.after is not None:
            output = self.after(output)
        return output

    def normalize_groups(self, input: Tensor) -> Tensor:
        """Return the normalised batch, without dropout and activation."""
        if not self.training:
            return self.normalize(input, self.momentum, is_training=False)
        check_groups(len(input), self.num_splits)
        if torch.compiler.is_compiling():
            return self.forward_compiled(input)
        if self.is_sorted:
            return self.forward_sorted(input)
        return self.forward_interleaved(input)

    def normalize(self, input: Tensor, momentum: float, is_training: bool) -> Tensor:
        """Return ordinary BatchNorm of the input with this layer's parameters and statistics."""
        return F.batch_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            is_training,
            momentum,
            self.eps,
        )

    def forward_interleaved(self, input: Tensor) -> Tensor:
        """Normalise a batch in its own order, seen as N / S samples of S * C channels."""
        splits = self.num_splits
        grouped = input.reshape(-1, splits * self.num_features, *input.shape[2:])
        mean = self.running_mean.repeat(splits)
        variance = self.running_var.repeat(splits)
        weight = bias = None
        if self.affine:
            weight = self.weight.repeat(splits)
            bias = self.bias.repeat(splits)
        output = F.batch_norm(grouped, mean, variance, weight, bias, True, self.momentum, self.eps)
        self.running_mean.copy_(mean.view(splits, -1).mean(dim=0))
        self.running_var.copy_(variance.view(splits, -1).mean(dim=0))
        return output.view_as(input)

    def forward_sorted(self, input: Tensor) -> Tensor:
        """Normalise a batch that is sorted by group, group by group."""
        outputs = []
        for number, group in enumerate(input.chunk(self.num_splits), start=1):
            # With this momentum for each group the running statistics end where `momentum` and the
            # mean over all groups would have brought them.
            num_later = self.num_splits - number
            momentum = self.momentum / (self.num_splits - num_later * self.momentum)
            outputs.append(self.normalize(group, momentum, is_training=True))
        return torch.cat(outputs)

    def forward_compiled(self, input: Tensor) -> Tensor:
        """Normalise by the formula, from which torch.compile makes one kernel for all groups."""
        finer = torch.promote_types(input.dtype, torch.float32)
        if self.is_sorted:
            groups = input.unflatten(0, (self.num_splits, -1)).to(finer)  # (S, N / S, C, ...)
            sample_dim = 1
        else:
            groups = input.unflatten(0, (-1, self.num_splits)).to(finer)  # (N / S, S, C, ...)
            sample_dim = 0
        dims = (sample_dim, *range(3, groups.ndim))
        variance, mean = torch.var_mean(groups, dims, correction=0, keepdim=True)
        normalized = (groups - mean) * torch.rsqrt(variance + self.eps)
        count = groups.numel() // mean.numel()
        unbiased = variance * (count / (count - 1))
        for running, own in ((self.running_mean, mean), (self.running_var, unbiased)):
            mean_of_groups = own.detach().view(self.num_splits, -1).mean(dim=0)
            running.lerp_(mean_of_groups.to(running.dtype), self.momentum)
        if self.weight is not None:
            per_channel = (-1, *[1] * (groups.ndim - 3))
            weight = self.weight.view(per_channel)
            normalized = normalized * weight + self.bias.view(per_channel)
        return normalized.to(input.dtype).flatten(0, 1)


def check_groups(num_images: int, num_splits: int) -> None:
    """Raise InputError if a batch cannot be split into groups of one size."""
    if num_images % num_splits:
        raise InputError(
            f"method.batch_norm_splits={num_splits} does not divide the {num_images} images that "
            "one device gets at once; change one of the two numbers"
        )


def sorted_by_group(rows: Tensor, num_splits: int) -> Tensor:
    """Return the rows (N, ...) sorted by group: 0, S, 2 S, ..., then 1, S + 1, ..., and so on."""
    check_groups(len(rows), num_splits)
    return rows.unflatten(0, (-1, num_splits)).transpose(0, 1).flatten(0, 1)


def in_batch_order(rows: Tensor, num_splits: int) -> Tensor:
    """Undo `sorted_by_group`."""
    return rows.unflatten(0, (num_splits, -1)).transpose(0, 1).flatten(0, 1)


def split_batch_norm(module: nn.Module, num_splits: int, is_sorted: bool = False) -> None:
    """Replace every BatchNorm in `module` by a `SplitBatchNorm` that shares its tensors."""
    for name, child in module.named_children():
        if isinstance(child, BATCH_NORMS) and not isinstance(child, SplitBatchNorm):
            setattr(module, name, SplitBatchNorm(child, num_splits, is_sorted))
        else:
            split_batch_norm(child, num_splits, is_sorted)


def sync_batch_norm(module: nn.Module) -> None:
    """Let every BatchNorm in `module` share its statistics between all devices."""
    has_activations = False
    for layer in module.modules():
        if isinstance(layer, BATCH_NORMS) and hasattr(layer, "act"):
            has_activations = True
    if has_activations:
        # PyTorch's function would drop the activations in layers of timm.
        from timm.layers.norm_act import convert_sync_batchnorm

        convert_sync_batchnorm(module)
    else:
        nn.SyncBatchNorm.convert_sync_batchnorm(module)


def batch_norm_mode(
    mode: str, encoder: nn.Module, num_devices: int, device_type: str, negatives: str = "queue"
) -> str:
    """Return the mode that a training uses: ``plain``, ``shuffle``, ``split`` or ``sync``.

    Args:
        mode: the setting, one of these or ``auto``.
        encoder: either encoder; the two have the same layers.
        num_devices: how many devices train together.
        device_type: of these devices, ``cpu`` or ``cuda``.
        negatives: where negatives come from, ``queue`` or ``batch``.

    Raises:
        InputError: the setting is ``sync``, for several CPU processes.
    """
    is_alone = num_devices == 1
    if not has_batch_norm(encoder) or (mode == "sync" and is_alone):
        return "plain"
    if mode == "sync" and device_type == "cpu":
        raise InputError(
            "method.batch_norm=sync: statistics are shared between GPUs only, and these are "
            f"{num_devices} CPU processes; expected auto, plain, shuffle or split, or "
            "trainer.devices=1"
        )
    if mode != "auto":
        return mode
    if negatives == "batch":
        if is_alone or device_type == "cpu":
            return "plain"
        return "sync"
    if is_alone:
        return "split"
    return "shuffle"


def log_batch_norm(
    mode: str, encoder: nn.Module, num_devices: int, negatives: str = "queue"
) -> None:
    """Log in one line which mode a training uses and what that means.

    Args:
        mode: from `batch_norm_mode`; the other arguments are those of that function.
    """
    if not has_batch_norm(encoder):
        log.info("batch norm: the encoder has none, so the keys need no shuffling")
    elif negatives == "batch" and mode == "plain" and num_devices > 1:
        log.warning(
            "batch norm: plain, which leaks: a query can recognise the keys of its own device; "
            "set method.batch_norm=sync on GPUs, or method.batch_norm=shuffle on CPUs"
        )
    elif negatives == "batch":
        log.info("batch norm: %s, so that all keys of a batch have the same statistics", mode)
    elif mode in ("plain", "sync") or (mode == "shuffle" and num_devices == 1):
        log.warning(
            "batch norm: %s, which leaks the positive of each query; set method.batch_norm=auto",
            mode,
        )
    else:
        log.info("batch norm: %s, so that it cannot leak the positive of each query", mode)
