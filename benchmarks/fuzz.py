"""Every door by which files and words come in, under damage and nonsense: what is not read is refused in one sentence.

    python benchmarks/fuzz.py --inputs 20000 --seed 0

Valid files are damaged (bits, lengths, cuts, splices), also inside what packs them (gzip, zip, MATLAB's zlib), and
made anew of nonsense that fits the form. Counted for every door are, beside what was read and what was refused by an
``InputError``: crashes (the process died by a signal), hangs (above 5 seconds of processor time, or 60 of waiting),
allocations (more than 2 GB beyond what the process had, which its limit lets fail) and tracebacks (any other
exception). Prints one line a door, and the number of every input that did one of these, by which ``--door NAME --only
NUMBER`` shows it again.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gzip
import io
import itertools
import json
import mmap
import os
import pickle
import pickletools
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import typer
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from brittle import load_data
from brittle.cli import commands
from brittle.compression import save_compressed
from brittle.errors import InputError
from brittle.models.build import fcn
from brittle.models.checkpoints import fill, read_state
from brittle.reporting import comparison as side_by_side
from brittle.reporting import page
from brittle.results import Audit, ComparedNetwork, Comparison, Latency, NetworkSize
from brittle.results.comparison import paired_verdicts
from brittle.training import load_run
from helpers import audits
from helpers.compressed import small_fcn

SECONDS, WAITING, BYTES = 5, 60, 2**31
"""Of an input: processor time, time on the clock of a machine that does other things as well, memory."""
OUTCOMES = ("read", "refused", "crashes", "hangs", "allocations", "tracebacks")
NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    8,
    255,
    256,
    2**15,
    2**16 - 1,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**63 - 1,
    2**64 - 1,
)
Files = dict[str, bytes]


@dataclass(frozen=True)
class Door:
    """One way in.

    Attributes:
        valid: Files that are read, by name.
        make: From a source of randomness and the valid files, the input's.
        enter: Read the files in a folder; raises InputError where they are refused.
    """

    valid: Files
    make: Callable[[random.Random, Files], Files]
    enter: Callable[[Path], object]


# --- damage -----------------------------------------------------------------------------------------------------


def damaged(rng: random.Random, content: bytes) -> bytes:
    """The content with one to three things wrong with it."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        content = bytes(rng.choice(DAMAGE)(rng, bytearray(content)))
    return content


def flip_bits(rng: random.Random, content: bytearray) -> bytearray:
    """One bit in each of a few bytes."""
    for _ in range(rng.choice((1, 1, 2, 8))):
        if content:
            content[near_start(rng, content)] ^= 1 << rng.randrange(8)
    return content


def set_number(rng: random.Random, content: bytearray) -> bytearray:
    """A field of 1, 2, 4 or 8 bytes with a number that lengths and shapes stumble over."""
    width = rng.choice((1, 2, 4, 8))
    place = near_start(rng, content)
    place -= place % width if rng.random() < 0.7 else 0
    number = rng.choice((*NUMBERS, len(content), len(content) - place, rng.getrandbits(64))) % 2 ** (8 * width)
    content[place : place + width] = number.to_bytes(width, rng.choice(("little", "big")))
    return content


def cut(rng: random.Random, content: bytearray) -> bytearray:
    """The beginning alone, of any length."""
    return content[: rng.randrange(len(content) + 1)]


def leave_out(rng: random.Random, content: bytearray) -> bytearray:
    """A few bytes are missing; what follows moves up."""
    start = near_start(rng, content)
    del content[start : start + rng.choice((1, 2, 4, 8, 64))]
    return content


def put_in(rng: random.Random, content: bytearray) -> bytearray:
    """A few bytes more: nonsense, or what stands there already."""
    start = near_start(rng, content)
    content[start:start] = rng.choice((rng.randbytes(rng.choice((1, 2, 4, 8, 64))), content[start : start + 40]))
    return content


