"""The one-parameter model: its linearization, its loss, and the limit of a large alpha."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.loss_landscape import (
    QUICK,
    TEXT_W0,
    Config,
    anchored,
    by_hand,
    conclude,
    plot,
    run,
)
from lazyjax import plots
from lazyjax.tangent import linearize

CONFIG = Config(**QUICK)


@pytest.fixture(scope="module")
def results():
    return run(CONFIG)


def text_f(x, w):
    """Evaluate the model as the text of the practical has it."""
    return w * x / 2 + np.log(1 + w**2) * x / 5 + 0.1 * np.sin(np.exp(2 * w))


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"w0": float("nan")}, ValueError, "`w0` must be finite"),
        ({"x": float("inf")}, ValueError, "`x` must be finite"),
        ({"alphas": (1.0,)}, ValueError, "number of `alphas`` must be at least 2"),
        ({"alphas": (1.0, 0.0)}, ValueError, "`alphas` must be positive"),
        ({"alphas": (1.0, -5.0)}, ValueError, "`alphas` must be positive"),
        ({"window_points": 3}, ValueError, "`window_points` must be at least 10"),
        ({"learning_rate": 0.0}, ValueError, "`learning_rate` must be positive"),
        ({"steps": 0}, ValueError, "`steps` must be at least 1"),
        ({"steps": 10.0}, TypeError, "`steps` must be a whole number"),
    ],
)
def test_a_bad_config_is_refused(fields, error, match):
    with pytest.raises(error, match=match):
        Config(**fields)


@pytest.mark.parametrize("w0", [1.5, 0.4, -0.7, 0.0])
def test_linearize_gives_the_linearization_of_the_text(w0):
    anchor, x = jnp.asarray(w0), jnp.array([[-1.0], [1.5], [2.0]])
    tangent = linearize(anchored(anchor), anchor)
    for w in (-2.0, 0.3, w0, 4.0):
        expected = text_f(np.asarray(x), w0) * (w - w0)
        for model in (tangent(jnp.asarray(w), x), by_hand(anchor, jnp.asarray(w), x)):
            assert model.shape == expected.shape
            np.testing.assert_allclose(model, expected, rtol=1e-14, atol=1e-15)


@pytest.mark.thorough
def test_the_landscapes_are_those_of_the_text(results):
    for alpha in CONFIG.alphas:
        displacement = results.arrays[f"displacement/{alpha:g}"]
        assert displacement.shape == (CONFIG.window_points,)
        assert displacement[-1] == -displacement[0] == pytest.approx(2 / alpha**0.75)
        w = CONFIG.w0 + displacement
        for name, at in (("network", w), ("tangent", CONFIG.w0)):
            h = text_f(CONFIG.x, at) * displacement
            loss = (alpha * h - CONFIG.y) ** 2 / 2 / alpha**2
            np.testing.assert_allclose(
                results.arrays[f"{name}_landscape/{alpha:g}"],
                loss,
                rtol=1e-8,
                atol=1e-12 * loss.max(),
            )


@pytest.mark.thorough
def test_h_is_drawn_where_its_anchor_is(results):
    for anchor in (CONFIG.w0, TEXT_W0):
        w = results.arrays[f"w/{anchor:g}"]
        assert w[0] <= -1.0
        assert w[0] < anchor < w[-1]
        expected = text_f(CONFIG.shown_x, w) * (w - anchor)
        np.testing.assert_allclose(results.arrays[f"network_h/{anchor:g}"], expected, atol=1e-12)


@pytest.mark.thorough
def test_the_tangent_model_reaches_its_minimum(results):
    way = CONFIG.y / text_f(CONFIG.x, CONFIG.w0)
    ends = results.arrays["tangent_path"][:, -1] * np.asarray(CONFIG.alphas)
    np.testing.assert_allclose(ends, way, rtol=1e-4)


@pytest.mark.thorough
def test_the_path_of_the_tangent_model_is_that_of_a_loop(results):
    alpha, w = CONFIG.alphas[1], CONFIG.w0
    slope = text_f(CONFIG.x, CONFIG.w0)
    path = [0.0]
    for _ in range(100):
        residual = alpha * slope * (w - CONFIG.w0) - CONFIG.y
        w -= CONFIG.learning_rate * residual * slope / alpha  # of (alpha h - y)^2 / 2 / alpha^2
        path.append(w - CONFIG.w0)
    steps = results.arrays["steps"]
    at = steps[steps <= 100]
    np.testing.assert_allclose(
        results.arrays["tangent_path"][1, : len(at)], np.asarray(path)[at], rtol=1e-10, atol=1e-14
    )


@pytest.mark.thorough
def test_model_and_tangent_model_come_together_as_theorem_2_2_says(results):
    overall = results.summary["all alphas"]
    assert overall["slope of the distance of the two ends over the last two alphas"] == (
        pytest.approx(-2, abs=0.05)
    )
    differences = "slope of the relative difference of the losses over the last two alphas"
    assert overall[differences] == pytest.approx(-0.75, abs=0.1)  # the window's own power


@pytest.mark.thorough
def test_a_small_alpha_has_many_minima_and_a_large_one_has_one(results):
    minima = "local minima in the window, network"
    assert results.summary["alpha 1"][minima] > 10
    assert results.summary["alpha 10000"][minima] == 1


@pytest.mark.thorough
def test_figures_and_conclusions_come_from_the_results(results):
    with plots.style():
        figures = plot(results)
        for figure in figures.values():
            figure.canvas.draw()
    assert set(figures) == {"landscapes", "model", "limit"}
    assert all("nan" not in sentence for sentence in conclude(results))
