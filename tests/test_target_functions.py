"""The targets, the data set, and what simple predictors leave."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.target_functions import (
    PREDICTORS,
    Config,
    best_periodic,
    conclude,
    plot,
    risk_floor,
    run,
)
from lazyjax import plots
from lazyjax.data import TARGETS


@pytest.fixture(scope="module")
def results():
    return run(Config())


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"n": 0}, ValueError, "`n` must be at least 1"),
        ({"n": 1.5}, TypeError, "`n` must be a whole number"),
        ({"noise": -0.1}, ValueError, "`noise` must be 0 or more"),
        ({"noise": float("nan")}, ValueError, "`noise` must be 0 or more"),
        ({"target": "midle"}, ValueError, "`target` must be one of .* Did you mean middle"),
        ({"grid_points": 1}, ValueError, "`grid_points` must be at least 2"),
    ],
)
def test_a_bad_config_is_refused(fields, error, match):
    with pytest.raises(error, match=match):
        Config(**fields)


def test_the_targets_are_those_of_the_practical(results):
    x = results.arrays["grid_x"]
    assert x.shape == (100, 1)
    by_hand = {
        "simple": np.where(x > 0, 0.3 * x, 0.0),
        "middle": np.abs(x + 0.5) - 2 * np.where(x > 0.5, x - 0.5, 0.0) - 0.4,
        "complex": np.sin(10 * x) * np.cos(2 * x + 1),
    }
    for name, values in by_hand.items():
        assert results.arrays[f"target/{name}"].shape == x.shape
        np.testing.assert_allclose(results.arrays[f"target/{name}"], values, atol=1e-14)


def test_data_without_noise_lie_on_the_target(results):
    x, y = results.arrays["x"], results.arrays["y"]
    assert x.shape == y.shape == (15, 1)
    np.testing.assert_allclose(y, np.asarray(TARGETS["middle"](jnp.asarray(x))), atol=1e-15)


def test_no_function_of_period_1_beats_one_twelfth_on_the_middle_target(results):
    assert risk_floor("middle", 1.0) == pytest.approx(1 / 12, rel=1e-12)
    assert results.summary["middle"]["risk of the best of period 1"] == risk_floor("middle", 1.0)
    x = jnp.linspace(-0.99, 0.99, 37)[:, None]
    np.testing.assert_allclose(best_periodic(TARGETS["middle"], 1.0, x), 0.1, atol=1e-14)


@pytest.mark.parametrize("name", list(TARGETS))
@pytest.mark.parametrize("period", [0.4, 1.0, 1.3])
def test_the_best_periodic_function_is_that_of_least_squares_on_a_grid(name, period):
    # one free value for each point of the period: averages over the bins of x modulo the period
    fine = np.linspace(-1, 1, 40_001)[:-1] + 2.5e-5
    values = np.asarray(TARGETS[name](jnp.asarray(fine)))
    bins = np.floor(np.mod(fine, period) * 2000).astype(int)
    means = np.bincount(bins, values) / np.maximum(np.bincount(bins), 1)
    floor = np.mean((values - means[bins]) ** 2)
    assert risk_floor(name, period) == pytest.approx(floor, abs=2e-4)


def test_a_period_that_covers_the_interval_has_no_floor():
    assert risk_floor("complex", 2.5) < 1e-25


def test_each_yardstick_is_better_than_the_constant(results):
    for name in TARGETS:
        constant, *others = (results.summary[name][f"risk of the {p}"] for p in PREDICTORS)
        assert max(others) < constant * (1 + 1e-6)


def test_the_widest_gap_holds_no_point(results):
    data, x = results.summary["data"], results.arrays["x"][:, 0]
    begin, end = (
        data["widest gap begins at"],
        data["widest gap begins at"] + data["widest gap"],
    )
    assert not np.any((x > begin + 1e-12) & (x < end - 1e-12))
    edges = np.concatenate([[-1.0], np.sort(x), [1.0]])
    assert data["widest gap"] == pytest.approx(np.max(np.diff(edges)), rel=1e-12)


def test_a_gap_at_the_left_end_begins_there():
    results = run(Config(n=1, seed=3, noise=0.1))
    data, x = results.summary["data"], results.arrays["x"][0, 0]
    assert data["widest gap"] == pytest.approx(max(x + 1, 1 - x), rel=1e-12)
    assert data["widest gap begins at"] == pytest.approx(-1.0 if x > 0 else x, abs=1e-12)


def test_figures_and_conclusions_come_from_the_results(results):
    with plots.style():
        figures = plot(results)
        for figure in figures.values():
            figure.canvas.draw()
    assert set(figures) == {"targets"}
    assert all("nan" not in sentence for sentence in conclude(results))
