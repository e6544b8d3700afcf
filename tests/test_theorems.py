"""Theorems held against numbers: the limit alpha -> infinity."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lazyjax.kernels import ntk
from lazyjax.metrics import relative_kernel_change
from lazyjax.tangent import center, linearize, scale
from lazyjax.training import scale_loss, train_ensemble
from lazyjax.types import Dataset

ALPHAS = np.array([300.0, 1e3, 3e3, 1e4, 3e4, 1e5])


def tanh_network(params, x):
    for w in params["hidden"]:
        x = jnp.tanh(x @ w)
    return x @ params["output"]


@pytest.fixture(scope="module")
def distances():
    """Sup over time of what Theorem 2.2 bounds, for each alpha."""
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = ((2, 10), (10, 10), (10, 1))
    weights = [jax.random.normal(k, s) / s[0] ** 0.5 for k, s in zip(keys, shapes, strict=False)]
    w0 = {"hidden": weights[:2], "output": weights[2]}
    x = jax.random.normal(keys[3], (8, 2))
    data = Dataset(x, jnp.sin(2 * x[:, :1]))
    h = center(tanh_network, w0)

    alphas = jnp.asarray(ALPHAS)
    start = jax.tree.map(lambda w: jnp.broadcast_to(w, (len(alphas), *w.shape)), w0)
    models = jax.vmap(lambda a: scale(h, a))(alphas)
    tangents = jax.vmap(lambda f, w: linearize(f, w))(models, start)
    losses = jax.vmap(lambda a: scale_loss(optax.losses.squared_error, a))(alphas)
    run = {"steps": 2000, "loss": losses, "record": 40}
    network = train_ensemble(models, start, data, optax.sgd(0.05), **run)
    tangent = train_ensemble(tangents, start, data, optax.sgd(0.05), **run)

    def norm(tree):  # over all axes but those of members and times
        square = sum(
            np.sum(np.square(w), axis=tuple(range(2, w.ndim))) for w in jax.tree.leaves(tree)
        )
        return np.sqrt(square).max(axis=1)

    outputs = jax.vmap(jax.vmap(lambda f, w: f(w, x), (None, 0)))
    gap = np.asarray(outputs(models, network.params) - outputs(tangents, tangent.params))
    kernel0 = ntk(tanh_network, w0, x)
    kernels = jax.jit(jax.vmap(jax.vmap(lambda w: ntk(tanh_network, w, x))))(network.params)
    changes = jax.vmap(jax.vmap(lambda k: relative_kernel_change(k, kernel0)))(kernels)
    return {
        "norm(w - w0)": norm(jax.tree.map(lambda a, b: a - np.asarray(b), network.params, w0)),
        "norm(w - w_tangent)": norm(jax.tree.map(np.subtract, network.params, tangent.params)),
        "rms gap of outputs": np.sqrt(np.mean(gap**2, axis=(2, 3))).max(axis=1),
        "relative kernel change": np.asarray(changes).max(axis=1),
    }


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "slope"),
    [
        ("norm(w - w0)", -1),
        ("norm(w - w_tangent)", -2),
        ("rms gap of outputs", -1),
        ("relative kernel change", -1),
    ],
)
def test_distances_fall_with_alpha_as_theorem_2_2_of_chizat_et_al_says(name, slope, distances):
    measured = np.polyfit(np.log(ALPHAS), np.log(distances[name]), 1)[0]
    assert abs(measured - slope) < 0.03
    pairwise = np.diff(np.log(distances[name])) / np.diff(np.log(ALPHAS))
    np.testing.assert_allclose(pairwise, slope, atol=0.03)
