"""Dependencies point downwards, names mean one thing, and the core needs no extra."""

import ast
import graphlib
import inspect
import re
from pathlib import Path

import brittle
from helpers.processes import TESTS, run_code

PACKAGE = Path(brittle.__file__).parent
ROWS = [
    {"errors", "_version", "progress", "random_streams"},
    {"storage"},
    {"results", "sweeps"},
    {"linear"},
    {"models", "data"},
    {"attacks", "bounds", "compression"},
    {"evaluation", "training"},
    {"reporting"},
    {"auditing"},
    {"delivery"},
    {"experiments"},
    {"cli"},
]
"""A package imports only from rows above its own: packages in one row do not know one another."""
WITHOUT_TORCH = {"results", "sweeps", "reporting", "cli"}
REPORTING_READS = {"errors", "_version", "progress", "storage", "results"}
"""Pages and figures are drawn from results alone."""
EXTRAS = {
    "torchvision", "timm", "transformers", "ray", "lightning", "lightning_fabric", "tensorboard", "pyautoattack",
    "onnx", "onnxscript", "onnxruntime", "huggingface_hub",
}  # fmt: skip


def modules() -> dict[str, Path]:
    """Every module of the package by its name without ``brittle.``; the package and its program are left out."""
    names = {
        path: path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".") for path in PACKAGE.rglob("*.py")
    }
    return {
        name.removesuffix(".__init__"): path for path, name in names.items() if name not in ("__init__", "__main__")
    }


MODULES = modules()


def imports(path: Path, top_level: bool = False) -> set[tuple[str, str]]:
    """``(module, name)`` of everything imported; the name is empty for ``import module``."""
    tree = ast.parse(path.read_text())
    read = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            read |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            read |= {(node.module, alias.name) for alias in node.names}
    return read


def ours(path: Path) -> set[str]:
    """Modules of this package that a file imports."""
    targets = set()
    for module, name in imports(path):
        if module.partition(".")[0] == "brittle":
            full = f"{module}.{name}".removeprefix("brittle.")
            targets.add(full if full in MODULES else module.removeprefix("brittle.").removeprefix("brittle"))
    return targets


def test_every_package_has_its_row():
    assert sorted(name for row in ROWS for name in row) == sorted({name.partition(".")[0] for name in MODULES})


def test_the_page_draws_the_same_rows():
    page = (TESTS.parent / "docs" / "architecture.md").read_text()
    drawn = re.findall(r"^ ?\d+  (\S.*)$", page, re.MULTILINE)
    assert len(drawn) == len(ROWS)
    for line, row in zip(drawn, ROWS, strict=True):
        assert row == set(re.split(r"\s{2,}", line)[: len(row)])


def test_packages_import_from_rows_above_their_own():
    row = {name: number for number, names in enumerate(ROWS) for name in names}
    wrong = []
    for name, path in MODULES.items():
        own = name.partition(".")[0]
        for target in ours(path):
            package = target.partition(".")[0]
            if package != own and (package not in row or row[package] >= row[own]):
                wrong.append(f"{name} -> {target or 'brittle'}")
    assert wrong == []


def test_pages_are_drawn_from_results_alone():
    read = {
        target.partition(".")[0]
        for name, path in MODULES.items()
        if name.startswith("reporting")
        for target in ours(path)
    }
    assert read <= REPORTING_READS | {"reporting"}


def test_no_file_imports_itself_by_a_detour():
    parts = {name for name, path in MODULES.items() if path.name != "__init__.py"}
    graph = {name: ours(MODULES[name]) & parts for name in parts}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_no_private_name_crosses_files():
    crossing = [
        f"{name}: {module}.{imported}"
        for name, path in MODULES.items()
        for module, imported in imports(path)
        if module.startswith("brittle") and imported.startswith("_") and not imported.startswith("__")
    ]
    assert crossing == []


def test_no_module_bears_a_public_name():
    assert {name for name in MODULES if name.rpartition(".")[2] in brittle.__all__} == set()


