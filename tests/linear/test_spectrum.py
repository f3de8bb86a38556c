"""Largest singular values, their certified upper bounds, and iterations that never exceed them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from brittle.linear.spectrum import largest_norm, largest_singular_value, power_iteration, top_right_singular_vectors
from helpers.matrices import matrices, quick


def samples(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@quick
@given(matrices())
def test_the_value_is_numpys_and_the_bound_above_it(W):
    value, upper = (float(number) for number in largest_singular_value(W))
    exact = np.linalg.norm(W.numpy(), 2)
    assert value == pytest.approx(exact, rel=1e-13 * max(W.shape), abs=0)
    assert exact <= upper <= exact * (1 + 3e-12 * max(W.shape))


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e200, 1e300])
def test_no_square_overflows_or_underflows(scale):
    W = samples(1, 5, 7)
    value, upper = largest_singular_value(scale * W)
    assert float(value) == pytest.approx(scale * np.linalg.norm(W.numpy(), 2), rel=1e-12, abs=0)
    assert value <= upper


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (1, 5), (5, 1), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_batches_may_hold_zeros_and_complex_numbers(shape, dtype):
    A = samples(2, 2, 3, *shape, dtype=dtype)
    A[0, 0] = 0
    A[0, 1] *= 1e-180  # beside matrices of ordinary size
    value, upper = largest_singular_value(A)
    exact = np.array(
        [[np.linalg.norm(M / np.abs(M).max(), 2) * np.abs(M).max() if M.any() else 0 for M in row] for row in A.numpy()]
    )
    assert value.shape == (2, 3)
    assert (upper.numpy() >= exact).all()
    np.testing.assert_allclose(value.numpy(), exact, rtol=1e-12)


@pytest.mark.parametrize("decades", [0, 8, 14])
@pytest.mark.parametrize("shape", [(300, 200), (40, 900)])
def test_the_bound_holds_for_every_kind_of_spectrum(shape, decades):
    """Against a matrix whose largest singular value is 1 by construction."""
    r = min(shape)
    U, V = (torch.linalg.qr(samples(seed, side, r)).Q for seed, side in enumerate(shape))
    A = U * torch.logspace(0, -decades, r, dtype=torch.float64) @ V.mT
    value, upper = largest_singular_value(A)
    assert upper >= 1 - 1e-13
    assert float(value) == pytest.approx(1, rel=1e-12)


@quick
@given(matrices(), st.integers(1, 60), st.integers(0, 9))
def test_power_iteration_is_never_above(W, steps, seed):
    values, vectors = power_iteration(lambda v: v @ W.T @ W, samples(seed, 3, W.shape[1]), steps)
    square = np.linalg.norm(W.numpy(), 2) ** 2
    assert (values >= 0).all()
    assert (values <= square * (1 + 1e-12)).all()
    attained = np.linalg.norm((vectors @ W.T).numpy(), axis=1) / np.linalg.norm(vectors.numpy(), axis=1)
    assert (attained <= np.sqrt(square) * (1 + 1e-12)).all()


def test_power_iteration_finds_a_clear_maximum():
    W = torch.diag(torch.tensor([1.0, 5.0, 2.0], dtype=torch.float64))
    values, vectors = power_iteration(lambda v: v @ W, samples(0, 2, 3), 50)
    assert values.tolist() == pytest.approx([5, 5], rel=1e-12)
    np.testing.assert_allclose(vectors.abs().numpy(), [[0, 1, 0], [0, 1, 0]], atol=1e-12)


def test_power_iteration_stays_where_the_map_gives_zero():
    start = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    values, vectors = power_iteration(lambda v: v * torch.tensor([1.0, 0.0]), start, 4)
    assert values.tolist() == pytest.approx([1, 0])
    assert vectors.tolist() == [[1, 0], [0, 2]]


@quick
@given(matrices(zero=False), st.integers(1, 24))
def test_singular_vectors_are_numpys_subspaces(W, k):
    k = min(k, *W.shape)
    V = top_right_singular_vectors(W, k)
    _, sigma, Vt = np.linalg.svd(W.numpy(), full_matrices=False)
    rank = int((sigma > 1e-10 * sigma[0]).sum())
    kept = V.shape[1]
    if sigma[rank - 1] > 1e-4 * sigma[0]:
        assert kept == min(k, rank)
    torch.testing.assert_close(V.T @ V, torch.eye(kept, dtype=torch.float64), atol=1e-8, rtol=0)
    gains = torch.linalg.vector_norm(W @ V, dim=0).numpy()
    np.testing.assert_allclose(gains, sigma[:kept], rtol=1e-6, atol=1e-8 * sigma[0])
    for i in range(1, kept + 1):
        if i == len(sigma) or sigma[i] < 0.9 * sigma[i - 1]:
            P, Q = (V[:, :i] @ V[:, :i].T).numpy(), Vt[:i].T @ Vt[:i]
            np.testing.assert_allclose(P, Q, atol=1e-5)


def test_singular_vectors_of_a_zero_matrix():
    for shape in ((3, 5), (5, 3)):
        assert top_right_singular_vectors(torch.zeros(shape), 2).shape == (shape[1], 0)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (3, 3)])
@pytest.mark.parametrize("small", [1e-3, 1e-6, 1e-7])
def test_small_singular_values_have_directions_too(shape, small):
    W = torch.zeros(shape, dtype=torch.float64)
    W[0, 0], W[1, 1], W[2, 2] = 1.0, 0.1, small
    V = top_right_singular_vectors(W, 3)
    assert V.shape == (shape[1], 3)
    torch.testing.assert_close(V.abs(), torch.eye(*V.shape, dtype=torch.float64), atol=1e-6, rtol=0)


def test_large_matrices_agree_with_the_decomposition(monkeypatch):
    W = torch.randn(40, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for matrix in (W, W.mT):
        exact = top_right_singular_vectors(matrix, 7)
        monkeypatch.setattr("brittle.linear.spectrum.GRAM_VECTORS_FROM", 10)
        gram = top_right_singular_vectors(matrix, 7)
        monkeypatch.undo()
        assert torch.allclose((exact.mT @ gram).abs(), torch.eye(7, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("kind", ["real", "complex", "one rank", "equal", "zero"])
@pytest.mark.parametrize("least", [0.0, 0.5, 1.0, 2.0])
def test_the_largest_of_several_norms_is_that_of_a_singular_value_decomposition_or_the_norm_known(kind, least):
    dtype = torch.complex128 if kind == "complex" else torch.float64
    A = torch.randn(7, 5, 9, dtype=dtype, generator=torch.Generator().manual_seed(1)) * 1e-30
    if kind == "one rank":
        A = A[:, :, :1] @ A[:, :1, :] * 1e30
    if kind == "equal":
        A = A[:1].expand(7, -1, -1)
    if kind == "zero":
        A = torch.zeros_like(A)
    true = float(torch.linalg.matrix_norm(A, 2).max())
    known = least * (true or 1.0)
    for several in (A, A.mH):
        assert largest_norm(several, known) == pytest.approx(max(true, known), rel=1e-12, abs=0)
