"""What a user of ``moco.evaluate`` sees: tables, files, kept features, messages."""

import errno
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch

from moco.config.data import EvaluateDataConfig
from moco.config.pretrained import EvaluateConfig, EvaluationConfig, check_settings
from moco.errors import InputError, RunError


@pytest.fixture
def evaluated(checkpoint, tmp_path, capsys, caplog):
    """A function that evaluates a copy of the checkpoint in a run folder of its own.

    It returns the figures, the output and the log.
    """
    from moco.evaluate import run

    own = tmp_path / "run" / "checkpoints" / "last.ckpt"
    own.parent.mkdir(parents=True)
    (tmp_path / "run" / ".hydra").mkdir()
    (tmp_path / "run" / ".hydra" / "config.yaml").touch()  # what makes it one
    shutil.copy(checkpoint, own)
    caplog.set_level("INFO", logger="moco")

    def call(path=own, data=None, **settings):
        caplog.clear()
        # What is shown beside the accuracy is the matter of test_evaluation_images.py.
        is_knn = settings.get("name", "knn") == "knn"
        plain = {"plots": False, "label_free": False} if is_knn else {}
        measured = EvaluationConfig(**{**plain, **settings})
        config = EvaluateConfig(
            str(path), EvaluateDataConfig(**(data or {"name": "digits"})), measured, "cpu"
        )
        run(config, tmp_path / "out")
        figures = json.loads((tmp_path / "out" / "metrics.json").read_text())
        return figures, capsys.readouterr().out, "\n".join(caplog.messages)

    call.checkpoint = own
    return call


def archive(path, generator, train_labels, **others):
    """A MedMNIST-like file of 8 px images whose brightness tells the class."""
    labels = np.asarray(train_labels)
    noise = generator.integers(0, 60, (len(labels), 8, 8))
    images = (noise + 60 * np.maximum(labels, 0)[:, None, None]).astype(np.uint8)
    np.savez(path, train_images=images, train_labels=labels, **others)
    return {"name": "npz", "root": str(path), "image_size": 8}


@pytest.fixture
def tiny(generator, tmp_path):
    """60 training and 12 test images of 8 px in 3 classes."""
    test = {
        "test_images": generator.integers(0, 256, (12, 8, 8), np.uint8),
        "test_labels": np.arange(12) % 3,
    }
    return archive(tmp_path / "tiny.npz", generator, np.arange(60) % 3, **test)


def test_a_full_gpu_is_one_line(evaluated, monkeypatch):
    def full(subject):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("moco.evaluation.measurements.measure", full)
    with pytest.raises(
        RunError, match=r"^the GPU is out of memory; a smaller evaluation\.batch_size needs less$"
    ):
        evaluated()


def test_a_disk_that_is_full_when_the_figures_are_written_is_one_line(evaluated, monkeypatch, tiny):
    def full(path, write):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    # Imported before the patch, the kept features are still written.
    import moco.evaluation.feature_cache  # noqa: F401

    monkeypatch.setattr("moco.runs.run_folder.write_atomically", full)
    with pytest.raises(RunError) as error:
        evaluated(data=tiny, num_neighbors=3)
    assert re.search(
        r"No space left on device: .*; free some space and start again$", str(error.value)
    )


def test_one_pass_gives_a_grid_with_the_protocol_beside_it(evaluated):
    figures, printed, _ = evaluated(num_neighbors=7, temperature=0.5)
    grid = {key for key in figures if key.startswith("knn_grid/")}
    # For both features k x T and the main protocol: top-1, and top-5 but for k 1.
    assert len(grid) == 2 * (5 * 3 + 1) + 2 * (4 * 3 + 1)
    assert figures["knn_grid/backbone/k7/t0.5/top1"] == figures["knn/top1"]
    assert {"knn_grid/embedding/k200/t0.07/top5", "knn_grid/backbone/k1/t0.2/top1"} <= grid
    assert "360 queries (test) by a bank of" in printed
    assert f"{figures['knn_grid/embedding/k20/t0.1/top1']:.4f}" in printed


