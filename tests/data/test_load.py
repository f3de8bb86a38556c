"""The loading of data sets, on small ones generated in their standard layouts."""

from __future__ import annotations

import gzip
import math
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat

from brittle.data.batches import batches_of
from brittle.data.load import MEAN_STD, Data, check_batch, load_data, statistics_of
from brittle.data.readers import folders
from brittle.errors import InputError
from brittle.models.normalize import Normalize
from helpers.hostile import Hostile


def data_of(n: int = 20) -> Data:
    return Data("numbers", torch.arange(n).float().div(n)[:, None], torch.arange(n), n, {2.0: 0.5})


# --- Data.take ----------------------------------------------------------------------------------------------


def test_take_keeps_order_and_pairs_and_repeats_by_seed():
    data = data_of()
    part = data.take(7, seed=3)
    assert len(part.labels) == 7
    assert part.labels.tolist() == sorted(set(part.labels.tolist()))
    assert torch.equal(part.inputs[:, 0] * 20, part.labels.float())
    assert torch.equal(part.labels, data.take(7, seed=3).labels)
    assert any(not torch.equal(part.labels, data.take(7, seed=s).labels) for s in range(3))
    assert (part.name, part.classes, part.budgets) == (data.name, data.classes, data.budgets)


@pytest.mark.parametrize("n", [20, 21])
def test_take_of_all_is_the_data_itself(n):
    data = data_of()
    assert data.take(n) is data


@pytest.mark.parametrize("n", [0, -1])
def test_take_refuses_none(n):
    with pytest.raises(InputError, match=f"at least 1; got {n}"):
        data_of().take(n)


def test_take_leaves_the_global_random_state():
    before = torch.get_rng_state()
    data_of().take(5)
    assert torch.equal(before, torch.get_rng_state())


# --- digits -------------------------------------------------------------------------------------------------


def test_digits_splits_are_complete_and_disjoint():
    from sklearn.datasets import load_digits

    train, test = load_data("digits", split="train"), load_data("digits")
    assert train.inputs.shape == (1437, 1, 8, 8)
    assert test.inputs.shape == (360, 1, 8, 8)
    assert (test.inputs.dtype, test.labels.dtype, test.classes) == (torch.float32, torch.int64, 10)
    assert test.budgets == {math.inf: 0.06, 2.0: 0.3}
    both = np.concatenate([(16 * d.inputs).reshape(-1, 64).numpy() for d in (train, test)])
    assert sorted(map(tuple, both)) == sorted(map(tuple, load_digits().data))


def test_digits_split_does_not_depend_on_the_seed():
    assert torch.equal(load_data("digits", seed=1).inputs, load_data("digits", seed=2).inputs)


def test_limit_is_take():
    limited, taken = load_data("digits", limit=30, seed=4), load_data("digits").take(30, seed=4)
    assert torch.equal(limited.inputs, taken.inputs)
    assert torch.equal(limited.labels, taken.labels)
    assert not torch.equal(limited.inputs, load_data("digits", limit=30, seed=5).inputs)


# --- the door -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["", "digit", "folder", "folder:", "npz:", "digits:x", "imagenet:x"])
def test_unknown_spec_lists_the_forms(spec):
    with pytest.raises(
        InputError, match=r"digits, mnist, cifar10, cifar100, svhn, imagenet, folder:PATH, npz:PATH; got"
    ):
        load_data(spec)


@pytest.mark.parametrize("limit", [0, -3])
def test_limit_must_be_positive(limit):
    with pytest.raises(InputError, match=rf"limit .* at least 1; got {limit}"):
        load_data("digits", limit=limit)


def test_split_must_be_known():
    with pytest.raises(InputError, match="split: expected 'train' or 'test'; got 'val'"):
        load_data("digits", split="val")


def test_image_size_is_for_folders():
    with pytest.raises(InputError, match="image_size: expected only for imagenet and folder:PATH"):
        load_data("digits", image_size=(8, 8))


@pytest.mark.parametrize("size", [(0, 4), (4,), (-1, 2)])
def test_image_size_must_be_two_positive_numbers(size):
    with pytest.raises(InputError, match="image_size: expected"):
        load_data("folder:x", image_size=size)


@pytest.mark.parametrize("spec", ["mnist", "cifar10", "cifar100", "svhn", "imagenet"])
def test_a_data_root_is_needed(spec):
    with pytest.raises(InputError, match=f"root: expected the folder that holds the files of '{spec}'"):
        load_data(spec)


# --- MNIST --------------------------------------------------------------------------------------------------


def write_mnist(root: Path, *, n: int = 12, stem: str = "t10k", packed: bool = False) -> tuple[np.ndarray, np.ndarray]:
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(n)
    x, y = rng.integers(0, 256, (n, 28, 28), np.uint8), (np.arange(n) % 10).astype(np.uint8)
    for name, array in (("images-idx3", x), ("labels-idx1", y)):
        content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
        path = folder / f"{stem}-{name}-ubyte"
        if packed:
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
        else:
            path.write_bytes(content)
    return x, y


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("split", "stem"), [("test", "t10k"), ("train", "train")])
def test_mnist_is_read_exactly(tmp_path, packed, split, stem):
    x, y = write_mnist(tmp_path, stem=stem, packed=packed)
    data = load_data("mnist", root=tmp_path, split=split)
    assert data.inputs.shape == (12, 1, 28, 28)
    np.testing.assert_allclose(data.inputs[:, 0].numpy(), x / 255, rtol=1e-6)
    assert data.labels.tolist() == y.tolist()
    assert data.budgets == {math.inf: 0.1, 2.0: 1.0}
    assert len(load_data("mnist", root=tmp_path, split=split, limit=5).labels) == 5


