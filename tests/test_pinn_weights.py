import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.pinn_weights import (
    QUICK,
    WEIGHTINGS,
    Config,
    conclude,
    initial_weights,
    kernel_weights,
    kernels,
    losses,
    make_problem,
    plot,
    relative_error,
    run,
    second_derivative,
    train_network,
)

SMALL = QUICK | {"points": 20, "width": 50, "steps": 1000, "widths": (5, 40)}


@pytest.fixture(
    scope="module", params=["ntk", pytest.param("standard", marks=pytest.mark.thorough)]
)
def small(request):
    config = Config(parametrization=request.param, points=6)
    problem = make_problem(config, frequency=2.0, width=7)
    return config, problem, initial_weights(jax.random.key(3), config, 7)


@pytest.fixture(scope="module")
def results():
    return run(Config(**SMALL))


def rows_of_jacobian(f, params, x):
    J = jax.jit(jax.jacobian(lambda w: f(w, x)[:, 0]))(params)
    return np.concatenate([np.reshape(leaf, (len(x), -1)) for leaf in jax.tree.leaves(J)], 1)


def test_the_second_derivative_is_that_of_the_network(small):
    """(tanh)'' = -2 tanh (1 - tanh^2), and z = (x - m) / s has slope 1/s."""
    config, problem, params = small
    x = np.array([[-0.3], [0.2], [0.9]])
    middle, unit = np.mean(problem.inside), np.std(problem.inside)
    t = np.tanh((x - middle) / unit @ params["W0"] + params["b0"])
    factor = 7**-0.5 if config.parametrization == "ntk" else 1.0
    bent = -2 * t * (1 - t**2) * (params["W0"] / unit) ** 2
    u, u_xx = problem.f_u(params, x), problem.f_r(params, x)
    assert u.shape == u_xx.shape == (3, 1)
    np.testing.assert_allclose(u, factor * t @ params["W1"] + params["b1"], rtol=1e-12)
    np.testing.assert_allclose(u_xx, factor * bent @ params["W1"], rtol=1e-11)


def test_the_second_derivative_of_a_cubic_is_known():
    x = np.array([[-1.0], [0.5], [2.0]])
    u_xx = second_derivative(lambda w, x: w * x**3 + 4 * x**2 + x, jnp.asarray(5.0), x)
    np.testing.assert_allclose(u_xx, 30 * x + 8, rtol=1e-14)


def test_the_weights_begin_as_the_parametrization_says():
    for parametrization, spread in (("standard", 0.05), ("ntk", 1.0)):
        config = Config(parametrization=parametrization)
        params = initial_weights(jax.random.key(0), config, 400)
        shapes = {name: leaf.shape for name, leaf in params.items()}
        assert shapes == {"W0": (1, 400), "b0": (1, 400), "W1": (400, 1), "b1": (1, 1)}
        for name, expected in (("W0", 1.0), ("b0", 1.0), ("W1", spread)):
            assert float(jnp.std(params[name])) == pytest.approx(expected, rel=0.15)


def test_the_solution_of_the_problem_has_no_error_and_no_residual():
    problem = make_problem(Config(points=50), frequency=4.0, width=3)
    exact = problem._replace(
        f_u=lambda w, x: w * jnp.sin(4 * jnp.pi * x),
        f_r=lambda w, x: second_derivative(lambda w, x: w * jnp.sin(4 * jnp.pi * x), w, x),
    )
    one, half = jnp.asarray(1.0), jnp.asarray(0.5)
    np.testing.assert_allclose(losses(exact, one), 0, atol=1e-20)
    np.testing.assert_allclose(relative_error(exact, one), 0, atol=1e-14)
    np.testing.assert_allclose(relative_error(exact, half), 0.5, rtol=1e-12)
    x = np.linspace(0, 1, 50)
    wrong = np.mean((8 * np.pi**2 * np.sin(4 * np.pi * x)) ** 2) / 2
    np.testing.assert_allclose(losses(exact, half), [0, wrong], rtol=1e-12, atol=1e-20)


def test_the_losses_are_means_over_all_points(small):
    _, problem, params = small
    assert problem.boundary[:, 0].tolist() == [0, 0, 0, 1, 1, 1]
    u, u_xx = problem.f_u(params, problem.boundary), problem.f_r(params, problem.inside)
    wrong = u_xx + (2 * np.pi) ** 2 * np.sin(2 * np.pi * problem.inside)
    expected = [np.mean(u**2) / 2, np.mean(wrong**2) / 2]
    np.testing.assert_allclose(losses(problem, params), expected, rtol=1e-12)


def test_the_kernels_are_those_of_dense_jacobians(small):
    _, problem, params = small
    J_u = rows_of_jacobian(problem.f_u, params, problem.boundary)
    J_r = rows_of_jacobian(problem.f_r, params, problem.inside)
    K = kernels(problem, params)
    assert K.uu.shape == K.ur.shape == K.rr.shape == (6, 6)
    scale = np.max(np.abs(J_r @ J_r.T))
    np.testing.assert_allclose(K.uu, J_u @ J_u.T, rtol=1e-12)
    np.testing.assert_allclose(K.ur, J_u @ J_r.T, rtol=1e-11, atol=1e-13 * scale)
    np.testing.assert_allclose(K.rr, J_r @ J_r.T, rtol=1e-11, atol=1e-13 * scale)
    J = np.concatenate([J_u, J_r])
    np.testing.assert_allclose(K.whole(), J @ J.T, rtol=1e-11, atol=1e-13 * scale)


def test_the_whole_kernel_is_symmetric_and_has_no_negative_eigenvalue(small):
    _, problem, params = small
    K = np.asarray(kernels(problem, params).whole())
    np.testing.assert_array_equal(K, K.T)
    values = np.linalg.eigvalsh(K)
    assert values[0] > -1e-12 * values[-1]


