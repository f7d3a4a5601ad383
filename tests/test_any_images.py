"""Images of many bands and wide types, through every program: from files to weights and masks."""

import json

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import moco
from moco.data.sources.registry import build_source
from moco.data.sources.source import Reading
from tests.conftest import run_program

BANDS = 13
SMALL = (
    "backbone=resnet_tiny", "augmentation=custom", "data.image_size=16", "data.batch_size=8",
    "augmentation.query={random_resized_crop: {scale: [0.3, 1]}, horizontal_flip: {probability: 0.5}}",
    "augmentation.key=${.query}", "augmentation.mean=[0.5]", "augmentation.std=[0.25]",
    "method.batch_norm_splits=2", "method.queue_size=16", "data.num_workers=0",
    "trainer.max_epochs=1", "trainer.accelerator=cpu", "evaluation.num_neighbors=3",
)  # fmt: skip


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """20 GeoTIFF-like files of 20 x 24 px with 13 bands of uint16, in two classes."""
    root = tmp_path_factory.mktemp("scenes")
    rng = np.random.default_rng(0)
    for number in range(20):
        folder = root / ("forest", "water")[number % 2]
        folder.mkdir(exist_ok=True)
        pixels = rng.normal(1500 + 2000 * (number % 2), 300, (20, 24, BANDS)).clip(0)
        tifffile.imwrite(
            folder / f"{number:02}.tif", pixels.astype(np.uint16), photometric="minisblack",
            planarconfig="contig",
        )  # fmt: skip
    return root


