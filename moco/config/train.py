"""The settings of pretraining: their names, types, ranges and meaning."""

from dataclasses import dataclass, field
from typing import Any, Optional

from omegaconf import MISSING

from moco.config.data import DataConfig, DisplayConfig
from moco.config.settings import setting


@dataclass
class BackboneConfig:
    """The backbone and its options."""

    name: str = MISSING
    """A backbone of ``moco.models.backbones``. A null setting keeps the backbone's default. Each
    other setting belongs to the backbones that its text names."""
    stem: Optional[str] = setting(None, choices=("imagenet", "cifar", "solo_cifar"))
    """ResNet. imagenet: a 7x7 convolution of stride 2 and max-pooling. cifar: a 3x3 convolution of
    stride 1, no pooling. solo_cifar: the same with padding 2 instead of 1, as in solo-learn."""
    norm: Optional[str] = setting(None, choices=("pre", "res_post"))
    """Swin: what Swin V2 changes, part 1. pre (Swin V1): normalise what enters the attention and
    the MLP of a block. res_post (V2): normalise what they return. See ``docs/backbones.md``."""
    attention: Optional[str] = setting(None, choices=("dot", "cosine"))
    """Swin: part 2. dot (V1): dot products of queries and keys. cosine (V2): their cosines, with a
    learned scale for each head."""
    position_bias: Optional[str] = setting(None, choices=("table", "linear_cpb", "log_cpb"))
    """Swin: part 3. table (V1): a learned number for each offset. An MLP of the offset on a linear
    scale (linear_cpb) or a log scale (log_cpb, V2) keeps its biases in other windows."""
    window_size: Any = None
    """Swin: side of the attention windows, cells. One number, or a list with one per stage."""
    pretrained_window_size: Any = None
    """Swin with an MLP for position_bias: the window of the pretraining, if it is not window_size.
    One number, or a list with one per stage."""
    pretrained_image_size: Optional[int] = setting(None, at_least=4)
    """Swin with an MLP for position_bias: image side of the pretraining, px. The windows that
    normalise the offsets are clipped to the maps of such images, as in Microsoft's code and timm.
    Null: they are not clipped. See ``docs/swin_v2.md``."""
    stochastic_depth: Optional[float] = setting(None, at_least=0, at_most=0.99)
    """Swin, ViT: probability that an image skips the branches of the last block. It rises linearly
    from 0 at the first block."""
    gradient_checkpointing: Optional[bool] = None
    """Swin, ViT: use less memory and a third more computing time."""
    freeze_patch_embed: Optional[bool] = None
    """Swin, ViT: keep the random patch projection, as MoCo v3 does."""
    partial_patches: Optional[str] = setting(None, choices=("complete", "drop"))
    """Swin, ViT: complete the last patches with zeros, or drop the pixels that fill no patch."""
    num_heads: Optional[int] = setting(None, at_least=1)
    """ViT: attention heads. vit_small has 12, as in MoCo v3. Weights of DeiT-S and of timm's ViT-S
    need 6."""
    learned_positions: Optional[int] = setting(None, at_least=1)
    """ViT: side of the grid of learned positions, cells (14 for 224 px). It is for weights that
    were trained with learned positions. Null: the fixed sine-cosine positions of MoCo v3."""
    model: Optional[str] = None
    """timm: the name of timm's network, such as ``convnext_tiny``."""
    pretrained: Optional[bool] = None
    """timm: start from timm's weights."""
    target: Optional[str] = None
    """custom: the function that makes the backbone, ``package.module:function``."""
    options: Any = None
    """timm, custom and registered backbones: keyword arguments of the function that makes it,
    ``{name: value}``."""
    image_size: Optional[int] = setting(None, at_least=4)
    """timm, custom and registered backbones: side of the images, px, for networks that need it.
    Null: that of the run."""
    in_channels: Optional[int] = setting(None, at_least=1)
    """Bands of the images. Null: those of the run's images. A custom function gets the number if it
    has such an argument."""
    zero_init_residual: Optional[bool] = None
    """ResNet: every residual block starts as the identity, as in MoCo v3."""


