"""Random features: their inner products are the kernel in expectation, and the error is measured."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_operators import PARAMS, X1, X2, loop, model

from lazyjax import costs, ntk
from lazyjax import sketches as sketches_module
from lazyjax.sketches import sketch


def products(z1, z2):
    return np.einsum("nkd,mld->nmkl", z1, z2)


@pytest.mark.thorough
@pytest.mark.parametrize("factored", [False, True])
def test_inner_products_are_the_kernel_in_expectation(factored, monkeypatch):
    """The mean over seeds nears the kernel as 1 / sqrt(seeds): it has no bias."""
    chosen = sketches_module._way

    def way(shape, dimension):  # for a model as small as this, gradients are the cheaper way
        whole = chosen(shape, dimension)
        return sketches_module.FACTORS if factored and not shape.mixed else whole

    monkeypatch.setattr(sketches_module, "_way", way)
    jax.clear_caches()
    kernel, seeds = np.asarray(ntk(model, PARAMS, X1)), 60
    found = np.stack(
        [
            products(z, z)
            for z in (
                sketch(jax.random.key(i), model, PARAMS, X1, dimension=64).features
                for i in range(seeds)
            )
        ]
    )
    assert found.shape[1:] == kernel.shape
    mean, spread = found.mean(0), found.std(0) / seeds**0.5
    z_scores = (mean - kernel) / spread
    assert np.abs(z_scores).max() < 5
    assert 0.7 < np.sqrt(np.mean(z_scores**2)) < 1.4
    error = np.linalg.norm(mean - kernel) / np.linalg.norm(kernel)
    alone = np.mean([np.linalg.norm(one - kernel) for one in found]) / np.linalg.norm(kernel)
    assert error < 2 * alone / seeds**0.5
    jax.clear_caches()


@pytest.mark.thorough
def test_the_error_falls_as_the_root_of_the_dimension_and_is_what_is_measured():
    x = jax.tree.map(lambda a, b: jnp.concatenate([a, b] * 4), X1, X2)
    kernel = np.asarray(ntk(model, PARAMS, x))
    errors = {}
    for dimension in (8, 32):
        runs = []
        for seed in range(8):
            found = sketch(jax.random.key(seed), model, PARAMS, x, dimension=dimension, pairs=24**2)
            z = found.features
            assert z.shape == (48, 3, dimension)
            runs.append(np.linalg.norm(products(z, z) - kernel) / np.linalg.norm(kernel))
            assert found.error == pytest.approx(runs[-1], rel=0.5)
            assert 0 < found.standard_error < found.error
        errors[dimension] = np.mean(runs)
    assert 1.5 < errors[8] / errors[32] < 2.7  # 2


@pytest.mark.thorough
def test_blocks_of_the_batch_are_sketched_alike(monkeypatch):
    """One hash for all of them, and rounding is all that the blocks change."""
    wanted = sketch(jax.random.key(0), model, PARAMS, X1, dimension=64).features
    cramped = costs.RATES["cpu"]._replace(working=1)  # one example at a time
    monkeypatch.setitem(costs.RATES, "cpu", cramped)
    jax.clear_caches()
    found = sketch(jax.random.key(0), model, PARAMS, X1, dimension=64).features
    np.testing.assert_allclose(found, wanted, atol=1e-13)
    jax.clear_caches()


@pytest.mark.thorough
def test_one_key_gives_one_space():
    key = jax.random.key(3)
    z1 = sketch(key, model, PARAMS, X1, dimension=1024).features
    z2 = sketch(jax.random.clone(key), model, PARAMS, X2, dimension=1024).features
    kernel = ntk(model, PARAMS, X1, X2)
    assert np.linalg.norm(products(z1, z2) - kernel) < 0.25 * np.linalg.norm(kernel)


@pytest.mark.thorough
def test_outputs_and_wrt_choose_as_in_ntk():
    options = {"outputs": (2, 0), "wrt": lambda path: "in" in path}
    z = sketch(jax.random.key(0), model, PARAMS, X1, dimension=1024, **options).features
    kernel = ntk(model, PARAMS, X1, **options)
    assert z.shape == (7, 2, 1024)
    assert np.linalg.norm(products(z, z) - kernel) < 0.25 * np.linalg.norm(kernel)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dimension": 0}, ValueError, "`dimension` must be at least 1, got 0"),
        ({"dimension": 2.5}, TypeError, "`dimension` must be a whole number"),
        ({"dimension": 8, "pairs": 0}, ValueError, "`pairs` must be at least 1, got 0"),
        ({"dimension": 8, "f": lambda p, x: (model(p, x),) * 2}, TypeError, "`f` must return one array for a sketch"),
        ({"dimension": 8, "f": loop, "params": jnp.ones(()), "x": jnp.ones((3, 2))}, ValueError, "`f` must have a derivative in reverse mode"),
    ],
)  # fmt: skip # to be read as a table
def test_bad_input_is_refused(options, error, message):
    options = {"f": model, "params": PARAMS, "x": X1} | options
    f, params, x = (options.pop(name) for name in ("f", "params", "x"))
    with pytest.raises(error, match=message):
        sketch(jax.random.key(0), f, params, x, **options)
