"""The settings of pretraining: their names, types, ranges and meaning. Other programs' schemas take parts from here."""

from dataclasses import dataclass, field
from typing import Any, Optional

from omegaconf import MISSING


def setting(
    default: Any = MISSING,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A dataclass field whose value `moco.config.parsing.parse` holds to a range or a list of choices."""
    limits = {
        "above": above,
        "at_least": at_least,
        "below": below,
        "at_most": at_most,
        "choices": choices,
    }
    return field(
        default=default,
        metadata={name: limit for name, limit in limits.items() if limit is not None},
    )


@dataclass
class BackboneConfig:
    name: str = MISSING
    """A builder in ``moco.models.backbones``. Null settings are left at its defaults; of the others each belongs to some."""
    stem: Optional[str] = setting(None, choices=("imagenet", "cifar", "solo_cifar"))
    """ResNet. imagenet: 7x7 convolution of stride 2 and max-pool; cifar: 3x3 convolution of stride 1,
    no pool; solo_cifar: the same with padding 2 in place of 1, as in solo-learn."""
    window_size: Any = None
    """Swin: side of the attention windows, cells; one number, or a list with one for each stage."""
    pretrained_window_size: Any = None
    """Swin V2: the window that the weights were pretrained with, if it is not window_size; one number,
    or a list with one for each stage."""
    pretrained_image_size: Optional[int] = setting(None, at_least=4)
    """Swin V2: side of the images of that pretraining, px. Windows that normalise position biases are
    clipped to the maps of such images, as in Microsoft's code and timm; null: they are not. See
    ``docs/swin_v2.md``."""
    stochastic_depth: Optional[float] = setting(None, at_least=0, at_most=0.99)
    """Swin, ViT: chance that an image skips the last block's branches; rises linearly from 0 at the first block."""
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
    """w of DenseCL: the loss is (1 - w) times MoCo's plus w times the dense term; 0 leaves it out."""
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
    """A builder in ``moco.data.sources.registry``."""
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
    """Who augments. worker: the loader's processes, image by image; batch: the device, batch by batch (of files the
    processes still decode and crop); auto: batch for small images in memory and on a GPU, else worker."""
    num_workers: int = setting(4, at_least=0)
    """Loader processes per device; 0 loads in the training process. Results do not depend on it."""
    max_bad_fraction: float = setting(0.01, at_least=0, at_most=1)
    """Share of unreadable images beyond which the run stops."""
    max_image_pixels: int = setting(178_956_970, at_least=1)
    """An image of more px is unreadable, judged by its header: a small file can claim any size. The default is the one from
    which Pillow takes an image for an attack; decoded it takes half a gigabyte."""
    held_out: float = setting(0.1, at_least=0, at_most=1)
    """``image_folder`` without a validation folder: share of the images that the monitor holds out of its bank, by a hash
    of their paths, so that an image keeps its side when others are added. They are trained on like all others."""
    pages: str = setting("first", choices=("each", "first"))
    """``images``, ``image_folder``: of TIFF files with several pages take the first, or each as an image of its own."""
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
    """The query view's operations in order, each with its numbers: see ``moco.data.augment.operations``."""
    key: dict[str, Any] = field(default_factory=dict)
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    """Per channel, of pixels in 0..1 (ImageNet's)."""
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    start_image_size: Optional[int] = setting(None, at_least=4)
    """Side of the views in the first epoch, px; they grow to data.image_size, at which evaluation stays. Null: no growth."""
    image_size_step: Optional[int] = setting(None, at_least=1)
    """By how much they grow at a time, px; null: 32. Each size is compiled anew under trainer.compile."""
    ramp_epochs: Optional[int] = setting(None, at_least=1)
    """Epochs with smaller views; each smaller size gets the same share of them."""


@dataclass
class TrainerConfig:
    """Handed to ``pytorch_lightning.Trainer`` under the same names."""

    max_epochs: int = setting(200, at_least=1)
    max_steps: int = setting(-1, at_least=-1)
    """Optimizer steps; -1: max_epochs alone decides."""
    accelerator: str = setting("auto", choices=("auto", "cpu", "cuda", "gpu", "mps"))
    """auto: CUDA where it can be used, else the CPU, also on a Mac. mps (Apple's GPUs) is refused: it has no float64."""
    devices: int = setting(1, at_least=1)
    """Per node; each has a process of its own. data.batch_size stays the batch of all of them together."""
    num_nodes: int = setting(1, at_least=1)
    """Above 1, srun or torchrun has to start the processes, one per device."""
    timeout_minutes: float = setting(30.0, above=0)
    """So long may a process wait for the gradients or keys of the others before the run fails."""
    precision: str = setting("auto", choices=("auto", "32-true", "bf16-mixed", "16-mixed"))
    """auto: bf16-mixed on GPUs that have it and on CPUs that are faster in it (AMX, AMD's AVX-512, ARM), else 32-true."""
    memory_format: str = setting("auto", choices=("auto", "channels_last", "contiguous"))
    """How weights and maps of convolutions lie in memory. auto: channels_last where most weights are convolutions'."""
    compile: Optional[bool] = None
    """Encoders by torch.compile, which takes 20 s (ResNet-18) to minutes at the first step of each size of views; without a
    compiler they run as they are. null: on one GPU, for nets of convolutions that see one view each in a step."""
    cuda_graphs: Optional[bool] = None
    """Of compiled encoders on one GPU, without accumulate_grad_batches: start the kernels of a pass all at once, not one by
    one. null: where compile: null compiles."""
    accumulate_grad_batches: int = setting(1, at_least=1)
    """Batches per optimizer step; each holds data.batch_size / this many images."""
    gradient_clip_val: Optional[float] = setting(None, above=0)
    """Largest L2 norm of all gradients together; null: no clipping."""
    max_bad_steps: int = setting(10, at_least=1)
    """So many steps in a row without a finite loss and gradients end the run; fewer are left out and counted."""
    log_every_n_steps: int = setting(10, at_least=1)
    deterministic: bool = False
    """Only operations that give the same bits in every run; a run that needs others on a GPU is refused."""
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
    precision: str = setting("32-true", choices=("32-true", "bf16-mixed"))
    """In which the run's own kNN computes features, whatever it trains in; `moco.evaluate` computes in 32-true."""
    every_n_epochs: int = setting(1, at_least=1)
    baselines: bool = False
    """Before training, measure raw pixels and the untrained backbone on the same protocol."""
    online_probe: bool = False
    """Train a linear classifier beside the encoder: see ``moco.callbacks.online_probe``."""
    diagnostics_every_n_steps: Optional[int] = setting(100, at_least=1)
    """Optimizer steps between two measurements of the label-free figures that take time: see ``docs/diagnostics.md``; null:
    none. Whether the embeddings collapse is watched in any case."""
    plots_every_n_epochs: Optional[int] = setting(10, at_least=1)
    """Between images of view pairs, nearest neighbours and confusions in TensorBoard; null: none."""
    projector_images: int = setting(5000, at_least=0, at_most=10000)
    """Labelled images in TensorBoard's embedding projector, written at the end; 0: no projector."""


@dataclass
class DenseMonitorConfig:
    """kNN segmentation by patch features beside the image-level kNN: see ``docs/evaluation.md``."""

    data: Optional[str] = setting(None, choices=("segmentation_folder", "voc2012"))
    """A small set of images with masks; null: no such measurement."""
    root: Optional[str] = None
    """Its folder."""
    ignore_index: int = setting(255, at_least=0, at_most=65535)
    """The number of a mask's pixels without a class."""
    num_images: Optional[int] = setting(200, at_least=1)
    """So many images of each part, evenly spaced; null: all."""
    image_size: Optional[int] = setting(None, at_least=4)
    """Shorter side that the images are scaled to, px; null: data.image_size."""
    every_n_epochs: int = setting(1, at_least=1)
    num_neighbors: int = setting(30, at_least=1)
    """k."""
    temperature: float = setting(0.02, above=0)
    """T of the vote's weights exp(similarity / T)."""
    maps: list[int] = field(default_factory=lambda: [4])
    """Which of the backbone's feature maps, from 1, the finest, to 4; several are joined at the finest one's size."""
    bank_size: int = setting(10_000, at_least=1)
    """Patches that are learned from; each image to learn from gives the same share of them."""
    sampling: str = setting("balanced", choices=("balanced", "uniform"))
    """How an image's patches are drawn. balanced: its classes take turns; uniform: all have the same chance."""
    batch_size: int = setting(16, at_least=1)
    """Images per forward pass, of one size."""


@dataclass
class ExtraMonitorsConfig:
    """Measurements during training that need data of their own."""

    dense: DenseMonitorConfig = field(default_factory=DenseMonitorConfig)


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
    monitor: ExtraMonitorsConfig = field(default_factory=ExtraMonitorsConfig)
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
    """The image to write, a .png."""
    num_pairs: int = setting(8, at_least=1, at_most=64)