@pytest.mark.slow
def test_fewer_than_five_neighbours_leave_top5_out_of_tables_and_figures(evaluated):
    figures, printed, _ = evaluated(num_neighbors=3)
    assert "knn/top1" in printed
    assert "top5" not in printed
    assert "knn/top5" not in figures
    assert not [key for key in figures if re.search("/k[1-4]/.*top5", key)]
    assert "knn_grid/backbone/k10/t0.1/top5" in figures
    figures, printed, _ = evaluated(num_neighbors=5)
    assert figures["knn/top5"] == figures["knn_grid/backbone/k5/t0.1/top5"]
    assert "knn/top5" in printed


def test_embedding_figures_are_those_of_an_evaluation_of_the_embedding(evaluated, tiny):
    both = evaluated(data=tiny, num_neighbors=20, temperature=0.1)[0]
    embedding = evaluated(
        data=tiny, num_neighbors=20, temperature=0.1, feature="embedding", cache=False
    )[0]
    assert embedding["knn/top1"] == both["knn_grid/embedding/k20/t0.1/top1"]


@pytest.mark.slow
def test_the_confusion_matrix_is_written_and_its_worst_classes_are_named(evaluated, tmp_path):
    figures, printed, _ = evaluated(num_neighbors=20)
    with np.load(tmp_path / "out" / "confusion.npz") as written:
        confusion, labels, predicted = (
            written[name] for name in ("confusion", "labels", "predicted")
        )
        np.testing.assert_allclose(
            written["accuracy"], [(predicted[labels == c] == c).mean() for c in range(10)]
        )
        assert (labels == predicted).mean() == figures["knn/top1"]
        assert written["class_names"].tolist() == list("0123456789")
    for true, taken in np.ndindex(10, 10):
        assert confusion[true, taken] == ((labels == true) & (predicted == taken)).sum()
    assert "Classes with the lowest" in printed
    assert "Most confused classes" in printed


def test_a_second_evaluation_uses_what_the_first_has_kept(evaluated, tiny):
    first, _, log = evaluated(data=tiny)
    assert "embedded 60 images in" in log
    second, _, log = evaluated(data=tiny)
    assert "features from" in log
    assert "embedded" not in log
    assert second == first


def test_kept_features_are_not_used_for_another_checkpoint_or_other_data(
    evaluated, generator, tmp_path, tiny
):
    evaluated(data=tiny)
    assert "embedded" in evaluated(data=tiny, encoder="key")[2]
    assert "embedded" in evaluated(data=tiny | {"image_size": 12})[2]
    assert "embedded" in evaluated(data=tiny | {"crop_ratio": 0.5})[2]
    data = archive(tmp_path / "x.npz", generator, np.arange(30) % 3)
    assert "embedded" in evaluated(data=data, num_neighbors=3)[2]
    archive(tmp_path / "x.npz", generator, np.arange(30) % 3)  # other noise under the same name
    assert "embedded" in evaluated(data=data, num_neighbors=3)[2]
    assert "embedded" not in evaluated(data=tiny)[2]
    path = evaluated.checkpoint
    users = path.parents[1] / "features" / "last-cifar.npz"
    users.touch()
    held = torch.load(path, weights_only=True)
    name = next(
        name
        for name, value in held["state_dict"].items()
        if name.startswith("query_encoder.backbone")
    )
    held["state_dict"][name][0] += 1
    torch.save(held, path)
    assert "embedded" in evaluated(data=tiny)[2]
    digests = {
        kept.name.split("-")[1]
        for kept in (path.parents[1] / "features").iterdir()
        if kept != users
    }
    assert len(digests) == 1  # those of the checkpoint's former content are gone
    assert users.exists()


def test_features_of_a_checkpoint_outside_a_run_folder_are_kept_among_the_users_files(
    evaluated, tmp_path, tiny
):
    (tmp_path / "run" / ".hydra" / "config.yaml").unlink()
    evaluated(data=tiny)
    assert not (tmp_path / "run" / "features").exists()
    assert "embedded" not in evaluated(data=tiny)[2]


