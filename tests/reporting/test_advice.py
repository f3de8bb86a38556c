"""What would help: which rule speaks from which numbers, and that its command is one that the command line reads."""

import shlex
from dataclasses import replace

import pytest
import typer

from brittle.cli.commands import app
from brittle.reporting.advice import advice
from brittle.results import CertifiedCurve, Evaluation, Flag, LipschitzResult, Rate, Signature, Verdict
from helpers.audits import INF, full, layer, norm_result

SOURCE = {
    "model": "my net.safetensors",
    "arch": "fcn",
    "data": "digits",
    "limit": 300,
    "arch_arg": ("width=8", "depth=2"),
}


def made(robust=50, n=400, *, clean=None, proven=0, decay=0.0, level="fragile", kind="Linear", **fields):
    """An audit in one norm, with a layer whose spectrum decays."""
    clean = n if clean is None else clean
    evaluation = Evaluation(("apgd",), INF, 0.06, (0.0, 1.0), 1, 0, {}, n, clean, robust, 0, 0.06)
    certified = CertifiedCurve(INF, (0.0, 0.06), (Rate(clean, n), Rate(proven, n)), 0.01)
    norm = norm_result(
        INF, evaluation=evaluation, certified=certified, lipschitz=LipschitzResult(INF, 9.0, "", None, 1.0, 1.0, 9)
    )
    layers = (layer("1", 64, 64, decay=decay, kind=kind), layer("3", 10, 64, decay=0.0))
    fields = {"norms": (norm,), "layers": layers, "source": SOURCE, "flags": ()} | fields
    return replace(full(), verdict=Verdict(level, "", (), INF), **fields)


def commands(audit) -> list[str]:
    """The commands, each read by the command line itself."""
    found = [item.command for item in advice(audit)]
    for command in found:
        program, name, *arguments = shlex.split(command)
        group = typer.main.get_command(app)
        assert program == "brittle"
        group.commands[name].make_context(name, arguments)  # raises where an option or value is none
    return found


def test_a_network_that_breaks_is_trained_against_the_attack_that_decided():
    (command,) = commands(made(proven=50))
    assert command == (
        "brittle train --fine-tune 'my net.safetensors' --arch fcn --arch-arg width=8 --arch-arg depth=2 --data digits"
        " --mean 0 --std 1 --adversarial inf=0.06 --epochs 10 -o hardened"
    )
    assert commands(made(400, proven=400, level="robust")) == []


@pytest.mark.parametrize(
    ("kind", "said"), [("Linear", "--constraint spectral_cap="), ("low-rank pair", "--constraint condition_cap=2")]
)
def test_a_concentrated_layer_is_spread(kind, said):
    spread = [command for command in commands(made(proven=50, decay=0.2, kind=kind)) if said in command]
    assert len(spread) == 1
    assert not any(said in command for command in commands(made(400, proven=400, decay=0.2, level="robust")))


def test_a_raised_flag_asks_for_more_attacks_and_few_samples_for_more():
    raised = (Flag("zero gradients", True, "", "", INF),)
    doubted = made(350, proven=340, level="unclear")
    doubted = replace(doubted, norms=(replace(doubted.norms[0], flags=raised),))
    (command,) = [command for command in commands(doubted) if "--preset" in command]
    assert "--preset thorough -o audit-thorough" in command
    assert "--limit 300" in command
    (command,) = commands(made(40, 60, proven=40, clean=50, level="too few samples"))
    assert "--limit 150 " in command
    assert "--limit 300" not in command


def test_a_wide_gap_between_proof_and_attack_asks_for_better_bounds_once():
    (command,) = commands(made(300, proven=200, level="robust"))
    assert "--tighten 20" in command
    tried = Signature({}, "cpu", 0, {"tighten": 20}, "", None)
    assert commands(made(300, proven=200, level="robust", signature=tried)) == []


def test_what_the_audit_does_not_know_stands_in_capitals():
    assert commands(made(proven=50, source={})) == [
        "brittle train --fine-tune MODEL --arch ARCH --data DATA --adversarial inf=0.06 --epochs 10 -o hardened"
    ]
    assert commands(made(proven=50, source={"model": "hf:folder", "data": "digits"})) == []
    (command,) = commands(made(proven=50, source={"model": "run", "data": "cifar10", "data_root": "data"}))
    assert command.startswith("brittle train --fine-tune run --data cifar10 --data-root data --adversarial")