def test_no_package_offers_a_name_that_one_of_its_files_bears():
    for name, path in MODULES.items():
        if path.name == "__init__.py":
            files = {other.removeprefix(f"{name}.") for other in MODULES if other.startswith(f"{name}.")}
            assert {imported for _, imported in imports(path)} & files == set(), name


def test_results_pages_and_the_command_line_import_no_torch_at_the_top():
    heavy = [
        name
        for name, path in MODULES.items()
        if name.partition(".")[0] in WITHOUT_TORCH and "torch" in {i.partition(".")[0] for i, _ in imports(path, True)}
    ]
    assert heavy == []


def test_the_command_line_results_and_pages_need_no_torch():
    """In one process, the command line first: it needs less than the pages."""
    code = """
import sys, brittle.cli
assert not {'torch', 'pandas', 'matplotlib', 'numpy'} & set(sys.modules)
import brittle.results, brittle.sweeps, brittle.reporting
assert 'torch' not in sys.modules
"""
    run_code(code)


def test_extras_are_imported_inside_functions_only():
    read = {name: {module.partition(".")[0] for module, _ in imports(path, True)} for name, path in MODULES.items()}
    assert {name: packages & EXTRAS for name, packages in read.items() if packages & EXTRAS} == {}


def test_only_the_command_line_prints():
    for name, path in MODULES.items():
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        printing = [n for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]
        assert not printing or name.startswith("cli"), name


def test_core_works_without_extras_and_its_public_names_stay_what_their_page_says():
    """In one process: data and models first, which need less than the rest; then all is imported, then used."""
    code = f"""
import sys, brittle.data.load, brittle.models.build, brittle.models.checkpoints, brittle.data.downloads
assert not {{'torchvision', 'timm', 'PIL', 'sklearn', 'scipy'}} & set(sys.modules)
for name in {sorted(EXTRAS)!r}:
    sys.modules[name] = None
import importlib, inspect, brittle, torch
for name in {sorted(MODULES)!r}:
    if not name.endswith("__main__"):
        importlib.import_module("brittle." + name)
for name in brittle.__all__:
    value = getattr(brittle, name)
    assert not inspect.ismodule(value) and value.__name__ == name, (name, value)
    assert value.__doc__ and value.__module__.startswith("brittle."), name
assert brittle.spread(torch.tensor([3.0, 1.0]), 2) > 0
net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
audit = brittle.audit(net, brittle.load_data("digits", limit=8))
assert len(audit.norms) == 2 and audit.norm(2).evaluation and audit.layers[0].name == "1"
"""
    run_code(code, seconds=300)


def test_public_names_all_resolve():
    assert sorted(brittle.__all__) == sorted(name for names in brittle._HOMES.values() for name in names.split())
    for name in brittle.__all__:
        assert callable(getattr(brittle, name)) or inspect.isclass(getattr(brittle, name))


# --- the tests themselves -----------------------------------------------------------------------------------


TEST_FILES = sorted(TESTS.rglob("*.py"))


def test_tests_import_from_their_helpers_and_never_from_each_other():
    names = [path.stem for path in TEST_FILES if path.stem.startswith("test_")]
    assert len(set(names)) == len(names), "two files of one name cannot both be collected"
    read = {path.name: {module.partition(".")[0] for module, _ in imports(path)} & set(names) for path in TEST_FILES}
    assert {name: modules for name, modules in read.items() if modules} == {}


def test_tests_import_no_private_name():
    read = {(path.name, name) for path in TEST_FILES for _, name in imports(path)}
    assert {place for place in read if place[1].startswith("_")} == set()


def test_processes_are_started_by_the_helper_that_limits_and_ends_them():
    starting = {
        path.name
        for path in TEST_FILES
        for module, name in imports(path)
        if module == "subprocess" and name not in {"PIPE", "DEVNULL"}
    }
    assert starting == {"processes.py"}
