"""Momentum Contrast as one algorithm with a few switches.

The switches make MoCo v1 (arXiv 1911.05722), v2 (2003.04297), v3 (2104.02057), MoBY (2105.04553)
and DenseCL (2011.09157). Shapes use N for the batch of this device, M for the batch of all devices,
C for the width of an embedding and K for the size of a queue.
"""

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco.errors import InputError
from moco.methods.batch_norm import (
    batch_norm_mode,
    in_batch_order,
    log_batch_norm,
    sorted_by_group,
    split_batch_norm,
    sync_batch_norm,
)
from moco.methods.blocked_loss import efficient_info_nce
from moco.methods.dense_decoder import build_dense_decoder
from moco.methods.dense_matches import check_rule, match_cells, placements_of
from moco.methods.key_queue import KeyQueue
from moco.methods.local_queries import local_crops_of, mean_with_local, running_statistics_kept
from moco.methods.losses import Groups, in_batch_info_nce, matched_cells
from moco.methods.momentum import key_momentum_at, update_key_encoder
from moco.methods.neighbours import (
    NeighbourTerms,
    check_neighbours,
    nearest_rows,
    neighbour_info_nce,
)
from moco.models.backbones import CHECKED_SIZE, build_backbone
from moco.models.contract import check_contract, check_feature_maps
from moco.models.encoder import (
    Encoded,
    Encoder,
    disable_stochastic_depth,
    is_channels_last,
    per_view,
)
from moco.models.heads import DenseProjector, build_head
from moco.targets import GIVEN
from moco.training.distributed.collectives import Shuffle, all_gather, rank
from moco.training.optimizers import build_optimizer
from moco.training.schedules import learning_rate_at

OPTIMIZER = {"name": "sgd", "lr": 0.03, "weight_decay": 1e-4, "schedule": "constant"}
"""What `MoCo` takes for what its argument `optimizer` does not say."""


