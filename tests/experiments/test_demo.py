"""The demo in small: what it equalises, what it writes, and that its words follow its numbers."""

import functools
import html
import math
from dataclasses import replace

import pytest
import torch

from brittle.data.load import load_data
from brittle.experiments.demo import VARIANTS, run_demo, train_variant
from brittle.models.layers import read_layers
from brittle.reporting import comparison_lines
from brittle.results import Audit, Comparison, Paired
from helpers.audits import with_parts


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    state = torch.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:  # narrow networks, and the first digits alone
        patch.setattr("brittle.experiments.demo.WIDTH", 32)
        patch.setattr("brittle.experiments.demo.load_data", functools.partial(load_data, limit=150))
        comparison = run_demo(out, variants=(VARIANTS[0], VARIANTS[2], VARIANTS[4]), epochs=8)
    assert torch.equal(state, torch.get_rng_state())
    return comparison, out


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_every_network_has_the_same_frobenius_norms(variant):
    network = train_variant(variant, load_data("digits", limit=64), seed=3, epochs=1)
    norms = [float(view.matrix.norm()) for view in read_layers(network).views]
    assert norms == pytest.approx([math.sqrt(2 * m) for m in (256, 256, 10)], rel=1e-5)


def test_training_is_deterministic_and_depends_on_the_seed():
    data = load_data("digits", limit=64)
    a, b, c = (train_variant(VARIANTS[1], data, seed=seed, epochs=1).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a)


def test_low_rank_networks_have_that_rank(demo):
    comparison, _ = demo
    assert [layer.rank for layer in comparison.networks[1].audit.layers] == [8, 8, 10]
    assert "low-rank pair" in comparison.networks[1].audit.layers[0].kind


def test_pages_pictures_and_audits_are_written(demo):
    comparison, out = demo
    page = (out / "report.html").read_text()
    assert [network.name for network in comparison.networks] == ["dense", "rank 8", "row-sparse"]
    for network, folder in zip(comparison.networks, ("dense", "rank-8", "row-sparse"), strict=True):
        assert f'href="{folder}/report.html"' in page
        assert Audit.load(out / folder / "audit.json") == network.audit
        assert network.name in (out / folder / "report.html").read_text()
    assert (out / "story.png").read_bytes().startswith(b"\x89PNG")
    assert "http://" not in page.replace("http://www.w3.org", "")
    page = html.unescape(page)
    headline = comparison_lines(comparison)[0].replace(" %", "\N{NO-BREAK SPACE}%")
    assert page.index(headline) < page.index("<svg")


def test_bounds_hold_for_every_network(demo):
    for network in demo[0].networks:
        for p in (2.0, math.inf):
            assert network.lower(p) <= network.upper(p)


def test_words_follow_the_numbers(demo):
    dense, other, _ = demo[0].networks
    e = dense.audit.norm(math.inf).evaluation
    weaker = with_parts(dense.audit, math.inf, evaluation=replace(e, robust_correct=e.robust_correct // 2))
    lost, n = tuple(range(20)), len(e.samples)
    for verdicts, fragile in (((lost, ()), 1), (((), ()), 0)):
        paired = (Paired("robust", math.inf, e.eps, n, *verdicts), Paired("robust", 2.0, 0.3, n, (), ()))
        worse = replace(dense, name="worse", audit=weaker, paired=paired)
        lines = comparison_lines(Comparison((dense, worse, replace(other, paired=()))))
        assert f"{'1' if fragile else 'none'} of them is clearly more fragile" in lines[0]
        assert ("more fragile in ℓ∞" in lines[2]) == bool(fragile)
        assert "not clearly different in ℓ₂" in lines[2]


def test_every_network_is_tested_against_the_dense_one(demo):
    dense, *others = demo[0].networks
    assert dense.paired == ()
    assert [[test.p for test in network.paired if test.kind == "robust"] for network in others] == [[math.inf, 2.0]] * 2
    assert all(network.size is not None for network in demo[0].networks)
    assert [row.name for row in demo[0].layers] == ["1", "3", "5"]
