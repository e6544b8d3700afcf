"""Numbers of operators are those that metrics compute of arrays, within their standard errors."""

import jax
import numpy as np
import pytest
from test_operators import PARAMS, X1, X2, model
from thoroughness import few

from lazyjax import kernel_alignment, matrix, ntk, ntk_operator, relative_kernel_change
from lazyjax.operators import (
    alignment,
    as_operator,
    effective_rank,
    frobenius_norm,
    relative_change,
    trace,
)
from lazyjax.spectrum import effective_rank as rank_of

N = 40


def kernel(values, seed=0):
    square = np.random.default_rng(seed).normal(size=(N, N))
    q = np.linalg.qr(square)[0]
    made = (q * values) @ q.T
    return (made + made.T) / 2


FLAT, POWER = kernel(np.linspace(1, 2, N)), kernel(1 / np.arange(1, N + 1) ** 1.5, seed=1)
MOVED = FLAT + 0.1 * kernel(np.linspace(-1, 3, N) ** 2, seed=2)
A, B, M = as_operator(FLAT), as_operator(POWER), as_operator(MOVED)

ROWS = {
    "norm": (lambda key, m: frobenius_norm(key, B, probes=m), lambda: np.linalg.norm(POWER)),
    "alignment": (
        lambda key, m: alignment(key, A, B, probes=m),
        lambda: kernel_alignment(FLAT, POWER),
    ),
    "alignment of near ones": (
        lambda key, m: alignment(key, M, A, probes=m),
        lambda: kernel_alignment(MOVED, FLAT),
    ),
    "change": (
        lambda key, m: relative_change(key, M, A, probes=m),
        lambda: relative_kernel_change(MOVED, FLAT),
    ),
    "rank": (
        lambda key, m: effective_rank(key, B, probes=m, depth=N),
        lambda: rank_of(POWER),
    ),
}


@few("name", sorted(ROWS, key=lambda name: name != "alignment"))
def test_the_numbers_are_those_of_arrays_within_the_errors(name):
    """One program for 200 keys: the errors hold the truth, and biases are of their square."""
    estimate, true = ROWS[name]
    true, m = float(true()), 16
    keys = jax.random.split(jax.random.key(1), 200)
    found = jax.jit(lambda keys: jax.lax.map(lambda key: estimate(key, m), keys))(keys)
    assert found.value.shape == found.error.shape == (200,)
    values, errors = np.asarray(found.value), np.asarray(found.error)
    spread = values.std()
    assert np.median(errors) == pytest.approx(spread, rel=0.35)
    within = np.mean(np.abs(values - true) < 2 * errors)
    assert 0.85 <= within <= 0.99  # 0.94 for the t distribution of 16 probes
    # more than the mean of 200 can tell, a bias of the order of the square of the error
    assert abs(values.mean() - true) < 4 * spread / 200**0.5 + 2 * spread**2 / true


@pytest.mark.thorough
@pytest.mark.parametrize("name", ROWS)
def test_errors_fall_as_the_root_of_the_probes(name):
    estimate, true = ROWS[name]
    few, many = (estimate(jax.random.key(3), m) for m in (32, 32 * 64))
    assert many.error == pytest.approx(few.error / 8, rel=0.5)
    assert abs(many.value - true()) < 4 * many.error < few.error


def test_squares_over_all_signs_are_exact():
    """What is unbiased: over all 2^n vectors of signs the mean is the square of the norm."""
    n = 4
    square = np.random.default_rng(4).normal(size=(n, n + 1))
    signs = np.array(np.meshgrid(*[[-1.0, 1.0]] * (n + 1))).reshape(n + 1, -1)
    wanted = np.linalg.norm(square) ** 2
    assert np.mean(np.sum((square @ signs) ** 2, 0)) == pytest.approx(wanted, rel=1e-12)
    # and the estimate is the root of the mean for its own signs
    key = jax.random.key(0)
    drawn = np.asarray(jax.random.rademacher(key, (7, n + 1), np.float64)).T
    found = frobenius_norm(jax.random.clone(key), as_operator(square), probes=7)
    assert float(found.value) ** 2 == pytest.approx(np.sum((square @ drawn) ** 2) / 7, rel=1e-12)