class MoCo(pl.LightningModule):
    """A query encoder, a momentum key encoder, and InfoNCE against the keys of a queue or batch.

    The arguments are plain numbers, strings and dicts. They are the hyperparameters of a
    checkpoint, from which the module is rebuilt.

    Args:
        backbone: a module under the contract of `moco.models.contract`, the name of a backbone, or
            the arguments of `build_backbone`.
        optimizer: arguments of `build_optimizer` and `learning_rate_at`; `OPTIMIZER` has defaults.
        projector: arguments of `build_head`, from feature to embedding; by default two layers. The
            key encoder has a copy.
        predictor: arguments of `build_head`, from embedding to embedding, for queries alone (MoBY).
            By default there is none.
        embedding_dim: C.
        negatives: ``queue``, or ``batch`` for the other keys of the step on all devices (MoCo v3).
        queue_size: K; None without a queue.
        queue_start: ``random`` or ``empty``, see `KeyQueue`.
        num_queues: 1, or 2 for a queue of each view's keys, so that queries meet negatives that
            were augmented as their own keys were (MoBY). Two need `symmetric`.
        temperature: T.
        key_momentum: m at the first step, see `key_momentum_at`.
        key_momentum_schedule: ``constant`` or ``cosine``.
        key_momentum_end: m at the last step, for ``cosine``.
        symmetric: each view serves as query and as key. The first direction has the first view as
            query, the second direction has the second view.
        symmetric_reduction: ``sum`` or ``mean`` of the two directions' losses.
        loss_times_2t: multiply the loss by 2T, so that T does not change the size of the gradient
            (MoCo v3).
        batch_norm: see `moco.methods.batch_norm`.
        batch_norm_splits: groups of split BatchNorm.
        dense_weight: w of DenseCL: the loss is (1 - w) * global + w * dense, and 0 is MoCo. The
            dense term has its own projector, as wide as the other one, and its own queues, but no
            predictor.
        dense_grid: side of the dense term's grid, cells, see `DenseProjector`.
        dense_match: which cells of the key are positives of the query's cells: ``feature``,
            ``location`` or ``both``, see `moco.methods.dense_matches`. All but ``feature`` need
            batches with ``placements``.
        local_crops: how many small crops of each image are queries beside the full view, see
            `moco.methods.local_queries`. A batch then has ``local_crops``.
        mask_own_group: leave out the negatives whose image is of the same group as the query's. A
            batch then has ``groups``, (N,) int64 with -1 for an unknown group, and the queues keep
            the group of each key.
        neighbours: k, how many of the queue's keys that are nearest to a query's key are positives
            too, see `moco.methods.neighbours`. They are once the queue is full. 0: none.
        neighbours_weight: w, the loss of a direction is (1 - w) * key + w * neighbours.
        neighbours_from_epoch: the first epoch, counted from 0, with neighbours.
        decoder: ``fpn``: the dense term's cells are those of an FPN on all feature maps, which
            `moco.segment` can start from. None: those of the last feature map.
        decoder_channels: width of the decoder; None is 256.

    Raises:
        InputError: switches contradict each other, the backbone is unknown, it does not keep the
            contract, or it cannot feed the decoder.

    Example:
        >>> method = moco.MoCo("timm:convnext_tiny", queue_size=4096)
        >>> Trainer(max_epochs=100).fit(method, loader)  # of pairs of views (N, 3, H, W)
    """

    def __init__(
        self,
        backbone: nn.Module | str | dict[str, Any],
        optimizer: dict[str, Any] | None = None,
        projector: dict[str, Any] | None = None,
        predictor: dict[str, Any] | None = None,
        embedding_dim: int = 128,
        negatives: str = "queue",
        queue_size: int | None = 65536,
        queue_start: str = "random",
        num_queues: int = 1,
        temperature: float = 0.2,
        key_momentum: float = 0.999,
        key_momentum_schedule: str = "constant",
        key_momentum_end: float = 1.0,
        symmetric: bool = False,
        symmetric_reduction: str = "sum",
        loss_times_2t: bool = False,
        batch_norm: str = "auto",
        batch_norm_splits: int = 8,
        dense_weight: float = 0.0,
        dense_grid: int = 7,
        mask_own_group: bool = False,
        dense_match: str = "feature",
        local_crops: int = 0,
        neighbours: int = 0,
        neighbours_weight: float = 0.5,
        neighbours_from_epoch: int = 0,
        decoder: str | None = None,
        decoder_channels: int | None = None,
    ) -> None:
        super().__init__()
        net, backbone = built(backbone)
        optimizer = {**OPTIMIZER, **(optimizer or {})}
        projector = projector or {}
        predictor = predictor or {"num_layers": 0}
        self.save_hyperparameters(logger=False)
        check_switches(negatives, queue_size, num_queues, symmetric, dense_weight)
        check_rule(dense_match, dense_weight)
        check_neighbours(neighbours, negatives, queue_size)
        self.temperature = temperature
        # Added to the step that the schedules see. A run that resumes with other images needs it.
        self.schedule_offset = 0
        self.symmetric = symmetric
        self.dense_weight = dense_weight
        self.dense_match = dense_match
        self.num_local_crops = local_crops
        self.mask_own_group = mask_own_group
        self.num_neighbours = neighbours
        self.batch_norm = "plain"
        # Whether the encoders take batches sorted by group, see `SplitBatchNorm`.
        self.sorts_by_group = False

        self.query_encoder = Encoder(net, build_head(net.feature_dim, embedding_dim, **projector))
        dense_decoder = build_dense_decoder(decoder, decoder_channels, net, dense_weight)
        self.query_encoder.decoder = dense_decoder
        if dense_weight > 0:
            hidden_dim = projector.get("hidden_dim")
            check_feature_maps(net, f"method.dense_weight={dense_weight}")
            map_dim = net.feature_map_dims[-1]
            if dense_decoder is not None:
                map_dim = dense_decoder.width
            dense_projector = DenseProjector(map_dim, embedding_dim, hidden_dim, dense_grid)
            self.query_encoder.dense_projector = dense_projector
        self.key_encoder = copy.deepcopy(self.query_encoder).requires_grad_(False)
        disable_stochastic_depth(self.key_encoder)
        self.predictor = build_head(embedding_dim, embedding_dim, **predictor)

        # Without a queue there is no size, and none is built.
        new_queue = partial(KeyQueue, queue_size or 0, embedding_dim, queue_start, mask_own_group)
        has_two = num_queues == 2
        is_dense = dense_weight > 0
        self.queue = new_queue() if negatives == "queue" else None
        self.reverse_queue = new_queue() if has_two else None
        self.dense_queue = new_queue() if is_dense else None
        self.reverse_dense_queue = new_queue() if is_dense and has_two else None

    # The algorithm.

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        """Return the loss of a batch of view pairs, and what the monitors look at.

        Returns:
            ``loss``, and of the last direction ``query`` and ``key`` (N, C), the ``key_view``
            (N, 3, H, W) that the keys are of, and the ``negatives`` that the loss compared them
            with: the keys of the queue (K, C), or those of the batch of all devices (M, C), the
            positives among them. ``of_groups`` has the groups of both, or None. With the dense
            term also its two parts, ``loss_global`` and ``loss_dense``; with local crops the loss
            of the full views and that of the local crops, ``loss_full`` and ``loss_local``; with
            neighbours the two terms of the last direction, ``loss_key`` and ``loss_neighbours``.
        """
        first, second = views_of(batch)  # (N, 3, H, W) each
        groups = groups_of(batch) if self.mask_own_group else None  # (N,)
        if self.symmetric:
            queries = self.encode_queries([first, second])  # (N, C) unit norm each
            keys = self.encode_keys([second, first])  # (N, C) unit norm each, no gradient
            key_view = first
        else:
            queries = self.encode_queries([first])
            keys = self.encode_keys([second])
            key_view = second
        local_queries = self.encode_local_queries(batch)  # (N, C) unit norm each

        losses = []
        local_losses = []  # of each direction's local crops
        terms = None
        if self.queue is not None:
            for query, key, queue in zip(queries, keys, self.queues, strict=True):
                negatives = queue.negatives()  # (K, C) unit norm
                of_groups = groups_with(groups, queue)
                rows = (query.embedding, key.embedding, negatives)
                if self.uses_neighbours(queue):
                    terms = self.neighbour_terms(*rows, of_groups)
                    loss = terms.weighted_mean(self.hparams["neighbours_weight"])
                else:
                    loss = efficient_info_nce(*rows, self.temperature, of_groups)
                losses.append(loss)
                for local in local_queries:
                    loss = efficient_info_nce(
                        local, key.embedding, negatives, self.temperature, of_groups
                    )
                    local_losses.append(loss)
            # After the losses: a positive is never its own negative.
            self.enqueue([key.embedding for key in keys], self.queues, groups)
        else:
            for query, key in zip(queries, keys, strict=True):
                negatives = all_gather(key.embedding)  # (M, C) unit norm
                of_groups = groups_of_all(groups)
                loss = in_batch_info_nce(
                    query.embedding, negatives, self.temperature, rank(), of_groups
                )
                losses.append(loss)
                for local in local_queries:
                    loss = in_batch_info_nce(local, negatives, self.temperature, rank(), of_groups)
                    local_losses.append(loss)

        outputs = {
            "loss": self.total_loss(losses),
            "query": queries[-1].embedding.detach(),
            "key": keys[-1].embedding,
            "key_view": key_view,
            "negatives": negatives,
            "of_groups": of_groups,
        }
        if local_queries:
            self.add_local_term(outputs, local_losses)
        if terms is not None:
            outputs["loss_key"] = terms.of_key.detach()
            outputs["loss_neighbours"] = terms.of_neighbours.detach()
        if self.dense_weight > 0:
            placements = placements_of(batch, self.dense_match)
            self.add_dense_term(outputs, self.dense_losses(queries, keys, groups, placements))
        return outputs

    def uses_neighbours(self, queue: KeyQueue) -> bool:
        """Whether the nearest keys of a queue are positives in this step.

        They are not before the queue is full, because its start is random or empty.
        """
        is_full = queue.num_filled == len(queue.keys)
        has_begun = self.current_epoch >= self.hparams["neighbours_from_epoch"]
        return self.num_neighbours > 0 and is_full and has_begun

    def neighbour_terms(
        self, query: Tensor, key: Tensor, negatives: Tensor, groups: Groups | None
    ) -> NeighbourTerms:
        """Return the losses of one direction for the keys and for their nearest negatives.

        Args:
            query: (N, C), unit norm, with gradient.
            key: (N, C), unit norm.
            negatives: (K, C), unit norm, the keys of a full queue.
            groups: see `info_nce`.
        """
        neighbours = nearest_rows(key, negatives, self.num_neighbours)  # (N, k)
        return neighbour_info_nce(query, key, negatives, neighbours, self.temperature, groups)

    def dense_losses(
        self,
        queries: list[Encoded],
        keys: list[Encoded],
        groups: Tensor | None = None,
        placements: tuple[Tensor, Tensor] | None = None,
    ) -> list[Tensor]:
        """Return the dense loss of each direction; advances the dense queues.

        A query's cell is to find its match among the cells of its key, see `match_cells`. Its
        negatives are the mean dense embeddings of other images. Source: DenseCL, arXiv 2011.09157,
        section 3.

        Args:
            groups: (N,) of the images, to leave out negatives of a query's own group.
            placements: (N, 2, 3) of the first and of the second view, to match cells by location.
        """
        losses = []
        pooled = []
        for query, key, queue in zip(queries, keys, self.dense_queues, strict=True):
            assert query.cells is not None
            assert key.cells is not None
            cells = query.cells.embeddings.flatten(0, 1)  # (N * S, C)
            negatives = queue.negatives()  # (K, C)
            of_cells = None
            if groups is not None:
                num_cells = query.cells.embeddings.shape[1]
                of_cells = groups.repeat_interleave(num_cells)  # (N * S,)
            of_groups = groups_with(of_cells, queue)
            by_rule = []
            for matches in match_cells(self.dense_match, query.cells, key.cells, placements):
                positives = matched_cells(key.cells.embeddings, matches.cells)  # (N, S, C)
                positives = positives.flatten(0, 1)  # (N * S, C)
                contrast = partial(
                    efficient_info_nce, cells, positives, negatives, self.temperature, of_groups
                )
                if matches.weights is None:
                    by_rule.append(contrast())
                else:
                    by_rule.append(contrast(weights=matches.weights))
            losses.append(torch.stack(by_rule).mean())
            pooled.append(key.cells.pooled)  # (N, C) unit norm
            if placements is not None:
                placements = placements[::-1]  # the next direction exchanges the views
        self.enqueue(pooled, self.dense_queues, groups)
        return losses

    def add_local_term(self, outputs: dict[str, Any], losses: list[Tensor]) -> None:
        """Replace the loss of a step by its mean with the losses of the local crops.

        Args:
            losses: of the local crops, direction by direction.
        """
        loss_full = outputs["loss"]
        count = self.num_local_crops
        # The losses of one local crop in all directions make one loss, as those of a view do.
        of_crops = [self.total_loss(losses[number::count]) for number in range(count)]
        outputs["loss"] = mean_with_local(loss_full, of_crops)
        outputs["loss_full"] = loss_full.detach()
        outputs["loss_local"] = torch.stack(of_crops).mean().detach()

    def add_dense_term(self, outputs: dict[str, Any], losses: list[Tensor]) -> None:
        """Replace the loss of a step by its weighted mean with the dense loss."""
        loss_global = outputs["loss"]
        loss_dense = self.total_loss(losses)
        weight = self.dense_weight
        outputs["loss"] = (1 - weight) * loss_global + weight * loss_dense
        outputs["loss_global"] = loss_global.detach()
        outputs["loss_dense"] = loss_dense.detach()

    def total_loss(self, losses: list[Tensor]) -> Tensor:
        """Return the loss of a step, from one loss for each direction."""
        stacked = torch.stack(losses)
        total = stacked.sum()
        if self.hparams["symmetric_reduction"] == "mean":
            total = stacked.mean()
        if self.hparams["loss_times_2t"]:
            total = 2 * self.temperature * total
        return total

    def enqueue(
        self, keys: list[Tensor], queues: list[KeyQueue], groups: Tensor | None = None
    ) -> None:
        """Put each direction's keys (N, C), of all devices, into that direction's queue.

        The last direction's keys, which are of the first view, go first: so it is in the official
        notebook, which has one queue for both.

        Args:
            groups: (N,) of the images, for queues that keep them.
        """
        gathered_groups = None
        if groups is not None:
            gathered_groups = all_gather(groups)
        for direction in reversed(range(len(keys))):
            queues[direction].enqueue(all_gather(keys[direction]), gathered_groups)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Set the learning rate, take the step, then update the key encoder.

        The official codes update the key encoder at the beginning of step t, with m(t) and the
        query weights that step t - 1 left. Here the same update ends step t - 1. All keys are
        encoded with the same weights as there, and accumulated gradients do not make it happen
        twice.
        """
        step = self.trainer.global_step
        for group in optimizer.param_groups:
            group["lr"] = self.learning_rate_at(step)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        update_key_encoder(self.key_encoder, self.query_encoder, self.key_momentum_at(step + 1))

    # Encoding.

    def encode_queries(self, views: Sequence[Tensor]) -> list[Encoded]:
        """Return for each view (N, 3, H, W) its embeddings (N, C) and cells, all of unit norm."""
        return self.predicted(self.embed(self.query_encoder, views))

    def predicted(self, encoded: list[Encoded]) -> list[Encoded]:
        """Return what the query encoder made of each view as queries, of unit norm."""
        predictions = per_view(self.predictor, [view.embedding for view in encoded])
        queries = []
        for view, prediction in zip(encoded, predictions, strict=True):
            queries.append(Encoded(prediction, view.cells).map(unit_norm))
        return queries

    def encode_local_queries(self, batch: Any) -> list[Tensor]:
        """Return the embeddings (N, C) of each local crop of a batch, unit norm.

        BatchNorm normalises each local crop's batch by itself, in the mode of the method, and keeps
        the running statistics of the full views.
        """
        if self.num_local_crops == 0:
            return []
        crops = local_crops_of(batch, self.num_local_crops)
        with running_statistics_kept(self.query_encoder, self.predictor):
            encoded = self.embed(self.query_encoder, crops, has_cells=False)
            return [query.embedding for query in self.predicted(encoded)]

    @torch.no_grad()
    def encode_keys(self, views: Sequence[Tensor]) -> list[Encoded]:
        """Return for each direction's key view (N, 3, H, W) its embeddings and cells, unit norm.

        There is no gradient and no predictor. If BatchNorm would leak, the views are shuffled on
        the way. With `keys_follow_the_views` the encoder sees the last direction's view first.
        """
        order = 1
        if self.keys_follow_the_views:
            order = -1
        views = views[::order]
        if self.batch_norm not in ("shuffle", "split"):
            keys = [view.map(unit_norm) for view in self.embed(self.key_encoder, views)]
            return keys[::order]
        shuffles = [Shuffle(len(view), view.device) for view in views]
        shuffled = []
        for shuffle, view in zip(shuffles, views, strict=True):
            shuffled.append(shuffle.shuffled(view))
        keys = []
        for shuffle, encoded in zip(shuffles, self.embed(self.key_encoder, shuffled), strict=True):
            keys.append(encoded.map(unit_norm).map(shuffle.unshuffled))
        return keys[::order]

    @property
    def keys_follow_the_views(self) -> bool:
        """Whether the key encoder sees the first view before the second one.

        The order decides how BatchNorm's running statistics move. MoBY and solo-learn's v2+, which
        have two queues, and MoCo v3, which has none, encode the first view's keys first. The
        official notebook has one queue and encodes the second view's keys first.
        """
        has_one_queue = self.queue is not None and self.reverse_queue is None
        return self.symmetric and not has_one_queue

    def embed(
        self, encoder: Encoder, views: Sequence[Tensor], *, has_cells: bool = True
    ) -> list[Encoded]:
        """Return `Encoder.embed`, in the batch order that split BatchNorm needs on the way."""
        if not self.sorts_by_group:
            return encoder.embed(views, has_cells=has_cells)
        num_splits = self.hparams["batch_norm_splits"]
        views = [sorted_by_group(view, num_splits) for view in views]
        encoded = encoder.embed(views, has_cells=has_cells)
        undo = partial(in_batch_order, num_splits=num_splits)
        return [view.map(undo) for view in encoded]

    @property
    def queues(self) -> list[KeyQueue]:
        """For each direction the queue that has its negatives and takes its keys; empty without."""
        return self.per_direction(self.queue, self.reverse_queue)

    @property
    def dense_queues(self) -> list[KeyQueue]:
        """The same for the dense term."""
        return self.per_direction(self.dense_queue, self.reverse_dense_queue)

    def per_direction(self, queue: KeyQueue | None, reverse: KeyQueue | None) -> list[KeyQueue]:
        """Return a queue for each direction, which is the same one if there is no reverse queue."""
        if queue is None:
            return []
        if not self.symmetric:
            return [queue]
        return [queue, reverse or queue]

    # What Lightning, callbacks and programs ask for.

    def setup(self, stage: str) -> None:
        """Install the batch-norm mode. Until then, and in evaluation, BatchNorm is PyTorch's."""
        num_devices = self.trainer.world_size
        negatives = self.hparams["negatives"]
        mode = batch_norm_mode(
            self.hparams["batch_norm"],
            self.key_encoder,
            num_devices,
            self.trainer.strategy.root_device.type,
            negatives,
        )
        log_batch_norm(mode, self.key_encoder, num_devices, negatives)
        self.install_batch_norm(mode)

    def install_batch_norm(self, mode: str) -> None:
        """Change the encoders to a mode of `batch_norm_mode`, for their present memory format."""
        self.batch_norm = mode
        if mode == "split":
            num_splits = self.hparams["batch_norm_splits"]
            self.sorts_by_group = is_channels_last(self.query_encoder.parameters())
            for encoder in (self.query_encoder, self.key_encoder):
                split_batch_norm(encoder, num_splits, self.sorts_by_group)
            # The predictor's rows are in the order of the batch again.
            split_batch_norm(self.predictor, num_splits)
        elif mode == "sync":
            for module in (self.query_encoder, self.key_encoder, self.predictor):
                sync_batch_norm(module)

    @property
    def has_one_view_per_encoder(self) -> bool:
        """Whether a step takes one view through each encoder, and only the embedding from it."""
        return not self.symmetric and not self.dense_weight and not self.num_local_crops

    def compile_encoders(self, options: dict[str, Any]) -> None:
        """Let training run the encoders and the predictor by torch.compile.

        The loss is left out: it takes less time than its two matrix products, see
        docs/performance.md.

        Args:
            options: of torch.compile.
        """
        for encoder in (self.query_encoder, self.key_encoder):
            encoder.compile_training(options)
        self.predictor.compile(dynamic=False, options=options)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self, **self.hparams["optimizer"])

    @property
    def steps_per_epoch(self) -> float:
        """Optimizer steps in one epoch of the running training; inf for a loader without length."""
        batches = self.trainer.num_training_batches
        if math.isinf(batches):
            return math.inf
        return math.ceil(batches / self.trainer.accumulate_grad_batches)

    @property
    def num_steps(self) -> float:
        """Optimizer steps in the whole running training; inf if nothing says how many.

        Raises:
            InputError: nothing says it, and a schedule needs it.
        """
        steps = self.trainer.estimated_stepping_batches
        if steps < 0:  # Lightning's word for a loader without length and no max_steps
            steps = math.inf
        schedules = self.hparams["optimizer"]["schedule"], self.hparams["key_momentum_schedule"]
        if math.isinf(steps) and schedules != ("constant", "constant"):
            raise InputError(
                "a schedule needs the number of steps, and the loader has no length: "
                "give the Trainer max_steps, or constant schedules"
            )
        return steps

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of an optimizer step, counted from 0."""
        settings = self.hparams["optimizer"]
        step += self.schedule_offset
        return learning_rate_at(step, self.num_steps, self.steps_per_epoch, **settings)

    def key_momentum_at(self, step: int) -> float:
        """Return m of an optimizer step, counted from 0."""
        return key_momentum_at(
            step + self.schedule_offset,
            self.num_steps,
            self.hparams["key_momentum"],
            self.hparams["key_momentum_end"],
            self.hparams["key_momentum_schedule"],
        )

    def loss_of_chance(self, num_negatives: int) -> float:
        """Return the loss of queries that cannot tell their key from the negatives.

        It is log(1 + `num_negatives`) for each direction, in the unit of the training's loss.
        Neighbours do not count as negatives.
        """
        if self.queue is not None and self.uses_neighbours(self.queue):
            num_negatives -= self.num_neighbours
        num_directions = 1
        if self.symmetric:
            num_directions = 2
        chance = torch.tensor(math.log(1 + num_negatives))
        return float(self.total_loss([chance] * num_directions))


def built(backbone: nn.Module | str | dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return a backbone and the arguments of `build_backbone` that a checkpoint keeps of it.

    Of a module these are its class, which a checkpoint names but cannot build again.
    """
    if isinstance(backbone, nn.Module):
        kind = type(backbone)
        name = f"{kind.__module__}:{kind.__qualname__}"
        return check_contract(backbone, name, CHECKED_SIZE), {"name": GIVEN, "target": name}
    if isinstance(backbone, str):
        backbone = {"name": backbone}
    return build_backbone(**backbone), backbone


