"""The same networks, data, steps and optimisers as in `torch_loops`, trained by lazyjax."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from experiments.surface import descend
from lazyjax.data import make_dataset
from lazyjax.models import Sinusoidal, deep_mlp, from_linen, shallow_mlp, sinusoidal_features
from lazyjax.tangent import center, scale
from lazyjax.training import scale_loss, train, train_ensemble
from lazyjax.types import Dataset

WIDTHS = (5, 10, 100, 1000)
_SLOW = 0.2 * np.pi  # the frequency of section 24
_sgd = cache(optax.sgd)  # one optimiser a learning rate: what is made twice is compiled twice


@cache
def _draw(n, noise):
    return make_dataset(jax.random.key(0), n=n, noise=noise)


def _data(n=15, noise=0.0):
    return _draw(n, noise)  # one cache entry, however it is called


@cache
def _network(module, members=None):
    """Give f and the parameters of one network, or of several."""
    x = jnp.zeros((1, 1))
    f, params = from_linen(module, jax.random.key(1), x)
    if members is None:
        return f, params
    keys = jax.random.split(jax.random.key(2), members)
    return f, jax.jit(jax.vmap(lambda k: from_linen(module, k, x)[1]))(keys)


def deep_fit():
    f, params = _network(deep_mlp(10))
    train(f, params, _data(), _sgd(0.1), steps=10_000)


def sinusoidal_features_():
    for dimension, steps in ((8, 10_000), (200, 100)):
        f, params = _network(Sinusoidal(dimension))
        train(f, params, _data(), _sgd(0.01), steps=steps)
    f, params = _network(Sinusoidal(100), 10)
    train_ensemble(f, params, _data(), _sgd(0.01), steps=10_000)


def random_inits():
    f, params = _network(shallow_mlp(10), 10)
    train_ensemble(f, params, _data(), _sgd(1e-3), steps=5000)


def width_sweep():
    for width in WIDTHS:
        f, params = _network(shallow_mlp(width))
        train(f, params, _data(), _sgd(2e-3), steps=50_000)


def bad_init():
    f, params = _network(shallow_mlp(100), 10)
    bad = train_ensemble(f, params, _data(), _sgd(1.0), steps=2).final
    train_ensemble(f, bad, _data(), _sgd(1e-3), steps=1000)


@cache
def _scaled():
    f, params = _network(deep_mlp(8))
    alphas = jnp.array([1.0, 100.0, 1000.0])
    start = jax.tree.map(lambda w: jnp.broadcast_to(w, (3, *w.shape)), params)
    models = jax.vmap(lambda a, w: scale(center(f, w), a))(alphas, start)
    return models, start, jax.vmap(partial(scale_loss, optax.losses.squared_error))(alphas)


def alpha_scaling():
    models, start, losses = _scaled()
    train_ensemble(models, start, _data(10), _sgd(0.01), steps=10_000, loss=losses)


def _masked(mask, params, features):
    """Apply the linear layer to as many of the features as the dimension of the member has."""
    return features @ (mask[:, None] * params["kernel"]) + params["bias"]


@cache
def _sweep():
    """Give the 99 dimensions, ten initialisations each, padded to 198 features: one ensemble."""
    dimensions, inits = np.arange(2, 200, 2), 10
    ks = np.tile(np.arange(99), 2)
    masks = np.repeat(ks[None] < dimensions[:, None] // 2, inits, axis=0).astype(np.float32)
    rng, bound = np.random.default_rng(0), np.repeat(dimensions, inits)[:, None, None] ** -0.5
    params = {
        "kernel": (bound * rng.uniform(-1, 1, (990, 198, 1))).astype(np.float32),
        "bias": (bound * rng.uniform(-1, 1, (990, 1, 1))).astype(np.float32),
    }
    noisy = _data(50, 0.05)
    features = sinusoidal_features(noisy.x, dimension=198, frequency=_SLOW)
    return Partial(_masked, masks), params, Dataset(features, noisy.y)


def bias_complexity():
    f, params = _network(Sinusoidal(30, _SLOW))
    train(f, params, _data(50, 0.05), _sgd(0.01), steps=2000)
    train_ensemble(*_sweep(), _sgd(0.1), steps=1000)


def flow_vs_descent():
    starts = np.random.default_rng(0).uniform(-1.5, 1.5, (100, 2)).astype(np.float32)
    descend(starts, np.array([1e-4, 2e-3], np.float32), 10_000)


def set_up():
    """Draw the data and the initial weights of every section; they are kept for the timings."""
    for data in ((15, 0.0), (10, 0.0), (50, 0.05)):
        _data(*data)
    alone = [deep_mlp(10), deep_mlp(8), Sinusoidal(8), Sinusoidal(200), Sinusoidal(30, _SLOW)]
    for module in [*alone, *(shallow_mlp(width) for width in WIDTHS)]:
        _network(module)
    for module in (Sinusoidal(100), shallow_mlp(10), shallow_mlp(100)):
        _network(module, 10)
    _scaled()
    _sweep()


SECTIONS = {
    "deep_fit": deep_fit,
    "sinusoidal_features": sinusoidal_features_,
    "random_inits": random_inits,
    "width_sweep": width_sweep,
    "bad_init": bad_init,
    "alpha_scaling": alpha_scaling,
    "bias_complexity": bias_complexity,
    "flow_vs_descent": flow_vs_descent,
}
