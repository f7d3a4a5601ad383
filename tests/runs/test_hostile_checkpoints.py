"""Damaged and malicious files in a checkpoint's place.

Each of them is one clear error, and no code in them runs.
"""

import builtins
import io
import os
import pickle
import shutil
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import torch

from moco.errors import InputError
from moco.runs.checkpoint_files import read_checkpoint, sound_checkpoint
from moco.weights.load_encoder import load_pretrained
from moco.weights.weight_files import read_content
from tests.conftest import run_program
from tests.segmentation.test_segment import pretraining_checkpoint

CANARY = "canary"  # The malicious files try to make this file in the current folder.


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A checkpoint of half a megabyte, so that flipped bits hit more than tensors."""
    folder = tmp_path_factory.mktemp("sound")
    settings = ["backbone=resnet_tiny", "method.embedding_dim=16"]
    path = pretraining_checkpoint(folder / "last.ckpt", *settings)
    content = torch.load(path, weights_only=True)
    small = {name: x for name, x in content["state_dict"].items() if x.numel() < 20_000}
    torch.save(content | {"state_dict": small}, path)
    return path


def same(one, other):
    """Return whether two nested values are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        if list(one) != list(other):
            return False
        return all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def refused(path):
    """Return the error of reading a file, which is one line."""
    with pytest.raises(InputError) as error:
        read_checkpoint(path)
    message = str(error.value)
    assert message.startswith(f"checkpoint={path}: ")
    assert "\n" not in message
    return message


def test_a_sound_file_is_read_whole(sound):
    assert same(read_checkpoint(sound), torch.load(sound, weights_only=True))


@pytest.mark.parametrize("seed", range(20))
def test_a_truncated_file_is_refused(seed, sound, tmp_path):
    content = sound.read_bytes()
    length = int(np.random.default_rng(seed).integers(0, len(content)))
    (tmp_path / "x.ckpt").write_bytes(content[:length])
    assert "damaged, or no checkpoint at all" in refused(tmp_path / "x.ckpt")


def start_of(archive, record):
    """Return where a record's content begins in a file."""
    with archive.open(record) as file:
        return file._orig_compress_start


def places_outside_of_tensors(path):
    """Return the places of headers, the pickle, and the table at the end."""
    is_tensor = np.zeros(os.path.getsize(path), dtype=bool)
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if "/data/" in record.filename:
                start = start_of(archive, record)
                is_tensor[start : start + record.file_size] = True
    return np.flatnonzero(~is_tensor)


@pytest.mark.parametrize(("where", "least_found"), [("anywhere", 50), ("outside of tensors", 15)])
def test_a_flipped_bit_is_found_or_changes_nothing(where, least_found, sound, tmp_path):
    content = sound.read_bytes()
    expected = torch.load(sound, weights_only=True)
    places = np.arange(len(content))
    if where == "outside of tensors":
        places = places_outside_of_tensors(sound)
    generator = np.random.default_rng(0)
    path = tmp_path / "x.ckpt"
    found = 0
    for place in generator.choice(places, 60, replace=False):
        damaged = bytearray(content)
        damaged[place] ^= 1 << generator.integers(8)
        path.write_bytes(damaged)
        try:
            loaded = read_checkpoint(path)
        except InputError:
            assert "damaged" in refused(path)
            found += 1
        else:
            assert same(loaded, expected), place
    assert found > least_found


def test_a_flipped_bit_in_a_tensor_is_found_where_torch_sees_nothing(sound, tmp_path):
    with zipfile.ZipFile(sound) as archive:
        record = max(archive.infolist(), key=lambda record: record.file_size)
        start = start_of(archive, record)
    damaged = bytearray(sound.read_bytes())
    damaged[start + 5] ^= 4
    path = tmp_path / "x.ckpt"
    path.write_bytes(damaged)
    assert f"the checksum of {record.filename} is wrong" in refused(path)
    loaded_by_torch = torch.load(path, weights_only=True)
    assert not same(loaded_by_torch, torch.load(sound, weights_only=True))


