"""What the help page of each program says: purpose, examples, the settings that matter.

Their meaning, values and defaults are not here. `moco.cli.help_pages` takes them from the schema.
"""

from dataclasses import dataclass, field

IMAGES = (
    "cifar10", "cifar100", "custom", "digits", "fashion_mnist", "hdf5", "hf", "image_folder",
    "images", "npz", "packed", "stl10", "synthetic", "webdataset", "zarr",
)  # fmt: skip
"""The choices of ``data`` that hold images alone."""
IMAGES_WITH_MASKS = ("segmentation_folder", "voc2012")
HYDRA_OPTIONS = {
    "-m": "A sweep: one run for each combination of values, as in a=1,2 b=x,y.",
    "--cfg job --resolve": "Print every value that the command would use, and end.",
    "--config-dir=DIR": "Use your own YAML files beside those of the project.",
    "--help-all": "Every setting with its meaning, values and default.",
    "--help WORD": "One group or setting: --help data, --help data.root.",
    "-sc install=bash": "The tab key completes settings: docs/shell_completion.md.",
    "--hydra-help": "The other options, which are Hydra's.",
    "--version": "The versions of the project and of its libraries.",
}


@dataclass(frozen=True)
class ProgramText:
    """What one program is, for somebody who has never used it."""

    purpose: str
    """One or two sentences."""
    usage: str
    """What follows the name of the program on the command line."""
    examples: dict[str, str]
    """What follows the name of the program, and what it does."""
    settings: tuple[str, ...] = ()
    """The settings that matter, at most 15, in the order in which a user meets them."""
    groups: dict[str, tuple[str, ...] | None] = field(default_factory=dict)
    """The config groups of the program, each with its choices. None: all files of the group."""
    output: str = ""
    """Where the results are."""
    options: dict[str, str] = field(default_factory=lambda: HYDRA_OPTIONS)
    """Options, and what each does. Where there is a schema they are Hydra's and ours."""


