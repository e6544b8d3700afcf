import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtr
from thoroughness import few

from lazyjax.operators.algebra import as_operator, operator
from lazyjax.operators.krylov import lanczos
from lazyjax.operators.solves import NotConverged
from lazyjax.operators.spectra import spectral_density, top_eigenpairs
from lazyjax.operators.trace_estimates import inverse_trace, logdet, quadratures, trace

N = 48


def kernel(values, seed=0):
    """Make a kernel with these eigenvalues."""
    square = np.random.default_rng(seed).normal(size=(len(values), len(values)))
    q = np.linalg.qr(square)[0]
    made = (q * values) @ q.T
    return (made + made.T) / 2


SPECTRA = {
    "decaying": np.geomspace(1e-8, 1, N),
    "power law": 1 / np.arange(1, N + 1) ** 2.0,
    "low rank": np.where(np.arange(N) < 7, np.arange(N) + 1.0, 0),
    "flat": np.linspace(1, 2, N),
    "zero": np.zeros(N),
}
RIDGE = 1e-6


def on_the_host(square, seen):
    def host(v):
        seen.append(v.shape)
        return square @ np.asarray(v)

    def product(v):
        return jax.pure_callback(host, jax.ShapeDtypeStruct(v.shape, v.dtype), v)

    return operator(product, product, shape=square.shape, dtype=square.dtype, psd=True)


@pytest.mark.parametrize("of", ["log", "inverse"])
@few("depth", [4, N, 1, 20])
@pytest.mark.parametrize("name", SPECTRA)
def test_gauss_and_gauss_radau_bracket_every_probe_at_every_depth(of, depth, name):
    square = kernel(SPECTRA[name])
    probes = np.random.default_rng(1).normal(size=(5, N))
    A = as_operator(square, ridge=RIDGE)
    exact_values, vectors = np.linalg.eigh(square)
    exact_values = np.maximum(exact_values, 0) + RIDGE
    f = {"log": np.log, "inverse": np.reciprocal}[of](exact_values)
    exact = (probes @ vectors) ** 2 @ f
    found = quadratures(A, jnp.asarray(probes), jnp.asarray(RIDGE), of=of, depth=depth)
    assert found.low.shape == found.high.shape == (5,)
    # rounding moves an eigenvalue of 1e-6 by 1e-16, and f by 1e-10 of itself
    slack = 1e-7 * np.abs(f).max() * (probes**2).sum(1)
    slack = np.minimum(slack, 1e-6 * np.abs(exact)) if depth < N else slack
    assert np.all(found.low <= exact + slack)
    assert np.all(found.high >= exact - slack)
    if depth == N:
        np.testing.assert_allclose(found.low, exact, rtol=1e-5)
        np.testing.assert_allclose(found.high, exact, rtol=1e-5)


@pytest.mark.thorough
def test_gauss_is_above_the_logarithm_and_below_the_inverse():
    """At depth 1, where Gauss is f at the Rayleigh quotient (Jensen)."""
    square = kernel(SPECTRA["flat"])
    probes = np.random.default_rng(1).normal(size=(5, N))
    mass = np.sum(probes**2, axis=1)
    mean = np.sum(probes * (square @ probes.T).T, axis=1) / mass
    log, inverse = (
        quadratures(as_operator(square), jnp.asarray(probes), jnp.asarray(1.0), of=of, depth=1)
        for of in ("log", "inverse")
    )
    np.testing.assert_allclose(log.high, mass * np.log(mean), rtol=1e-12)
    np.testing.assert_allclose(inverse.low, mass / mean, rtol=1e-12)


