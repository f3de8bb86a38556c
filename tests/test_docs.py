"""What pages and docstrings name exists."""

import dataclasses
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import brittle
from brittle import bounds
from brittle.attacks import ATTACKS
from brittle.bounds import NetworkBound
from brittle.evaluation import PRESETS, Execution, Threat
from brittle.models import ARCHITECTURES
from brittle.models.layers import KINDS
from brittle.results import (
    Audit,
    ComparedNetwork,
    Comparison,
    Evaluation,
    FeatureCompression,
    FeatureLayer,
    FeaturePair,
    LayerResult,
    LipschitzResult,
    NormResult,
    Paired,
    SampleResult,
)
from brittle.results.methods import Argument, OperatorMethod

PACKAGE = Path(brittle.__file__).parent
ROOT = PACKAGE.parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ROLE = re.compile(r":(?:func|class|data|mod|meth|attr):`~?([\w.]+)`")
FILE = re.compile(r"\b(?:src|tests|benchmarks|docs)/[\w/.]*\w")


def theory() -> str:
    """The page of the theory with its sections."""
    pages = [ROOT / "docs" / "theory.md", *(ROOT / "docs" / "theory").glob("*.md")]
    return "\n".join(page.read_text() for page in pages)


def exists(path: str) -> bool:
    """Whether ``package.module.name`` can be imported; fields of dataclasses count."""
    try:
        pkgutil.resolve_name(path)
    except (ImportError, AttributeError):
        owner, _, name = path.rpartition(".")
        return bool(owner) and exists(owner) and name in getattr(pkgutil.resolve_name(owner), "__annotations__", {})
    return True


def missing_paths(files: list[Path]) -> set[tuple[str, str]]:
    """``(file, path)`` of every dotted path into the package that leads nowhere."""
    found = {(path.name, name) for path in files for name in re.findall(r"\bbrittle(?:\.\w+)+", path.read_text())}
    return {(file, name) for file, name in found if not exists(name)}


def test_every_section_that_a_docstring_cites_exists():
    text = " ".join(re.sub(r"\s+", " ", path.read_text()) for path in PACKAGE.rglob("*.py"))
    cited = set(re.findall(r'heory page, section "([^"]+)"', text))
    assert len(cited) >= 7
    assert cited <= {line.lstrip("# ").strip() for line in theory().splitlines() if line.startswith("#")}


def test_every_path_that_a_page_names_leads_somewhere():
    assert len(PAGES) > 10
    assert missing_paths(PAGES) == set()


def test_every_path_that_the_source_names_leads_somewhere():
    assert missing_paths([*PACKAGE.rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]) == set()


def test_a_path_that_leads_nowhere_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "`brittle.evaluate`, `brittle.results.Audit.norms`, `brittle.worst`, `brittle.results.Audit.norm_by_p`"
    )
    assert missing_paths([page]) == {("page.md", "brittle.worst"), ("page.md", "brittle.results.Audit.norm_by_p")}


def test_every_name_that_a_docstring_refers_to_exists_where_it_stands():
    missing = []
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        names = [name for name in ROLE.findall(path.read_text()) if not name.startswith("brittle.")]
        if names and parts[-1] != "__main__":
            module = importlib.import_module(".".join(parts).removesuffix(".__init__"))
            places = [module, *(value for _, value in inspect.getmembers(module, inspect.isclass))]
            near = {name for place in places for name in {*dir(place), *getattr(place, "__annotations__", {})}}
            missing += [(path.name, name) for name in names if name.partition(".")[0] not in near and not exists(name)]
    assert missing == []


def test_every_file_that_a_page_names_is_there():
    named = {(page.name, name) for page in PAGES for name in FILE.findall(page.read_text())}
    assert {(page, name) for page, name in named if not (ROOT / name).exists()} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_between_pages_leads_to_a_page_and_its_section(page):
    for target, _, section in re.findall(r"\]\((?!https?:)([^)#\s]*)(#?)([^)\s]*)\)", page.read_text()):
        reached = (page.parent / target) if target else page
        assert reached.exists(), target
        if section:
            headings = re.findall(r"^#+ (.+)$", reached.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert section in slugs, f"{target}#{section}"


# --- tables of the source have their lines on the pages ---------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "lines"),
    [
        ("attacks.md", [f"\n| `brittle.{name}` |" for name in ATTACKS]),
        ("attacks.md", [f'\n| `"{name}"` |' for name in PRESETS]),
        ("cli.md", [f"\n| `{name}` |" for name in ARCHITECTURES]),
        ("layers.md", [f"`{kind}`" for kind in KINDS]),
    ],
)
def test_every_row_of_a_table_has_its_line_on_the_page(page, lines):
    text = (ROOT / "docs" / page).read_text()
    assert [line for line in lines if line not in text] == []


RECORDS = {
    "audit.md": (
        *(Audit, NormResult, LayerResult, LipschitzResult, Evaluation, SampleResult),
        *(FeatureCompression, FeatureLayer, FeaturePair),
    ),
    "attacks.md": (Threat, Execution),
    "bounds.md": (NetworkBound,),
    "compare.md": (Comparison, ComparedNetwork, Paired),
}


@pytest.mark.parametrize(
    ("page", "record"), [(page, record) for page, records in RECORDS.items() for record in records]
)
def test_every_field_of_a_record_is_explained_on_its_page(page, record):
    text = (ROOT / "docs" / page).read_text()
    assert [field.name for field in dataclasses.fields(record) if f"`{field.name}`" not in text] == []


@pytest.mark.parametrize("name", [*Argument, *OperatorMethod])
def test_the_theory_proves_what_bounds_are_named_for(name):
    assert re.search(rf"[`*]{re.escape(name)}[`* ]", theory(), re.IGNORECASE)


def test_every_public_name_stands_once_in_the_reference():
    pages = (ROOT / "docs" / "reference").glob("*.md")
    named = [name for page in pages for name in re.findall(r"^::: brittle\.(\w+)$", page.read_text(), re.MULTILINE)]
    assert sorted(named) == sorted(brittle.__all__)


def test_the_map_of_the_code_names_every_analysis_that_a_rule_is_told_to():
    text = (ROOT / "docs" / "architecture.md").read_text()
    modules = [importlib.import_module(m.name) for m in pkgutil.walk_packages(bounds.__path__, "brittle.bounds.")]
    analyses = {name for module in modules for name, value in vars(module).items() if hasattr(value, "registry")}
    assert len(analyses) > 10
    assert {name for name in analyses if f"`{name}`" not in text} == set()
