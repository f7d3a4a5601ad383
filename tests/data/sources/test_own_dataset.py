"""Datasets of the user's own as sources: what an item may be, labels, and what is refused."""

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

import moco
from moco.config.pretrained import EvaluateConfig, data_settings
from moco.data.files.images import UnreadableImage
from moco.data.sources.own_dataset import dataset_source, pixels_of
from moco.data.sources.registry import REGISTERED, build_source
from moco.errors import InputError
from tests.conftest import REPOSITORY, run_program

MOST = 10_000  # pixels


class Items(Dataset):
    """A map-style dataset of the items of a list; an error is raised in its place."""

    def __init__(self, items, **attributes):
        self.items = items
        self.__dict__.update(attributes)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        if isinstance(self.items[index], Exception):
            raise self.items[index]
        return self.items[index]


class Stream(IterableDataset):
    def __init__(self, items):
        self.items = items
        self.epochs = []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __iter__(self):
        return iter(self.items)


@pytest.fixture
def rgb(generator):
    return generator.integers(0, 256, (6, 5, 3), dtype=np.uint8)


@pytest.fixture
def images(generator):
    return [generator.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(40)]


def test_every_kind_of_image_has_the_same_pixels(rgb):
    tensor = torch.from_numpy(rgb).permute(2, 0, 1)
    read_only = rgb.copy()
    read_only.setflags(write=False)
    kinds = [rgb, Image.fromarray(rgb), tensor, read_only]
    opaque = np.dstack([rgb, np.full((6, 5), 255, np.uint8)])
    kinds.append(Image.fromarray(opaque))
    for kind in kinds:
        for item in (kind, (kind, 3), [kind, "a label", {}]):
            pixels = pixels_of(item, MOST)
            assert pixels.dtype == np.uint8
            assert pixels.flags.c_contiguous
            assert pixels.flags.writeable
            assert np.array_equal(pixels, rgb)
    grey = rgb[:, :, 0]
    for kind in (grey, grey[:, :, None], torch.from_numpy(grey), torch.from_numpy(grey)[None]):
        assert np.array_equal(pixels_of(kind, MOST), np.dstack([grey] * 3))
    assert np.array_equal(pixels_of(opaque, MOST), opaque)  # an array does not say that it is alpha
    wide = grey.astype(np.uint16) * 250
    assert np.array_equal(pixels_of(Image.fromarray(wide), MOST)[:, :, 0], wide)
    for kind in (rgb / 255, tensor.double() / 255):
        assert np.array_equal(pixels_of(kind, MOST), rgb / 255)


@pytest.mark.parametrize(
    ("item", "what"),
    [
        ("a.png", "str"),
        ({"image": 1, "label": 2}, "dict with the keys image, label"),
        ((), "tuple of empty"),
        ((3, 4), "tuple of int"),
        (np.zeros((4, 4, 2), np.complex64), "ndarray (4, 4, 2) of complex64"),
        (np.zeros((4, 4), np.int64), "ndarray (4, 4) of int64"),
        (torch.zeros(8, 8, 3), "Tensor (8, 8, 3) of float32, whose bands do not come first"),
        (np.zeros(4), "ndarray (4,) of float64"),
        (np.zeros((0, 4, 3), np.uint8), "ndarray (0, 4, 3) of uint8"),
    ],
)
def test_another_item_is_refused_at_the_start_in_one_line(item, what):
    for dataset in (Items([item]), Stream([item])):
        with pytest.raises(InputError) as raised:
            dataset_source(dataset, what="mine", where="data.target=mine", num_images=1)
        assert str(raised.value).startswith(f"data.target=mine: item 0 is {what}")
        assert "; expected an image or (image, label); an image is" in str(raised.value)
        assert "\n" not in str(raised.value)
    good = Items([np.zeros((4, 4), np.uint8)])
    with pytest.raises(InputError, match=r"^dataset\[queries\]: item 0 is "):
        dataset_source(good, bank=good, queries=Items([item], targets=[1]))