def test_the_weights_are_those_of_algorithm_1(small):
    _, problem, params = small
    K = kernels(problem, params)
    values, uu, rr = (np.linalg.eigvalsh(k).sum() for k in (K.whole(), K.uu, K.rr))
    found = kernel_weights(problem, params)
    np.testing.assert_allclose(found, [values / uu, values / rr], rtol=1e-12)
    np.testing.assert_allclose(np.sum(1 / found), 1, rtol=1e-12)


@pytest.mark.thorough
@pytest.mark.parametrize("weighted", [True, False])
def test_training_is_gradient_descent_with_weights_taken_anew(small, weighted):
    """Two blocks of three steps by hand."""
    _, problem, params = small
    rate = 1e-5
    final, records = train_network(
        problem, params, optax.sgd(rate), steps=6, every=3, weighted=weighted
    )
    gradients = jax.jit(lambda w: jax.jacobian(losses, argnums=1)(problem, w))
    lambdas = []
    for n in range(6):
        if n % 3 == 0:
            lambdas.append(kernel_weights(problem, params) if weighted else np.ones(2))
        J = jax.tree.map(np.asarray, gradients(params))
        b, r = lambdas[-1]
        params = jax.tree.map(lambda w, d: w - rate * (b * d[0] + r * d[1]), params, J)  # noqa: B023 (called at once)
    for leaf, expected in zip(jax.tree.leaves(final), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=1e-10)
    assert {name: a.shape for name, a in records.items()} == {
        "lambdas": (3, 2), "losses": (3, 2), "error": (3,),
    }  # fmt: skip # to be read as a table
    np.testing.assert_allclose(records["losses"][-1], losses(problem, params), rtol=1e-9)
    np.testing.assert_allclose(records["lambdas"][-1], kernel_weights(problem, params), rtol=1e-9)


@pytest.mark.thorough
def test_the_quick_run_has_the_weights_of_its_kernels(results):
    config = results.config
    problem = make_problem(config, frequency=4.0, width=config.width)
    K_uu, K_rr, K = (results.arrays[f"initial/{name}"] for name in ("K_uu", "K_rr", "K"))
    assert K.shape == (40,)
    assert K_uu.shape == K_rr.shape == (20,)
    np.testing.assert_allclose(K.sum(), K_uu.sum() + K_rr.sum(), rtol=1e-12)
    assert np.sum(K_uu > 1e-12 * K_uu[0]) == 2  # there are two ends; the largest come first
    for name in results.summary["trainings"]:
        for weighting in WEIGHTINGS:
            first = results.arrays[f"{name}/{weighting}/lambdas"][0]
            np.testing.assert_allclose(first, K.sum() / [K_uu.sum(), K_rr.sum()], rtol=1e-12)
    assert results.arrays["steps"][-1] == config.steps
    assert results.arrays["Adam/weights 1/error"].shape == results.arrays["steps"].shape
    np.testing.assert_allclose(problem.grid[:, 0], results.arrays["grid"])


@pytest.mark.thorough
def test_the_residual_kernel_dominates_where_x_is_normalised(results):
    ratios = results.summary["tr(K_rr) / tr(K_uu)"]
    assert ratios["initial"] > 10 * ratios["unscaled"]
    assert ratios["initial"] > 20


@pytest.mark.thorough
def test_the_weights_bring_u_nearer_to_the_solution(results):
    for rows in results.summary["trainings"].values():
        plain, weighted = (rows[weighting] for weighting in WEIGHTINGS)
        assert weighted["relative error"] < plain["relative error"] / 5
        assert weighted["boundary loss"] < plain["boundary loss"] / 100


@pytest.mark.thorough
def test_the_wider_network_is_the_lazier(results):
    assert set(results.summary["widths"]) == {"a = 1", "a = 4"}
    for rows in results.summary["widths"].values():
        for what in ("relative weight movement", "relative kernel change"):
            assert rows["width 40"][what] < rows["width 5"][what] / 2


@pytest.mark.thorough
def test_figures_and_conclusions_tell_everything(results):
    assert set(plot(results)) == {"spectra", "training", "solution", "weights", "widths"}
    told = conclude(results)
    assert [sentence.split(":")[0] for sentence in told[1:]] == [
        "gradient descent", "Adam", "a = 1", "a = 4",
    ]  # fmt: skip # to be read as a table
    assert told[0].startswith("tr(K_rr) / tr(K_uu) is ")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"parametrization": "nkt"}, ValueError, "`parametrization` must be one of"),
        ({"points": 7}, ValueError, "`points` must be even.* Use 8"),
        ({"points": 0}, ValueError, "`points` must be at least 2"),
        ({"steps": 150}, ValueError, "`steps` must be a multiple of `every`, 100.* Use 200"),
        ({"every": 0}, ValueError, "`every` must be at least 1"),
        ({"width": 2.5}, TypeError, "`width` must be a whole number"),
        ({"widths": ()}, ValueError, "number of `widths.* must be at least 1"),
        ({"widths": (0,)}, ValueError, "`widths` must be at least 1"),
        ({"width_steps": 0}, ValueError, "`width_steps` must be at least 1"),
        ({"frequencies": ()}, ValueError, "number of `frequencies.* must be at least 1"),
        ({"frequencies": (-1.0,)}, ValueError, "`frequencies` must be positive"),
        ({"frequency": 0.0}, ValueError, "`frequency` must be positive"),
        ({"learning_rate": -1.0}, ValueError, "`learning_rate` must be positive"),
        ({"adam_rate": 0.0}, ValueError, "`adam_rate` must be positive"),
    ],
)
def test_bad_settings_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        Config(**change)