def splice(rng: random.Random, content: bytearray) -> bytearray:
    """A part of the file over another part."""
    start, source, size = near_start(rng, content), near_start(rng, content), rng.randrange(1, 65)
    content[start : start + size] = content[source : source + size]
    return content


def near_start(rng: random.Random, content: bytearray) -> int:
    """A place, mostly where heads are: at the start or the end."""
    size = max(1, len(content))
    kind = rng.random()
    return (
        rng.randrange(min(size, 160))
        if kind < 0.6
        else size - 1 - rng.randrange(min(size, 160))
        if kind < 0.8
        else (rng.randrange(size))
    )


DAMAGE = (flip_bits, flip_bits, set_number, set_number, cut, leave_out, put_in, splice)


def damage_one(rng: random.Random, files: Files) -> Files:
    """One of the files damaged, another one left out or in its place now and then."""
    name = rng.choice(sorted(files))
    if rng.random() < 0.01:
        return {other: content for other, content in files.items() if other != name}
    if rng.random() < 0.01:
        return files | {name: files[rng.choice(sorted(files))]}
    return files | {name: damaged(rng, files[name])}


def within(unpack: Callable[[bytes], bytes], pack: Callable[[random.Random, bytes], bytes]) -> Callable[..., Files]:
    """Damage inside a packing half of the time, so that its checks do not hide what is behind them."""

    def make(rng: random.Random, files: Files) -> Files:
        if rng.random() < 0.4:
            return damage_one(rng, files)
        name = rng.choice(sorted(files))
        return files | {name: pack(rng, damaged(rng, unpack(files[name])))}

    return make


# --- the doors of data ------------------------------------------------------------------------------------------


def cifar_binary() -> Door:
    """Two samples, each a label and its pixels."""
    valid = {"cifar-10-batches-bin/test_batch.bin": bytes([1]) + bytes(3072) + bytes([9]) + bytes(range(256)) * 12}
    return Door(valid, damage_one, lambda root: load_data("cifar10", root=root))


def cifar_pickle() -> Door:
    """Of all protocols that data sets came in; nonsense is made of pickle's own operations."""
    content = {"data": np.arange(3072, dtype=np.uint8)[None] % 255, "fine_labels": [7], b"filenames": ["a.png"]}
    pickles = [pickle.dumps(content, protocol) for protocol in range(5)]
    operations = [operation.code.encode("latin-1") for operation in pickletools.opcodes]

    def make(rng: random.Random, files: Files) -> Files:
        if rng.random() < 0.7:
            return {"cifar-100-python/test": damaged(rng, rng.choice(pickles))}
        parts = [
            rng.choice(operations) + rng.choice((b"", b"", number(rng), text(rng))) for _ in range(rng.randrange(30))
        ]
        return {"cifar-100-python/test": b"\x80\x02}" + b"".join(parts) + b"."}

    def number(rng: random.Random) -> bytes:
        width = rng.choice((1, 4, 8))
        return (rng.choice(NUMBERS) % 2 ** (8 * width)).to_bytes(width, "little")

    def text(rng: random.Random) -> bytes:
        return rng.choice(
            (b"numpy\nndarray\n", b"numpy\ndtype\n", b"_codecs\nencode\n", b"os\nsystem\n", b"12\n", b"\x04data")
        )

    return Door({"cifar-100-python/test": pickles[2]}, make, lambda root: load_data("cifar100", root=root))


def mnist(packed: bool) -> Door:
    """Images and labels in the IDX format, plain or gzipped."""
    end = ".gz" if packed else ""
    images = bytes([0, 0, 8, 3]) + struct.pack(">3I", 2, 28, 28) + bytes(range(98)) * 16
    labels = bytes([0, 0, 8, 1]) + struct.pack(">I", 2) + b"\1\7"
    valid = {"images-idx3": images, "labels-idx1": labels}
    files = {f"MNIST/raw/t10k-{name}-ubyte{end}": gzip.compress(c) if packed else c for name, c in valid.items()}
    inside = within(gzip.decompress, lambda rng, content: gzip.compress(content, 1, mtime=0))
    return Door(files, inside if packed else damage_one, lambda root: load_data("mnist", root=root))