def test_a_damaged_image_is_unreadable_and_another_error_names_the_item(images):
    file = io.BytesIO()
    Image.fromarray(images[0]).save(file, "png")
    file.truncate(len(file.getvalue()) // 2)
    lazy = Image.open(file)  # found to be damaged when its pixels are read
    items = [OSError("gone"), lazy, Image.new("L", (200, 200)), images[0], KeyError("x")]
    source = dataset_source(Items(items), max_image_pixels=MOST)
    assert source.image_size == 8
    for index in range(3):
        with pytest.raises(UnreadableImage, match=rf"^dataset\[{index}\]: "):
            source.train.opened(index)
    with pytest.raises(InputError, match=r"^dataset: item 4 raised KeyError: 'x'$"):
        source.train.opened(4)


def test_targets_are_the_labels_and_some_images_are_held_out(images):
    labels = np.arange(40) % 4
    source = dataset_source(Items(images, targets=labels.tolist()))
    names = [source.train.name(index) for index in range(40)]
    found = {}
    for side in (source.bank, source.queries):
        for index, label in enumerate(side.labels):
            found[side.images.name(index)] = label
            number = names.index(side.images.name(index))
            assert np.array_equal(np.asarray(side.images[index]), images[number])
    assert found == dict(zip(names, labels, strict=True))
    assert 0 < len(source.queries.labels) < 12
    # A larger share holds out every image that a smaller one does, and others keep their side.
    more = dataset_source(Items(images * 2, labels=torch.arange(80)), held_out=0.3)
    assert set(source.queries.images.rows) <= set(more.queries.images.rows)
    assert dataset_source(Items(images)).bank is None
    assert dataset_source(Items(images, targets=[0.5] * 40)).bank is None
    everything = dataset_source(Items(images, targets=labels), held_out=0)
    assert (everything.bank.images, everything.queries) == (everything.train, None)


def test_bank_and_queries_have_the_labels_of_their_items(images, caplog):
    caplog.set_level("INFO")
    items = [(image, np.int64(index)) for index, image in enumerate(images)]
    items[2] = OSError("gone")
    bank = Items(items[:20])
    source = dataset_source(
        {"train": bank, "bank": bank, "queries": Items(items[20:], name="a dataset")}
    )
    assert source.bank.images is source.train
    assert source.bank.labels.tolist() == [0, 1, 0, *range(3, 20)]
    assert source.queries.labels.tolist() == list(range(20, 40))
    assert source.queries.images.name(1) == "dataset[queries][1]"
    assert caplog.text.count("dataset[queries]: reading all 20 items for their labels") == 1
    of_queries = dataset_source(Items(images, targets=[1] * 40), queries=Items(items[20:]))
    assert len(of_queries.bank.labels) == 40


def test_an_image_may_have_several_classes(images):
    rows = np.arange(40)[:, None] % [2, 3, 5] == 0  # (40, 3)
    by_attribute = dataset_source(Items(images, targets=torch.from_numpy(rows).float()))
    for side in (by_attribute.bank, by_attribute.queries):
        assert np.array_equal(side.targets_of(side.labels), rows[side.images.rows])

    items = list(zip(images, rows.astype(int).tolist(), strict=True))
    items[2] = OSError("gone")
    bank, queries = Items(items[:20]), Items(items[20:])
    by_item = dataset_source({"train": bank, "bank": bank, "queries": queries})
    expected = rows.copy()
    expected[2] = False
    assert np.array_equal(by_item.bank.targets_of(by_item.bank.labels), expected[:20])
    assert np.array_equal(by_item.queries.targets_of(by_item.queries.labels), expected[20:])
    assert np.array_equal(by_item.bank.label_sets, by_item.queries.label_sets)


def test_labels_of_two_kinds_are_refused(images):
    numbers, rows = Items(images, targets=[1] * 40), Items(images, targets=[[0, 1]] * 40)
    with pytest.raises(InputError, match=r"got arrays of queries \(40,\) and bank \(40, 2\)"):
        dataset_source(rows, queries=numbers)
    items = [(image, [0, 1]) for image in images]
    items[3] = (images[3], 1)
    with pytest.raises(InputError, match=r"\[bank\]: item 3 has the label 1, which is of another"):
        dataset_source({"train": images, "bank": Items(items), "queries": rows})


def test_images_have_the_names_that_the_dataset_gives_them(images):
    class Named(Items):
        def name(self, index):
            return f"{index}.png"

    assert dataset_source(Named(images)).train.name(3) == "3.png"


def test_an_iterable_has_a_length_or_is_counted_or_told(images, caplog):
    caplog.set_level("INFO")
    stream = Stream(images)
    source = dataset_source(stream)
    assert (len(source.train), source.image_size) == (40, 8)
    assert "data.num_images=40 saves counting them at each start" in caplog.text
    assert len(list(source.train.items(3))) == 40
    assert stream.epochs[-1] == 3
    too_many = dataset_source(stream, num_images=41).train
    with pytest.raises(InputError, match="dataset: ends after 40 items; expected 41"):
        list(too_many.items(0))

    def broken():
        yield images[0]
        raise OSError("gone")

    class Broken:
        def __iter__(self):
            return broken()

    with pytest.raises(InputError, match="dataset: raised OSError: gone after 1 items"):
        dataset_source(Broken())
    with pytest.raises(InputError, match="got generator, which can be read only once"):
        dataset_source(broken())


MY_DATA = """
import torch

def build(size: int = 10):
    return torch.zeros(size, 3, 8, 8, dtype=torch.uint8)

def fails():
    raise FileNotFoundError("no such folder: here")

def number():
    return 3

def sides():
    return {"train": build(), "test": build()}

def nothing():
    return None

def no_train():
    return {"bank": build()}

def empty():
    return build(0)

def no_labels():
    return {"train": build(), "bank": build()}

def wrong_label():
    return {"train": build(), "queries": [(build(1)[0], "cat")]}

def queries_alone():
    return {"train": build(), "queries": [(build(1)[0], 1)]}

def iterable_bank():
    return {"train": build(), "bank": iter([])}
"""


@pytest.fixture
def my_data(tmp_path, monkeypatch):
    (tmp_path / "my_data.py").write_text(MY_DATA)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_data", None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "data.target: missing; data=custom needs data.target=package.module:function"),
        ({"target": "my_data:biuld"}, "data.target=my_data:biuld: my_data has no 'biuld'; did you"),
        (
            {"target": "my_data:build", "options": {"sise": 3}},
            "data.options.sise: my_data:build has no such option; did you mean 'size'?",
        ),
        ({"target": "my_data:build", "options": 3}, "data.options=3: expected {name: value}"),
        (
            {"target": "my_data:fails"},
            "data.target=my_data:fails: raised FileNotFoundError: no such folder: here",
        ),
        (
            {"target": "my_data:number"},
            "data.target=my_data:number: got int; expected a dataset with __len__ and __getitem__",
        ),
        (
            {"target": "my_data:sides"},
            "data.target=my_data:sides: unknown dataset 'test' (choices: bank, queries, train)",
        ),
        (
            {"target": "my_data:nothing"},
            "data.target=my_data:nothing: got None; expected a dataset",
        ),
        ({"target": "my_data:no_train"}, "data.target=my_data:no_train: no dataset 'train'"),
        ({"target": "my_data:empty"}, "data.target=my_data:empty: no images in there"),
        (
            {"target": "my_data:no_labels"},
            "data.target=my_data:no_labels[bank]: item 0 has no label; expected (image, label)",
        ),
        (
            {"target": "my_data:wrong_label"},
            "data.target=my_data:wrong_label[queries]: item 0 has the label 'cat'; expected",
        ),
        ({"target": "my_data:queries_alone"}, "data.target=my_data:queries_alone: queries need"),
        (
            {"target": "my_data:iterable_bank"},
            "data.target=my_data:iterable_bank[bank]: got list_iterator; an iterable dataset has",
        ),
        (
            {"target": "my_data:build", "root": "here"},
            "data.root=here: data=custom has no such setting; give it to the function",
        ),
        ({"name": "digits", "target": "x:y"}, "data.target=x:y: data=digits has no such setting"),
        ({"name": "custm", "target": "x:y"}, "data.name: unknown dataset 'custm'; did you mean"),
    ],
)
def test_what_is_wrong_is_one_line(settings, message, my_data):
    with pytest.raises(InputError) as raised:
        build_source(**{"name": "custom", **settings})
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_a_registered_source_is_known_by_its_name(my_data, monkeypatch):
    import my_data as mine

    monkeypatch.setattr("moco.data.sources.registry.REGISTERED", REGISTERED.copy())
    moco.register_source("my_images", mine.build)
    source = build_source("my_images", options={"size": 7})
    assert (len(source.train), source.train.name(6)) == (7, "my_images[6]")
    assert source.image_size == 8
    with pytest.raises(InputError, match=r"data\.options\.sise: my_images has no such option"):
        build_source("my_images", options={"sise": 7})
    with pytest.raises(InputError, match="this project has a dataset of that name"):
        moco.register_source("digits", mine.build)


