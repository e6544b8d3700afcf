import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from thoroughness import few

from lazyjax.operators import solves
from lazyjax.operators.algebra import as_operator, operator
from lazyjax.operators.preconditioners import Nystrom, nystrom
from lazyjax.operators.solves import NotConverged, solve

N = 60


def kernel(values, seed=0):
    """Make a kernel with these eigenvalues."""
    square = np.random.default_rng(seed).normal(size=(len(values), len(values)))
    q = np.linalg.qr(square)[0]
    made = (q * values) @ q.T
    return (made + made.T) / 2


DECAYING = kernel(np.geomspace(1e-8, 1, N))
RIDGE = 1e-6
B = np.random.default_rng(1).normal(size=(N, 4))


def without_rows(square):
    return operator(
        lambda v: square @ v, lambda v: square.T @ v, shape=(N, N), dtype=square.dtype, psd=True
    )


def on_the_host(square):
    def product(v):
        return jax.pure_callback(
            lambda u: square @ np.asarray(u), jax.ShapeDtypeStruct(v.shape, v.dtype), v
        )

    return operator(product, product, shape=(N, N), dtype=square.dtype, psd=True)


OPERATORS = {"array": as_operator, "without rows": without_rows, "callback": on_the_host}


@pytest.mark.parametrize("made", OPERATORS)
@few("rank", [0, 20])
def test_a_solution_is_that_of_the_dense_system(made, rank):
    A = OPERATORS[made](DECAYING) + RIDGE
    P = nystrom(jax.random.key(0), A, rank=rank) if rank else None
    found = solve(A, B, tolerance=1e-9, preconditioner=P)
    dense = DECAYING + RIDGE * np.eye(N)
    assert found.x.shape == B.shape
    assert found.residuals.shape == (found.iterations + 1, 4)
    assert found.converged
    true = np.linalg.norm(B - dense @ found.x, axis=0) / np.linalg.norm(B, axis=0)
    assert np.all(true <= 1e-9)
    np.testing.assert_allclose(found.residuals[-1], true, atol=1e-10)
    np.testing.assert_allclose(found.residuals[0], 1, rtol=1e-12)
    exact = np.linalg.solve(dense, B)
    assert np.all(np.linalg.norm(found.x - exact, axis=0) < 1e-4 * np.linalg.norm(exact, axis=0))


