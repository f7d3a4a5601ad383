"""The settings of the programs that start from a file of weights: evaluate, embed and export.

Settings that nobody gives come from the run that made the checkpoint.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Optional

from omegaconf import MISSING

from moco.config.data import DataConfig, DisplayConfig, EmbedDataConfig, EvaluateDataConfig
from moco.config.linear import LinearConfig, LinearOfficialConfig
from moco.config.settings import setting
from moco.config.train import AugmentationConfig, BackboneConfig, MonitorConfig
from moco.errors import InputError
from moco.targets import check_named

# Dense evaluation reads masks, the others read classes.
CLASS_DATA = (
    "crop_ratio",
    "target",
    "options",
    "num_images",
    "image_column",
    "label_column",
    "image_key",
    "label_key",
    "labels",
    "held_out",
    "pages",
    "band_files",
    "tile",
)
# They describe one dataset, and not another one that is measured.
OF_ONE_DATASET = (
    "root",
    "target",
    "options",
    "labels",
    "image_key",
    "label_key",
    "band_files",
    "tile",
)
# The settings of `EvaluationConfig` and `EvaluateDataConfig` that only some kinds of measurement
# have, by kind.
KINDS: dict[str, tuple[str, ...]] = {
    "knn": (
        *CLASS_DATA,
        "feature",
        "cache",
        "num_neighbors",
        "temperature",
        "index",
        "num_probes",
        "ef_search",
        "images_per_class",
        "num_draws",
        "label_free",
        "plots",
        "map",
    ),
    "dense": (
        "ignore_index",
        "num_neighbors",
        "temperature",
        "maps",
        "bank_size",
        "sampling",
        "seed",
    ),
    "label_free": (*CLASS_DATA, "feature", "cache", "plots", "map"),
    "segmentation": ("ignore_index", "inference", "part", "plots"),
    "linear": (*CLASS_DATA, "feature", "cache", "linear"),
    "linear_official": (*CLASS_DATA, "feature", "cache", "linear_official"),
}


@dataclass
class EvaluationConfig:
    """What is measured, and how. A null takes the value of the run that made the checkpoint."""

    name: str = setting("knn", choices=tuple(KINDS))
    """The kind of the measurement. ``evaluation=NAME`` sets it together with its numbers."""
    encoder: str = setting("query", choices=("key", "query"))
    """Which of the checkpoint's two encoders: the one that was trained, or its moving average."""
    num_neighbors: Optional[int] = setting(None, at_least=1)
    """Neighbours that vote (k)."""
    temperature: Optional[float] = setting(None, above=0)
    """Temperature T of the votes, which weigh exp(similarity / T)."""
    feature: Optional[str] = setting(None, choices=("backbone", "embedding"))
    """What is measured: the output of the backbone, or of the projector behind it."""
    batch_size: int = setting(256, at_least=1)
    """Images per forward pass."""
    cache: bool = True
    """Keep the features for the next evaluation, in the checkpoint's run folder. See
    ``docs/evaluation.md``."""
    index: str = "flat"
    """How faiss searches the bank. flat: exactly. Otherwise a string of ``faiss.index_factory``,
    such as HNSW32."""
    num_probes: int = setting(32, at_least=1)
    """Number of cells of an IVF index that are searched."""
    ef_search: int = setting(256, at_least=1)
    """Number of candidates that a search in an HNSW index keeps."""
    images_per_class: list[int] = field(default_factory=list)
    """Also measure with a bank of this many images of each class. One measurement per number."""
    num_draws: int = setting(5, at_least=2)
    """Number of random choices of these images. Mean and spread are taken over them."""
    maps: list[int] = field(default_factory=lambda: [4])
    """dense: which feature maps of the backbone are used, from 1 (the finest) to 4. Several are
    joined at the size of the finest."""
    bank_size: int = setting(50_000, at_least=1)
    """dense: number of patches in the bank. Each training image gives the same share of them."""
    sampling: str = setting("balanced", choices=("balanced", "uniform"))
    """dense: how the patches of an image are drawn. balanced: its classes take turns. uniform: all
    patches have the same chance."""
    seed: int = setting(0, at_least=0, at_most=2**32 - 1)
    """dense: seed of that draw."""
    linear: LinearConfig = field(default_factory=LinearConfig)
    linear_official: LinearOfficialConfig = field(default_factory=LinearOfficialConfig)
    label_free: bool = True
    """Also measure what needs no labels: rank, spread and uniformity, and, with two views of 1,000
    images, alignment and LiDAR."""
    inference: Optional[str] = setting(None, choices=("slide", "whole"))
    """segmentation: how images are predicted, see moco.segment. Null: as in the run."""
    part: Optional[str] = None
    """segmentation: the folder below ``images/`` that is measured, such as test. Null: the held-out
    images of the run; of another dataset the held-out folder, or else all images."""
    plots: bool = True
    """Draw neighbours, similarities, confusions, a map of the queries and feature maps into the run
    folder. segmentation: draw the confusion matrix and some predictions."""
    map: str = setting("tsne", choices=("none", "tsne", "umap"))
    """How the queries are laid out in map.png. umap needs the extra `umap`."""