def test_the_documented_dataset_works(images, tmp_path):
    text = (REPOSITORY / "docs" / "data.md").read_text()
    names = {}
    exec(text.split("## Your own dataset")[1].split("```python\n")[1].split("```")[0], names)
    for table, numbers in (("train.csv", range(30)), ("test.csv", range(30, 40))):
        lines = [f"{number}.png,{number % 3}\n" for number in numbers]
        (tmp_path / table).write_text("".join(lines))
        for number in numbers:
            Image.fromarray(images[number]).save(tmp_path / f"{number}.png")
    source = dataset_source(names["build"](str(tmp_path)))
    assert source.bank.images is source.train
    assert source.queries.labels.tolist() == [number % 3 for number in range(30, 40)]
    assert source.queries.images.name(2) == "32.png"
    assert np.array_equal(np.asarray(source.queries.images[2]), images[32])


PROGRAM_DATA = """
import numpy as np

class Images:
    def __init__(self, size=90):
        self.images = np.random.default_rng(0).integers(0, 256, (size, 8, 8, 3), np.uint8)
        self.targets = np.arange(size) % 3

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], int(self.targets[index])

class Stream:
    def set_epoch(self, epoch):
        self.order = np.random.default_rng(epoch).permutation(90)

    def __iter__(self):
        images = Images()
        return (images[index] for index in self.order)

def stream():
    return {"train": Stream(), "bank": Images(), "queries": Images(30)}

def paths():
    return ["a.png"]
"""


