"""What ``moco.evaluate`` adds to its accuracy: label-free figures, and plots in its run folder."""

import dataclasses
import io
import json
import re
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from moco.config.data import EvaluateDataConfig
from moco.config.pretrained import EvaluateConfig, EvaluationConfig
from moco.data.files.written_files import is_written_file
from moco.data.sources.source import ArrayImages, Labelled
from moco.evaluate import run
from moco.evaluation.collapse import collapse_of
from moco.evaluation.knn_measurement import class_tables
from moco.evaluation.reports.embedded import GAP, SPACE, THUMBNAIL, Embedded
from moco.evaluation.reports.knn_plots import (
    Searched,
    neighbors_of_some,
    spread_over_classes,
)
from moco.evaluation.reports.plots import LINE, MARGIN, legible, map_plot, pixels
from tests.test_evaluate import archive
from tests.weights.test_export import write_checkpoint

NAMES = ["confusion.png", "feature_maps.png", "map.png", "neighbors.png", "similarities.png"]


@pytest.fixture
def evaluated(checkpoint, tmp_path, caplog, capsys):
    """Evaluates the checkpoint: the figures, and what was printed and logged; the folder is `evaluated.folder`."""
    caplog.set_level("INFO", logger="moco")

    def call(data=None, path=checkpoint, **settings):
        caplog.clear()
        shutil.rmtree(call.folder, ignore_errors=True)
        settings = {"num_neighbors": 3, **settings}
        config = EvaluateConfig(
            str(path),
            EvaluateDataConfig(**(data or {"name": "digits"})),
            EvaluationConfig(**settings),
            "cpu",
        )
        run(config, call.folder)
        figures = json.loads((call.folder / "metrics.json").read_text())
        return figures, capsys.readouterr().out, "\n".join(caplog.messages)

    call.folder = tmp_path / "out"
    return call


@pytest.fixture
def small(tmp_path, generator):
    """40 images of 8 px in four classes; each is classified by the others."""
    return archive(tmp_path / "small.npz", generator, np.arange(40) % 4)


def plots_in(folder):
    found = {}
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as image:
            image.load()
            assert image.format == "PNG"
            assert is_written_file(str(path))  # it is no image of a dataset
            found[path.name] = image.size
    return found


def test_an_evaluation_leaves_plots_and_label_free_figures(evaluated, small):
    figures, printed, _ = evaluated(small)
    plots = plots_in(evaluated.folder / "report")
    assert sorted(plots) == NAMES
    page = (evaluated.folder / "report" / "index.html").read_text()
    for name, size in plots.items():
        assert 100 < min(size) <= max(size) < 1400
        assert f'src="{name}"' in page  # relative: the folder can be moved
    assert "report/index.html" in printed
    found = {name for name in figures if name.startswith("label_free/")}
    assert found == {
        "label_free/feature_rank_me",
        "label_free/rank_me",
        "label_free/embedding_std",
        "label_free/uniformity",
        "label_free/alignment",
        "label_free/lidar",
    }
    assert f"{figures['label_free/alignment']:.4f}" in printed


@pytest.mark.slow
def test_without_plots_and_label_free_figures_there_are_none(evaluated, small):
    figures, _, _ = evaluated(small, plots=False, label_free=False)
    assert not plots_in(evaluated.folder / "report")
    assert not any(name.startswith("label_free/") for name in figures)
    evaluated(small, map="none", label_free=False)
    assert sorted(plots_in(evaluated.folder / "report")) == [
        "confusion.png",
        "feature_maps.png",
        "neighbors.png",
    ]


@pytest.mark.slow
def test_figures_are_those_of_plain_images_and_of_the_runs_own_views(evaluated, checkpoint):
    from moco.data.augment.views import EvaluationView, ViewPair
    from moco.data.sources.registry import build_source
    from moco.evaluation.diagnostics import label_free_figures
    from moco.weights.load_encoder import load_pretrained

    figures, _, _ = evaluated(plots=False)
    pretrained = load_pretrained(str(checkpoint), "query", {})
    settings, bank = (
        pretrained.config["augmentation"],
        build_source("digits", None, num_images=1).bank,
    )
    size = figures["image_size"]
    augment = ViewPair(
        settings["query"], settings["key"], settings["mean"], settings["std"], size, 0
    )
    plain = bank.images.tensor.permute(0, 3, 1, 2)
    view = EvaluationView(
        size, pretrained.config["data"]["crop_ratio"], settings["mean"], settings["std"]
    )
    rows = torch.from_numpy(np.linspace(0, len(plain) - 1, 1000).astype(np.int64))
    with torch.no_grad():
        features = pretrained.encoder.backbone(torch.stack([view(image) for image in bank.images]))
        views = [
            pretrained.encoder(view) for view in augment.on_batch(plain[rows].contiguous(), 0, rows)
        ]
        embeddings = pretrained.encoder.projector(features)
    expected = label_free_figures(
        features.numpy(), embeddings.numpy(), torch.stack(views, dim=1).numpy()
    )
    for name, value in expected.items():
        # Each engine rounds pixels in its own way.
        assert figures[name] == pytest.approx(value, rel=1e-2), name


