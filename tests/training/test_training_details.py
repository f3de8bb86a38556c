"""Details of training that its documentation promises and that a slip of one character would break."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from brittle.compression.factorise import rank_map, with_pairs
from brittle.errors import InputError
from brittle.training import (
    Adversary,
    Moment,
    Recipe,
    RefreshedNuclearNorm,
    factorised,
    joint_l1,
    loop,
    snapshots,
    train,
)
from brittle.training.interventions.constraints import condition_cap, newton_schulz, spectral_cap
from helpers.networks import seeded, uniform

quiet = {"measure_every": 0}


class Masks(nn.Module):
    """Dropout that keeps what it let through; copies share the list."""

    seen: list[tuple[bool, ...]]

    def __init__(self, seen: list[tuple[bool, ...]]) -> None:
        super().__init__()
        self.dropout, self.kept = nn.Dropout(0.5), nn.Linear(4, 4)
        Masks.seen = seen

    def forward(self, x: Tensor) -> Tensor:
        """As dropout; the mask is noted in training mode alone."""
        if self.training:
            Masks.seen.append(tuple((self.dropout(torch.ones(64)) > 0).tolist()))
        return self.kept(self.dropout(x))


class Starts(nn.Module):
    """A linear network that keeps the bright inputs whose gradient is asked for; copies share the list."""

    seen: list[Tensor]

    def __init__(self, seen: list[Tensor]) -> None:
        super().__init__()
        self.linear, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        Starts.seen = seen

    def forward(self, x: Tensor) -> Tensor:
        """Linear."""
        if x.requires_grad and x.mean() > 0.5:
            Starts.seen.append(x.detach().clone())
        return self.head(self.linear(x))


def masks(seed: int) -> list[tuple[bool, ...]]:
    seen: list[tuple[bool, ...]] = []
    recipe = Recipe(epochs=3, batch_size=10, validation=0, seed=seed, **quiet)
    train(seeded(lambda: Masks(seen)), (uniform(0, 40, 4), torch.arange(40) % 4), recipe)
    return [mask for mask in seen if mask][-12:]


def test_dropout_is_drawn_anew_in_every_step_of_every_epoch_and_by_the_seed():
    """Four steps in each of three epochs; 64 fair coins agree once in 10^19 times."""
    first = masks(0)
    assert len(first) == len(set(first)) == 12
    assert masks(0) == first
    assert not set(masks(1)) & set(first)


def validation_starts(seed: int, n: int) -> Tensor:
    """Where the attacks on n equal, bright validation samples begin; the training samples are dark."""
    seen: list[Tensor] = []
    recipe = Recipe(
        epochs=1, batch_size=20, seed=seed, adversary=Adversary(0.1, steps=1), lr=1e-6, **quiet
    )  # fmt: skip
    dark, bright = uniform(0, 20, 4, high=0.2), torch.full((n, 4), 0.7)
    train(
        seeded(lambda: Starts(seen)),
        (dark, torch.arange(20) % 3),
        recipe,
        validation=(bright, torch.zeros(n, dtype=torch.int64)),
    )
    return torch.cat(seen)


def test_the_attack_on_the_validation_samples_starts_by_the_seed_and_elsewhere_for_every_sample():
    """300 of them: more than are attacked at once."""
    first = validation_starts(0, 300)
    assert first.shape == (300, 4)
    assert len(first.unique(dim=0)) == 300
    assert torch.equal(validation_starts(0, 300), first)
    assert not (validation_starts(1, 300) == first).all(1).any()


def test_the_share_that_is_attacked_weighs_the_selection():
    """The mixture of ratio r is r robust and 1 - r clean accuracy; the best epoch has the largest mixture."""
    telling = 0
    for seed in range(6):
        x, y = uniform(seed, 120, 4), torch.arange(120) % 3
        attack = Adversary(0.05, steps=1, ratio=0.1)
        recipe = Recipe(epochs=8, batch_size=20, lr=0.3, seed=seed, adversary=attack, **quiet)
        model = seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), seed)
        result = train(model, (x, y), recipe, validation=(uniform(seed + 50, 60, 4), torch.arange(60) % 3))
        mixture = [0.9 * row.validation_accuracy + 0.1 * row.validation_robust for row in result.epochs]
        assert mixture[result.epoch - 1] >= max(mixture) - 1e-12
        robust = [row.validation_robust for row in result.epochs]
        telling += robust[result.epoch - 1] < max(robust)
    assert telling  # else the robust accuracy alone would do


class Stopped(Exception):
    """What ends a training early."""


def stop_in(epoch: int) -> Callable[[Moment], None]:
    """Ends a training in that epoch; the state after the epoch before is on disk then."""

    def told(moment: Moment) -> None:
        if moment.epoch == epoch:
            raise Stopped

    return told


@pytest.mark.parametrize("shrinkage", ["row_shrinkage", "singular_shrinkage"])
def test_two_interventions_that_count_their_calls_go_on_each_from_its_own(shrinkage, tmp_path):
    """Four steps an epoch, both due at every third: after an interruption neither starts to count anew."""
    recipe = Recipe(
        epochs=3, batch_size=10, lr=0.01, validation=0, refresh=3,
        penalties={"nuclear_norm": 0.05}, constraints={shrinkage: 0.01}, **quiet,
    )  # fmt: skip
    samples = uniform(0, 40, 6), torch.arange(40) % 3
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    whole = train(model, samples, recipe)
    for epoch in (2, 3):
        with pytest.raises(Stopped):
            train(model, samples, recipe, folder=tmp_path, tell=stop_in(epoch))
        assert (tmp_path / "state.json").is_file()
    resumed = train(model, samples, recipe, folder=tmp_path)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name])


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_stopped_between_the_two_files_of_a_state_the_state_before_is_whole(seconds, tmp_path, monkeypatch):
    """Whatever lies between two states, steps or whole epochs, the tensors of the one before are not overwritten."""
    recipe = Recipe(epochs=4, batch_size=10, lr=0.1, optimizer="sgd", validation=0, **quiet)
    samples = uniform(0, 20, 6), torch.arange(20) % 3
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    whole = train(model, samples, recipe)
    monkeypatch.setattr(loop, "SAVED", seconds)
    described, states = snapshots.write_text, 0

    def stopping(path: Path, text: str) -> None:
        nonlocal states
        if path.name == snapshots.STATE:
            states += 1
            if states % 2 == 0:
                raise Stopped
        described(path, text)

    monkeypatch.setattr(snapshots, "write_text", stopping)
    for _ in range(20):
        try:
            resumed = train(model, samples, recipe, folder=tmp_path)
        except Stopped:
            continue
        break
    assert states >= 6
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name])


@pytest.mark.parametrize(("share", "rank"), [(0.04, 1), (0.34, 3), (0.36, 4), (0.96, None)])
def test_a_share_of_the_smaller_side_is_rounded_to_the_nearest_rank(share, rank):
    """A layer that would keep its full rank is left as it is."""
    model = nn.Sequential(nn.Linear(10, 13), nn.ReLU(), nn.Linear(13, 3))
    assert rank_map(factorised(model, share)) == ({} if rank is None else {"0": rank})


@pytest.mark.parametrize(
    "hook",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_a_layer_with_a_hook_of_any_kind_is_not_replaced(hook):
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    getattr(model[0], hook)(lambda *_: None)
    with pytest.raises(InputError, match="hooks"):
        factorised(model, 2)


def test_a_pair_of_another_rank_is_not_taken_for_the_one_that_was_asked_for():
    """A state dict of that rank would not fit; the network's own pair of the right rank stays."""
    model = factorised(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), 2)
    assert rank_map(with_pairs(model, {"0": 2})) == {"0": 2}
    with pytest.raises(InputError, match="low-rank pairs"):
        with_pairs(model, {"0": 3})


