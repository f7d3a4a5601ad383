"""The schema of every setting: its name, type, range and meaning. YAML files under ``conf/`` fill it in.

A value has one name from the YAML key to the dataclass field to the keyword argument. `parse` turns what Hydra composed
into these dataclasses; below the programs nothing sees an OmegaConf object.
"""

import dataclasses
import difflib
import importlib.util
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional, TypeVar, cast

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from moco.errors import InputError, unknown_name

_PACKAGE = Path(__file__).resolve().parent
# A wheel carries conf/ inside the package; a checkout or an editable install has it beside the package.
CONFIG_DIR = next(path for path in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if path.is_dir())

T = TypeVar("T")


def setting(
    default: Any = MISSING,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A dataclass field whose value `parse` holds to a range or a list of choices."""
    limits = {"above": above, "at_least": at_least, "below": below, "at_most": at_most, "choices": choices}
    return field(default=default, metadata={name: limit for name, limit in limits.items() if limit is not None})


@dataclass
class BackboneConfig:
    name: str = MISSING
    """A builder in ``moco.models.backbones``. Null settings are left at its defaults; of the others each belongs to some."""
    stem: Optional[str] = setting(None, choices=("imagenet", "cifar"))
    """ResNet. imagenet: 7x7 convolution of stride 2 and max-pool; cifar: 3x3 convolution of stride 1, no pool."""
    window_size: Any = None
    """Swin: side of the attention windows, cells; one number, or a list with one for each stage."""
    pretrained_window_size: Any = None
    """Swin V2: the window that the weights were pretrained with, if it is not window_size."""
    stochastic_depth: Optional[float] = setting(None, at_least=0, at_most=0.99)
    """Swin, ViT: chance that a picture skips the last block's branches; rises linearly from 0 at the first block."""
    gradient_checkpointing: Optional[bool] = None
    """Swin, ViT: less memory for a third more computing."""
    freeze_patch_embed: Optional[bool] = None
    """Swin, ViT: keep the random patch projection, as MoCo v3 does."""
    partial_patches: Optional[str] = setting(None, choices=("complete", "drop"))
    """Swin, ViT: what becomes of the last pixels where the image is no multiple of the patch."""
    num_heads: Optional[int] = setting(None, at_least=1)
    """ViT: attention heads. vit_small has 12, as MoCo v3's; weights of DeiT-S or of timm's ViT-S need 6."""
    learned_positions: Optional[int] = setting(None, at_least=1)
    """ViT: side of the grid of learned positions, cells (14: 224 px), for weights that were trained with such. Null: the
    fixed sine-cosine positions of MoCo v3."""
    zero_init_residual: Optional[bool] = None
    """ResNet: every block starts as the identity, as in MoCo v3."""


@dataclass
class ProjectorConfig:
    """Linear layers with ReLU between them: see ``moco.models.heads`` for the published ones."""

    num_layers: int = setting(2, at_least=1)
    """1 is MoCo v1's head, 2 is v2's."""
    hidden_dim: Optional[int] = setting(None, at_least=1)
    """Width between the layers; null is the input's."""
    hidden_batch_norm: bool = False
    """BatchNorm before every ReLU."""
    last_batch_norm: bool = False
    """BatchNorm without scale and shift at the end."""
    bias: bool = True
    """Of the linear layers."""


@dataclass
class PredictorConfig(ProjectorConfig):
    num_layers: int = setting(0, at_least=0)
    """0 is no predictor."""


@dataclass
class MethodConfig:
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    """From the backbone's feature to the embedding, in both encoders."""
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    """From embedding to embedding, of queries only."""
    embedding_dim: int = setting(128, at_least=2)
    """C, the projector's output width."""
    negatives: str = setting("queue", choices=("batch", "queue"))
    """queue: keys of earlier steps; batch: the other keys of the same step, of all devices."""
    queue_size: Optional[int] = setting(65536, at_least=1)
    """K, the number of keys in the queue; null without one."""
    num_queues: int = setting(1, at_least=1, at_most=2)
    """1: all keys go to one queue; 2: one of queue_size for each view's keys, which needs the symmetric loss."""
    queue_start: str = setting("random", choices=("random", "empty"))
    """random: K random unit vectors, as published; empty: only the keys seen so far count as negatives."""
    temperature: float = setting(0.2, above=0)
    """T of InfoNCE."""
    key_momentum: float = setting(0.999, at_least=0, at_most=1)
    """m, of the key encoder's moving average."""
    key_momentum_schedule: str = setting("constant", choices=("constant", "cosine"))
    """cosine: from key_momentum at the first step to key_momentum_end at the last."""
    key_momentum_end: float = setting(1.0, at_least=0, at_most=1)
    symmetric: bool = False
    """Both views serve as query and as key."""
    symmetric_reduction: str = setting("sum", choices=("sum", "mean"))
    """Of the two directions' losses; the official CIFAR notebook sums."""
    loss_times_2t: bool = False
    """Multiply the loss by 2T, so that T does not change the gradient's size."""
    batch_norm: str = setting("auto", choices=("auto", "plain", "shuffle", "split", "sync"))
    """How BatchNorm is kept from telling a query which key is its own: see ``moco.methods.batch_norm``."""
    batch_norm_splits: int = setting(8, at_least=2)
    """Groups of the split mode; the paper's eight GPUs."""
    dense_weight: float = setting(0.0, at_least=0, at_most=1)
    """w of DenseCL: the loss is (1 - w) times MoCo's plus w times the dense term; 0 leaves it out. Its logits take
    batch x dense_grid^2 x queue_size x 4 bytes."""
    dense_grid: int = setting(7, at_least=1)
    """Side of the grid that the dense term pools the backbone's last map to, cells; a smaller map stays as it is."""


@dataclass
class OptimizerConfig:
    name: str = setting("sgd", choices=("adamw", "lars", "sgd"))
    lr: float = setting(0.03, above=0)
    """Learning rate of the first step after warm-up."""
    lr_for_batch_size: Optional[int] = setting(None, at_least=1)
    """The batch size that lr, warmup_start_lr and final_lr are meant for; they are scaled in proportion to
    data.batch_size. Null: they are used as they are."""
    sgd_momentum: float = setting(0.9, at_least=0, at_most=1)
    """Of SGD and LARS."""
    trust_coefficient: float = setting(1e-3, above=0)
    """LARS's eta: a layer's ratio is eta times the norm of its weights over its gradient's, and its learning rate lr times
    that."""
    trust_clip: bool = False
    """LARS: the ratio itself is a layer's learning rate, and lr its upper limit (LARC)."""
    beta1: float = setting(0.9, at_least=0, below=1)
    """AdamW's decay of the mean gradient."""
    beta2: float = setting(0.999, at_least=0, below=1)
    """AdamW's decay of the mean square gradient."""
    eps: float = setting(1e-8, above=0)
    """AdamW's addend to the root of the mean square gradient."""
    weight_decay: float = setting(1e-4, at_least=0)
    decay_all: bool = True
    """Weight decay on norms and biases too, as in the official MoCo code; a Swin is spared what harms it in any case. LARS
    never decays them."""
    schedule: str = setting("cosine", choices=("constant", "cosine", "step"))
    schedule_interval: str = setting("step", choices=("epoch", "step"))
    """How often the schedule moves; the official MoCo code moves it once per epoch."""
    schedule_offset_epochs: int = setting(0, at_least=0)
    """Added to the epoch that the schedule sees: the official CIFAR notebook counts epochs from 1."""
    milestones: list[int] = field(default_factory=list)
    """Epochs at which the step schedule multiplies the learning rate by step_factor."""
    step_factor: float = setting(0.1, above=0, at_most=1)
    warmup_epochs: float = setting(0, at_least=0)
    """Linear from warmup_start_lr to lr, moved every step."""
    warmup_start_lr: float = setting(0.0, at_least=0)
    final_lr: float = setting(0.0, at_least=0)
    """Where the cosine ends, after the last step."""


@dataclass
class DataConfig:
    name: str = MISSING
    """A builder in ``moco.data.datasets``."""
    root: Any = None
    """Folder or file; ``images`` also takes a list of folders."""
    download: bool = False
    """Fetch a torchvision data set that is not under root yet."""
    image_size: Optional[int] = setting(None, at_least=4)
    """Side of the square views, px; null: the data set's own size (train), the checkpoint's (evaluate)."""
    crop_ratio: float = setting(1.0, above=0, at_most=1)
    """Evaluation images: side of the centre crop over the resized shorter side (ImageNet: 0.875)."""
    batch_size: int = setting(256, at_least=1)
    """Images per optimizer step, over all devices and accumulated batches."""
    engine: str = setting("auto", choices=("auto", "worker", "batch"))
    """Who augments. worker: the loader's processes, picture by picture; batch: the device, batch by batch (of files the
    processes still decode and crop); auto: batch for small pictures in memory and on a GPU, else worker."""
    num_workers: int = setting(4, at_least=0)
    """Loader processes per device; 0 loads in the training process. Results do not depend on it."""
    max_bad_fraction: float = setting(0.01, at_least=0, at_most=1)
    """Share of unreadable pictures beyond which the run stops."""
    max_image_pixels: int = setting(178_956_970, at_least=1)
    """A picture of more px is unreadable, judged by its header: a small file can claim any size. The default is the one from
    which Pillow takes a picture for an attack; decoded it takes half a gigabyte."""
    held_out: float = setting(0.1, at_least=0, at_most=1)
    """``image_folder`` without a validation folder: share of the pictures that the monitor holds out of its bank, by a hash
    of their paths, so that a picture keeps its side when others are added. They are trained on like all others."""
    pages: str = setting("first", choices=("each", "first"))
    """``images``, ``image_folder``: of TIFF files with several pages take the first, or each as a picture of its own."""
    num_images: Optional[int] = setting(None, at_least=1)
    """Size of ``synthetic`` (null: 1,024); samples in all shards of ``webdataset`` (null: counted, if they are files)."""
    streams: int = setting(12, at_least=1)
    """webdataset: streams of each process that batches come from in turn; num_workers has to divide them."""
    shuffle_buffer: int = setting(500, at_least=1)
    """webdataset: samples of each stream among which the next one is drawn; they are held in memory, encoded."""
    image_column: Optional[str] = None
    """hf: null is the only column of type Image."""
    label_column: Optional[str] = None
    """hf: null is the only column of type ClassLabel, if there is one."""


@dataclass
class AugmentationConfig:
    query: dict[str, Any] = field(default_factory=dict)
    """The query view's operations in order, each with its numbers: see ``moco.data.augmentations``."""
    key: dict[str, Any] = field(default_factory=dict)
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    """Per channel, of pixels in 0..1 (ImageNet's)."""
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])


