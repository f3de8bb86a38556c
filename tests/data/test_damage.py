"""Files that lie: what they announce is neither believed nor waited for, and nothing of it reaches memory."""

import gzip
import io
import os
import pickle
import struct
import tracemalloc
import zipfile
import zlib
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat, savemat

from brittle import load_data
from brittle.data.readers.matlab import read_matrices
from brittle.data.readers.plain_pickle import plain_array, plain_dict
from brittle.errors import InputError

SMALL = 2**24


@pytest.fixture(autouse=True)
def little_memory():
    """Nothing in this file takes more than 16 MB, as Python and numpy count."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < SMALL, f"{peak / 1e6:.0f} MB"


# --- pickles --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"r\xff\xff\xff\x7f....",  # a memo of 2^31 places
        b"}r\xff\xff\xff\xff.",
        b"p99999999999\n.",
        b"B\xff\xff\xff\x7f.",  # 2 GB of bytes that are not there
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x96\xff\xff\xff\xff\x00\x00\x00\x00.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f}.",
        b"c_codecs\nencode\n(X\x02\x00\x00\x00abX\x03\x00\x00\x00hextR.",
    ],
)
def test_a_pickle_of_a_few_bytes_takes_no_more_than_it_holds(content):
    with suppress(InputError, ValueError, IndexError):
        assert plain_dict(content) == {}


def test_a_pickle_cannot_make_a_key_whose_hash_takes_for_ever():
    nested = b")" + b"q\x00h\x00\x86" * 200  # a pair of a pair of ..., 2^200 leaves
    with pytest.raises(InputError, match="expected names as keys; got tuple"):
        plain_dict(b"}" + nested + b"Ns.")


def test_lists_in_lists_and_long_texts_become_no_array():
    nested = [1] * 10
    for _ in range(30):
        nested = [nested] * 10
    assert plain_array(nested).dtype == object
    assert plain_array(["a" * 10**6] + [""] * 10**4).dtype == object


@pytest.mark.parametrize("protocol", range(5))
@pytest.mark.parametrize("order", "<>")
def test_plain_pickles_of_every_protocol_are_read_as_pickle_reads_them(protocol, order):
    array = np.asfortranarray(np.arange(6, dtype=f"{order}i2").reshape(2, 3))
    value = {"data": array, "labels": [1, -2, 300, 2**40], b"name": "ä", "more": [None, True, 1.5, (1,), (), {}]}
    read = plain_dict(pickle.dumps(value, protocol))
    assert np.array_equal(plain_array(read["data"]), array)
    assert plain_array(read["labels"]).tolist() == value["labels"]
    assert {key: read[key] for key in (b"name", "more")} == {key: value[key] for key in (b"name", "more")}


# --- MATLAB ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["u1", "i2", "u4", "i8", "f4", "f8"])
def test_matlab_files_are_read_as_scipy_reads_them(tmp_path, packed, kind):
    rng = np.random.default_rng(0)
    arrays = {
        "other": {"nested": [1, "text"]},
        "X": rng.integers(0, 100, (3, 4, 2, 5)).astype(kind),
        "text": "words",
        "y": rng.integers(1, 11, (5, 1)).astype(kind),
        "last": 1.0,
    }
    savemat(tmp_path / "a.mat", arrays, do_compression=packed)
    theirs = loadmat(tmp_path / "a.mat")
    for ours, name in zip(read_matrices(tmp_path / "a.mat", ("X", "y")), "Xy", strict=True):
        assert ours.dtype == theirs[name].dtype
        assert np.array_equal(ours, theirs[name])


def element(kind: int, content: bytes) -> bytes:
    return struct.pack("<2I", kind, len(content)) + content + b"\0" * (-len(content) % 8)


def matrix(name: bytes, shape: tuple[int, ...], values: bytes, flags: int = 9) -> bytes:
    head = element(6, struct.pack("<2I", flags, 0)) + element(5, struct.pack(f"<{len(shape)}i", *shape))
    return element(14, head + element(1, name) + element(2, values))


def packed(content: bytes) -> bytes:
    content = zlib.compress(content)
    return struct.pack("<2I", 15, len(content)) + content


HEADER = b" " * 124 + b"\0\1IM"
LABELS = matrix(b"y", (1, 1), b"\1")
IMAGES = matrix(b"X", (32, 32, 3, 1), bytes(3072))


def test_these_matlab_files_are_read_where_they_are_whole(tmp_path):
    (tmp_path / "test_32x32.mat").write_bytes(HEADER + LABELS + packed(IMAGES))
    assert load_data("svhn", root=tmp_path).inputs.shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    "content",
    [
        HEADER + LABELS + matrix(b"X", (32, 32, 3, 2**20), b"\0"),
        HEADER + LABELS + packed(matrix(b"X", (32, 32, 3, 2**20), b"\0")),
        HEADER + LABELS + matrix(b"X", (2**30, 2**30, 2**30, 2**30), b""),
        HEADER + LABELS + matrix(b"X", (32, 32, 3, -1), bytes(3072)),
        HEADER + LABELS + matrix(b"X", (), bytes(1)),
        HEADER + LABELS + matrix(b"X", (32, 32, 3, 1), bytes(3072), flags=9 | 0x800),
        HEADER + LABELS + matrix(b"X", (32, 32, 3, 1), bytes(3072), flags=1),
        HEADER + LABELS + packed(packed(IMAGES)),
        HEADER + LABELS + packed(IMAGES)[:-1],
        HEADER + LABELS + packed(IMAGES[:-9]),
        HEADER + LABELS + struct.pack("<2I", 14, 2**32 - 1),
        HEADER + LABELS + struct.pack("<2I", 14, 0) * 100,
        HEADER + LABELS + b"\0" * 64,
        HEADER + LABELS + b"\0" * 7,
        HEADER.replace(b"\0\1", b"\0\2") + LABELS + IMAGES,
        HEADER,
        HEADER[:90],
    ],
)
def test_a_matlab_file_that_lies_is_refused(tmp_path, content):
    (tmp_path / "test_32x32.mat").write_bytes(content)
    with pytest.raises(InputError, match="expected a MATLAB file with X and y; reading it failed"):
        load_data("svhn", root=tmp_path)


# --- bombs ----------------------------------------------------------------------------------------------------


def zeros(n: int) -> bytes:
    """So many zeros, packed to a thousandth, without ever having them."""
    pack = zlib.compressobj(9, wbits=31)
    return b"".join(pack.compress(bytes(2**16)) for _ in range(n // 2**16)) + pack.flush()


def test_a_gz_is_unpacked_no_further_than_it_announces(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    head = gzip.compress(bytes([0, 0, 8, 3]) + struct.pack(">3I", 1, 28, 28))
    (raw / "t10k-images-idx3-ubyte.gz").write_bytes(head + zeros(2**26))  # gzip files may follow one another
    with pytest.raises(InputError, match="expected the 784 values it announces; got more"):
        load_data("mnist", root=tmp_path)
    (raw / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes([0, 0, 8, 3]) + b"\xff" * 12))
    with pytest.raises(InputError, match="at most 1032 bytes of each packed one"):
        load_data("mnist", root=tmp_path)


def test_an_npz_is_unpacked_no_further_than_it_announces(tmp_path):
    path = tmp_path / "a.npz"
    array = io.BytesIO()
    np.save(array, np.zeros((1, 4), np.uint8))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("y.npy", array.getvalue())
        with archive.open("x.npy", "w") as file:
            file.write(array.getvalue())
            for _ in range(2**5):
                file.write(bytes(2**20))
    with pytest.raises(InputError, match=r"expected x to hold the \(1, 4\) of uint8 that it announces"):
        load_data(f"npz:{path}")
    # The archive's own word for the size made small: what is unpacked is still no more than the array's.
    content = path.read_bytes()
    whole = struct.pack("<I", len(array.getvalue()) + 2**25)
    path.write_bytes(content.replace(whole, struct.pack("<I", len(array.getvalue()))))
    with pytest.raises(InputError):
        load_data(f"npz:{path}")


def npy(shape: str, kind: str = "|u1", content: bytes = b"", version: bytes = b"\1\0") -> bytes:
    head = f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY" + version + struct.pack("<H" if version == b"\1\0" else "<I", len(head)) + head + content


@pytest.mark.parametrize(
    "x",
    [
        npy("(4294967296, 4294967296)", "'|u1'", bytes(4)),
        npy("(18446744073709551616, 0)", "'|u1'"),
        npy("(-1, 4)", "'|u1'", bytes(4)),
        npy("(1, -4)", "'|u1'", bytes(4)),
        npy("(1, True)", "'|u1'", bytes(1)),
        npy("(1, 4)", "'F4'", bytes(16)),
        npy("(1, 4)", "'|O'", bytes(32)),
        npy("(1, 1)", "('<f4', (4,))", bytes(16)),
        npy("(1, 4)", "[('a', '|u1')]", bytes(4)),
        npy("(1, 4)", "'|S0'"),
        npy("(1, 4)", "'|V1'", bytes(4)),
        npy("(1, 4)", "'|u1'", bytes(4), version=b"\2\0"),
        npy("(" * 400 + ")" * 400, "'|u1'", bytes(4)),
        b"not an array",
        b"",
    ],
)
def test_an_npy_header_that_lies_is_refused(tmp_path, x):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", x)
        archive.writestr("y.npy", npy("(1,)", "'|u1'", b"\0"))
    with pytest.raises(InputError, match=r"a\.npz: expected"):
        load_data(f"npz:{tmp_path / 'a.npz'}")


def test_members_that_are_no_arrays_are_none(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x", b"1234")
        archive.writestr("y", b"1")
    with pytest.raises(InputError, match=r"expected one of the pairs .*; got no array"):
        load_data(f"npz:{tmp_path / 'a.npz'}")


def test_arrays_in_column_order_give_inputs_in_row_order(tmp_path):
    x = np.random.default_rng(0).random((3, 2, 4, 5)).astype(np.float32)
    np.savez(tmp_path / "a.npz", x=np.asfortranarray(x), y=[0, 1, 2])
    inputs = load_data(f"npz:{tmp_path / 'a.npz'}").inputs
    assert inputs.is_contiguous()
    assert np.array_equal(inputs.numpy(), x)


def test_a_label_far_beyond_all_others_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 4)), y=[0, 2**40])
    with pytest.raises(InputError, match="at most 1048576 classes"):
        load_data(f"npz:{tmp_path / 'a.npz'}")


# --- images ---------------------------------------------------------------------------------------------------


def test_an_image_of_more_pixels_than_memory_is_refused_before_it_is_unpacked(tmp_path):
    (tmp_path / "a").mkdir()
    content = io.BytesIO()
    Image.new("L", (1, 1)).save(content, "PNG")
    head = b"IHDR" + struct.pack(">2I", 100_000, 100_000) + bytes([8, 0, 0, 0, 0])
    content = content.getvalue()
    (tmp_path / "a" / "0.png").write_bytes(content[:12] + head + struct.pack(">I", zlib.crc32(head)) + content[33:])
    with pytest.raises(InputError, match=r"0\.png: expected"):
        load_data(f"folder:{tmp_path}")


def test_an_image_is_not_stretched_beyond_memory(tmp_path):
    (tmp_path / "val" / "n01440764").mkdir(parents=True)
    Image.new("L", (1, 60_000)).save(tmp_path / "val" / "n01440764" / "0.png")
    with pytest.raises(InputError, match=r"resized to be cropped: expected at most \d+ pixels; got 256 x"):
        load_data("imagenet", root=tmp_path)
    with pytest.raises(InputError, match="image_size: expected at most"):
        load_data(f"folder:{tmp_path / 'val'}", image_size=(10**6, 10**6))


def test_a_file_of_another_format_is_not_opened_by_the_name_of_an_image(tmp_path):
    """PostScript, say, would be handed to a program."""
    (tmp_path / "a").mkdir()
    content = io.BytesIO()
    Image.new("L", (4, 4)).save(content, "EPS")
    (tmp_path / "a" / "0.png").write_bytes(content.getvalue())
    with pytest.raises(InputError, match=r"0\.png: expected an image; reading it failed: cannot identify"):
        load_data(f"folder:{tmp_path}")


# --- what is no file ------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
@pytest.mark.parametrize("spec", ["mnist", "cifar10", "cifar100", "svhn", "npz:a.npz"])
def test_a_pipe_is_not_waited_for(tmp_path, spec):
    paths = {
        "mnist": "MNIST/raw/t10k-images-idx3-ubyte", "cifar10": "cifar-10-batches-bin/test_batch.bin",
        "cifar100": "cifar-100-python/test", "svhn": "test_32x32.mat", "npz:a.npz": "a.npz",
    }  # fmt: skip
    path = tmp_path / paths[spec]
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    with pytest.raises(InputError, match="got no file but a pipe, a socket or a device"):
        load_data(spec, root=tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_among_images_is_passed_over(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("L", (2, 2)).save(tmp_path / "a" / "0.png")
    os.mkfifo(tmp_path / "a" / "1.png")
    assert len(load_data(f"folder:{tmp_path}").labels) == 1
