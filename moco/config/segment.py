"""The settings of ``moco.segment``: names, types, ranges and meaning."""

from dataclasses import dataclass, field
from typing import Any, Optional

from omegaconf import MISSING

from moco.config.data import DisplayConfig
from moco.config.pretrained import PretrainedBackboneConfig
from moco.config.settings import setting
from moco.config.train import LoggerOptionsConfig, SlurmConfig, TrainerConfig

METRICS = ("miou", "dice", "pixel_accuracy", "class_accuracy", "auc")
"""The figures of all classes that can choose the best checkpoint."""
METRICS_OF_A_CLASS = ("iou", "dice")
"""Those of one class: ``iou/NAME``."""


@dataclass
class DecoderConfig:
    """What turns the feature maps of the backbone into a class for each pixel."""

    name: str = setting(
        "auto", choices=("auto", "deeplabv3", "fcn", "fpn", "linear", "unet", "upernet")
    )
    """See ``moco.segmentation.decoders``. auto: linear for a frozen backbone, otherwise the
    checkpoint's pretrained decoder if it has one, or else upernet."""
    channels: Optional[int] = setting(None, at_least=4)
    """Width of fpn, unet and upernet. Null: 256, or that of a pretrained decoder."""
    from_checkpoint: Optional[bool] = None
    """Start with the weights of the decoder that was pretrained with the backbone
    (method.decoder=fpn). Null: if the checkpoint has one of this kind. true: refuse a checkpoint
    without one. false: start with a new decoder."""


@dataclass
class SegmentDataConfig:
    """The images and their masks."""

    name: str = MISSING
    """segmentation_folder or voc2012, see ``moco.segmentation.mask_sources``."""
    root: Any = None
    """The folder with ``images/`` and ``masks/``, or where voc2012 is."""
    download: bool = False
    """Download voc2012 if it is not below root yet."""
    num_classes: Optional[int] = setting(None, at_least=2)
    """Null: the number of class names, or else the largest number in any mask plus one."""
    class_names: Optional[list[str]] = None
    """Null: the dataset's own names, or the numbers."""
    ignore_index: int = setting(255, at_least=0, at_most=65535)
    """The number of pixels that have no class. Masks have at most 16 bits."""
    max_image_pixels: int = setting(178_956_970, at_least=1)
    """An image or mask with more pixels is refused."""
    bands: Any = None
    """Bands to take, in this order: numbers from 1, or names where the files have them. Null: the
    checkpoint's."""
    value_range: Any = None
    """``[low, high]``: the values that become 0 and 1; or such a pair for each band. Null: the
    checkpoint's."""
    nodata: Optional[float] = None
    """The value of pixels without data. They become the mean. Null: the checkpoint's."""
    dicom_window: Optional[bool] = None
    """DICOM: apply the window that the file proposes for display. Null: the checkpoint's."""
    batch_size: int = setting(16, at_least=2)
    """Images per optimizer step, over all accumulated batches."""
    num_workers: int = setting(4, at_least=0)
    """Loader processes. 0 loads in the training process. The results do not depend on it."""


@dataclass
class SegmentAugmentationConfig:
    """How the training crops are augmented, and how pixels are normalised."""

    scale: list[float] = field(default_factory=lambda: [0.5, 2.0])
    """Lowest and highest factor by which an image is resized before the crop, drawn uniformly."""
    horizontal_flip: float = setting(0.5, at_least=0, at_most=1)
    """Probability that a crop is mirrored."""
    color_jitter: Optional[dict[str, Any]] = field(
        default_factory=lambda: {
            "brightness": 0.125, "contrast": 0.5, "saturation": 0.5, "hue": 0.05, "probability": 0.5
        }
    )  # fmt: skip
    """Strengths and probability, as in the views of pretraining. Null: no jitter. The strengths are
    those of SSD (arXiv 1512.02325), which Swin uses."""
    mean: Optional[list[float]] = None
    """Mean of each channel, for pixels in 0..1. Null: the checkpoint's, or ImageNet's."""
    std: Optional[list[float]] = None
    """Standard deviation of each channel, for pixels in 0..1."""


@dataclass
class SegmentOptimizerConfig:
    """AdamW. Norms, biases and what the backbone excludes have no weight decay."""

    lr: float = setting(1e-4, above=0)
    """Learning rate of the decoder at the first step after the warm-up."""
    weight_decay: float = setting(0.01, at_least=0)
    """How much AdamW shrinks the weights, as a multiple of the learning rate."""
    layer_decay: Optional[float] = setting(None, above=0, at_most=1)
    """Factor from the learning rate of a layer to that of the next lower one. Null: 0.9 for a
    pretrained Swin, otherwise 1."""
    schedule: str = setting("poly", choices=("cosine", "poly"))
    """How the learning rate falls after the warm-up."""
    power: float = setting(1.0, above=0)
    """poly: the rate is lr * (1 - t)^power, with t from 0 to 1."""
    warmup_steps: Optional[int] = setting(None, at_least=0)
    """The rate rises linearly from 0. Null: a twentieth of all steps, at most 1,500."""