def test_kept_features_of_files_follow_the_files(evaluated, tmp_path, generator):
    from PIL import Image

    for part, name in (
        (part, name) for part in ("train/a", "train/b", "val/a", "val/b") for name in "xyz"
    ):
        (tmp_path / part).mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), np.uint8)).save(
            tmp_path / part / f"{name}.png"
        )
    data = {"name": "image_folder", "root": str(tmp_path), "image_size": 8}
    evaluated(data=data, num_neighbors=3)
    assert "embedded" not in evaluated(data=data, num_neighbors=3)[2]
    Image.fromarray(generator.integers(0, 256, (9, 8, 3), np.uint8)).save(tmp_path / "val/b/x.png")
    log = evaluated(data=data, num_neighbors=3)[2]
    assert "embedded 6 images" in log
    assert "features from" in log  # of the bank


def test_a_damaged_file_of_features_is_made_again(evaluated, tiny):
    first, _, _ = evaluated(data=tiny)
    for kept in (evaluated.checkpoint.parents[1] / "features").iterdir():
        content = bytearray(kept.read_bytes())
        content[len(content) // 2] ^= 255
        kept.write_bytes(content)
    second, _, log = evaluated(data=tiny)
    assert "is damaged" in log
    assert "embedded 60 images in" in log
    assert second == first


def test_features_of_a_checkpoint_outside_a_run_go_to_the_users_cache(
    evaluated, tmp_path, monkeypatch, tiny
):
    path = tmp_path / "alone.ckpt"
    shutil.copy(evaluated.checkpoint, path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    evaluated(path, data=tiny)
    assert len(list((tmp_path / "cache" / "moco" / "features").iterdir())) == 2
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "features are not kept for the next evaluation" in evaluated(path, data=tiny)[2]


def test_without_a_test_part_every_image_is_classified_by_the_others(
    evaluated, generator, tmp_path
):
    data = archive(tmp_path / "x.npz", generator, [0] * 10 + [1] * 10 + [2])
    figures, printed, log = evaluated(data=data, num_neighbors=3)
    assert "no test part: each image is classified by all others (leave one out)" in log
    assert figures["knn/queries"] == "leave one out"
    assert "leave one out" in printed
    assert figures["knn/top1"] == pytest.approx(
        20 / 21
    )  # the only one of its class has nobody to vote for it
    assert (figures["knn/bank_size"], figures["knn/num_queries"]) == (21, 21)


@pytest.mark.slow
def test_few_labels_are_drawn_several_times(evaluated):
    figures, printed, _ = evaluated(images_per_class=[1, 20], num_draws=3, num_neighbors=20)
    one, twenty = (figures[f"knn_few/{number}_per_class/top1"] for number in (1, 20))
    assert 0 < one < twenty < figures["knn_grid/backbone/k20/t0.1/top1"] + 0.05
    assert figures["knn_few/1_per_class/top1_std"] > 0
    assert "3 draws" in printed


def test_a_draw_holds_so_many_of_each_class(generator):
    from moco.evaluation.knn_measurement import draw_per_class

    labels = generator.choice([2, 5, 9], 100, p=[0.8, 0.15, 0.05])
    rows = draw_per_class(labels, 10, generator)
    assert len(set(rows)) == len(rows)
    for label in (2, 5, 9):
        assert (labels[rows] == label).sum() == min(10, (labels == label).sum())


@pytest.mark.slow
def test_an_index_that_is_not_exact_says_how_much_it_finds(evaluated):
    figures, printed, log = evaluated(index="IVF16,Flat", num_probes=4, num_neighbors=20)
    assert 0.5 < figures["knn/recall_backbone"] < 1
    assert f"{figures['knn/recall_backbone']:.4f} of the exact 20 neighbours" in log
    assert "IVF16,Flat index" in printed


def test_an_index_that_faiss_does_not_know_is_refused_before_any_image_is_read(evaluated):
    with pytest.raises(InputError) as error:
        evaluated(index="hnsw")
    assert str(error.value) == (
        "evaluation.index=hnsw: faiss has no such index for features of width 128 "
        "(could not parse index string hnsw); expected flat, which is exact, "
        "or a string of faiss.index_factory such as HNSW32 or 'IVF1024,Flat'"
    )


def test_images_without_a_label_are_left_out_and_named(evaluated, monkeypatch, generator, tmp_path):
    import moco.evaluation.subject as module
    from moco.data.sources.source import ArrayImages, DataSource, Labelled

    labels = np.array([0, 1] * 10)
    images = ArrayImages(generator.integers(0, 256, (20, 8, 8), np.uint8), "mine")
    queries = Labelled(images, labels)

    def evaluate_with(bank_labels):
        source = DataSource(images, Labelled(images, np.array(bank_labels)), queries, 8)
        monkeypatch.setattr(module, "build_source", lambda *_, **__: source)
        return evaluated(num_neighbors=3)

    figures, _, log = evaluate_with([-1, *labels[1:19], -1])
    assert "skipped 2 images without a label: mine[0], mine[19]" in log
    assert figures["knn/bank_size"] == 18
    with pytest.raises(InputError, match="none of 20 readable images has a label"):
        evaluate_with([-1] * 20)


def test_a_bank_of_one_class_is_refused(evaluated, generator, tmp_path):
    data = archive(tmp_path / "x.npz", generator, [4] * 9)
    with pytest.raises(
        InputError,
        match="a classifier needs two classes, and the 9 labelled training images are of 1",
    ):
        evaluated(data=data)


def test_images_whose_features_are_not_finite_are_named(evaluated, generator, tmp_path):
    path = evaluated.checkpoint
    held = torch.load(path, weights_only=True)
    name = next(
        name
        for name, value in held["state_dict"].items()
        if name.startswith("query_encoder.backbone")
    )
    held["state_dict"][name][:] = torch.nan
    torch.save(held, path)
    data = archive(tmp_path / "x.npz", generator, [0, 1, 2, 0, 1])
    with pytest.raises(InputError) as error:
        evaluated(data=data)
    names = ", ".join(f"{data['root']}: train_images[{row}]" for row in range(3))
    assert str(error.value) == (
        f"checkpoint={path}: the features of 5 images "
        f"are not finite (NaN or infinity): {names}, ..."
    )


def test_an_image_that_cannot_be_read_is_named(evaluated, generator, tmp_path):
    from PIL import Image

    for part, name in (
        (part, name) for part in ("train/a", "train/b", "val/a", "val/b") for name in "xyz"
    ):
        (tmp_path / part).mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), np.uint8)).save(
            tmp_path / part / f"{name}.png"
        )
    (tmp_path / "val/b/x.png").write_bytes(b"no image")
    data = {"name": "image_folder", "root": str(tmp_path), "image_size": 8}
    with pytest.raises(
        InputError, match=r"val/b/x\.png"
    ):  # one of six is more than data.max_bad_fraction
        evaluated(data=data, num_neighbors=3)
    for _ in ("embedded", "kept"):
        figures, _, log = evaluated(data=data | {"max_bad_fraction": 0.5}, num_neighbors=3)
        assert f"skipped 1 unreadable images: {tmp_path}/val/b/x.png" in log
        assert figures["knn/num_queries"] == 5


