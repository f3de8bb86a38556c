"""Dependencies point downwards, and the core needs no extra."""

import ast
import subprocess
import sys
from pathlib import Path

import brittle

PACKAGE = Path(brittle.__file__).parent
ORDER = [
    {"errors", "wording"},
    {"files", "codec", "inputs", "compressibility", "digest", "options", "architectures", "architectures.checks"},
    {"readers", "readers.contents", "downloads"},
    {"architectures.fcn", "architectures.resnet", "architectures.vgg", "architectures.vit"},
    {"readers.plain_pickle", "readers.mnist", "readers.svhn", "readers.npz", "readers.folders"},
    {"readers.cifar"},
    {"norms", "results", "frozen", "drawing", "geometry"},
    {"attacks.losses", "attacks.ball", "attacks.packing", "attacks.halving", "spread"},
    {"attacks.starts", "passes"},
    {"attacks.pool", "attacks.hashing"},
    {"attacks.steepest", "attacks.auto_pgd", "attacks.square_search", "attacks.universal"},
    {"attacks"},
    {"convolution", "models", "checkpoints", "data", "sensitivity", "verdict", "figures", "presets", "signing"},
    {"layers", "report", "samples"},
    {"bounds.layer", "bounds.tracing", "bounds.multipliers", "bounds.pair_inf", "bounds.radius", "directions"},
    {"bounds.graph", "bounds.pair_two", "private"},
    {"bounds.product", "bounds.absolute", "bounds.alignment", "bounds.torus", "bounds.diagonal", "bounds.affine"},
    {"bounds.joint", "bounds.choice", "bounds.interval", "worst"},
    {"bounds.recursion", "bounds.pooling", "curves", "naming"},
    {"bounds.gram", "bounds.chain", "bounds.pullback", "keeping"},
    {"bounds.network", "bounds.pair_conv", "bounds.grouped"},
    {"bounds.margins"},
    {"bounds.relaxation"},
    {"bounds"},
    {"certificates"},
    {"evaluation", "honesty"},
    {"measure", "story", "universal", "attacking"},
    {"training.recipe", "training.batches", "training.snapshots", "training.hosts", "training.selection"},
    {"training.adversarial", "training.history", "training.nuclear", "training.low_rank", "training.proximal"},
    {"training.penalties", "training.constraints"},
    {"training.assembly"},
    {"training.jobs"},
    {"training.loop"},
    {"training"},
    {"runs"},
    {"auditing"},
    {"demo"},
    {"cli"},
]
"""A module imports only from rows above its own (packages may import their own parts)."""
NO_TORCH = {
    "codec", "errors", "wording", "files", "results", "drawing", "figures", "report", "verdict", "story", "cli",
    "options",
}  # fmt: skip
EXTRAS = {"torchvision", "timm", "transformers", "ray", "lightning", "lightning_fabric", "tensorboard", "pyautoattack"}


def modules() -> dict[str, Path]:
    names = {
        path: path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".") for path in PACKAGE.rglob("*.py")
    }
    return {name.removesuffix(".__init__"): path for path, name in names.items() if name != "__init__"}


def imports(path: Path, top_level: bool) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {_module(node.module, alias.name) for alias in node.names}
    return found


def _module(package: str, name: str) -> str:
    """What ``from package import name`` reads: a module of ours by that name, else the package itself."""
    full = f"{package}.{name}"
    return full if full.removeprefix("brittle.") in modules() else package


def test_every_module_has_its_row():
    assert set().union(*ORDER) == set(modules())
    assert sum(map(len, ORDER)) == len(modules())


def test_imports_point_upwards_in_the_table():
    row = {name: number for number, names in enumerate(ORDER) for name in names}
    wrong = []
    for name, path in modules().items():
        for target in imports(path, top_level=False):
            short = target.removeprefix("brittle.")
            if target.startswith("brittle.") and short in row and not short.startswith(f"{name}."):
                wrong += [f"{name} -> {short}"] if row[short] >= row[name] else []
    assert wrong == []


def test_modules_for_reports_import_no_torch_at_the_top():
    assert [name for name in NO_TORCH if "torch" in {i.split(".")[0] for i in imports(modules()[name], True)}] == []


def test_extras_are_imported_inside_functions_only():
    wrong = {name: imports(path, True) for name, path in modules().items()}
    assert {name: i & EXTRAS for name, i in wrong.items() if {x.split(".")[0] for x in i} & EXTRAS} == {}


def test_only_the_command_line_prints():
    for name, path in modules().items():
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        printing = [n for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]
        assert not printing or name == "cli", name


def test_core_works_without_extras():
    code = f"""
import sys
for name in {sorted(EXTRAS)!r}:
    sys.modules[name] = None
import brittle, torch
for name in {sorted(modules())!r}:
    __import__("brittle." + name)
net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
audit = brittle.audit(net, brittle.load_data("digits", limit=8))
assert len(audit.evaluations) == 2 and audit.layers[0].name == "1"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_the_command_line_imports_no_torch():
    code = "import sys, brittle.cli; assert not {'torch', 'pandas', 'matplotlib', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_public_names_all_resolve():
    for name in brittle.__all__:
        assert getattr(brittle, name) is not None
    assert set(brittle.__all__) == {name for names in brittle._HOMES.values() for name in names}
