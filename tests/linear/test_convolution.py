"""Operator norms of convolutions, against the explicit matrix of torch's own module."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import random
from typing import NamedTuple

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from brittle.errors import InputError
from brittle.linear import conv_symbol
from brittle.linear.convolution import (
    ConvGeometry,
    apply,
    bounds_of,
    coarse_grid_bound,
    filter_matrix,
    has_interior,
    norm_1,
    norm_2,
    norm_2_lower,
    norm_inf,
    operator_norm_bounds,
    patch_overlap,
    torus_bound,
)
from brittle.results.methods import OperatorMethod

CONVS = [nn.Conv1d, nn.Conv2d, nn.Conv3d]
MODES = ["zeros", "circular", "reflect", "replicate"]
CASES = 400
SLACK = 1 + 1e-9


class Case(NamedTuple):
    """A random convolution with its input size and the matrix it is on images of that size."""

    seed: int
    module: nn.Module
    size: tuple[int, ...]
    A: np.ndarray

    @property
    def K(self):
        return self.module.weight.detach()

    @property
    def geometry(self):
        return ConvGeometry.of(self.module)

    def norm(self, p):
        return float(np.linalg.norm(self.A, p))

    @property
    def sigma(self):
        """sigma_1 of the filter matrix, groups side by side."""
        blocks = np.split(self.K.numpy().reshape(len(self.K), -1), self.module.groups)
        return float(np.linalg.norm(scipy.linalg.block_diag(*blocks), 2))

    def __repr__(self):
        return f"seed {self.seed}: {self.module} on {self.size}"


def explicit(module, size):
    """The operator, column by column: torch's module on every unit image."""
    inputs = module.in_channels * math.prod(size)
    with torch.no_grad():
        columns = module(torch.eye(inputs, dtype=torch.float64).view(inputs, module.in_channels, *size))
    return columns.flatten(1).T.numpy()


def draw_kernel(rng, shape):
    K = rng.standard_normal(shape)
    return [K, np.abs(K), np.sign(K), K * (rng.random(shape) < 0.4), K**5][int(rng.integers(5))]


def draw_module(seed):
    choose, axes = random.Random(seed), seed % 3 + 1
    groups = choose.choice([1, 1, 2, 3])
    per_group = 1 if choose.random() < 0.5 else 2  # one channel a group: depthwise
    kernel = [choose.randint(1, 4 - (axes == 3)) for _ in range(axes)]
    dilation = [choose.choice([1, 1, 2, 3 - (axes == 3)]) for _ in range(axes)]
    same = choose.random() < 0.25
    stride = [1 if same else choose.choice([1, 1, 2, 3]) for _ in range(axes)]
    padding = "same" if same else [choose.choice([0, 0, 1, 2]) for _ in range(axes)]
    module = CONVS[axes - 1](
        groups * per_group, groups * choose.randint(1, 3), kernel, stride, padding, dilation, groups, bias=False,
        padding_mode=choose.choice([*MODES, "zeros", "circular"]), dtype=torch.float64,
    )  # fmt: skip
    module.weight.data = torch.from_numpy(draw_kernel(np.random.default_rng(seed), tuple(module.weight.shape)))
    return module


def smallest_size(module):
    """Per axis, the smallest input that torch takes."""
    geometry = ConvGeometry.of(module)
    sizes = []
    for span, pair in zip(geometry.spans(module.kernel_size), geometry.padding, strict=True):
        least = {"circular": max(pair), "reflect": max(pair) + 1}.get(module.padding_mode, 1)
        sizes.append(max(1, least, span + 1 - sum(pair)))
    return sizes


@functools.cache
def cases():
    found = []
    for seed in range(CASES):
        module, choose = draw_module(seed), random.Random(-seed - 1)
        room = [5, 2, 1][seed % 3]
        size = tuple(n + choose.randint(0, room) for n in smallest_size(module))
        found.append(Case(seed, module, size, explicit(module, size)))
    return found


def plain_circular(case):
    """Whether the padding is circular and adds no row that the torus has not."""
    pads = [sum(pair) for pair in case.geometry.padding]
    fits = all(pad <= span for pad, span in zip(pads, case.geometry.spans(case.K.shape[2:]), strict=True))
    return case.geometry.mode == "circular" and fits


