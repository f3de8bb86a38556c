"""Penalties against formulas in numpy, finite differences and subgradient inequalities; which layers they act on."""

import copy
import functools
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import conv2d
from torch.nn.utils import parametrizations

from brittle.errors import InputError
from brittle.models.build import fcn, resnet18_cifar
from brittle.models.layers import read_layers
from brittle.models.selection import chosen_layers, matrix
from brittle.training.interventions.consecutive import composed_kernel
from brittle.training.interventions.penalties import (
    PENALTIES,
    condition,
    group_lasso,
    interlayer_alignment,
    joint_l1,
    l1,
    nuclear_norm,
    scale_invariant_group_lasso,
    spread_control,
)
from helpers.matrices import matrices, quick
from helpers.networks import convnet, generator, mlp, seeded, untidy, untouched

FUNCTIONS = {
    function.__name__: function
    for function in (
        group_lasso,
        scale_invariant_group_lasso,
        nuclear_norm,
        l1,
        joint_l1,
        interlayer_alignment,
        spread_control,
        condition,
    )
}
OF_PAIRS = ("joint_l1", "interlayer_alignment")
"""Penalties of consecutive layers."""
OPTIONS = [(name, {}) for name in FUNCTIONS] + [
    ("spread_control", {"norm": 1}),
    ("spread_control", {"scale_free": True}),
    ("spread_control", {"norm": 1, "scale_free": True, "share": 0.5}),
]


def holding(W, *more):
    """A Sequential of dense layers with these matrices; all but an identity head are chosen by default."""
    layers = []
    for M in (W, *more, torch.eye(len((W, *more)[-1]), dtype=W.dtype)):
        layer = nn.Linear(M.shape[1], M.shape[0], bias=False, dtype=W.dtype)
        with torch.no_grad():
            layer.weight.copy_(M)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def value_and_gradient(penalty, W, **options):
    net = holding(W)
    value = penalty(net, **options)
    value.backward()
    return float(value.detach()), net[0].weight.grad


def directional(f, W, D, h=1e-6):
    """Central difference of f along D."""
    return (f(W + h * D) - f(W - h * D)) / (2 * h)


def top_norms(A, share=0.05, norm=2):
    """The t largest row norms, in numpy."""
    count = max(2, next(t for t in range(1, len(A) + 1) if t * 10**6 >= round(share * 10**6) * len(A)))
    return np.sort(np.linalg.norm(A, ord=norm, axis=1))[::-1][:count]


# Values


@quick
@given(matrices())
def test_values_are_the_formulas(W):
    A = W.numpy()
    norms = np.linalg.norm(A, axis=1)
    top, top1 = top_norms(A), top_norms(A, 0.5, 1)
    ratio = norms.sum() / np.linalg.norm(A) if A.any() else 0
    near = functools.partial(pytest.approx, rel=1e-10, abs=1e-12 * max(1, float(norms.max()) ** 2))
    net = holding(W)
    with torch.no_grad():
        assert float(group_lasso(net)) == near(norms.sum())
        assert float(scale_invariant_group_lasso(net)) == near(ratio)
        assert float(nuclear_norm(net)) == near(np.linalg.norm(A, "nuc"))
        assert float(l1(net)) == near(np.abs(A).sum())
        assert float(spread_control(net)) == near(top.var())
        assert float(spread_control(net, norm=1, share=0.5)) == near(top1.var())
        relative = top.var() / top.mean() ** 2 if A.any() else 0
        assert float(spread_control(net, scale_free=True)) == pytest.approx(relative, rel=1e-8, abs=1e-12)


COUNTS = [(1, 1), (2, 2), (40, 2), (41, 3), (60, 3), (61, 4), (140, 7), (141, 8)]


@pytest.mark.parametrize(("share", "m", "t"), [*[(0.05, *case) for case in COUNTS], (0.07, 100, 7), (1, 9, 9)])
def test_spread_control_takes_a_share_of_the_rows_rounded_up_and_two_at_least(share, m, t):
    norms = torch.arange(m, 0, -1.0, dtype=torch.float64)
    value, gradient = value_and_gradient(spread_control, norms[:, None], share=share)
    assert value == pytest.approx(float(norms[:t].var(correction=0)), rel=1e-12)
    assert int(gradient[t:].count_nonzero()) == 0