def npz() -> Door:
    """Members damaged, packed or not, and heads that announce anything."""
    arrays = {
        "x": np.linspace(0, 1, 24, dtype=np.float32).reshape(2, 12),
        "y": np.array([0, 1]),
        "classes": np.array(3),
    }
    members = {}
    for name, array in arrays.items():
        members[f"{name}.npy"] = io.BytesIO()
        np.save(members[f"{name}.npy"], array)
    members = {name: content.getvalue() for name, content in members.items()}
    kinds = (
        "<f4",
        "|u1",
        ">f8",
        "F4",
        "|O",
        "<U4294967295",
        "|S0",
        "<M8[s]",
        "|V8",
        "f16",
        "<i8",
        "b1",
        "(3,)f4",
        "?",
        "O,O",
    )
    sizes = (-1, 0, 1, 2, 3, 12, True, 2**31, 2**32, 2**62, 2**64, None)

    def head(rng: random.Random) -> bytes:
        shape = tuple(rng.choice(sizes) for _ in range(rng.randrange(6)))
        text = {"descr": rng.choice(kinds), "fortran_order": rng.choice((True, False, 2)), "shape": shape}
        words = repr(text).encode() + b"\n"
        return b"\x93NUMPY" + bytes([rng.choice((1, 1, 2, 3)), 0]) + struct.pack("<H", len(words)) + words + bytes(96)

    def make(rng: random.Random, files: Files) -> Files:
        if rng.random() < 0.3:
            return damage_one(rng, files)
        name = rng.choice(sorted(members))
        content = head(rng) if rng.random() < 0.4 else damaged(rng, members[name])
        return {"a.npz": zipped(members | {name: content}, rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))}

    return Door({"a.npz": zipped(members)}, make, lambda root: load_data("npz:a.npz", root=root))


def zipped(members: Files, how: int = zipfile.ZIP_STORED) -> bytes:
    """The bytes of an archive with these members."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", how) as archive:
        for name, member in members.items():
            archive.writestr(zipfile.ZipInfo(name), member, how)
    return content.getvalue()


def svhn() -> Door:
    """Plain and packed arrays, which are damaged inside their packing too."""

    def element(kind: int, content: bytes) -> bytes:
        return struct.pack("<2I", kind, len(content)) + content + bytes(-len(content) % 8)

    def matrix(name: bytes, shape: tuple[int, ...], kind: int, values: bytes, of: int) -> bytes:
        head = element(6, struct.pack("<2I", of, 0)) + element(5, struct.pack(f"<{len(shape)}i", *shape))
        return element(14, head + element(1, name) + element(kind, values))

    def packed(content: bytes) -> bytes:
        content = zlib.compress(content, 1)
        return struct.pack("<2I", 15, len(content)) + content

    arrays = (
        matrix(b"X", (32, 32, 3, 1), 2, bytes(range(256)) * 12, 9),
        matrix(b"y", (1, 1), 9, struct.pack("<d", 3.0), 6),
    )
    header = b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM"

    def make(rng: random.Random, files: Files) -> Files:
        if rng.random() < 0.2:
            return damage_one(rng, files)
        parts = [damaged(rng, array) if rng.random() < 0.6 else array for array in arrays]
        parts = [packed(part) if rng.random() < 0.6 else part for part in parts]
        content = header + b"".join(rng.sample(parts, 2))
        return {"test_32x32.mat": content if rng.random() < 0.7 else damaged(rng, content)}

    valid = {"test_32x32.mat": header + packed(arrays[0]) + arrays[1]}
    return Door(valid, make, lambda root: load_data("svhn", root=root))


def folder() -> Door:
    """One image of every format; PNG's check sums are put right again."""
    files = {}
    for place, (kind, mode) in enumerate((
        ("png", "RGB"), ("png", "P"), ("png", "LA"), ("jpg", "RGB"), ("bmp", "L"), ("ppm", "RGB"), ("tif", "RGB"),
        ("tiff", "RGBA"), ("webp", "RGB"),
    )):  # fmt: skip
        content = io.BytesIO()
        pixels = Image.fromarray((np.arange(6 * 5 * 3) % 256).astype(np.uint8).reshape(6, 5, 3)).convert(mode)
        options = {"compression": "tiff_deflate"} if kind == "tiff" else {}
        pixels.save(content, {"jpg": "JPEG", "tif": "TIFF"}.get(kind, kind.upper()), **options)
        files[f"{'ab'[place % 2]}/{place}.{kind}"] = content.getvalue()

    def make(rng: random.Random, files: Files) -> Files:
        name = rng.choice(sorted(files))
        content = damaged(rng, files[name])
        return {"a/0.bmp": files["a/4.bmp"], name: checked_png(content) if rng.random() < 0.7 else content}

    size = {"image_size": (4, 4)}
    return Door(files, make, lambda root: load_data("folder:.", root=root, **size))