def test_the_error_is_that_of_the_jackknife():
    m = 9
    drawn = np.asarray(jax.random.rademacher(jax.random.key(5), (m, N), np.float64)).T
    a, b = FLAT @ drawn, POWER @ drawn
    cosines = []
    for i in range(m):
        u, w = (np.delete(c, i, 1) for c in (a, b))
        cosines.append(np.sum(u * w) / np.linalg.norm(u) / np.linalg.norm(w))
    error = np.sqrt((m - 1) / m * np.sum((np.array(cosines) - np.mean(cosines)) ** 2))
    found = alignment(jax.random.key(5), A, B, probes=m)
    wanted = np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b)
    assert float(found.value) == pytest.approx(wanted, rel=1e-12)
    assert float(found.error) == pytest.approx(error, rel=1e-9)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_signs_are_exact_for_diagonal_kernels(dtype):
    """(A v)_i^2 = a_i^2, whatever the sign."""
    rng = np.random.default_rng(0)
    a, b = (rng.uniform(0.1, 2, N).astype(dtype) for _ in range(2))
    C, D, key = as_operator(np.diag(a)), as_operator(np.diag(b)), jax.random.key
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    p = a.astype(float) / a.sum()
    rows = (
        (frobenius_norm(key(0), C, probes=2), np.linalg.norm(a)),
        (alignment(key(0), C, D, probes=2), a @ b / norms),
        (relative_change(key(0), C, D, probes=2), np.linalg.norm(a - b) / np.linalg.norm(b)),
        (effective_rank(key(0), C, probes=2, depth=N), np.exp(-p @ np.log(p))),
        (trace(key(0), C, probes=2), a.sum()),
    )
    eps = np.finfo(dtype).eps
    for found, wanted in rows:
        assert found.value.dtype == dtype
        assert abs(found.value - wanted) < 40 * eps * wanted
        assert found.error < 40 * eps * wanted


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_an_operator_is_aligned_with_itself_exactly(dtype):
    C, D = (as_operator(POWER.astype(dtype)) for _ in range(2))
    for pair in (C, C), (C, D):
        for through in (lambda f: f, jax.jit):
            assert tuple(map(float, through(alignment)(start(), *pair))) == (1.0, 0.0)
            assert tuple(map(float, through(relative_change)(start(), *pair))) == (0.0, 0.0)


@pytest.mark.thorough
def test_an_alignment_close_to_one_keeps_its_digits():
    """1 - cos = 5e-13 in float32, for what differs by 1e-6 of itself."""
    rng = np.random.default_rng(0)
    d = rng.uniform(1, 2, N)
    near = d * (1 + 1e-3 * rng.normal(size=N))
    C, D = (as_operator(np.diag(a.astype(np.float32))) for a in (d, near))
    found = alignment(jax.random.key(0), C, D, probes=4)
    wanted = d @ near / np.linalg.norm(d) / np.linalg.norm(near)
    assert 1 - wanted < 1e-6
    assert float(1 - found.value) == pytest.approx(1 - wanted, abs=1.2e-7)


def test_multiples_are_aligned_and_negatives_opposed():
    assert float(alignment(jax.random.key(0), A, 3.0 * A).value) == pytest.approx(1, abs=1e-12)
    assert float(alignment(jax.random.key(0), A, -2.0 * A).value) == pytest.approx(-1, abs=1e-12)
    found = relative_change(jax.random.key(0), 3.0 * A, A)
    assert float(found.value) == pytest.approx(2, rel=1e-12)
    assert found.error < 1e-12