def test_mnist_agrees_with_torchvision(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    for stem in ("train", "t10k"):
        write_mnist(tmp_path, stem=stem)
    theirs = torchvision.datasets.MNIST(tmp_path, train=False, download=False)
    ours = load_data("mnist", root=tmp_path)
    assert torch.equal(ours.inputs[:, 0], theirs.data / 255)
    assert torch.equal(ours.labels, theirs.targets)


def test_mnist_missing_names_the_path(tmp_path):
    with pytest.raises(InputError, match=r"t10k-images-idx3-ubyte: expected .*got no file, and nothing is downloaded"):
        load_data("mnist", root=tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: b"", "idx magic 00000803 at the start; got None"),
        (lambda c: c[:10], "idx magic"),
        (lambda c: b"\x00\x00\x0d\x03" + c[4:], "idx magic 00000803 at the start; got 00000d03"),
        (lambda c: c[:-1], "expected the .* values it announces"),
        (lambda c: c + b"x", "expected the .* values it announces"),
        (lambda c: c[:4] + b"\xff" * 12 + c[16:], "expected the .* values it announces"),
    ],
)
def test_mnist_damage_is_named(tmp_path, damage, message):
    write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=rf"t10k-images-idx3-ubyte: .*{message}"):
        load_data("mnist", root=tmp_path)


@pytest.mark.parametrize("damage", [lambda c: b"no gzip", lambda c: c[:-20], lambda c: c[:40] + b"x" * 20 + c[60:]])
def test_mnist_broken_gzip(tmp_path, damage):
    write_mnist(tmp_path, packed=True)
    path = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=r"images-idx3-ubyte\.gz: expected an idx file .*reading it failed"):
        load_data("mnist", root=tmp_path)


def test_mnist_lengths_must_agree(tmp_path):
    write_mnist(tmp_path, n=12)
    labels = tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    labels.write_bytes(bytes([0, 0, 8, 1]) + struct.pack(">I", 3) + bytes(3))
    with pytest.raises(InputError, match="12 images and 3 labels"):
        load_data("mnist", root=tmp_path)


def test_mnist_labels_must_be_digits(tmp_path):
    write_mnist(tmp_path, n=12)
    labels = tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    labels.write_bytes(bytes([0, 0, 8, 1]) + struct.pack(">I", 12) + bytes([10] * 12))
    with pytest.raises(InputError, match=r"mnist: y: expected .* below the number of classes, 10; got labels from 10"):
        load_data("mnist", root=tmp_path)


def test_mnist_empty(tmp_path):
    write_mnist(tmp_path, n=0)
    with pytest.raises(InputError, match="at least one example"):
        load_data("mnist", root=tmp_path)


# --- CIFAR-10 -----------------------------------------------------------------------------------------------

TRAIN = [f"data_batch_{i}" for i in range(1, 6)]


def cifar_arrays(seed: int, n: int = 4) -> tuple[np.ndarray, list[int]]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, 3072), np.uint8), rng.integers(0, 10, n).tolist()


def write_pickled(root: Path, name: str, content: object, protocol: int = 2) -> Path:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(pickle.dumps(content, protocol=protocol))
    return folder / name


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("wrap", [lambda y: y, np.array, lambda y: np.array(y, ">i8"), lambda y: np.array(y, np.uint8)])
def test_cifar10_pickled(tmp_path, protocol, wrap):
    x, y = cifar_arrays(0)
    write_pickled(tmp_path, "test_batch", {b"data": x, b"labels": wrap(y), b"batch_label": b"testing"}, protocol)
    data = load_data("cifar10", root=tmp_path)
    np.testing.assert_allclose(data.inputs.numpy(), x.reshape(-1, 3, 32, 32) / 255, rtol=1e-6)
    assert data.labels.tolist() == y
    assert data.classes == 10
    assert data.budgets == {math.inf: 8 / 255, 2.0: 0.5}