def run(module, *arguments, cwd):
    done = run_program(module, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout + done.stderr


def arrays_of(source):
    return [source.train.opened(index).pixels() for index in range(len(source.train))]


def test_a_folder_of_13_bands_trains_and_its_checkpoint_is_of_13_bands(scenes, tmp_path):
    data = ["data=image_folder", f"data.root={scenes}", "data.value_range=[0,6000]"]
    output = run("moco.train", *SMALL, *data, "hydra.run.dir=run", cwd=tmp_path)
    assert "13 bands of uint16" in output
    figures = json.loads((tmp_path / "run/metrics.json").read_text())
    # Forest and water differ by their brightness alone.
    assert figures["knn/top1"] == 1
    weights = torch.load(tmp_path / "run/checkpoints/backbone.pth", weights_only=True)
    assert (
        next(tensor.shape[1] for tensor in weights["state_dict"].values() if tensor.ndim == 4)
        == BANDS
    )


@pytest.mark.slow
def test_every_program_takes_them(scenes, tmp_path):
    data = ["data=image_folder", f"data.root={scenes}", "data.value_range=[0,6000]"]
    preview = ["preview.bands=[4,3,2]"]
    run("moco.train", *SMALL, *data, *preview, "hydra.run.dir=run", cwd=tmp_path)
    run("moco.preview", *SMALL, *data, *preview, "output=pairs.png", "num_pairs=2", cwd=tmp_path)
    with Image.open(tmp_path / "pairs.png") as sheet:
        # Normal noise in a view of small contrast is stretched to the whole range.
        assert np.ptp(np.asarray(sheet)[20:100, 10:100]) > 200
    checkpoint = "checkpoint=run/checkpoints/last.ckpt"
    small = ["accelerator=cpu", "data.num_workers=0"]
    run("moco.evaluate", checkpoint, *small, *preview, "output=knn.json", cwd=tmp_path)
    assert json.loads((tmp_path / "knn.json").read_text())["knn/top1"] == 1
    run("moco.embed", checkpoint, *small, "output=features.npz", cwd=tmp_path)
    features = np.load(tmp_path / "features.npz")["features"]
    assert features.shape[0] == 20
    assert np.isfinite(features).all()

    run("moco.pack", *data[:2], "output=packed", "num_workers=0", cwd=tmp_path)
    run(
        "moco.embed",
        checkpoint,
        *small,
        "data=packed",
        "data.root=packed",
        "output=again.npz",
        cwd=tmp_path,
    )
    again = np.load(tmp_path / "again.npz")["features"]
    np.testing.assert_array_equal(np.sort(again, axis=0), np.sort(features, axis=0))

    init = ["init_from=run/checkpoints/backbone.pth", "hydra.run.dir=second"]
    run("moco.train", *SMALL, *data, *init, cwd=tmp_path)
    run("moco.export", checkpoint, "format=safetensors", "output=net.safetensors", cwd=tmp_path)
    exported = moco.load_encoder(tmp_path / "net.safetensors")
    assert exported.encode(torch.rand(2, BANDS, 16, 16)).shape == (2, features.shape[1])


@pytest.mark.slow
def test_masks_beside_images_of_many_bands(scenes, tmp_path):
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (tmp_path / "seg" / folder).mkdir(parents=True)
    for number in range(8):
        mask = np.zeros((24, 24), np.uint8)
        mask[:, : rng.integers(8, 17)] = 1
        pixels = rng.normal(1500, 200, (24, 24, 5)) + 2000.0 * mask[..., None]
        np.save(tmp_path / f"seg/images/{number}.npy", pixels.astype(np.int16))
        Image.fromarray(mask).save(tmp_path / f"seg/masks/{number}.png")
    small = [
        "backbone=resnet_tiny", "backbone.stem=cifar", "checkpoint=null", "data=segmentation_folder",
        "data.root=seg", "data.batch_size=4", "data.num_workers=0", "image_size=24",
        "trainer.accelerator=cpu", "trainer.max_epochs=12", "decoder.name=linear", "optimizer.lr=0.01",
        "data.value_range=[0,5000]", "augmentation.mean=[0.5]", "augmentation.std=[0.25]",
        "hydra.run.dir=masks",
    ]  # fmt: skip
    run("moco.segment", *small, cwd=tmp_path)
    figures = json.loads((tmp_path / "masks/metrics.json").read_text())
    assert figures["segment/miou"] > 0.8


@pytest.mark.parametrize("form", ["array", "shards"])
@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32", "uint8"])
def test_packed_copies_and_shards_hold_equal_arrays(form, dtype, tmp_path):
    from moco.config.pack import PackConfig
    from moco.pack import run as pack

    rng = np.random.default_rng(0)
    root = tmp_path / "images"
    root.mkdir()
    kept = {}
    for number in range(5):
        pixels = rng.normal(0, 1000, (6 + number, 9, BANDS)).astype(dtype)
        tifffile.imwrite(
            root / f"{number}.tif", pixels, photometric="minisblack", planarconfig="contig"
        )
        kept[str(root / f"{number}.tif")] = pixels
    config = PackConfig(output=str(tmp_path / "copy"), format=form, num_workers=0)
    config.data.name, config.data.root = "images", str(root)
    pack(config, tmp_path / "run")
    copy = build_source("packed", str(tmp_path / "copy"))
    copy.read_as(Reading(raw=True))
    assert len(copy.train) == 5
    for index in range(5):
        np.testing.assert_array_equal(
            copy.train.opened(index).pixels(), kept[copy.train.name(index)]
        )
    if form == "shards":
        shards = build_source("webdataset", str(tmp_path / "copy"))
        found = [
            sample.image.pixels()
            for shard in shards.train.shards
            for sample in shards.train.samples(shard)
        ]
        assert {each.tobytes() for each in found} == {each.tobytes() for each in kept.values()}


@pytest.mark.slow
def test_stats_proposes_what_training_takes(scenes, tmp_path):
    output = run(
        "moco.stats",
        "data=images",
        f"data.root={scenes}",
        "num_workers=2",
        "output=s.json",
        cwd=tmp_path,
    )
    figures = json.loads((tmp_path / "s.json").read_text())
    arrays = np.stack(arrays_of(build_source("images", str(scenes))))
    for band, of_band in enumerate(figures["bands"]):
        values = arrays[..., band].astype(np.float64)
        assert of_band["mean"] == pytest.approx(values.mean())
        assert of_band["std"] == pytest.approx(values.std())
    settings = figures["settings"]
    assert len(settings["augmentation.mean"]) == BANDS
    lines = [line.strip() for line in output.splitlines() if line.startswith("  ")]
    pasted = [line for line in lines if "=" in line]
    low, high = np.percentile(arrays, [0.1, 99.9])
    assert settings["data.value_range"] == pytest.approx([low, high], rel=0.1)
    run(
        "moco.train",
        *SMALL,
        "data=images",
        f"data.root={scenes}",
        *pasted,
        "trainer.max_steps=1",
        cwd=tmp_path,
    )


def test_an_image_that_is_too_large_ends_in_one_line(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    path = folder / "huge.tif"
    tifffile.imwrite(path, np.zeros((16, 16, 4), np.uint16), photometric="minisblack")
    with tifffile.TiffFile(path, mode="r+b") as file:
        # The file claims 3.2 GB, and holds two kilobytes.
        for tag in ("ImageWidth", "ImageLength"):
            file.pages[0].tags[tag].overwrite(20_000)
    for number in range(8):
        (folder / f"{number}.tif").write_bytes(path.read_bytes())
    done = run_program("moco.train", *SMALL, "data=images", f"data.root={folder}",
                       "data.value_range=[0,1]", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "data.tile" in done.stderr
