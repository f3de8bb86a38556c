"""Bounds of two convolutions in l2, against explicit matrices and patterns."""

from __future__ import annotations

import functools
import itertools
import math
import random
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from brittle.bounds.pairs import conv as pair_conv
from brittle.bounds.pairs import two as pair_two
from brittle.errors import InputError
from brittle.linear.conv_geometry import ConvGeometry

CONVS = [nn.Conv1d, nn.Conv2d, nn.Conv3d]
SLACK = 1 + 1e-9


class Case(NamedTuple):
    """Two random convolutions that chain, on a tiny image, and the matrices that they are."""

    second: nn.Module
    first: nn.Module
    size: tuple[int, ...]
    A2: np.ndarray
    A1: np.ndarray

    def uppers(self, steps=0):
        return upper_of(self.second, self.first, self.size, steps)

    @property
    def largest(self):
        return largest(self.A2, self.A1)


def upper_of(second, first, size, steps=0):
    layers = [(layer.weight, ConvGeometry.of(layer)) for layer in (second, first)]
    return pair_conv.upper(*layers[0], *layers[1], size, steps=steps)


def explicit(module, size):
    """The matrix of a convolution, and the size of its output."""
    x = torch.zeros(1, module.in_channels, *size, dtype=torch.float64)
    y = module(x)
    J = torch.autograd.functional.jacobian(module, x)
    return J.reshape(y.numel(), x.numel()).numpy(), tuple(y.shape[2:])


def norm(A):
    return np.linalg.svd(A, compute_uv=False)[..., 0]


def largest(A2, A1, seed=0):
    """The largest ``||A2 D A1||`` over all patterns of up to 10 entries, else over random and searched ones."""
    h = len(A1)
    if h <= 10:
        patterns = np.array(list(itertools.product([0.0, 1.0], repeat=h)))
        return float(norm((A2 * patterns[:, None]) @ A1).max())
    patterns = np.random.default_rng(seed).integers(0, 2, (20, h)).astype(float)
    searched = pair_two.lower(torch.from_numpy(A2), torch.from_numpy(A1))
    return max(searched, float(norm((A2 * patterns[:, None]) @ A1).max()), float(norm(A2 @ A1)))


def convolution(rng, axes, channels, out, kernel=None):
    groups = rng.choice([g for g in (1, 2, 3) if channels % g == 0 and out % g == 0])
    conv = CONVS[axes - 1](
        channels,
        out,
        kernel or [rng.choice([1, 2, 3]) for _ in range(axes)],
        stride=[rng.choice([1, 1, 2, 3]) for _ in range(axes)],
        padding=[rng.choice([0, 1, 2]) for _ in range(axes)],
        dilation=[rng.choice([1, 1, 2]) for _ in range(axes)],
        groups=groups,
    ).double()
    kind = rng.choice(["as drawn", "positive", "sparse", "signs", "scaled rows"])
    with torch.no_grad():
        K = conv.weight
        if kind == "positive":
            K.abs_()
        elif kind == "sparse":
            K.mul_(torch.rand_like(K) < 0.5)
        elif kind == "signs":
            K.sign_()
        elif kind == "scaled rows":
            K.mul_(torch.logspace(0, -2, len(K)).view(-1, *[1] * (K.ndim - 1)))
    return conv.requires_grad_(False)