def checked_png(content: bytes) -> bytes:
    """A PNG whose chunks have right check sums."""
    if content[:8] != b"\x89PNG\r\n\x1a\n":
        return content
    out, place = content[:8], 8
    while place + 12 <= len(content):
        (size,) = struct.unpack_from(">I", content, place)
        chunk = content[place + 4 : place + 8 + size]
        out += content[place : place + 4] + chunk + struct.pack(">I", zlib.crc32(chunk))
        place += 12 + size
    return out + content[place:]


# --- the doors of weights ---------------------------------------------------------------------------------------


def network() -> torch.nn.Module:
    """The network that every file of weights is meant for."""
    return fcn(4, 2, 1, 2)


def enter_weights(name: str) -> Callable[[Path], object]:
    """What reads a file of weights into the network."""
    return lambda root: fill(network(), read_state(root / name))


def safetensors() -> Door:
    """A head of JSON before the values: bytes are damaged, or the head says something strange."""
    from safetensors.torch import save

    content = save(network().state_dict())
    (size,) = struct.unpack_from("<Q", content)
    head, values = json.loads(content[8 : 8 + size]), content[8 + size :]

    def make(rng: random.Random, files: Files) -> Files:
        if rng.random() < 0.5:
            return damage_one(rng, files)
        words = json.dumps(strange(rng, head)).encode()
        return {"net.safetensors": struct.pack("<Q", len(words)) + words + values}

    return Door({"net.safetensors": content}, make, enter_weights("net.safetensors"))


def checkpoint() -> Door:
    """Files of ``torch.save`` in today's form and the one before, whose pickle is damaged inside the archive too."""
    forms = []
    for today in (True, False):
        content = io.BytesIO()
        torch.save({"state_dict": network().state_dict(), "epoch": 3}, content, _use_new_zipfile_serialization=today)
        forms.append(content.getvalue())
    with zipfile.ZipFile(io.BytesIO(forms[0])) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}

    def make(rng: random.Random, files: Files) -> Files:
        if rng.random() < 0.4:
            return {"net.pt": damaged(rng, rng.choice(forms))}
        name = (
            next(name for name in members if name.endswith("data.pkl"))
            if rng.random() < 0.8
            else rng.choice([*members])
        )
        how = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
        return {"net.pt": zipped(members | {name: damaged(rng, members[name])}, how)}

    return Door({"net.pt": forms[0]}, make, enter_weights("net.pt"))