@dataclass
class TrainerConfig:
    """Handed to ``pytorch_lightning.Trainer`` under the same names."""

    max_epochs: int = setting(200, at_least=1)
    max_steps: int = setting(-1, at_least=-1)
    """Optimizer steps; -1: max_epochs alone decides."""
    accelerator: str = setting("auto", choices=("auto", "cpu", "cuda", "gpu"))
    devices: int = setting(1, at_least=1)
    """Per node; each has a process of its own. data.batch_size stays the batch of all of them together."""
    num_nodes: int = setting(1, at_least=1)
    """Above 1, srun or torchrun has to start the processes, one per device."""
    timeout_minutes: float = setting(30.0, above=0)
    """So long may a process wait for the gradients or keys of the others before the run fails."""
    precision: str = setting("auto", choices=("auto", "32-true", "bf16-mixed", "16-mixed"))
    """auto: bf16-mixed on GPUs that have it, else 32-true."""
    accumulate_grad_batches: int = setting(1, at_least=1)
    """Batches per optimizer step; each holds data.batch_size / this many images."""
    gradient_clip_val: Optional[float] = setting(None, above=0)
    """Largest L2 norm of all gradients together; null: no clipping."""
    max_bad_steps: int = setting(10, at_least=1)
    """So many steps in a row without a finite loss and gradients end the run; fewer are left out and counted."""
    log_every_n_steps: int = setting(10, at_least=1)
    deterministic: bool = False
    benchmark: bool = True
    """Let cuDNN choose its algorithms by trial."""