def patches(case):
    """Per output position, the flat input pixels under the kernel's taps; -1 for a padded zero."""
    geometry, index = case.geometry, np.arange(math.prod(case.size)).reshape(case.size)
    mode = {"zeros": "constant", "circular": "wrap", "reflect": "reflect", "replicate": "edge"}[geometry.mode]
    options = {"constant_values": -1} if mode == "constant" else {}
    padded = np.pad(index, geometry.padding, mode=mode, **options)
    inside = np.pad(np.ones(case.size, bool), geometry.padding)
    spans = geometry.spans(case.K.shape[2:])
    starts = [range(0, n - span, step) for n, span, step in zip(padded.shape, spans, geometry.stride, strict=True)]
    for start in itertools.product(*starts):
        window = tuple(slice(s, s + span + 1, d) for s, span, d in zip(start, spans, geometry.dilation, strict=True))
        yield padded[window].ravel(), bool(inside[window].all())


# --- the cases themselves -----------------------------------------------------------------------------------


def test_the_cases_cover_what_they_should():
    geometries = [case.geometry for case in cases()]
    assert {g.mode for g in geometries} == set(MODES)
    assert any(before != after for g in geometries for before, after in g.padding)
    assert any(case.module.groups == case.module.in_channels > 1 for case in cases())
    interior = [any(inside for _, inside in patches(case)) for case in cases()]
    assert 50 < sum(interior) < CASES - 50
    assert sum(plain_circular(case) for case in cases()) > 30


def test_the_geometry_says_what_the_module_does():
    for case in cases():
        x = torch.eye(case.A.shape[1], dtype=torch.float64).view(-1, case.module.in_channels, *case.size)
        np.testing.assert_allclose(apply(case.K, case.geometry, x).flatten(1).T, case.A, atol=1e-12, err_msg=str(case))


def test_the_filter_matrix_has_one_filter_a_row():
    K = torch.randn(4, 3, 2, 5)
    assert torch.equal(filter_matrix(K)[2], K[2].reshape(-1))


def test_interior_means_a_window_without_padding():
    for case in cases():
        assert has_interior(case.K, case.geometry, case.size) == any(inside for _, inside in patches(case)), case


def test_patch_overlap_counts_the_patches_of_the_busiest_pixel():
    for case in cases():
        pixels = np.concatenate([pixels for pixels, _ in patches(case)])
        busiest = np.bincount(pixels[pixels >= 0], minlength=1).max()
        assert patch_overlap(case.K, case.geometry, case.size) == busiest, case
        if case.geometry.mode == "zeros":
            assert busiest <= patch_overlap(case.K, case.geometry, None), case


def test_the_count_for_zero_padding_is_attained_on_a_large_image():
    for case in cases()[:60]:
        module = draw_module(case.seed)
        geometry = ConvGeometry(**{**vars(ConvGeometry.of(module)), "mode": "zeros"})
        size = [6 * n for n in smallest_size(module)]
        assert patch_overlap(module.weight, geometry, size) == patch_overlap(module.weight, geometry, None), case


# --- l_inf and l_1 ------------------------------------------------------------------------------------------


@functools.cache
def bounds_of_cases(function):
    return [function(case.K, case.geometry, case.size) for case in cases()]


@pytest.mark.parametrize(("p", "function"), [(math.inf, norm_inf), (1.0, norm_1), (2.0, norm_2)])
def test_bounds_hold_and_exact_ones_are_equal(p, function):
    for case, bounds in zip(cases(), bounds_of_cases(function), strict=True):
        true = case.norm(p)
        assert bounds.p == p
        assert bounds.lower <= bounds.upper, case
        assert bounds.lower <= true * SLACK + 1e-12, case
        assert true <= bounds.upper * SLACK + 1e-12, case
        if bounds.exact:
            assert bounds.upper == pytest.approx(true, rel=1e-9, abs=1e-12), case


def test_the_inf_norm_is_exact_for_zero_padding_and_inside():
    for case in cases():
        interior = any(inside for _, inside in patches(case))
        bounds = norm_inf(case.K, case.geometry, case.size)
        if interior:
            nu = np.abs(case.K.numpy()).reshape(len(case.K), -1).sum(1).max()
            assert case.norm(math.inf) == pytest.approx(nu, rel=1e-12)
            assert bounds.exact
        assert bounds.exact or not (interior or case.geometry.mode == "zeros"), case


def test_the_1_norm_is_exact_for_zero_padding():
    for case in cases():
        if case.geometry.mode == "zeros":
            assert norm_1(case.K, case.geometry, case.size).exact, case