def views_of(batch: Any) -> tuple[Tensor, Tensor]:
    """Return the two views (N, 3, H, W) of a batch.

    Args:
        batch: with ``views``, or the two views, or the two views with labels: ``(views, labels)``.

    Raises:
        InputError: it is none of these.
    """
    if hasattr(batch, "views"):
        first, second = batch.views
        return first, second
    views = batch
    if isinstance(views, (list, tuple)) and len(views) == 2 and not isinstance(views[0], Tensor):
        views = views[0]
    if not isinstance(views, (list, tuple)) or len(views) != 2:
        raise InputError("a batch of MoCo has two views of the images, (N, 3, H, W) each")
    return views[0], views[1]


def groups_of(batch: Any) -> Tensor:
    """Return the groups (N,) int64 of the images of a batch.

    Raises:
        InputError: the batch has none.
    """
    groups = getattr(batch, "groups", None)
    if groups is None:
        raise InputError(
            "method.mask_own_group=true: the batches have no groups; data.group says which images "
            "belong together, or a batch of your own has a field groups, (N,) int64"
        )
    return groups


def groups_with(groups: Tensor | None, queue: KeyQueue) -> Groups | None:
    """Return the groups of the queries beside those of a queue's negatives; None without groups."""
    if groups is None:
        return None
    return Groups(groups, queue.groups_of_negatives())


def groups_of_all(groups: Tensor | None) -> Groups | None:
    """Return the groups of the queries beside those of all devices' keys; None without groups."""
    if groups is None:
        return None
    return Groups(groups, all_gather(groups))


def unit_norm(rows: Tensor) -> Tensor:
    """Return rows (..., C) scaled to unit norm, in float32 whatever the precision."""
    return F.normalize(rows.float(), dim=-1)


def check_switches(
    negatives: str, queue_size: int | None, num_queues: int, symmetric: bool, dense_weight: float
) -> None:
    """Raise InputError if the switches contradict each other."""
    if num_queues == 2 and not symmetric:
        raise InputError(
            "method.num_queues=2: the second queue is for the second direction; "
            "add method.symmetric=true"
        )
    if negatives == "queue" and queue_size is None:
        raise InputError(
            "method.queue_size=null: method.negatives=queue needs a size; "
            "expected a number of at least 1"
        )
    if negatives == "batch" and (queue_size, num_queues, dense_weight) != (None, 1, 0):
        raise InputError(
            f"method.negatives=batch has no queue: method.queue_size={queue_size}, "
            f"method.num_queues={num_queues}, method.dense_weight={dense_weight}; "
            "expected null, 1 and 0, or method.negatives=queue"
        )
