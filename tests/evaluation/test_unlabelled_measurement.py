"""What ``moco.evaluate`` does without labels, without a checkpoint, and its page."""

import json
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from rich.table import Table
from rich.text import Text

from moco.config.data import EvaluateDataConfig
from moco.config.pretrained import (
    EvaluateConfig,
    EvaluationConfig,
    NormalisationConfig,
    PretrainedBackboneConfig,
)
from moco.errors import InputError
from moco.evaluate import run
from moco.evaluation.knn import Protocol, Votes
from moco.evaluation.knn_measurement import headline
from moco.evaluation.lost_queries import without_class_in_bank
from moco.evaluation.reports.page import report_page
from tests.test_evaluate import archive


@pytest.fixture
def evaluated(checkpoint, tmp_path, caplog, capsys):
    """Evaluates: the figures, what was printed, and the log; the folder is `evaluated.folder`."""
    caplog.set_level("INFO", logger="moco")

    def call(data, path=str(checkpoint), backbone=None, seed=0, bands=None, **settings):
        caplog.clear()
        shutil.rmtree(call.folder, ignore_errors=True)
        config = EvaluateConfig(
            path, EvaluateDataConfig(**data), EvaluationConfig(**settings), "cpu", seed=seed
        )
        config.backbone = PretrainedBackboneConfig(**(backbone or {}))
        if bands is not None:
            config.augmentation = NormalisationConfig([0.5] * bands, [0.25] * bands)
        run(config, call.folder)
        figures = json.loads((call.folder / "metrics.json").read_text())
        return figures, capsys.readouterr().out, "\n".join(caplog.messages)

    call.folder = tmp_path / "out"
    return call


@pytest.mark.slow
def test_images_without_labels_get_what_needs_none(evaluated, image_tree, generator, tmp_path):
    data = {"name": "images", "root": str(image_tree), "image_size": 16}
    figures, printed, log = evaluated(data)
    assert "data=images has no labels, so there is no accuracy" in log
    first = printed.splitlines()[0]
    rank = figures["label_free/feature_rank_me"]
    assert first == (
        f"effective rank of the features {rank:.1f} of at most 24 (24 images without labels)"
    )
    assert {"label_free/rank_me", "label_free/alignment", "label_free/lidar"} <= figures.keys()
    assert not any(key.startswith("knn") for key in figures)
    found = {path.name for path in (evaluated.folder / "report").iterdir()}
    assert found == {
        "feature_maps.png", "index.html", "map.png", "neighbors.png", "similarities.png",
    }  # fmt: skip
    with Image.open(evaluated.folder / "report" / "feature_maps.png") as plot:
        assert len(np.unique(np.asarray(plot.convert("RGB")).reshape(-1, 3), axis=0)) > 50
    data = archive(tmp_path / "two.npz", generator, np.arange(20) % 2)
    labelled, _, _ = evaluated(data, name="label_free", plots=False)
    assert labelled["label_free/num_images"] == 20
    assert "knn/top1" not in labelled


def test_images_of_one_class_are_told_of_the_measurement_that_works(evaluated, generator, tmp_path):
    data = archive(tmp_path / "one.npz", generator, [4] * 9)
    with pytest.raises(InputError, match="are of 1; evaluation=label_free needs no classes"):
        evaluated(data)
    figures, _, _ = evaluated(data, name="label_free", plots=False)
    assert figures["label_free/num_images"] == 9


def test_a_stream_without_labels_is_told_of_embed(evaluated, generator, tmp_path):
    import io
    import tarfile

    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number in range(4):
            file = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (9, 9, 3), np.uint8)).save(file, "PNG")
            member = tarfile.TarInfo(f"{number}.png")
            member.size = file.tell()
            file.seek(0)
            tar.addfile(member, file)
    data = {"name": "webdataset", "root": str(tmp_path / "0.tar"), "image_size": 8}
    with pytest.raises(InputError, match=r"data=webdataset: a stream .* moco\.embed writes"):
        evaluated(data)


def test_an_untrained_network_is_measured_as_a_checkpoint_is(evaluated):
    digits = {"name": "digits"}
    tiny = {"name": "resnet_tiny"}
    plain = {"plots": False, "label_free": False, "num_neighbors": 5}
    first, printed, _ = evaluated(digits, None, tiny, **plain)
    assert first["checkpoint"] is None
    assert "checkpoint" in printed
    assert 0.5 < first["knn/top1"] < 1
    again, _, _ = evaluated(digits, None, tiny, **plain)
    assert again == first
    other, _, _ = evaluated(digits, None, tiny, seed=1, **plain)
    assert other["knn_grid/backbone/k1/t0.1/top1"] != first["knn_grid/backbone/k1/t0.1/top1"]