@quick
@given(matrices(zero=False), st.sampled_from([1e-3, -2.0, 1e4]))
def test_scale_invariant_forms_do_not_see_the_scale(W, c):
    for penalty in (scale_invariant_group_lasso, functools.partial(spread_control, scale_free=True)):
        value, gradient = value_and_gradient(penalty, W)
        assert value_and_gradient(penalty, c * W)[0] == pytest.approx(value, rel=1e-9, abs=1e-12)
        assert float((gradient * W).sum()) == pytest.approx(0, abs=1e-8)
        assert gradient.isfinite().all()


@quick
@given(matrices(zero=False))
def test_scale_invariant_group_lasso_is_from_one_to_the_root_of_the_rows(W):
    value, _ = value_and_gradient(scale_invariant_group_lasso, W)
    assert 1 - 1e-12 <= value <= math.sqrt(len(W)) * (1 + 1e-12)


@quick
@given(matrices(zero=False), st.sampled_from([0.5, 3.0]))
def test_the_others_grow_with_the_scale(W, c):
    for name, power in (("group_lasso", 1), ("nuclear_norm", 1), ("l1", 1), ("spread_control", 2), ("condition", 2)):
        value, scaled = (value_and_gradient(FUNCTIONS[name], V)[0] for V in (W, c * W))
        assert scaled == pytest.approx(c**power * value, rel=1e-6, abs=1e-9)


# Gradients


@pytest.mark.parametrize(("name", "options"), [case for case in OPTIONS if case[0] not in OF_PAIRS])
@quick
@given(m=st.integers(1, 24), n=st.integers(1, 24), seed=st.integers(0, 10**6))
def test_gradients_agree_with_finite_differences_away_from_kinks(name, options, m, n, seed):
    W, D = torch.randn(2, m, n, generator=generator(seed), dtype=torch.float64)
    W = W + 0.1 * W.sign()  # no entry changes its sign
    if name == "nuclear_norm":
        W = W + 2 * torch.eye(m, n, dtype=W.dtype)
    if name == "spread_control":  # no two norms change places
        W = W / W.norm(dim=1, keepdim=True) * torch.arange(1, m + 1)[:, None]
        W = W if options.get("norm") != 1 else W / W.abs().sum(1, keepdim=True) * torch.arange(1, m + 1)[:, None]
    penalty = functools.partial(FUNCTIONS[name], **options)
    _, gradient = value_and_gradient(penalty, W)
    slope = directional(lambda V: float(penalty(holding(V)).detach()), W, D)
    assert float((gradient * D).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-5)