def compressed() -> Door:
    """A compressed network's recipe with strange values, and its weights damaged."""
    with tempfile.TemporaryDirectory() as scratch:
        save_compressed(scratch, *small_fcn())
        valid = {f"out/{path.name}": path.read_bytes() for path in Path(scratch).iterdir()}
    recipe = json.loads(valid["out/recipe.json"])

    def make(rng: random.Random, files: Files) -> Files:
        if rng.random() < 0.2:
            return damage_one(rng, files)
        part = rng.choice(("sizes", "ranks", "arguments", None))  # where most can go wrong, or anywhere
        changed = strange(rng, recipe) if part is None else recipe | {part: strange(rng, recipe[part])}
        return files | {"out/recipe.json": json.dumps(changed).encode()}

    return Door(valid, make, lambda root: load_run(root / "out"))


# --- the doors of words -----------------------------------------------------------------------------------------

STRANGE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 0.5, -0.5, 1e308, -1e308, 1e-320, 2**31, 2**63, 2**70, 10**400, "", "inf",
    "-inf", "nan", "1e999", "0x10", "robust", "l2", "\x1b[2J", "\u202e", "\ud800", "a" * 3000, "<script>", "$\\frac$",
    "$", [], {}, [[]], [1], [0, 0], ["inf"], [1, "a"], {"a": 1}, [None], [1.0, 2.0, 3.0], [[1, 2]],
)  # fmt: skip
"""What stands in place of a value."""


def strange(rng: random.Random, document: Any) -> Any:
    """A copy of a JSON document with one to three values, entries or lengths of lists changed."""
    document = json.loads(json.dumps(document))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = [(parent, key) for parent, key in places_in(document)]
        if not places:
            break
        parent, key = rng.choice(places)
        value = parent[key]
        match rng.randrange(6):
            case 0 if isinstance(parent, list) or rng.random() < 0.5:
                del parent[key]
            case 1 if isinstance(value, list):
                parent[key] = rng.choice((value + value, value[:-1], value[::-1], value * 3))
            case 2:
                parent[key] = parent[rng.choice([*parent])] if isinstance(parent, dict) else rng.choice(parent)
            case 3 if isinstance(value, int | float) and abs(value) < 1e300:
                parent[key] = rng.choice((-value, value + 1, value * 1e6, value - 1, value / 3, 2 * value))
            case _:
                parent[key] = rng.choice(STRANGE)
        document = json.loads(json.dumps(document))  # no part twice
    return document