@dataclass
class ProjectorConfig:
    """Linear layers with ReLU between them. ``moco.models.heads`` lists the published ones."""

    num_layers: int = setting(2, at_least=1)
    """1 is MoCo v1's head, 2 is v2's."""
    hidden_dim: Optional[int] = setting(None, at_least=1)
    """Width of the hidden layers. Null: the width of the input."""
    hidden_batch_norm: bool = False
    """BatchNorm before every ReLU."""
    last_batch_norm: bool = False
    """BatchNorm without scale and shift at the end."""
    bias: bool = True
    """Whether the linear layers have a bias."""


@dataclass
class PredictorConfig(ProjectorConfig):
    """As the projector."""

    num_layers: int = setting(0, at_least=0)
    """0: no predictor."""


@dataclass
class MethodConfig:
    """The switches of the MoCo family.

    ``docs/methods.md`` shows what each published method sets.
    """

    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    """Maps the backbone's feature to the embedding, in both encoders."""
    predictor: PredictorConfig = field(default_factory=PredictorConfig)
    """Maps embedding to embedding, for queries only."""
    embedding_dim: int = setting(128, at_least=2)
    """Width of the projector's output (C in the papers)."""
    negatives: str = setting("queue", choices=("batch", "queue"))
    """queue: keys of earlier steps. batch: the other keys of the same step, of all devices."""
    queue_size: Optional[int] = setting(65536, at_least=1)
    """Number of keys in the queue (K in the papers). Null: no queue."""
    num_queues: int = setting(1, at_least=1, at_most=2)
    """1: all keys go to one queue. 2: the keys of each view have their own queue of queue_size,
    which needs the symmetric loss."""
    queue_start: str = setting("random", choices=("random", "empty"))
    """random: random unit vectors fill the queue at the start, as published. empty: only the keys
    seen so far are negatives."""
    temperature: float = setting(0.2, above=0)
    """Temperature of InfoNCE (T in the papers)."""
    key_momentum: float = setting(0.999, at_least=0, at_most=1)
    """Momentum of the key encoder's moving average (m in the papers)."""
    key_momentum_schedule: str = setting("constant", choices=("constant", "cosine"))
    """cosine: from key_momentum at the first step to key_momentum_end at the last step."""
    key_momentum_end: float = setting(1.0, at_least=0, at_most=1)
    """Momentum at the last step of the cosine schedule."""
    symmetric: bool = False
    """Use both views as query and as key."""
    symmetric_reduction: str = setting("sum", choices=("sum", "mean"))
    """How the losses of the two directions are joined. The official CIFAR notebook sums them."""
    loss_times_2t: bool = False
    """Multiply the loss by 2T, as MoCo v3 does. T then does not change the size of the gradient."""
    batch_norm: str = setting("auto", choices=("auto", "plain", "shuffle", "split", "sync"))
    """How BatchNorm is kept from leaking the positive key. See ``moco.methods.batch_norm``."""
    batch_norm_splits: int = setting(8, at_least=2)
    """Number of groups in the split mode. The default stands for the paper's eight GPUs."""
    dense_weight: float = setting(0.0, at_least=0, at_most=1)
    """Weight w of DenseCL's dense term: the loss is (1 - w) x MoCo's loss + w x the dense loss. 0
    disables the dense term."""
    dense_grid: int = setting(7, at_least=1)
    """Side of the grid to which the dense term pools the last feature map, cells. A smaller map is
    not pooled."""
    mask_own_group: bool = False
    """Leave out the negatives whose image belongs to the group of the query's image, see
    data.group. The queue then keeps the group of each key."""