PROGRAMS = {
    "train": ProgramText(
        purpose="Pretrain a backbone on images without labels, by Momentum Contrast (MoCo).",
        usage="[+experiment=NAME] [data.root=PATH] [key=value ...]",
        examples={
            "+experiment=quickstart": "Bundled digits and a tiny ResNet: minutes on a CPU.",
            "data.root=/data/photos": "Your own images: any folder, without labels.",
            "-m +experiment=quickstart method.temperature=0.1,0.2": (
                "A sweep: a run for each value."
            ),
        },
        settings=(
            "data.root",
            "data.image_size",
            "data.batch_size",
            "data.num_workers",
            "trainer.max_epochs",
            "trainer.devices",
            "trainer.precision",
            "method.queue_size",
            "method.temperature",
            "method.key_momentum",
            "optimizer.lr",
            "evaluation.num_neighbors",
            "init_from",
            "resume",
            "seed",
        ),
        groups={
            "experiment": None,
            "data": IMAGES,
            "backbone": None,
            "method": None,
            "augmentation": None,
            "optimizer": None,
            "hydra/launcher": None,
        },
        output="runs/EXPERIMENT/TIME/, or the folder of hydra.run.dir=PATH. The same command with "
        "hydra.run.dir=FOLDER resumes the run of that folder.",
    ),
    "evaluate": ProgramText(
        purpose="Measure frozen features: kNN, linear classifiers, segmentation by patches.",
        usage="checkpoint=PATH [evaluation=KIND] [key=value ...]",
        examples={
            "checkpoint=RUN/checkpoints/last.ckpt": "kNN on the data of the run.",
            "checkpoint=last.ckpt data=image_folder data.root=/data/flowers": "On other images.",
            "checkpoint=last.ckpt evaluation=linear": "Linear classifiers on the same features.",
        },
        settings=(
            "checkpoint",
            "data.root",
            "data.labels",
            "data.held_out",
            "data.image_size",
            "data.num_workers",
            "evaluation.feature",
            "evaluation.num_neighbors",
            "evaluation.temperature",
            "evaluation.images_per_class",
            "evaluation.plots",
            "evaluation.map",
            "evaluation.batch_size",
            "accelerator",
            "output",
        ),
        groups={
            "evaluation": None,
            "data": (*IMAGES, *IMAGES_WITH_MASKS),
            "backbone": None,
        },
        output="runs/evaluate/TIME/ holds metrics.json and the plots.",
    ),
    "segment": ProgramText(
        purpose="Fine-tune a pretrained backbone for semantic segmentation.",
        usage="checkpoint=PATH data.root=PATH [key=value ...]",
        examples={
            "checkpoint=last.ckpt data.root=/data/water image_size=512": "Images with masks.",
            "checkpoint=last.ckpt data=voc2012 data.download=true": "Pascal VOC 2012.",
            "checkpoint=last.ckpt data.root=/data/water freeze_backbone=true": "The decoder alone.",
        },
        settings=(
            "checkpoint",
            "data.root",
            "label_fraction",
            "data.class_names",
            "data.ignore_index",
            "data.batch_size",
            "data.num_workers",
            "image_size",
            "inference",
            "freeze_backbone",
            "backbone.window_size",
            "loss",
            "optimizer.lr",
            "trainer.max_epochs",
            "seed",
        ),
        groups={
            "data": IMAGES_WITH_MASKS,
            "decoder": None,
            "backbone": None,
            "hydra/launcher": None,
        },
        output="runs/segment/TIME/, or the folder of hydra.run.dir=PATH.",
    ),
    "predict": ProgramText(
        purpose="Write masks for new images, by a model of moco.segment.",
        usage="checkpoint=RUN data.root=PATH output=FOLDER [key=value ...]",
        examples={
            "checkpoint=RUN data.root=/data/photos output=masks overlays=true": (
                "Any folder of images."
            ),
            "checkpoint=RUN data.root=/data/scenes output=masks data.tile=512": (
                "Rasters of any size, in windows."
            ),
            "checkpoint=RUN data=segmentation_folder data.root=/data/water output=masks tta=true": (
                "Images with masks: the figures, too."
            ),
        },
        settings=(
            "checkpoint",
            "data.root",
            "output",
            "inference",
            "image_size",
            "tta",
            "tta_scales",
            "overlays",
            "probabilities",
            "batch_size",
            "data.num_workers",
            "data.tile",
            "split",
            "accelerator",
            "devices",
        ),
        groups={"data": (*IMAGES, *IMAGES_WITH_MASKS)},
        output="masks/, classes.json and metrics.json in the folder that output= names.",
    ),
    "embed": ProgramText(
        purpose="Write the features of any images, and an index that finds their neighbours.",
        usage="checkpoint=PATH [output=FILE.npz] [key=value ...]",
        examples={
            "checkpoint=runs/NAME/TIME": "The images of the run.",
            "checkpoint=last.ckpt data=images data.root=/data/photos output=photos.npz": (
                "Any other images."
            ),
            "checkpoint=last.ckpt output=test.npz split=test": "The images that are held out.",
        },
        settings=(
            "checkpoint",
            "output",
            "data.root",
            "data.labels",
            "data.image_size",
            "split",
            "data.held_out",
            "feature",
            "encoder",
            "index",
            "batch_size",
            "data.num_workers",
            "data.bands",
            "data.value_range",
            "accelerator",
        ),
        groups={"data": IMAGES, "backbone": None},
        output="embeddings/ of the checkpoint's run, or the file that output= names.",
    ),
    "export": ProgramText(
        purpose="Write the weights of a backbone for other libraries.",
        usage="checkpoint=PATH format=FORMAT [output=FILE] [key=value ...]",
        examples={
            "checkpoint=last.ckpt format=torchvision output=resnet.pth": "Names of torchvision.",
            "checkpoint=last.ckpt format=timm output=swin.safetensors": "Names of timm.",
            "checkpoint=last.ckpt format=safetensors output=backbone.safetensors": (
                "A file that describes itself."
            ),
        },
        settings=(
            "checkpoint",
            "format",
            "output",
            "encoder",
            "image_size",
            "backbone.name",
            "backbone.window_size",
            "backbone.pretrained_window_size",
            "trust_targets",
        ),
        groups={"backbone": None},
        output="Beside the checkpoint of a run, or the file that output= names.",
    ),
    "pack": ProgramText(
        purpose="Write a copy of a dataset that reads faster.",
        usage="data.root=PATH output=FOLDER [key=value ...]",
        examples={
            "data.root=/data/photos output=/fast/copy data.resize=256": "Any folder of images.",
            "data=image_folder data.root=/data/flowers output=/fast/copy format=shards": (
                "Tar files of JPEGs."
            ),
            "data.root=/data/photos output=/fast/copy check=true": "Check a finished copy.",
        },
        settings=(
            "data.root",
            "output",
            "data.resize",
            "format",
            "quality",
            "data.num_workers",
            "check",
            "max_shard_bytes",
            "data.labels",
            "data.held_out",
            "data.bands",
            "data.pages",
            "data.tile",
            "data.max_bad_fraction",
            "data.max_image_pixels",
        ),
        groups={"data": IMAGES},
        output="The folder that output= names. Train with data=packed data.root=FOLDER.",
    ),
    "preview": ProgramText(
        purpose="Draw pairs of augmented views as a run with the same settings will see them.",
        usage="[+experiment=NAME] [data.root=PATH] [key=value ...]",
        examples={
            "data.root=/data/photos": "The pairs of your own images.",
            "+experiment=own_images_medium data.root=/data/photos output=pairs.png": (
                "Your own images."
            ),
            "+experiment=quickstart augmentation=cifar output=pairs.png num_pairs=16": (
                "Another augmentation, and more pairs."
            ),
        },
        settings=(
            "data.root",
            "output",
            "num_pairs",
            "data.image_size",
            "augmentation.query",
            "augmentation.key",
            "augmentation.mean",
            "augmentation.std",
            "data.pair",
            "data.group",
            "data.bands",
            "data.value_range",
            "preview.bands",
            "data.engine",
            "seed",
        ),
        groups={"experiment": None, "data": IMAGES, "augmentation": None},
        output="runs/preview/TIME/pairs.png, or the file that output= names.",
    ),
    "stats": ProgramText(
        purpose="Measure the values of a dataset, band by band, and print the settings that fit.",
        usage="data.root=PATH [key=value ...]",
        examples={
            "data.root=/data/scenes": "Range, mean and standard deviation of all bands.",
            "data.root=/data/scenes per_band=true low=1 high=99": "A range for each band.",
            "data.root=/data/scenes data.bands=[4,3,2]": "Some bands alone.",
        },
        settings=(
            "data.root",
            "data.bands",
            "data.nodata",
            "low",
            "high",
            "per_band",
            "data.num_workers",
            "output",
            "data.pages",
            "data.tile",
            "data.band_files",
            "data.dicom_window",
            "data.image_key",
            "data.max_bad_fraction",
            "data.max_image_pixels",
        ),
        groups={"data": IMAGES},
        output="runs/stats/TIME/stats.json, or the file that output= names.",
    ),
    "sweep": ProgramText(
        purpose="Print a table of the runs of a sweep.",
        usage="FOLDER [--csv FILE]",
        examples={
            "runs/sweep/NAME": "The figures of all runs, side by side.",
            "runs/sweep/NAME --csv table.csv": "Also every figure in a file.",
            "runs/segment/sweep/NAME": "A sweep of moco.segment.",
        },
        options={
            "--csv FILE": "Write the table there, too, with every figure of the runs.",
            "--version": "The versions of the project and of its libraries.",
        },
    ),
}