def test_as_many_steps_as_there_are_distinct_eigenvalues():
    values = np.repeat([1.0, 2.0, 5.0, 9.0, 30.0], N // 5)
    found = solve(as_operator(kernel(values)), B[:, 0], tolerance=1e-11)
    assert found.x.shape == (N,)
    assert found.residuals.shape == (6,)
    assert found.iterations == 5


@pytest.mark.thorough
def test_the_error_falls_in_the_norm_of_the_operator():
    A = as_operator(kernel(np.geomspace(1e-3, 1, N)))
    exact = np.linalg.solve(np.asarray(A @ jnp.eye(N)), B[:, 0])
    errors = []
    for steps in range(1, 25):
        with pytest.raises(NotConverged) as caught:
            solve(A, B[:, 0], tolerance=1e-14, iterations=steps)
        assert caught.value.solution.iterations == steps
        error = caught.value.solution.x - exact
        errors.append(float(error @ (A @ error)))
    assert np.all(np.diff(errors) < 0)


@pytest.mark.thorough
def test_several_right_hand_sides_are_solved_as_one_by_one():
    A = as_operator(DECAYING, ridge=1e-1)
    b = B.copy()
    b[:, 1] = 0
    b[:, 2] *= 1e12
    P = nystrom(jax.random.key(0), A, rank=12)
    for M in (None, P):
        together = solve(A, b, tolerance=1e-8, preconditioner=M)
        alone = [solve(A, b[:, i], tolerance=1e-8, preconditioner=M) for i in range(4)]
        assert together.iterations == max(one.iterations for one in alone)
        assert alone[1].iterations == 0
        for i, one in enumerate(alone):
            # frozen once it is done
            np.testing.assert_allclose(together.x[:, i], one.x, rtol=1e-6, atol=1e-30)
            np.testing.assert_allclose(
                together.residuals[:, i][: one.iterations], one.residuals[:-1], rtol=1e-4, atol=1e-9
            )


def test_no_product_is_made_once_all_columns_are_done():
    seen = []

    def host(v):
        seen.append(v.shape)
        return DECAYING @ np.asarray(v)

    def product(v):
        return jax.pure_callback(host, jax.ShapeDtypeStruct(v.shape, v.dtype), v)

    A = operator(product, product, shape=(N, N), dtype=np.float64, psd=True) + 1.0
    found = solve(A, B, tolerance=1e-6)
    assert len(seen) == found.iterations + 1 < 12
    assert set(seen) == {B.shape}


@pytest.mark.thorough
def test_random_rows_make_an_ill_conditioned_kernel_converge():
    values = 1 / np.arange(1, 121) ** 4.0
    A = as_operator(kernel(values), ridge=1e-7)
    b = np.random.default_rng(2).normal(size=120)
    steps = [solve(A, b, tolerance=1e-8).iterations]
    for rank in (10, 20):
        P = nystrom(jax.random.key(0), A, rank=rank)
        steps.append(solve(A, b, tolerance=1e-8, preconditioner=P).iterations)
    assert steps[0] > 1.5 * steps[1] > 1.5 * steps[2]
    assert steps[0] > 3 * steps[2]


@pytest.mark.thorough
def test_nothing_depends_on_the_scale_of_the_kernel():
    found = []
    for scale in (2.0**-500, 1.0, 2.0**500):
        A = scale * as_operator(DECAYING, ridge=1e-4)
        P = nystrom(jax.random.key(0), A, rank=10)
        found.append(solve(A, B, tolerance=1e-8, preconditioner=P))
        assert abs(found[-1].iterations - found[0].iterations) <= 2  # rounding
        np.testing.assert_allclose(scale * found[-1].x, 2.0**-500 * found[0].x, rtol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("rank", [0, 15])
@pytest.mark.parametrize(
    ("scale", "sizes"),
    [
        (1e-30, [1e-22, 0, 1, 1e5]),
        (1.0, [1e-22, 0, 1, 1e25]),
        (1e30, [1e-5, 0, 1, 1e35]),
    ],
)
def test_neither_the_operator_nor_a_column_need_be_of_order_one_in_float32(scale, sizes, rank):
    """Squares of such numbers are beyond the range of float32."""
    square = kernel(np.geomspace(1e-2, 1, N))
    A = as_operator((scale * square).astype(np.float32), ridge=np.float32(0.1 * scale))
    P = nystrom(jax.random.key(0), A, rank=rank) if rank else None
    found = solve(A, (np.array(sizes) * B).astype(np.float32), preconditioner=P, tolerance=1e-5)
    assert found.converged
    assert found.iterations > 2
    exact = np.linalg.solve(square + 0.1 * np.eye(N), B)
    assert not np.any(found.x[:, 1])
    for i in (0, 2, 3):
        x = np.asarray(found.x[:, i], float) * scale / sizes[i]
        assert np.linalg.norm(x - exact[:, i]) < 1e-4 * np.linalg.norm(exact[:, i])


def test_a_right_hand_side_is_as_large_or_small_as_it_likes():
    A = as_operator(kernel(np.geomspace(1e-2, 1, N)).astype(np.float32), ridge=0.1)
    one = solve(A, B.astype(np.float32))
    for size in (1e-30, 1e-22, 1e25, 1e35):
        found = solve(A, (size * B).astype(np.float32))
        assert found.iterations == one.iterations
        np.testing.assert_allclose(np.float64(found.x) / size, one.x, rtol=1e-3, atol=1e-4)


def test_a_solution_beyond_the_range_is_no_solution():
    A = as_operator(np.eye(N, dtype=np.float32) * np.float32(1e-30))
    with pytest.raises(ValueError, match="`b` must have an x in the range of float32.*Divide `b`"):
        solve(A, np.full(N, 1e20, np.float32))


def test_half_precision_is_solved_in_float32():
    square = jnp.asarray(kernel(np.geomspace(1e-1, 1, N)), jnp.bfloat16)
    found = solve(as_operator(square, ridge=0.5), jnp.asarray(B, jnp.bfloat16), tolerance=1e-5)
    dense = np.asarray(square, float) + 0.5 * np.eye(N)
    exact = np.linalg.solve(dense, np.asarray(jnp.asarray(B, jnp.bfloat16), float))
    assert found.x.dtype == jnp.float32
    np.testing.assert_allclose(found.x, exact, atol=1e-4)


@pytest.mark.thorough
def test_rows_of_a_kernel_of_zeros_are_a_preconditioner():
    A = as_operator(np.zeros((N, N), np.float32), ridge=2.0)
    P = nystrom(jax.random.key(0), A, rank=5)
    np.testing.assert_allclose(P(jnp.ones((N, 1), np.float32)), 0.5, rtol=1e-6)
    assert solve(A, B.astype(np.float32), preconditioner=P).iterations <= 1


@pytest.mark.thorough
def test_rows_that_rounding_made_indefinite_precondition_all_the_same():
    eps = np.finfo(np.float64).eps
    values = np.ones(N)
    values[0] = -30 * eps * N  # beyond the first two tries
    A = as_operator(np.diag(values), ridge=1.0)
    for P in (
        nystrom(jax.random.key(0), A, rank=N),
        jax.jit(lambda A: nystrom(jax.random.key(0), A, rank=N))(A),
    ):
        np.testing.assert_allclose(P(jnp.eye(N)), np.diag(1 / (1 + values)), atol=1e-9)


@pytest.mark.thorough
def test_the_preconditioner_is_what_its_equation_says():
    outputs = 3
    scale, shift = 2.0, 1e-3
    square = jnp.asarray(DECAYING)
    as_kernel = square.reshape(N // outputs, outputs, N // outputs, outputs).transpose(0, 2, 1, 3)
    A = scale * as_operator(as_kernel) + shift
    P = nystrom(jax.random.key(0), A, rank=10)
    assert P.factor.shape == (9, N)  # whole examples
    # the examples that were drawn: there C W^-1 C^T is the kernel
    low_rank = np.asarray(P.factor.T @ P.factor)
    exact = np.abs(np.diag(low_rank) - scale * np.diag(DECAYING)) < 1e-10
    assert exact.sum() == 9
    assert np.all(exact.reshape(-1, outputs).sum(1) % outputs == 0)
    c = scale * DECAYING[:, exact]
    np.testing.assert_allclose(low_rank, c @ np.linalg.solve(c[exact], c.T), atol=1e-10)
    np.testing.assert_allclose(P.factor @ P.factor.T, np.diag(P.values), atol=1e-12)
    dense = low_rank + shift * np.eye(N)
    np.testing.assert_allclose(P(B), np.linalg.solve(dense, B), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(P.inverse_root(P.inverse_root(B)), P(B), rtol=1e-9, atol=1e-9)
    assert float(P.logdet()) == pytest.approx(np.linalg.slogdet(dense)[1], rel=1e-9)
    # A is nowhere below P
    assert np.linalg.eigvalsh(np.asarray(A @ jnp.eye(N)) - dense)[0] > -1e-12


@pytest.mark.thorough
def test_a_kernel_of_low_rank_is_its_rows():
    features = np.random.default_rng(0).normal(size=(N, 5))
    A = as_operator(features @ features.T, ridge=1e-4)
    P = nystrom(jax.random.key(0), A, rank=20)
    assert solve(A, B, preconditioner=P, tolerance=1e-8).iterations <= 3


def test_any_function_preconditions():
    diagonal = np.geomspace(1, 1e6, N)
    A = as_operator(np.diag(diagonal))
    found = solve(A, B, preconditioner=lambda v: v / jnp.asarray(diagonal)[:, None])
    assert found.iterations == 1


@pytest.mark.thorough
def test_a_second_call_compiles_nothing():
    traces = []

    def product(square, v):
        traces.append(v.shape)
        return square @ v

    for seed, square in enumerate((DECAYING, 2 * DECAYING)):
        # the array travels as an argument; a function that closes over it would be another one
        base = Partial(product, jnp.asarray(square))
        A = operator(base, base, shape=(N, N), dtype=np.float64, psd=True) + 1e-4
        P = nystrom(jax.random.key(seed), as_operator(square, ridge=1e-4), rank=10)
        solve(A, B, preconditioner=P)
        assert traces == traces[:2] == [B.shape] * 2  # a step, and the residual at the end


def test_what_did_not_converge_says_so_and_carries_what_there_is():
    A = as_operator(DECAYING, ridge=1e-6)
    with pytest.raises(NotConverged, match="after 5 iterations. Use more `iterations`") as caught:
        solve(A, B, tolerance=1e-8, iterations=5)
    solution = caught.value.solution
    assert solution.iterations == 5
    assert not solution.converged
    assert solution.residuals.shape == (6, 4)
    true = np.linalg.norm(B - np.asarray(A @ solution.x), axis=0) / np.linalg.norm(B, axis=0)
    np.testing.assert_allclose(solution.residuals[-1], true, rtol=1e-9)


def test_a_tolerance_below_rounding_is_not_claimed():
    A = as_operator(DECAYING.astype(np.float32), ridge=1e-6)
    with pytest.raises(NotConverged, match="Rounding in float32 allows no less") as caught:
        solve(A, B, tolerance=1e-8, iterations=10_000)
    solution = caught.value.solution
    assert solution.x.dtype == np.float32
    assert solution.iterations < 10_000
    # the recursion alone would have claimed it
    assert solution.residuals[-1].max() > 1e-8


@pytest.mark.thorough
def test_in_float64_the_cure_is_not_float64():
    with pytest.raises(NotConverged, match="Rounding in float64 .* ridge, or a looser `tolerance`"):
        solve(as_operator(DECAYING), B, tolerance=1e-15, iterations=10_000)
    singular = as_operator(np.diag(np.arange(2.0)))
    with pytest.raises(NotConverged, match="use a larger ridge, or a looser `tolerance`"):
        solve(singular, np.ones(2))


def test_the_recursion_is_replaced_where_it_drifts(monkeypatch):
    square = kernel(np.geomspace(1e-6, 1, N))
    found = solve(as_operator(square), B, tolerance=5e-11)
    true = np.linalg.norm(B - square @ found.x, axis=0) / np.linalg.norm(B, axis=0)
    assert true.max() < 5.5e-11
    monkeypatch.setattr(solves, "RESTARTS", 0)
    with pytest.raises(NotConverged):
        solve(as_operator(square), B, tolerance=5e-11)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"A": np.eye(N)}, TypeError, "`A` must be a KernelOperator, got ndarray. Use as_operator"),
        (
            {"A": as_operator(np.ones((N, 3)))},
            ValueError,
            "`A` must be symmetric and positive semi-definite",
        ),
        (
            {"A": as_operator(np.triu(np.ones((N, N))))},
            ValueError,
            "`A` must be symmetric and positive semi-definite",
        ),
        ({"b": np.ones(N, int)}, TypeError, "`b` must hold floats"),
        (
            {"b": np.ones(N + 1)},
            ValueError,
            "`b` must have shape (60,) or (60, B), got (61,). Use y.reshape",
        ),
        ({"b": np.full(N, np.nan)}, ValueError, "`b` must be finite, got 60 values"),
        ({"tolerance": 0.0}, ValueError, "`tolerance` must be positive"),
        ({"iterations": 0}, ValueError, "`iterations` must be at least 1"),
        ({"iterations": 1.5}, TypeError, "`iterations` must be a whole number"),
        ({"preconditioner": 3}, TypeError, "`preconditioner` must be a function"),
    ],
)
def test_what_cannot_be_solved_is_refused(change, error, message):
    arguments = {"A": as_operator(DECAYING), "b": B} | change
    with pytest.raises(error) as caught:
        solve(arguments.pop("A"), arguments.pop("b"), **arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("A", "rank", "error", "message"),
    [
        (np.eye(N), 5, TypeError, "`A` must be a KernelOperator"),
        (as_operator(DECAYING), 5, ValueError, "`A` must have a positive shift, got 0"),
        (
            as_operator(DECAYING, ridge=1.0),
            61,
            ValueError,
            "`rank` must be at most the order of `A`, 60",
        ),
        (as_operator(DECAYING, ridge=1.0), 0, ValueError, "`rank` must be at least 1"),
        (as_operator(DECAYING, ridge=1.0), 2.5, TypeError, "`rank` must be a whole number"),
        (
            as_operator(-np.eye(N), ridge=2.0),
            5,
            ValueError,
            "`A` must be positive semi-definite to rounding",
        ),
    ],
)
def test_what_cannot_precondition_is_refused(A, rank, error, message):
    with pytest.raises(error) as caught:
        nystrom(jax.random.key(0), A, rank=rank)
    assert message in str(caught.value)


@pytest.mark.thorough
def test_a_preconditioner_travels_through_jit():
    P = nystrom(jax.random.key(0), as_operator(DECAYING, ridge=1e-3), rank=10)
    assert isinstance(P, Nystrom)
    found = jax.jit(lambda P, v: P(v))(P, jnp.asarray(B))
    np.testing.assert_allclose(found, P(B), rtol=1e-9, atol=1e-6)