def test_a_setting_of_another_kind_of_measurement_is_refused(monkeypatch):
    from moco.config import pretrained

    monkeypatch.setitem(pretrained.KINDS, "other", ("temperature",))
    check_settings(EvaluateConfig(evaluation=EvaluationConfig(name="other", temperature=0.5)))
    with pytest.raises(InputError) as error:
        check_settings(EvaluateConfig(evaluation=EvaluationConfig(name="other", index="HNSW32")))
    assert (
        str(error.value)
        == "evaluation.index: a setting of evaluation=knn; evaluation=other does not have it"
    )


@pytest.mark.parametrize(
    ("settings", "data", "expected"),
    [
        (
            {"name": "dense", "feature": "embedding"}, {},
            "evaluation.feature: a setting of evaluation=knn and evaluation=label_free and evaluation=linear "
            "and evaluation=linear_official; evaluation=dense does not have it",
        ),
        (
            {"name": "dense", "cache": False}, {},
            "evaluation.cache: a setting of evaluation=knn and evaluation=label_free and evaluation=linear "
            "and evaluation=linear_official; evaluation=dense does not have it",
        ),
        (
            {"name": "linear", "num_neighbors": 5}, {},
            "evaluation.num_neighbors: a setting of evaluation=knn and evaluation=dense; "
            "evaluation=linear does not have it",
        ),
        (
            {"name": "dense"}, {"held_out": 0.5},
            "data.held_out: a setting of evaluation=knn and evaluation=label_free and evaluation=linear "
            "and evaluation=linear_official; evaluation=dense does not have it",
        ),
        (
            {"name": "linear"}, {"ignore_index": 0},
            "data.ignore_index: a setting of evaluation=dense and evaluation=segmentation; evaluation=linear does not have it",
        ),
        (
            {"num_probes": 9}, {},
            "evaluation.num_probes: without an IVF index in evaluation.index it has no effect",
        ),
        (
            {"index": "IVF16,Flat", "ef_search": 9}, {},
            "evaluation.ef_search: without an HNSW index in evaluation.index it has no effect",
        ),
        (
            {"num_draws": 9}, {},
            "evaluation.num_draws: without evaluation.images_per_class it has no effect",
        ),
        (
            {"map": "none", "plots": False}, {},
            "evaluation.map: without evaluation.plots=true it has no effect",
        ),
    ],
)  # fmt: skip
def test_a_setting_that_has_no_effect_is_refused(settings, data, expected):
    with pytest.raises(InputError) as error:
        check_settings(
            EvaluateConfig(evaluation=EvaluationConfig(**settings), data=EvaluateDataConfig(**data))
        )
    assert str(error.value) == expected