@pytest.mark.parametrize("square", [1.0, 2.1, 2.9, 3.5, 100.0])
@pytest.mark.parametrize("steps", [1, 3])
def test_orthogonal_rows_of_one_length_are_orthonormal_after_one_step(square, steps):
    """The largest row sum of the Gram matrix is that length's square then: from 2 on, A is divided by exactly it."""
    gram = square * torch.eye(4, dtype=torch.float64)
    T = newton_schulz(gram, steps)
    torch.testing.assert_close(T @ gram @ T.mT, torch.eye(4, dtype=torch.float64))


def test_the_drift_says_how_many_calls_the_old_factors_served():
    penalty, model = RefreshedNuclearNorm(3, layers=["0"]), nn.Sequential(nn.Linear(4, 4))
    told = []
    for _ in range(10):
        penalty(model)
        told.append(None if penalty.drift is None else penalty.drift.steps)
    assert told == [None] * 3 + [3] * 7


def test_joint_l1_composes_no_grouped_convolution():
    """Its stacked filters are not the matrix that acts, so that their product with the next layer's is none."""
    for groups in ((2, 1), (1, 2)):
        maps = nn.Conv2d(4, 4, 3, groups=groups[0]), nn.Conv2d(4, 4, 1, groups=groups[1])
        with pytest.raises(InputError, match="consecutive"):
            joint_l1(nn.Sequential(*maps), layers=["0", "1"])
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1))
    product = model[1].weight.flatten(1) @ model[0].weight.flatten(1)
    torch.testing.assert_close(joint_l1(model, layers=["0", "1"]), product.abs().sum())


def diagonal(values: list[float]) -> nn.Sequential:
    """A layer of these singular values; the values themselves are exact in single precision."""
    model = nn.Sequential(nn.Linear(len(values), len(values), bias=False), nn.ReLU(), nn.Linear(len(values), 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(values).diag())
    return model


@pytest.mark.parametrize("units", [2, 8, 30, 100, 1000])
def test_what_is_above_the_cap_by_more_than_the_stated_rounding_is_capped(units):
    """``t = 4 sqrt(m + n)`` units of rounding, here 16 of them in a matrix of 8 rows and columns."""
    unit = torch.finfo(torch.float32).eps
    model = diagonal([1 + units * unit, 1.0, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125])
    before = model[0].weight.detach().clone()
    spectral_cap(model, 1.0)
    assert float(torch.linalg.matrix_norm(model[0].weight.detach().double(), 2)) <= 1 + 16 * unit
    assert torch.equal(model[0].weight, before) == (units <= 16)


@pytest.mark.parametrize(("units", "stays"), [(0, True), (2, True), (12, True), (60, False), (1000, False)])
def test_pairs_within_the_stated_rounding_of_the_condition_number_keep_their_bits(units, stays):
    """``1 + 4 sqrt(m + n)`` units of rounding, again 16 and one."""
    unit = torch.finfo(torch.float32).eps
    model = factorised(diagonal([1.0] * 8), 2)
    with torch.no_grad():
        model[0][0].weight.copy_(torch.eye(2, 8))
        model[0][1].weight.zero_()
        model[0][1].weight[0, 0], model[0][1].weight[1, 1] = 4 * (1 + units * unit), 1.0
    before = [parameter.detach().clone() for parameter in model.parameters()]
    condition_cap(model, 4.0)
    assert all(map(torch.equal, before, model.parameters())) == stays