@dataclass
class MonitorConfig:
    """The kNN protocol: see ``moco.evaluation.knn``."""

    name: str = setting("knn", choices=("knn",))
    num_neighbors: int = setting(200, at_least=1)
    """k."""
    temperature: float = setting(0.1, above=0)
    """T of the vote's weights exp(similarity / T)."""
    feature: str = setting("backbone", choices=("backbone", "embedding"))
    batch_size: int = setting(256, at_least=1)
    """Images per forward pass while embedding."""
    every_n_epochs: int = setting(1, at_least=1)
    baselines: bool = False
    """Before training, measure raw pixels and the untrained backbone on the same protocol."""


@dataclass
class CheckpointConfig:
    """When a run saves. ``last.ckpt`` is replaced each time, and its predecessor kept as ``previous.ckpt``."""

    every_n_epochs: int = setting(1, at_least=1)
    every_n_minutes: float = setting(30.0, above=0)
    """At the end of the first step after so long without a checkpoint."""
    keep_every_n_epochs: Optional[int] = setting(None, at_least=1)
    """Keep the checkpoint of every n-th epoch for good, as ``checkpoints/epoch_0100.ckpt``; null: none."""


@dataclass
class SlurmConfig:
    """What a run does as a job of SLURM; elsewhere nothing."""

    signal: Optional[str] = setting("auto", choices=("auto", "USR1", "USR2"))
    """SLURM sends it when the job's time is nearly up; the run then saves and ends. auto: USR2 for jobs of
    hydra/launcher=slurm, otherwise USR1; null: none."""
    requeue: bool = True
    """After that signal the job is queued again, to go on from its checkpoint."""