def places_in(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a JSON value, as what holds it and the key or index there."""
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield value, key
        yield from places_in(part)


def audit(drawn: bool) -> Door:
    """Documents with strange values, which are also drawn as a report where they are read."""
    full = audits.full()
    documents = [
        json.loads(replace(full, layers=(audits.layer("fc", 4, 6),)).to_json()),
        json.loads(replace(full, layers=(), norms=full.norms[::-1]).to_json()),
        json.loads(replace(audits.data_free(), layers=(audits.layer("fc", 3, 2, infinite=True),)).to_json()),
    ]
    words = json.dumps(documents[0]).encode()

    def make(rng: random.Random, files: Files) -> Files:
        if rng.random() < (0.02 if drawn else 0.2):
            return {"audit.json": damaged(rng, words)}
        return {"audit.json": json.dumps(strange(rng, rng.choice(documents))).encode()}

    templates = functools.cache(page.environment)
    drawings = itertools.count()

    def enter(root: Path) -> None:
        found = Audit.load(root / "audit.json")
        assert Audit.from_json(found.to_json()) == found
        if drawn:  # figures are laid out for one input in fifty: that takes most of the time
            svg = page.svg if next(drawings) % 50 == 0 else lambda figure: ""
            with mock.patch.object(page, "environment", templates), mock.patch.object(page, "svg", svg):
                page.report_html(found)

    return Door({"audit.json": words}, make, enter)


def comparison() -> Door:
    """Comparisons with strange values; one in ten of those that are read becomes a page, figures not laid out."""
    first, other = (replace(audits.with_verdicts(seed), layers=(audits.layer("fc", 4, 6),)) for seed in (0, 1))
    bare = replace(audits.data_free(), layers=(audits.layer("fc", 3, 2),))
    size, time = NetworkSize(10, 20, 40), Latency("a", 1, 0.5, 0.6, 30, "cpu", 1)
    pair = ComparedNetwork("b", other, size, paired_verdicts(first.norms, other.norms))
    whole = Comparison((ComparedNetwork("a", first, size), pair), (time, replace(time, network="b")), about=("Once.",))
    documents = [
        json.loads(whole.to_json()),
        json.loads(Comparison((ComparedNetwork("a", bare), ComparedNetwork("b", bare))).to_json()),
    ]
    words = json.dumps(documents[0]).encode()

    def make(rng: random.Random, files: Files) -> Files:
        if rng.random() < 0.1:
            return {"comparison.json": damaged(rng, words)}
        return {"comparison.json": json.dumps(strange(rng, rng.choice(documents))).encode()}

    templates, entered = functools.cache(page.environment), itertools.count()

    def enter(root: Path) -> None:
        found = Comparison.load(root / "comparison.json")
        assert Comparison.from_json(found.to_json()) == found
        if next(entered) % 10 == 0:
            with (
                mock.patch.object(side_by_side, "environment", templates),
                mock.patch.object(page, "svg", return_value=""),
            ):
                side_by_side.comparison_html(found)

    return Door({"comparison.json": words}, make, enter)


WORDS = (
    "", " ", "0", "1", "-1", "2", "3.5", "nan", "inf", "-inf", "1e999", "1e-400", "9" * 30, "9" * 5000, "٣", "²",
    "True", "null", "[]", "a=b", "inf=0.1", "2=0.5", "2=", "=", "=1", "inf=nan", "inf,2", "2,2", ",", "1,2,3", "cpu",
    "cuda", "cuda:99", "cpu,cpu", "meta", "fcn", "vgg11", "resnet18", "digits", "mnist", "npz:", "npz:data.npz",
    "npz:nothing.npz", "folder:.", "folder:", "net.safetensors", "run", "pipe", "data.npz", "cosine", "step", "fast",
    "standard", "thorough", "pgd", "nuclear_norm=0.1", "l1=-1", "l1=nan", "orthonormal=1", "frobenius=1", "width=3",
    "width=0", "width=-1", "width=1e9", "width=100000000", "depth=100000000", "width=null", "classes=2",
    "in_features=[]", "\x1b[2J", "\ud800", "a\0b", "é", "--", "-", "-o", "--help", "x" * 300, "[red]", "{}", "{0}",
    "%s", "$HOME", "~", ".", "..",
)  # fmt: skip
"""What stands in place of a value on the command line."""
COMMANDS = (
    "audit net.safetensors --arch fcn --data npz:data.npz --limit 2 --p inf,2 --eps inf=0.1 --steps 2 -o out",
    "audit net.safetensors --arch fcn --arch-arg width=3 --mean 0.5 --std 0.5 --input-shape 4 --seed 1 -o out --json",
    "audit run --data npz:data.npz --preset fast --restarts 1 --batch-size 4 --device cpu --threads 1 -o out -q",
    "attack net.safetensors --arch fcn --data npz:data.npz --preset standard --certify auto -o out --overwrite",
    "compare net.safetensors net.safetensors --arch fcn --data npz:data.npz --name a --name b --seed 2 -o out",
    "compare net.safetensors audit.json --arch fcn --input-shape 4 --fail-under-robust 0.5 -o out --json",
    "train --data npz:data.npz --arch fcn --width 3 --depth 1 --epochs 1 --lr 0.1 --optimizer sgd -o new",
    "train --data npz:data.npz --penalty l1=0.1 --constraint spectral_cap=1 --adversarial inf=0.1 --rank 2",
    "train --data npz:data.npz --fine-tune net.safetensors --schedule step --patience 2 --processes 1 -o new",
    "train --data npz:data.npz --momentum 0.9 --weight-decay 0 --crop 0 --layers 1,2 --refresh 2 --validation 0.2",
    "train --data npz:data.npz --measure-every 0 --precision 32 --frobenius initial --flip --batch-size 3",
    "report audit.json -o report.html",
    "demo --seed 1 -o demo",
)


def options() -> Door:
    """Command lines with words exchanged, doubled and left out; what they would start is left out."""
    from safetensors.torch import save

    table = io.BytesIO()
    np.savez(table, x=np.eye(4, dtype=np.float32), y=[0, 1, 0, 1])
    files = {
        "net.safetensors": save(fcn(4, 3, 1, 2).state_dict()), "data.npz": table.getvalue(),
        "audit.json": replace(audits.data_free(), layers=()).to_json().encode(),
    }  # fmt: skip

    def make(rng: random.Random, files: Files) -> Files:
        words = rng.choice(COMMANDS).split()
        for _ in range(rng.choice((1, 1, 2, 3))):
            place = rng.randrange(1 if rng.random() < 0.97 else 0, len(words))
            match rng.randrange(6):
                case 0:
                    words[place : place + 1] = []
                case 1:
                    words[place:place] = [rng.choice(rng.choice(COMMANDS).split()[1:])]
                case 2:
                    words[place:place] = words[place : place + 2]
                case _:
                    places = [at for at, word in enumerate(words) if at and not word.startswith("-")] or [place]
                    words[rng.choice(places)] = rng.choice(WORDS)
            words = words or ["audit"]
        return files | {"words": "\n".join(words).encode("utf-8", "surrogatepass")}

    return Door(files | {"words": COMMANDS[0].replace(" ", "\n").encode()}, make, enter_words)


parser = functools.cache(typer.main.get_command)
"""Of the command line, made once: that takes most of an input's time."""


def enter_words(root: Path) -> None:
    """Read a command line as the program would; what it asks for is not begun."""
    words = (root / "words").read_bytes().decode("utf-8", "surrogatepass").split("\n")
    nothing = mock.Mock(side_effect=InputError("what was asked for would start here"))
    starts = (
        "brittle.auditing.audit", "brittle.auditing.compare", "brittle.evaluation.attack",
        "brittle.training.runs.run_job",
        "brittle.experiments.demo.run_demo", "brittle.data.downloads.download", "torch.set_num_threads",
    )  # fmt: skip
    written = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("typer.main.get_command", parser))
        for name in starts:
            stack.enter_context(mock.patch(name, nothing if "torch" not in name else mock.Mock()))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(written))
        code = commands.run(words)
    said = written.getvalue()
    if code == 0:
        return
    if code not in (1, 2) or said.count("\n") != 1 or not said[:-1].isprintable() or not said.startswith("brittle: "):
        raise AssertionError(f"exit code {code}: {said[:300]!r}")
    raise InputError(said)