def test_cifar10_as_python_2_wrote_it(tmp_path):
    """The published files come from Python 2: byte strings, numpy.core, protocol 2, labels as a list."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    body = bytes(range(256)) * 12
    content = (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
        b"K\x00tb\x89T" + struct.pack("<i", len(body)) + body + b"tbU\x06labels]K\x07au."
    )
    assert pickle.loads(content, encoding="bytes")[b"data"].shape == (1, 3072)  # our bytes are a real such file
    (folder / "test_batch").write_bytes(content)
    data = load_data("cifar10", root=tmp_path)
    assert data.labels.tolist() == [7]
    assert torch.equal(data.inputs.flatten(), torch.tensor(list(body)) / 255)


def test_cifar10_fortran_order(tmp_path):
    x, y = cifar_arrays(1)
    write_pickled(tmp_path, "test_batch", {"data": np.asfortranarray(x), "labels": y})
    assert torch.equal(load_data("cifar10", root=tmp_path).inputs.flatten(1), torch.from_numpy(x) / 255)


def test_cifar10_forms_agree(tmp_path):
    binary = tmp_path / "binary" / "cifar-10-batches-bin"
    binary.mkdir(parents=True)
    for seed, name in enumerate([*TRAIN, "test_batch"]):
        x, y = cifar_arrays(seed)
        write_pickled(tmp_path, name, {"data": x, "labels": y})
        (binary / f"{name}.bin").write_bytes(
            b"".join(bytes([label]) + row.tobytes() for label, row in zip(y, x, strict=True))
        )
    for split, n in (("train", 20), ("test", 4)):
        a, b = (load_data("cifar10", root=root, split=split) for root in (tmp_path, binary.parent))
        assert a.inputs.shape == (n, 3, 32, 32)
        assert torch.equal(a.inputs, b.inputs)
        assert torch.equal(a.labels, b.labels)
    assert len(load_data("cifar10", root=tmp_path, split="train", limit=3).labels) == 3


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_cifar10_hostile_pickle_is_not_run(tmp_path, protocol):
    trace = tmp_path / "trace"
    path = write_pickled(tmp_path, "test_batch", {"data": Hostile(trace), "labels": [1]}, protocol)
    with pytest.raises(InputError, match=r"test_batch: .*asks for \w+\.mkdir, and code is never unpickled"):
        load_data("cifar10", root=tmp_path)
    assert not trace.exists()
    pickle.loads(path.read_bytes())
    assert trace.exists()  # it was a weapon


@pytest.mark.parametrize("name", ["builtins\neval", "numpy\nload", "numpy\nfromfile", "codecs\nopen", "os\nsystem"])
def test_cifar10_admits_no_other_name(tmp_path, name):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(b"c" + name.encode() + b"\n.")
    with pytest.raises(InputError, match=name.replace("\n", r"\.")):
        load_data("cifar10", root=tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "expected a dict, got list"),
        ({"labels": [1]}, r"data \(N, 3072\) of uint8"),
        ({"data": np.zeros((2, 3072), np.uint8)}, "N integer labels"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}, r"labels \(1,\)"),
        ({"data": np.zeros((1, 3072)), "labels": [1]}, "float64"),
        ({"data": np.zeros((1, 100), np.uint8), "labels": [1]}, r"\(1, 100\)"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": ["cat"]}, "labels .* of"),
        ({"data": np.array([None]), "labels": [1]}, "expected an array of numbers; got one of 'O8'"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [10]}, "number of classes, 10"),
    ],
)
def test_cifar10_contents_are_checked(tmp_path, content, message):
    write_pickled(tmp_path, "test_batch", content)
    with pytest.raises(InputError, match=message):
        load_data("cifar10", root=tmp_path)


@pytest.mark.parametrize("damage", [lambda c: b"", lambda c: c[:-50], lambda c: c[: len(c) // 2], lambda c: b"garbage"])
def test_cifar10_damaged_pickle(tmp_path, damage):
    x, y = cifar_arrays(0)
    path = write_pickled(tmp_path, "test_batch", {"data": x, "labels": y})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match="test_batch: expected a CIFAR batch"):
        load_data("cifar10", root=tmp_path)


def test_cifar10_missing(tmp_path):
    with pytest.raises(
        InputError, match=r"cifar-10-batches-py: expected this folder .*got neither, and nothing is downloaded"
    ):
        load_data("cifar10", root=tmp_path)
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(InputError, match=r"data_batch_1: expected .* got no file"):
        load_data("cifar10", root=tmp_path, split="train")


@pytest.mark.parametrize("size", [0, 3072, 3074])
def test_cifar10_truncated_binary(tmp_path, size):
    (tmp_path / "cifar-10-batches-bin").mkdir()
    (tmp_path / "cifar-10-batches-bin" / "test_batch.bin").write_bytes(bytes(size))
    with pytest.raises(InputError, match=f"records of 3073 bytes; got {size} bytes"):
        load_data("cifar10", root=tmp_path)


# --- CIFAR-100 ----------------------------------------------------------------------------------------------


def write_cifar100(root: Path, name: str = "test", n: int = 6) -> tuple[np.ndarray, list[int]]:
    folder = root / "cifar-100-python"
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(n)
    x, fine = rng.integers(0, 256, (n, 3072), np.uint8), rng.integers(0, 100, n).tolist()
    batch = {"data": x, "fine_labels": fine, "coarse_labels": [0] * n, "filenames": ["a.png"] * n}
    (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return x, fine


@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar100_has_fine_labels(tmp_path, split):
    x, fine = write_cifar100(tmp_path, split)
    data = load_data("cifar100", root=tmp_path, split=split)
    assert torch.equal(data.inputs, torch.from_numpy(x).reshape(-1, 3, 32, 32) / 255)
    assert (data.labels.tolist(), data.classes) == (fine, 100)
    assert data.budgets == {math.inf: 8 / 255, 2.0: 0.5}


def test_cifar100_agrees_with_torchvision(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")
    for name in ("train", "test"):
        write_cifar100(tmp_path, name)
    monkeypatch.setattr(datasets.CIFAR100, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.CIFAR100, "_load_meta", lambda self: None)
    theirs, ours = datasets.CIFAR100(tmp_path, train=False), load_data("cifar100", root=tmp_path)
    assert torch.equal(ours.inputs, torch.from_numpy(theirs.data).permute(0, 3, 1, 2) / 255)
    assert ours.labels.tolist() == theirs.targets


def test_cifar100_hostile_pickle_is_not_run(tmp_path):
    trace = tmp_path / "trace"
    (tmp_path / "cifar-100-python").mkdir()
    path = tmp_path / "cifar-100-python" / "test"
    path.write_bytes(pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "fine_labels": Hostile(trace)}))
    with pytest.raises(InputError, match=r"test: .*asks for \w+\.mkdir, and code is never unpickled"):
        load_data("cifar100", root=tmp_path)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"data": np.zeros((2, 3072), np.uint8), "coarse_labels": [1, 2]}, "N integer fine_labels"),
        ({"data": np.zeros((2, 3072), np.uint8), "fine_labels": [1]}, r"fine_labels \(1,\)"),
        ({"data": np.zeros((1, 3072), np.uint8), "fine_labels": [100]}, "number of classes, 100; got labels from 100"),
        ({"data": np.zeros((1, 3072), np.uint8), "fine_labels": [-1]}, "got labels from -1"),
        ({"data": np.zeros((1, 32, 32, 3), np.uint8), "fine_labels": [1]}, r"\(1, 32, 32, 3\)"),
    ],
)
def test_cifar100_contents_are_checked(tmp_path, content, message):
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "cifar-100-python" / "test").write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match=message):
        load_data("cifar100", root=tmp_path)


def test_cifar100_missing_and_truncated_name_the_path(tmp_path):
    with pytest.raises(InputError, match=r"cifar-100-python.train: expected .*got no file, and nothing is downloaded"):
        load_data("cifar100", root=tmp_path, split="train")
    write_cifar100(tmp_path)
    path = tmp_path / "cifar-100-python" / "test"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"cifar-100-python.test: expected a CIFAR batch"):
        load_data("cifar100", root=tmp_path)


# --- SVHN ---------------------------------------------------------------------------------------------------


def write_svhn(root: Path, split: str = "test", *, n: int = 12, packed: bool = True, **other: object) -> np.ndarray:
    x = np.random.default_rng(n).integers(0, 256, (32, 32, 3, n), np.uint8)
    y = (np.arange(n, dtype=np.uint8) % 10 + 1)[:, None]
    savemat(root / f"{split}_32x32.mat", {"X": x, "y": y, **other}, do_compression=packed)
    return x


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("split", ["train", "test"])
def test_svhn_is_read_exactly_and_label_ten_is_zero(tmp_path, split, packed):
    x = write_svhn(tmp_path, split, packed=packed)
    data = load_data("svhn", root=tmp_path, split=split)
    assert data.inputs.shape == (12, 3, 32, 32)
    for i in range(12):
        assert torch.equal(data.inputs[i, 2], torch.from_numpy(x[:, :, 2, i]) / 255)
    assert data.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2]
    assert (data.classes, data.budgets) == (10, {math.inf: 8 / 255, 2.0: 0.5})


def test_svhn_agrees_with_torchvision(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")
    write_svhn(tmp_path)
    monkeypatch.setattr(datasets.SVHN, "_check_integrity", lambda self: True)
    theirs, ours = datasets.SVHN(tmp_path, split="test"), load_data("svhn", root=tmp_path)
    assert torch.equal(ours.inputs, torch.from_numpy(theirs.data) / 255)
    assert ours.labels.tolist() == theirs.labels.tolist()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"y": np.zeros((12, 1), np.uint8)}, "labels y from 1 to 10, where 10 is the digit 0; got 0 to 0"),
        ({"y": np.full((12, 1), 11, np.uint8)}, "got 11 to 11"),
        ({"y": np.full((12, 1), 1.5)}, r"got 1\.5 to 1\.5"),
        ({"y": np.ones((11, 1), np.uint8)}, r"y \(11, 1\)"),
        ({"y": np.array(["one"] * 12)}, "y .* of"),
        ({"X": np.zeros((12, 32, 32, 3), np.uint8)}, r"got X \(12, 32, 32, 3\)"),
        ({"X": np.zeros((32, 32, 3, 12))}, "of float64"),
        ({"X": np.zeros((32, 32, 3, 0), np.uint8), "y": np.zeros((0, 1), np.uint8)}, "svhn: .*at least one example"),
    ],
)
def test_svhn_contents_are_checked(tmp_path, other, message):
    write_svhn(tmp_path, **other)
    with pytest.raises(InputError, match=message):
        load_data("svhn", root=tmp_path)


@pytest.mark.parametrize("damage", [lambda c: b"", lambda c: c[:200], lambda c: c[:-30], lambda c: b"garbage" * 40])
def test_svhn_damage_names_the_path(tmp_path, damage):
    write_svhn(tmp_path)
    path = tmp_path / "test_32x32.mat"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=r"test_32x32\.mat: expected a MATLAB file with X and y; reading it failed"):
        load_data("svhn", root=tmp_path)


def test_svhn_missing_file_or_variable_names_the_path(tmp_path):
    with pytest.raises(InputError, match=r"train_32x32\.mat: expected .*got no file, and nothing is downloaded"):
        load_data("svhn", root=tmp_path, split="train")
    savemat(tmp_path / "test_32x32.mat", {"X": np.zeros((32, 32, 3, 1), np.uint8)})
    with pytest.raises(InputError, match=r"test_32x32\.mat: expected .*reading it failed: there is no y"):
        load_data("svhn", root=tmp_path)


# --- ImageNet -----------------------------------------------------------------------------------------------

SHAPES = [(40, 31), (31, 40), (37, 37), (90, 16)]  # width, height


def write_imagenet(root: Path, mode: str = "RGB") -> list[Path]:
    """Write noise of several sizes as ``root/SPLIT/WNID/name.JPEG`` and return the files of ``val`` in order."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for wnid in ("n01440764", "n02123045"):
            folder = root / split / wnid
            folder.mkdir(parents=True)
            for i, (width, height) in enumerate(SHAPES):
                pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
                Image.fromarray(pixels).convert(mode).save(folder / f"{split}_{i}.JPEG", quality=95)
    return sorted((root / "val").glob("*/*"))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(("image_size", "shorter"), [(None, 256), ((14, 14), 16), ((7, 21), 24), ((33, 33), 38)])