ESTIMATES = {
    "logdet": (lambda key, A: logdet(key, A, probes=8), lambda w: np.sum(np.log(w))),
    "logdet with a rank": (
        lambda key, A: logdet(key, A, probes=8, rank=20),
        lambda w: np.sum(np.log(w)),
    ),
    "inverse": (lambda key, A: inverse_trace(key, A, probes=8), lambda w: np.sum(1 / w)),
    "trace": (lambda key, A: trace(key, A, probes=8), np.sum),
    "trace with a rank": (lambda key, A: trace(key, A, probes=8, rank=20), np.sum),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", sorted(ESTIMATES, key=lambda name: name != "trace"))
def test_the_standard_errors_hold_the_truth_as_often_as_they_say(name):
    estimate, exact = ESTIMATES[name]
    # where one eigenvalue is nearly all of the trace, the error is as skewed as its chi^2
    values = SPECTRA["flat" if name == "trace" else "power law"]
    A, true = as_operator(kernel(values), ridge=1e-2), exact(values + 1e-2)
    scores = []
    for seed in range(60):
        found = estimate(jax.random.key(seed), A)
        assert found.lower <= found.value <= found.upper
        assert found.upper - found.lower <= 1.001 * found.error
        scores.append((found.value - true) / found.error)
    within = np.mean(np.abs(scores) < 2)
    assert 0.8 <= within < 1.0  # 0.91 for the t distribution of 8 probes
    assert abs(np.mean(scores)) < 0.6


@pytest.mark.thorough
def test_a_rank_makes_the_error_and_the_depth_smaller():
    A = as_operator(kernel(SPECTRA["decaying"]), ridge=1e-2)
    for estimate in (logdet, trace):
        plain, ranked = (estimate(jax.random.key(0), A, rank=rank) for rank in (0, 30))
        assert ranked.error < plain.error / 3
        assert ranked.depth <= plain.depth


@pytest.mark.thorough
def test_a_log_determinant_is_free_of_the_scale_of_the_kernel():
    found = []
    for scale in (1e-100, 1.0, 1e100):
        A = as_operator(scale * kernel(SPECTRA["decaying"]), ridge=scale * 1e-2)
        found.append([float(logdet(jax.random.key(0), A / A.shift, rank=r).value) for r in (0, 9)])
        assert min(found[-1]) > 0
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)
    np.testing.assert_allclose(found[2], found[1], rtol=1e-6)


@pytest.mark.thorough
def test_a_log_determinant_without_a_ridge_takes_a_bound():
    values = SPECTRA["flat"]
    A = as_operator(kernel(values))
    found = logdet(jax.random.key(0), A, lower=1.0)
    assert abs(found.value - np.sum(np.log(values))) < 4 * found.error
    with pytest.raises(ValueError, match="`lower` must be given for an operator without a ridge"):
        logdet(jax.random.key(0), A)
    with pytest.raises(ValueError, match="`lower` must be a lower bound of the spectrum"):
        logdet(jax.random.key(0), A, lower=1.5)


@pytest.mark.thorough
def test_a_multiple_of_the_identity_is_exact():
    A = as_operator(2 * np.eye(N), ridge=1.0)
    keys = iter(jax.random.split(jax.random.key(0), 5))
    logs = pytest.approx(N * np.log(3), rel=1e-12)
    assert float(logdet(next(keys), A).value) == logs
    assert float(logdet(next(keys), A, rank=5).value) == logs
    assert float(inverse_trace(next(keys), A).value) == pytest.approx(N / 3, rel=1e-12)
    assert float(trace(next(keys), A).value) == pytest.approx(N * 3, rel=1e-12)
    nothing = as_operator(np.zeros((N, N)), ridge=1.0)
    assert float(logdet(next(keys), nothing).value) == pytest.approx(0, abs=1e-12)


@pytest.mark.thorough
def test_a_bracket_that_stays_wide_is_said():
    A = as_operator(kernel(SPECTRA["decaying"]), ridge=1e-8)
    with pytest.warns(RuntimeWarning, match="after 2 steps of Lanczos the bracket"):
        found = logdet(jax.random.key(0), A, depth=2)
    true = np.sum(np.log(SPECTRA["decaying"] + 1e-8))
    assert found.depth == 2
    assert found.lower - 3 * found.error < true < found.upper + 3 * found.error


@pytest.mark.thorough
def test_all_probes_go_through_the_operator_as_one_block():
    seen = []
    A = on_the_host(kernel(SPECTRA["flat"]), seen) + 1.0
    found = logdet(jax.random.key(0), A, probes=6)
    assert set(seen) == {(N, 6)}
    assert len(seen) == found.depth == 16