def test_a_bound_that_is_not_exact_is_not_called_so():
    for function in (norm_inf, norm_1, norm_2):
        for case, bounds in zip(cases(), bounds_of_cases(function), strict=True):
            assert bounds.exact or bounds.method != "exact", case


def test_every_method_that_is_made_is_explained_and_no_other():
    functions = (norm_inf, norm_1, norm_2)
    made = {bounds.method for function in functions for bounds in bounds_of_cases(function)}
    made |= {function(case.K, case.geometry).method for function in functions for case in cases()}
    assert made == set(OperatorMethod)


# --- l_2: upper bounds --------------------------------------------------------------------------------------


@functools.cache
def uppers_of_cases():
    return [uppers(case) for case in cases()]


def uppers(case):
    """Every upper bound that the geometry admits, by name."""
    K, geometry, size = case.K, case.geometry, case.size
    found = {
        "filter matrix": math.sqrt(patch_overlap(K, geometry, size)) * case.sigma,
        "schur": math.sqrt(norm_1(K, geometry, size).upper * norm_inf(K, geometry, size).upper),
    }
    if geometry.mode == "zeros" or plain_circular(case):
        found["torus"] = torus_bound(K, geometry, size)
        even = all(n % s == 0 for n, s in zip(size, geometry.stride, strict=True))
        if geometry.mode == "zeros" or even:
            found["polyphase"] = torus_bound(K, geometry, size, polyphase=True)
        if geometry.mode == "zeros" or max(geometry.stride) == 1:
            for oversampling in (3, 4, 8):
                found[f"coarse {oversampling}"] = coarse_grid_bound(K, geometry, oversampling=oversampling)
    return found


def test_no_upper_bound_is_below_the_norm():
    for case, found in zip(cases(), uppers_of_cases(), strict=True):
        true = case.norm(2)
        assert all(upper >= true * (1 - 1e-11) for upper in found.values()), (case, true, found)


def test_the_result_is_the_least_upper_bound_and_names_it():
    for case, bounds, found in zip(cases(), bounds_of_cases(norm_2), uppers_of_cases(), strict=True):
        if bounds.method == "exact":
            continue
        named = {"coarse grid": "coarse 8"}.get(bounds.method, bounds.method)
        assert bounds.upper == pytest.approx(found[named], rel=1e-9), case
        left_out = {"coarse 3", "coarse 4"} | ({"polyphase"} if max(case.geometry.stride) == 1 else set())
        considered = [value for name, value in found.items() if name not in left_out]
        if case.geometry.mode == "zeros":
            assert bounds.upper <= min(considered) * SLACK, (case, found)


def test_the_torus_is_exact_for_circular_padding():
    for seed in range(60):
        axes, choose = seed % 3 + 1, random.Random(seed)
        groups, kernel = choose.choice([1, 2]), [choose.choice([1, 3, 5]) for _ in range(axes)]
        module = CONVS[axes - 1](
            2 * groups, groups, kernel, padding="same", groups=groups, padding_mode="circular", bias=False,
            dtype=torch.float64,
        )  # fmt: skip
        size = [k + choose.randint(0, 2) for k in kernel]
        true = np.linalg.norm(explicit(module, size), 2)
        assert torus_bound(module.weight, ConvGeometry.of(module), size) == pytest.approx(true, rel=1e-9)


@pytest.mark.parametrize("size", [(6,), (8, 4), (4, 6, 2)])
def test_the_polyphase_torus_is_exact_for_circular_padding_with_stride_2(size):
    module = CONVS[len(size) - 1](2, 3, 2, stride=2, padding_mode="circular", bias=False, dtype=torch.float64)
    bound = torus_bound(module.weight, ConvGeometry.of(module), size, polyphase=True)
    assert bound == pytest.approx(np.linalg.norm(explicit(module, size), 2), rel=1e-10)


def supremum(K, points=96):
    """Largest value over frequencies of sigma_1 of the symbol, on a fine grid (numpy; from below), per group of one."""
    symbol = np.fft.fftn(K.numpy(), s=[points] * (K.ndim - 2), axes=range(2, K.ndim))
    return np.linalg.svd(np.moveaxis(symbol, (0, 1), (-2, -1)), compute_uv=False).max()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("oversampling", "loss"), [(4, 1.415), (8, 1.083)])
def test_the_coarse_grid_loses_no_more_than_it_says(seed, oversampling, loss):
    K = torch.from_numpy(draw_kernel(np.random.default_rng(seed), (3, 2, 3, 3)))
    bound = coarse_grid_bound(K, ConvGeometry((1, 1), ((1, 1), (1, 1)), (1, 1), 1), oversampling=oversampling)
    sup = supremum(K)
    assert sup * (1 - 1e-12) <= bound <= loss * sup * 1.001


