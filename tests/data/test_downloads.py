"""Downloads, with torchvision's fetching replaced or cut off from every network."""

from __future__ import annotations

import socket
import sys
import urllib.error
from collections.abc import Callable
from pathlib import Path

import pytest

from brittle.data.downloads import download
from brittle.errors import InputError, MissingExtra

datasets = pytest.importorskip("torchvision.datasets")
SETS = {
    "mnist": ("MNIST", {"MNIST/raw/train-images-idx3-ubyte", "MNIST/raw/t10k-labels-idx1-ubyte"}),
    "cifar10": ("CIFAR10", {"cifar-10-batches-py/data_batch_1", "cifar-10-batches-py/test_batch"}),
    "cifar100": ("CIFAR100", {"cifar-100-python/train", "cifar-100-python/test"}),
    "svhn": ("SVHN", {"train_32x32.mat", "test_32x32.mat"}),
}
"""By spec: torchvision's class and some of the files that its download leaves in the root."""


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network here")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def files(root: Path) -> dict[str, str]:
    return {p.relative_to(root).as_posix(): p.read_text() for p in root.rglob("*") if p.is_file()}


@pytest.fixture
def fetch(monkeypatch) -> Callable[..., list[dict[str, str]]]:
    """Let torchvision's class of a spec write files, an archive among them, and return the list of its calls."""

    def fake(spec: str, error: BaseException | None = None) -> list[dict[str, str]]:
        name, products = SETS[spec]
        calls: list[dict[str, str]] = []

        def write(root: str, *, download: bool, **arguments: str) -> None:
            assert download
            calls.append(arguments)
            Path(root, "archive.tar.gz").write_text("archive")
            for product in sorted(products):
                if product.startswith(arguments.get("split", "")):
                    Path(root, product).parent.mkdir(parents=True, exist_ok=True)
                    Path(root, product).write_text("fetched")
                if error is not None:
                    raise error

        monkeypatch.setattr(datasets, name, write)
        return calls

    return fake


@pytest.mark.parametrize("spec", SETS)
def test_files_come_into_place_and_nothing_else_stays(tmp_path, fetch, spec):
    calls, root = fetch(spec), tmp_path / "new" / "root"
    download(spec, root)
    assert files(root) == dict.fromkeys(SETS[spec][1], "fetched")
    assert calls == ([{"split": "train"}, {"split": "test"}] if spec == "svhn" else [{}])
    assert not [path for path in root.iterdir() if path.name.startswith(".")]
    download(spec, root)
    assert len(calls) == (2 if spec == "svhn" else 1)


def test_what_is_there_stays_and_is_not_fetched_again(tmp_path, fetch):
    (tmp_path / "train_32x32.mat").write_text("mine")
    (tmp_path / "other").write_text("mine")
    calls = fetch("svhn")
    download("svhn", tmp_path)
    assert files(tmp_path) == {"train_32x32.mat": "mine", "other": "mine", "test_32x32.mat": "fetched"}
    assert calls == [{"split": "test"}]


@pytest.mark.parametrize("spec", SETS)
@pytest.mark.parametrize(
    "error", [urllib.error.URLError("unknown host"), RuntimeError("File not found\nor\ncorrupted.")]
)
def test_a_failure_is_one_line_and_leaves_nothing(tmp_path, fetch, spec, error):
    fetch(spec, error)
    with pytest.raises(InputError) as caught:
        download(spec, tmp_path)
    message = str(caught.value)
    assert message.startswith(
        f"{spec}: expected a download of torchvision.datasets.{SETS[spec][0]} to {tmp_path}; got "
    )
    assert "unknown host" in message or "RuntimeError: File not found or corrupted." in message
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_nothing_and_passes(tmp_path, fetch):
    fetch("mnist", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        download("mnist", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("spec", ["svhn"])
def test_what_a_killed_download_left_goes_with_the_next(tmp_path, fetch, spec):
    (tmp_path / ".svhn-download").mkdir()
    (tmp_path / ".svhn-download" / "train_32x32.mat").write_text("half")
    fetch("svhn")
    download("svhn", tmp_path)
    assert files(tmp_path) == dict.fromkeys(SETS["svhn"][1], "fetched")


@pytest.mark.parametrize("spec", SETS)
def test_torchvision_itself_without_a_network(tmp_path, spec):
    with pytest.raises(InputError, match=rf"^{spec}: .*{SETS[spec][0]} .*no network here") as caught:
        download(spec, tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_brings_something_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "MNIST", lambda root, **_: Path(root, "mnist-v2").mkdir())
    with pytest.raises(InputError, match=r"mnist: .*FileNotFoundError.*MNIST"):
        download("mnist", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_root_that_cannot_be_a_folder(tmp_path, fetch):
    calls = fetch("mnist")
    (tmp_path / "file").write_text("words")
    with pytest.raises(InputError, match=r"expected a download of torchvision.datasets.MNIST to .*file"):
        download("mnist", tmp_path / "file")
    assert calls == []


def test_a_root_is_needed():
    with pytest.raises(InputError, match="root: expected the folder that is to hold the files of mnist"):
        download("mnist", None)


@pytest.mark.parametrize("spec", ["", "digits", "imagenet", "folder:x", "npz:x", "MNIST"])
def test_other_sets_are_refused(tmp_path, spec):
    with pytest.raises(InputError, match=rf"expected one of mnist, cifar10, cifar100, svhn; got '{spec}'"):
        download(spec, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_missing_torchvision_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(MissingExtra, match=r"downloading mnist needs the package torchvision; .*'brittle\[vision\]'"):
        download("mnist", tmp_path)
    assert list(tmp_path.iterdir()) == []
