"""The wheel is whole: installed in an environment of its own, it answers, writes a report, and its examples hold."""

import re
import sysconfig
import zipfile
from pathlib import Path

import pytest

from helpers import processes

ROOT = Path(__file__).parents[1]


def run(*arguments, **options):
    """What Python prints, which has to succeed; the checkout is not on its path."""
    done = processes.run(*arguments, seconds=250, env={"PYTHONPATH": ""}, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run("-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """An environment with the wheel in it, which borrows what the wheel depends on, and not the checkout."""
    folder = tmp_path_factory.mktemp("environment")
    python = folder / "bin" / "python"
    run("-m", "venv", "--without-pip", folder)
    run("-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    return python


def test_the_wheel_answers_from_its_own_files_and_writes_a_report(python, tmp_path):
    code = (
        "import brittle, torch, pathlib, sys; from brittle.cli import run;"
        "assert pathlib.Path(brittle.__file__).is_relative_to(sys.prefix), brittle.__file__;"
        "model = brittle.build_model('fcn', {'in_features': 64, 'width': 6});"
        "brittle.save_state(model, pathlib.Path('w.safetensors'));"
        "sys.exit(run(['audit', 'w.safetensors', '--arch', 'fcn', '-o', 'report']))"
    )
    run("-c", code, python=python, cwd=tmp_path)
    assert "<html" in (tmp_path / "report" / "report.html").read_text()


def test_the_wheels_examples_hold(python, tmp_path):
    printed = run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--doctest-modules", "--pyargs",
        "brittle.linear", "brittle.results", python=python, cwd=tmp_path,
    )  # fmt: skip
    assert int(re.search(r"(\d+) passed", printed)[1]) >= 10


def test_the_wheel_names_no_file_of_the_checkout_to_a_package_index(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        text = archive.read(name).decode()
    assert "# Brittle" in text
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert links
    assert [link for link in links if not link.startswith("https://")] == []
    assert [part for part in archive.namelist() if part.endswith(("report.html.j2", "fig4.parquet"))]