@pytest.mark.parametrize("oversampling", [1, 2, 0, -4])
def test_a_grid_that_is_too_coarse_is_refused(oversampling):
    """The correction holds only for more than two points a degree."""
    geometry = ConvGeometry((1, 1), ((1, 1), (1, 1)), (1, 1), 1)
    with pytest.raises(InputError, match="oversampling"):
        coarse_grid_bound(torch.randn(2, 2, 3, 3), geometry, oversampling=oversampling)


def test_chunks_change_nothing(monkeypatch):
    case = next(case for case in cases() if case.geometry.mode == "zeros" and case.K[0, 0].numel() > 8)
    before = torus_bound(case.K, case.geometry, case.size), coarse_grid_bound(case.K, case.geometry)
    monkeypatch.setattr(conv_symbol, "CHUNK", 1)
    after = torus_bound(case.K, case.geometry, case.size), coarse_grid_bound(case.K, case.geometry)
    assert after == pytest.approx(before, rel=1e-12)


# --- l_2: lower bounds --------------------------------------------------------------------------------------


def test_lower_bounds_are_never_above_the_norm():
    for case, bounds in zip(cases(), bounds_of_cases(norm_2), strict=True):
        true = case.norm(2)
        if any(inside for _, inside in patches(case)):
            assert case.sigma <= true * SLACK, case
            assert bounds.lower >= case.sigma * (1 - 1e-9), case
        for iterations in (0, 3):
            found = norm_2_lower(case.K, case.geometry, case.size, iterations=iterations, seed=case.seed)
            assert 0 <= found <= true * SLACK + 1e-12, case


def test_power_iteration_comes_close():
    ratios = [norm_2_lower(c.K, c.geometry, c.size) / c.norm(2) for c in cases()[:120] if c.norm(2)]
    assert np.median(ratios) > 0.999
    assert min(ratios) > 0.8


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1])
def test_one_tap_is_the_filter_matrix(groups, stride, padding):
    module = nn.Conv2d(6, 3, 1, stride, padding, groups=groups, bias=False, dtype=torch.float64)
    size = (3, 4)
    bounds = operator_norm_bounds(module, 2, size)
    assert bounds.exact
    assert bounds.upper == pytest.approx(np.linalg.norm(explicit(module, size), 2), rel=1e-12)


def test_one_tap_that_meets_only_padding_is_zero():
    module = nn.Conv1d(1, 1, 1, stride=2, padding=1, bias=False, dtype=torch.float64)
    assert not explicit(module, (1,)).any()
    for p in (1, 2, math.inf):
        assert operator_norm_bounds(module, p, (1,)).lower == 0


# --- any size -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("mode", MODES)
def test_results_without_a_size_hold_for_every_size_with_an_interior(p, mode):
    tried = 0
    for seed in range(CASES):
        module = draw_module(seed)
        if module.padding_mode != mode or seed % 3 == 2:
            continue
        bounds = operator_norm_bounds(module, p)
        least = smallest_size(module)
        for extra in range(6 if len(least) == 1 else 3):
            size = tuple(n + extra for n in least)
            A = explicit(module, size)
            case = Case(seed, module, size, A)
            if any(inside for _, inside in patches(case)):
                tried += 1
                assert bounds.lower <= case.norm(p) * SLACK, case
                assert case.norm(p) <= bounds.upper * SLACK, case
    assert tried > 50


def test_upper_bounds_for_zero_padding_hold_for_every_size():
    for case in cases():
        if case.geometry.mode == "zeros":
            for p in (1.0, 2.0, math.inf):
                assert case.norm(p) <= operator_norm_bounds(case.module, p).upper * SLACK + 1e-12, case