@dataclass
class NormalisationConfig:
    """How pixels are normalised."""

    mean: Optional[list[float]] = None
    """Mean of each channel, for pixels in 0..1. Null: the checkpoint's, or ImageNet's."""
    std: Optional[list[float]] = None
    """Standard deviation of each channel, for pixels in 0..1."""


@dataclass
class PretrainedBackboneConfig(BackboneConfig):
    """The backbone of a file of weights.

    A null takes the checkpoint's value. For weights of other projects it is what the shapes of the
    tensors tell.
    """

    name: Optional[str] = None  # type: ignore[assignment]


@dataclass
class EvaluateConfig:
    """Everything that ``python -m moco.evaluate`` can be told."""

    checkpoint: Optional[str] = MISSING
    """A file of weights: ``last.ckpt``, ``best.ckpt`` or ``backbone.pth`` of a run folder, or
    another project's, see ``docs/weights.md``. A run folder stands for its ``last.ckpt``. Null:
    measure backbone=NAME with random weights, for comparison."""
    data: EvaluateDataConfig = field(default_factory=EvaluateDataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    accelerator: str = setting("auto", choices=("auto", "cpu", "cuda", "gpu", "mps"))
    """auto: CUDA if it works, else the CPU. mps (Apple's GPUs) is refused: it has no float64."""
    output: Optional[str] = None
    """Where the figures are written as JSON. Null: metrics.json in the run folder."""
    backbone: PretrainedBackboneConfig = field(default_factory=PretrainedBackboneConfig)
    trust_targets: bool = False
    """Import the functions that the checkpoint names, backbone.target and data.target, without
    naming them on the command line. They run when they are imported. Only for files that you
    trust."""
    augmentation: NormalisationConfig = field(default_factory=NormalisationConfig)
    preview: DisplayConfig = field(default_factory=DisplayConfig)
    seed: int = setting(0, at_least=0, at_most=2**32 - 1)
    """checkpoint=null: seed of the random weights."""


@dataclass
class EmbedConfig:
    """Everything that ``python -m moco.embed`` can be told."""

    checkpoint: str = MISSING
    """A file of weights: ``last.ckpt``, ``best.ckpt`` or ``backbone.pth`` of a run folder, or
    another project's, see ``docs/weights.md``. A run folder stands for its ``last.ckpt``."""
    output: Optional[str] = None
    """The .npz file. The index goes beside it: FILE.faiss beside FILE.npz. Null: a file in
    embeddings/ of the checkpoint's run folder."""
    index: str = "flat"
    """The faiss index for neighbours by cosine, built in memory. flat: exact. none: no index.
    Otherwise a string of ``faiss.index_factory``, such as HNSW32."""
    data: EmbedDataConfig = field(default_factory=EmbedDataConfig)
    split: str = setting("train", choices=("test", "train"))
    """train: all images that training would see. test: the images held out for measurements."""
    encoder: str = setting("query", choices=("key", "query"))
    """Which of the checkpoint's two encoders: the one that was trained, or its moving average."""
    feature: str = setting("backbone", choices=("backbone", "embedding"))
    """What is written: the output of the backbone, or of the projector behind it."""
    backbone: PretrainedBackboneConfig = field(default_factory=PretrainedBackboneConfig)
    trust_targets: bool = False
    """Import the functions that the checkpoint names, see ``moco.evaluate --help trust_targets``.
    Only for files that you trust."""
    batch_size: int = setting(256, at_least=1)
    """Images per forward pass."""
    accelerator: str = setting("auto", choices=("auto", "cpu", "cuda", "gpu", "mps"))
    """auto: CUDA if it works, else the CPU. mps (Apple's GPUs) is refused: it has no float64."""
    augmentation: NormalisationConfig = field(default_factory=NormalisationConfig)


@dataclass
class ExportConfig:
    """Everything that ``python -m moco.export`` can be told."""

    checkpoint: str = MISSING
    """A file of weights: ``last.ckpt``, ``best.ckpt`` or ``backbone.pth`` of a run folder, or
    another project's, see ``docs/weights.md``. A run folder stands for its ``last.ckpt``."""
    format: str = setting(choices=("safetensors", "smp", "timm", "torchvision"))
    """The names that the weights get: torchvision's, timm's, those of an encoder of
    segmentation_models_pytorch (smp), or our own in a safetensors file that describes itself."""
    output: Optional[str] = None
    """The file to write. Null: beside the checkpoint of a run, otherwise in the run folder. For
    torchvision, timm and smp its ending decides: .pth or .pt is written by torch.save, .safetensors
    as safetensors."""
    encoder: str = setting("query", choices=("key", "query"))
    """Which of the checkpoint's two encoders: the one that was trained, or its moving average."""
    backbone: PretrainedBackboneConfig = field(default_factory=PretrainedBackboneConfig)
    trust_targets: bool = False
    """Import the functions that the checkpoint names, see ``moco.evaluate --help trust_targets``.
    Only for files that you trust."""
    image_size: Optional[int] = setting(None, at_least=4)
    """Side of the images that the weights will see, px. Null: the checkpoint's, in proportion to a
    new window."""


def check_settings(config: EvaluateConfig) -> None:
    """Check that every given setting has an effect in this measurement.

    Raises:
        InputError: names a setting without effect and what it needs, or a number out of range.
    """
    evaluation = config.evaluation
    if min(evaluation.images_per_class, default=1) < 1:
        raise InputError(
            f"evaluation.images_per_class={evaluation.images_per_class}: "
            "expected numbers of 1 or more"
        )
    kind = evaluation.name
    for key in sorted(set().union(*KINDS.values()) - set(KINDS[kind])):
        section = "evaluation" if hasattr(evaluation, key) else "data"
        if is_given(getattr(config, section), key):
            owners = [f"evaluation={name}" for name, keys in KINDS.items() if key in keys]
            raise InputError(
                f"{section}.{key}: a setting of {' and '.join(owners)}; "
                f"evaluation={kind} does not have it"
            )
    check_untrained(config)
    # Whether the settings on which others depend are given.
    needs = {
        "num_probes": ("an IVF index in evaluation.index", "IVF" in evaluation.index),
        "ef_search": ("an HNSW index in evaluation.index", "HNSW" in evaluation.index),
        "num_draws": ("evaluation.images_per_class", bool(evaluation.images_per_class)),
        "map": ("evaluation.plots=true", evaluation.plots),
    }
    for key, (needed, is_there) in needs.items():
        if not is_there and is_given(evaluation, key):
            raise InputError(f"evaluation.{key}: without {needed} it has no effect")


def check_untrained(config: EvaluateConfig) -> None:
    """Check the settings of a measurement without a checkpoint.

    Raises:
        InputError: the backbone is missing, or a setting needs a checkpoint.
    """
    if config.checkpoint is not None:
        if config.seed != EvaluateConfig.seed:
            raise InputError("seed: without checkpoint=null it has no effect")
        return
    if config.backbone.name is None:
        raise InputError("backbone: missing; with checkpoint=null give backbone=NAME")
    if config.evaluation.encoder == "key":
        raise InputError("evaluation.encoder=key: checkpoint=null has one encoder alone")
    if config.evaluation.feature == "embedding":
        raise InputError("evaluation.feature=embedding: checkpoint=null has no projector")


def is_given(settings: Any, key: str) -> bool:
    """Whether a setting of a config dataclass differs from its default."""
    return getattr(settings, key) != getattr(type(settings)(), key)


def given_settings(settings: Any) -> dict[str, Any]:
    """Return the settings of a config dataclass that are not null."""
    return {key: value for key, value in dataclasses.asdict(settings).items() if value is not None}


def with_defaults(given: Any, of_checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the given settings, with nulls filled in from the run that made the checkpoint.

    Args:
        given: a config dataclass.
        of_checkpoint: the settings of that run.
    """
    settings = dataclasses.asdict(given)
    for key, value in settings.items():
        if value is None:
            settings[key] = of_checkpoint.get(key)
    return settings


def image_size_of(config: Any, run_data: dict[str, Any]) -> int:
    """Return the side of the images, px.

    Raises:
        InputError: neither the command line nor the checkpoint says it.
    """
    image_size = config.image_size or run_data["image_size"]
    if image_size is None:
        silent = (
            f"{config.checkpoint} does not say it," if config.checkpoint else "without a checkpoint"
        )
        raise InputError(f"image_size: missing; {silent} give image_size=PIXELS")
    return int(image_size)


def data_settings(config: Any, run_data: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the data, with nulls filled in from the run.

    Raises:
        InputError: neither the command line nor the checkpoint names the dataset; or the checkpoint
            alone names the function that makes it.
    """
    target = run_data.get("target")
    if config.data.name is not None or config.data.target not in (None, target):
        # These are of the run's own dataset.
        run_data = run_data | dict.fromkeys(OF_ONE_DATASET)
    else:
        given, trusted = config.data.target, config.trust_targets
        try:
            check_named(target, given, "data.target", trust_targets=trusted)
        except InputError as error:
            raise InputError(f"checkpoint={config.checkpoint}: {error}") from None
    data = with_defaults(config.data, run_data)
    if data["name"] is None:
        silent = "without a checkpoint"
        if config.checkpoint is not None:
            silent = f"{config.checkpoint} does not say it,"
        raise InputError(f"data: missing; {silent} give data=NAME")
    return data


def with_usual_settings(of_run: dict[str, Any]) -> dict[str, Any]:
    """Return the sections of a run's config that measurements need, completed by defaults.

    A file of another project has no config; then all values are defaults.
    """
    usual = {
        "data": {**dataclasses.asdict(DataConfig()), "name": None},
        "augmentation": dataclasses.asdict(AugmentationConfig()),
        "evaluation": dataclasses.asdict(MonitorConfig()),
    }
    return {group: {**settings, **of_run.get(group, {})} for group, settings in usual.items()}