DOORS: dict[str, Callable[[], Door]] = {
    "cifar-binary": cifar_binary,
    "cifar-pickle": cifar_pickle,
    "mnist": lambda: mnist(packed=False),
    "mnist-gz": lambda: mnist(packed=True),
    "npz": npz,
    "svhn": svhn,
    "folder": folder,
    "safetensors": safetensors,
    "checkpoint": checkpoint,
    "compressed": compressed,
    "audit": lambda: audit(drawn=False),
    "report": lambda: audit(drawn=True),
    "comparison": comparison,
    "options": options,
}


# --- what is done with them -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tally:
    """What became of a door's inputs: how many of each of ``OUTCOMES``, and the numbers of those that must not be."""

    counts: dict[str, int]
    bad: tuple[tuple[int, str, str], ...]
    seconds: float

    def line(self, name: str) -> str:
        counts = ", ".join(f"{self.counts[outcome]} {outcome}" for outcome in OUTCOMES)
        return f"{name}: {sum(self.counts.values())} inputs, {counts} ({self.seconds:.0f} s)"


def fuzz(name: str, inputs: int, seed: int, start: int = 0) -> Tally:
    """Send inputs through a door, in processes of its own: what ends one of them is counted, and the next goes on."""
    door, began = DOORS[name](), time.monotonic()
    counts, bad = dict.fromkeys(OUTCOMES, 0), []
    place = mmap.mmap(-1, 8)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as scratch:
        last = start + inputs
        while start < last:
            reader, writer = os.pipe()
            child = os.fork()
            if child == 0:
                os.close(reader)
                with contextlib.suppress(BaseException):
                    work(door, name, seed, range(start, last), Path(scratch), place, writer)
                    os._exit(0)
                os._exit(1)
            os.close(writer)
            with os.fdopen(reader) as lines:
                for line in lines:
                    number, outcome, what = json.loads(line)
                    if number is None:
                        for key, count in outcome.items():
                            counts[key] += count
                    else:
                        bad.append((number, outcome, what))
            _, status = os.waitpid(child, 0)
            start = last
            if os.WIFEXITED(status) and os.WEXITSTATUS(status):
                raise RuntimeError(f"{name}: input {struct.unpack('<q', place[:8])[0]} cannot be made")
            if os.WIFSIGNALED(status):
                number = struct.unpack("<q", place[:8])[0]
                outcome = "hangs" if os.WTERMSIG(status) in (signal.SIGALRM, signal.SIGPROF) else "crashes"
                counts[outcome] += 1
                bad.append((number, outcome, signal.Signals(os.WTERMSIG(status)).name))
                start = number + 1
    return Tally(counts, tuple(bad), time.monotonic() - began)