@pytest.mark.parametrize(("stride", "kernel", "size"), [(3, 3, 5), (2, 2, 3), (2, 3, 5)])
@pytest.mark.parametrize("p", [1.0, 2.0, math.inf])
def test_circular_padding_with_stride_has_no_bound_from_zero_padding(stride, kernel, size, p):
    """Around the seam of such a torus a pixel meets taps of more than one stride class."""
    module = nn.Conv1d(1, 1, kernel, stride, "valid" if kernel == 2 else 1, padding_mode="circular", bias=False)
    module = module.double()
    module.weight.data.fill_(1.0)
    assert np.linalg.norm(explicit(module, (size,)), p) <= operator_norm_bounds(module, p).upper * SLACK


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_padding_that_copies_pixels_raises_the_1_norm(mode):
    module = nn.Conv1d(1, 1, 3, padding=1, padding_mode=mode, bias=False, dtype=torch.float64)
    module.weight.data = torch.tensor([[[1.0, 0.0, 0.0]]], dtype=torch.float64)
    assert np.linalg.norm(explicit(module, (6,)), 1) <= operator_norm_bounds(module, 1).upper * SLACK


# --- the public function ------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_norms_scale_with_the_kernel(p):
    for case in cases()[::20]:
        one, many = (bounds_of(scale * case.K, case.geometry, p, case.size) for scale in (1, -3))
        assert (many.lower, many.upper) == pytest.approx((3 * one.lower, 3 * one.upper), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_single_precision_kernels_are_read_exactly(dtype):
    for case in cases()[::25]:
        module = copy.deepcopy(case.module).to(dtype)
        rounded = operator_norm_bounds(module, 2, case.size)
        assert rounded == bounds_of(module.weight.double(), case.geometry, 2, case.size)


def test_the_operator_is_not_the_filter_matrix():
    module = nn.Conv2d(1, 1, 3, padding=1, bias=False, dtype=torch.float64)
    module.weight.data.fill_(1.0)
    bounds = operator_norm_bounds(module, 2, (12, 12))
    assert bounds.lower > 2.5 * 3  # sigma_1 of the filter matrix is 3; the norm comes near to 9
    assert bounds.upper <= 9 * SLACK


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_errors_of_the_public_function(p):
    conv = nn.Conv2d(2, 2, 3)
    for module in (nn.ConvTranspose2d(2, 2, 3), nn.Linear(2, 2)):
        with pytest.raises(InputError, match=f"expected a Conv1d, Conv2d or Conv3d; got {type(module).__name__}"):
            operator_norm_bounds(module, p)
    with pytest.raises(InputError, match=r"size: expected an input at least as large as the kernel; got \(2, 5\)"):
        operator_norm_bounds(conv, p, (2, 5))
    conv.weight.data[0, 0, 0, 0] = math.nan
    with pytest.raises(InputError, match="weight: expected finite numbers"):
        operator_norm_bounds(conv, p, (5, 5))


@pytest.mark.parametrize("p", [0, 3, math.nan, -math.inf])
def test_other_exponents_are_refused(p):
    with pytest.raises(InputError, match="p: expected 1, 2 or inf; got"):
        operator_norm_bounds(nn.Conv1d(1, 1, 1), p)


@pytest.mark.parametrize("size", [(5,), (5, 5, 5), ()])
def test_a_size_of_other_axes_is_refused(size):
    with pytest.raises(InputError, match="size"):
        operator_norm_bounds(nn.Conv2d(1, 1, 3), 2, size)


@pytest.mark.parametrize(("mode", "size"), [("reflect", (2,)), ("circular", (1,))])
def test_a_padding_wider_than_the_input_is_refused(mode, size):
    module = nn.Conv1d(1, 1, 3, padding=2, padding_mode=mode)
    for p in (1, 2, math.inf):
        with pytest.raises(InputError, match="size"):
            operator_norm_bounds(module, p, size)


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_the_torus_needs_zero_or_circular_padding(mode):
    geometry = ConvGeometry((1,), ((1, 1),), (1,), 1, mode)
    for function in (lambda K: torus_bound(K, geometry, (5,)), lambda K: coarse_grid_bound(K, geometry)):
        with pytest.raises(InputError, match="geometry: expected zero or plain circular padding"):
            function(torch.ones(1, 1, 3))


def test_the_torus_refuses_what_does_not_embed():
    wide = ConvGeometry((1,), ((2, 2),), (1,), 1, "circular")
    strided = ConvGeometry((2,), ((1, 1),), (1,), 1, "circular")
    for function in (lambda K: torus_bound(K, wide, (5,)), lambda K: coarse_grid_bound(K, wide)):
        with pytest.raises(InputError, match="geometry"):
            function(torch.ones(1, 1, 3))
    with pytest.raises(InputError, match="size: expected multiples of the stride"):
        torus_bound(torch.ones(1, 1, 3), strided, (5,), polyphase=True)
    with pytest.raises(InputError, match="geometry"):
        coarse_grid_bound(torch.ones(1, 1, 3), strided)
