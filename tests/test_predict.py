"""moco.predict from start to end: every odd image, interruptions, refusals and figures."""

import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from moco.cli.predicted_images import prediction_rows
from moco.data.files.images import header, read_mask
from moco.errors import InputError, Interrupted
from moco.predict import run
from moco.segmentation.mask_files import MaskFolder
from moco.segmentation.pixel_classifier import Inference
from tests.configs import composed
from tests.conftest import REPOSITORY, run_program
from tests.memory import PRINT_PEAK
from tests.segmentation.fine_tuned import NAMES, build_random_segmenter, write_run
from tests.segmentation.shapes import draw_shapes
from tests.segmentation.test_segment import evaluated

CPU = ["accelerator=cpu", "data.num_workers=0"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A run folder of a model with random weights."""
    return write_run(tmp_path_factory.mktemp("model") / "run")


@pytest.fixture
def few_images(tmp_path, generator):
    """10 RGB images of 20 x 16 px in two folders."""
    root = tmp_path / "images"
    for number in range(10):
        pixels = generator.integers(0, 256, (16, 20, 3), dtype=np.uint8)
        path = root / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return root


def predict(model, tmp_path, *overrides, output="out"):
    """Run the program in this process. Return the folder of the masks."""
    given = [f"checkpoint={model}", f"output={tmp_path / output}", *CPU, *overrides]
    run(composed("predict", *given), tmp_path / "run")
    return tmp_path / output


def bytes_of(folder):
    """The bytes of all files by name, without what depends on time."""
    found = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            if name not in ("metrics.json", ".lock"):
                path = os.path.join(parent, name)
                with open(path, "rb") as file:
                    found[os.path.relpath(path, folder)] = file.read()
    return found


def slow_classes(pixels, **settings):
    """The classes of an image (height, width, 3) by the model alone."""
    segmenter = build_random_segmenter(**settings)
    image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1) / 255
    with torch.no_grad():
        return segmenter(((image - 0.5) / 0.25)[None])[0].argmax(dim=0).numpy()


def almost_equal(mask, expected):
    """Whether the classes are equal but for pixels at which two are equally likely."""
    return mask.shape == expected.shape and np.mean(mask != expected) < 0.01


def test_masks_have_the_names_and_the_classes_of_the_images(model, tmp_path, few_images):
    folder = predict(model, tmp_path, f"data.root={few_images}", "batch_size=4")
    images = sorted(few_images.rglob("*.png"))
    masks = sorted((folder / "masks").rglob("*.png"))
    relative = [path.relative_to(few_images) for path in images]
    assert [path.relative_to(folder / "masks") for path in masks] == relative
    seen = set()
    for image, mask in zip(images, masks, strict=True):
        predicted = read_mask(str(mask))
        assert almost_equal(predicted, slow_classes(Image.open(image)))
        seen |= set(np.unique(predicted).tolist())
    assert len(seen) > 1
    figures = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert figures["predict/num_images"] == 10
    assert (figures["epoch"], figures["step"]) == (3, 7)


def odd_images(folder):
    """Write one image of each odd kind. Return what becomes of each: its size, or None."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (40, 50, 4), dtype=np.uint8)
    folder.mkdir()
    (folder / "deep").mkdir()
    Image.fromarray(pixels[:1, :1, :3]).save(folder / "one_pixel.png")
    Image.fromarray(pixels[:1, :, :3]).save(folder / "one_row.png")
    Image.fromarray(pixels).save(folder / "rgba.png")
    Image.fromarray(pixels[..., 0]).save(folder / "grey.jpg")
    Image.fromarray(pixels[..., :3]).quantize(16).save(folder / "palette.gif")
    Image.fromarray(pixels[..., :3]).convert("CMYK").save(folder / "cmyk.jpg")
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(pixels[..., :3]).save(folder / "deep" / "turned.jpg", exif=exif)
    Image.fromarray(np.full((33, 47, 3), 255, np.uint8)).save(folder / "nothing_known.bmp")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(folder / "sixteen_bit.png")
    (folder / "unreadable.jpg").write_bytes(b"\xff\xd8\xff\xe0 no JPEG")
    return {
        "one_pixel": (1, 1), "one_row": (1, 50), "rgba": (40, 50), "grey": (40, 50),
        "palette": (40, 50), "cmyk": (40, 50), "deep/turned": (50, 40),
        "nothing_known": (33, 47), "sixteen_bit": None, "unreadable": None,
    }  # fmt: skip


@pytest.mark.parametrize("inference", ["whole", "slide"])
def test_ten_odd_images_are_predicted_or_named(model, tmp_path, inference, caplog):
    expected = odd_images(tmp_path / "odd")
    folder = predict(
        model, tmp_path, f"data.root={tmp_path / 'odd'}", f"inference={inference}",
        "image_size=16", "overlays=true", "probabilities=npz", "data.bands=null",
    )  # fmt: skip
    for name, size in expected.items():
        mask = folder / "masks" / f"{name}.png"
        assert mask.exists() == (size is not None)
        if size is not None:
            assert read_mask(str(mask)).shape == size
            assert np.array(Image.open(folder / "overlays" / f"{name}.jpg")).shape == (*size, 3)
            probabilities = np.load(folder / "probabilities" / f"{name}.npz")["probabilities"]
            assert probabilities.shape == (3, *size)
            np.testing.assert_allclose(probabilities.astype(np.float32).sum(axis=0), 1, atol=2e-3)
    said = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert len(said) == 2
    assert any("sixteen_bit.png: 1 band of uint16; the dataset has uint8" in line for line in said)
    figures = json.loads((folder / "metrics.json").read_text())
    assert (figures["predict/num_images"], figures["predict/num_unreadable"]) == (8, 2)


@pytest.mark.slow
def test_an_image_whose_pixels_are_large_takes_the_same_way_as_a_small_one(
    model, tmp_path, few_images
):
    # Decoded in the program's own process and read part by part.
    where = [f"data.root={few_images}", "inference=slide", "image_size=8", "overlays=true"]
    small = predict(model, tmp_path, *where, output="small")
    large = predict(model, tmp_path, *where, "max_forward_pixels=64", output="large")
    one = predict(model, tmp_path, *where, "batch_size=1", output="one")
    for mask in sorted((one / "masks").rglob("*.png")):
        for other in (small, large):
            same = other / mask.relative_to(one)
            assert almost_equal(read_mask(str(same)), read_mask(str(mask)))


def test_windows_of_a_raster_on_disk_equal_those_of_the_image_in_memory(model, tmp_path, generator):
    folder = tmp_path / "rasters"
    folder.mkdir()
    pixels = generator.integers(0, 256, (70, 90, 3), dtype=np.uint8)
    tifffile.imwrite(folder / "tiled.tif", pixels, tile=(16, 16), photometric="rgb")
    np.save(folder / "array.npy", pixels)
    Image.fromarray(pixels).save(folder / "plain.png")
    where = [f"data.root={folder}", "inference=slide", "image_size=32", "probabilities=tiff"]
    whole = predict(model, tmp_path, *where, output="whole")
    tiled = predict(model, tmp_path, *where, "data.tile=32", "overlays=true", output="tiled")
    for name in ("tiled", "array", "plain"):
        expected = (whole / "masks" / f"{name}.png").read_bytes()
        assert (tiled / "masks" / f"{name}.png").read_bytes() == expected
        overlay = np.array(Image.open(tiled / "overlays" / f"{name}.jpg"))
        assert overlay.shape == (70, 90, 3)
    assert tifffile.imread(tiled / "probabilities" / "array.tif").shape == (3, 70, 90)


@pytest.mark.slow
def test_a_raster_of_20000_px_keeps_to_a_bound_of_memory(model, tmp_path):
    side = 20_000
    path = tmp_path / "rasters" / "wide.tif"
    path.parent.mkdir()
    stripe = np.arange(side * 3, dtype=np.uint32).reshape(1, side, 3) % 251

    def tiles():
        for top in range(0, 768, 256):
            for left in range(0, side, 256):
                tile = np.zeros((256, 256, 3), np.uint8)
                part = stripe[:, left : left + 256]
                tile[:, : part.shape[1]] = part
                tile[..., 1] = top % 256
                yield tile

    tifffile.imwrite(
        path, tiles(), shape=(768, side, 3), dtype=np.uint8, tile=(256, 256),
        photometric="rgb", compression="zlib",
    )  # fmt: skip
    assert header(str(path)).size == (768, side)
    script = f"{PRINT_PEAK}\nfrom moco.predict import main\nmain()"
    ended = subprocess.run(
        [
            sys.executable, "-c", script, f"checkpoint={model}", f"data.root={path.parent}",
            f"output={tmp_path / 'out'}", "data.tile=512", "image_size=512", "overlays=true",
            "batch_size=2", *CPU,
        ],
        cwd=tmp_path, env={"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    mask = read_mask(str(tmp_path / "out" / "masks" / "wide.png"))
    assert mask.shape == (768, side)
    with Image.open(tmp_path / "out" / "overlays" / "wide.jpg") as overlay:
        assert max(overlay.size) <= 2_048
    peak = int(ended.stderr.split("peak ")[1].split()[0]) / 2**20  # GiB
    assert peak < 2


class Stop(Exception):
    """The end of a program in the middle."""


def after_images(number, happen):
    """Let something happen after so many images are written."""
    write = MaskFolder.write
    written = []

    def counted_write(self, *arguments):
        write(self, *arguments)
        written.append(arguments[0])
        if len(written) == number:
            happen()

    return counted_write


def fail():
    raise Stop


EXTRAS = ["overlays=true", "probabilities=npz"]


@pytest.mark.parametrize(
    "kind",
    [
        "signal",
        pytest.param("error", marks=pytest.mark.slow),
        pytest.param("two devices", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_prediction_ends_in_the_same_bytes(model, tmp_path, few_images, kind):
    # The second thread takes more batches until the failure of the first is noticed.
    batch_size = 1 if kind == "two devices" else 2
    where = [f"data.root={few_images}", *EXTRAS, f"batch_size={batch_size}"]
    straight = bytes_of(predict(model, tmp_path, *where, output="straight"))
    assert len(straight) == 10 * 3 + 2
    happen, error, numbers = fail, Stop, (3, 2)
    if kind == "signal":
        happen, error = (lambda: signal.raise_signal(signal.SIGTERM)), Interrupted
    if kind == "two devices":
        where.append("devices=2")
        numbers = (1,)
    for number in numbers:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MaskFolder, "write", after_images(number, happen))
            with pytest.raises(error):
                predict(model, tmp_path, *where)
    there = bytes_of(tmp_path / "out")
    assert 2 < len(there) < len(straight)
    folder = predict(model, tmp_path, *where)
    assert bytes_of(folder) == straight
    stamps = {path: path.stat().st_mtime_ns for path in (folder / "masks").rglob("*.png")}
    predict(model, tmp_path, *where)
    assert {path: path.stat().st_mtime_ns for path in (folder / "masks").rglob("*.png")} == stamps
    figures = json.loads((folder / "metrics.json").read_text())
    assert (figures["predict/num_images"], figures["predict/num_written_now"]) == (10, 0)


def test_overlays_can_be_added_later_and_new_images_are_predicted(model, tmp_path, few_images):
    where = [f"data.root={few_images}", "batch_size=1"]
    folder = predict(model, tmp_path, *where)
    before = bytes_of(folder)
    Image.new("RGB", (9, 9)).save(few_images / "new.jpg")
    predict(model, tmp_path, *where, "overlays=true")
    after = bytes_of(folder)
    assert before.items() <= after.items()
    assert len(after) == len(before) + 1 + 11


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("inference=slide", "inference: whole there, slide here"),
        ("tta=true", "tta: false there, true here"),
        ("image_size=24", "image_size: 32 there, 24 here"),
    ],
)
def test_a_changed_setting_is_refused_by_its_key(model, tmp_path, few_images, override, said):
    predict(model, tmp_path, f"data.root={few_images}")
    before = bytes_of(tmp_path / "out")
    with pytest.raises(InputError, match=rf"holds masks of another prediction \({said}\)"):
        predict(model, tmp_path, f"data.root={few_images}", override)
    assert bytes_of(tmp_path / "out") == before


def test_other_weights_are_refused(model, tmp_path, few_images):
    predict(model, tmp_path, f"data.root={few_images}")
    other = write_run(tmp_path / "other", ["a", "b"])
    with pytest.raises(InputError, match=r"\(checkpoint: other weights\)"):
        predict(other, tmp_path, f"data.root={few_images}")


def test_the_closing_table_names_the_checkpoint_and_that_a_better_one_is_there(tmp_path):
    run_folder = write_run(tmp_path / "run")
    last = run_folder / "checkpoints" / "last.ckpt"
    best = last.with_name("best.ckpt")
    figures = {"checkpoint": str(last), "epoch": 3, "predict/num_images": 2}
    figures |= {"predict/num_written_now": 0, "predict/num_unreadable": 0}
    masks = MaskFolder(tmp_path / "out", NAMES, "none", overlays=False)

    def shown(**changed):
        rows = prediction_rows(figures | changed, Inference(), NAMES, masks)
        return [text for name, text in rows if "checkpoint" in name]

    assert shown() == [f"{last}, epoch 3"]
    best.write_bytes(last.read_bytes())
    assert shown() == [f"{last}, epoch 3", f"not taken: {best}"]
    assert shown(checkpoint=str(best), epoch=2) == [f"{best}, epoch 2"]


@pytest.mark.parametrize(
    "settings", [["devices=2"], pytest.param(["data.num_workers=2"], marks=pytest.mark.slow)]
)
def test_devices_and_loader_processes_do_not_change_the_bytes(
    model, tmp_path, few_images, settings
):
    where = [f"data.root={few_images}", *EXTRAS, "batch_size=2"]
    straight = bytes_of(predict(model, tmp_path, *where, output="straight"))
    assert bytes_of(predict(model, tmp_path, *where, *settings)) == straight


def test_two_images_with_one_mask_are_named_before_anything_is_written(model, tmp_path, few_images):
    Image.new("RGB", (9, 9)).save(few_images / "a" / "00.jpg")
    with pytest.raises(InputError, match=r"a/00.jpg and .*a/00.png would have the same mask"):
        predict(model, tmp_path, f"data.root={few_images}")
    assert not (tmp_path / "out").exists()


def npz_of(tmp_path, images):
    np.savez(
        tmp_path / "images.npz", train_images=images, train_labels=np.zeros(len(images), np.int64)
    )
    return ["data=npz", f"data.root={tmp_path / 'images.npz'}"]


def test_images_of_an_array_have_numbers(model, tmp_path, generator):
    images = generator.integers(0, 256, (3, 12, 16, 3), dtype=np.uint8)
    folder = predict(model, tmp_path, *npz_of(tmp_path, images))
    names = sorted(path.name for path in (folder / "masks").iterdir())
    assert names == ["000000.png", "000001.png", "000002.png"]
    mask = read_mask(str(folder / "masks" / names[1]))
    assert almost_equal(mask, slow_classes(images[1]))


def test_samples_of_shards_have_their_names(model, tmp_path, few_images):
    with tarfile.open(tmp_path / "part-0.tar", "w") as tar:
        for path in sorted(few_images.rglob("*.png"))[:5]:
            tar.add(path, path.name)
    folder = predict(model, tmp_path, "data=webdataset", f"data.root={tmp_path}/part-0.tar")
    assert len(list((folder / "masks" / "part-0.tar").glob("*.png"))) == 5


def test_shards_with_the_same_names_are_refused_when_they_are_met(model, tmp_path, few_images):
    shards = []
    for folder in "ab":
        (tmp_path / folder).mkdir()
        shards.append(tmp_path / folder / "part.tar")
        with tarfile.open(shards[-1], "w") as tar:
            for path in sorted((few_images / "a").iterdir()):
                tar.add(path, path.name)
    root = f"data.root=[{shards[0]},{shards[1]}]"
    with pytest.raises(InputError, match=r"part.tar/00 and part.tar/00 would have the same mask"):
        predict(model, tmp_path, "data=webdataset", root, "batch_size=5")
    assert len(list((tmp_path / "out").rglob("*.png"))) == 5


def test_masks_give_figures_and_resumed_ones_are_the_same(tmp_path):
    shapes = draw_shapes(tmp_path / "shapes", num_train=2, num_val=4)
    model = write_run(tmp_path / "model")
    where = ["data=segmentation_folder", f"data.root={shapes}"]
    folder = predict(model, tmp_path, *where)
    assert sorted(path.name for path in (folder / "masks" / "val").iterdir()) == [
        f"{number:02}.png" for number in range(4)
    ]
    confusion = np.zeros((3, 3))
    for path in (folder / "masks" / "val").iterdir():
        truth = np.array(Image.open(shapes / "masks" / "val" / path.name))
        predicted = np.array(Image.open(path))
        for row, column in zip(*np.nonzero(truth != 255), strict=True):
            confusion[truth[row, column], predicted[row, column]] += 1
    figures = json.loads((folder / "metrics.json").read_text())
    right = confusion.diagonal()
    ious = right / (confusion.sum(axis=0) + confusion.sum(axis=1) - right)
    assert figures["segment/miou"] == pytest.approx(np.nanmean(ious))
    assert figures["segment/iou/disc"] == pytest.approx(ious[1])
    assert figures["segment/num_images"] == 4
    (folder / "masks" / "val" / "01.png").unlink()
    predict(model, tmp_path, *where)
    again = json.loads((folder / "metrics.json").read_text())
    for key in ("segment/miou", "segment/pixel_accuracy", "segment/num_images"):
        assert again[key] == figures[key]


@pytest.mark.parametrize("inference", ["slide", pytest.param("whole", marks=pytest.mark.slow)])
def test_without_blending_the_figures_are_those_of_moco_evaluate(tmp_path, inference):
    shapes = draw_shapes(tmp_path / "shapes", num_train=2, num_val=3)
    model = write_run(tmp_path / "model")
    where = ["data=segmentation_folder", f"data.root={shapes}"]
    how = [f"inference={inference}", "blend=false", "image_size=16", "batch_size=3"]
    folder = predict(model, tmp_path, *where, *how)
    figures = json.loads((folder / "metrics.json").read_text())
    measured = evaluated(
        model / "checkpoints" / "last.ckpt", tmp_path / "evaluated", *where, "data.image_size=16",
        f"evaluation.inference={inference}", "evaluation.plots=false",
    )  # fmt: skip
    for key in ("segment/miou", "segment/pixel_accuracy", "segment/dice"):
        assert figures[key] == pytest.approx(measured[key], abs=2e-3)


def test_bands_and_range_are_those_of_the_run(tmp_path, generator):
    data = {"value_range": [0, 1000], "bands": [4, 1]}
    model = write_run(tmp_path / "model", bands=2, data=data)
    folder = tmp_path / "scenes"
    folder.mkdir()
    pixels = generator.integers(0, 1000, (20, 24, 4)).astype(np.uint16)
    tifffile.imwrite(folder / "scene.tif", pixels, photometric="minisblack", planarconfig="contig")
    out = predict(model, tmp_path, f"data.root={folder}", "overlays=true")
    segmenter = build_random_segmenter(bands=2)
    image = torch.from_numpy(pixels[..., [3, 0]].astype(np.float32)).permute(2, 0, 1) / 1000
    with torch.no_grad():
        expected = segmenter(((image - 0.5) / 0.25)[None])[0].argmax(dim=0).numpy()
    assert almost_equal(read_mask(str(out / "masks" / "scene.png")), expected)


def test_more_than_256_classes_make_16_bit_masks(tmp_path, few_images):
    model = write_run(tmp_path / "model", [str(number) for number in range(300)])
    folder = predict(model, tmp_path, f"data.root={few_images}", "overlays=true")
    with Image.open(next((folder / "masks").rglob("*.png"))) as mask:
        assert mask.mode in ("I;16", "I")


def pretraining(tmp_path, checkpoint):
    return [f"checkpoint={checkpoint}"]


def text_file(tmp_path, checkpoint):
    (tmp_path / "words.ckpt").write_text("words")
    return [f"checkpoint={tmp_path / 'words.ckpt'}"]


def something_else(tmp_path, checkpoint):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    return []


def a_file(tmp_path, checkpoint):
    (tmp_path / "out").touch()
    return []


def two_bands(tmp_path, checkpoint):
    return npz_of(tmp_path, np.zeros((2, 8, 8, 2), np.uint8))


def sixteen_bits(tmp_path, checkpoint):
    return npz_of(tmp_path, np.arange(2 * 64 * 3, dtype=np.uint16).reshape(2, 8, 8, 3))


def other_classes(tmp_path, checkpoint):
    shapes = draw_shapes(tmp_path / "shapes", num_train=2, num_val=1)
    (shapes / "classes.txt").write_text("wall\nboat\nsquare\n")
    return ["data=segmentation_folder", f"data.root={shapes}"]


def masks_of_other_sizes(tmp_path, checkpoint):
    shapes = draw_shapes(tmp_path / "shapes", num_train=2, num_val=1)
    Image.new("L", (5, 6)).save(shapes / "masks" / "val" / "00.png")
    return ["data=segmentation_folder", f"data.root={shapes}"]


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (
            pretraining,
            "moco.predict needs a model of moco.segment, and this one is of another program; ",
        ),
        (text_file, "words.ckpt: .*; moco.predict needs a model of moco.segment"),
        (something_else, r"holds something else \(thesis.tex\); choose a new folder"),
        (a_file, "a file; expected a folder"),
        (two_bands, "its backbone reads images of 3 bands, and these have 2"),
        (sixteen_bits, "data.value_range: missing; the images have 3 bands of uint16"),
        (other_classes, "classes.txt: class 1 is boat, but the model learned it as disc"),
        (masks_of_other_sizes, "the mask has 5 x 6 px, but its image .* has 32 x 32 px"),
        (lambda *_: ["tta=true", "tta_scales=[]"], "tta_scales=.*expected at least one number"),
        (lambda *_: ["tta=true", "tta_scales=[0]"], "expected numbers from 0.1 to 10"),
        (lambda *_: ["tta_flip=false"], "tta_flip: without tta=true it has no effect"),
        (lambda *_: ["split=test"], "split=test: data=images has no images that are held out"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(
    model, checkpoint, tmp_path, few_images, prepare, said
):
    overrides = [f"data.root={few_images}", *prepare(tmp_path, checkpoint)]
    with pytest.raises(InputError, match=said) as error:
        predict(model, tmp_path, *overrides)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_program_says_what_it_wrote_and_a_command_that_works(model, tmp_path, few_images):
    (few_images / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    given = [f"checkpoint={model}", f"data.root={few_images}", "output=my masks", *CPU]
    ended = run_program("moco.predict", *given, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "broken.png" in ended.stderr + ended.stdout
    assert "unreadable images, left out" in ended.stdout
    assert "written to my masks" in ended.stdout
    (line,) = [line for line in ended.stdout.splitlines() if line.startswith("next: ")]
    words = shlex.split(line.removeprefix("next: python -m moco.predict "))
    ended = run_program("moco.predict", *words, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert len(list((tmp_path / "my masks" / "overlays").rglob("*.jpg"))) == 10


def test_without_output_the_masks_are_in_the_run_of_the_model(tmp_path, few_images, monkeypatch):
    model = write_run(tmp_path / "model")
    (model / ".hydra").mkdir()
    (model / ".hydra" / "config.yaml").touch()
    monkeypatch.chdir(tmp_path)
    config = composed("predict", f"checkpoint={model}", f"data.root={few_images}", *CPU)
    run(config, tmp_path / "run")
    (folder,) = (model / "predictions").iterdir()
    assert len(list((folder / "masks").rglob("*.png"))) == 10
