import io
import logging
import os
import pickle
import threading
import time
import zlib
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from moco.data.files import listing
from moco.data.files.formats import FORMAT_OF_ENDING
from moco.data.files.listing import PathList, list_images, listed
from moco.data.files.written_files import SOFTWARE
from moco.data.sources.folders import is_held_out
from moco.data.sources.registry import build_source
from moco.data.sources.source import FileImages
from moco.evaluation.reports.plots import new_figure
from moco.extras import install_command

NAMES = ["a/x.png", "a", "ü.png", os.fsdecode(b"\xff.png"), "new\nline.png", "long" * 60]


@pytest.fixture
def tree(tmp_path):
    """Return a tree of empty files that a walk does not meet in sorted order.

    Its folders have not changed for a minute.
    """
    root = tmp_path / "tree"
    for name in (
        "a/1.png",
        "a/2.jpg",
        "a-b/1.png",
        "a.png",
        "a0.png",
        "a/b.c/1.TIF",
        "a/b/2.webp",
        "a/b.png",
        "B/1.bmp",
        "z.Png",
        "z.png.d/z.gif",
        "notes.txt",
        "c/notes.txt",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    settle(root)
    return root


def settle(root):
    minute_ago = time.time() - 60
    for folder, _, _ in os.walk(root):
        os.utime(folder, (minute_ago, minute_ago))


def by_walk(root):
    """The slow way."""
    paths = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [os.path.join(folder, name) for name in names if not name.startswith(".")]
    return sorted(path for path in paths if path.lower().endswith(tuple(FORMAT_OF_ENDING)))


@pytest.mark.parametrize("suffix", ["", "/"])
def test_the_order_is_that_of_whole_paths(tree, suffix):
    assert list_images(f"{tree}{suffix}") == by_walk(f"{tree}{suffix}")


def test_random_trees_are_listed_in_order(tmp_path, generator):
    letters = ["a", "b", "-", ".", "0", "ü", "~", " ", ".png", "/"]
    for _ in range(300):
        name = "".join(
            letters[number]
            for number in generator.integers(len(letters), size=generator.integers(1, 8))
        )
        path = tmp_path / f"x{name}.png"
        if not any(parent.is_file() for parent in path.parents) and not path.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    assert list_images(tmp_path) == by_walk(tmp_path)
    assert len(by_walk(tmp_path)) > 100


def test_a_relative_root_gives_relative_paths(tree, monkeypatch):
    monkeypatch.chdir(tree)
    assert list_images(".") == by_walk(".")
    assert PathList.of(list_images(".")).below(".")[0] == b"B/1.bmp"


JUNK = (
    ".ipynb_checkpoints/1-checkpoint.png", "__MACOSX/a/1.png", "a/._1.png", "a/@eaDir/1.png",
    "a/.AppleDouble/1.png", "Thumbs.db", "a/Thumbs.db", ".DS_Store",
    "runs/moco/now/.hydra/config.yaml", "runs/moco/now/checkpoints/x.png", "runs/moco/now/x.png",
    "runs/evaluate/now/metrics.json", "runs/evaluate/now/confusion.npz", "runs/evaluate/now/y.png",
    "copy/index.json", "copy/index.npz", "copy/z.png",
)  # fmt: skip


def test_what_systems_and_programs_leave_is_no_image(tree, caplog):
    caplog.set_level(logging.INFO)
    own = list_images(tree)
    for name in JUNK:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).touch()
    caplog.clear()
    assert list_images(tree) == own
    (line,) = caplog.messages
    assert line == (
        f"{tree}: left out 6 files: .db 2, .txt 2, hidden 2; 7 folders: now, .AppleDouble, "
        ".ipynb_checkpoints, @eaDir, __MACOSX, copy"
    )
    for named in ("runs/moco/now", ".ipynb_checkpoints", "copy"):
        assert list_images(tree / named)


