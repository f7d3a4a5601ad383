"""Test scripts/segmentation_proof.py: its images, its statistics, its page, and a tiny grid."""

import dataclasses
import importlib
import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from moco.models.backbones import build_backbone
from moco.models.swin.window_change import rewindow
from tests.conftest import REPOSITORY
from tests.segmentation.shapes import draw_shapes


@pytest.fixture(scope="module")
def script():
    """Return a function that imports the program, or one of its parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "scripts"))
        yield importlib.import_module


@pytest.fixture
def parts(script):
    return lambda name: script(f"proof_parts.{name}")


def line_of(row, seed, mious, **changes):
    """A line of the results on three images."""
    pretraining = None
    if not row.startswith("scratch"):
        monitors = {"final_dense": 0.2 + 0.1 * seed, "final_knn": 0.5 - 0.1 * seed}
        pretraining = {"name": row, "steps": 100, "seconds": 60.0, **monitors}
    return {
        "data_set": "dsb2018",
        "row": row,
        "tuning": "frozen",
        "label_fraction": 0.05,
        "seed": seed,
        "scale": "cpu",
        "miou": float(np.mean(mious)),
        "images": {"miou": mious, "dice": mious},
        "steps": 60,
        "seconds": 30.0,
        "settings": [],
        "pretraining": pretraining,
        "machine": {"cpu": "a processor", "threads": 1, "device": "cpu", "torch": "2.15"},
        **changes,
    }


def test_tiles_cover_an_image_whose_side_is_no_multiple_of_theirs(parts):
    pixels = np.arange(5 * 7).reshape(5, 7)
    tiles = parts("images").tiles_of(pixels, 3)
    assert {tile.shape for tile in tiles} == {(3, 3)}
    assert len(tiles) == 2 * 3
    assert set(np.unique(tiles)) == set(range(5 * 7))


def test_the_class_of_a_tile_is_its_most_frequent_one_or_its_quarter_of_the_shares(parts):
    images = parts("images")
    masks = np.array([[[0, 2], [2, 255]], [[1, 1], [1, 0]]])
    labels, held_out = images.classes_of_tiles(masks, masks[::-1])
    assert labels.tolist() == [2, 1]
    assert held_out.tolist() == [1, 2]

    shares = np.arange(8)
    two_classes = (np.arange(8)[None, :] < shares[:, None]).astype(np.uint8)[:, None]
    labels, held_out = images.classes_of_tiles(two_classes, two_classes[[0, 7]])
    assert labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert held_out.tolist() == [0, 3]


def test_figures_agree_with_counting_pixels_one_by_one(parts):
    generator = np.random.default_rng(0)
    true = generator.integers(0, 3, (4, 50))
    predicted = np.where(generator.random((4, 50)) < 0.5, true, generator.integers(0, 3, (4, 50)))
    true[3] = 0  # two of the classes are nowhere in this image
    predicted[3] = 0
    confusions = torch.zeros(4, 3, 3, dtype=torch.int64)
    for image, pixel in itertools.product(range(4), range(50)):
        confusions[image, true[image, pixel], predicted[image, pixel]] += 1

    def overlap(t, p):
        ious = []
        dices = []
        for number in range(3):
            both = ((t == number) & (p == number)).sum()
            either = ((t == number) | (p == number)).sum()
            if either:
                ious.append(both / either)
                dices.append(2 * both / ((t == number).sum() + (p == number).sum()))
        return np.mean(ious), np.mean(dices)

    figures = parts("runs").figures_of(confusions, ["a", "b", "c"])
    assert (figures["miou"], figures["dice"]) == pytest.approx(overlap(true, predicted), abs=1e-6)
    for image in range(4):
        expected = overlap(true[image], predicted[image])
        assert figures["images"]["miou"][image] == pytest.approx(expected[0], abs=1e-4)
        assert figures["images"]["dice"][image] == pytest.approx(expected[1], abs=1e-4)


def test_biases_as_tables_change_nothing_until_the_window_grows(parts):
    settings = {"name": "swin_v2_tiny_patch4", "window_size": 4}
    backbone = trained_alike(build_backbone(**settings, pretrained_window_size=4))
    images = torch.randn(2, 3, 64, 64)
    network, made_by = parts("runs").with_tables(backbone, settings)
    network.eval()
    assert made_by == settings | {"position_bias": "table"}
    with torch.no_grad():
        torch.testing.assert_close(network(images), backbone(images))
        exact = rewindow(backbone, 8)(images)
        resized = rewindow(network, 8)(images)
    assert (exact - resized).abs().max() > 1e-3


def trained_alike(backbone):
    """Set scales and position MLPs to random values. New blocks are the identity."""
    torch.manual_seed(0)
    for name, parameter in backbone.named_parameters():
        if "norm" in name and name.endswith("weight"):
            torch.nn.init.normal_(parameter, 0.8, 0.2)
        if "cpb_mlp" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return backbone.eval()


def test_a_comparison_is_the_paired_t_test_over_seeds_and_wilcoxon_over_images(parts):
    comparisons = parts("comparisons")
    generator = np.random.default_rng(1)
    ours, theirs = {}, {}
    for seed in range(4):
        base = generator.random(9)
        ours[seed] = line_of("v2", seed, (base + 0.1 + 0.05 * generator.random(9)).tolist())
        theirs[seed] = line_of("scratch_v2", seed, base.tolist())
    theirs[7] = line_of("scratch_v2", 7, [0.0] * 9)  # has no partner
    found = comparisons.compare(ours, theirs)

    # The paired t test by its formula. 3.182446 is the 97.5 % point of t with 3 degrees of freedom.
    differences = np.array([ours[seed]["miou"] - theirs[seed]["miou"] for seed in range(4)])
    error = differences.std(ddof=1) / 2
    half = 3.182446 * error
    assert found.difference == pytest.approx(differences.mean())
    assert found.interval == pytest.approx(
        (differences.mean() - half, differences.mean() + half), abs=1e-6
    )
    # With 3 degrees of freedom the distribution of t has a closed form.
    t = differences.mean() / error
    angle = np.arctan(t / np.sqrt(3))
    cumulative = 0.5 + (angle + np.sin(2 * angle) / 2) / np.pi
    assert found.p_of_seeds == pytest.approx(2 * (1 - cumulative))

    # All nine images are better: of the 2^9 choices of signs, two are as far out.
    assert found.p_of_images == pytest.approx(2 / 2**9)
    assert (found.seeds, found.images) == (4, 9)


def test_a_comparison_without_spread_or_without_seeds_has_no_p(parts):
    comparisons = parts("comparisons")
    same = {seed: line_of("v2", seed, [0.5, 0.5]) for seed in range(3)}
    found = comparisons.compare(same, same)
    assert found.difference == 0
    assert found.interval == (0, 0)
    assert found.p_of_seeds is None
    assert found.p_of_images == 1
    assert comparisons.compare(same, {}) is None
    one_seed = comparisons.compare({0: same[0]}, {0: line_of("v1", 0, [0.25, 0.5])})
    assert one_seed.interval is None
    assert one_seed.p_of_seeds is None


def test_the_rank_correlation_is_spearmans(parts):
    correlation = parts("comparisons").rank_correlation
    x = [0.1, 0.4, 0.2, 0.9, 0.3]
    y = [1.0, 2.0, 5.0, 9.0, 3.0]
    # 1 - 6 sum d^2 / (n (n^2 - 1)); the ranks are 1 4 2 5 3 and 1 2 4 5 3.
    assert correlation(x, y) == pytest.approx(1 - 6 * (0 + 4 + 4 + 0 + 0) / (5 * 24))
    assert correlation(x, [1.0] * 5) is None
    assert correlation([1.0, 2.0], [1.0, 2.0]) is None


def test_tables_are_written_from_the_results_and_say_what_has_not_run(script, tmp_path):
    proof = script("segmentation_proof")
    lines = []
    for seed, row in itertools.product(range(3), ("scratch_v2", "v2", "v2_stretched", "v2_dense")):
        gain = {"scratch_v2": 0.0, "v2": 0.1, "v2_stretched": 0.05, "v2_dense": 0.2}[row]
        base = 0.4 + 0.01 * seed + gain * 0.01 * (seed == 2)
        lines.append(line_of(row, seed, [base + gain, base + gain + 0.1, base + gain + 0.2]))
    for line in reversed(lines):
        proof.add_line(tmp_path / "results.jsonl", line)
    assert proof.read_lines(tmp_path / "results.jsonl") == sorted(lines, key=proof.identity)

    page, figure = tmp_path / "page.md", tmp_path / "figure.png"
    proof.write_tables(tmp_path / "results.jsonl", page, figure)
    text = page.read_text()
    assert "## CamVid\n\nNot yet run." in text
    assert "| Swin V2, re-windowed | 61.0 ± 1.1 (3) | not yet run | not yet run |" in text
    comparison = (
        "| Swin V2, re-windowed **against** Swin V2, normaliser stretched | +5.0 [+4.9, +5.1]"
    )
    assert comparison in text
    # dense: 0.2, 0.3, 0.4 by seed, as the mIoU. kNN: the other way round. Two rows share each.
    assert "| dsb2018 | frozen | 5% | 6 |" in text
    with Image.open(figure) as image:
        assert image.width > 500

    lines[0]["scale"] = "full"
    proof.add_line(tmp_path / "results.jsonl", lines[0])
    with pytest.raises(proof.InputError, match="expected results of one scale"):
        proof.write_tables(tmp_path / "results.jsonl", page, figure)


def test_the_grid_repeats_no_cell_goes_on_after_a_failure_and_refuses_other_settings(
    script, parts, tmp_path, capsys
):
    proof, grid, runs = script("segmentation_proof"), parts("grid"), parts("runs")
    cells = list(grid.cells_of(range(2), ["dsb2018/v2/frozen/0.05/*", "dsb2018/v1/frozen/0.05/0"]))
    assert len(cells) == 3
    work = runs.Workplace(tmp_path, tmp_path, "cpu", {})
    ran = []

    def result_of(work, cell):
        ran.append(str(cell))
        if cell.row.name == "v1":
            raise proof.InputError("this fails\nand has two lines")
        settings = runs.tuning_settings(work, cell, 1e-2).told
        return line_of(cell.row.name, cell.seed, [0.5, 0.6, 0.7], settings=settings)

    results = tmp_path / "results.jsonl"
    failed = proof.run_grid(work, cells, results, 1.0, result_of)
    assert failed == ["dsb2018/v1/frozen/0.05/0"]
    assert "this fails\n" in capsys.readouterr().err
    assert len(proof.read_lines(results)) == 2

    assert proof.run_grid(work, cells, results, 1.0, result_of) == failed
    assert len(ran) == 4  # of the second time only the one that failed
    proof.run_grid(work, cells, results, 0.0, result_of)
    assert len(ran) == 4

    other = dataclasses.replace(work, learning_rates={runs.rate_key(cells[-1]): 0.5})
    with pytest.raises(proof.InputError, match=r"with other settings \(optimizer.lr=0"):
        proof.run_grid(other, cells, results, 1.0, result_of)


def test_cells_have_settings_that_the_programs_know(parts, tmp_path):
    grid, runs = parts("grid"), parts("runs")
    work = runs.Workplace(tmp_path, tmp_path, "cpu", {})
    cells = {str(cell): cell for cell in grid.cells_of([0])}
    for name in ("dsb2018/v2_fpn/fine-tuned/0.05/0", "camvid/v2_local_crops/frozen/1/0"):
        runs.check(work, cells[name])


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["cpu", "full"])
def test_every_cell_has_settings_that_the_programs_know(parts, tmp_path, scale):
    grid, runs = parts("grid"), parts("runs")
    work = runs.Workplace(tmp_path, tmp_path, scale, {})
    seen = set()
    for cell in grid.cells_of([0]):
        # Datasets differ in numbers alone.
        kind = cell.row.name, cell.tuning
        if kind not in seen:
            seen.add(kind)
            runs.check(work, cell)
    assert len(seen) == len(grid.ROWS) * len(grid.TUNINGS)


def test_every_compared_row_exists(parts):
    grid = parts("grid")
    names = {row.name for row in grid.ROWS}
    for pair in grid.COMPARISONS:
        assert set(pair) <= names
    for row in grid.ROWS:
        assert row.pretraining is None or grid.PRETRAININGS[row.pretraining][0] == row.backbone


@pytest.fixture
def tiny(parts, tmp_path, monkeypatch):
    """Make a grid of one tiny dataset. Return the arguments that run it."""
    grid = parts("grid")
    root = draw_shapes(tmp_path / "dsb2018", num_train=8, num_val=4)
    for kind in ("images", "masks"):
        for path in sorted((root / kind / "val").iterdir())[:3]:
            (root / kind / "test").mkdir(exist_ok=True)
            shutil.copy(path, root / kind / "test" / path.name)
    budget = dataclasses.replace(
        grid.ON_CPU,
        image_size=32,
        window=2,
        new_image_size=32,
        new_window=4,
        tile=16,
        pretraining_steps=2,
        pretraining_batch=16,
        queue_size=32,
        tuning_steps={"fine-tuned": 2, "frozen": 2},
        tuning_batch=2,
    )
    data_set = dataclasses.replace(
        grid.DATA_SETS[2],
        monitor_image_size=32,
        label_fractions=(0.5,),
        budgets={"cpu": budget},
    )
    assert data_set.name == "dsb2018"
    monkeypatch.setattr(grid, "DATA_SETS", (data_set,))
    return ["--data", str(tmp_path), "--folder", str(tmp_path / "runs"), "--seeds", "1"]


def test_a_dry_run_lists_the_cells_and_names_wrong_input(script, tiny, tmp_path, capsys):
    proof = script("segmentation_proof")
    assert proof.main([*tiny, "--dry-run", "--only", "dsb2018/v2/*"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "dsb2018/v2/fine-tuned/0.5/0: 2 + 2 steps, at most 20 min, to run"
    assert lines[2].startswith("2 cells, of which 0 are finished; 1 pretrainings")
    assert not (tmp_path / "runs").exists()
    assert proof.main([*tiny, "--only", "dsb2018/v3/*"]) == 2
    assert capsys.readouterr().err == "--only dsb2018/v3/*: no cell has such a name\n"
    shutil.rmtree(tmp_path / "dsb2018" / "images")
    assert proof.main(tiny) == 2
    assert "there is no folder dsb2018/images in it" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_a_tiny_grid_runs_to_its_page_and_a_second_time_runs_nothing(
    script, parts, tiny, tmp_path, monkeypatch
):
    pytest.importorskip("segmentation_models_pytorch")
    proof, grid, runs = script("segmentation_proof"), parts("grid"), parts("runs")
    only = [
        f"dsb2018/{name}/*"
        for name in ("scratch_resnet", "resnet", "v2", "v2_table", "v2_stretched")
    ]
    assert proof.main([*tiny, "--search", "--only", *only]) == 0
    rates = json.loads((tmp_path / "runs" / "learning_rates.json").read_text())
    assert rates["dsb2018/frozen/swin/pretrained"] in grid.LEARNING_RATES["frozen"]
    assert proof.main([*tiny, "--only", *only]) == 0
    lines = proof.read_lines(tmp_path / "runs" / "results.jsonl")
    assert len(lines) == 10
    for line in lines:
        assert len(line["images"]["miou"]) == 3
        assert line["steps"] == 2
        assert str(tmp_path) not in json.dumps(line)
        if line["pretraining"] is not None:
            assert line["pretraining"]["dense"]
            assert line["pretraining"]["knn"]
    of_row = {line["row"]: line for line in lines if line["tuning"] == "frozen"}
    # After two steps the blocks are still next to the identity, so that no window matters.
    assert "backbone.pretrained_window_size=4" in of_row["v2_stretched"]["settings"]
    assert of_row["v2"]["pretraining"] == of_row["v2_stretched"]["pretraining"]
    assert not list((tmp_path / "runs" / "tuning").rglob("*.ckpt"))

    monkeypatch.setattr(runs.train, "run", None)
    monkeypatch.setattr(runs.segment, "run", None)
    assert proof.main([*tiny, "--only", *only]) == 0
    monkeypatch.setattr(proof, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(proof, "FIGURE", tmp_path / "figure.png")
    assert proof.main(["--tables", "--results", str(tmp_path / "runs" / "results.jsonl")]) == 0
    assert "Swin V2, re-windowed" in (tmp_path / "page.md").read_text()