@dataclass
class TrainConfig:
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: MonitorConfig = field(default_factory=MonitorConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    seed: int = setting(0, at_least=0, at_most=2**32 - 1)
    resume: Optional[str] = "auto"
    """auto: go on from the run folder's last checkpoint if it has one; a path: from that file; null: start anew."""
    init_from: Optional[str] = None
    """A file of weights, this project's or another's, that a new run starts from: see ``docs/weights.md``. The optimizer
    starts afresh. A run that goes on from its checkpoint does not read it."""


@dataclass
class PreviewConfig(TrainConfig):
    output: str = MISSING
    """The picture to write, a .png."""
    num_pairs: int = setting(8, at_least=1, at_most=64)


@dataclass
class EvaluationConfig:
    """A null takes the value from the run that made the checkpoint."""

    name: str = setting("knn", choices=("knn",))
    encoder: str = setting("query", choices=("key", "query"))
    num_neighbors: Optional[int] = setting(None, at_least=1)
    temperature: Optional[float] = setting(None, above=0)
    feature: Optional[str] = setting(None, choices=("backbone", "embedding"))
    batch_size: int = setting(256, at_least=1)


@dataclass
class EvaluateDataConfig:
    """A null takes the value from the run that made the checkpoint; for other projects' weights a usual one."""

    name: Optional[str] = None
    root: Any = None
    download: bool = False
    image_size: Optional[int] = setting(None, at_least=4)
    crop_ratio: Optional[float] = setting(None, above=0, at_most=1)
    num_workers: int = setting(0, at_least=0)
    num_images: Optional[int] = setting(None, at_least=1)
    image_column: Optional[str] = None
    label_column: Optional[str] = None
    held_out: Optional[float] = setting(None, at_least=0, at_most=1)
    pages: Optional[str] = setting(None, choices=("each", "first"))
    max_bad_fraction: float = setting(0.01, at_least=0, at_most=1)
    max_image_pixels: int = setting(178_956_970, at_least=1)


@dataclass
class NormalisationConfig:
    mean: Optional[list[float]] = None
    """Per channel, of pixels in 0..1; null: the checkpoint's, or ImageNet's."""
    std: Optional[list[float]] = None


@dataclass
class PretrainedBackboneConfig(BackboneConfig):
    """With a checkpoint a null takes its value; of other projects' weights, what shows in the tensors' shapes."""

    name: Optional[str] = None  # type: ignore[assignment]


@dataclass
class EvaluateConfig:
    checkpoint: str = MISSING
    """A file of weights: ``checkpoints/last.ckpt``, ``best.ckpt`` or ``backbone.pth`` of a run folder, or another
    project's, see ``docs/weights.md``."""
    data: EvaluateDataConfig = field(default_factory=EvaluateDataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    accelerator: str = setting("auto", choices=("auto", "cpu", "cuda", "gpu"))
    output: Optional[str] = None
    """Where the figures go as JSON; null: metrics.json in the run folder."""
    backbone: PretrainedBackboneConfig = field(default_factory=PretrainedBackboneConfig)
    augmentation: NormalisationConfig = field(default_factory=NormalisationConfig)


@dataclass
class EmbedConfig:
    checkpoint: str = MISSING
    """A file of weights: ``checkpoints/last.ckpt``, ``best.ckpt`` or ``backbone.pth`` of a run folder, or another
    project's, see ``docs/weights.md``."""
    output: str = MISSING
    """The .npz file."""
    data: EvaluateDataConfig = field(default_factory=EvaluateDataConfig)
    split: str = setting("train", choices=("test", "train"))
    """train: all pictures that training would see; test: those that are held out for measurements."""
    encoder: str = setting("query", choices=("key", "query"))
    feature: str = setting("backbone", choices=("backbone", "embedding"))
    backbone: PretrainedBackboneConfig = field(default_factory=PretrainedBackboneConfig)
    batch_size: int = setting(256, at_least=1)
    """Images per forward pass."""
    accelerator: str = setting("auto", choices=("auto", "cpu", "cuda", "gpu"))
    augmentation: NormalisationConfig = field(default_factory=NormalisationConfig)


@dataclass
class PackDataConfig:
    """See `DataConfig`."""

    name: str = MISSING
    root: Any = None
    download: bool = False
    resize: Optional[int] = setting(None, at_least=4)
    """Shorter side of the copy's pictures, px; smaller ones stay as they are. Null: all stay."""
    num_images: Optional[int] = setting(None, at_least=1)
    image_column: Optional[str] = None
    label_column: Optional[str] = None
    held_out: float = setting(0.1, at_least=0, at_most=1)
    pages: str = setting("first", choices=("each", "first"))
    max_bad_fraction: float = setting(0.01, at_least=0, at_most=1)
    max_image_pixels: int = setting(178_956_970, at_least=1)


@dataclass
class PackConfig:
    output: str = MISSING
    """A folder for the copy alone."""
    data: PackDataConfig = field(default_factory=PackDataConfig)
    format: str = setting("auto", choices=("array", "auto", "shards"))
    """array: pixels in one file that is mapped into memory; shards: tar files of JPEGs, for webdataset too; auto: array
    where it takes less than half of the free disk space."""
    quality: int = setting(95, at_least=1, at_most=100)
    """Of JPEGs in shards. A JPEG that keeps its size is copied as it is."""
    max_shard_bytes: int = setting(2**29, at_least=1)
    """A shard ends with the picture that reaches so many; between two of them an interrupted copy goes on."""
    num_workers: int = setting(4, at_least=0)
    """Processes that read and encode; the copy does not depend on it."""
    check: bool = False
    """Write nothing; compare a finished copy with its checksums, and its names with the source's."""


@dataclass
class ExportConfig:
    checkpoint: str = MISSING
    """A file of weights: ``checkpoints/last.ckpt``, ``best.ckpt`` or ``backbone.pth`` of a run folder, or another
    project's, see ``docs/weights.md``."""
    format: str = setting(choices=("safetensors", "timm", "torchvision"))
    """Whose names the weights get: torchvision's, timm's, or our own, in a safetensors file that describes itself."""
    output: str = MISSING
    """A file; of torchvision's and timm's formats the ending decides: .pth or .pt by torch.save, or .safetensors."""
    encoder: str = setting("query", choices=("key", "query"))
    backbone: PretrainedBackboneConfig = field(default_factory=PretrainedBackboneConfig)
    image_size: Optional[int] = setting(None, at_least=4)
    """Side of the images that the weights will see, px; null: the checkpoint's, in proportion to a new window."""


@dataclass
class SegmentBackboneConfig(PretrainedBackboneConfig):
    """The same, but a frozen patch projection is set free."""


@dataclass
class DecoderConfig:
    name: str = setting("auto", choices=("auto", "deeplabv3", "fcn", "fpn", "linear", "unet", "upernet"))
    """See ``moco.models.segmentation``. auto: linear on a frozen backbone, otherwise upernet."""
    channels: Optional[int] = setting(None, at_least=4)
    """Width of fpn, unet and upernet; null is 256."""


@dataclass
class SegmentDataConfig:
    name: str = MISSING
    """segmentation_folder or voc2012: see ``moco.data.segmentation``."""
    root: Any = None
    download: bool = False
    """Fetch voc2012 if it is not under root yet."""
    num_classes: Optional[int] = setting(None, at_least=2)
    """C; null: as many as there are names, or else the largest number in any mask and one."""
    class_names: Optional[list[str]] = None
    """Null: the data set's own, or the numbers."""
    ignore_index: int = setting(255, at_least=0, at_most=65535)
    """The number of pixels without a class; masks have at most 16 bits."""
    max_image_pixels: int = setting(178_956_970, at_least=1)
    """A picture or mask of more px is refused."""
    batch_size: int = setting(16, at_least=2)
    """Images per optimizer step, over all accumulated batches."""
    num_workers: int = setting(4, at_least=0)
    """Loader processes; 0 loads in the training process. Results do not depend on it."""


@dataclass
class SegmentAugmentationConfig:
    scale: list[float] = field(default_factory=lambda: [0.5, 2.0])
    """Lowest and highest factor by which a picture is resized before it is cropped; uniform."""
    horizontal_flip: float = setting(0.5, at_least=0, at_most=1)
    """Probability."""
    color_jitter: Optional[dict[str, Any]] = field(
        default_factory=lambda: {
            "brightness": 0.125, "contrast": 0.5, "saturation": 0.5, "hue": 0.05, "probability": 0.5
        }
    )  # fmt: skip
    """As in the views of pretraining; null: none. The strengths are those of SSD (arXiv 1512.02325), which Swin uses."""
    mean: Optional[list[float]] = None
    """Per channel, of pixels in 0..1; null: the checkpoint's, or ImageNet's."""
    std: Optional[list[float]] = None


@dataclass
class SegmentOptimizerConfig:
    """AdamW without weight decay on norms, biases and what the backbone spares."""

    lr: float = setting(1e-4, above=0)
    """Learning rate of the decoder at the first step after warm-up."""
    weight_decay: float = setting(0.01, at_least=0)
    layer_decay: Optional[float] = setting(None, above=0, at_most=1)
    """Factor from each layer's learning rate to that of the next lower one. Null: 0.9 for a pretrained Swin, else 1."""
    schedule: str = setting("poly", choices=("cosine", "poly"))
    power: float = setting(1.0, above=0)
    """Of poly: lr * (1 - t)^power, t from 0 to 1."""
    warmup_steps: Optional[int] = setting(None, at_least=0)
    """Linear from 0. Null: a twentieth of all steps, at most 1,500."""


@dataclass
class SegmentEvaluationConfig:
    every_n_epochs: int = setting(1, at_least=1)
    batch_size: int = setting(1, at_least=1)
    """Pictures of one size that are predicted at once."""
    num_pictures: int = setting(4, at_least=0)
    """So many go to TensorBoard at every measurement."""


@dataclass
class SegmentConfig:
    checkpoint: Optional[str] = MISSING
    """As in moco.evaluate; null: train from scratch, with backbone=NAME."""
    encoder: str = setting("query", choices=("key", "query"))
    backbone: SegmentBackboneConfig = field(default_factory=SegmentBackboneConfig)
    freeze_backbone: bool = False
    """Train the decoder alone; with the linear one, what the backbone has learned is measured."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    data: SegmentDataConfig = field(default_factory=SegmentDataConfig)
    image_size: Optional[int] = setting(None, at_least=4)
    """Side of the crops to train on, and of sliding windows, px; null: the checkpoint's."""
    augmentation: SegmentAugmentationConfig = field(default_factory=SegmentAugmentationConfig)
    optimizer: SegmentOptimizerConfig = field(default_factory=SegmentOptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    inference: str = setting("whole", choices=("slide", "whole"))
    """Of the held-out pictures. whole: as they are; slide: windows of image_size that overlap by a third."""
    evaluation: SegmentEvaluationConfig = field(default_factory=SegmentEvaluationConfig)
    checkpoint_every_n_epochs: int = setting(1, at_least=1)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    seed: int = setting(0, at_least=0, at_most=2**32 - 1)
    resume: Optional[str] = "auto"
    """auto: go on from the run folder's last checkpoint if it has one; a path: from that file; null: start anew."""


def check_run(resume: str | None, trainer: TrainerConfig) -> None:
    """Raises InputError for what no training can do, whatever the data."""
    if resume not in (None, "auto") and not Path(str(resume)).is_file():
        raise InputError(f"resume={resume}: no such file")
    if trainer.max_steps == 0:
        raise InputError("trainer.max_steps=0: expected -1 for no limit, or at least 1")


def check_optimizer(optimizer: OptimizerConfig) -> None:
    """Raises InputError if the optimizer's library is not installed."""
    if optimizer.name == "lars" and importlib.util.find_spec("timm") is None:
        raise InputError("optimizer.name=lars needs timm: pip install 'moco-ssl[lars]'")


def with_defaults(given: Any, from_checkpoint: dict[str, Any], new_data: bool = False) -> dict[str, Any]:
    """The given settings, nulls filled in from the run that made the checkpoint.

    Args:
        new_data: the data set was named on the command line; then its root is not the run's.
    """
    settings = dataclasses.asdict(given)
    kept = {"root"} if new_data else set()
    return {
        key: from_checkpoint.get(key) if value is None and key not in kept else value for key, value in settings.items()
    }


def with_usual_settings(of_run: dict[str, Any]) -> dict[str, Any]:
    """A run's config as far as measurements look at it, completed: nothing is known of other projects' runs."""
    usual = {
        "data": dataclasses.asdict(DataConfig()) | {"name": None},
        "augmentation": dataclasses.asdict(AugmentationConfig()),
        "evaluation": dataclasses.asdict(MonitorConfig()),
    }
    return {group: settings | of_run.get(group, {}) for group, settings in usual.items()}


def register_schemas() -> None:
    """Make the schemas known to Hydra under the names that ``conf/*.yaml`` refer to."""
    store = ConfigStore.instance()
    store.store("train_schema", TrainConfig)
    store.store("evaluate_schema", EvaluateConfig)
    store.store("segment_schema", SegmentConfig)
    store.store("preview_schema", PreviewConfig)
    store.store("embed_schema", EmbedConfig)
    store.store("pack_schema", PackConfig)
    store.store("export_schema", ExportConfig)


def parse(composed: DictConfig, schema: type[T]) -> T:
    """The composed config as an instance of `schema`, every value checked.

    Composing already refuses unknown keys, but ``+key=value`` adds one all the same; merging the plain values into a
    fresh schema refuses that too.

    Raises:
        InputError: names the key, what was expected and what came.
    """
    try:
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), plain))
    except MissingMandatoryValue as error:
        raise InputError(f"{error.full_key}: missing; give {error.full_key}=VALUE") from error
    except ConfigKeyError as error:
        raise InputError(unknown_key(str(error.full_key), schema)) from error
    except OmegaConfBaseException as error:
        raise InputError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    check_limits(config)
    return cast(T, config)


