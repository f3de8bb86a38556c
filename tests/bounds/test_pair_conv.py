"""Alignment of two convolutions, against explicit matrices and patterns."""

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
from brittle.bounds.pairs import inf as pair_inf
from brittle.bounds.pairs import two as pair_two
from brittle.bounds.pairs.conv import conv_alignment, conv_pair_upper
from brittle.bounds.pairs.matrices import alignment
from brittle.errors import InputError
from brittle.linear.conv_geometry import ConvGeometry

CONVS = [nn.Conv1d, nn.Conv2d, nn.Conv3d]
SLACK = 1 + 1e-9
both = pytest.mark.parametrize("p", [2, math.inf])


class Case(NamedTuple):
    """Two random convolutions that chain, on a tiny image, and the matrices that they are."""

    second: nn.Module
    first: nn.Module
    size: tuple[int, ...]
    A2: np.ndarray
    A1: np.ndarray

    def uppers(self, p, steps=0):
        return upper_of(self.second, self.first, p, self.size, steps)

    @property
    def largest(self):
        return {p: largest(self.A2, self.A1, p) for p in (2, math.inf)}


def upper_of(second, first, p, size, steps=0):
    layers = [(layer.weight, ConvGeometry.of(layer)) for layer in (second, first)]
    return conv_pair_upper(*layers[0], *layers[1], p, size, steps=steps)


def explicit(module, size):
    """The matrix of a convolution, and the size of its output."""
    x = torch.zeros(1, module.in_channels, *size, dtype=torch.float64)
    y = module(x)
    J = torch.autograd.functional.jacobian(module, x)
    return J.reshape(y.numel(), x.numel()).numpy(), tuple(y.shape[2:])


def norm(A, p):
    return np.linalg.svd(A, compute_uv=False)[..., 0] if p == 2 else np.abs(A).sum(-1).max(-1)


def largest(A2, A1, p, seed=0):
    """The largest ``||A2 D A1||`` over all patterns of up to 10 entries, else over random and searched ones."""
    h = len(A1)
    if h <= 10:
        patterns = np.array(list(itertools.product([0.0, 1.0], repeat=h)))
        return float(norm((A2 * patterns[:, None]) @ A1, p).max())
    patterns = np.random.default_rng(seed).integers(0, 2, (20, h)).astype(float)
    searched = (pair_two if p == 2 else pair_inf).lower(torch.from_numpy(A2), torch.from_numpy(A1))
    return max(searched, float(norm((A2 * patterns[:, None]) @ A1, p).max()), float(norm(A2 @ A1, p)))


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
def uppers_of_all(p):
    return [case.uppers(p) for case in CASES]


def test_cases_are_varied():
    layers = [layer for case in CASES for layer in (case.first, case.second)]
    assert len(CASES) >= 120
    for name in ("stride", "padding", "dilation"):
        assert any(len(set(getattr(layer, name))) > 1 for layer in layers)
    assert sum(layer.groups > 1 for layer in layers) > 30
    assert sum(len(case.A1) <= 10 for case in CASES) > 30


@both
def test_no_pattern_exceeds_a_bound(p):
    for case, found, uppers in zip(CASES, LARGEST, uppers_of_all(p), strict=True):
        assert uppers.keys() <= {"product", "entry", "half entry", "spectral", "half", "multipliers"}
        for name, upper in uppers.items():
            assert found[p] <= upper * SLACK, (name, case.first, case.second, case.size)


def test_bounds_improve_on_the_product():
    ratios = {p: {} for p in (2, math.inf)}
    for p, kept in ratios.items():
        for found, uppers in zip(LARGEST, uppers_of_all(p), strict=True):
            if found[p] > 0:
                for name, upper in [*uppers.items(), ("best", min(uppers.values()))]:
                    kept.setdefault(name, []).append(upper / found[p])
    medians = {p: {name: float(np.median(values)) for name, values in kept.items()} for p, kept in ratios.items()}
    assert medians[2]["best"] <= medians[2]["multipliers"] <= medians[2]["half"] <= 1.6
    assert medians[2]["best"] < medians[2]["product"] - 0.1
    assert medians[math.inf]["best"] < medians[math.inf]["product"] - 0.1


