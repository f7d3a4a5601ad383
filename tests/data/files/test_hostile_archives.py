"""Archives that claim too much or hold code: refused in one line, without taking memory."""

import os
import struct
import zipfile
from io import BytesIO

import numpy as np
import pytest

from moco.data.sources.registry import build_source
from moco.errors import InputError
from tests.memory import memory_within

IMAGES = np.zeros((6, 8, 8, 3), np.uint8)


def npy(header, content=b""):
    """Return a file of NumPy's format with any header."""
    text = (repr(header) if isinstance(header, dict) else header).encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + content


def header(shape, descr="|u1"):
    return {"descr": descr, "fortran_order": False, "shape": shape}


def as_npy(array):
    with BytesIO() as file:
        np.save(file, array)
        return file.getvalue()


def archive(path, compression=zipfile.ZIP_STORED, **members):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return path


def refused(path, **settings):
    """Return the message; check that it names the file and that no memory was taken."""
    with memory_within(kilobytes=100_000), pytest.raises(InputError) as error:
        build_source("npz", str(path), **settings)
    assert str(error.value).startswith(f"data.root={path}: ")
    assert str(error.value).isprintable()
    return str(error.value)


CLAIMS = {
    "10^12 images": npy(header((10**12, 8, 8)), bytes(100)),
    "an image too few": npy(header((5, 8, 8)), bytes(6 * 64)),
    "more than 64 bits": npy(header((2**63, 2**63)), bytes(100)),
    "negative shape": npy(header((-6, -64)), bytes(6 * 64)),
    "numbers of a gigabyte": npy(header((1,), ("|u1", (10**9,))), bytes(100)),
    "objects": npy(header((6,), "|O"), bytes(48)),
    "objects in a field": npy(header((6,), [("a", "|O")]), bytes(48)),
    "shape of text": npy("{'descr': '|u1', 'fortran_order': False, 'shape': 'text'}"),
    "code in the header": npy("__import__('os').system('touch canary')"),
    "endless header": b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + b" " * 100,
    "unknown version": b"\x93NUMPY\x09\x00" + bytes(100),
    "a pickle": b"\x80\x04cos\nsystem\n(S'touch canary'\ntR.",
    "nothing": b"",
}


@pytest.mark.parametrize("name", ["train_images", "train_labels"])
@pytest.mark.parametrize("claim", CLAIMS)
def test_an_array_that_claims_more_than_is_there_or_holds_code_is_refused(
    claim, name, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    members = {"train_images": as_npy(IMAGES)} | {name: CLAIMS[claim]}
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        refused(archive(tmp_path / "x.npz", compression, **members))
    assert not os.path.exists("canary")


def test_the_reasons_are_said(tmp_path):
    path = archive(tmp_path / "objects.npz", train_images=CLAIMS["objects"])
    assert "Object arrays cannot be loaded when allow_pickle=False" in refused(path)
    path = archive(tmp_path / "few.npz", train_images=CLAIMS["an image too few"])
    assert "train_images holds more than its header says" in refused(path)


def with_size(path, size):
    """Change the unpacked size of the last member in the archive's directory."""
    content = bytearray(path.read_bytes())
    struct.pack_into("<I", content, content.rindex(b"PK\x01\x02") + 24, size)
    path.write_bytes(content)
    return path


@pytest.mark.slow
def test_a_member_that_unpacks_to_more_than_it_declares_is_cut_off_there(tmp_path):
    bomb = npy(header((6, 8, 8)), bytes(200_000_000))
    path = archive(tmp_path / "x.npz", zipfile.ZIP_DEFLATED, train_images=bomb)
    refused(with_size(path, 128 + 6 * 64))


def test_a_member_that_declares_more_than_it_unpacks_to_is_refused(tmp_path):
    content = npy(header((10**6, 32, 32, 3)), bytes(1000))
    path = archive(tmp_path / "x.npz", zipfile.ZIP_DEFLATED, train_images=content)
    refused(with_size(path, 128 + 10**6 * 3072))


@pytest.mark.parametrize(
    "compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA], ids=["bzip2", "lzma"]
)
def test_compressions_that_numpy_never_writes_are_refused(compression, tmp_path):
    path = archive(tmp_path / "x.npz", compression, train_images=as_npy(IMAGES))
    assert "compressed in another way" in refused(path)


def test_arrays_beyond_the_machines_memory_are_refused(tmp_path, monkeypatch):
    np.savez(tmp_path / "x.npz", train_images=IMAGES)
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PHYS_PAGES": 1, "SC_PAGE_SIZE": 1000}[name])
    assert "its arrays take 0.0 GB, and this machine has 0.0" in refused(tmp_path / "x.npz")


def test_an_encrypted_archive_is_refused(tmp_path):
    path = archive(tmp_path / "x.npz", train_images=as_npy(IMAGES))
    content = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + flags] |= 1
    path.write_bytes(content)
    assert "encrypted" in refused(path)


