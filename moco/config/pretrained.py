"""The settings of the programs that begin with a file of weights, and where those that nobody gave
come from.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Optional

from omegaconf import MISSING

from moco.config.data import DataConfig, EmbedDataConfig, EvaluateDataConfig
from moco.config.linear import LinearConfig, LinearOfficialConfig
from moco.config.settings import setting
from moco.config.train import AugmentationConfig, BackboneConfig, MonitorConfig
from moco.errors import InputError

# The kinds of measurement, and the settings and sections of EvaluationConfig that only some of them
# have.
KINDS: dict[str, tuple[str, ...]] = {
    "knn": (
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
    "dense": ("num_neighbors", "temperature", "maps", "bank_size", "sampling", "seed"),
    "linear": ("feature", "cache", "linear"),
    "linear_official": ("feature", "cache", "linear_official"),
}
# The same of EvaluateDataConfig: masks belong to dense evaluation.
OF_CLASSES = ("crop_ratio", "num_images", "image_column", "label_column", "held_out", "pages")
DATA_OF_KINDS: dict[str, tuple[str, ...]] = {
    "knn": OF_CLASSES, "dense": ("ignore_index",), "linear": OF_CLASSES, "linear_official": OF_CLASSES
}  # fmt: skip


@dataclass
class EvaluationConfig:
    """A null takes the value from the run that made the checkpoint."""

    name: str = setting("knn", choices=tuple(KINDS))
    encoder: str = setting("query", choices=("key", "query"))
    num_neighbors: Optional[int] = setting(None, at_least=1)
    """k."""
    temperature: Optional[float] = setting(None, above=0)
    """T of the vote's weights exp(similarity / T)."""
    feature: Optional[str] = setting(None, choices=("backbone", "embedding"))
    batch_size: int = setting(256, at_least=1)
    """Images per forward pass."""
    cache: bool = True
    """Keep features for the next evaluation, in the checkpoint's run folder; see
    ``docs/evaluation.md``."""
    index: str = setting("flat", choices=("flat", "float16", "hnsw", "int8", "ivf"))
    """How the bank is searched. flat: exactly; float16, int8: less memory; ivf, hnsw: faster above
    a million rows."""
    num_probes: int = setting(32, at_least=1)
    """ivf: cells that are looked into."""
    ef_search: int = setting(256, at_least=1)
    """hnsw: candidates that a walk through the graph keeps."""
    images_per_class: list[int] = field(default_factory=list)
    """Measure also with a bank of so few images of each class: one measurement for each number."""
    num_draws: int = setting(5, at_least=2)
    """Random choices of those images, over which mean and spread are given."""
    maps: list[int] = field(default_factory=lambda: [4])
    """dense: which of the backbone's feature maps, from 1, the finest, to 4; several are joined at
    the finest one's size."""
    bank_size: int = setting(50_000, at_least=1)
    """dense: patches that are learned from; each training image gives the same share of them."""
    sampling: str = setting("balanced", choices=("balanced", "uniform"))
    """dense: how an image's patches are drawn. balanced: its classes take turns; uniform: all have
    the same chance."""
    seed: int = setting(0, at_least=0, at_most=2**32 - 1)
    """dense: of that draw."""
    linear: LinearConfig = field(default_factory=LinearConfig)
    linear_official: LinearOfficialConfig = field(default_factory=LinearOfficialConfig)
    label_free: bool = True
    """Also what needs no labels: rank, spread and uniformity, and by views of 1,000 images
    alignment and LiDAR."""
    plots: bool = True
    """Draw neighbours, similarities, confusions, a map of the queries and feature maps into the run
    folder."""
    map: str = setting("tsne", choices=("none", "tsne", "umap"))
    """How the queries are laid out in map.png. umap needs the extra `umap`."""


@dataclass
class NormalisationConfig:
    mean: Optional[list[float]] = None
    """Per channel, of pixels in 0..1; null: the checkpoint's, or ImageNet's."""
    std: Optional[list[float]] = None


@dataclass
class PretrainedBackboneConfig(BackboneConfig):
    """With a checkpoint a null takes its value; of other projects' weights, what shows in the
    tensors' shapes.
    """

    name: Optional[str] = None  # type: ignore[assignment]


