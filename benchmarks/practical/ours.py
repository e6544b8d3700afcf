"""The same networks, data, steps and optimisers as in `torch_loops`, trained by lazyjax."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import flow_vs_descent
from lazyjax.data import make_dataset
from lazyjax.models import Sinusoidal, deep_mlp, from_linen, shallow_mlp
from lazyjax.tangent import center, scale
from lazyjax.training import scale_loss, train, train_ensemble


def _data(n=15, noise=0.0):
    return make_dataset(jax.random.key(0), n=n, noise=noise)


def _network(module, members=None):
    """Give f and the parameters of one network, or of several."""
    x, key = jnp.zeros((1, 1)), jax.random.key(1)
    f, params = from_linen(module, key, x)
    if members is None:
        return f, params
    keys = jax.random.split(jax.random.key(2), members)
    return f, jax.jit(jax.vmap(lambda k: from_linen(module, k, x)[1]))(keys)


def deep_fit():
    f, params = _network(deep_mlp(10))
    train(f, params, _data(), optax.sgd(0.1), steps=10_000)


def sinusoidal_features():
    for dimension, steps in ((8, 10_000), (200, 100)):
        f, params = _network(Sinusoidal(dimension))
        train(f, params, _data(), optax.sgd(0.01), steps=steps)
    f, params = _network(Sinusoidal(100), 10)
    train_ensemble(f, params, _data(), optax.sgd(0.01), steps=10_000)


def random_inits():
    f, params = _network(shallow_mlp(10), 10)
    train_ensemble(f, params, _data(), optax.sgd(1e-3), steps=5000)


def width_sweep():
    for width in (5, 10, 100, 1000):
        f, params = _network(shallow_mlp(width))
        train(f, params, _data(), optax.sgd(2e-3), steps=50_000)


def bad_init():
    f, params = _network(shallow_mlp(100), 10)
    bad = train_ensemble(f, params, _data(), optax.sgd(1.0), steps=2).final
    train_ensemble(f, bad, _data(), optax.sgd(1e-3), steps=1000)


def alpha_scaling():
    f, params = _network(deep_mlp(8))
    alphas = jnp.array([1.0, 100.0, 1000.0])
    start = jax.tree.map(lambda w: jnp.broadcast_to(w, (3, *w.shape)), params)
    models = jax.vmap(lambda a, w: scale(center(f, w), a))(alphas, start)
    losses = jax.vmap(partial(scale_loss, optax.losses.squared_error))(alphas)
    train_ensemble(models, start, _data(10), optax.sgd(0.01), steps=10_000, loss=losses)
