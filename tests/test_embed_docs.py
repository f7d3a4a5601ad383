"""What README and docs/embed.md do with the files of moco.embed."""

import re

import numpy as np
import pytest

from tests.conftest import REPOSITORY
from tests.test_embed import checkpoint, embed  # noqa: F401  (a fixture)


@pytest.fixture
def files(checkpoint, tmp_path, image_tree, monkeypatch):  # noqa: F811
    """Write features.npz and features.faiss of images with one copy; return the two equal names."""
    one, again = next(image_tree.rglob("07.png")), image_tree / "copy_of_07.png"
    again.write_bytes(one.read_bytes())
    embed(checkpoint, tmp_path, "data=images", f"data.root={image_tree}", "data.image_size=16")
    for ending in ("npz", "faiss"):
        (tmp_path / f"f.{ending}").rename(tmp_path / f"features.{ending}")
    monkeypatch.chdir(tmp_path)
    return {str(one), str(again)}


def blocks(path):
    """Return the Python code of a page."""
    return re.findall(r"```python\n(.*?)```", (REPOSITORY / path).read_text(), re.DOTALL)


def test_the_readme_finds_neighbours(files, capsys):
    (code,) = [block for block in blocks("README.md") if "features.faiss" in block]
    capsys.readouterr()
    made = {}
    exec(code, made)
    names, features = made["names"], made["features"]
    nearest = np.argsort(-(features @ features.T), axis=1)[:, :10]
    assert {*names[made["rows"][0]]} == {*names[nearest[0]]}
    assert str(names[0]) in capsys.readouterr().out


def test_the_page_on_embed_finds_groups_and_neighbours_of_new_images(files, tmp_path):
    (tmp_path / "new.npz").write_bytes((tmp_path / "features.npz").read_bytes())
    on_disk, groups, new = blocks("docs/embed.md")
    made = {}
    exec(on_disk, made)
    assert made["rows"][0, 0] == 0
    exec(groups, made)
    assert [{*map(str, group)} for group in made["groups"]] == [files]
    exec(new, made)
    np.testing.assert_allclose(made["similarity"][:, 0], 1, atol=1e-5)
    assert made["rows"].shape == (25, 5)