@quick
@given(matrices(12), st.integers(1, 9), st.integers(0, 10**6))
def test_gradients_of_joint_l1_agree_with_finite_differences(first, m, seed):
    second = torch.randn(m, len(first), generator=generator(seed), dtype=torch.float64)
    first = first.clamp(-10, 10) + torch.randn(first.shape, generator=generator(seed + 1), dtype=torch.float64)
    net = holding(first, second)
    joint_l1(net).backward()
    D, E = (torch.randn(M.shape, generator=generator(seed + 2), dtype=M.dtype) for M in (first, second))
    if float((second @ first).abs().min()) < 1e-4:
        return
    found = float((net[0].weight.grad * D).sum() + (net[2].weight.grad * E).sum())
    h = 1e-7
    slope = ((second + h * E) @ (first + h * D)).abs().sum() - ((second - h * E) @ (first - h * D)).abs().sum()
    assert found == pytest.approx(float(slope) / (2 * h), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", ["group_lasso", "nuclear_norm", "l1"])
@quick
@given(W=matrices(), seed=st.integers(0, 10**6), size=st.sampled_from([1e-3, 1.0, 30.0]))
def test_gradients_of_convex_penalties_are_subgradients_at_kinks_too(name, W, seed, size):
    value, gradient = value_and_gradient(FUNCTIONS[name], W)
    D = size * torch.randn(W.shape, generator=generator(seed), dtype=W.dtype)
    for V in (W + D, W - D, D, 0 * W):
        other, _ = value_and_gradient(FUNCTIONS[name], V)
        assert other >= value + float((gradient * (V - W)).sum()) - 1e-9 * (1 + value + other)


@quick
@given(matrices())
def test_gradients_of_row_penalties_are_zero_at_zero_rows_and_unit_vectors_elsewhere(W):
    rows = W.norm(dim=1)
    _, gradient = value_and_gradient(group_lasso, W)
    np.testing.assert_allclose(gradient.norm(dim=1), rows > 0, atol=1e-12)
    for name, options in OPTIONS:
        if name in ("scale_invariant_group_lasso", "spread_control"):
            _, gradient = value_and_gradient(FUNCTIONS[name], W, **options)
            assert gradient.isfinite().all()
            assert not gradient[rows == 0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tiny_rows_and_large_loss_scales_give_finite_gradients(dtype):
    W = torch.ones(4, 1, dtype=dtype) * torch.tensor([[1.0], [0.0], [1e-7], [1e-40]]).to(dtype)
    for penalty in (group_lasso, scale_invariant_group_lasso, spread_control):
        net = holding(W)
        value = penalty(net)
        assert value.dtype == torch.float32
        (2.0**14 * value).backward()
        assert net[0].weight.grad.dtype == dtype
        assert net[0].weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_half_types_are_summed_in_single_precision(name, options, dtype):
    net = holding(*(torch.randn(64, 64, generator=generator(seed)).to(dtype) for seed in (0, 1)))
    with torch.no_grad():
        assert float(FUNCTIONS[name](net, **options)) == pytest.approx(
            float(FUNCTIONS[name](copy.deepcopy(net).double(), **options)), rel=1e-5
        )


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_autocast_changes_nothing(name):
    net = seeded(lambda: nn.Sequential(nn.Linear(9, 3), nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 7), nn.Linear(7, 2)))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        inside = FUNCTIONS[name](net)
    with torch.no_grad():
        assert torch.equal(inside, FUNCTIONS[name](net))


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_descending_lowers_the_penalty(name, options):
    net = copy.deepcopy(mlp())
    before = FUNCTIONS[name](net, **options)
    before.backward()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad / parameter.grad.norm()
        assert FUNCTIONS[name](net, **options) < before


# Condition


def core_deviation(W, rank):
    """The definition: S by bases of rows and columns, and the distance of its Gram matrix from a multiple of I."""
    U, _, Vh = np.linalg.svd(W)
    S = U[:, :rank].T @ W @ Vh[:rank].T
    return np.linalg.norm(S.T @ S - np.linalg.norm(S) ** 2 / rank * np.eye(rank))


@quick
@given(matrices())
def test_condition_is_the_spread_of_the_squared_singular_values(W):
    A, r = W.numpy(), min(W.shape)
    scale = max(1.0, float(W.square().sum()))
    value, gradient = value_and_gradient(condition, W)
    assert value == pytest.approx(core_deviation(A, r), rel=1e-6, abs=1e-7 * scale)
    squares = np.linalg.svd(A, compute_uv=False) ** 2
    assert value == pytest.approx(math.sqrt(r) * squares.std(), rel=1e-6, abs=1e-7 * scale)
    assert gradient.isfinite().all()
    if value > 1e-6 * scale:
        B = A if len(A) == r else A.T
        formula = 2 * (B @ B.T - np.trace(B @ B.T) / r * np.eye(r)) @ B / value
        np.testing.assert_allclose(gradient if len(A) == r else gradient.mT, formula, rtol=1e-5, atol=1e-6 * scale)


@quick
@given(r=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_condition_of_a_pair_is_that_of_its_core_however_the_product_is_shared(r, seed):
    def draw(k, *shape):
        return torch.randn(*shape, generator=generator(seed + k), dtype=torch.float64)

    A, B, T, D, E = draw(0, r, 7), draw(1, 6, r), draw(2, r, r) + 3 * torch.eye(r), draw(3, r, 7), draw(4, 6, r)

    def pair(A, B):
        net = holding(A, B)
        return nn.Sequential(nn.Sequential(net[0], net[2]))

    def of(A, B):
        return condition(pair(A, B), layers=["0"])

    for first, second in ((A, B), (T @ A, B @ T.inverse())):
        value = float(of(first, second).detach())
        assert value == pytest.approx(core_deviation((B @ A).numpy(), r), rel=1e-6, abs=1e-8)
    if r == 1:
        assert value == 0
        return
    net = pair(A, B)
    condition(net, layers=["0"]).backward()
    slope = (of(A + 1e-6 * D, B + 1e-6 * E) - of(A - 1e-6 * D, B - 1e-6 * E)) / 2e-6
    found = (net[0][0].weight.grad * D).sum() + (net[0][1].weight.grad * E).sum()
    assert float(found) == pytest.approx(float(slope.detach()), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_condition_is_zero_without_gradient_where_all_singular_values_are_one_size(dtype):
    Q = torch.linalg.qr(torch.randn(9, 4, generator=generator(0), dtype=torch.float64)).Q
    for W in (3 * torch.eye(4), torch.zeros(4, 4)):
        value, gradient = value_and_gradient(condition, W.to(dtype))
        assert (value, gradient.count_nonzero()) == (0, 0)
    value, gradient = value_and_gradient(condition, (3 * Q).to(dtype))
    assert value == pytest.approx(0, abs=1e3 * torch.finfo(dtype).eps)
    assert gradient.isfinite().all()


# Consecutive layers


def test_joint_l1_sums_the_products_of_neighbours():
    net = fcn(9, 7, 4, 3)
    W1, W2, W3 = (net[place].weight.detach().double().numpy() for place in (1, 3, 5))
    expected = np.abs(W2 @ W1).sum() + np.abs(W3 @ W2).sum()
    assert joint_l1(net).item() == pytest.approx(expected, rel=1e-5)
    assert joint_l1(net, layers=["1", "3"]).item() == pytest.approx(np.abs(W2 @ W1).sum(), rel=1e-5)


def test_joint_l1_reads_nested_sequences_low_rank_pairs_and_pointwise_convolutions():
    def build():
        pair = nn.Sequential(nn.Linear(9, 2, bias=False), nn.Linear(2, 8))
        dense = nn.Sequential(nn.Flatten(), pair, nn.Sequential(nn.GELU(), nn.Dropout()), nn.Linear(8, 5))
        images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 5, 3))
        return nn.ModuleDict({"dense": dense, "images": images})

    net = seeded(build).double()
    A, B, C = net["dense"][1][0].weight, net["dense"][1][1].weight, net["dense"][3].weight
    K, k, L = net["images"][0].weight.flatten(1), net["images"][2].weight.flatten(1), net["images"][4].weight
    names = ["dense.1.0", "dense.3", "images.0", "images.2", "images.4"]
    expected = (C @ B @ A).abs().sum() + (k @ K).abs().sum() + torch.einsum("ocij,cd->odij", L, k).abs().sum()
    torch.testing.assert_close(joint_l1(net, layers=names), expected)


def separated():
    """Networks in which no two chosen layers are consecutive."""
    wide, narrow = nn.Linear(6, 6), nn.Linear(6, 2)
    return {
        "normalisation": nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.BatchNorm1d(6), narrow),
        "other shape": nn.Sequential(nn.Linear(6, 6), nn.Unflatten(1, (2, 3)), nn.Linear(3, 3), nn.Flatten(), narrow),
        "not a sequence": nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6), narrow]),
        "pooled kernels": nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.AvgPool2d(2), nn.Conv2d(4, 4, 3)),
        "mixed kernels": nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Softmax(-1), nn.Conv2d(4, 4, 3)),
        "groups": nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1, groups=2)),
        "one": nn.Sequential(wide, narrow),
    }