def test_a_checkpoint_alone_does_not_decide_which_function_runs():
    config = EvaluateConfig(checkpoint="x.ckpt")
    options = {"command": "exit 1"}
    of_run = {"name": "custom", "root": None, "target": "os:system", "options": options}
    with pytest.raises(InputError, match=r"^checkpoint=x\.ckpt: names the function data\."):
        data_settings(config, of_run)
    config.trust_targets = True
    assert data_settings(config, of_run)["options"] == options
    config.trust_targets = False
    config.data.target = "os:system"
    assert data_settings(config, of_run)["options"] == options
    config.data.target = "mine:build"
    assert data_settings(config, of_run)["options"] is None


@pytest.mark.slow
@pytest.mark.parametrize("target", ["their_data:Images", "their_data:stream"])
def test_a_run_that_stopped_inside_an_epoch_ends_in_the_same_bits(target, tmp_path):
    (tmp_path / "their_data.py").write_text(PROGRAM_DATA)

    def train(folder, max_steps):
        done = run_program(
            "moco.train", "+experiment=quickstart", "data=custom", f"data.target={target}",
            "data.batch_size=32", "data.image_size=16", "data.num_workers=0",
            "method.queue_size=32", "optimizer.schedule=constant", "trainer.precision=32-true",
            "trainer.max_epochs=3", f"trainer.max_steps={max_steps}", "trainer.accelerator=cpu",
            "evaluation.baselines=false", "evaluation.plots_every_n_epochs=null",
            "evaluation.projector_images=0", f"hydra.run.dir={folder}", cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return torch.load(tmp_path / folder / "checkpoints" / "last.ckpt", weights_only=True)

    straight = train("straight", 6)["state_dict"]
    train("resumed", 3)  # of 2 steps an epoch
    resumed = train("resumed", 6)["state_dict"]
    for name, tensor in straight.items():
        assert torch.equal(tensor, resumed[name]), name

    checkpoint = "checkpoint=straight/checkpoints/last.ckpt"
    refused = run_program("moco.embed", checkpoint, "output=x.npz", cwd=tmp_path)
    assert refused.returncode == 2
    assert f"imported only if you name it, too: add data.target={target}, or" in refused.stderr
    for split in ("train", "test"):
        done = run_program(
            "moco.embed", checkpoint, f"data.target={target}", f"split={split}", "index=none",
            f"output={split}.npz", "data.num_workers=0", cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        with np.load(tmp_path / f"{split}.npz") as arrays:
            assert "labels" in arrays or split == "train"
            assert np.isfinite(arrays["features"]).all()
    done = run_program(
        "moco.evaluate", checkpoint, f"data.target={target}", "evaluation.plots=false",
        "evaluation.label_free=false", "output=x.json", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_wrong_dataset_ends_the_program_in_one_line(tmp_path):
    (tmp_path / "their_data.py").write_text(PROGRAM_DATA)
    done = run_program(
        "moco.preview", "+experiment=quickstart", "data=custom", "data.target=their_data:paths",
        "output=x.png", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: data.target=their_data:paths: item 0 is str; expected an")
    assert done.stderr.count("\n") == 1
