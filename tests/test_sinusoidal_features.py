"""Models linear in their parameters: always their own tangent model."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from thoroughness import few

from experiments.results import Results
from experiments.sinusoidal_features import (
    BIAS,
    Config,
    cases,
    conclude,
    frequency_label,
    model,
    plot,
    run,
    select,
    spectrum,
)
from lazyjax import plots
from lazyjax.comparison import Comparison
from lazyjax.data import make_dataset
from lazyjax.models import Sinusoidal, from_linen, sinusoidal_features
from lazyjax.tangent import linearize
from lazyjax.training import train

CONFIG = Config(steps=300, networks=3, wide_dimension=60, ensemble_dimension=40)


@pytest.fixture(scope="module")
def results():
    return run(CONFIG)


def rounding_of(*arrays):
    return 1e-13 * max(np.abs(a).max() for a in arrays)


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"n": 1}, ValueError, "`n` must be at least 2"),
        ({"target": "sine"}, ValueError, "`target` must be one of"),
        ({"frequencies": ()}, ValueError, "number of `frequencies`` must be at least 1"),
        ({"frequencies": (0.0, 1.0)}, ValueError, "`frequencies` must be positive"),
        ({"first_k": -1}, ValueError, "`first_k` must be at least 0"),
        ({"first_k": 0.5}, TypeError, "`first_k` must be a whole number"),
        ({"dimension": 7}, ValueError, "`dimension` must be even, .* got 7. Use 8"),
        ({"wide_dimension": 201}, ValueError, "`wide_dimension` must be even"),
        ({"ensemble_dimension": 0}, ValueError, "`ensemble_dimension` must be at least 2"),
        ({"networks": 0}, ValueError, "`networks` must be at least 1"),
        ({"learning_rate": -0.01}, ValueError, "`learning_rate` must be positive"),
        ({"steps": 0}, ValueError, "`steps` must be at least 1"),
        ({"wide_steps": 0}, ValueError, "`wide_steps` must be at least 1"),
    ],
)
def test_a_bad_config_is_refused(fields, error, match):
    with pytest.raises(error, match=match):
        Config(**fields)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("dimension", "first_k", "frequency"),
    [(200, 1, 0.2 * math.pi), (8, 0, 2 * math.pi)],
)
def test_it_equals_its_tangent_model_to_rounding_at_every_step(dimension, first_k, frequency):
    data = make_dataset(jax.random.key(3), n=15)
    module = Sinusoidal(dimension, frequency=frequency, first_k=first_k)
    f, params = from_linen(module, jax.random.key(4), data.x)
    settings = {"steps": 500, "record": np.arange(501)}
    network = train(f, params, data, optax.sgd(0.01), **settings)
    tangent = train(linearize(f, params), params, data, optax.sgd(0.01), **settings)
    np.testing.assert_array_equal(network.steps, np.arange(501))
    assert tangent.loss.shape == network.loss.shape == (501,)
    # the rms residual is a difference of outputs of order 1, and has their rounding
    np.testing.assert_allclose(np.sqrt(tangent.loss), np.sqrt(network.loss), rtol=0, atol=1e-14)
    for ours, other in zip(
        jax.tree.leaves(network.params), jax.tree.leaves(tangent.params), strict=True
    ):
        assert ours.shape == other.shape == (501, *ours.shape[1:])
        np.testing.assert_allclose(ours, other, rtol=0, atol=rounding_of(ours))
    assert network.weight_movement[-1] > 0.1  # it did learn


@few(("dimension", "first_k"), [(12, 1), (8, 0)])
def test_an_ensemble_of_frequencies_is_the_models_of_each(dimension, first_k):
    x, frequencies = jnp.linspace(-1, 1, 7)[:, None], (0.7, 4.0)
    modules = [Sinusoidal(dimension, frequency=w, first_k=first_k) for w in frequencies]
    (f, params), (g, others) = (from_linen(m, jax.random.key(0), x) for m in modules)
    for ours, other in zip(jax.tree.leaves(params), jax.tree.leaves(others), strict=True):
        np.testing.assert_array_equal(ours, other)  # the same weights at every frequency
    outputs = jax.vmap(lambda w: model(first_k, w, params, x))(jnp.asarray(frequencies))
    assert outputs.shape == (2, 7, 1)
    for ours, function in zip(outputs, (f, g), strict=True):
        np.testing.assert_allclose(ours, function(params, x), atol=1e-14)


@pytest.mark.thorough
def test_the_gap_is_rounding_while_the_weights_move(results):
    for case in cases(CONFIG):
        compared = Comparison.of(results.arrays, f"{case.name}/")
        assert compared.members == 2 * case.members
        limit = rounding_of(compared.network.train)
        assert compared.gap_train.max() < limit
        assert compared.gap_test.max() < limit
        assert compared.closed.gap.max() < 10 * limit
        assert compared.kernel_change.max() == 0.0
        assert compared.network.movement[:, -1].min() > 0.1
        np.testing.assert_allclose(
            compared.closed.movement[:, -1], compared.network.movement[:, -1], rtol=1e-9
        )


@pytest.mark.thorough
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_each_case_is_the_model_that_it_says(which, at, results):
    case = cases(CONFIG)[which]
    compared, _ = select(results, case, at)
    _, _, least_loss = spectrum(compared)
    dimension = (CONFIG.dimension, CONFIG.wide_dimension, CONFIG.ensemble_dimension)[which]
    x = jnp.asarray(compared.x)
    phi = sinusoidal_features(x, dimension=dimension, frequency=CONFIG.frequencies[at])
    design = np.concatenate([phi, np.ones_like(x)], axis=1)  # the bias
    points = len(compared.kernel_steps)
    assert compared.kernels.shape == (case.members, points, CONFIG.n, CONFIG.n)
    for kernel in compared.kernels.reshape(-1, CONFIG.n, CONFIG.n):
        np.testing.assert_allclose(kernel, design @ design.T, atol=1e-12 * kernel.max())
    residual = compared.y - design @ np.linalg.lstsq(design, compared.y, rcond=1e-9)[0]
    np.testing.assert_allclose(least_loss, np.mean(residual**2), atol=1e-9)
    assert np.all(compared.network.loss >= least_loss[:, None] - 1e-12)


@pytest.mark.thorough
def test_k_from_0_wastes_a_sine_and_a_cosine(results):
    ranks = [spectrum(select(results, cases(CONFIG)[0], at)[0])[1] for at in (0, 1)]
    np.testing.assert_array_equal(ranks, [[7], [7]])


@pytest.mark.thorough
def test_no_model_of_period_1_has_a_risk_below_one_twelfth(results):
    assert results.arrays["floors"][0] == pytest.approx(1 / 12, rel=1e-12)
    assert results.arrays["floors"][1] == 0.0
    small, wide, many = cases(CONFIG)
    for case in (small, wide, many):
        assert select(results, case, 0)[1].min() > 1 / 12
    assert select(results, small, 1)[1][:, -1].max() < 1 / 12


@pytest.mark.thorough
def test_the_output_bias_spreads_further_than_all_weights(results):
    network = select(results, cases(CONFIG)[2], 0)[0].network

    def spread(movement):
        return np.max(movement[:, -1]) / np.min(movement[:, -1])

    assert spread(network.layer[BIAS]) > 1.5 * spread(network.movement)


@pytest.mark.thorough
def test_figures_and_conclusions_come_from_the_results(results):
    with plots.style():
        figures = plot(results)
        for figure in figures.values():
            figure.canvas.draw()
    drawn = {
        f"{case.name}_{kind}"
        for case in cases(CONFIG)
        for kind in ("functions", "training", "layers")
    }
    assert set(figures) == {"risk", "kernels"} | drawn
    assert all("nan" not in sentence for sentence in conclude(results))


@pytest.mark.thorough
def test_one_frequency_without_a_floor_can_be_drawn(results):
    config = dataclasses.replace(CONFIG, frequencies=CONFIG.frequencies[1:])
    arrays = dict(results.arrays)
    for name in ("floors", "periodic"):
        arrays[name] = arrays[name][1:]
    for case in cases(CONFIG):
        compared, risk = select(results, case, 1)
        arrays |= compared.arrays(f"{case.name}/") | {f"{case.name}/risk": risk}
    label = frequency_label(config.frequencies[0])
    one = Results(config=config, arrays=arrays, summary={label: results.summary[label]})
    np.testing.assert_array_equal(
        select(one, cases(config)[2], 0)[1], select(results, cases(CONFIG)[2], 1)[1]
    )
    with plots.style():
        for figure in plot(one).values():
            figure.canvas.draw()
    assert len(conclude(one)) == 3