@pytest.mark.parametrize("name", OF_PAIRS)
@pytest.mark.parametrize("case", list(separated()))
def test_penalties_of_pairs_refuse_a_model_without_consecutive_layers(case, name):
    with pytest.raises(InputError, match="layers: expected two consecutive layers"):
        FUNCTIONS[name](separated()[case])


def test_interlayer_alignment_reads_no_kernels_whose_positions_overlap():
    maps = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    with pytest.raises(InputError, match="layers: expected two consecutive layers"):
        interlayer_alignment(maps)
    assert joint_l1(maps) > 0


GEOMETRIES = st.fixed_dictionaries(
    {
        name: st.tuples(st.integers(1, 3), st.integers(1, 3))
        for name in ("first", "second", "stride", "dilation", "next")
    }
)
"""Sizes of two kernels, the first one's stride, and both dilations."""


@quick
@given(GEOMETRIES, st.integers(0, 10**6))
def test_a_composed_kernel_does_the_work_of_both_convolutions(sizes, seed):
    draw = functools.partial(torch.randn, generator=generator(seed), dtype=torch.float64)
    first, second, x = draw(3, 2, *sizes["first"]), draw(4, 3, *sizes["second"]), draw(1, 2, 28, 28)
    composed = composed_kernel(first, second, sizes["stride"], sizes["dilation"], sizes["next"])
    apart = conv2d(conv2d(x, first, stride=sizes["stride"], dilation=sizes["dilation"]), second, dilation=sizes["next"])
    together = conv2d(x, composed, stride=sizes["stride"])
    torch.testing.assert_close(apart, together)


