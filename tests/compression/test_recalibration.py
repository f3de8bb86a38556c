"""Batch norms' statistics measured again: pooled exactly, a fixed point, and nothing else changes."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from brittle.compression import recalibrated
from brittle.errors import InputError
from helpers.branching import branching
from helpers.matrices import quick
from helpers.networks import digits, seeded, uniform, untidy, untouched
from helpers.trainings import varied

STATISTICS = ("running_mean", "running_var")


def arriving(model, x):
    """What reaches every batch norm in evaluation mode, channels first."""
    seen, hooks = {}, []

    def look(name):
        return lambda _, args: seen.update({name: args[0].transpose(0, 1).flatten(1).numpy()})

    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            hooks.append(module.register_forward_pre_hook(look(name)))
    with torch.no_grad():
        model.eval()(x)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("seed", range(4))
def test_each_norm_then_receives_its_own_statistics(seed):
    """In one batch, however the network branches: a fixed point of evaluation mode."""
    model, x = branching(seed).double(), uniform(seed, 40, 3, 8, 8, dtype=torch.float64)
    renewed = recalibrated(model, x)
    seen = arriving(renewed, x)
    assert seen
    for name, values in seen.items():
        norm = renewed.get_submodule(name)
        np.testing.assert_allclose(norm.running_mean, values.mean(1), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(norm.running_var, values.var(1), rtol=1e-9, atol=1e-12)


@quick
@given(n=st.integers(2, 40), size=st.integers(1, 50), offset=st.sampled_from([0.0, 1e4]), seed=st.integers(0, 10**6))
def test_statistics_of_the_first_norm_are_pooled_over_batches_of_any_size(n, size, offset, seed):
    """Also where the mean is large beside the deviation, where sums of squares would lose every digit."""
    x = offset + torch.randn(n, 3, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    norm = recalibrated(nn.Sequential(nn.BatchNorm2d(3).double()), x, batch_size=size)[0]
    values = x.transpose(0, 1).flatten(1).numpy()
    np.testing.assert_allclose(norm.running_mean, values.mean(1), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(norm.running_var, values.var(1), rtol=1e-9)


def test_no_batch_holds_a_single_sample():
    """33 inputs in batches of 32: a norm of features has no variance to normalise one sample by."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4), nn.Linear(4, 3), nn.BatchNorm1d(3))
    assert recalibrated(model, digits()[0][:33], batch_size=32)[4].running_var.isfinite().all()


def test_nothing_but_the_statistics_changes():
    model, x = varied(), digits()[0][:50]
    model[1].num_batches_tracked += 7
    renewed = recalibrated(model, x)
    changed = {
        name for name, tensor in renewed.state_dict().items() if not torch.equal(tensor, model.state_dict()[name])
    }
    assert changed == {f"{norm}.{name}" for norm in (1, 8) for name in STATISTICS}
    assert [module.training for module in renewed.modules()] == [module.training for module in model.modules()]


def test_the_model_is_left_bit_equal():
    x = digits()[0][:20]
    for model in (untidy(), varied().train()):
        with untouched(model):
            recalibrated(model, x)


def test_what_dropout_would_drop_is_seen():
    model = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.BatchNorm1d(64))).train()
    x = digits()[0][:30]
    torch.testing.assert_close(recalibrated(model, x)[2].running_mean, x.flatten(1).mean(0), rtol=1e-5, atol=1e-6)


def test_norms_without_statistics_and_unused_ones_are_left_alone():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain, self.unused = nn.BatchNorm1d(64, track_running_stats=False), nn.BatchNorm1d(64)
            self.group = nn.GroupNorm(4, 64)

        def forward(self, x):
            return self.group(self.plain(x.flatten(1)))

    model = Model()
    before = copy.deepcopy(model.state_dict())
    after = recalibrated(model, digits()[0][:10]).state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_wrong_inputs_are_refused():
    x = digits()[0][:10]
    for inputs, size in ((x[:0], 4), (x, 0), (x.flatten(1), 4), (x * float("nan"), 4)):
        with pytest.raises(InputError, match=r"^inputs\b"):
            recalibrated(varied(), inputs, batch_size=size)
