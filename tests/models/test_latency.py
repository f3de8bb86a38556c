"""Latency: rows, order and manners; how long anything takes is no matter of tests."""

import pytest
import torch
from torch import nn

from brittle.errors import InputError
from brittle.models.latency import WARM_UP, latency
from brittle.results import Latency
from brittle.results.checks import check
from helpers.networks import convnet, untidy, untouched


class Called(nn.Module):
    """Writes down every call."""

    def __init__(self, name, calls):
        super().__init__()
        self.name, self.calls = name, calls

    def forward(self, x):
        self.calls.append((self.name, len(x), tuple(x.shape[1:])))
        return x


def test_networks_take_turns_and_the_warm_up_comes_on_top():
    calls = []
    rows = latency({n: Called(n, calls) for n in "ab"}, (2, 3), batch_sizes=(1, 5), rounds=4)
    assert {size for _, size, _ in calls} == {1, 5}
    assert {shape for _, _, shape in calls} == {(2, 3)}
    assert len(calls) == 2 * 2 * (4 + WARM_UP)
    rounds = [{calls[k][0], calls[k + 1][0]} for k in range(0, len(calls), 2)]
    assert rounds == [{"a", "b"}] * len(rounds), "every round runs each once"
    assert {calls[k][0] for k in range(0, len(calls), 2)} == {"a", "b"}, "each starts now and then"
    assert [(row.network, row.batch_size) for row in rows] == [("a", 1), ("b", 1), ("a", 5), ("b", 5)]


def test_rows_say_what_was_measured_and_where():
    (row,) = latency({"net": convnet()}, (1, 8, 8), batch_sizes=(2,), rounds=3)
    check(row, "row")
    assert (row.rounds, row.threads) == (3, torch.get_num_threads())
    assert row.device
    assert 0 < row.median <= row.p90
    assert row.processor > 0


@pytest.mark.parametrize(("times", "median", "p90"), [((3, 1, 2), 2, 3), (tuple(range(1, 21)), 10, 18)])
def test_quantiles_are_times_that_were_taken(times, median, p90, monkeypatch):
    marks = iter([mark for time in (*[0] * WARM_UP, *times) for mark in (0.0, time / 1000)])
    monkeypatch.setattr("time.perf_counter", lambda: next(marks))
    (row,) = latency({"net": nn.Identity()}, (2,), batch_sizes=(1,), rounds=len(times))
    assert (row.median, row.p90) == (median, p90)


def test_the_network_comes_back_as_it_was():
    net = untidy()
    with untouched(net):
        latency({"net": net}, (1, 8, 8), batch_sizes=(1,), rounds=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rounds": 0}, "rounds: expected at least 1; got 0"),
        ({"batch_sizes": (0,)}, "batch_sizes: expected at least 1"),
        ({"device": "nowhere"}, "device: expected one that is there; got 'nowhere'"),
        ({"x_shape": (3, 8, 8)}, "net: expected a network for inputs"),
    ],
)
def test_what_cannot_be_measured_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        latency(**{"models": {"net": convnet()}, "x_shape": (1, 8, 8), "rounds": 1} | change)


@pytest.mark.parametrize("change", [{"median": 2.0}, {"rounds": 0}, {"p90": float("inf")}, {"processor": -1.0}])
def test_times_that_cannot_be_are_refused(change):
    row = {"network": "a", "batch_size": 1, "median": 0.5, "p90": 1.0, "rounds": 3, "device": "cpu", "threads": 1}
    check(Latency(**row), "row")
    with pytest.raises(InputError, match="row"):
        check(Latency(**row | change), "row")