def test_spectral_is_never_worse_than_half_entry():
    for bounds in uppers_of_all(math.inf):
        assert bounds.get("spectral", 0) <= bounds.get("half entry", 0) * SLACK


def test_multipliers_are_hardly_ever_worse_than_half():
    """A closed form may be; then the least of the bounds is the half bound."""
    ratios = [bounds["multipliers"] / bounds["half"] for bounds in uppers_of_all(2) if bounds.get("multipliers")]
    assert np.quantile(ratios, 0.9) <= 1.01
    assert max(ratios) <= 1.1


def test_optimised_multipliers_are_no_worse():
    for case in CASES[:40]:
        bounds = case.uppers(2, steps=20)
        if "multipliers" in bounds:
            assert bounds["optimised multipliers"] <= bounds["multipliers"] * SLACK
            assert largest(case.A2, case.A1, 2) <= bounds["optimised multipliers"] * SLACK


@both
def test_alignment_lies_between_its_bounds(p):
    for case, found in zip(CASES[::3], LARGEST[::3], strict=True):
        result = conv_alignment(case.second, case.first, p, case.size)
        assert 0 <= result.lower <= result.upper <= 1
        assert result.exact is None
        product = float(norm(case.A2, p) * norm(case.A1, p))
        assert product <= result.scale * SLACK
        if product:
            assert found[p] / product <= result.upper * SLACK
            assert found[p] <= result.upper * result.scale * SLACK
        if len(case.A1) <= 10:  # found is the maximum itself
            assert result.lower * result.scale <= found[p] * SLACK + 1e-12


@both
def test_patterns_that_are_found_are_nearly_the_best(p):
    ratios = [
        result.lower * result.scale / found[p]
        for case, found in zip(CASES[1::5], LARGEST[1::5], strict=True)
        if found[p] > 0 and (result := conv_alignment(case.second, case.first, p, case.size))
    ]
    assert np.median(ratios) >= 0.99
    assert np.mean(ratios) >= 0.95


@both
@pytest.mark.parametrize("scale", [-1.0, 1e-150, 1e120])
def test_scale_does_not_matter(p, scale):
    case = next(case for case in CASES if case.first.groups == 1 and case.A1.any() and case.A2.any())
    one = conv_alignment(case.second, case.first, p, case.size)
    other = CONVS[len(case.size) - 1](
        case.first.in_channels,
        case.first.out_channels,
        case.first.kernel_size,
        case.first.stride,
        case.first.padding,
        case.first.dilation,
    ).double()
    other.weight = nn.Parameter(case.first.weight * scale)
    scaled = conv_alignment(case.second, other, p, case.size)
    assert (scaled.lower, scaled.upper) == pytest.approx((one.lower, one.upper), rel=1e-4)
    assert scaled.scale == pytest.approx(one.scale * abs(scale), rel=1e-4)
    assert scaled.argument == one.argument


def test_without_negative_weights_entry_is_the_norm():
    for case in CASES[:60]:
        pair = [CONVS[len(case.size) - 1].__new__(type(case.first)) for _ in range(2)]
        for new, old in zip(pair, (case.second, case.first), strict=True):
            new.__dict__ = {**old.__dict__, "_parameters": {"weight": nn.Parameter(old.weight.abs()), "bias": None}}
        if not (case.A2.any() and case.A1.any()):
            continue
        true = float(norm(np.abs(case.A2) @ np.abs(case.A1), math.inf))
        assert upper_of(*pair, math.inf, case.size)["entry"] == pytest.approx(true, rel=1e-9)


def plain(out, channels, kernel, seed=0, axes=2, **kwargs):
    torch.manual_seed(seed)
    return CONVS[axes - 1](channels, out, kernel, bias=False, **kwargs).double().requires_grad_(False)