@dataclass
class SegmentEvaluationConfig:
    """The measurement on the held-out images during training."""

    every_n_epochs: Optional[int] = setting(None, at_least=1)
    """Epochs between two measurements. Null: 1; with few labels, as many epochs as have the steps
    of an epoch of all training images."""
    batch_size: int = setting(1, at_least=1)
    """How many images of one size are predicted at once."""
    num_plotted_images: int = setting(4, at_least=0)
    """How many images TensorBoard shows for every measurement."""
    metric: str = "miou"
    """The figure that chooses ``best.ckpt``: miou, dice, pixel_accuracy, class_accuracy; auc where
    there are two classes; or of one class, iou/NAME or dice/NAME."""


@dataclass
class SegmentConfig:
    """Everything that ``python -m moco.segment`` can be told."""

    checkpoint: Optional[str] = MISSING
    """A file of weights: ``last.ckpt``, ``best.ckpt`` or ``backbone.pth`` of a run folder, or
    another project's, see ``docs/weights.md``. A run folder stands for its ``last.ckpt``. Null:
    train from scratch, with backbone=NAME."""
    encoder: str = setting("query", choices=("key", "query"))
    """Which of the checkpoint's two encoders: the one that was trained, or its moving average."""
    backbone: PretrainedBackboneConfig = field(default_factory=PretrainedBackboneConfig)
    """A patch projection that was frozen in pretraining is trained, unless frozen here too."""
    trust_targets: bool = False
    """Import the functions that the checkpoint names, see ``moco.evaluate --help trust_targets``.
    Only for files that you trust."""
    freeze_backbone: bool = False
    """Train the decoder alone. With the linear decoder this measures the backbone."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    data: SegmentDataConfig = field(default_factory=SegmentDataConfig)
    image_size: Optional[int] = setting(None, at_least=4)
    """Side of the training crops and of sliding windows, px. Null: the checkpoint's."""
    augmentation: SegmentAugmentationConfig = field(default_factory=SegmentAugmentationConfig)
    loss: str = setting("ce", choices=("ce", "ce_dice", "dice", "focal", "lovasz"))
    """See ``moco.segmentation.pixel_losses``. ce: cross-entropy. ce_dice: its sum with the Dice
    loss."""
    class_weights: Any = None
    """Weights of the classes in the loss: a list of a number above 0 for each class. auto:
    1 / ln(1.02 + p), p being the share of the class in the training masks. Null: all weigh
    alike."""
    label_fraction: Optional[float] = setting(None, above=0, at_most=1)
    """Train on this fraction of the training images. Which ones depends on their names and
    label_seed alone; a smaller draw lies inside a larger one. Null: on all."""
    num_images: Optional[int] = setting(None, at_least=1)
    """Train on this number of training images, drawn in the same way."""
    label_seed: int = setting(0, at_least=0, at_most=2**32 - 1)
    """Seed of that draw. seed does not change it."""
    optimizer: SegmentOptimizerConfig = field(default_factory=SegmentOptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    inference: str = setting("whole", choices=("slide", "whole"))
    """How held-out images are predicted. whole: at their own size. slide: in windows of image_size
    that overlap by a third."""
    evaluation: SegmentEvaluationConfig = field(default_factory=SegmentEvaluationConfig)
    checkpoint_every_n_epochs: Optional[int] = setting(None, at_least=1)
    """Epochs between two checkpoints. Null: as for ``evaluation.every_n_epochs``."""
    preview: DisplayConfig = field(default_factory=DisplayConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    callbacks: dict[str, Any] = field(default_factory=dict)
    """The user's callbacks, ``{name: {target: package.module:function, options: {}}}``. See
    ``docs/loggers_and_callbacks.md``."""
    logger: Any = field(default_factory=lambda: ["tensorboard", "csv"])
    """A list of csv, mlflow, tensorboard, wandb. The table of csv is written in any case."""
    logger_options: LoggerOptionsConfig = field(default_factory=LoggerOptionsConfig)
    seed: int = setting(0, at_least=0, at_most=2**32 - 1)
    """Seed of everything that is drawn: the decoder's weights, order and augmentation."""
    resume: Optional[str] = "auto"
    """auto: resume from the run folder's last checkpoint if there is one. A path: resume from that
    file. Null: start from the beginning."""
    resume_changed_data: bool = False
    """Resume although the dataset has lost or gained images since the checkpoint, so that an epoch
    has another number of steps. The schedule goes on at the same epoch."""