def test_plots_and_tables_of_the_programs_are_told_by_their_content(tmp_path, generator):
    image = Image.fromarray(generator.integers(0, 256, (300, 300, 3), dtype=np.uint8))
    for name, text in (("photo", None), ("drawn elsewhere", "other"), ("pairs", SOFTWARE)):
        info = PngInfo()
        if text is not None:
            info.add_text("Software", text)
        image.save(tmp_path / f"{name}.png", pnginfo=info)
    figure = new_figure(40, 40)
    figure.savefig(tmp_path / "plot.PNG", metadata={"Software": SOFTWARE})
    np.savez(tmp_path / "stack.npz", np.zeros((4, 4)))
    np.savez(tmp_path / "embedded.npz", features=np.zeros((1, 2)), names=np.array(["x"]))
    found = [os.path.basename(path) for path in list_images(tmp_path)]
    assert found == ["drawn elsewhere.png", "photo.png", "stack.npz"]
    assert listed([str(tmp_path)]).left_out == {"written by moco": 3}


def test_an_unknown_ending_is_an_image_if_the_first_bytes_say_so(tmp_path, monkeypatch, caplog):
    """A pipe is not opened: it would wait for a writer."""
    formats = {
        "a.JPE": "JPEG", "b.jfif": "JPEG", "c": "JPEG", "d.0001": "PNG", "e.svs": "TIFF",
        "f.x y": "WEBP", "raw.DNG": "TIFF", "g.heic": "PNG",
    }  # fmt: skip
    for name, kind in formats.items():
        Image.new("RGB", (4, 4)).save(tmp_path / name, kind)
    (tmp_path / "LICENSE").write_text("no image")
    (tmp_path / "h").write_bytes(b"\0\0\0\x20ftypheic" + bytes(200))
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(listing, "find_spec", lambda name: None)
    files = listed([str(tmp_path)])
    assert [os.path.basename(path) for path in files.paths] == sorted(formats)[:-2]
    assert files.describe() == (
        "11 files: .0001 1, .jfif 1, .jpe 1, .svs 1, .x y 1, no ending 1, others 5"
    )
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == (
        f"{tmp_path}: left out 5 files: .heic ({install_command('heif')}) 1, "
        f"no ending ({install_command('heif')}) 1, no ending 2, .dng 1"
    )
    monkeypatch.setattr(listing, "find_spec", lambda name: "there")
    assert len(listed([str(tmp_path)]).paths) == 8


def test_slow_folders_are_listed_side_by_side(tmp_path, monkeypatch):
    """A file system that answers after a while, as one on a network does."""
    for number in range(200):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "x.png").touch()
    expected = by_walk(tmp_path)
    real, lock, now, most = os.scandir, threading.Lock(), 0, 0

    def slow(folder):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.002)
        with lock:
            now -= 1
        return real(folder)

    monkeypatch.setattr("os.scandir", slow)
    assert list_images(tmp_path) == expected
    assert most > 4


def test_a_listing_says_how_far_it_is(tree, monkeypatch):
    said = []

    @contextmanager
    def noted(title):
        yield lambda done: said.append((title, done))

    monkeypatch.setattr(listing, "phase", noted)
    list_images(tree)
    assert said[-1] == (f"listing {tree}", 11)


def test_names_come_out_of_the_arrays_as_they_went_in():
    paths = PathList.of(NAMES)
    assert list(paths) == [paths[index] for index in range(len(paths))] == NAMES
    assert list(paths.where(np.array([True, False, True, True, False, True]))) == [
        NAMES[place] for place in (0, 2, 3, 5)
    ]
    for root in ("r", "r/"):
        assert PathList.of(["r/a", "r/b/ü"]).below(root) == [b"a", b"b/\xc3\xbc"]


def test_a_loader_process_is_handed_as_little_for_a_hundred_thousand_names_as_for_ten():
    def handed(count):
        return len(
            ForkingPickler.dumps(
                FileImages([f"/images/{number:09}.jpg" for number in range(count)])
            )
        )

    assert abs(handed(100_000) - handed(10)) < 100
    images = FileImages([f"/images/{number:09}.jpg" for number in range(100_000)])
    assert len(pickle.dumps(images.text)) < 100_000 * 25  # each name once, and a byte between two


class Watch:
    """How many folders were listed."""

    def __init__(self, monkeypatch):
        self.count = 0
        real = os.scandir

        def scandir(folder):
            self.count += 1
            return real(folder)

        monkeypatch.setattr("os.scandir", scandir)


def without_counts(caplog):
    return [line for line in caplog.messages if "left out" not in line]