@both
@pytest.mark.parametrize("seed", range(4))
def test_single_taps_are_the_matrices(p, seed):
    first, second = plain(5, 3, 1, seed), plain(4, 5, 1, seed + 10)
    W2, W1 = second.weight.flatten(1), first.weight.flatten(1)
    found, dense = conv_alignment(second, first, p, (6, 5), steps=20), alignment(W2, W1, p, exact=True)
    assert found.scale == pytest.approx(dense.scale, rel=1e-6)
    assert dense.exact <= found.upper * SLACK
    assert found.upper == pytest.approx(alignment(W2, W1, p, steps=20).upper, rel=0.02)
    assert found.lower == pytest.approx(dense.exact, rel=0.01)
    bounds = upper_of(second, first, 2, (6, 5))
    assert bounds["half"] == pytest.approx(pair_two.half_bound(W2, W1), rel=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_full_padding_and_symmetric_kernels(seed):
    """Symmetric kernels on images that are padded in full, so that every tap meets every pixel."""
    pair = [plain(2, 2, 3, seed + k, padding=2) for k in range(2)]
    for layer in pair:
        layer.weight.add_(layer.weight.clone().flip(2, 3))
    A1, middle = explicit(pair[0], (5, 5))
    A2, _ = explicit(pair[1], middle)
    for p in (2, math.inf):
        true = largest(A2, A1, p)
        bounds = upper_of(pair[1], pair[0], p, (5, 5))
        assert true * (1 - 1e-9) <= min(bounds.values()) <= 1.7 * true


def test_a_strided_second_convolution_may_be_taken_as_rows(monkeypatch):
    """The torus that counts every second position is tighter than all rows, and both hold."""
    strided = [case for case in CASES if max(case.second.stride) > 1][:15]
    monkeypatch.setattr(pair_conv, "_AFFORDABLE", math.inf)
    tight = [case.uppers(2) for case in strided]
    monkeypatch.setattr(pair_conv, "_affordable", lambda pair, step: max(step) == 1)
    loose = [case.uppers(2) for case in strided]
    for case, one, all_rows in zip(strided, tight, loose, strict=True):
        for bounds in (one, all_rows):
            assert case.largest[2] <= min(bounds.values()) * SLACK
    assert np.median([one["half"] / rows["half"] for one, rows in zip(tight, loose, strict=True) if "half" in one]) < 1
    monkeypatch.setattr(pair_conv, "_affordable", lambda pair, step: False)
    assert strided[0].uppers(2).keys() == {"product"}


def test_a_large_patch_has_a_bound_without_its_matrix(monkeypatch):
    before = uppers_of_all(math.inf)
    monkeypatch.setattr(pair_conv, "_PATCH", 0)
    monkeypatch.setattr(pair_conv, "_CHUNK", 1)  # one filter at a time
    some = [k for k, bounds in enumerate(before) if "spectral" in bounds][:60]
    for k in some:
        bounds = CASES[k].uppers(math.inf)
        assert LARGEST[k][math.inf] <= bounds["spectral"] * SLACK
        assert before[k]["spectral"] <= bounds["spectral"] * SLACK
        assert bounds["half entry"] == pytest.approx(before[k]["half entry"], rel=1e-9)


def test_cancellation_in_wide_layers_is_seen_in_l_inf(monkeypatch):
    pair = plain(24, 24, 3, 1, padding=1), plain(24, 24, 3, 0, padding=1)
    matrix = upper_of(*pair, math.inf, (8, 8))
    monkeypatch.setattr(pair_conv, "_PATCH", 0)
    torus = upper_of(*pair, math.inf, (8, 8))
    assert torus["spectral"] < 0.6 * torus["half entry"]
    assert matrix["spectral"] < torus["spectral"]


@both
@pytest.mark.parametrize("zero", [0, 1])
def test_zero_kernels_are_aligned_by_convention(p, zero):
    pair = [plain(2, 3, 3), plain(3, 2, 3)]
    pair[zero].weight.zero_()
    found = conv_alignment(*pair, p, (7, 7))
    assert (found.scale, found.lower, found.upper, found.argument) == (0, 1, 1, "zero matrix")
    assert set(upper_of(*pair, p, (7, 7)).values()) == {0.0}


@both
def test_channels_that_never_meet(p):
    first, second = plain(2, 2, 3, padding=1), plain(2, 2, 3, padding=1)
    first.weight[0] = 0
    second.weight[:, 1] = 0
    found = conv_alignment(second, first, p, (4, 4))
    assert found.lower == 0
    assert found.upper == pytest.approx(0, abs=1e-9)


@both
def test_taps_that_meet_only_padding(p):
    """On one pixel only the tap in the middle counts; without it the operator is zero and nothing is certified."""
    first, second = plain(1, 1, 3, padding=1), plain(1, 1, 3, padding=1)
    first.weight[..., 1, 1] = 0
    found = conv_alignment(second, first, p, (1, 1))
    assert found.upper == 1
    assert found.lower <= 1


@both
def test_single_precision_agrees(p):
    pair = [plain(2, 3, 3), plain(3, 2, 3)]
    one = conv_alignment(*pair, p, (7, 7)).upper
    assert conv_alignment(*[layer.float() for layer in pair], p, (7, 7)).upper == pytest.approx(one, rel=1e-3)


def test_other_padding_is_refused_unless_there_is_none():
    first, second = plain(2, 2, 3, padding=1, padding_mode="circular"), plain(2, 2, 3, padding=1)
    with pytest.raises(InputError, match="geometry1: expected zero padding; got circular"):
        conv_alignment(second, first, 2, (5, 5))
    with pytest.raises(InputError, match="geometry2: expected zero padding; got circular"):
        conv_alignment(first, second, 2, (5, 5))
    bare = plain(2, 2, 3, padding_mode="circular")
    assert conv_alignment(second, bare, 2, (5, 5)) == conv_alignment(second, plain(2, 2, 3), 2, (5, 5))


@both
@pytest.mark.parametrize(
    ("second", "first", "size", "message"),
    [
        (plain(2, 2, 3), plain(3, 2, 3), (9, 9), "K1: expected 2 output channels, as the second.*; got 3"),
        (plain(2, 2, 3), plain(2, 2, 3, axes=1), (9,), r"K2: expected a real kernel .*axes as in K1; got \(2, 2, 3, 3"),
        (plain(2, 2, 3), plain(2, 2, 3), (9,), r"size: expected 2 positive numbers.*; got \(9,\)"),
        (plain(2, 2, 3), plain(2, 2, 3), (9, 0), r"size: expected 2 positive numbers.*; got \(9, 0\)"),
        (plain(2, 2, 3), plain(2, 2, 3), (4, 4), r"size: expected an input that both kernels fit on; got \(4, 4\)"),
        (plain(2, 2, 3), plain(2, 2, 3), (2, 2), "size: expected an input that both kernels fit on"),
        (nn.Linear(2, 2), plain(2, 2, 3), (9, 9), "second: expected a convolution .*; got Linear"),
        (plain(2, 2, 3), nn.ReLU(), (9, 9), "first: expected a convolution .*; got ReLU"),
    ],
)
def test_layers_are_checked(p, second, first, size, message):
    with pytest.raises(InputError, match=message):
        conv_alignment(second, first, p, size)


def test_numbers_are_checked():
    layer, broken = plain(2, 2, 3), plain(2, 2, 3)
    broken.weight[0, 0, 0, 0] = math.nan
    with pytest.raises(InputError, match="K1: expected finite numbers; got 1 NaN or infinite"):
        conv_alignment(layer, broken, 2, (9, 9))
    with pytest.raises(InputError, match="K2: expected finite numbers"):
        conv_alignment(broken, layer, 2, (9, 9))
    with pytest.raises(InputError, match="p: expected 2 or inf; got 1"):
        conv_alignment(layer, layer, 1, (9, 9))
    with pytest.raises(InputError, match="geometry2: expected 2 axes, groups that divide 2 filters"):
        conv_pair_upper(
            layer.weight, ConvGeometry((1,), ((0, 0),), (1,), 1), layer.weight, ConvGeometry.of(layer), 2, (9, 9)
        )
