"""Damaged and malicious files in a checkpoint's place: each is one clear error, and no code of theirs runs."""

import builtins
import io
import os
import pickle
import resource
import shutil
import struct
import tarfile
import zipfile

import numpy as np
import pytest
import torch

from moco.errors import InputError
from moco.runs.checkpoint_files import read_checkpoint, sound_checkpoint
from moco.weights.reading import read_content
from tests.conftest import run_program
from tests.segmentation.test_segment import pretraining_checkpoint

CANARY = "canary"  # what the malicious files try to make in the current folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A checkpoint of half a megabyte as moco.train leaves it."""
    folder = tmp_path_factory.mktemp("sound")
    path = pretraining_checkpoint(
        folder / "last.ckpt", "backbone=resnet_tiny", "method.embedding_dim=16"
    )
    content = torch.load(path, weights_only=True)
    content["state_dict"] = {
        name: tensor for name, tensor in content["state_dict"].items() if tensor.numel() < 20_000
    }  # small, so that bits outside of the tensors are hit as well
    torch.save(content, path)
    return path


def same(one, other):
    """Whether two nested values are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(
            same(value, other[key]) for key, value in one.items()
        )
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def refused(path):
    """The one line of the error."""
    with pytest.raises(InputError) as error:
        read_checkpoint(path)
    message = str(error.value)
    assert message.startswith(f"checkpoint={path}: ")
    return message


def test_a_sound_file_is_read_whole(sound):
    assert same(read_checkpoint(sound), torch.load(sound, weights_only=True))


@pytest.mark.parametrize("seed", range(20))
def test_a_truncated_file_is_refused(seed, sound, tmp_path):
    content = sound.read_bytes()
    length = int(np.random.default_rng(seed).integers(0, len(content)))
    (tmp_path / "x.ckpt").write_bytes(content[:length])
    assert "damaged, or no checkpoint at all" in refused(tmp_path / "x.ckpt")


def bits_of_the_structure(path):
    """Places of bytes that are not in a tensor: headers, the pickle, the table at the end."""
    is_tensor = np.zeros(os.path.getsize(path), dtype=bool)
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if "/data/" in record.filename:
                with archive.open(record) as file:
                    start = file._orig_compress_start
                is_tensor[start : start + record.file_size] = True
    return np.flatnonzero(~is_tensor)


@pytest.mark.parametrize("where", ["anywhere", "structure"])
def test_a_flipped_bit_is_found_or_changes_nothing(where, sound, tmp_path):
    content = sound.read_bytes()
    expected = torch.load(sound, weights_only=True)
    places = np.arange(len(content)) if where == "anywhere" else bits_of_the_structure(sound)
    generator = np.random.default_rng(0)
    found = 0
    for place in generator.choice(places, 60, replace=False):
        damaged = bytearray(content)
        damaged[place] ^= 1 << generator.integers(8)
        (tmp_path / "x.ckpt").write_bytes(damaged)
        try:
            loaded = read_checkpoint(tmp_path / "x.ckpt")
        except InputError:
            assert "damaged" in refused(tmp_path / "x.ckpt")
            found += 1
        else:
            assert same(loaded, expected), place
    assert found > (50 if where == "anywhere" else 15)


def test_a_flipped_bit_in_a_tensor_is_found_where_torch_sees_nothing(sound, tmp_path):
    with zipfile.ZipFile(sound) as archive:
        record = max(archive.infolist(), key=lambda record: record.file_size)
        with archive.open(record) as file:
            start = file._orig_compress_start
    damaged = bytearray(sound.read_bytes())
    damaged[start + 5] ^= 4
    (tmp_path / "x.ckpt").write_bytes(damaged)
    assert f"the checksum of {record.filename} is wrong" in refused(tmp_path / "x.ckpt")
    assert not same(
        torch.load(tmp_path / "x.ckpt", weights_only=True), torch.load(sound, weights_only=True)
    )


@pytest.mark.parametrize(
    ("last", "previous", "others", "said"),
    [
        ("damaged", "damaged", ["best", "epoch_0010"], "and so is previous.ckpt; to continue from best.ckpt or epoch_0010.ckpt, copy"),
        ("damaged", "damaged", [], "and so is previous.ckpt; the run has no older one; move it away to start anew"),
        ("damaged", None, ["best"], "checkpoint at all (File is not a zip file); to continue from best.ckpt, copy it over last.ckpt"),
        (None, "damaged", [], "checkpoint at all (File is not a zip file); the run has no older one; move it away"),
    ],
)  # fmt: skip
def test_if_the_newest_checkpoints_are_damaged_others_of_the_run_are_named(
    last, previous, others, said, sound, tmp_path
):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name, state in {"last": last, "previous": previous}.items():
        if state:
            (folder / f"{name}.ckpt").write_text(state)
    for name in others:
        shutil.copy(sound, folder / f"{name}.ckpt")
    (folder / "epoch_0020.ckpt").write_text("damaged")
    before = sorted(folder.iterdir())
    with pytest.raises(InputError) as error:
        sound_checkpoint(tmp_path)
    assert said in str(error.value)
    assert sorted(folder.iterdir()) == before


class Calls:
    """Unpickles by calling a function."""

    def __init__(self, function, *arguments):
        self.function = function
        self.arguments = arguments

    def __reduce__(self):
        return self.function, self.arguments


MALICIOUS = {
    "os.system": lambda: Calls(os.system, f"touch {CANARY}"),
    "eval": lambda: Calls(builtins.eval, f"open('{CANARY}', 'w')"),
    "exec": lambda: Calls(builtins.exec, f"open('{CANARY}', 'w')"),
    "open": lambda: Calls(builtins.open, CANARY, "w"),
    "getattr": lambda: Calls(builtins.getattr, Calls(__import__, "os"), "system"),
    "torch.load": lambda: Calls(torch.load, "inner.ckpt", None, None),
    "torch.save": lambda: Calls(torch.save, [], CANARY),
    "numpy.save": lambda: Calls(np.save, CANARY, [1]),
    "pickle.loads": lambda: Calls(pickle.loads, pickle.dumps(Calls(os.system, f"touch {CANARY}"))),
    "an empty tensor of a terabyte": lambda: Calls(torch.empty, 10**12),
}


def nested(value):
    return {
        "state_dict": {"w": [{"deep": (value,)}]},
        "hyper_parameters": {},
        "config": {},
        "figures": {},
    }


@pytest.mark.parametrize("container", [lambda value: value, nested], ids=["alone", "nested"])
@pytest.mark.parametrize("kind", MALICIOUS)
@pytest.mark.parametrize("protocol", [2, 4])
def test_code_in_a_pickle_is_named_and_never_runs(protocol, kind, container, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(container(MALICIOUS[kind]()), tmp_path / "x.ckpt", pickle_protocol=protocol)
    (tmp_path / "inner.ckpt").write_bytes(pickle.dumps(Calls(os.system, f"touch {CANARY}")))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = refused(tmp_path / "x.ckpt")
    if protocol == 2:
        assert "it holds objects whose loading would run code" in message
    else:  # torch reads no other protocol than its own.
        assert "damaged, or no checkpoint at all (Unsupported operand" in message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 200_000  # kB
    assert not (tmp_path / CANARY).exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_sets_of_strings_and_numbers_are_plain_data(legacy, tmp_path):
    name = "twice in the file"
    sets = [
        set(),
        {"one"},
        {name, "other", 3, -70_000, 0.5, None, True},
        {name},
        set(),
        {f"n{i}" for i in range(3000)},
    ]
    torch.save(
        {"state_dict": {"w": torch.ones(3)}, name: sets},
        tmp_path / "x.pth",
        _use_new_zipfile_serialization=not legacy,
    )
    assert read_content(tmp_path / "x.pth", "x")[name] == sets


def test_what_would_run_is_named(tmp_path):
    torch.save(MALICIOUS["os.system"](), tmp_path / "x.ckpt")
    assert "(posix.system)" in refused(tmp_path / "x.ckpt")


OLDER_FORMATS = {
    "legacy": lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
    "pickle": lambda value, path: path.write_bytes(pickle.dumps(value)),
    "text pickle": lambda value, path: path.write_bytes(pickle.dumps(value, protocol=0)),
}


@pytest.mark.parametrize("write", OLDER_FORMATS.values(), ids=OLDER_FORMATS)
@pytest.mark.parametrize(
    "value",
    [nested(1), MALICIOUS["os.system"](), MALICIOUS["eval"]()],
    ids=["plain", "system", "eval"],
)
def test_formats_that_are_no_archive_are_refused(value, write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(value, tmp_path / "x.ckpt")
    assert "damaged, or no checkpoint at all" in refused(tmp_path / "x.ckpt")
    assert not (tmp_path / CANARY).exists()


def as_tar(path):
    pickled = pickle.dumps(Calls(os.system, f"touch {CANARY}"))
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            member = tarfile.TarInfo(name)
            member.size = len(pickled)
            archive.addfile(member, io.BytesIO(pickled))


def as_zip(path, **records):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content)


OTHER_FILES = {
    "empty": lambda path: path.touch(),
    "text": lambda path: path.write_text("nothing to see here\n" * 100),
    "html": lambda path: path.write_text("<html><body>404 not found</body></html>"),
    "noise": lambda path: path.write_bytes(np.random.default_rng(0).bytes(10_000)),
    "zip signature and noise": lambda path: path.write_bytes(
        b"PK\x03\x04" + np.random.default_rng(0).bytes(10_000)
    ),
    "end of a zip": lambda path: path.write_bytes(b"PK\x05\x06" + bytes(18)),
    "tar": as_tar,
    "npz": lambda path: (
        np.savez(path.with_suffix(""), features=np.zeros(3))
        or path.with_suffix(".npz").rename(path)
    ),
    "other zip": lambda path: as_zip(path, **{"word/document.xml": "<xml/>"}),
    "pickle that is none": lambda path: as_zip(path, **{"x/data.pkl": "what?", "x/version": "3"}),
    "pickle without end": lambda path: as_zip(
        path, **{"x/data.pkl": b"\x80\x02}q\x00", "x/version": "3"}
    ),
    "pickle that takes from an empty stack": lambda path: as_zip(
        path, **{"x/data.pkl": b"\x80\x02R.", "x/version": "3"}
    ),
    "two pickles": lambda path: as_zip(
        path, **{"x/data.pkl": b"\x80\x02}.", "y/data.pkl": b"\x80\x02}."}
    ),
    "no weights": lambda path: torch.save({"state_dict": {}}, path),
    "a list": lambda path: torch.save([1, 2], path),
    "a script": lambda path: torch.jit.save(
        torch.jit.trace(torch.nn.Identity(), torch.zeros(1)), path
    ),
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
    assert any(
        words in message
        for words in ("no such file", "damaged", "not written by moco.train", "would run code")
    )
    assert not (tmp_path / CANARY).exists()


def test_safetensors_are_refused(sound, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"w": torch.zeros(3)}, tmp_path / "x.ckpt")
    assert "damaged, or no checkpoint at all" in refused(tmp_path / "x.ckpt")


def rewritten(source, target, change, compression=zipfile.ZIP_STORED):
    """The archive with its records, a list of (name, content), changed, and checksums that fit."""
    with zipfile.ZipFile(source) as archive:
        records = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(target, "w", compression) as archive:
        for name, content in change(records):
            archive.writestr(name, content)


def contents_of_unequal_tensors_exchanged(records):
    lengths = {name: len(content) for name, content in records if "/data/" in name}
    tensors = sorted(lengths, key=lengths.__getitem__)
    exchanged = {tensors[0]: tensors[-1], tensors[-1]: tensors[0]}
    return [(exchanged.get(name, name), content) for name, content in records]


def pickle_and_version_exchanged(records):
    contents = dict(records)
    prefix = records[0][0].split("/")[0]
    contents[f"{prefix}/data.pkl"], contents[f"{prefix}/version"] = (
        contents[f"{prefix}/version"], contents[f"{prefix}/data.pkl"],
    )  # fmt: skip
    return contents.items()


EDITS = {
    "tensors exchanged": contents_of_unequal_tensors_exchanged,
    "pickle and version exchanged": pickle_and_version_exchanged,
    "tensor gone": lambda records: [(n, c) for n, c in records if not n.endswith("data/3")],
    "tensor cut": lambda records: [(n, c[:-4] if n.endswith("data/3") else c) for n, c in records],
    "tensor longer": lambda records: [
        (n, c + bytes(64) if n.endswith("data/3") else c) for n, c in records
    ],
    "pickle gone": lambda records: [(n, c) for n, c in records if not n.endswith("data.pkl")],
    "pickle cut": lambda records: [
        (n, c[:500] if n.endswith("data.pkl") else c) for n, c in records
    ],
    "all in a deeper folder": lambda records: [(f"deeper/{n}", c) for n, c in records],
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_edited_archives_are_refused(edit, sound, tmp_path):
    rewritten(sound, tmp_path / "x.ckpt", edit)
    assert "damaged" in refused(tmp_path / "x.ckpt")


@pytest.mark.parametrize("field", [20, 24], ids=["stored size", "size"])
def test_sizes_beyond_the_file_are_refused(field, sound, tmp_path):
    content = bytearray(sound.read_bytes())
    entry = content.rindex(b"PK\x01\x02")  # the last one in the table
    struct.pack_into("<I", content, entry + field, 0xFFFF_FFF0)
    (tmp_path / "x.ckpt").write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "damaged" in refused(tmp_path / "x.ckpt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 200_000  # kB


class Longer:
    """A tensor of 3 numbers that says it has 10^12."""

    def __reduce__(self):
        storage = torch.storage.TypedStorage(
            wrap_storage=torch.zeros(3).untyped_storage(), dtype=torch.float32
        )
        return torch._utils._rebuild_tensor_v2, (storage, 0, (10**12,), (1,), False, {})


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_a_tensor_longer_than_what_is_stored_is_refused(tmp_path):
    torch.save(nested(Longer()), tmp_path / "x.ckpt")
    assert "damaged" in refused(tmp_path / "x.ckpt")


@pytest.mark.parametrize(
    "part", ["state_dict", "hyper_parameters", "config", "figures", "global_step"]
)
def test_parts_of_the_wrong_kind_are_refused(part, sound, tmp_path):
    torch.save(torch.load(sound, weights_only=True) | {part: 0.5}, tmp_path / "x.ckpt")
    assert f"not written by moco.train (its {part} is no " in refused(tmp_path / "x.ckpt")


def test_the_program_says_one_line_for_each_and_exits_with_2(sound, tmp_path):
    files = {
        "cut": sound.read_bytes()[:5000],
        "text": b"text",
        "bits": bytearray(sound.read_bytes()),
    }
    files["bits"][len(files["bits"]) // 2] ^= 1
    for name, content in files.items():
        (tmp_path / f"{name}.ckpt").write_bytes(content)
    torch.save(nested(MALICIOUS["os.system"]()), tmp_path / "code.ckpt")
    torch.save(
        nested(MALICIOUS["os.system"]()),
        tmp_path / "old.ckpt",
        _use_new_zipfile_serialization=False,
    )
    torch.save({"state_dict": {"nobodys.weight": torch.zeros(3)}}, tmp_path / "names.ckpt")
    torch.save({"layer1.0.conv1.weight": torch.zeros(64, 64, 3, 3)}, tmp_path / "shapes.ckpt")
    os.mkfifo(tmp_path / "pipe.ckpt")
    names = ["cut", "text", "bits", "code", "pipe", "old", "names", "shapes"]
    done = run_program(
        "moco.evaluate", "-m", f"checkpoint={','.join(f'{name}.ckpt' for name in names)}", "hydra.sweep.dir=sweep",
        cwd=tmp_path,
    )  # fmt: skip
    lines = done.stderr.splitlines()
    assert done.returncode == 2
    assert [line.split(".ckpt")[0] for line in lines] == [
        f"error: checkpoint={name}" for name in names
    ]
    assert "posix.system" in lines[3]
    assert "posix.system" in lines[5]
    assert lines[6].startswith(
        "error: checkpoint=names.ckpt: tensors named nobodys.weight are of no known format (known: "
    )
    assert (
        lines[7]
        == "error: checkpoint=shapes.ckpt: no backbone here has tensors of these shapes; give backbone=NAME"
    )
    assert "Traceback" not in done.stdout
    assert not (tmp_path / CANARY).exists()