def lists(roots, cache, **options):
    return list(listed([str(root) for root in roots], cache=cache, **options).paths)


def test_a_second_start_lists_no_folder(tree, tmp_path, monkeypatch):
    cache = tmp_path / "images.npz"
    (tree / "loop").symlink_to(tree / "a")
    settle(tree)
    roots = [tree, tree / "a"]
    first = lists(roots, cache)
    assert first == by_walk(tree) + by_walk(tree / "a")
    watch = Watch(monkeypatch)
    assert lists(roots, cache) == first
    kept = listed(list(map(str, roots)), cache=cache)
    assert kept.left_out == {".txt": 2}
    assert kept.describe() == "18 files: .png 8, .jpg 2, .tif 2, .webp 2, .bmp 1, .gif 1, others 2"
    assert watch.count == 0
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [
        "images.npz"
    ]  # no temporary file is left


def added(tree):
    (tree / "a/b/new.png").touch()


def removed(tree):
    (tree / "a/b.c/1.TIF").unlink()


def moved(tree):
    (tree / "B").rename(tree / "C")


def new_folder(tree):
    (tree / "c/deep").mkdir()
    (tree / "c/deep/new.png").touch()


def gone(tree):
    (tree / "B/1.bmp").unlink()
    (tree / "B").rmdir()


