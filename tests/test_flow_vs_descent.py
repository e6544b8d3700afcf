"""Descents on the surface: the loop, the flow, and what the step size changes."""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest

from experiments.flow_vs_descent import QUICK, Config, conclude, plot, run
from experiments.surface import curvature, descend, integrate, surface
from lazyjax import plots

STARTS = np.array([[0.5, -0.3], [-1.2, 0.4], [1.1, 1.4]])


def slow_gradient(x, y):
    """Differentiate the surface by hand."""
    inner = 2 * (x + 2) * (y - 4) ** 2
    dx = np.cos(x + 4) * (np.cos(3 * y - 5) + 0.3) - 0.5 * np.sin(inner) * 2 * (y - 4) ** 2
    dy = -3 * np.sin(x + 4) * np.sin(3 * y - 5) - 0.5 * np.sin(inner) * 4 * (x + 2) * (y - 4)
    return np.array([dx, dy])


def slow_descent(start, rate, steps):
    path = [np.array(start)]
    for _ in range(steps):
        path.append(path[-1] - rate * slow_gradient(*path[-1]))
    return np.array(path)


def test_descend_follows_a_plain_loop_at_every_rate_and_start():
    rates, steps = np.array([1e-4, 5e-4]), 50
    history = descend(STARTS, rates, steps, np.arange(steps + 1))
    paths = np.array([slow_descent(s, rate, steps) for rate in rates for s in STARTS])
    assert history.params.shape == paths.shape == (6, 51, 2)
    np.testing.assert_allclose(history.params, paths, rtol=1e-9, atol=1e-10)
    heights = surface(paths[..., 0], paths[..., 1])
    assert history.loss.shape == heights.shape
    np.testing.assert_allclose(history.loss, heights, rtol=1e-9, atol=1e-9)
    assert history.diverged_at == (None,) * 6


def test_descend_records_about_a_hundred_points_by_default():
    history = descend(STARTS, np.array([1e-4]), 1000)
    assert history.params.shape == (3, len(history.steps), 2)
    assert 60 <= len(history.steps) <= 100


@pytest.mark.thorough
def test_descend_keeps_single_precision():
    history = descend(STARTS.astype(np.float32), np.array([1e-3]), 30)
    assert history.params.dtype == history.loss.dtype == np.float32


@pytest.mark.parametrize(
    ("starts", "rates", "match"),
    [
        (np.zeros(2), np.array([1e-3]), r"`starts` must have shape \(E, 2\), got \(2,\)"),
        (np.zeros((4, 3)), np.array([1e-3]), r"`starts` must have shape \(E, 2\), got \(4, 3\)"),
        (STARTS, np.array(1e-3), r"`learning_rates` must have shape \(R,\), got \(\)"),
        (STARTS, np.array([1e-3, 0.0]), "`learning_rates` must be positive"),
    ],
)
def test_descend_refuses_bad_input(starts, rates, match):
    with pytest.raises(ValueError, match=match):
        descend(starts, rates, 10)


def test_the_curvature_is_the_largest_eigenvalue_of_differences_of_gradients():
    h = 1e-6
    for point in STARTS:
        columns = [
            (slow_gradient(*(point + h * e)) - slow_gradient(*(point - h * e))) / (2 * h)
            for e in np.eye(2)
        ]
        expected = np.linalg.eigvalsh(np.array(columns)).max()
        np.testing.assert_allclose(curvature(jnp.asarray(point)), expected, rtol=1e-6)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("runge_kutta", 4)])
def test_an_integrator_meets_the_flow_with_its_order(method, order):
    start, interval = jnp.asarray(STARTS), jnp.asarray(1e-3)

    def end(method, substeps):
        path = integrate(method, start, interval, jnp.asarray(substeps), intervals=4)
        assert path.shape == (5, 3, 2)
        return np.asarray(path[-1])

    exact = end("runge_kutta", 512)
    counts = np.array([8, 16, 32] if order == 4 else [64, 128, 256])
    errors = [np.linalg.norm(end(method, n) - exact) for n in counts]
    slopes = np.diff(np.log(errors)) / np.diff(np.log(1 / counts))
    np.testing.assert_allclose(slopes, order, atol=0.1 * order)


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"starts": 0}, ValueError, "`starts` must be at least 1"),
        ({"starts": 10.0}, TypeError, "`starts` must be a whole number"),
        ({"reach": -1.0}, ValueError, "`reach` must be positive"),
        ({"small_rate": 0.0}, ValueError, "`small_rate` must be positive"),
        ({"large_rate": float("nan")}, ValueError, "`large_rate` must be positive and finite"),
        ({"large_rate": 1e-4}, ValueError, "`large_rate` must be a whole multiple of `small_rate`"),
        ({"large_rate": 2.5e-4}, ValueError, "`large_rate` must be a whole multiple"),
        ({"steps": 19}, ValueError, "`steps` must be at least 20, got 19. Use more"),
        ({"halvings": 1}, ValueError, "`halvings` must be at least 2"),
    ],
)
def test_a_bad_config_is_refused(fields, error, match):
    with pytest.raises(error, match=match):
        Config(**fields)


@pytest.fixture(scope="module")
def results():
    return run(Config(**QUICK))


@pytest.mark.thorough
def test_below_the_critical_curvature_both_rates_follow_the_flow(results):
    equal = results.summary["equal flow time"]
    assert equal["share together, curvature below 2 / large rate"] == 1
    assert equal["share together, curvature above"] < 0.5
    bend = results.summary["curvature"]
    assert bend["starts above 2 / small rate along the flow"] == 0
    assert 0 < bend["starts above it somewhere along the flow"] < QUICK["starts"]


@pytest.mark.thorough
def test_euler_meets_the_flow_with_slope_1(results):
    slope = results.summary["Euler and the flow"]["slope of the median at the smallest"]
    assert abs(slope - 1) < 0.1


@pytest.mark.thorough
def test_the_small_rate_carried_on_begins_as_the_descent_of_the_small_rate(results):
    arrays, config = results.arrays, results.config
    at_large = arrays["steps"] * config.ratio
    both = np.isin(at_large, arrays["steps"])
    same = np.searchsorted(arrays["steps"], at_large[both])
    assert np.sum(both) > 3
    np.testing.assert_allclose(arrays["small_carried_on"][both], arrays["small"][same], atol=1e-6)


@pytest.mark.thorough
def test_the_flow_times_are_steps_times_rates(results):
    summary, config = results.summary, results.config
    assert summary["small rate"]["flow time"] == config.steps * config.small_rate
    stopped = summary["large rate, stopped at the flow time of the small"]
    assert stopped["flow time"] == pytest.approx(summary["small rate"]["flow time"])
    assert stopped["steps"] * config.ratio == config.steps


@pytest.mark.thorough
def test_figures_and_conclusions_are_made_from_the_results(results):
    with plots.style():
        figures = plot(results)
    names = {"trajectories", "final_values", "equal_flow_time", "euler_meets_the_flow"}
    assert set(figures) == names
    plt.close("all")
    sentences = conclude(results)
    assert 2 <= len(sentences) <= 5
    assert all(np.isfinite(v) for rows in results.summary.values() for v in rows.values())


@pytest.mark.thorough
def test_a_run_is_repeated_to_the_same_bits(results):
    again = run(Config(**QUICK))
    assert all(np.array_equal(results.arrays[k], v) for k, v in again.arrays.items())
    assert jax.tree.all(jax.tree.map(lambda a, b: a == b, results.summary, again.summary))
