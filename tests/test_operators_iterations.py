"""Conjugate gradients in programs of the user's own: jit, vmap, scan, and derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from jax.tree_util import Partial
from test_operators import PARAMS, X1, model
from thoroughness import few

from lazyjax import matrix, ntk
from lazyjax.operators import as_operator, conjugate_gradients, ntk_operator, nystrom, solve
from lazyjax.operators.algebra import operator

N = 24
RIDGE = 1e-2


def kernel(seed, n=N):
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]
    made = (q * np.geomspace(1e-4, 1, n)) @ q.T
    return (made + made.T) / 2


SQUARE = kernel(0)
DENSE = SQUARE + RIDGE * np.eye(N)
B = np.random.default_rng(1).normal(size=(N, 3))
A = as_operator(SQUARE, ridge=RIDGE)


def preconditioned(rank, A, key=0):
    return nystrom(jax.random.key(key), A, rank=rank) if rank else None


def near(found, wanted, tolerance=1e-8):
    assert found.shape == np.shape(wanted)
    np.testing.assert_allclose(found, wanted, atol=tolerance * np.abs(wanted).max())


@few("rank", [0, 8])
def test_the_residuals_are_those_of_solve_and_the_last_is_computed(rank):
    P = preconditioned(rank, A)
    found = jax.jit(lambda A, b, P: conjugate_gradients(A, b, iterations=6, preconditioner=P))(
        A, B, P
    )
    assert found.x.shape == B.shape
    assert found.residuals.shape == (7, 3)
    true = np.linalg.norm(B - DENSE @ found.x, axis=0) / np.linalg.norm(B, axis=0)
    np.testing.assert_allclose(found.residuals[-1], true, rtol=1e-10)
    together = solve(A, B, tolerance=1e-6, preconditioner=P)
    np.testing.assert_allclose(found.residuals[:6], together.residuals[:6], rtol=1e-9)


@pytest.mark.thorough
@pytest.mark.parametrize("rank", [0, 8])
def test_enough_steps_give_the_solution_and_more_change_nothing(rank):
    P = preconditioned(rank, A)
    wanted = np.linalg.solve(DENSE, B)
    runs = [conjugate_gradients(A, B, iterations=i, preconditioner=P) for i in (60, 400)]
    for run in runs:
        near(run.x, wanted, 1e-11)
        assert np.all(run.residuals[-1] < 1e-13)
    # done columns are left as they are
    np.testing.assert_array_equal(runs[0].x, runs[1].x)
    one = conjugate_gradients(A, B[:, 0], iterations=60, preconditioner=P)
    assert one.residuals.shape == (61,)
    near(one.x, wanted[:, 0], 1e-11)


@pytest.mark.thorough
def test_a_second_start_goes_on_from_the_first():
    first = conjugate_gradients(A, B, iterations=60)
    b = B + 1e-6 * np.roll(B, 1)
    again = conjugate_gradients(A, b, iterations=2, x0=first.x)
    cold = conjugate_gradients(A, b, iterations=2)
    assert again.residuals[0].max() < 1e-5
    assert again.residuals[-1].max() < 1e-4 * cold.residuals[-1].min()
    true = np.linalg.norm(b - DENSE @ again.x, axis=0) / np.linalg.norm(b, axis=0)
    np.testing.assert_allclose(again.residuals[-1], true, rtol=1e-5)


@pytest.mark.thorough
def test_a_column_of_zeros_is_solved_by_zeros_and_any_scale_is_the_same():
    b = B * np.array([1e-25, 0, 1e25])
    C = as_operator(SQUARE.astype(np.float32), ridge=RIDGE)
    found = conjugate_gradients(C, b.astype(np.float32), iterations=400)
    assert not np.any(found.x[:, 1])
    assert not np.any(found.residuals[:, 1])
    assert np.all(found.residuals[-1] < 1e-5)
    near(found.x[:, 0] * 1e25, np.linalg.solve(DENSE, B[:, 0]), 1e-3)


def test_no_product_is_made_once_all_columns_are_within_rounding():
    seen = []

    def product(v):
        def host(u):
            seen.append(u.shape)
            return SQUARE @ np.asarray(u)

        return jax.pure_callback(host, jax.ShapeDtypeStruct(v.shape, v.dtype), v)

    C = operator(product, product, shape=(N, N), dtype=np.float64, psd=True) + 1.0
    residuals = conjugate_gradients(C, B, iterations=300).residuals
    assert np.all(residuals[-1] < 1e-15)
    assert len(seen) < 30
    assert set(seen) == {B.shape}


@pytest.mark.thorough
def test_the_last_residual_is_no_claim_of_the_recursion():
    """In float32 the recursion goes on falling where the residual itself does not."""
    C = as_operator(SQUARE.astype(np.float32), ridge=1e-5)
    residuals = conjugate_gradients(C, B.astype(np.float32), iterations=200).residuals
    assert np.all(residuals[-1] > 3 * residuals[-2])


# --- derivatives ---------------------------------------------------------------------------------


def through(rank, x0=False, iterations=80):
    """A number of the solution, as a function of the features, the ridge and b."""

    def loss(features, ridge, b):
        C = as_operator(features @ features.T) + ridge
        P = preconditioned(rank, C)
        start = jnp.ones_like(b) if x0 else None
        x, _ = conjugate_gradients(C, b, iterations=iterations, preconditioner=P, x0=start)
        return jnp.sum(jnp.sin(x / 10) + x**2 / 100)

    return loss


def dense_loss(features, ridge, b):
    x = jnp.linalg.solve(features @ features.T + ridge * jnp.eye(N), b)
    return jnp.sum(jnp.sin(x / 10) + x**2 / 100)


FEATURES = np.random.default_rng(2).normal(size=(N, 9)) / 3
POINT = (FEATURES, jnp.asarray(0.1), jnp.asarray(B))


@few("x0", [False, True])
@few("rank", [0, 6])
def test_derivatives_by_everything_are_those_of_the_dense_solve(rank, x0):
    found, wanted = (
        jax.jit(jax.grad(loss, (0, 1, 2)))(*POINT) for loss in (through(rank, x0), dense_loss)
    )
    for a, b in zip(found, wanted, strict=True):
        near(a, b)


@pytest.mark.thorough
@pytest.mark.parametrize("x0", [False, True])
@pytest.mark.parametrize("rank", [0, 6])
def test_derivatives_are_differences_forward_and_in_reverse(rank, x0):
    check_grads(through(rank, x0), POINT, 1, modes=("fwd", "rev"), rtol=1e-6)


@pytest.mark.thorough
def test_second_derivatives_too():
    def hessian(loss):
        return jax.jit(jax.hessian(lambda r, b: loss(FEATURES, r, b), (0, 1)))(*POINT[1:])

    found, wanted = hessian(through(0)), hessian(dense_loss)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        near(a, b, 1e-7)


@pytest.mark.thorough
def test_derivatives_do_not_depend_on_the_number_of_steps():
    """Not even on whether the start was the solution, where differentiated steps would give 0."""
    few, many = (jax.grad(through(0, iterations=i), (0, 1, 2))(*POINT) for i in (40, 300))
    for a, b in zip(few, many, strict=True):
        near(a, b)

    def from_the_solution(b):
        x0 = jnp.asarray(np.linalg.solve(DENSE, B))
        return jnp.sum(jnp.sin(conjugate_gradients(A, b, iterations=60, x0=x0).x))

    wanted = jax.grad(lambda b: jnp.sum(jnp.sin(jnp.linalg.solve(DENSE, b))))(jnp.asarray(B))
    near(jax.grad(from_the_solution)(jnp.asarray(B)), wanted)


@pytest.mark.thorough
def test_memory_does_not_grow_with_the_steps():
    used = []
    for steps in (10, 1000):
        run = jax.jit(jax.grad(through(0, iterations=steps), (0, 1, 2))).lower(*POINT).compile()
        used.append(run.memory_analysis().temp_size_in_bytes)
    # the residuals, a number a step and column; a vector a step would be N times that
    assert used[1] - used[0] < 990 * 3 * 8 * 6


@pytest.mark.thorough
def test_no_derivative_goes_through_residuals_the_preconditioner_or_the_start():
    def last(ridge):
        C = as_operator(SQUARE) + ridge
        return conjugate_gradients(C, B, iterations=3, x0=ridge * B).residuals.sum()

    assert float(jax.grad(last)(jnp.asarray(0.1))) == 0

    def by_the_shift(shift):
        P = nystrom(jax.random.key(0), as_operator(SQUARE) + shift, rank=6)
        return jnp.sum(conjugate_gradients(A, B, iterations=80, preconditioner=P).x)

    assert float(jax.grad(by_the_shift)(jnp.asarray(0.1))) == 0

    def by_the_start(x0):
        return jnp.sum(conjugate_gradients(A, B, iterations=3, x0=x0).x)

    assert not np.any(jax.grad(by_the_start)(jnp.ones_like(B)))


@pytest.mark.thorough
def test_by_b_alone_products_need_no_derivatives():
    def product(v):
        like = jax.ShapeDtypeStruct(v.shape, v.dtype)
        return jax.pure_callback(lambda u: SQUARE @ np.asarray(u), like, v)

    C = operator(product, product, shape=(N, N), dtype=np.float64, psd=True) + RIDGE
    found = jax.grad(lambda b: jnp.sum(conjugate_gradients(C, b, iterations=60).x ** 2))
    x = np.linalg.solve(DENSE, B)
    near(found(jnp.asarray(B)), 2 * np.linalg.solve(DENSE, x))


@pytest.mark.thorough
@pytest.mark.parametrize("keep", ["nothing", "residuals", "features"])
def test_derivatives_by_the_parameters_of_a_network(keep):
    b = jnp.asarray(np.random.default_rng(3).normal(size=21))

    def loss(scale, solved):
        params = {**PARAMS, "twice": scale * PARAMS["twice"]}
        return jnp.sum(solved(params) ** 2)

    def by_steps(params):
        C = ntk_operator(model, params, X1, keep=keep, ridge=1.0)
        return conjugate_gradients(C, b, iterations=60).x

    def dense(params):
        return jnp.linalg.solve(matrix(ntk(model, params, X1)) + jnp.eye(21), b)

    found, wanted = (
        jax.jit(jax.value_and_grad(loss), static_argnums=1)(jnp.asarray(1.0), solved)
        for solved in (by_steps, dense)
    )
    for a, c in zip(found, wanted, strict=True):
        assert float(a) == pytest.approx(float(c), rel=1e-8)


# --- in other programs ---------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize("rank", [0, 6])
def test_many_systems_are_solved_as_one_by_one(rank):
    squares = jnp.stack([jnp.asarray(kernel(seed)) for seed in range(3)])
    keys = jax.random.split(jax.random.key(0), 3)

    def one(key, square, ridge, b):
        C = as_operator(square) + ridge
        P = nystrom(key, C, rank=rank) if rank else None
        return conjugate_gradients(C, b, iterations=70, preconditioner=P).x

    ridges, bs = jnp.array([1e-2, 1e-1, 1.0]), jnp.asarray(B.T)
    found = jax.vmap(one)(keys, squares, ridges, bs)
    for x, square, ridge, b in zip(found, squares, ridges, bs, strict=True):
        near(x, np.linalg.solve(square + ridge * np.eye(N), b), 1e-9)
    shared = jax.vmap(lambda b: conjugate_gradients(A, b, iterations=70).x)(bs)
    near(shared, np.linalg.solve(DENSE, B).T, 1e-9)


@pytest.mark.thorough
def test_a_scan_of_solves_each_from_the_one_before():
    ridges = jnp.asarray(np.geomspace(1, RIDGE, 8))

    def step(x, ridge):
        C = as_operator(SQUARE) + ridge
        P = preconditioned(8, C)
        x, residuals = conjugate_gradients(C, B, iterations=12, preconditioner=P, x0=x)
        return x, residuals[-1]

    x, residuals = jax.jit(lambda: jax.lax.scan(step, jnp.zeros_like(B), ridges))()
    assert residuals.shape == (8, 3)
    assert residuals.max() < 1e-4
    true = np.linalg.norm(B - DENSE @ x, axis=0) / np.linalg.norm(B, axis=0)
    np.testing.assert_allclose(residuals[-1], true, rtol=1e-5)


@pytest.mark.thorough
def test_a_preconditioner_in_a_program_is_the_one_outside():
    run = jax.jit(lambda key, A: nystrom(key, A, rank=7))
    inside, outside = run(jax.random.key(3), A), nystrom(jax.random.key(3), A, rank=7)
    for C in (inside, outside):
        assert C.factor.shape == (7, N)
    near(inside.factor.T @ inside.factor, outside.factor.T @ outside.factor, 1e-10)
    near(inside(B), outside(B), 1e-9)
    low_rank = operator(lambda v: v, lambda v: v, shape=(N, N), dtype=np.float64, psd=True) + 1.0
    assert run(jax.random.key(3), low_rank).values.shape == (7,)


@pytest.mark.thorough
def test_rows_that_are_not_positive_are_seen_in_the_residuals():
    def run(square):
        C = as_operator(square) + 2.0
        P = nystrom(jax.random.key(0), C, rank=5)
        return P, conjugate_gradients(C, jnp.ones(N), iterations=3, preconditioner=P)

    P, found = jax.jit(run)(-np.eye(N))
    assert np.all(np.isnan(P.values))
    assert np.isnan(found.residuals[-1])


def test_a_second_call_compiles_nothing():
    traces = []

    def product(square, v):
        traces.append(v.shape)
        return square @ v

    for square in (SQUARE, 2 * SQUARE):
        base = Partial(product, jnp.asarray(square))
        C = operator(base, base, shape=(N, N), dtype=np.float64, psd=True) + 1e-4
        conjugate_gradients(C, B, iterations=5)
        traces, seen = [], len(traces)
    assert seen == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"A": SQUARE}, TypeError, "`A` must be a KernelOperator, got ndarray. Use as_operator"),
        ({"A": as_operator(np.ones((N, 3)))}, ValueError, "`A` must be symmetric and positive"),
        ({"b": np.ones(N, int)}, TypeError, "`b` must hold floats"),
        ({"b": np.ones(N + 1)}, ValueError, "`b` must have shape (24,) or (24, B), got (25,)"),
        ({"b": np.full(N, np.nan)}, ValueError, "`b` must be finite, got 24 values"),
        ({"iterations": 0}, ValueError, "`iterations` must be at least 1"),
        ({"iterations": 1.5}, TypeError, "`iterations` must be a whole number"),
        ({"preconditioner": 3}, TypeError, "`preconditioner` must be a function"),
        ({"x0": np.ones(N)}, ValueError, "`x0` must have the shape of `b`, (24, 3), got (24,)"),
        ({"x0": np.ones((N, 3), int)}, TypeError, "`x0` must hold floats"),
    ],
)
def test_bad_arguments_are_refused(change, error, message):
    arguments = {"A": A, "b": B, "iterations": 5} | change
    with pytest.raises(error) as caught:
        conjugate_gradients(arguments.pop("A"), arguments.pop("b"), **arguments)
    assert message in str(caught.value)
