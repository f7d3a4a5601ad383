import json
import math
import os

import pytest

from moco.errors import InputError
from moco.runs.atomic_files import write_atomically, write_json
from moco.runs.config_changes import completed, differences
from moco.runs.run_folder import LAST_CHECKPOINT, as_override, claimed, find_checkpoint

CONFIG = {
    "method": {"temperature": 0.2},
    "trainer": {"max_epochs": 2, "precision": "auto"},
    "augmentation": {"query": {"a": {"x": 1}, "b": {}}},
    "resume": "auto",
}


DEFAULTS = {
    "method": {"num_queues": 1, "predictor": {"num_layers": 0}},
    "slurm": {"shells": {"login": "bash"}},
}


def changed(group, **values):
    return CONFIG | {group: CONFIG[group] | values}


def with_checkpoint(folder):
    (folder / LAST_CHECKPOINT).parent.mkdir(parents=True, exist_ok=True)
    (folder / LAST_CHECKPOINT).write_bytes(b"weights")
    return folder / LAST_CHECKPOINT


def claim(folder, config, resume, defaults=None):
    checkpoint = find_checkpoint(folder, config | {"resume": resume}, defaults or {})
    with claimed(folder, config):
        return checkpoint


def test_a_new_folder_is_claimed_and_starts_from_nothing(tmp_path):
    assert claim(tmp_path / "run", CONFIG, "auto") is None
    assert (tmp_path / "run" / ".hydra" / "config.yaml").is_file()


def test_the_same_configuration_goes_on_from_its_last_checkpoint(tmp_path):
    claim(tmp_path, CONFIG, "auto")
    assert claim(tmp_path, CONFIG, "auto") is None
    last = with_checkpoint(tmp_path)
    assert claim(tmp_path, CONFIG, "auto") == last


def test_another_configuration_is_refused_and_the_keys_are_named(tmp_path):
    claim(tmp_path, CONFIG, "auto")
    with_checkpoint(tmp_path)
    before = (tmp_path / ".hydra" / "config.yaml").read_text()
    other = changed("method", temperature=0.1) | {"seed": 3}
    with pytest.raises(InputError) as error:
        claim(tmp_path, other, "auto")
    assert (
        "another configuration: method.temperature: 0.2 there, 0.1 here; seed: None there, 3 here."
        in str(error.value)
    )
    assert (tmp_path / ".hydra" / "config.yaml").read_text() == before


def test_a_run_from_before_a_key_existed_goes_on_where_the_key_has_its_default(tmp_path):
    claim(tmp_path, CONFIG, "auto")
    last = with_checkpoint(tmp_path)
    now = changed("method", num_queues=1, predictor={"num_layers": 0}) | {
        "slurm": {"shells": {"login": "bash"}}
    }
    assert claim(tmp_path, now, "auto", DEFAULTS) == last


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (changed("method", num_queues=2), "method.num_queues: 1 there, 2 here"),
        (
            changed("method", predictor={"num_layers": 2}),
            "method.predictor.num_layers: 0 there, 2 here",
        ),
        (
            CONFIG | {"slurm": {"shells": {"login": "zsh"}}},
            "slurm.shells.login: bash there, zsh here",
        ),
    ],
)
def test_a_run_from_before_a_key_existed_is_refused_where_the_key_has_another_value(
    now, said, tmp_path
):
    claim(tmp_path, CONFIG, "auto")
    with_checkpoint(tmp_path)
    with pytest.raises(InputError, match=f"another configuration: {said}. Give"):
        claim(tmp_path, completed(now, DEFAULTS), "auto", DEFAULTS)


def test_a_null_in_place_of_a_group_is_no_missing_key():
    defaults = {"augmentation": {"color_jitter": {"hue": 0.05}}}
    without = {"augmentation": {"color_jitter": None}}
    assert completed(without, defaults) == without
    assert "augmentation.color_jitter.hue: None there, 0.05 here" in differences(
        completed(without, defaults), defaults
    )


def test_a_folder_without_results_may_be_taken_with_another_configuration(tmp_path):
    claim(tmp_path, CONFIG, "auto")
    assert claim(tmp_path, changed("method", temperature=0.1), "auto") is None


def test_two_processes_cannot_work_in_one_folder(tmp_path):
    with (
        claimed(tmp_path, CONFIG),
        pytest.raises(InputError, match="another process is at work there"),
    ):
        claim(tmp_path, CONFIG, "auto")
    claim(tmp_path, CONFIG, "auto")


@pytest.mark.parametrize(
    "path", ["runs/a-b_1.ckpt", "with space/x", "a=b,c", "it's", 'quo"te', "übung/(1)"]
)
def test_printed_overrides_can_be_typed(path):
    import shlex

    from hydra.core.override_parser.overrides_parser import OverridesParser

    (word,) = shlex.split(as_override("checkpoint", path))
    assert OverridesParser.create().parse_override(word).value() == path


def test_length_and_place_of_computation_may_change(tmp_path):
    claim(tmp_path, CONFIG, "auto")
    last = with_checkpoint(tmp_path)
    assert claim(tmp_path, changed("trainer", max_epochs=4, accelerator="gpu"), "auto") == last


def test_the_order_of_augmentations_is_part_of_the_configuration():
    swapped = CONFIG | {"augmentation": {"query": {"b": {}, "a": {"x": 1}}}}
    assert differences(CONFIG, swapped) == [
        "augmentation.query (order): ['a', 'b'] there, ['b', 'a'] here"
    ]


def test_starting_anew_does_not_overwrite_a_run(tmp_path):
    claim(tmp_path, CONFIG, "auto")
    last = with_checkpoint(tmp_path)
    with pytest.raises(InputError, match="resume=null would overwrite it"):
        claim(tmp_path, CONFIG, None)
    assert last.read_bytes() == b"weights"


def test_an_explicit_checkpoint_starts_a_new_folder_and_the_folders_own_one_continues_it(tmp_path):
    other = tmp_path / "other.ckpt"
    other.write_bytes(b"weights")
    assert claim(tmp_path / "run", CONFIG, str(other)) == other
    last = with_checkpoint(tmp_path / "run")
    assert claim(tmp_path / "run", CONFIG, str(other)) == last


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_figures_are_one_flat_object(tmp_path):
    write_json(tmp_path / "deep" / "metrics.json", {"knn/top1": 0.5, "knn/feature": "backbone"})
    assert json.loads((tmp_path / "deep" / "metrics.json").read_text()) == {
        "knn/top1": 0.5,
        "knn/feature": "backbone",
    }


def test_a_figure_that_is_not_finite_is_null_in_a_file_that_any_reader_of_json_takes(tmp_path):
    write_json(
        tmp_path / "metrics.json", {"train/loss": math.nan, "knn/top1": math.inf, "epoch": 1}
    )
    strict = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert strict == {"train/loss": None, "knn/top1": None, "epoch": 1}
