"""Networks side by side as frozen results: pairs of verdicts, layers by name, and what a file may hold."""

import json
from dataclasses import replace

import pytest
from scipy.stats import binomtest

from brittle.errors import InputError
from brittle.results import (
    Audit,
    ComparedNetwork,
    Comparison,
    Latency,
    NetworkSize,
    mcnemar,
)
from brittle.results.comparison import check_alike, paired_verdicts
from brittle.results.reading import read_result
from helpers.audits import INF, VERDICTS, full, layer, norm_result, with_parts, with_verdicts


def compared(*audits: Audit) -> Comparison:
    networks = [ComparedNetwork("first", audits[0], NetworkSize(10, 20, 40))]
    networks += [
        ComparedNetwork(f"other {i}", audit, None, paired_verdicts(audits[0].norms, audit.norms))
        for i, audit in enumerate(audits[1:])
    ]
    return Comparison(tuple(networks), latency=(Latency("first", 1, 0.5, 0.6, 30, "cpu", 1),), about=("Once.",))


# The paired test


def test_the_test_is_the_exact_binomial_one():
    """Every small case, and large ones, against scipy's sum of probabilities."""
    cases = [(lost, won) for lost in range(14) for won in range(14)] + [(300, 250), (0, 700), (5000, 4800), (1, 40)]
    for lost, won in cases:
        expected = binomtest(lost, lost + won).pvalue if lost + won else 1.0
        assert mcnemar(lost, won) == pytest.approx(expected, rel=1e-9), (lost, won)
        assert mcnemar(lost, won) == mcnemar(won, lost)


def test_the_same_verdicts_lose_and_win_nothing():
    for test in paired_verdicts(with_verdicts(1).norms, with_verdicts(1).norms):
        assert (test.lost, test.won, test.p_value, test.clear, test.points) == ((), (), 1.0, False, 0.0)


@pytest.mark.parametrize("seed", range(3))
def test_lost_and_won_are_what_the_accuracies_differ_by(seed):
    first, other = with_verdicts(seed), with_verdicts(seed + 10)
    tests = {(test.kind, test.p): test for test in paired_verdicts(first.norms, other.norms)}
    assert tests.keys() == {("clean", None), *((kind, p) for kind in ("robust", "certified") for p in (INF, 2.0))}
    for (kind, p), test in tests.items():
        e, f = first.norm(p or INF).evaluation, other.norm(p or INF).evaluation
        if kind != "certified":
            field = f"{kind}_correct"
            assert len(test.won) - len(test.lost) == getattr(f, field) - getattr(e, field)
            assert test.n == VERDICTS
        else:  # proofs were searched for on every other sample
            assert test.n == VERDICTS / 2
            assert not any(index % 2 for index in (*test.lost, *test.won))
        assert test.lost
        assert test.won


def test_the_other_way_round_lost_is_won():
    first, other = with_verdicts(3), with_verdicts(4)
    forth, back = paired_verdicts(first.norms, other.norms), paired_verdicts(other.norms, first.norms)
    assert [(test.lost, test.won) for test in forth] == [(test.won, test.lost) for test in back]


def test_without_samples_nothing_is_paired():
    assert paired_verdicts(full().norms, with_verdicts(1).norms) == ()


# Layers by name


def named(*names: str, rows: int = 6) -> Audit:
    """An audit without data whose layers have these names."""
    return replace(full(), norms=(norm_result(),), layers=tuple(layer(name, rows, 8) for name in names))


def names_of(comparison: Comparison) -> dict[str, list[str | None]]:
    return {row.name: [each and each.name for each in row.layers] for row in comparison.layers}


def test_layers_are_matched_by_name_whatever_their_shapes():
    comparison = compared(named("a", "b", "c"), named("b", "c", "d", rows=3), named("c", "e"))
    assert names_of(comparison) == {
        "a": ["a", None, None],
        "b": ["b", "b", None],
        "c": ["c", "c", "c"],
        "d": [None, "d", None],
        "e": [None, None, "e"],
    }
    assert comparison.layers[1].layers[1].shape == (3, 8)


def test_a_prefix_that_all_names_share_does_not_keep_layers_apart():
    run, bare = named("model.1", "model.3"), named("1", "3")
    assert names_of(compared(bare, run)) == {"1": ["1", "model.1"], "3": ["3", "model.3"]}
    assert names_of(compared(run, bare)) == {"model.1": ["model.1", "1"], "model.3": ["model.3", "3"]}
    # Where names match, none is shortened.
    parts = named("body.1", "body.2"), named("body.1", "body.2", "head")
    assert names_of(compared(*parts))["body.1"] == ["body.1", "body.1"]


def test_a_low_rank_pair_stands_for_its_layer():
    dense, low = named("model.1", "model.3"), named("model.1.0", "model.3")
    pair = replace(low.layers[0], kind="Linear (low-rank pair, rank 2)")
    low = replace(low, layers=(pair, low.layers[1]))
    expected = {"model.1": ["model.1", "model.1.0"], "model.3": ["model.3", "model.3"]}
    assert names_of(compared(dense, low)) == expected
    assert names_of(compared(low, dense)) == {name: each[::-1] for name, each in expected.items()}
    # A layer that is no pair keeps its name.
    assert names_of(compared(named("a"), named("a.0"))) == {"a": ["a", None], "a.0": [None, "a.0"]}