def check_limits(config: Any, prefix: str = "") -> None:
    """Hold every value of a config dataclass to its `setting`.

    Raises:
        InputError: for the first value that is out of range.
    """
    for item in dataclasses.fields(config):
        key, value, limits = prefix + item.name, getattr(config, item.name), item.metadata
        if dataclasses.is_dataclass(value):
            check_limits(value, key + ".")
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{key}={value}: expected a finite number")
        if value is None or not limits:
            continue
        if "choices" in limits:
            if value not in limits["choices"]:
                raise InputError(f"{key}: {unknown_name('value', value, limits['choices'])}")
        elif not (
            value > limits.get("above", -float("inf"))
            and value >= limits.get("at_least", -float("inf"))
            and ("below" not in limits or value < limits["below"])
            and value <= limits.get("at_most", float("inf"))
        ):
            words = " and ".join(f"{name.replace('_', ' ')} {limit}" for name, limit in limits.items())
            raise InputError(f"{key}={value}: expected a number {words}")


def unknown_key(full_key: str, schema: type) -> str:
    """A sentence for a key that the schema does not have, with the nearest one that it does."""
    parent, _, name = full_key.rpartition(".")
    every = {key: key.rpartition(".") for key in keys(schema)}
    siblings = [key for key, (above, _, _) in every.items() if above == parent]
    for candidates in (siblings, list(every)):  # a slip of the pen, else the right name under the wrong parent
        names = [every[key][2] for key in candidates]
        nearest = [candidates[names.index(match)] for match in difflib.get_close_matches(name, names, n=1)]
        if nearest:
            break
    hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
    return f"unknown key '{full_key}'{hint} (keys here: {', '.join(siblings)})"


def keys(schema: type, prefix: str = "") -> list[str]:
    """All dotted keys of a schema, groups included."""
    names = []
    for item in dataclasses.fields(schema):
        names.append(prefix + item.name)
        if isinstance(item.type, type) and dataclasses.is_dataclass(item.type):
            names += keys(item.type, prefix + item.name + ".")
    return names