def test_fewer_than_one_image_per_class_is_refused(evaluated):
    with pytest.raises(
        InputError, match=r"evaluation.images_per_class=\[0\]: expected numbers of 1 or more"
    ):
        evaluated(images_per_class=[0])


def several_classes(path, generator):
    """Images whose left half is bright for class 0, and whose right half is for class 1."""
    is_class = generator.integers(0, 2, (60, 3)).astype(np.uint8)
    is_class[:, 2] = 0  # a class that no image has
    noise = generator.integers(0, 60, (60, 8, 8))
    noise[:, :, :4] += 120 * is_class[:, 0, None, None]
    noise[:, :, 4:] += 120 * is_class[:, 1, None, None]
    images = noise.astype(np.uint8)
    arrays = {"train_images": images[:40], "test_images": images[40:]}
    np.savez(path, **arrays, train_labels=is_class[:40], test_labels=is_class[40:])
    return {"name": "npz", "root": str(path), "image_size": 8}


def test_images_with_several_classes_have_a_mean_average_precision(evaluated, generator, tmp_path):
    data = several_classes(tmp_path / "several.npz", generator)
    figures, output, _ = evaluated(data=data, num_neighbors=5, plots=True)
    assert 0.5 < figures["knn/mean_average_precision"] <= 1
    assert 0 < figures["knn/top1"] <= 1
    assert output.startswith("kNN mean average precision ")
    assert "Classes with the lowest average precision" in output
    assert not (tmp_path / "out" / "confusion.npz").exists()
    assert (tmp_path / "out" / "report" / "neighbors.png").exists()
    for name in ("linear", "linear_official"):
        with pytest.raises(InputError, match=f"evaluation={name} needs one class for each image"):
            evaluated(data=data, name=name)
    with pytest.raises(InputError, match="images_per_class needs one class"):
        evaluated(data=data, images_per_class=[1])
