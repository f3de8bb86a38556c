"""Networks side by side: audited alike, paired sample by sample, whatever their order."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import brittle
from brittle.evaluation import run as running
from brittle.results import Audit
from helpers.networks import few, linear, mlp, seeded, untouched

PGD = brittle.Threat(partial(brittle.pgd, steps=3))
N = 24


def pruned() -> nn.Module:
    """The small network with narrower hidden layers: neurons taken out without a repair."""
    net = copy.deepcopy(mlp())
    kept = net[1].weight.abs().sum(1).topk(10).indices.sort().values
    for place, axis in ((1, 0), (3, 1)):
        net[place].weight = nn.Parameter(net[place].weight.detach().index_select(axis, kept))
    net[1].bias = nn.Parameter(net[1].bias.detach()[kept])
    return net


def compared(models, names, **further):
    return brittle.compare(models, few(N), PGD, names=names, p=(math.inf,), eps=0.1, **further)


@pytest.fixture(scope="module")
def three():
    """The network, itself once more, and its pruned form."""
    return compared([mlp(), mlp(), pruned()], ["net", "again", "pruned"])


def test_a_network_beside_itself_differs_in_nothing(three):
    net, again, _ = three.networks
    assert [test.kind for test in again.paired] == ["clean", "robust", "certified"]
    for test in again.paired:
        assert (test.lost, test.won, test.p_value) == ((), (), 1.0)
    assert again.audit.layers == net.audit.layers
    assert again.audit.norms == net.audit.norms
    assert again.size == net.size
    assert (again.upper(math.inf), again.alignment(math.inf)) == (net.upper(math.inf), net.alignment(math.inf))


def test_pairs_are_the_verdicts_of_the_audits(three):
    net, _, pruned_net = three.networks
    verdicts = [
        {s.index: s.clean_prediction == s.label and s.attack is None for s in network.evaluations[0].samples}
        for network in (net, pruned_net)
    ]
    robust = pruned_net.test("robust", math.inf)
    assert robust.n == N
    assert set(robust.lost) == {index for index in range(N) if verdicts[0][index] and not verdicts[1][index]}
    assert set(robust.won) == {index for index in range(N) if verdicts[1][index] and not verdicts[0][index]}
    x, y = few(N)
    right = [(network(x).argmax(1) == y).tolist() for network in (mlp(), pruned())]
    clean = pruned_net.test("clean")
    assert clean.lost == tuple(index for index in range(N) if right[0][index] and not right[1][index])
    assert clean.lost


def test_the_order_of_networks_changes_none_of_their_numbers(three):
    stages = set()
    execution = brittle.Execution(progress=lambda stage, *_: stages.add(stage))
    turned = compared([pruned(), mlp()], ["pruned", "net"], execution=execution)
    assert {"pruned: ℓ∞ attack", "net: ℓ∞ attack", "latency"} <= stages
    for network in turned.networks:
        before = next(each for each in three.networks if each.name == network.name)
        assert network.audit == before.audit
        assert network.evaluations[0].samples == before.evaluations[0].samples
        assert network.size == before.size
    forth, back = three.networks[2].test("robust", math.inf), turned.networks[1].test("robust", math.inf)
    assert (forth.lost, forth.won) == (back.won, back.lost)


def test_sizes_and_times_are_measured_of_all(three):
    net, _, small = (network.size for network in three.networks)
    assert net.parameters == sum(parameter.numel() for parameter in mlp().parameters())
    assert (net.macs, small.macs) == (64 * 32 + 32 * 24 + 24 * 10, 64 * 10 + 10 * 24 + 24 * 10)
    assert small.bytes == 4 * small.parameters
    assert {(row.network, row.batch_size) for row in three.latency} == {
        (name, size) for name in ("net", "again", "pruned") for size in (1, 64)
    }
    assert three.not_measured == ()


def test_layers_are_side_by_side(three):
    assert [row.name for row in three.layers] == ["1", "3", "5"]
    assert [row.layers[2].shape for row in three.layers] == [(10, 64), (24, 10), (10, 24)]


def test_audits_stand_in_for_their_networks(three):
    saved = Audit.from_json(three.networks[2].audit.to_json()).with_samples(three.networks[2].audit.samples_frame())
    mixed = compared([mlp(), saved], ["net", "pruned"])
    assert mixed.networks[1].paired == three.networks[2].paired
    assert mixed.networks[1].size is None
    assert [item.name for item in mixed.not_measured] == ["size and latency of pruned"]
    bare = brittle.compare([three.networks[0].audit, Audit.from_json(three.networks[2].audit.to_json())])
    assert [network.name for network in bare.networks] == ["net", "pruned"]
    assert bare.networks[1].paired == ()
    assert "without its samples" in bare.not_measured[0].reason


def test_networks_are_left_bit_equal_and_data_may_be_batches():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Dropout(0.5)).train()
    batches = DataLoader(TensorDataset(*few(6)), batch_size=4, shuffle=True)
    with untouched(net):
        comparison = brittle.compare([net, net], batches, PGD, p=(2.0,), eps={2.0: 0.2})
    assert [network.name for network in comparison.networks] == ["Sequential (1)", "Sequential (2)"]
    assert comparison.networks[0].evaluations[0].n == 6
    assert comparison.networks[1].test("clean").p_value == 1.0


def test_an_interrupted_comparison_goes_on_where_it_stopped(tmp_path, monkeypatch):
    def line(scale: float) -> nn.Module:
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        with torch.no_grad():
            net[1].weight.copy_(scale * torch.linspace(-1, 1, 640).reshape(10, 64))
            net[1].bias.zero_()
        return net

    real, attacked = running.worst_case, []

    def interrupted(*arguments, **options):
        attacked.append(options["ids"])
        if len(attacked) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(running, "worst_case", interrupted)
    execution = brittle.Execution(resume=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        brittle.compare([line(1.0), line(2.0)], few(8), PGD, p=(2.0,), execution=execution)
    brittle.compare([line(1.0), line(2.0)], few(8), PGD, p=(2.0,), execution=execution)
    assert len(attacked) == 3  # the first network's samples once, the second's twice


def test_without_data_weights_are_compared():
    comparison = brittle.compare([mlp(), pruned()], names=["a", "b"], input_shape=(1, 8, 8))
    assert comparison.networks[1].clean is None
    assert comparison.networks[1].size.macs == 64 * 10 + 10 * 24 + 24 * 10
    assert comparison.latency == ()
    assert {item.reason for item in comparison.not_measured} >= {"no data given"}


# What cannot be compared


def test_other_classes_and_inputs_are_refused_before_anything_is_attacked():
    def never(model, x, y, *, eps, p):
        raise AssertionError("attacked")

    data, threat = (few(4)[0], torch.tensor([0, 1, 2, 3])), brittle.Threat(never)
    other = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 5)))
    with pytest.raises(brittle.InputError, match=r"same number of classes; got 10 \(net\) and 5 \(other\)"):
        brittle.compare([mlp(), other], data, threat, names=["net", "other"])
    with pytest.raises(brittle.InputError, match="narrow: data: the model cannot run on inputs of shape"):
        brittle.compare([mlp(), linear()], data, threat, names=["net", "narrow"])


@pytest.mark.parametrize(
    ("models", "names", "said"),
    [
        ([], None, "at least two networks; got 0"),
        ([mlp()], None, "at least two networks; got 1"),
        ([mlp(), "net.pt"], None, "got str"),
        ([mlp(), mlp()], ["a"], "2 different names"),
        ([mlp(), mlp()], ["a", "a"], "2 different names"),
        ([mlp(), mlp()], ["a", ""], "2 different names"),
    ],
)
def test_unusable_arguments_are_named(models, names, said):
    with pytest.raises(brittle.InputError, match=said):
        brittle.compare(models, names=names)


def test_data_that_can_be_read_once_are_refused():
    with pytest.raises(brittle.InputError, match="once for every network"):
        brittle.compare([mlp(), mlp()], iter([few(4)]), PGD)


def test_data_that_come_in_another_order_each_time_are_refused():
    class Turning:
        times = 0

        def __iter__(self):
            self.times += 1
            yield tuple(part.roll(self.times, 0) for part in few(6))

    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(brittle.InputError, match="same data"):
        brittle.compare([net, net], Turning(), brittle.Threat(brittle.fgsm), p=(2.0,))