def test_imagenet_is_torchvisions_evaluation(tmp_path, mode, image_size, shorter):
    transforms = pytest.importorskip("torchvision.transforms")
    files = write_imagenet(tmp_path, mode)
    steps = transforms.Resize(shorter), transforms.CenterCrop(image_size or 224), transforms.ToTensor()
    expected = torch.stack([transforms.Compose(steps)(Image.open(file).convert("RGB")) for file in files])
    data = load_data("imagenet", root=tmp_path, image_size=image_size)
    assert torch.equal(data.inputs, expected)
    assert (data.labels.tolist(), data.classes) == ([0] * 4 + [1] * 4, 2)
    assert data.budgets == {math.inf: 4 / 255, 2.0: 3.0}


def test_imagenet_splits_are_its_folders(tmp_path):
    write_imagenet(tmp_path)
    train, test = (load_data("imagenet", root=tmp_path, split=s, image_size=(8, 8)).inputs for s in ("train", "test"))
    assert train.shape == test.shape
    assert not torch.equal(train, test)
    for file in (tmp_path / "train").glob("*/*"):
        file.write_bytes(b"broken")
    assert torch.equal(test, load_data("imagenet", root=tmp_path, image_size=(8, 8)).inputs)
    with pytest.raises(InputError, match=r"n01440764.train_0\.JPEG: expected an image; reading it failed"):
        load_data("imagenet", root=tmp_path, split="train")


