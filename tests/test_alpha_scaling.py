"""The output scale alpha: laziness, Theorem 2.2, rounding, saved networks."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.alpha_scaling import QUICK, SLOPES, Config, conclude, plot, run
from lazyjax import plots
from lazyjax.data import make_dataset
from lazyjax.dynamics import gradient_descent
from lazyjax.kernels import ntk
from lazyjax.models import deep_mlp, from_linen
from lazyjax.tangent import center
from lazyjax.training import train

CONFIG = Config(**(QUICK | {"steps": 200, "alphas": (1.0, 1000.0), "wide_alphas": (1.0, 1e5)}))


@pytest.fixture(scope="module")
def results():
    return run(CONFIG)


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"n": 1}, ValueError, "`n` must be at least 2"),
        ({"target": "midle"}, ValueError, "`target` must be one of .* Did you mean middle"),
        ({"activation": "tan"}, ValueError, "`activation` must be one of .* Did you mean tanh"),
        ({"width": 0}, ValueError, "`width` must be at least 1"),
        ({"wide": 6.4}, TypeError, "`wide` must be a whole number"),
        ({"steps": 0}, ValueError, "`steps` must be at least 1"),
        ({"wide_steps": 0}, ValueError, "`wide_steps` must be at least 1"),
        ({"sweep_steps": 0}, ValueError, "`sweep_steps` must be at least 1"),
        ({"learning_rate": 0.0}, ValueError, "`learning_rate` must be positive"),
        ({"wide_fraction": -0.5}, ValueError, "`wide_fraction` must be positive"),
        ({"sweep_rate": float("inf")}, ValueError, "`sweep_rate` must be positive and finite"),
        ({"alphas": ()}, ValueError, "number of `alphas`` must be at least 1"),
        ({"alphas": (1.0, -1.0)}, ValueError, "`alphas` must be positive"),
        ({"wide_alphas": (0.0,)}, ValueError, "`wide_alphas` must be positive"),
        ({"sweep_alphas": (1.0, 1e3)}, ValueError, "from 300 on` must be at least 2, got 1"),
    ],
)
def test_a_bad_config_is_refused(fields, error, match):
    with pytest.raises(error, match=match):
        Config(**fields)


@pytest.mark.thorough
def test_a_large_alpha_is_lazy_and_alpha_1_is_not(results):
    for label in ("width 8 (practical), alpha", "width 16 (wide), alpha"):
        rows = [row for name, row in results.summary.items() if name.startswith(label)]
        assert len(rows) == 2
        for name in ("relative kernel change", "gap as a share of what was learned"):
            assert rows[1][name] < 0.1 * rows[0][name]


@pytest.mark.thorough
def test_tangent_models_meet_the_closed_form_at_every_alpha(results):
    for name in ("practical", "wide"):
        change = np.abs(results.arrays[f"{name}/tangent/train"]).max()
        assert results.arrays[f"{name}/closed/gap"].max() < 1e-9 * change


@pytest.mark.thorough
def test_tangent_models_are_the_same_at_every_alpha(results):
    outputs = results.arrays["practical/tangent/train"]
    np.testing.assert_allclose(outputs[1], outputs[0], atol=1e-9 * np.abs(outputs).max())
    losses = results.arrays["practical/tangent/loss"]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-9)


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "slope"), [(name, slope) for name, (_, slope) in SLOPES.items()])
def test_the_sweep_falls_as_theorem_2_2_says(name, slope, results):
    measured = results.summary["slopes from alpha = 300 on"][f"float64/{name}"]
    assert abs(measured - slope) < 0.05


@pytest.mark.thorough
def test_float32_warns_before_its_outputs_are_rounding(results):
    points = results.summary["alpha where rounding takes over"]
    assert set(points) == {"float32"}
    alphas = np.array(CONFIG.sweep_alphas)
    double, single = (results.arrays[f"sweep/{p}/gap"] for p in ("float64", "float32"))
    wrong = alphas[single > 2 * double]
    assert len(wrong) > 0
    assert points["float32"] < wrong.min()


@pytest.mark.thorough
def test_successive_steps_are_those_of_a_plain_training(results):
    data_key, key, *_ = jax.random.split(jax.random.key(CONFIG.seed), 4)
    data = make_dataset(data_key, n=CONFIG.n, target=CONFIG.target)
    f, params = from_linen(deep_mlp(CONFIG.width), key, data.x)
    steps = results.arrays["practical/steps"]
    every = np.arange(CONFIG.steps + 1)
    optimizer = optax.sgd(CONFIG.learning_rate)
    history = train(center(f, params), params, data, optimizer, steps=CONFIG.steps, record=every)
    rows = [np.reshape(w, (len(every), -1)) for w in jax.tree.leaves(history.params)]
    w = np.concatenate(rows, axis=1)
    plain = np.linalg.norm(np.diff(w, axis=0), axis=1) / np.linalg.norm(w[1:], axis=1)
    ours = results.arrays["practical/successive_steps"][0]
    assert ours.shape == steps.shape
    np.testing.assert_allclose(ours[:-1], plain[steps[:-1]], rtol=1e-6)


@pytest.mark.thorough
def test_a_saved_network_is_loaded_bit_for_bit(results):
    numbers = results.summary["save and load"]
    assert numbers["outputs that differ in any bit"] == 0
    assert numbers["size of the file in bytes"] > 8 * 313


@pytest.mark.thorough
def test_the_table_of_parameters_has_all_313_of_them(results):
    table = results.summary["parameters"]
    shapes = [re.search(r"\((.*)\)", name)[1].split(",") for name in table]
    assert sum(np.prod([int(k) for k in shape if k.strip()]) for shape in shapes) == 313
    lazy = [row["norm after training, alpha = 1000"] for row in table.values()]
    start = [row["norm at the start"] for row in table.values()]
    np.testing.assert_allclose(lazy, start, rtol=1e-2)


@pytest.mark.thorough
def test_the_lazy_limit_of_the_deep_thin_network_learns_little_more_than_the_mean():
    steps = jnp.asarray(10_000.0)

    @jax.jit
    def left(key):
        data_key, key = jax.random.split(key)
        data = make_dataset(data_key, n=10)
        f, params = from_linen(deep_mlp(8), key, data.x)
        zero = jnp.zeros_like(data.y)
        kernel = ntk(f, params, data.x)
        trained = gradient_descent(kernel, data.y, zero, learning_rate=0.01).train(steps)
        return jnp.mean(jnp.square(trained - data.y)) / jnp.var(data.y)

    shares = np.array([left(key) for key in jax.random.split(jax.random.key(1), 20)])
    assert shares.shape == (20,)
    assert np.median(shares) > 0.7


@pytest.mark.thorough
def test_figures_and_conclusions_are_made_from_the_results(results):
    with plots.style():
        figures = plot(results)
    for name in ("practical", "wide"):
        shared = ("functions", "training", "layers", "kernels", "measures")
        assert {f"{name}_{kind}" for kind in shared} <= set(figures)
    assert {"successive_steps", "parameters", "theorem"} <= set(figures)
    sentences = conclude(results)
    assert 4 <= len(sentences) <= 6
    assert "theorem -2" in sentences[2]