@dataclass
class OptimizerConfig:
    """The optimizer, its learning rate over time and its weight decay."""

    name: str = setting("sgd", choices=("adamw", "lars", "sgd"))
    """The algorithm. ``optimizer=NAME`` sets it together with its published numbers."""
    lr: float = setting(0.03, above=0)
    """Learning rate of the first step after the warm-up."""
    lr_for_batch_size: Optional[int] = setting(None, at_least=1)
    """The batch size that lr, warmup_start_lr and final_lr are meant for. They are scaled in
    proportion to data.batch_size. Null: they are not scaled."""
    sgd_momentum: float = setting(0.9, at_least=0, at_most=1)
    """Momentum of SGD and LARS."""
    trust_coefficient: float = setting(1e-3, above=0)
    """Eta of LARS. A layer's trust ratio is eta x the norm of its weights / the norm of its
    gradient, and its learning rate is lr x this ratio."""
    trust_clip: bool = False
    """LARS: use the trust ratio itself as the layer's learning rate, with lr as the upper limit
    (LARC)."""
    beta1: float = setting(0.9, at_least=0, below=1)
    """AdamW: decay of the mean gradient."""
    beta2: float = setting(0.999, at_least=0, below=1)
    """AdamW: decay of the mean squared gradient."""
    eps: float = setting(1e-8, above=0)
    """AdamW: added to the root of the mean squared gradient."""
    weight_decay: float = setting(1e-4, at_least=0)
    """SGD and LARS add it times the weight to the gradient. AdamW shrinks the weight itself."""
    decay_all: bool = True
    """Apply weight decay to norms and biases too, as the official MoCo code does. LARS never does.
    The position parameters of a Swin are never decayed."""
    schedule: str = setting("cosine", choices=("constant", "cosine", "step"))
    """How the learning rate falls after the warm-up. cosine: to final_lr at the last step. step: at
    the milestones."""
    schedule_interval: str = setting("step", choices=("epoch", "step"))
    """How often the learning rate changes. In the official MoCo code it changes once per epoch."""
    schedule_offset_epochs: int = setting(0, at_least=0)
    """Added to the epoch that the schedule sees. The official CIFAR notebook counts from 1."""
    milestones: list[int] = field(default_factory=list)
    """step: epochs at which the learning rate is multiplied by step_factor."""
    step_factor: float = setting(0.1, above=0, at_most=1)
    """step: the learning rate is multiplied by this at each milestone."""
    warmup_epochs: float = setting(0, at_least=0)
    """The learning rate rises linearly from warmup_start_lr to lr, in every step."""
    warmup_start_lr: float = setting(0.0, at_least=0)
    """Learning rate of the first step of the warm-up."""
    final_lr: float = setting(0.0, at_least=0)
    """Where the cosine schedule ends, after the last step."""


@dataclass
class AugmentationConfig:
    """The pair of augmentations, and progressive resizing of the views."""

    query: Any = None
    """The operations of the query view in order, each with its settings; or a whole pipeline,
    ``{transforms: package.module:function, options: {...}}``. See docs/augmentation.md."""
    key: Any = None
    """The same for the key view."""
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    """Mean of each channel, for pixels in 0..1. The default is ImageNet's."""
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    """Standard deviation of each channel, for pixels in 0..1."""
    start_image_size: Optional[int] = setting(None, at_least=4)
    """Side of the views in the first epoch, px. They grow to data.image_size. Evaluation always
    uses data.image_size. Null: the views do not grow."""
    image_size_step: Optional[int] = setting(None, at_least=1)
    """Growth per step, px. Null: 32. With trainer.compile each size is compiled anew."""
    ramp_epochs: Optional[int] = setting(None, at_least=1)
    """Number of epochs with smaller views. Each smaller size gets the same share of them."""