def test_imagenet_layout_is_checked(tmp_path):
    with pytest.raises(InputError, match="val: expected a folder; got nothing there"):
        load_data("imagenet", root=tmp_path)
    write_imagenet(tmp_path)
    (tmp_path / "train" / "n99999999").mkdir()
    with pytest.raises(
        InputError, match=r"train and .*val: expected the same classes.*got only in one of them n99999999"
    ):
        load_data("imagenet", root=tmp_path)


# --- all sets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("spec", ["digits", "mnist", "cifar10", "cifar100", "svhn", "imagenet", "folder:", "npz:"])
def test_limit_picks_as_take_does_in_every_set(tmp_path, spec, split):
    size = None
    match spec:
        case "mnist":
            write_mnist(tmp_path, stem={"train": "train", "test": "t10k"}[split])
        case "cifar10":
            for seed, name in enumerate([*TRAIN, "test_batch"]):
                x, y = cifar_arrays(seed, 9)
                write_pickled(tmp_path, name, {"data": x, "labels": y})
        case "cifar100":
            write_cifar100(tmp_path, split, 9)
        case "svhn":
            write_svhn(tmp_path, split)
        case "imagenet":
            write_imagenet(tmp_path)
            size = (8, 8)
        case "folder:":
            spec += str(write_folder(tmp_path / "images"))
        case "npz:":
            spec = write_npz(tmp_path / "a.npz", x=np.arange(36).reshape(9, 4) / 36, y=np.arange(9))
    whole = load_data(spec, root=tmp_path, split=split, image_size=size)
    for seed in (0, 1):
        part, taken = (
            load_data(spec, root=tmp_path, split=split, image_size=size, limit=4, seed=seed),
            whole.take(4, seed),
        )
        assert torch.equal(part.inputs, taken.inputs)
        assert torch.equal(part.labels, taken.labels)
        assert part.classes == whole.classes


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 2500), st.integers(1, 4), st.sampled_from([(), (1,), (2, 3)]), st.integers(0, 99))
def test_statistics_are_the_mean_and_deviation_of_each_channel(n, channels, rest, seed):
    x = np.random.default_rng(seed).random((n, channels, *rest), np.float32)
    mean, std = statistics_of(Data("x", torch.from_numpy(x), torch.zeros(n, dtype=torch.int64), 1, {}))
    axes = (0, *range(2, x.ndim))
    np.testing.assert_allclose(mean, x.astype(np.float64).mean(axes), rtol=1e-12)
    if n * math.prod(rest) > 1:
        np.testing.assert_allclose(std, x.astype(np.float64).std(axes), rtol=1e-12)
    else:
        assert std == (1.0,) * channels


def test_a_constant_channel_has_deviation_one():
    x = torch.full((3000, 2, 2, 2), 0.1)
    x[:, 1, 0] = 0.7
    mean, std = statistics_of(Data("x", x, torch.zeros(3000, dtype=torch.int64), 1, {}))
    assert std[0] == 1.0
    assert (mean[0], mean[1], std[1]) == pytest.approx((0.1, 0.4, 0.3), rel=1e-6)


def test_statistics_normalise():
    data = load_data("digits", split="train")
    before = data.inputs.clone()
    y = Normalize(*statistics_of(data))(data.inputs).double()
    assert (y.mean().item(), y.std(correction=0).item()) == pytest.approx((0, 1), abs=1e-6)
    assert torch.equal(data.inputs, before)


def test_the_standard_statistics():
    from brittle.data.load import FORMS

    assert set(MEAN_STD) == {form for form in FORMS.split(", ") if ":" not in form}
    for name, (mean, std) in MEAN_STD.items():
        assert len(mean) == len(std) == (1 if name in ("digits", "mnist") else 3)
        assert all(0 < s < 0.5 and 0 < m < 1 for m, s in zip(mean, std, strict=True))  # 0.5: the most in [0, 1]
    computed = statistics_of(load_data("digits", split="train"))
    assert tuple(tuple(round(v, 4) for v in values) for values in computed) == MEAN_STD["digits"]