def test_joint_l1_sums_the_composed_kernels_of_strided_and_low_rank_convolutions():
    """The product is that of the layers without the activation: what a point of the input does to one of the output."""

    def build():
        pair = nn.Sequential(nn.Conv2d(3, 2, 3, stride=2, bias=False), nn.Conv2d(2, 5, 1, bias=False))
        return nn.Sequential(pair, nn.ReLU(), nn.Conv2d(5, 4, 3, stride=3, bias=False), nn.GELU(), nn.Conv2d(4, 2, 3))

    net = seeded(build).double()
    linear = nn.Sequential(net[0], net[2])
    jacobian = torch.autograd.functional.jacobian(linear, torch.zeros(1, 3, 7, 7, dtype=torch.float64))
    assert jacobian.shape[2:4] == (1, 1)  # one output position reads every tap once
    torch.testing.assert_close(joint_l1(net, layers=["0.0", "2"]), jacobian.abs().sum())


@pytest.mark.parametrize("name", OF_PAIRS)
def test_penalties_of_pairs_skip_over_no_layer_that_was_left_out(name):
    with pytest.raises(InputError, match="layers: expected two consecutive layers"):
        FUNCTIONS[name](fcn(7, 7, 4, 3), layers=["1", "5"])


def test_interlayer_alignment_is_the_mean_over_all_patterns():
    net = fcn(6, 5, 4, 3).double()
    W1, W2, W3 = (net[place].weight.detach() for place in (1, 3, 5))
    patterns = [torch.tensor(d, dtype=W1.dtype).diag() for d in itertools.product((0, 1), repeat=5)]

    def share(B, C):
        mean = sum(float((B @ D @ C).square().sum()) for D in patterns) / len(patterns)
        return mean / float(B.square().sum() * C.square().sum())

    assert interlayer_alignment(net).item() == pytest.approx(share(W2, W1) + share(W3, W2), rel=1e-10)
    assert interlayer_alignment(net, layers=["3", "5"]).item() == pytest.approx(share(W3, W2), rel=1e-10)


def test_interlayer_alignment_sees_directions_and_no_scale():
    first = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64)  # all it stretches goes to the first unit
    met, missed = torch.tensor([[[2.0, 0.0]], [[0.0, 2.0]]], dtype=torch.float64)
    for c in (1e-3, 1.0, 50.0):
        assert interlayer_alignment(holding(c * first, met)).item() == pytest.approx(0.5)  # open half of the time
        assert interlayer_alignment(holding(c * first, missed)).item() == 0
    net = holding(first, met)
    interlayer_alignment(net).backward()
    for layer in (net[0], net[2]):
        assert float((layer.weight.grad * layer.weight).sum().detach()) == pytest.approx(0, abs=1e-12)
    net = holding(torch.zeros(2, 2), met.float())
    interlayer_alignment(net).backward()
    assert not net[0].weight.grad.any()