def work(door: Door, name: str, seed: int, numbers: range, scratch: Path, place: mmap.mmap, writer: int) -> None:
    """In a process of its own: the inputs one by one, each outcome written down as it comes."""
    torch.set_num_threads(1)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for alarm in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(alarm, signal.SIG_DFL)
    for number in numbers:
        place[:8] = struct.pack("<q", number)
        files = door.make(random.Random(f"{seed} {name} {number}"), door.valid)
        lay_out(scratch, files)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        signal.setitimer(signal.ITIMER_REAL, WAITING)
        outcome, what = judge(door, scratch)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(writer, (json.dumps([None, {outcome: 1}, ""]) + "\n").encode())
        if outcome not in ("read", "refused"):
            os.write(writer, (json.dumps([number, outcome, what]) + "\n").encode())


def judge(door: Door, root: Path) -> tuple[str, str]:
    """What becomes of the input that lies in a folder, and the end of the traceback if there is one."""
    try:
        door.enter(root)
    except BaseException as error:
        if any(is_allocation(cause) for cause in causes(error)):
            return "allocations", last_lines(error)
        return ("refused", str(error)) if isinstance(error, InputError) else ("tracebacks", last_lines(error))
    return "read", ""


def causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def is_allocation(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or bool(
        re.search(r"allocator|allocation|(to|t) allocate|out of memory", str(error), re.IGNORECASE)
    )


def last_lines(error: BaseException) -> str:
    return " | ".join("".join(traceback.format_exception(error)).splitlines()[-6:])[-900:]


def lay_out(root: Path, files: Files) -> None:
    """The files in a folder that holds nothing else; the process stands in it."""
    os.chdir("/")
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    os.chdir(root)
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def main() -> None:
    """Send the inputs that the command line asks for through every door."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--door", action="append", choices=[*DOORS], help="These alone (repeatable).")
    parser.add_argument("--only", type=int, help="This input alone, with its traceback.")
    asked = parser.parse_args()
    for name in asked.door or DOORS:
        if asked.only is not None:
            with tempfile.TemporaryDirectory() as scratch:
                door = DOORS[name]()
                lay_out(Path(scratch), door.make(random.Random(f"{asked.seed} {name} {asked.only}"), door.valid))
                print(door.enter(Path(scratch)))
            continue
        tally = fuzz(name, asked.inputs, asked.seed)
        print(tally.line(name), flush=True)
        for number, outcome, what in tally.bad[:20]:
            print(f"  {outcome} of input {number}: {what}", flush=True)


if __name__ == "__main__":
    main()