def test_an_untrained_network_takes_the_bands_of_the_images(evaluated, generator, tmp_path):
    images = generator.integers(0, 256, (12, 8, 8, 5), np.uint8)
    np.savez(tmp_path / "five.npz", train_images=images, train_labels=np.arange(12) % 2)
    data = {"name": "npz", "root": str(tmp_path / "five.npz"), "image_size": 8}
    tiny = {"name": "resnet_tiny"}
    figures, _, _ = evaluated(data, None, tiny, bands=5, plots=False, num_neighbors=3)
    assert figures["knn/num_queries"] == 12


@pytest.mark.parametrize(
    ("path", "changes", "expected"),
    [
        (None, {}, "backbone: missing; with checkpoint=null give backbone=NAME"),
        (None, {"encoder": "key"}, "evaluation.encoder=key: checkpoint=null has one encoder alone"),
        (None, {"feature": "embedding"}, "evaluation.feature=embedding: checkpoint=null has no"),
        ("x", {"seed": 3}, "seed: without checkpoint=null it has no effect"),
    ],
)
def test_settings_that_do_not_go_with_the_checkpoint_are_refused(
    evaluated, path, changes, expected
):
    backbone = {"name": "resnet_tiny"} if changes else None
    with pytest.raises(InputError) as error:
        evaluated({"name": "digits"}, path, backbone, **changes)
    assert str(error.value).startswith(expected)


def test_the_headline_names_the_best_protocol_of_the_grid():
    main = Protocol(200, 0.1)
    right, wrong = np.zeros(4, int), np.array([0, 1, 1, 1])
    half = np.array([0, 0, 1, 1])
    votes = {main: Votes(right, half), Protocol(20, 0.1): Votes(right, right)}
    line = "kNN top-1 50.0 % (k 200, T 0.1); best of the grid 100.0 % at k 20"
    assert headline(main, votes) == line
    votes = {main: Votes(right, half), Protocol(200, 0.07): Votes(right, right)}
    assert headline(main, votes).endswith("at k 200, T 0.07")
    votes = {main: Votes(right, half), Protocol(1, 0.07): Votes(right, wrong)}
    assert headline(main, votes).endswith("; no protocol of the grid is better")


def test_queries_that_no_vote_can_get_right_are_counted(evaluated, generator, tmp_path):
    bank, queries = np.array([0, 0, 1, 2, 2]), np.array([0, 1, 3, 3])
    assert without_class_in_bank(bank, queries).tolist() == [False, False, True, True]
    alone = without_class_in_bank(bank, bank, is_leave_one_out=True)
    assert alone.tolist() == [False, False, True, False, False]

    data = archive(tmp_path / "x.npz", generator, [0] * 10 + [1] * 9 + [2])
    figures, _, log = evaluated(data, plots=False, label_free=False, num_neighbors=3)
    assert figures["knn/queries_never_right"] == 1
    assert (
        "1 of 20 queries cannot be right in kNN, because they are the only image of their class "
        "(class 2): the accuracy is at most 0.9500"
    ) in log


class Parsed(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, page):
        super().__init__()
        self.open, self.text, self.images = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images.append(dict(attrs)["src"])
        elif tag != "meta" and not tag.startswith("!"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_shows_text_of_users_as_it_is():
    table = Table(title="worst [b]classes[/b]")
    table.add_column("class")
    table.add_column("top-1")
    table.add_row(Text("<script>alert(1)</script>[/x]"), "0.5")
    table.add_row(r"a\[1]", "0.6")
    page = report_page("kNN", "50 % of <x> & caf\udce9", [table], ["b.png", "a.png"])
    parsed = Parsed(page)
    assert not parsed.open  # every tag is closed
    assert parsed.images == ["a.png", "b.png"]
    for text in (
        "<script>alert(1)</script>[/x]", "a[1]", "worst classes", r"50 % of <x> & caf\udce9",
    ):  # fmt: skip
        assert text in parsed.text
    assert "http" not in page  # nothing is loaded from elsewhere