# --- folders ------------------------------------------------------------------------------------------------


def write_folder(root: Path, *, per_class: int = 3, size: tuple[int, int] = (5, 4), mode: str = "RGB") -> Path:
    """Write images of (height, width) ``size``, each of one value, which grows from file to file by name."""
    value = 0
    for name in ("ant", "bee"):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            value += 10
            Image.new(mode, size[::-1], (value, 0, 255) if mode == "RGB" else value).save(root / name / f"{i}.png")
    return root


def test_folder_is_read_exactly(tmp_path):
    data = load_data(f"folder:{write_folder(tmp_path)}")
    assert data.inputs.shape == (6, 3, 5, 4)
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.classes == 2
    assert torch.equal(data.inputs[:, 0, 2, 3], torch.arange(10, 70, 10) / 255)
    assert (data.inputs[:, 1] == 0).all()
    assert (data.inputs[:, 2] == 1).all()
    assert data.budgets == {math.inf: 8 / 255, 2.0: 0.5}


def test_folder_agrees_with_torchvision(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    theirs = torchvision.datasets.ImageFolder(write_folder(tmp_path), torchvision.transforms.ToTensor())
    ours = load_data("folder:.", root=tmp_path)
    assert torch.equal(ours.inputs, torch.stack([x for x, _ in theirs]))
    assert ours.labels.tolist() == theirs.targets


def test_folder_greyscale_has_one_channel_and_mixes_widen(tmp_path):
    write_folder(tmp_path, mode="L")
    assert load_data(f"folder:{tmp_path}").inputs.shape == (6, 1, 5, 4)
    Image.new("RGB", (4, 5), (1, 2, 3)).save(tmp_path / "bee" / "9.png")
    mixed = load_data(f"folder:{tmp_path}").inputs
    assert mixed.shape == (7, 3, 5, 4)
    assert torch.equal(mixed[0, 0], mixed[0, 2])
    assert torch.equal(mixed[-1, :, 0, 0], torch.tensor([1, 2, 3]) / 255)


def test_folder_ignores_other_files_and_hidden_folders(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "README.txt").write_text("words")
    (tmp_path / "ant" / "notes.txt").write_text("words")
    (tmp_path / ".cache").mkdir()
    assert load_data(f"folder:{tmp_path}").labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_folder_limit_opens_nothing_else(tmp_path):
    write_folder(tmp_path, per_class=10)
    kept = load_data(f"folder:{tmp_path}", limit=4, seed=2)
    files = sorted(tmp_path.glob("*/*.png"))
    wanted = {round(float(v) * 255) for v in kept.inputs[:, 0, 0, 0]}
    for i, file in enumerate(files):
        if 10 * (i + 1) % 256 not in wanted:
            file.write_bytes(b"broken")
    again = load_data(f"folder:{tmp_path}", limit=4, seed=2)
    assert torch.equal(kept.inputs, again.inputs)
    assert len(again.labels) == 4
    with pytest.raises(InputError, match="expected an image; reading it failed"):
        load_data(f"folder:{tmp_path}")


def test_folder_sizes_must_agree_or_be_given(tmp_path):
    write_folder(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "bee" / "9.png")
    with pytest.raises(InputError, match=r"one size, or image_size; .*\(5, 4\).* and \(8, 8\) in .*9\.png"):
        load_data(f"folder:{tmp_path}")
    assert load_data(f"folder:{tmp_path}", image_size=(6, 7)).inputs.shape == (7, 3, 6, 7)


def test_folder_resize_is_bilinear(tmp_path):
    (tmp_path / "a").mkdir()
    Image.fromarray(np.array([[0, 200]], np.uint8)).save(tmp_path / "a" / "0.png")
    row = load_data(f"folder:{tmp_path}", image_size=(1, 4)).inputs.flatten() * 255
    assert torch.equal(row.round(), torch.tensor([0.0, 50.0, 150.0, 200.0]))


def test_folder_unreadable_image_is_named(tmp_path):
    path = write_folder(tmp_path) / "bee" / "1.png"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError, match=r"bee.1\.png: expected an image; reading it failed"):
        load_data(f"folder:{tmp_path}")


def test_folder_deep_images_are_refused(tmp_path):
    write_folder(tmp_path)
    Image.fromarray(np.zeros((5, 4), np.uint16)).save(tmp_path / "ant" / "deep.png")
    with pytest.raises(InputError, match=r"deep\.png: expected 8 bits per channel; got Pillow's mode I"):
        load_data(f"folder:{tmp_path}")


def test_folder_layout_is_checked(tmp_path):
    with pytest.raises(InputError, match="nowhere: expected a folder; got nothing there"):
        load_data(f"folder:{tmp_path / 'nowhere'}")
    with pytest.raises(InputError, match="got no subfolder"):
        load_data(f"folder:{tmp_path}")
    write_folder(tmp_path / "test")
    with pytest.raises(InputError, match=r"test: expected images .*did you mean folder:.*test\?"):
        load_data(f"folder:{tmp_path}")
    (tmp_path / "test" / "cat").mkdir()
    with pytest.raises(InputError, match=r"cat: expected images .*got none$"):
        load_data(f"folder:{tmp_path / 'test'}")