# Options and the model


@pytest.mark.parametrize(
    "options", [{"share": 0.5}, {"norm": 1}, {"scale_free": True}, {"layers": ["1"]}], ids=lambda options: str(options)
)
def test_every_option_changes_the_outcome(options):
    net = mlp()
    assert spread_control(net, **options).item() != pytest.approx(spread_control(net).item(), rel=1e-3)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in OF_PAIRS])
def test_penalties_are_sums_over_the_chosen_layers(name):
    net = convnet(torch.float64)
    parts = [FUNCTIONS[name](net, layers=[layer]).item() for layer in ("0", "4", "8")]
    assert FUNCTIONS[name](net, layers=["0", "8"]).item() == pytest.approx(parts[0] + parts[2])
    assert FUNCTIONS[name](net).item() == pytest.approx(parts[1])
    assert len(set(parts)) == 3


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_the_model_stays_as_it_was(name, options):
    for net in (mlp(),) if name in OF_PAIRS else (mlp(), untidy()):
        with untouched(net):
            FUNCTIONS[name](net, **options)


@pytest.mark.parametrize("options", [{"share": 0}, {"share": 1.1}, {"share": math.nan}, {"norm": 3}])
def test_options_out_of_range_are_named(options):
    with pytest.raises(InputError, match=f"{next(iter(options))}: expected"):
        spread_control(mlp(), **options)


# The table


def test_every_penalty_has_a_row():
    assert sorted(PENALTIES) == sorted(FUNCTIONS)


@pytest.mark.parametrize("layers", [None, ["1", "3"]])
@pytest.mark.parametrize("name", PENALTIES)
def test_a_row_is_the_strength_times_the_penalty_of_its_name(name, layers):
    net = fcn(9, 7, 4, 3)
    bound, other = PENALTIES[name](net, 0.3, layers=layers), PENALTIES[name](net, 0.3, layers=layers, every=5)
    expected = 0.3 * FUNCTIONS[name](net, layers=layers)
    torch.testing.assert_close(bound(), expected)
    torch.testing.assert_close(other(), expected)  # what is reused later is exact at first
    with torch.no_grad():
        net[3].weight.mul_(2)
    torch.testing.assert_close(bound(), 0.3 * FUNCTIONS[name](net, layers=layers))


@pytest.mark.parametrize("name", PENALTIES)
def test_a_row_refuses_wrong_layers_before_the_first_step(name):
    with pytest.raises(InputError, match="layers: "):
        PENALTIES[name](mlp(), 0.3, layers=["nothing"])


def test_the_nuclear_norm_goes_on_with_the_factors_that_it_reuses():
    net = copy.deepcopy(mlp())
    bound = PENALTIES["nuclear_norm"](net, 0.3, every=3)
    bound()
    with torch.no_grad():
        net[1].weight.mul_(-1)
    resumed = PENALTIES["nuclear_norm"](net, 0.3, every=3)
    resumed.load_state_dict(bound.state_dict())
    with torch.no_grad():
        assert float(resumed()) == float(bound()) < 0  # the factor of before: the exact norm is never negative


# Selection


def test_the_default_is_every_linear_but_the_last_and_every_convolution_but_the_first():
    assert [layer.name for layer in chosen_layers(fcn(12, 8, 4, 3))] == ["1", "3", "5"]
    assert [layer.name for layer in chosen_layers(convnet())] == ["4"]
    net = resnet18_cifar(10, 4)
    convolutions = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 20
    assert [layer.name for layer in chosen_layers(net)] == convolutions[1:]
    assert convolutions[0] == "conv1"


def low_rank():
    """Low-rank pairs first, in the middle and last, dense and convolutional."""

    def build():
        stem = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Conv2d(2, 9, 1))
        images = nn.Sequential(stem, nn.ReLU(), nn.Conv2d(9, 2, 3), nn.Conv2d(2, 8, 1), nn.Flatten())
        dense = [nn.Linear(72, 3, bias=False), nn.Linear(3, 20), nn.ReLU(), nn.Linear(20, 4), nn.Linear(4, 10)]
        return nn.Sequential(images, *dense)

    return seeded(build)