@dataclass
class EvaluateConfig:
    checkpoint: str = MISSING
    """A file of weights: ``checkpoints/last.ckpt``, ``best.ckpt`` or ``backbone.pth`` of a run
    folder, or another project's, see ``docs/weights.md``."""
    data: EvaluateDataConfig = field(default_factory=EvaluateDataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    accelerator: str = setting("auto", choices=("auto", "cpu", "cuda", "gpu", "mps"))
    """auto: CUDA where it can be used, else the CPU, also on a Mac. mps (Apple's GPUs) is refused:
    it has no float64."""
    output: Optional[str] = None
    """Where the figures go as JSON; null: metrics.json in the run folder."""
    backbone: PretrainedBackboneConfig = field(default_factory=PretrainedBackboneConfig)
    augmentation: NormalisationConfig = field(default_factory=NormalisationConfig)


@dataclass
class EmbedConfig:
    checkpoint: str = MISSING
    """A file of weights: ``checkpoints/last.ckpt``, ``best.ckpt`` or ``backbone.pth`` of a run
    folder, or another project's, see ``docs/weights.md``."""
    output: str = MISSING
    """The .npz file; the index goes beside it, FILE.faiss beside FILE.npz."""
    index: str = setting("flat", choices=("flat", "hnsw", "ivf", "none"))
    """For neighbours by cosine, of faiss. flat: exact; ivf and hnsw: approximate, and faster beyond
    a million images; they are held in memory while they are built."""
    data: EmbedDataConfig = field(default_factory=EmbedDataConfig)
    split: str = setting("train", choices=("test", "train"))
    """train: all images that training would see; test: those that are held out for measurements."""
    encoder: str = setting("query", choices=("key", "query"))
    feature: str = setting("backbone", choices=("backbone", "embedding"))
    backbone: PretrainedBackboneConfig = field(default_factory=PretrainedBackboneConfig)
    batch_size: int = setting(256, at_least=1)
    """Images per forward pass."""
    accelerator: str = setting("auto", choices=("auto", "cpu", "cuda", "gpu", "mps"))
    """auto: CUDA where it can be used, else the CPU, also on a Mac. mps (Apple's GPUs) is refused:
    it has no float64."""
    augmentation: NormalisationConfig = field(default_factory=NormalisationConfig)


@dataclass
class ExportConfig:
    checkpoint: str = MISSING
    """A file of weights: ``checkpoints/last.ckpt``, ``best.ckpt`` or ``backbone.pth`` of a run
    folder, or another project's, see ``docs/weights.md``."""
    format: str = setting(choices=("safetensors", "timm", "torchvision"))
    """Whose names the weights get: torchvision's, timm's, or our own, in a safetensors file that
    describes itself."""
    output: str = MISSING
    """A file; of torchvision's and timm's formats the ending decides: .pth or .pt by torch.save, or
    .safetensors."""
    encoder: str = setting("query", choices=("key", "query"))
    backbone: PretrainedBackboneConfig = field(default_factory=PretrainedBackboneConfig)
    image_size: Optional[int] = setting(None, at_least=4)
    """Side of the images that the weights will see, px; null: the checkpoint's, in proportion to a
    new window."""


def check_settings(config: EvaluateConfig) -> None:
    """Hold a measurement to the settings that have an effect in it.

    Raises:
        InputError: a setting was given that has none, it names what has; or a number out of its
            range.
    """
    evaluation = config.evaluation
    if min(evaluation.images_per_class, default=1) < 1:
        raise InputError(
            f"evaluation.images_per_class={evaluation.images_per_class}: expected numbers of 1 or more"
        )
    check_kind("evaluation", evaluation, KINDS, evaluation.name)
    check_kind("data", config.data, DATA_OF_KINDS, evaluation.name)
    needed = {
        "num_probes": ("evaluation.index=ivf", evaluation.index == "ivf"),
        "ef_search": ("evaluation.index=hnsw", evaluation.index == "hnsw"),
        "num_draws": ("evaluation.images_per_class", evaluation.images_per_class),
        "map": ("evaluation.plots=true", evaluation.plots),
    }
    for key, (what, is_there) in needed.items():
        if not is_there and is_given(evaluation, key):
            raise InputError(f"evaluation.{key}: without {what} it has no effect")


def check_kind(
    section: str, settings: Any, of_kinds: dict[str, tuple[str, ...]], kind: str
) -> None:
    """Raises InputError if one of a section's settings was given that only other kinds have; it
    names them.
    """
    for key in sorted(set().union(*of_kinds.values()) - set(of_kinds[kind])):
        if is_given(settings, key):
            owners = " and ".join(
                f"evaluation={name}" for name, keys in of_kinds.items() if key in keys
            )
            raise InputError(
                f"{section}.{key}: a setting of {owners}, and evaluation={kind} has no such"
            )


def is_given(settings: Any, key: str) -> bool:
    """Whether a setting of a config dataclass is not the usual one."""
    return getattr(settings, key) != getattr(type(settings)(), key)


def given_settings(settings: Any) -> dict[str, Any]:
    """Those of a config dataclass that are not null."""
    return {key: value for key, value in dataclasses.asdict(settings).items() if value is not None}


def with_defaults(
    given: Any, from_checkpoint: dict[str, Any], new_data: bool = False
) -> dict[str, Any]:
    """The given settings, nulls filled in from the run that made the checkpoint.

    Args:
        new_data: the data set was named on the command line; then its root is not the run's.
    """
    settings = dataclasses.asdict(given)
    kept = {"root"} if new_data else set()
    return {
        key: from_checkpoint.get(key) if value is None and key not in kept else value
        for key, value in settings.items()
    }


def with_usual_settings(of_run: dict[str, Any]) -> dict[str, Any]:
    """A run's config as far as measurements look at it, completed: nothing is known of other
    projects' runs.
    """
    usual = {
        "data": dataclasses.asdict(DataConfig()) | {"name": None},
        "augmentation": dataclasses.asdict(AugmentationConfig()),
        "evaluation": dataclasses.asdict(MonitorConfig()),
    }
    return {group: settings | of_run.get(group, {}) for group, settings in usual.items()}