def test_folder_divided_into_splits(tmp_path):
    for held_out in ("test", "val"):
        root = tmp_path / held_out
        write_folder(root / "train", per_class=3)
        write_folder(root / held_out, per_class=2)
        for split, folder in (("train", "train"), ("test", held_out)):
            ours, direct = load_data(f"folder:{root}", split=split), load_data(f"folder:{root / folder}")
            assert torch.equal(ours.inputs, direct.inputs)
            assert torch.equal(ours.labels, direct.labels)
        assert len(load_data(f"folder:{root}", split="train").labels) == 6
    (root / "val" / "cat").mkdir()
    with pytest.raises(InputError, match=r"expected the same classes.*cat"):
        load_data(f"folder:{root}")


def test_folders_with_images_are_classes_whatever_their_names(tmp_path):
    for name in ("test", "train"):
        (tmp_path / name).mkdir()
        Image.new("L", (2, 2)).save(tmp_path / name / "0.png")
    for split in ("train", "test"):
        assert load_data(f"folder:{tmp_path}", split=split).labels.tolist() == [0, 1]


def test_images_beyond_half_of_the_memory_are_refused_before_they_are_read(tmp_path, monkeypatch):
    files = sorted(write_folder(tmp_path, per_class=10).glob("*/*.png"))
    contents = [file.read_bytes() for file in files]
    for file in files[1:]:
        file.write_bytes(b"broken")
    monkeypatch.setattr(folders, "machine_memory", lambda: 2 * 4 * 5 * 4 * 3 * 7)  # half holds seven images of float32
    with pytest.raises(InputError, match=r"20 images of .*\(3, 5, 4\), .* GB; give limit, at most \d+") as e:
        load_data(f"folder:{tmp_path}")
    assert str(tmp_path) in str(e.value)
    most = int(str(e.value).split()[-1])
    assert 1 <= most <= 7
    for file, content in zip(files, contents, strict=True):
        file.write_bytes(content)
    assert len(load_data(f"folder:{tmp_path}", limit=most).labels) == most
    with pytest.raises(InputError, match="give limit"):
        load_data(f"folder:{tmp_path}", limit=most + 1)
    monkeypatch.setattr(folders, "machine_memory", lambda: None)
    assert len(load_data(f"folder:{tmp_path}").labels) == 20


# --- npz ----------------------------------------------------------------------------------------------------


def write_npz(path: Path, **arrays: object) -> str:
    np.savez(path, **arrays)
    return f"npz:{path}"


@pytest.mark.parametrize(("x", "y"), [("x", "y"), ("inputs", "labels"), ("images", "labels"), ("x_test", "y_test")])
@pytest.mark.parametrize("kind", [np.uint8, np.float16, np.float32, ">f4", np.float64])
def test_npz_names_and_kinds(tmp_path, x, y, kind):
    values = np.arange(12).reshape(3, 4) * (1 if kind is np.uint8 else 1 / 16)
    data = load_data(write_npz(tmp_path / "a.npz", **{x: values.astype(kind), y: np.array([0, 2, 1], np.uint8)}))
    assert (data.inputs.dtype, data.labels.dtype, data.classes) == (torch.float32, torch.int64, 3)
    expected = torch.arange(12.0).reshape(3, 4) / (255 if kind is np.uint8 else 16)
    torch.testing.assert_close(data.inputs, expected)
    assert data.labels.tolist() == [0, 2, 1]


def test_npz_split_picks_the_arrays(tmp_path):
    arrays = {"x_train": np.zeros((4, 2)), "y_train": np.zeros(4, int), "x_test": np.ones((2, 2)), "y_test": [1, 1]}
    spec = write_npz(tmp_path / "a.npz", **arrays)
    assert load_data(spec, split="train").inputs.sum() == 0
    assert load_data(spec, split="test").inputs.sum() == 4


def test_npz_classes_may_be_stated(tmp_path):
    x, y = np.zeros((2, 1, 3, 3)), np.array([0, 1])
    assert load_data(write_npz(tmp_path / "a.npz", x=x, y=y, classes=7)).classes == 7
    assert load_data(write_npz(tmp_path / "a.npz", x=x, y=y), limit=1, seed=0).classes == 2
    with pytest.raises(InputError, match="below the number of classes, 1; got labels from 0 to 1"):
        load_data(write_npz(tmp_path / "a.npz", x=x, y=y, classes=1))
    with pytest.raises(InputError, match="expected one integer as classes"):
        load_data(write_npz(tmp_path / "a.npz", x=x, y=y, classes=np.array(["a", "b"])))


def test_npz_rounding_beyond_the_bounds_is_clipped(tmp_path):
    data = load_data(write_npz(tmp_path / "a.npz", x=np.array([[-5e-7, 1 + 5e-7]]), y=np.array([0])))
    assert data.inputs.tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.uint8), [0, 1], r"got \(2, 8, 8, 3\), whose last axis looks like the channels"),
        (np.zeros((2, 8, 8, 1)), [0, 1], "looks like the channels"),
        (np.zeros((2, 8, 8)), [0, 1], r"expected inputs \(N, D\) or \(N, C, H, W\)"),
        (np.zeros(2), [0, 1], r"expected inputs \(N, D\) or"),
        (np.zeros((3, 4)), [0, 1], r"with N = 2 labels; got \(3, 4\)"),
        (np.zeros((2, 4), np.int64), [0, 1], "uint8 or floating .* got int64"),
        (np.zeros((2, 4), bool), [0, 1], "got bool"),
        (np.zeros((2, 4), complex), [0, 1], "got complex128"),
        (np.zeros((2, 4)), [0.0, 1.0], r"expected integer labels .* got float64"),
        (np.zeros((2, 4)), [[0], [1]], r"expected integer labels .* shape \(2, 1\)"),
        (np.zeros((0, 4)), np.zeros(0, int), "N > 0"),
        (np.zeros((2, 0)), [0, 1], "at least one example"),
        (np.zeros((2, 4)), [-1, 1], "at least 0.* got labels from -1 to 1"),
        (np.array([[0, np.nan], [0, 0]]), [0, 1], "got 1 NaN or infinite ones of 4"),
        (np.array([[0, 1e300], [0, 0]]), [0, 1], "got 1 NaN or infinite ones of 4"),
        (np.array([[0, 1.01], [0, 0]]), [0, 1], r"expected values in \[0, 1\].* to 1\.01"),
        (np.array([["a"], ["b"]]), [0, 1], "uint8 or floating"),
    ],
)
def test_npz_contents_are_checked(tmp_path, x, y, message):
    with pytest.raises(InputError, match=message):
        load_data(write_npz(tmp_path / "a.npz", x=x, y=np.array(y)))