def test_a_low_rank_pair_is_one_layer():
    net = low_rank()
    chosen = chosen_layers(net)
    assert [layer.name for layer in chosen] == ["0.2", "1"]  # the first pair of convolutions and the last are left out
    assert [layer.modules for layer in chosen] == [(net[0][2], net[0][3]), (net[1], net[2])]
    torch.testing.assert_close(matrix(chosen[1]), net[2].weight @ net[1].weight)
    everything = chosen_layers(net, ["0.0", "0.2", "1", "4"])
    views = read_layers(net).views
    assert [layer.name for layer in everything] == [view.name for view in views]
    for layer, view in zip(everything, views, strict=True):
        torch.testing.assert_close(matrix(layer), view.matrix.float())
        assert matrix(layer).requires_grad


def test_a_pair_goes_by_either_name_or_its_sequence_and_counts_once():
    net = low_rank()
    pair = chosen_layers(net, ["0.0"])
    assert [layer.name for layer in pair] == ["0.0.0"]
    for names in (["0.0.0"], ["0.0.1"], ["0.0.0", "0.0.1", "0.0"]):
        assert chosen_layers(net, names) == pair
    assert [layer.name for layer in chosen_layers(net, ["4", "0.0", "1"])] == ["0.0.0", "1", "4"]


def test_matrices_are_views_of_the_weights():
    for layer in chosen_layers(resnet18_cifar(10, 4)):
        weight = layer.modules[0].weight
        assert matrix(layer).shape == (weight.shape[0], weight[0].numel())
        assert matrix(layer).data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("names", [[], "fc", "", ["nothing"], ["2"], ["1", "0"], [""]])
def test_names_without_a_matrix_are_refused(names):
    with pytest.raises(InputError, match="layers: "):
        chosen_layers(mlp(), names)


@pytest.mark.parametrize("net", [nn.Sequential(nn.Linear(3, 2)), nn.Sequential(nn.ReLU()), nn.Conv2d(1, 2, 3)])
def test_a_default_that_leaves_no_layer_is_refused(net):
    with pytest.raises(InputError, match="leaves none in this model"):
        chosen_layers(net)


def test_weights_that_are_not_real_numbers_are_refused():
    with pytest.raises(InputError, match=r"expected weights of real numbers; got UninitializedParameter in '0'"):
        chosen_layers(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2)))
    with pytest.raises(InputError, match=r"got torch\.complex64 in '0'"):
        chosen_layers(nn.Sequential(nn.Linear(3, 3, dtype=torch.complex64), nn.Linear(3, 2)))
    with pytest.raises(InputError, match=r"model: expected a torch\.nn\.Module"):
        chosen_layers([nn.Linear(2, 2)])


def test_parametrised_weights_are_read_without_changing_their_buffers():
    net = seeded(lambda: nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)))
    parametrizations.spectral_norm(net[0])
    net.train()
    expected = copy.deepcopy(net).eval()[0].weight.norm(dim=1).sum()
    with untouched(net):
        value = group_lasso(net, layers=["0"])
        assert value.item() == pytest.approx(float(expected.detach()), rel=1e-6)
    value.backward()
    assert net[0].parametrizations.weight.original.grad.isfinite().all()


def test_joint_l1_composes_no_grouped_convolution():
    """Its stacked filters are not the matrix that acts, so that their product with the next layer's is none."""
    for groups in ((2, 1), (1, 2)):
        maps = nn.Conv2d(4, 4, 3, groups=groups[0]), nn.Conv2d(4, 4, 1, groups=groups[1])
        with pytest.raises(InputError, match="consecutive"):
            joint_l1(nn.Sequential(*maps), layers=["0", "1"])
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1))
    product = model[1].weight.flatten(1) @ model[0].weight.flatten(1)
    torch.testing.assert_close(joint_l1(model, layers=["0", "1"]), product.abs().sum())