@pytest.mark.thorough
@pytest.mark.parametrize("scale", [2.0**-100, 2.0**122])
def test_nothing_depends_on_the_scale_in_float32(scale):
    C, D = (as_operator(a.astype(np.float32)) for a in (FLAT, POWER))
    key, s = jax.random.key, np.float32(scale)
    for estimate, factor in (
        (lambda C, D: frobenius_norm(key(0), C), scale),
        (lambda C, D: alignment(key(0), C, D), 1),
        (lambda C, D: relative_change(key(0), D, C), 1),
        (lambda C, D: effective_rank(key(0), D, depth=20), 1),
    ):
        one, other = estimate(C, D), estimate(s * C, s * D)
        for found, wanted in zip(other, one, strict=True):
            assert float(found) / factor == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.thorough
def test_too_small_a_depth_makes_the_effective_rank_too_large():
    found = [float(effective_rank(start(), B, depth=depth).value) for depth in (1, 2, 4, 8, 16, N)]
    assert np.all(np.diff(found) < 1e-9)
    assert found[0] > 1.5 * found[-1]
    assert found[0] == pytest.approx(N, rel=0.5)


@pytest.mark.thorough
def test_operators_of_networks_have_the_numbers_of_their_kernels():
    moved = jax.tree.map(lambda a: 1.1 * a, PARAMS)
    K, K0 = (ntk(model, w, X1) for w in (moved, PARAMS))
    C, C0 = (ntk_operator(model, w, X1) for w in (moved, PARAMS))
    for found, wanted in (
        (frobenius_norm(start(), C0, probes=500), np.linalg.norm(matrix(K0))),
        (alignment(start(), C, C0, probes=500), kernel_alignment(K, K0)),
        (relative_change(start(), C, C0, probes=500), relative_kernel_change(K, K0)),
        (effective_rank(start(), C0, probes=500, depth=21), rank_of(K0)),
    ):
        assert found.value.shape == found.error.shape == ()
        assert abs(found.value - wanted) < 4 * found.error
        assert found.error < 0.1 * wanted


@pytest.mark.thorough
def test_kernels_of_two_batches_have_them_too():
    K, C = ntk(model, PARAMS, X1, X2), ntk_operator(model, PARAMS, X1, X2)
    found = frobenius_norm(jax.random.key(0), C, probes=500)
    assert abs(found.value - np.linalg.norm(matrix(K))) < 4 * found.error
    assert float(alignment(jax.random.key(0), C, C).value) == 1


ZERO, WIDE = as_operator(np.zeros((N, N))), as_operator(np.ones((N, 3)))


def start():
    return jax.random.key(0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: frobenius_norm(start(), FLAT), TypeError, "`A` must be a KernelOperator, got ndarray"),
        (lambda: alignment(start(), A, POWER), TypeError, "`B` must be a KernelOperator, got ndarray"),
        (lambda: alignment(start(), A, WIDE), ValueError, "`B` must have the shape of `A`, (40, 40), got (40, 3)"),
        (lambda: alignment(start(), ZERO, A), ValueError, "`A` must not be zero"),
        (lambda: alignment(start(), A, ZERO), ValueError, "`B` must not be zero"),
        (lambda: relative_change(start(), A, ZERO), ValueError, "`B` must not be zero"),
        (lambda: relative_change(start(), WIDE, A), ValueError, "`B` must have the shape of `A`"),
        (lambda: effective_rank(start(), ZERO), ValueError, "`A` must not be zero"),
        (lambda: effective_rank(start(), WIDE), ValueError, "`A` must be symmetric and positive"),
        (lambda: effective_rank(start(), A, depth=0), ValueError, "`depth` must be at least 1"),
        (lambda: frobenius_norm(start(), A, probes=1), ValueError, "`probes` must be at least 2, got 1. One has no"),
        (lambda: alignment(start(), A, B, probes=2.5), TypeError, "`probes` must be a whole number"),
    ],
)  # fmt: skip # to be read as a table
def test_bad_arguments_are_refused(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)
