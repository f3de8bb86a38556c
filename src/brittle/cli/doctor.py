"""What this machine has of all that Brittle can use: packages, devices, data sets, caches."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

from brittle._version import __version__
from brittle.errors import InputError, one_line

TESTING = "test"
"""The extra of those who change Brittle; nobody misses it."""


@dataclass(frozen=True)
class Extra:
    """An optional group of packages.

    Attributes:
        packages: Version by name; None where the package is missing.
        install: The command that installs the group.
    """

    packages: dict[str, str | None]
    install: str

    @property
    def missing(self) -> list[str]:
        """Names of packages that are not installed."""
        return [name for name, found in self.packages.items() if found is None]


@dataclass(frozen=True)
class Checkup:
    """What was found.

    Attributes:
        brittle: Version.
        python: Version, and the system.
        packages: What Brittle needs: version by name; None where it is missing.
        extras: What it can use, by the name of the extra.
        devices: On which networks can run, with their memory.
        threads: CPU threads that torch uses; None where torch cannot be imported.
        cores: CPUs of the machine.
        torch_error: Why torch cannot be imported; None where it can.
        data: By data set, "found", or why not; empty without a data root.
        caches: By library, the folder where it keeps what it has fetched; None where there is none.
    """

    brittle: str
    python: str
    packages: dict[str, str | None]
    extras: dict[str, Extra]
    devices: dict[str, str]
    threads: int | None
    cores: int
    torch_error: str | None
    data: dict[str, str]
    caches: dict[str, str | None]


def examine(data_root: Path | None) -> Checkup:
    """Look at everything; of optional packages only the version is read, none is imported."""
    packages, extras = _requirements()
    devices, threads, problem = _devices()
    return Checkup(
        brittle=__version__,
        python=f"{platform.python_version()} ({platform.platform(terse=True)}, {platform.machine()})",
        packages=packages,
        extras=extras,
        devices=devices,
        threads=threads,
        cores=os.cpu_count() or 1,
        torch_error=problem,
        data={} if data_root is None or problem is not None else dict(_data_sets(data_root)),
        caches={name: str(folder) if folder.is_dir() else None for name, folder in cache_folders().items()},
    )


def _requirements() -> tuple[dict[str, str | None], dict[str, Extra]]:
    """Versions of what the installed package asks for: always, and by extra."""
    from packaging.requirements import Requirement

    try:
        metadata = distribution("brittle")
    except PackageNotFoundError:  # run from its source
        return {"torch": installed("torch")}, {}
    asked = [Requirement(line) for line in metadata.requires or ()]
    core = {each.name: installed(each.name) for each in asked if each.marker is None or each.marker.evaluate()}
    extras = {}
    for extra in metadata.metadata.get_all("Provides-Extra") or ():
        own = [each for each in asked if each.marker and each.marker.evaluate({"extra": extra})]
        packages = {each.name: installed(each.name) for each in own if each.name not in core}
        if extra != TESTING:
            extras[extra] = Extra(packages, f"pip install 'brittle[{extra}]'")
    return core, extras


def installed(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> tuple[dict[str, str], int | None, str | None]:
    """Devices with their memory, torch's threads, and why torch cannot be imported."""
    try:
        import torch
    except Exception as error:  # a library of the system may be missing, or of another version
        return {}, None, one_line(error)
    found = {"cpu": platform.processor() or platform.machine()}
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        found[f"cuda:{number}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if torch.backends.mps.is_available():
        found["mps"] = "not used: it has no double precision"
    return found, torch.get_num_threads(), None


def _data_sets(root: Path) -> Iterator[tuple[str, str]]:
    """Data sets that lie under the root by their own names: each is opened as a command would."""
    from brittle.data.load import READERS, load_data

    for name in (*READERS, "imagenet"):
        try:
            load_data(name, root=root, limit=1)
        except (InputError, OSError) as error:
            yield name, one_line(error).partition(": ")[2]
        else:
            yield name, "found"


def cache_folders() -> dict[str, Path]:
    """Where libraries keep what they have fetched, by their own rules, whether it is there or not."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    hugging_face = Path(os.environ.get("HF_HOME") or home / "huggingface")
    return {
        "Hugging Face": Path(os.environ.get("HF_HUB_CACHE") or hugging_face / "hub"),
        "torch.hub": Path(os.environ.get("TORCH_HOME") or home / "torch") / "hub",
    }


def as_document(checkup: Checkup) -> dict[str, Any]:
    """The findings as plain values."""
    return dataclasses.asdict(checkup)


def checkup_lines(checkup: Checkup) -> Iterator[str]:
    """The findings, line by line; what is missing comes with the command that mends it."""
    yield f"brittle {checkup.brittle}, Python {checkup.python}"
    yield f"Packages: {_with_versions(checkup.packages)}"
    yield "Extras:"
    for name, extra in checkup.extras.items():
        missing = f"; missing {', '.join(extra.missing)}: {extra.install}" if extra.missing else ""
        there = {package: found for package, found in extra.packages.items() if found}
        yield f"  {name}: {_with_versions(there) or 'not installed'}{missing}"
    if checkup.torch_error is not None:
        yield f"torch cannot be imported: {checkup.torch_error}"
    yield "Devices:"
    yield from (f"  {name}: {what}" for name, what in checkup.devices.items())
    yield f"CPU threads: {checkup.threads or 'unknown'} of {checkup.cores} cores"
    hint = "" if checkup.data else "; give --data-root to look for others"
    yield f"Data sets: digits (comes with scikit-learn){hint}"
    yield from (f"  {name}: {state}" for name, state in checkup.data.items())
    yield "Caches:"
    yield from (f"  {name}: {folder or 'none'}" for name, folder in checkup.caches.items())


def _with_versions(packages: Mapping[str, str | None]) -> str:
    return ", ".join(f"{name} {found or 'missing'}" for name, found in packages.items())
