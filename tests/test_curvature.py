import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from lazyjax.curvature import sharpness
from lazyjax.kernels import matrix, ntk
from lazyjax.tangent import linearize
from lazyjax.types import Dataset

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(5, 2))
W = {"a": RANDOM.normal(size=(2, 4)), "b": np.full((4, 3), 1 / 3)}
LOSSES = {
    "labels": (optax.losses.softmax_cross_entropy_with_integer_labels, np.arange(5) % 3),
    "squares": (optax.losses.squared_error, np.sin(X @ np.ones((2, 3)))),
}


def model(w, x):
    return jnp.tanh(x @ w["a"]) @ w["b"]


@pytest.mark.thorough
@pytest.mark.parametrize("name", LOSSES)
def test_it_is_the_largest_eigenvalue_of_the_hessian(name):
    loss, y = LOSSES[name]
    flat, back = ravel_pytree(W)
    hessian = jax.jit(jax.hessian(lambda w: jnp.mean(loss(model(back(w), X), y))))(flat)
    wanted = np.linalg.eigvalsh(hessian)[-1]
    assert sharpness(model, W, Dataset(X, y), loss=loss) == pytest.approx(wanted, rel=1e-10)


def test_of_a_tangent_model_it_is_that_of_the_kernel():
    y = jnp.zeros((5, 3))
    largest = np.linalg.eigvalsh(matrix(ntk(model, W, X)))[-1]
    found = sharpness(linearize(model, W), W, Dataset(X, y))
    assert found == pytest.approx(2 * largest / 15, rel=1e-10)


def test_more_steps_than_there_are_directions_change_nothing():
    data = Dataset(X, jnp.ones((5, 1)))
    f = lambda w, x: x @ w  # noqa: E731 (one line)
    wanted = np.linalg.eigvalsh(2 * X.T @ X / 5)[-1]
    for depth in (2, 24):
        found = sharpness(f, jnp.ones((2, 1)), data, depth=depth)
        assert found == pytest.approx(wanted, rel=1e-12)
    flat = sharpness(lambda w, x: x @ w, jnp.ones((2, 1)), Dataset(0 * X, jnp.ones((5, 1))))
    assert flat == 0


@pytest.mark.thorough
def test_half_precision_is_multiplied_as_it_is_and_summed_in_single():
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), W)
    data = Dataset(X.astype(jnp.bfloat16), LOSSES["squares"][1].astype(jnp.float32))
    found = sharpness(model, half, data)
    assert found.dtype == jnp.float32
    wanted = sharpness(model, W, Dataset(X, LOSSES["squares"][1]))
    assert found == pytest.approx(float(wanted), rel=0.05)