def test_npz_without_a_pair_lists_what_it_holds(tmp_path):
    with pytest.raises(InputError, match=r"one of the pairs x_test and y_test, x and y, .*; got x, labels"):
        load_data(write_npz(tmp_path / "a.npz", x=np.zeros((1, 1)), labels=np.zeros(1, int)))


def test_npz_hostile_pickle_is_not_run(tmp_path):
    trace = tmp_path / "trace"
    with pytest.raises(InputError, match="expected an npz file of plain arrays; reading it failed"):
        load_data(write_npz(tmp_path / "a.npz", x=np.array([Hostile(trace)], object), y=np.zeros(1, int)))
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Hostile(trace)))
    with pytest.raises(InputError, match="expected an npz file of plain arrays; reading it failed"):
        load_data(f"npz:{tmp_path / 'b.npz'}")
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 cut"])
def test_npz_broken(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.npz: expected an npz file of plain arrays"):
        load_data("npz:a.npz", root=tmp_path)


def test_npz_one_array_missing_folder_and_truncation(tmp_path):
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(InputError, match="expected an npz file of plain arrays; reading it failed"):
        load_data(f"npz:{tmp_path / 'one.npy'}")
    for path in (tmp_path / "none.npz", tmp_path):
        with pytest.raises(InputError, match="expected an npz file of plain arrays; got no file"):
            load_data(f"npz:{path}")
    write_npz(tmp_path / "a.npz", x=np.zeros((9, 99)), y=np.zeros(9, int))
    content = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="expected an npz file of plain arrays; reading it failed"):
        load_data(f"npz:{tmp_path / 'a.npz'}")


# --- check_batch --------------------------------------------------------------------------------------------

X, Y = torch.tensor([[0.0, 1.0], [0.5, 0.25]]), torch.tensor([0, 2])


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("labels", [torch.uint8, torch.int32, torch.int64])
def test_check_batch_accepts(kind, labels):
    check_batch(X.to(kind), Y.to(labels), classes=3)
    check_batch(X - 5e-7, Y)
    check_batch(4 * X - 2, Y, bounds=(-2, 2))


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (X.numpy(), Y, "x: expected a floating tensor .* got ndarray"),
        (X.long(), Y, r"x: expected a floating tensor .* torch\.int64"),
        (X.to(torch.complex64), Y, r"torch\.complex64"),
        (X, [0, 2], "y: expected an integer tensor .* got list"),
        (X, Y.float(), r"y: expected an integer tensor .* torch\.float32"),
        (X, Y > 0, r"torch\.bool"),
        (X, Y[:1], r"got x \(2, 2\) and y \(1,\)"),
        (X, Y[:, None], r"y \(2, 1\)"),
        (X[0, 0], Y[:1], r"got x \(\)"),
        (X[:0], Y[:0], "at least one example"),
        (X.clone().index_fill_(0, torch.tensor([0]), math.nan), Y, "got 2 NaN or infinite ones of 4"),
        (X / 0, Y, "NaN or infinite"),
        (X * 255, Y, r"expected values in \[0, 1\].*; got values from 0 to 255"),
        (X - 2e-6, Y, r"expected values in"),
        (X + 2e-6, Y, r"expected values in"),
        (X, Y - 1, "got labels from -1 to 1"),
        (X, Y + 1, "below the number of classes, 3; got labels from 1 to 3"),
    ],
)
def test_check_batch_refuses(x, y, message):
    with pytest.raises(InputError, match=message):
        check_batch(x, y, classes=3)


ODD = {
    "nested": lambda: torch.nested.nested_tensor([torch.rand(2), torch.rand(3)]),
    "sparse": lambda: X.to_sparse(),
    "without values": lambda: X.to("meta"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", ODD)
def test_tensors_without_values_in_their_places_are_refused(kind):
    for data in ((ODD[kind](), Y), [(ODD[kind](), Y)]):
        with pytest.raises(InputError, match=f"data: expected a dense tensor; got one that is {kind}"):
            list(batches_of(data, 2))
    with pytest.raises(InputError, match=f"x: expected a dense tensor; got one that is {kind}"):
        check_batch(ODD[kind](), Y)


def test_tensors_that_share_a_place_are_taken_as_they_are():
    check_batch(torch.tensor([0.5]).expand(2, 3), Y)
    with pytest.raises(InputError, match="x: expected a floating tensor"):
        check_batch(X.to(torch.float8_e4m3fn), Y)


def test_check_batch_bounds_matter():
    with pytest.raises(InputError, match=r"expected values in \[0, 0\.9\]"):
        check_batch(X, Y, bounds=(0, 0.9))