@few("make", [as_operator, lambda square: on_the_host(square, []) + RIDGE])
def test_the_top_eigenpairs_are_those_of_the_matrix(make):
    square = kernel(SPECTRA["decaying"])
    A = make(square)
    shift = float(A.shift)
    found = top_eigenpairs(jax.random.key(0), A, 12)
    values, vectors = map(np.asarray, (found.values, found.vectors))
    exact, exact_vectors = np.linalg.eigh(square)
    np.testing.assert_allclose(values, exact[::-1][:12] + shift, rtol=1e-9)
    assert vectors.shape == (N, 12)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(12), atol=1e-10)
    overlap = np.abs(np.sum(vectors * exact_vectors[:, ::-1][:, :12], axis=0))
    np.testing.assert_allclose(overlap, 1, atol=1e-10)
    residual = (square + shift * np.eye(N)) @ vectors - values * vectors
    np.testing.assert_allclose(found.residuals, np.linalg.norm(residual, axis=0), atol=1e-14)
    assert found.residuals.max() < 4e-11


@pytest.mark.thorough
def test_all_eigenpairs_can_be_asked_for():
    found = top_eigenpairs(jax.random.key(0), as_operator(kernel(SPECTRA["flat"])), N)
    np.testing.assert_allclose(found.values, SPECTRA["flat"][::-1], rtol=1e-10)


@pytest.mark.thorough
def test_the_distinct_eigenvalues_are_found_where_there_are_few():
    A = as_operator(kernel(SPECTRA["low rank"]), ridge=0.5)
    found = top_eigenpairs(jax.random.key(0), A, 8)
    np.testing.assert_allclose(found.values, [7.5, 6.5, 5.5, 4.5, 3.5, 2.5, 1.5, 0.5], rtol=1e-9)
    np.testing.assert_allclose(found.vectors.T @ found.vectors, np.eye(8), atol=1e-9)


@pytest.mark.thorough
def test_eigenpairs_that_were_not_found_are_no_result():
    A = as_operator(kernel(SPECTRA["flat"]))
    with pytest.raises(NotConverged, match="`tolerance` must be met in 10 steps") as caught:
        top_eigenpairs(jax.random.key(0), A, 3, depth=10)
    assert caught.value.solution.values.shape == (3,)


@pytest.mark.thorough
def test_eigenpairs_of_an_operator_whose_products_are_not_its_own_are_no_result():
    """What is returned is checked by itself."""
    drifting = on_the_host(kernel(SPECTRA["flat"]), [])
    noise = np.random.default_rng(3).normal(size=(N, N))
    rough = operator(
        lambda v: drifting @ v + 1e-7 * jnp.tanh(1e3 * noise @ v),
        lambda v: drifting @ v,
        shape=(N, N),
        dtype=np.float64,
        psd=True,
    )
    with pytest.raises(NotConverged, match="by A u - lambda u.*float64.*looser `tolerance`"):
        top_eigenpairs(jax.random.key(0), rough, 3, depth=N)