@pytest.mark.parametrize(
    ("last", "previous", "others", "message"),
    [
        (
            "damaged",
            "damaged",
            ["best", "epoch_0010"],
            "and so is previous.ckpt; to continue from best.ckpt or epoch_0010.ckpt, copy",
        ),
        (
            "damaged",
            "damaged",
            [],
            "and so is previous.ckpt; the run has no older one; move it away to start anew",
        ),
        (
            "damaged",
            None,
            ["best"],
            "(File is not a zip file); to continue from best.ckpt, copy it over",
        ),
        (None, "damaged", [], "(File is not a zip file); the run has no older one; move it away"),
    ],
)
def test_if_the_newest_checkpoints_are_damaged_others_of_the_run_are_named(
    last, previous, others, message, sound, tmp_path
):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    if last is not None:
        (folder / "last.ckpt").write_text(last)
    if previous is not None:
        (folder / "previous.ckpt").write_text(previous)
    for name in others:
        shutil.copy(sound, folder / f"{name}.ckpt")
    (folder / "epoch_0020.ckpt").write_text("damaged")
    before = sorted(folder.iterdir())
    with pytest.raises(InputError) as error:
        sound_checkpoint(tmp_path)
    assert message in str(error.value)
    assert sorted(folder.iterdir()) == before


class Calls:
    """An object that is unpickled by calling a function."""

    def __init__(self, function, *arguments):
        self.function = function
        self.arguments = arguments

    def __reduce__(self):
        return self.function, self.arguments


def makes_canary():
    return Calls(os.system, f"touch {CANARY}")


MALICIOUS = {
    "os.system": makes_canary(),
    "eval": Calls(builtins.eval, f"open('{CANARY}', 'w')"),
    "exec": Calls(builtins.exec, f"open('{CANARY}', 'w')"),
    "open": Calls(builtins.open, CANARY, "w"),
    "getattr": Calls(builtins.getattr, Calls(__import__, "os"), "system"),
    "torch.load": Calls(torch.load, "inner.ckpt", None, None),
    "torch.save": Calls(torch.save, [], CANARY),
    "numpy.save": Calls(np.save, CANARY, [1]),
    "pickle.loads": Calls(pickle.loads, pickle.dumps(makes_canary())),
    "an empty tensor of a terabyte": Calls(torch.empty, 10**12),
}


def nested(value):
    return {
        "state_dict": {"w": [{"deep": (value,)}]},
        "hyper_parameters": {},
        "config": {},
        "figures": {},
    }