def test_arrays_in_fortran_order_and_all_zero_ones_are_read(tmp_path):
    images = np.asfortranarray(
        np.random.default_rng(0).integers(0, 256, (6, 8, 5, 3), dtype=np.uint8)
    )
    np.savez_compressed(tmp_path / "x.npz", train_images=images)
    assert (np.asarray(build_source("npz", str(tmp_path / "x.npz")).train[3]) == images[3]).all()
    np.savez_compressed(tmp_path / "zeros.npz", train_images=np.zeros((5000, 32, 32, 3), np.uint8))
    assert len(build_source("npz", str(tmp_path / "zeros.npz")).train) == 5000


def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path, generator):
    images = generator.integers(0, 256, IMAGES.shape, dtype=np.uint8)
    np.savez_compressed(tmp_path / "sound.npz", train_images=images, train_labels=np.arange(6))
    content = (tmp_path / "sound.npz").read_bytes()
    found = 0
    for place in generator.choice(len(content), 100, replace=False):
        damaged = bytearray(content)
        damaged[place] ^= 1 << generator.integers(8)
        (tmp_path / "x.npz").write_bytes(damaged)
        try:
            source = build_source("npz", str(tmp_path / "x.npz"))
        except InputError:
            found += 1
        else:
            assert (source.train.tensor.numpy() == images).all()
            assert source.bank is None or source.bank.labels.tolist() == list(range(6))
    assert found > 75


def fashion_mnist(root, **contents):
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for part, count in (("train", 5), ("t10k", 3)):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 0x803, count, 28, 28) + bytes(count * 784)
        )
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">II", 0x801, count) + bytes(count)
        )
    for name, content in contents.items():
        (folder / name.replace("_", "-")).write_bytes(content)
    return str(root)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        struct.pack(">IIII", 0x803, 5, 28, 28),
        struct.pack(">IIII", 0x803, 2**31, 2**31, 2**31) + bytes(9),
        struct.pack(">IIII", 0x8FF, 5, 28, 28) + bytes(5 * 784),
        struct.pack(">II", 0x801, 5) + bytes(5),
        struct.pack(">IIII", 0x803, 4, 28, 28) + bytes(4 * 784),
    ],
)
def test_damaged_files_of_fashion_mnist_are_one_error(content, tmp_path):
    root = fashion_mnist(tmp_path, **{"train_images_idx3_ubyte": content})
    with pytest.raises(
        InputError,
        match=r"FashionMNIST(: train_labels must hold one class| is not there or damaged \(.+\))",
    ):
        build_source("fashion_mnist", root)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_pickles_of_cifar_are_not_opened_unless_their_checksum_is_right(
    name, tmp_path, monkeypatch
):
    import torchvision.datasets

    monkeypatch.chdir(tmp_path)
    dataset = getattr(torchvision.datasets, name.upper())
    for file, _ in [*dataset.train_list, *dataset.test_list, [dataset.meta["filename"], None]]:
        path = tmp_path / dataset.base_folder / file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\x80\x04cos\nsystem\n(S'touch canary'\ntR.")
    with pytest.raises(InputError, match="is not there or damaged"):
        build_source(name, str(tmp_path))
    assert not os.path.exists("canary")