def build(seed, axes=None, kernel=None):
    """A random case, or None when the image does not hold the kernels or the matrices are too large."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    axes = axes or rng.choice([1, 1, 2, 2, 2, 3])
    size = tuple(rng.randint(1, {1: 9, 2: 6, 3: 3}[axes]) for _ in range(axes))
    channels = [rng.choice([1, 2, 3, 4]) for _ in range(3)]
    first = convolution(rng, axes, channels[0], channels[1], kernel)
    second = convolution(rng, axes, channels[1], channels[2], kernel)
    try:
        A1, middle = explicit(first, size)
        A2, _ = explicit(second, middle)
    except RuntimeError:
        return None
    return Case(second, first, size, A2, A1) if max(*A1.shape, *A2.shape) <= 150 else None


def build_all(seeds, **kwargs):
    return [case for seed in seeds if (case := build(seed, **kwargs)) is not None]


CASES = build_all(range(240))
LARGEST = [case.largest for case in CASES]


@functools.cache
def uppers_of_all():
    return [case.uppers() for case in CASES]


def test_cases_are_varied():
    layers = [layer for case in CASES for layer in (case.first, case.second)]
    assert len(CASES) >= 120
    for name in ("stride", "padding", "dilation"):
        assert any(len(set(getattr(layer, name))) > 1 for layer in layers)
    assert sum(layer.groups > 1 for layer in layers) > 30
    assert sum(len(case.A1) <= 10 for case in CASES) > 30


def test_no_pattern_exceeds_a_bound():
    for case, attained, uppers in zip(CASES, LARGEST, uppers_of_all(), strict=True):
        assert uppers.keys() <= {"product", "half", "multipliers"}
        for name, upper in uppers.items():
            assert attained <= upper * SLACK, (name, case.first, case.second, case.size)


def test_bounds_improve_on_the_product():
    ratios = {}
    for attained, uppers in zip(LARGEST, uppers_of_all(), strict=True):
        if attained > 0:
            for name, upper in [*uppers.items(), ("best", min(uppers.values()))]:
                ratios.setdefault(name, []).append(upper / attained)
    medians = {name: float(np.median(values)) for name, values in ratios.items()}
    assert medians["best"] <= medians["multipliers"] <= medians["half"] <= 1.6
    assert medians["best"] < medians["product"] - 0.1


def test_multipliers_are_hardly_ever_worse_than_half():
    """A closed form may be; then the least of the bounds is the half bound."""
    ratios = [bounds["multipliers"] / bounds["half"] for bounds in uppers_of_all() if bounds.get("multipliers")]
    assert np.quantile(ratios, 0.9) <= 1.01
    assert max(ratios) <= 1.1


def test_optimised_multipliers_are_no_worse():
    optimised = [(case.largest, bounds) for case in CASES[:40] if "multipliers" in (bounds := case.uppers(steps=20))]
    assert len(optimised) > 10
    for largest, bounds in optimised:
        assert bounds["optimised multipliers"] <= bounds["multipliers"] * SLACK
        assert largest <= bounds["optimised multipliers"] * SLACK


@pytest.mark.parametrize("scale", [-1.0, 1e-150, 1e120])
def test_scale_does_not_matter(scale):
    case = next(case for case in CASES if case.A1.any() and case.A2.any())
    layers = [(layer.weight, ConvGeometry.of(layer)) for layer in (case.second, case.first)]
    one = pair_conv.upper(*layers[0], *layers[1], case.size)
    scaled = pair_conv.upper(*layers[0], scale * layers[1][0], layers[1][1], case.size)
    assert scaled == {name: pytest.approx(bound * abs(scale), rel=1e-9) for name, bound in one.items()}


def plain(out, channels, kernel, seed=0, axes=2, **kwargs):
    torch.manual_seed(seed)
    return CONVS[axes - 1](channels, out, kernel, bias=False, **kwargs).double().requires_grad_(False)


@pytest.mark.parametrize("seed", range(4))
def test_single_taps_are_the_matrices(seed):
    first, second = plain(5, 3, 1, seed), plain(4, 5, 1, seed + 10)
    W2, W1 = second.weight.flatten(1), first.weight.flatten(1)
    bounds, dense = upper_of(second, first, (6, 5), steps=20), pair_two.upper(W2, W1, steps=20)
    assert bounds["half"] == pytest.approx(dense["half"], rel=1e-8)
    assert pair_two.exact(W2, W1) <= min(bounds.values()) * SLACK
    assert min(bounds.values()) == pytest.approx(min(dense.values()), rel=0.02)


@pytest.mark.parametrize("seed", range(3))
def test_full_padding_and_symmetric_kernels(seed):
    """Symmetric kernels on images that are padded in full, so that every tap meets every pixel."""
    pair = [plain(2, 2, 3, seed + k, padding=2) for k in range(2)]
    for layer in pair:
        layer.weight.add_(layer.weight.clone().flip(2, 3))
    A1, middle = explicit(pair[0], (5, 5))
    A2, _ = explicit(pair[1], middle)
    true = largest(A2, A1)
    assert true * (1 - 1e-9) <= min(upper_of(pair[1], pair[0], (5, 5)).values()) <= 1.7 * true


def test_a_strided_second_convolution_may_be_taken_as_rows():
    """The torus that counts every second position is tighter than all rows, and both hold."""
    strided, ratios = (
        [case for case in CASES if max(case.second.stride) > 1 and case.A2.any() and case.A1.any()][:15],
        [],
    )
    tight = [case.uppers() for case in strided]
    for case, one in zip(strided, tight, strict=True):
        pair, scale = pair_conv.ConvPair.of(
            case.second.weight, ConvGeometry.of(case.second), case.first.weight, ConvGeometry.of(case.first), case.size
        )
        ones = [1] * len(case.size)
        rows = pair_conv._symbol_bounds(*pair.symbols(ones, pair.torus(ones)), 0)
        assert case.largest <= min(scale * bound for bound in rows.values()) * SLACK
        ratios.append(one["half"] / (scale * rows["half"]))
    assert np.median(ratios) < 1


def test_without_the_means_only_the_product_is_left(monkeypatch):
    monkeypatch.setattr(pair_conv, "MOST_MULTIPLICATIONS", 0)
    assert CASES[0].uppers().keys() == {"product"}


@pytest.mark.parametrize("zero", [0, 1])
def test_zero_kernels_have_bound_zero(zero):
    pair = [plain(2, 3, 3), plain(3, 2, 3)]
    pair[zero].weight.zero_()
    assert set(upper_of(*pair, (7, 7)).values()) == {0.0}


def test_channels_that_never_meet():
    first, second = plain(2, 2, 3, padding=1), plain(2, 2, 3, padding=1)
    first.weight[0] = 0
    second.weight[:, 1] = 0
    bounds = upper_of(second, first, (4, 4))
    assert min(bounds.values()) == pytest.approx(0, abs=1e-9)
    assert bounds["product"] > 0


def test_single_precision_agrees():
    pair = [plain(2, 3, 3), plain(3, 2, 3)]
    one = min(upper_of(*pair, (7, 7)).values())
    assert min(upper_of(*[layer.float() for layer in pair], (7, 7)).values()) == pytest.approx(one, rel=1e-3)


def test_other_padding_is_refused_unless_there_is_none():
    first, second = plain(2, 2, 3, padding=1, padding_mode="circular"), plain(2, 2, 3, padding=1)
    with pytest.raises(InputError, match="geometry1: expected zero padding; got circular"):
        upper_of(second, first, (5, 5))
    with pytest.raises(InputError, match="geometry2: expected zero padding; got circular"):
        upper_of(first, second, (5, 5))
    bare = plain(2, 2, 3, padding_mode="circular")
    assert upper_of(second, bare, (5, 5)) == upper_of(second, plain(2, 2, 3), (5, 5))


@pytest.mark.parametrize(
    ("second", "first", "size", "message"),
    [
        (plain(2, 2, 3), plain(3, 2, 3), (9, 9), "K1: expected 2 output channels, as the second.*; got 3"),
        (plain(2, 2, 3), plain(2, 2, 3, axes=1), (9,), r"K2: expected a real kernel .*axes as in K1; got \(2, 2, 3, 3"),
        (plain(2, 2, 3), plain(2, 2, 3), (9,), r"size: expected 2 positive numbers.*; got \(9,\)"),
        (plain(2, 2, 3), plain(2, 2, 3), (9, 0), r"size: expected 2 positive numbers.*; got \(9, 0\)"),
        (plain(2, 2, 3), plain(2, 2, 3), (4, 4), r"size: expected an input that both kernels fit on; got \(4, 4\)"),
        (plain(2, 2, 3), plain(2, 2, 3), (2, 2), "size: expected an input that both kernels fit on"),
    ],
)
def test_layers_are_checked(second, first, size, message):
    with pytest.raises(InputError, match=message):
        upper_of(second, first, size)


def test_numbers_are_checked():
    layer, broken = plain(2, 2, 3), plain(2, 2, 3)
    broken.weight[0, 0, 0, 0] = math.nan
    with pytest.raises(InputError, match="K1: expected finite numbers; got 1 NaN or infinite"):
        upper_of(layer, broken, (9, 9))
    with pytest.raises(InputError, match="K2: expected finite numbers"):
        upper_of(broken, layer, (9, 9))
    with pytest.raises(InputError, match="geometry2: expected 2 axes, groups that divide 2 filters"):
        pair_conv.upper(
            layer.weight, ConvGeometry((1,), ((0, 0),), (1,), 1), layer.weight, ConvGeometry.of(layer), (9, 9)
        )