@dataclass
class TrainerConfig:
    """Settings of ``pytorch_lightning.Trainer`` under the same names, and a few of our own."""

    max_epochs: int = setting(200, at_least=1)
    """Passes over the training images. The schedules end with the last one."""
    max_steps: int = setting(-1, at_least=-1)
    """Optimizer steps. -1: max_epochs alone decides."""
    accelerator: str = setting("auto", choices=("auto", "cpu", "cuda", "gpu", "mps"))
    """auto: CUDA if it works, else the CPU, also on a Mac. mps (Apple's GPUs) is refused because it
    has no float64."""
    devices: int = setting(1, at_least=1)
    """Devices per node, each with its own process. data.batch_size counts all devices together."""
    num_nodes: int = setting(1, at_least=1)
    """With more than 1, srun or torchrun has to start the processes, one per device."""
    timeout_minutes: float = setting(30.0, above=0)
    """How long a process waits for the gradients or keys of the others before the run fails."""
    precision: str = setting("auto", choices=("auto", "32-true", "bf16-mixed", "16-mixed"))
    """auto: bf16-mixed on GPUs that have it and on CPUs that are faster with it (AMX, AMD's
    AVX-512, ARM), else 32-true."""
    memory_format: str = setting("auto", choices=("auto", "channels_last", "contiguous"))
    """Memory layout of weights and feature maps. auto: channels_last if most weights belong to
    convolutions."""
    compile: Optional[bool] = None
    """Run the encoders by torch.compile. Compiling takes 20 s (ResNet-18) to minutes for each size
    of the views. Without a compiler the encoders run uncompiled. Null: compile on one GPU, for
    convolutional backbones whose encoders see one view per step."""
    cuda_graphs: Optional[bool] = None
    """Compiled encoders on one GPU, without accumulate_grad_batches: launch the kernels of a pass
    together. Null: wherever ``compile: null`` compiles."""
    accumulate_grad_batches: int = setting(1, at_least=1)
    """Batches per optimizer step. Each holds data.batch_size / accumulate_grad_batches images."""
    gradient_clip_val: Optional[float] = setting(None, above=0)
    """Largest L2 norm of all gradients together. Null: no clipping."""
    max_bad_steps: int = setting(10, at_least=1)
    """This many steps in a row without a finite loss and finite gradients end the run. Fewer are
    skipped and counted."""
    log_every_n_steps: int = setting(10, at_least=1)
    """Optimizer steps between two entries of the log."""
    deterministic: bool = False
    """Use only operations that give the same bits in every run. A run that needs others on a GPU is
    refused."""
    benchmark: bool = True
    """Let cuDNN choose its algorithms by trying them."""


@dataclass
class MonitorConfig:
    """What the run measures of itself, first the kNN protocol (see ``moco.evaluation.knn``)."""

    name: str = setting("knn", choices=("knn",))
    """The kind of the measurement. `moco.evaluate` has more of them."""
    num_neighbors: int = setting(200, at_least=1)
    """Neighbours that vote (k)."""
    temperature: float = setting(0.1, above=0)
    """Temperature T of the votes, which weigh exp(similarity / T)."""
    feature: str = setting("backbone", choices=("backbone", "embedding"))
    """What is compared: the output of the backbone, or of the projector behind it."""
    batch_size: int = setting(256, at_least=1)
    """Images per forward pass."""
    precision: str = setting("32-true", choices=("32-true", "bf16-mixed"))
    """Precision of the features for the run's own kNN, whatever the precision of the training.
    `moco.evaluate` always uses 32-true."""
    every_n_epochs: int = setting(1, at_least=1)
    """Epochs between two measurements. The last epoch is always measured."""
    baselines: bool = False
    """Before training, measure raw pixels and the untrained backbone with the same protocol."""
    online_probe: bool = False
    """Train a linear classifier beside the encoder. See ``moco.callbacks.online_probe``."""
    diagnostics_every_n_steps: Optional[int] = setting(100, at_least=1)
    """Optimizer steps between two measurements of the expensive label-free figures, see
    ``docs/diagnostics.md``. Null: none. The watch for collapse is always enabled."""
    plots_every_n_epochs: Optional[int] = setting(10, at_least=1)
    """Epochs between plots of view pairs, nearest neighbours and confusions in TensorBoard. Null:
    none."""
    projector_images: int = setting(5000, at_least=0, at_most=10000)
    """Labelled images in TensorBoard's embedding projector, written at the end. 0: no projector."""


@dataclass
class DenseMonitorConfig:
    """kNN segmentation with patch features during training. See ``docs/evaluation.md``."""

    data: Optional[str] = setting(None, choices=("segmentation_folder", "voc2012"))
    """A small dataset of images with masks. Null: no such measurement."""
    root: Optional[str] = None
    """The folder of that dataset."""
    ignore_index: int = setting(255, at_least=0, at_most=65535)
    """The number of mask pixels without a class."""
    num_images: Optional[int] = setting(200, at_least=1)
    """Number of images of each part, evenly spaced. Null: all."""
    image_size: Optional[int] = setting(None, at_least=4)
    """The shorter side of the images is resized to this, px. Null: data.image_size."""
    every_n_epochs: int = setting(1, at_least=1)
    """Epochs between two measurements."""
    num_neighbors: int = setting(30, at_least=1)
    """Neighbours that vote (k)."""
    temperature: float = setting(0.02, above=0)
    """Temperature T of the votes, which weigh exp(similarity / T)."""
    maps: list[int] = field(default_factory=lambda: [4])
    """Which feature maps of the backbone are used, from 1 (the finest) to 4. Several are joined at
    the size of the finest."""
    bank_size: int = setting(10_000, at_least=1)
    """Number of patches in the bank. Each training image gives the same share of them."""
    sampling: str = setting("balanced", choices=("balanced", "uniform"))
    """How the patches of an image are drawn. balanced: its classes take turns. uniform: all patches
    have the same chance."""
    batch_size: int = setting(16, at_least=1)
    """Images per forward pass, all of one size."""


