"""What modules read and yield is told call by call, and no hook stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from brittle.errors import InputError
from brittle.models.activations import watch_calls
from brittle.models.forward import output_of


def without_hooks(model):
    return not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_every_call_is_told_in_order_with_what_was_read_and_yielded():
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    calls = []
    x = torch.randn(2, 3)
    with watch_calls([layer, model[1], layer], lambda *call: calls.append(call)):
        y = model(x)
    assert [call[0] for call in calls] == [layer, model[1], layer]
    assert calls[0][1] is x
    assert calls[1][1] is calls[0][2]
    assert calls[2][2] is y
    assert without_hooks(model)
    model(x)
    assert len(calls) == 3


@pytest.mark.parametrize("where", ["network", "note"])
def test_no_hook_stays_after_an_error(where):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(4, 2) if where == "network" else nn.Identity())

    def note(module, read, yielded):
        if where == "note":
            raise RuntimeError

    with pytest.raises(RuntimeError), watch_calls(model, note):
        model(torch.zeros(1, 3))
    assert without_hooks(model)


class Pair(nn.Module):
    def forward(self, *, x):
        return x, x


def test_what_is_no_tensor_is_none_and_quantised_tensors_are_real_numbers():
    pair, identity = Pair(), nn.Identity()
    calls = []
    x = torch.quantize_per_tensor(torch.rand(4), 0.01, 3, torch.quint8)
    with watch_calls([pair, identity], lambda *call: calls.append(call)):
        pair(x=torch.zeros(2))
        identity(x)
    assert calls[0] == (pair, None, None)
    assert torch.equal(calls[1][1], x.dequantize())
    assert torch.equal(calls[1][2], x.dequantize())


def test_what_cannot_run_is_an_error_that_names_the_argument():
    with pytest.raises(InputError, match=r"^shape: the model cannot run on inputs of shape \(4,\): [^\n]+$"):
        output_of(nn.Linear(3, 2), torch.zeros(1, 4), "shape")


def test_running_out_of_memory_stays_what_it_is():
    def hungry(x):
        raise torch.OutOfMemoryError("no memory\nleft")

    with pytest.raises(torch.OutOfMemoryError):
        output_of(hungry, torch.zeros(1, 4))
