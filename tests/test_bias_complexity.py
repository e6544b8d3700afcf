import jax
import numpy as np
import pytest

from experiments.bias_complexity import (
    Config,
    _data_set,
    _design,
    _dimensions,
    _members,
    conclude,
    plot,
    run,
)


@pytest.fixture(scope="module")
def results():
    return run(Config(steps=300, inits=2, sweep_top=60, sweep_steps=200, sweep_rate=0.05))


@pytest.mark.thorough
def test_the_minimum_norm_risk_peaks_where_the_rank_reaches_the_points(results):
    peaks = [v for k, v in results.summary.items() if k.startswith("minimum norm")]
    assert len(peaks) == 5
    for peak in peaks:
        low = peak["first dimension with rank n - 2 or more"]
        high = peak["first dimension with rank n"]
        assert 0 < low <= peak["dimension of the peak"] <= high
        assert peak["peak over last"] > 1e3


@pytest.mark.thorough
def test_the_minimum_norm_solution_is_that_of_the_pseudo_inverse(results):
    data = _data_set(results.config, 0)
    dimensions = list(_dimensions(1000))
    for dimension in (10, 100, 400, 1000):
        design = _design(data.x, dimension, 0.2 * np.pi)
        w = np.linalg.pinv(design, rcond=1e-6) @ data.y
        i = dimensions.index(dimension)
        loss = np.mean((design @ w - data.y) ** 2)
        assert results.arrays["norm_loss"][0, i] == pytest.approx(loss, rel=1e-4, abs=1e-12)
        singular = np.linalg.svd(design, compute_uv=False)
        assert results.arrays["norm_rank"][0, i] == np.sum(singular > 1e-6 * singular[0])


@pytest.mark.thorough
def test_a_padded_member_is_a_model_of_its_own_dimension(results):
    """The sweep against a plain loop on the features of one dimension alone."""
    config = results.config
    _, params = _members(config, jax.random.split(jax.random.key(config.seed), 3)[2])
    member, dimension = 2 * 4, 10  # the first initialisation of dimension 10
    own = np.tile(np.arange(30), 2) < 5
    w = np.concatenate([params["kernel"][member][own], params["bias"][member][None]])
    x, y = results.arrays["x"], results.arrays["y"]
    design = _design(x, dimension, config.frequency)
    for _ in range(config.sweep_steps):
        w = w - config.sweep_rate * 2 / 50 * design.T @ (design @ w - y)
    loss = np.mean((design @ w - y) ** 2)
    assert results.arrays["sweep_loss"][4, 0] == pytest.approx(loss, rel=1e-9)


@pytest.mark.thorough
def test_the_model_is_linear_so_the_gap_is_rounding(results):
    numbers = results.summary["dimension 30"]
    assert numbers["gap between network and tangent model, test points"] < 1e-12
    assert numbers["test error"] == pytest.approx(numbers["excess risk"] + 0.05**2)


@pytest.mark.thorough
def test_a_rate_above_the_critical_one_is_counted_not_raised():
    found = run(
        Config(
            steps=10, inits=1, sweep_top=20, sweep_steps=3000, sweep_rate=5.0, data_seeds=1, top=60
        )
    )
    assert found.summary["sweep"]["members that diverged"] > 0
    assert (
        np.isnan(found.arrays["sweep_risk"]).sum()
        == found.summary["sweep"]["members that diverged"]
    )
    assert np.all(np.isfinite(found.arrays["closed_sweep_risk"]))
    plot(found)


@pytest.mark.thorough
def test_figures_and_conclusions_are_drawn(results):
    assert set(plot(results)) == {"functions", "risk", "sweep", "second_descent"}
    assert len(conclude(results)) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, "`n` must be at least 1, got 0"),
        ({"dimension": 7}, "`dimension` must be even.*got 7. Use 8"),
        ({"sweep_top": 0}, "`sweep_top` must be at least 2"),
        ({"noise": -0.1}, "`noise` must be 0 or more"),
        ({"cutoff": 0.0}, "`cutoff` must be positive"),
        ({"sweep_rate": -0.1}, "`sweep_rate` must be positive"),
        ({"target": "middel"}, "Did you mean middle"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Config(**change)