def replaced(tree):
    """By another folder of the same time."""
    times = os.stat(tree), os.stat(tree / "B")
    (tree / "B").rename(tree.parent / "old")
    (tree / "B").mkdir()
    (tree / "B/other.png").touch()
    for folder, status in zip((tree, tree / "B"), times, strict=True):
        os.utime(folder, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("change", [added, removed, moved, new_folder, gone, replaced])
def test_a_changed_tree_is_listed_anew_and_the_log_says_why(change, tree, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    cache = tmp_path / "images.npz"
    before = lists([tree], cache)
    change(tree)
    after = lists([tree], cache)
    assert after == by_walk(tree) != before
    (line,) = without_counts(caplog)
    assert line.startswith(f"listing the images below {tree} anew: {tree}")
    assert line.endswith("has changed")


def test_other_roots_or_pages_are_listed_anew(tree, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    cache = tmp_path / "images.npz"
    lists([tree], cache)
    assert lists([tree / "a"], cache) == by_walk(tree / "a")
    assert lists([tree / "a"], cache, pages="each") == by_walk(tree / "a")
    assert caplog.text.count("images.npz is of other folders or settings") == 2


def test_pages_are_counted_once(tmp_path, monkeypatch):
    pages = [Image.new("RGB", (4, 4), color) for color in ("red", "lime")]
    (tmp_path / "tree").mkdir()
    pages[0].save(tmp_path / "tree/x.tif", save_all=True, append_images=pages[1:])
    settle(tmp_path / "tree")
    sources = []
    for _ in range(2):
        source = build_source(
            "images", str(tmp_path / "tree"), pages="each", listing=tmp_path / "images.npz"
        )
        sources.append([source.train[index][0, 0].tolist() for index in range(len(source.train))])
        monkeypatch.setattr(listing, "pages_of", lambda path: pytest.fail("counted again"))
    assert sources == [[[255, 0, 0], [0, 255, 0]]] * 2


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped", "older", "array"])
def test_a_damaged_list_is_left_out_with_a_line(damage, tree, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    cache = tmp_path / "images.npz"
    lists([tree], cache)
    content = cache.read_bytes()
    arrays = dict(np.load(cache))
    if damage == "older":
        np.savez(
            cache, **{name: array for name, array in arrays.items() if name != "folder_stamps"}
        )
    elif damage == "array":
        with io.BytesIO() as file:
            np.save(file, np.arange(5))
            cache.write_bytes(file.getvalue())
    else:
        middle = content.index(b"a.png")
        flipped = content[:middle] + b"b" + content[middle + 1 :]
        cache.write_bytes(
            {"empty": b"", "text": b"hello", "cut": content[:-200], "flipped": flipped}[damage]
        )
    assert lists([tree], cache) == by_walk(tree)
    assert len(without_counts(caplog)) == 1
    assert "images.npz cannot be read (" in caplog.text
    assert lists([tree], cache) == by_walk(tree)  # it was written anew
    assert len(without_counts(caplog)) == 1


def test_a_folder_that_was_just_changed_is_not_trusted_to_stay(tree, tmp_path):
    """Within a step of the file system's clock it could change again under the same time."""
    (tree / "a" / "new.png").touch()
    lists([tree], tmp_path / "images.npz")
    assert not (tmp_path / "images.npz").exists()


def test_a_folder_that_cannot_be_read_is_named_at_every_start(tree, tmp_path, monkeypatch, caplog):
    real = os.scandir

    def denied(path):
        if str(path).endswith("/a/b"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr("os.scandir", denied)
    for _ in range(2):
        lists([tree], tmp_path / "images.npz")
    assert (
        caplog.text.count(f"left out a folder that cannot be read: {tree}/a/b (Permission denied)")
        == 2
    )


def test_where_the_list_cannot_be_kept_the_run_goes_on(tree, tmp_path, caplog):
    (tmp_path / "run").touch()
    assert lists([tree], tmp_path / "run" / "images.npz") == by_walk(tree)
    assert "the list of images is not kept for the next start" in caplog.text
    assert "Not a directory" in caplog.text


def test_class_folders_of_a_kept_list_come_out_as_of_a_new_one(tmp_path, generator):
    for part, count in (("train", 12), ("val", 6)):
        for number in range(count):
            folder = tmp_path / "set" / part / ("cat", os.fsdecode(b"do\xfeg"))[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
    settle(tmp_path / "set")
    sources = [
        build_source("image_folder", str(tmp_path / "set"), listing=kept)
        for kept in (None, tmp_path / "images.npz", tmp_path / "images.npz")
    ]
    assert (tmp_path / "images.npz").exists()
    described = [
        [
            (labelled.images.name(index), int(labelled.labels[index]))
            for labelled in (source.bank, source.queries)
            for index in range(len(labelled.labels))
        ]
        for source in sources
    ]
    assert described[0] == described[1] == described[2]
    assert len(described[0]) == 18


def test_a_tenth_is_held_out_as_it_always_was():
    names = [b"%d.png" % number for number in range(20_000)]
    assert is_held_out(names, 0.1).tolist() == [zlib.crc32(name) % 10 == 0 for name in names]


def test_a_larger_share_holds_out_all_that_a_smaller_one_does():
    names = [b"class/%d.jpg" % number for number in range(20_000)]
    before = np.zeros(len(names), dtype=bool)
    for share in (0, 0.01, 0.1, 0.15, 0.2, 0.5, 0.9, 0.999):
        now = is_held_out(names, share)
        assert (now >= before).all()
        assert now.mean() == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / len(names)))
        before = now
    assert is_held_out(names, 1.0).all()


def test_an_image_stays_on_its_side_when_others_come(tmp_path):
    def sides():
        source = build_source("image_folder", str(tmp_path), held_out=0.25)
        return [
            {part.images.name(index) for index in range(len(part.labels))}
            for part in (source.bank, source.queries)
        ]

    def add(numbers):
        for number in numbers:
            folder = tmp_path / ("cat", "dog")[number % 2]
            folder.mkdir(exist_ok=True)
            (folder / f"{number}.png").touch()

    add(range(60))
    bank, queries = sides()
    add(range(60, 120))
    larger_bank, larger_queries = sides()
    assert bank < larger_bank
    assert queries < larger_queries


def test_held_out_images_are_chosen_by_their_paths_below_root(tmp_path, monkeypatch):
    for name in ("one", "two"):
        for number in range(50):
            path = tmp_path / name / "cat" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    monkeypatch.chdir(tmp_path / "one")
    chosen = []
    for root in (str(tmp_path / "one"), f"{tmp_path}/two/", "."):
        queries = build_source("image_folder", root, held_out=0.3).queries.images
        chosen.append([Path(queries.name(index)).name for index in range(len(queries))])
    assert chosen[0] == chosen[1] == chosen[2]


def test_nothing_is_held_out_of_nothing(tmp_path):
    (tmp_path / "cat").mkdir()
    for number in range(20):
        (tmp_path / "cat" / f"{number}.png").touch()
    source = build_source("image_folder", str(tmp_path), held_out=0.0)
    assert (len(source.train), len(source.bank.images), source.queries) == (20, 20, None)
