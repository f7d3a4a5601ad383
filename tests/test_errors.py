"""The nearest path to one that does not exist."""

import pytest

from moco.cli.checks import check_weights
from moco.errors import InputError, near_path


@pytest.fixture
def places(tmp_path, monkeypatch):
    for name in ("small", "quickstart/2026-11-30"):
        checkpoints = tmp_path / "runs" / name / "checkpoints"
        checkpoints.mkdir(parents=True)
        (checkpoints / "last.ckpt").write_text("")
    (tmp_path / "Fotos Überblick").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("runs/smal", "runs/small"),
        ("runs/smal/checkpoints/last.ckpt", "runs/small/checkpoints/last.ckpt"),
        ("runs/smal/else.ckpt", "runs/small"),
        ("runs/small/checkpoints/lats.ckpt", "runs/small/checkpoints/last.ckpt"),
        ("runs/small/checkpoints/none.ckpt", None),  # the same ending says nothing
        ("RUNS/small", "runs/small"),
        ("fotos uberblick/", "Fotos Überblick"),
        ("runs/small", None),  # it exists
        ("nothing_like_it/x", None),
        ("", None),
    ],
)
def test_the_nearest_path_is_in_the_deepest_folder_that_exists(places, path, near):
    assert near_path(path) == (f"; did you mean '{near}'?" if near else "")
    if path and near:
        assert near_path(places / path) == f"; did you mean '{places / near}'?"


def test_a_checkpoint_that_is_not_there_names_the_nearest_or_the_runs(places):
    with pytest.raises(InputError, match="no such file; did you mean 'runs/small'"):
        check_weights("runs/smal")
    with pytest.raises(InputError, match=r"runs here, newest first: runs/.*, runs/") as error:
        check_weights("elsewhere/weights.pth")
    assert "runs/quickstart/2026-11-30" in str(error.value)
    check_weights(None)
    check_weights("runs/small/checkpoints/last.ckpt")