def test_the_frame_has_a_row_a_layer_and_network():
    frame = compared(named("a", "b"), named("b")).to_frame()
    assert list(zip(frame.network, frame.name, strict=True)) == [("first", "a"), ("first", "b"), ("other 0", "b")]


# Files


def test_a_comparison_comes_back_equal(tmp_path):
    comparison = compared(with_verdicts(1), with_verdicts(2))
    comparison.save(tmp_path / "comparison.json")
    assert Comparison.load(tmp_path / "comparison.json") == comparison
    for path in (tmp_path, tmp_path / "comparison.json"):
        assert read_result(path) == comparison


def test_what_a_file_or_folder_holds_is_told_without_being_named(tmp_path):
    full().save(tmp_path / "audit.json")
    for path in (tmp_path, tmp_path / "audit.json"):
        assert read_result(path) == full()
    compared(with_verdicts(1), with_verdicts(2)).save(tmp_path / "comparison.json")
    with pytest.raises(InputError, match=r"^result: expected .* one of .*; got audit.json and comparison.json in"):
        read_result(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"^result: expected .* one of .*; got none of them in"):
        read_result(tmp_path / "empty")


def changed(comparison: Comparison, **fields) -> Comparison:
    """With other fields of the second network's verdicts without attack."""
    first, other = comparison.networks
    clean, *rest = other.paired
    return replace(comparison, networks=(first, replace(other, paired=(replace(clean, **fields), *rest))))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"lost": (3, 2)}, "rising"),
        ({"lost": (2, 2)}, "rising"),
        ({"won": (-1,)}, "at least 0"),
        ({"lost": (1,), "won": (1,)}, "either lost or won"),
        ({"n": 1}, "at most 1 samples"),
        ({"kind": "lucky"}, "kind of"),
        ({"p": 2.0}, "p and eps"),
    ],
)
def test_verdicts_that_cannot_be_are_refused(fields, said):
    with pytest.raises(InputError, match=said):
        Comparison.from_json(changed(compared(with_verdicts(1), with_verdicts(2)), **fields).to_json())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d["networks"][1].update(name="first"), "different names"),
        (lambda d: d["networks"][0].update(paired=d["networks"][1]["paired"]), "first network against itself"),
        (lambda d: d["networks"].clear(), "one at least"),
        (lambda d: d["networks"][1]["audit"]["signature"].update(data="00" * 32), "the same data"),
        (lambda d: d["networks"][1]["audit"]["norms"].pop(), "budgets of the audit"),
        (lambda d: (d["networks"][1]["audit"]["norms"].pop(), d["networks"][1]["paired"].clear()), "same norms"),
        (lambda d: d["latency"][0].update(network="another"), "times of these networks"),
        (lambda d: d["networks"][0]["size"].update(bytes=-1), "size"),
        (lambda d: d["networks"][1]["paired"].append(d["networks"][1]["paired"][0]), "once"),
        (lambda d: d.update(schema_version=9), "schema_version"),
    ],
)
def test_comparisons_that_cannot_be_are_refused(change, said):
    document = json.loads(compared(with_verdicts(1), with_verdicts(2)).to_json())
    change(document)
    with pytest.raises(InputError, match=said):
        Comparison.from_json(json.dumps(document))


def test_audits_of_other_data_or_budgets_cannot_stand_side_by_side():
    check_alike([("a", full()), ("b", full())])
    other_data = replace(full(), signature=replace(full().signature, data="00" * 32))
    weaker = with_parts(full(), 2.0, eps=0.25)
    for audit, said in ((other_data, "same data; got cdcdcdcdcdcd .a. and 000000000000 .b."), (weaker, "same budgets")):
        with pytest.raises(InputError, match=said):
            check_alike([("a", full()), ("b", audit)])


# Samples of an audit from their file


def test_samples_come_back_as_they_were(tmp_path):
    audit = with_verdicts(5)
    audit.save(tmp_path / "audit.json")
    audit.samples_frame().to_parquet(tmp_path / "samples.parquet", index=False)
    loaded = Audit.load(tmp_path / "audit.json", tmp_path / "samples.parquet")
    assert [norm.evaluation.samples for norm in loaded.norms] == [norm.evaluation.samples for norm in audit.norms]
    assert not Audit.load(tmp_path / "audit.json").norms[0].evaluation.samples


def test_samples_of_another_audit_are_refused(tmp_path):
    audit, other = with_verdicts(5), with_verdicts(6)
    for frame in (other.samples_frame(), audit.samples_frame()[1:], audit.samples_frame().assign(index=0)):
        with pytest.raises(InputError, match="samples: expected those of the audit"):
            audit.with_samples(frame)
    with pytest.raises(InputError, match="columns"):
        audit.with_samples(audit.samples_frame().drop(columns="label"))
    with pytest.raises(InputError, match="numbers"):
        audit.with_samples(audit.samples_frame().assign(label="x"))
    (tmp_path / "samples.parquet").write_bytes(b"no parquet")
    audit.save(tmp_path / "audit.json")
    with pytest.raises(InputError, match="Parquet"):
        Audit.load(tmp_path / "audit.json", tmp_path / "samples.parquet")