@pytest.mark.parametrize("is_nested", [False, True])
@pytest.mark.parametrize("kind", MALICIOUS)
def test_code_in_a_pickle_is_named_and_never_runs(kind, is_nested, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    value = MALICIOUS[kind]
    torch.save(nested(value) if is_nested else value, tmp_path / "x.ckpt")
    (tmp_path / "inner.ckpt").write_bytes(pickle.dumps(makes_canary()))
    assert "it holds objects whose loading would run code" in refused(tmp_path / "x.ckpt")
    assert not (tmp_path / CANARY).exists()


@pytest.mark.parametrize("kind", MALICIOUS)
def test_code_in_a_newer_pickle_never_runs(kind, tmp_path, monkeypatch):
    """torch reads no other protocol of pickle than its own, which is 2."""
    monkeypatch.chdir(tmp_path)
    torch.save(nested(MALICIOUS[kind]), tmp_path / "x.ckpt", pickle_protocol=4)
    (tmp_path / "inner.ckpt").write_bytes(pickle.dumps(makes_canary()))
    assert "damaged, or no checkpoint at all" in refused(tmp_path / "x.ckpt")
    assert not (tmp_path / CANARY).exists()


def test_the_refused_function_is_named(tmp_path):
    torch.save(makes_canary(), tmp_path / "x.ckpt")
    assert "(posix.system)" in refused(tmp_path / "x.ckpt")


@pytest.mark.parametrize("legacy", [False, True])
def test_sets_are_plain_data(legacy, tmp_path):
    sets = [set(), {"one"}, {"other", 3, -70_000, 0.5, None, True}, {f"n{i}" for i in range(3000)}]
    content = {"state_dict": {"w": torch.ones(3)}, "sets": sets}
    path = tmp_path / "x.pth"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    assert read_content(path, "x")["sets"] == sets


def write_legacy(value, path):
    torch.save(value, path, _use_new_zipfile_serialization=False)


def write_pickle(value, path):
    path.write_bytes(pickle.dumps(value))


def write_text_pickle(value, path):
    path.write_bytes(pickle.dumps(value, protocol=0))


@pytest.mark.parametrize("write", [write_legacy, write_pickle, write_text_pickle])
@pytest.mark.parametrize(
    "value", [nested(1), makes_canary(), MALICIOUS["eval"]], ids=["plain", "system", "eval"]
)
def test_formats_that_are_no_archive_are_refused(value, write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(value, tmp_path / "x.ckpt")
    assert "damaged, or no checkpoint at all" in refused(tmp_path / "x.ckpt")
    assert not (tmp_path / CANARY).exists()


@pytest.mark.parametrize("write", [write_legacy, write_pickle, write_text_pickle])
@pytest.mark.parametrize("kind", ["os.system", "eval", "getattr"])
def test_code_in_another_projects_file_never_runs(kind, write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write({"layer1.0.conv1.weight": MALICIOUS[kind]}, tmp_path / "x.pth")
    with pytest.raises(InputError) as error:
        read_content(tmp_path / "x.pth", "init_from=x.pth")
    assert str(error.value).startswith("init_from=x.pth: ")
    assert "\n" not in str(error.value)
    assert not (tmp_path / CANARY).exists()


def write_zip(path, **records):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def write_pickle_in_zip(path, pickled):
    write_zip(path, **{"x/data.pkl": pickled, "x/version": "3"})


def write_tar(path):
    """Write the format of torch.save before version 0.1.10, with code in each member."""
    pickled = pickle.dumps(makes_canary())
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            member = tarfile.TarInfo(name)
            member.size = len(pickled)
            archive.addfile(member, io.BytesIO(pickled))


def write_npz(path):
    with open(path, "wb") as file:
        np.savez(file, features=np.zeros(3))


def write_script(path):
    traced = torch.jit.trace(torch.nn.Identity(), torch.zeros(1))
    torch.jit.save(traced, path)


NOISE = np.random.default_rng(0).bytes(10_000)
OTHER_FILES = {
    "empty": lambda path: path.touch(),
    "text": lambda path: path.write_text("nothing to see here\n" * 100),
    "html": lambda path: path.write_text("<html><body>404 not found</body></html>"),
    "noise": lambda path: path.write_bytes(NOISE),
    "zip signature and noise": lambda path: path.write_bytes(b"PK\x03\x04" + NOISE),
    "end of a zip": lambda path: path.write_bytes(b"PK\x05\x06" + bytes(18)),
    "tar": write_tar,
    "npz": write_npz,
    "other zip": lambda path: write_zip(path, **{"word/document.xml": "<xml/>"}),
    "pickle that is none": lambda path: write_pickle_in_zip(path, "what?"),
    "pickle without end": lambda path: write_pickle_in_zip(path, b"\x80\x02}q\x00"),
    "pickle that takes from an empty stack": lambda path: write_pickle_in_zip(path, b"\x80\x02R."),
    "two pickles": lambda path: write_zip(
        path, **{"x/data.pkl": b"\x80\x02}.", "y/data.pkl": b"\x80\x02}."}
    ),
    "no weights": lambda path: torch.save({"state_dict": {}}, path),
    "a list": lambda path: torch.save([1, 2], path),
    "a script": write_script,
    "folder": lambda path: path.mkdir(),
    "pipe": os.mkfifo,
    "link to nowhere": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path),
    "link to a folder": lambda path: path.symlink_to(path.parent),
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
@pytest.mark.parametrize("kind", OTHER_FILES)
def test_files_of_another_kind_are_refused(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    OTHER_FILES[kind](tmp_path / "x.ckpt")
    message = refused(tmp_path / "x.ckpt")
    reasons = ("no such file", "damaged", "not written by moco.train")
    assert any(reason in message for reason in reasons)
    assert not (tmp_path / CANARY).exists()


def test_safetensors_are_refused(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"w": torch.zeros(3)}, tmp_path / "x.ckpt")
    assert "damaged, or no checkpoint at all" in refused(tmp_path / "x.ckpt")


def exchange_unequal_tensors(records):
    tensors = [name for name in records if "/data/" in name]
    tensors.sort(key=lambda name: len(records[name]))
    small, large = tensors[0], tensors[-1]
    records[small], records[large] = records[large], records[small]


def exchange_pickle_and_version(records):
    prefix = next(iter(records)).split("/")[0]
    pickled, version = f"{prefix}/data.pkl", f"{prefix}/version"
    records[pickled], records[version] = records[version], records[pickled]


def change_record(ending, change):
    """Return an edit of one record, which `change` gets and returns, or None to remove it."""

    def edit(records):
        (name,) = (name for name in records if name.endswith(ending))
        content = change(records.pop(name))
        if content is not None:
            records[name] = content

    return edit


def move_to_a_deeper_folder(records):
    for name in list(records):
        records[f"deeper/{name}"] = records.pop(name)


EDITS = {
    "tensors exchanged": exchange_unequal_tensors,
    "pickle and version exchanged": exchange_pickle_and_version,
    "tensor gone": change_record("data/3", lambda content: None),
    "tensor cut": change_record("data/3", lambda content: content[:-4]),
    "tensor longer": change_record("data/3", lambda content: content + bytes(64)),
    "pickle gone": change_record("data.pkl", lambda content: None),
    "pickle cut": change_record("data.pkl", lambda content: content[:500]),
    "all in a deeper folder": move_to_a_deeper_folder,
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_edited_archives_are_refused(edit, sound, tmp_path):
    """The checksums are those of the edited records."""
    with zipfile.ZipFile(sound) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    edit(records)
    write_zip(tmp_path / "x.ckpt", **records)
    assert "damaged" in refused(tmp_path / "x.ckpt")


@pytest.mark.parametrize("field", [20, 24], ids=["stored size", "size"])
def test_sizes_beyond_the_file_are_refused(field, sound, tmp_path):
    content = bytearray(sound.read_bytes())
    last_entry = content.rindex(b"PK\x01\x02")  # of the table at the end
    struct.pack_into("<I", content, last_entry + field, 0xFFFF_FFF0)
    (tmp_path / "x.ckpt").write_bytes(content)
    assert "damaged" in refused(tmp_path / "x.ckpt")


class Longer:
    """A tensor of 3 numbers that says it has 10^12."""

    def __reduce__(self):
        storage = torch.storage.TypedStorage(
            wrap_storage=torch.zeros(3).untyped_storage(), dtype=torch.float32
        )
        return torch._utils._rebuild_tensor_v2, (storage, 0, (10**12,), (1,), False, {})


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_a_tensor_longer_than_its_storage_is_refused(tmp_path):
    torch.save(nested(Longer()), tmp_path / "x.ckpt")
    assert "damaged" in refused(tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    "part", ["state_dict", "hyper_parameters", "config", "figures", "global_step"]
)
def test_parts_of_the_wrong_kind_are_refused(part, sound, tmp_path):
    content = torch.load(sound, weights_only=True)
    torch.save(content | {part: 0.5}, tmp_path / "x.ckpt")
    assert f"not written by moco.train (its {part} is no " in refused(tmp_path / "x.ckpt")


@pytest.fixture
def bad_files(sound, tmp_path):
    """A folder of bad files; returns what their errors say, by the files' names."""
    content = sound.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    (tmp_path / "cut.ckpt").write_bytes(content[:5000])
    (tmp_path / "text.ckpt").write_bytes(b"text")
    (tmp_path / "bits.ckpt").write_bytes(flipped)
    torch.save(nested(makes_canary()), tmp_path / "code.ckpt")
    write_legacy(nested(makes_canary()), tmp_path / "old.ckpt")
    torch.save({"nobodys.weight": torch.zeros(3)}, tmp_path / "names.ckpt")
    torch.save({"layer1.0.conv1.weight": torch.zeros(64, 64, 3, 3)}, tmp_path / "shapes.ckpt")
    os.mkfifo(tmp_path / "pipe.ckpt")
    return {
        "cut": "damaged, or no checkpoint at all (",
        "text": "damaged, or no checkpoint at all (",
        "bits": "damaged (the checksum of ",
        "code": "it holds objects whose loading would run code (posix.system), so it is not loaded",
        "old": "it holds objects whose loading would run code (posix.system), so it is not loaded",
        "names": "tensors named nobodys.weight are of no known format (known: ",
        "shapes": "its tensors' shapes fit no backbone; give backbone=NAME",
        "pipe": "no such file",
    }


def test_a_bad_file_of_weights_is_one_line(bad_files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, message in bad_files.items():
        with pytest.raises(InputError) as error:
            load_pretrained(f"{name}.ckpt", "query", {})
        assert str(error.value).startswith(f"checkpoint={name}.ckpt: {message}")
        assert "\n" not in str(error.value)
    assert not (tmp_path / CANARY).exists()


@pytest.mark.slow
def test_the_program_prints_one_line_for_each_and_exits_with_2(bad_files, tmp_path):
    paths = ",".join(f"{name}.ckpt" for name in bad_files)
    arguments = ["-m", f"checkpoint={paths}", "hydra.sweep.dir=sweep"]
    done = run_program("moco.evaluate", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    for line, (name, message) in zip(lines, bad_files.items(), strict=True):
        assert line.startswith(f"error: checkpoint={name}.ckpt: {message}")
    assert "Traceback" not in done.stdout
    assert not (tmp_path / CANARY).exists()
