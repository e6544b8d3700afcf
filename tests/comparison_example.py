"""One small comparison for the tests of several modules: made once in each, and compiled once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lazyjax.comparison import Comparison, compare_ensemble
from lazyjax.types import Dataset, Params

X = np.linspace(-1, 1, 8)[:, None]
DATA = Dataset(jnp.asarray(X), jnp.asarray(np.sin(4 * X)))
TEST = np.linspace(-1, 1, 5)[:, None]
RUN = {"steps": 300, "test": TEST}


def network(params: Params, x: jax.Array) -> jax.Array:
    """Give the outputs (N, 1) of one layer of ReLU units."""
    h = jax.nn.relu(x @ params["hidden_0"]["kernel"] + params["hidden_0"]["bias"][None])
    return h @ params["output"]["kernel"]


def start(seed: int, width: int) -> Params:
    """Draw the weights of a network."""
    draw = np.random.default_rng(seed).uniform
    hidden = {"kernel": draw(-1, 1, (1, width)), "bias": draw(-1, 1, width)}
    output = {"kernel": draw(-1, 1, (width, 1)) / width**0.5}
    return jax.tree.map(jnp.asarray, {"hidden_0": hidden, "output": output})


@functools.cache
def examples() -> Comparison:
    """Compare two networks with their tangent models."""
    both = jax.tree.map(lambda *w: jnp.stack(w), start(0, 30), start(1, 30))
    return compare_ensemble(network, both, DATA, optax.sgd(0.02), **RUN)


def example() -> Comparison:
    """Give the first of them alone."""
    return examples().of_members(slice(1))