REPEATED = {
    "two values": np.repeat([2.0, 1.0], N // 2),
    "one value": np.full(N, 3.0),
    "zeros": np.zeros(N),
    "low rank": np.repeat([5.0, 0.0], [3, N - 3]),
    "ten outputs": np.repeat(1 / np.arange(1, 6) ** 2.0, 10)[:N],
    "1e-6 apart": np.concatenate([2 - 1e-6 * np.arange(10), 1 - 1e-6 * np.arange(N - 10)]),
    "1e-3 apart": np.concatenate([2 - 1e-3 * np.arange(10), 1 - 1e-3 * np.arange(N - 10)]),
    "a tie at the end": np.repeat([4.0, 3.0, 2.0, 1.0, 0.5], [1, 1, 9, 7, N - 18]),
}


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("name", REPEATED)
def test_repeated_eigenvalues_count_as_often_as_they_are_there(name, dtype):
    values = REPEATED[name]
    tolerance = np.finfo(dtype).eps ** (2 / 3)
    A = as_operator(kernel(values).astype(dtype), ridge=0.25)
    for k in (8, len(values)):
        found = top_eigenpairs(jax.random.key(1), A, k)
        assert found.values.shape == found.residuals.shape == (k,)
        wanted = np.sort(values)[::-1][:k] + 0.25
        np.testing.assert_allclose(found.values, wanted, atol=tolerance * wanted[0])
        np.testing.assert_allclose(
            found.vectors.T @ found.vectors, np.eye(k), atol=20 * np.finfo(dtype).eps
        )
        assert found.residuals.max() <= tolerance * wanted[0]


@pytest.mark.thorough
def test_copies_are_found_where_no_krylov_space_ends():
    """Nor is there time for rounding to bring them in, as it does in longer runs."""
    values = np.repeat(np.concatenate([[1.5, 1.4, 1.3, 1.2, 1.1], np.linspace(0, 1, 100)]), 2)
    for tied in (values, values * (1 + 1e-11 * np.random.default_rng(0).normal(size=210))):
        found = top_eigenpairs(jax.random.key(1), as_operator(kernel(tied)), 4, tolerance=1e-5)
        np.testing.assert_allclose(found.values, [1.5, 1.5, 1.4, 1.4], atol=1e-8)
        np.testing.assert_allclose(found.vectors.T @ found.vectors, np.eye(4), atol=1e-13)


@pytest.mark.thorough
def test_one_run_more_tells_that_nothing_is_repeated_and_none_for_the_largest_alone():
    seen = []
    A = on_the_host(kernel(SPECTRA["power law"]), seen)
    top_eigenpairs(jax.random.key(0), A, 1)
    assert seen.count((N, 1)) == 32 + 1  # and the product that the residual is computed from
    seen.clear()
    top_eigenpairs(jax.random.key(0), A, 4)
    assert seen.count((N, 1)) <= 2 * (32 + N)
    assert seen.count((N, 4)) == 1


@pytest.mark.thorough
def test_a_space_that_ends_goes_on_with_what_is_orthogonal():
    values = np.repeat([3.0, 1.0, 0.5], N // 3)
    A = as_operator(kernel(values))
    held = np.linalg.qr(np.random.default_rng(0).normal(size=(N, 5)))[0].T
    starts = jax.random.normal(jax.random.key(0), (2, N)).at[1].set(0)
    found = lanczos(A, starts, depth=N - 5, without=jnp.asarray(held))
    for rows in found.vectors:
        every = np.concatenate([held, rows])
        np.testing.assert_allclose(every @ every.T, np.eye(N), atol=1e-13)
    projected = np.eye(N) - held.T @ held
    for vectors, matrix in zip(found.vectors, found.matrix, strict=True):
        exact = vectors @ projected @ kernel(values) @ projected @ vectors.T
        np.testing.assert_allclose(matrix, exact, atol=1e-13)


@pytest.mark.thorough
@pytest.mark.parametrize("scale", [1e-30, 1e25])
def test_nothing_depends_on_the_scale_of_the_kernel_in_float32(scale):
    """Squares of such numbers are beyond the range of float32."""
    square = kernel(SPECTRA["power law"])
    plain, scaled = (as_operator((c * square).astype(np.float32)) for c in (1.0, scale))

    def near(found, wanted, tolerance=1e-4):
        np.testing.assert_allclose(np.float64(found), np.float64(wanted), rtol=tolerance)

    a, b = (top_eigenpairs(jax.random.key(0), A, 4) for A in (plain, scaled))
    near(np.float64(b.values) / scale, a.values)
    near(np.abs(np.sum(a.vectors * b.vectors, axis=0)), np.ones(4))
    a, b = (spectral_density(jax.random.key(0), A, probes=4, depth=8) for A in (plain, scaled))
    near(np.float64(b.nodes) / scale, a.nodes, 1e-2)
    for value, other in zip(
        b.mean(lambda t: t),
        spectral_density(jax.random.key(0), plain, probes=4, depth=8).mean(lambda t: t),
        strict=True,
    ):
        near(np.float64(value) / scale, other)
    plain, scaled = plain + 1e-2, scaled + 1e-2 * scale
    for rank in (0, 9):
        a, b = (logdet(jax.random.key(0), A, rank=rank) for A in (plain, scaled))
        near(b.value - N * np.log(scale), a.value, 1e-3)
        near(b.error, a.error, 1e-2)
        a, b = (trace(jax.random.key(0), A, rank=rank) for A in (plain, scaled))
        near(np.float64(b.value) / scale, a.value)
        near(np.float64(b.error) / scale, a.error, 1e-2)
    probes = jax.random.normal(jax.random.key(1), (3, N), np.float32)
    a, b = (quadratures(A, probes, A.shift, of="inverse", depth=4) for A in (plain, scaled))
    near(np.float64(b.low) * scale, a.low)
    near(np.float64(b.high) * scale, a.high)
    a, b = (inverse_trace(jax.random.key(0), A) for A in (plain, scaled))
    near(np.float64(b.value) * scale, a.value, 1e-3)
    near(np.float64(b.error) * scale, a.error, 1e-2)


@pytest.mark.thorough
def test_the_trace_of_nothing_is_zero():
    for rank in (0, 5):
        found = trace(jax.random.key(0), as_operator(np.zeros((N, N), np.float32)), rank=rank)
        assert found.value == found.error == 0


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_kernels_of_half_precision_are_taken_in_float32(dtype):
    square = jnp.asarray(kernel(SPECTRA["flat"]), dtype)
    A, exact = as_operator(square), np.linalg.eigvalsh(np.asarray(square, np.float64))
    assert A.dtype == (A @ jnp.ones(N, dtype)).dtype == jnp.float32
    found = top_eigenpairs(jax.random.key(0), A, 3)
    assert found.values.dtype == found.vectors.dtype == jnp.float32
    np.testing.assert_allclose(found.values, exact[::-1][:3], rtol=1e-5)
    logs = logdet(jax.random.key(0), A, lower=0.9)
    assert logs.value.dtype == jnp.float32
    assert abs(logs.value - np.sum(np.log(exact))) < 4 * logs.error
    assert (
        abs(trace(jax.random.key(0), A).value - exact.sum())
        < 1e-4 * exact.sum() + 4 * trace(jax.random.key(0), A).error
    )


def test_the_moments_of_the_density_are_those_of_the_spectrum():
    square = kernel(SPECTRA["power law"])
    A = as_operator(square, ridge=1e-3)
    found = spectral_density(jax.random.key(0), A, probes=40, depth=20)
    assert found.nodes.shape == found.weights.shape == (40, 20)
    np.testing.assert_allclose(found.weights.sum(1), 1, rtol=1e-10)
    exact = SPECTRA["power law"] + 1e-3
    for power in range(1, 5):
        value, error = found.mean(lambda t, p=power: t**p)
        assert value.shape == error.shape == ()
        assert abs(value - np.mean(exact**power)) < 4 * error
    np.testing.assert_allclose(found.mean(jnp.ones_like), (1, 0), atol=1e-12)


@pytest.mark.thorough
def test_the_density_is_smooth_and_of_mass_one_and_the_cumulative_counts():
    exact = SPECTRA["decaying"] + 1e-3
    A = as_operator(kernel(SPECTRA["decaying"]), ridge=1e-3)
    found = spectral_density(jax.random.key(0), A, probes=60, depth=32)
    x = np.geomspace(1e-5, 1e2, 400)
    value, error = found.density(x, width=0.3)
    assert value.shape == error.shape == x.shape
    assert np.trapezoid(value, np.log(x)) == pytest.approx(1, abs=1e-3)
    smooth = np.exp(-0.5 * ((np.log(x)[:, None] - np.log(exact)) / 0.3) ** 2).mean(1) / (
        0.3 * np.sqrt(2 * np.pi)
    )
    assert np.mean(np.abs(value - smooth) < 3 * error + 1e-6) > 0.95
    share, error = found.cumulative(x)
    assert share[0] == 0
    assert share[-1] == pytest.approx(1, abs=1e-10)
    assert np.all(np.diff(share) >= 0)
    assert np.mean(np.abs(share - (exact <= x[:, None]).mean(1)) < 3 * error + 1e-6) > 0.95
    total = np.mean(ndtr((np.log(x[200]) - np.log(exact)) / 0.3))
    assert np.trapezoid(value[:201], np.log(x[:201])) == pytest.approx(total, abs=0.05)


@pytest.mark.thorough
def test_a_density_of_a_travelling_operator():
    A = as_operator(kernel(SPECTRA["flat"]))
    run = jax.jit(lambda key, A: spectral_density(key, A, probes=3, depth=5))
    np.testing.assert_allclose(
        run(jax.random.key(0), A).nodes,
        spectral_density(jax.random.key(0), A, probes=3, depth=5).nodes,
        rtol=1e-9,
    )


FINE = as_operator(np.eye(4), ridge=1.0)
RECTANGLE = as_operator(np.ones((4, 3)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: logdet(jax.random.key(0), np.eye(4)), TypeError, "`A` must be a KernelOperator"),
        (lambda: logdet(jax.random.key(0), RECTANGLE), ValueError, "`A` must be symmetric"),
        (
            lambda: logdet(jax.random.key(0), FINE, probes=1),
            ValueError,
            "`probes` must be at least 2, got 1. One has no",
        ),
        (
            lambda: logdet(jax.random.key(0), FINE, depth=0),
            ValueError,
            "`depth` must be at least 1",
        ),
        (lambda: logdet(jax.random.key(0), FINE, rank=-1), ValueError, "`rank` must be at least 0"),
        (
            lambda: logdet(jax.random.key(0), FINE, rank=5),
            ValueError,
            "`rank` must be at most the order",
        ),
        (
            lambda: logdet(jax.random.key(0), FINE, lower=-1.0),
            ValueError,
            "`lower` must be positive",
        ),
        (lambda: inverse_trace(jax.random.key(0), RECTANGLE), ValueError, "`A` must be symmetric"),
        (lambda: inverse_trace(jax.random.key(0), FINE - 1.0), ValueError, "`lower` must be given"),
        (lambda: trace(jax.random.key(0), RECTANGLE), ValueError, "`A` must be symmetric"),
        (
            lambda: trace(jax.random.key(0), FINE, probes=1.5),
            TypeError,
            "`probes` must be a whole number",
        ),
        (lambda: trace(jax.random.key(0), FINE, rank=9), ValueError, "`rank` must be at most"),
        (
            lambda: top_eigenpairs(jax.random.key(0), RECTANGLE, 1),
            ValueError,
            "`A` must be symmetric",
        ),
        (
            lambda: top_eigenpairs(jax.random.key(0), FINE, 5),
            ValueError,
            "`k` must be at most the order of `A`, 4, got 5",
        ),
        (lambda: top_eigenpairs(jax.random.key(0), FINE, 0), ValueError, "`k` must be at least 1"),
        (
            lambda: top_eigenpairs(jax.random.key(0), FINE, 1, tolerance=-1.0),
            ValueError,
            "`tolerance` must be positive",
        ),
        (
            lambda: top_eigenpairs(jax.random.key(0), FINE, 1, depth=0),
            ValueError,
            "`depth` must be at least 1",
        ),
        (
            lambda: spectral_density(jax.random.key(0), RECTANGLE),
            ValueError,
            "`A` must be symmetric",
        ),
        (
            lambda: spectral_density(jax.random.key(0), FINE, probes=1),
            ValueError,
            "`probes` must be at least 2",
        ),
        (
            lambda: spectral_density(jax.random.key(0), FINE, depth=0),
            ValueError,
            "`depth` must be at least 1",
        ),
        (
            lambda: spectral_density(jax.random.key(0), FINE).density(np.array([-1.0]), width=1.0),
            ValueError,
            "`x` must be positive",
        ),
        (
            lambda: spectral_density(jax.random.key(0), FINE).density(np.ones(1), width=0.0),
            ValueError,
            "`width` must be positive",
        ),
    ],
)
def test_bad_arguments_are_refused(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)