@dataclass
class ExtraMonitorsConfig:
    """Measurements during training that need data of their own."""

    dense: DenseMonitorConfig = field(default_factory=DenseMonitorConfig)


@dataclass
class CheckpointConfig:
    """When a run saves. Each time ``last.ckpt`` becomes ``previous.ckpt`` and is replaced."""

    every_n_epochs: int = setting(1, at_least=1)
    """Epochs between two checkpoints. The last epoch is always saved."""
    every_n_minutes: float = setting(30.0, above=0)
    """Also save at the end of a step when the last checkpoint is older than this."""
    keep_every_n_epochs: Optional[int] = setting(None, at_least=1)
    """Keep the checkpoint of every n-th epoch for good, as ``checkpoints/epoch_0100.ckpt``. Null:
    keep none."""


@dataclass
class SlurmConfig:
    """What a run does as a SLURM job. It has no effect elsewhere."""

    signal: Optional[str] = setting("auto", choices=("auto", "USR1", "USR2"))
    """SLURM sends this signal shortly before the job's time limit. The run then saves and ends.
    auto: USR2 for jobs of hydra/launcher=slurm, otherwise USR1. Null: none."""
    requeue: bool = True
    """After that signal, queue the job again. It goes on from its checkpoint."""


@dataclass
class LoggerOptionsConfig:
    """Options of the loggers that have any."""

    mlflow: dict[str, Any] = field(default_factory=dict)
    """Of Lightning's MLFlowLogger, such as ``tracking_uri`` and ``experiment_name``."""
    wandb: dict[str, Any] = field(default_factory=dict)
    """Of Lightning's WandbLogger and of ``wandb.init``, such as ``project`` and ``mode``."""


@dataclass
class TrainConfig:
    """Everything that ``python -m moco.train`` can be told."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: MonitorConfig = field(default_factory=MonitorConfig)
    monitor: ExtraMonitorsConfig = field(default_factory=ExtraMonitorsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    preview: DisplayConfig = field(default_factory=DisplayConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    callbacks: dict[str, Any] = field(default_factory=dict)
    """The user's callbacks, ``{name: {target: package.module:function, options: {}}}``. See
    ``docs/loggers_and_callbacks.md``."""
    logger: Any = field(default_factory=lambda: ["tensorboard", "csv"])
    """A list of csv, mlflow, tensorboard, wandb. The table of csv is written in any case."""
    logger_options: LoggerOptionsConfig = field(default_factory=LoggerOptionsConfig)
    seed: int = setting(0, at_least=0, at_most=2**32 - 1)
    """Seed of everything that is drawn: initial weights, order of the images, augmentation."""
    resume: Optional[str] = "auto"
    """auto: go on from the last checkpoint in the run folder, if there is one. A path: go on from
    that file. Null: start anew."""
    resume_changed_data: bool = False
    """Resume although the dataset has lost or gained images since the checkpoint, so that an epoch
    has another number of steps. The schedule goes on at the same epoch."""
    init_from: Optional[str] = None
    """A file of weights or a run folder with which a new run starts, from this project or another
    one. See ``docs/weights.md``. A run that goes on from its checkpoint does not read it."""


@dataclass
class PreviewConfig(TrainConfig):
    """Everything that ``python -m moco.preview`` can be told."""

    output: Optional[str] = None
    """The .png file to write. Null: pairs.png in the run folder."""
    num_pairs: int = setting(8, at_least=1, at_most=64)
    """Number of images, each drawn as its query view and its key view."""