@pytest.mark.parametrize(
    "query",
    [
        {"transforms": "my_augs:build", "options": {}},
        {"random_resized_crop": {"scale": [0.2, 1]}, "noise": {"target": "my_augs:Noise"}},
    ],
    ids=["pipeline", "operation"],
)
def test_code_that_a_checkpoint_names_is_not_imported(
    query, evaluated, small, checkpoint, tmp_path, monkeypatch
):
    (tmp_path / "my_augs.py").write_text("open('imported', 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    content = torch.load(checkpoint, weights_only=True)
    content["config"]["augmentation"]["query"] = query
    torch.save(content, tmp_path / "own.ckpt")
    figures, _, logged = evaluated(small, tmp_path / "own.ckpt", plots=False)
    assert "the views of the run are made by code that is not in this project (my_augs:" in logged
    assert "label_free/rank_me" in figures
    assert "label_free/alignment" not in figures
    assert not (tmp_path / "imported").exists()


def test_a_collapse_is_a_warning_by_the_thresholds_of_the_watch():
    shape = (5000, 100)
    assert collapse_of(0.05, 40, shape) is None
    assert collapse_of(0.008, 5.1, shape) is None
    collapse = collapse_of(0.006, 1, shape)
    assert collapse.name == "COLLAPSED"
    assert collapse.in_words().startswith(
        "all embeddings are nearly the same (standard deviation 0.00600, "
        "spread out it would be 0.10000)."
    )
    collapse = collapse_of(0.05, 4.9, shape)
    assert collapse.name == "DIMENSIONAL COLLAPSE"
    assert collapse.in_words().startswith(
        "the embeddings differ in few dimensions only (effective rank 4.9 of 100)."
    )
    # The rank of a few images says nothing.
    assert collapse_of(0.05, 1, (19, 100)) is None


@pytest.mark.slow
def test_a_constant_encoder_is_warned_of_and_drawn(evaluated, small, checkpoint, tmp_path):
    path = tmp_path / "constant.ckpt"
    held = torch.load(checkpoint, weights_only=True)
    for name, tensor in held["state_dict"].items():
        if name.startswith("query_encoder.backbone") and tensor.ndim == 4:
            tensor.zero_()
    held["global_step"] = 50
    torch.save(held, path)
    logged = evaluated(small, path=path)[2]
    assert "too early to tell: the checkpoint is of step 50, and all embeddings are" in logged
    assert "COLLAPSED" not in logged
    held["global_step"] = 1000
    torch.save(held, path)
    assert "COLLAPSED" in evaluated(small, path=path)[2]
    assert sorted(plots_in(evaluated.folder / "report")) == NAMES


@pytest.mark.slow
@pytest.mark.parametrize("num_classes", [2, 1000])
def test_few_and_many_classes_are_drawn(evaluated, generator, tmp_path, num_classes):
    labels = np.arange(2 * num_classes) % num_classes
    images = generator.integers(0, 256, (len(labels), 8, 8), np.uint8)
    data = archive(
        tmp_path / "x.npz", generator, labels, test_images=images[:1], test_labels=labels[:1]
    )
    # A single query, of a single class.
    _, _, log = evaluated(data, label_free=False)
    assert sorted(plots_in(evaluated.folder / "report")) == [
        "confusion.png",
        "feature_maps.png",
        "neighbors.png",
    ]
    assert "map.png: skipped, it needs at least 5 queries" in log
    data = archive(tmp_path / "x.npz", generator, labels, test_images=images, test_labels=labels)
    evaluated(data, map="none", label_free=False)
    assert max(plots_in(evaluated.folder / "report")["confusion.png"]) < 1200


@pytest.mark.slow
def test_unreadable_images_and_sets_without_a_test_part_are_drawn(evaluated, generator, tmp_path):
    for number in range(12):
        path = tmp_path / "set" / "train" / "ab"[number % 2] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (8 + number, 8, 3), np.uint8)).save(path)
    (tmp_path / "set" / "train" / "a" / "00.png").write_bytes(b"no image")
    data = {
        "name": "image_folder",
        "root": str(tmp_path / "set"),
        "image_size": 8,
        "max_bad_fraction": 0.5,
    }
    figures, _, _ = evaluated({**data, "held_out": 0.0})
    assert figures["knn/queries"] == "leave one out"
    assert sorted(plots_in(evaluated.folder / "report")) == NAMES


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["vit_tiny_patch4", "swin_v2_tiny_patch2"])
def test_feature_maps_of_transformers_are_drawn(evaluated, generator, tmp_path, runner, backbone):
    path = tmp_path / "last.ckpt"
    write_checkpoint(runner, path, f"backbone={backbone}", "data.image_size=32")
    data = archive(tmp_path / "x.npz", generator, np.arange(20) % 4) | {"image_size": 32}
    evaluated(path=path, data=data, map="none", label_free=False)
    assert "feature_maps.png" in plots_in(evaluated.folder / "report")


def test_a_backbone_alone_has_the_rank_of_its_features(evaluated, small, tmp_path, runner):
    from moco.weights.backbone_files import write_backbone_file

    config = runner.config()
    path = tmp_path / "backbone.pth"
    write_backbone_file(
        path, runner.method(config), dataclasses.asdict(config), {"epoch": 1, "step": 2}
    )
    figures, _, log = evaluated(small, path=path, map="none")
    assert "of the label-free figures there is the rank of its features only" in log
    assert [name for name in figures if name.startswith("label_free/")] == [
        "label_free/feature_rank_me"
    ]
    assert "similarities.png" not in plots_in(evaluated.folder / "report")


@pytest.fixture
def searched(generator):
    """60 images of one grey level each, and random features."""
    from moco.evaluation.neighbors import nearest_by_block

    images = ArrayImages(
        np.repeat(np.arange(60, dtype=np.uint8) * 4, 64).reshape(60, 8, 8), "greys"
    )
    labels, features = np.arange(60) % 3, generator.normal(size=(60, 5)).astype(np.float32)
    bank = Embedded(features, labels, Labelled(images, labels), np.arange(60))
    return Searched(bank, bank, partial(nearest_by_block, features), np.arange(60))


def test_the_neighbours_in_the_plot_are_those_of_the_search(searched):
    drawn = pixels(neighbors_of_some(searched))
    units = searched.bank.features / np.linalg.norm(searched.bank.features, axis=1, keepdims=True)
    for line, query in enumerate(spread_over_classes(searched.queries.labels, 16)):
        top = MARGIN + line * (THUMBNAIL + LINE + MARGIN)
        assert drawn[top, MARGIN, 0] == 4 * query
        others = [row for row in np.argsort(-(units @ units[query])) if row != query]
        for column in range(8):
            left = MARGIN + GAP + (column + 1) * (THUMBNAIL + SPACE)
            assert drawn[top, left, 0] == 4 * others[column]


def test_rows_are_spread_over_the_classes():
    labels = np.array([5, 5, 5, 1, 1, 9, 5])
    assert spread_over_classes(labels, 3).tolist() == [3, 1, 5]
    assert spread_over_classes(labels, 99).tolist() == [3, 4, 0, 1, 2, 6, 5]
    assert spread_over_classes(np.arange(1000), 3).tolist() == [0, 499, 999]


def test_tables_and_plots_name_the_classes(generator):
    console = Console(width=100, file=io.StringIO())
    for table in class_tables(
        ["10", "[b]cat", "a\nb"], np.array([[3, 1, 0], [0, 2, 0], [0, 0, 4]])
    ):
        console.print(table)
    printed = console.file.getvalue()
    assert re.search(r"10 .* 0\.7500 .* 4", printed)
    assert re.search(r"10 .* \[b\]cat .* 1 of 4", printed)
    assert "a\\nb" in printed
    points, labels = generator.normal(size=(6, 2)), np.arange(6) % 3
    names = ["_hidden", "$x$", "plain"]
    figure = map_plot(points, labels, "title", lambda number: legible(names[number], 24))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [" _hidden", r"\$x\$", "plain"]
    assert pixels(figure).shape[2] == 3


def test_a_name_without_letters_in_the_font_is_a_number(generator):
    images = ArrayImages(np.zeros((2, 8, 8), np.uint8), "black")
    labelled = Labelled(images, np.arange(2), ("\u732b", "a name of far too many letters"))
    one = Embedded(np.zeros((2, 4)), labelled.labels, labelled, np.arange(2))
    assert [one.shown_class(number, 8) for number in (0, 1, 2)] == [
        "class 0",
        "a name …",
        "class 2",
    ]
