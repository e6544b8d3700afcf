"""The same networks, data, steps and optimisers as in `torch_loops`, trained by lazyjax."""

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, NamedTuple

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
def _network(make: Callable[..., Any], *sizes, members=None):
    """Give f and the parameters of one network, or of several."""
    x, module = jnp.zeros((1, 1)), make(*sizes)
    f, params = from_linen(module, jax.random.key(1), x)
    if members is None:
        return f, params
    keys = jax.random.split(jax.random.key(2), members)
    return f, jax.jit(jax.vmap(lambda k: from_linen(module, k, x)[1]))(keys)


def deep_fit():
    f, params = _network(deep_mlp, 10)
    train(f, params, _data(), _sgd(0.1), steps=10_000)


def sinusoidal_features_():
    for dimension, steps in ((8, 10_000), (200, 100)):
        f, params = _network(Sinusoidal, dimension)
        train(f, params, _data(), _sgd(0.01), steps=steps)
    f, params = _network(Sinusoidal, 100, members=10)
    train_ensemble(f, params, _data(), _sgd(0.01), steps=10_000)


def random_inits():
    f, params = _network(shallow_mlp, 10, members=10)
    train_ensemble(f, params, _data(), _sgd(1e-3), steps=5000)


def width_sweep():
    for width in WIDTHS:
        f, params = _network(shallow_mlp, width)
        train(f, params, _data(), _sgd(2e-3), steps=50_000)


def bad_init():
    f, params = _network(shallow_mlp, 100, members=10)
    bad = train_ensemble(f, params, _data(), _sgd(1.0), steps=2).final
    train_ensemble(f, bad, _data(), _sgd(1e-3), steps=1000)


@cache
def _scaled():
    f, params = _network(deep_mlp, 8)
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
    f, params = _network(Sinusoidal, 30, _SLOW)
    train(f, params, _data(50, 0.05), _sgd(0.01), steps=2000)
    train_ensemble(*_sweep(), _sgd(0.1), steps=1000)


def flow_vs_descent():
    starts = np.random.default_rng(0).uniform(-1.5, 1.5, (100, 2)).astype(np.float32)
    descend(starts, np.array([1e-4, 2e-3], np.float32), 10_000)


class Section(NamedTuple):
    """What is timed, and what it needs, drawn before."""

    run: Callable[[], None]
    draws: tuple[Callable[[], Any], ...] = ()


SECTIONS = {
    "deep_fit": Section(deep_fit, (_data, partial(_network, deep_mlp, 10))),
    "sinusoidal_features": Section(
        sinusoidal_features_,
        (
            _data,
            partial(_network, Sinusoidal, 8),
            partial(_network, Sinusoidal, 200),
            partial(_network, Sinusoidal, 100, members=10),
        ),
    ),
    "random_inits": Section(random_inits, (_data, partial(_network, shallow_mlp, 10, members=10))),
    "width_sweep": Section(
        width_sweep, (_data, *(partial(_network, shallow_mlp, width) for width in WIDTHS))
    ),
    "bad_init": Section(bad_init, (_data, partial(_network, shallow_mlp, 100, members=10))),
    "alpha_scaling": Section(alpha_scaling, (partial(_data, 10), _scaled)),
    "bias_complexity": Section(bias_complexity, (partial(_network, Sinusoidal, 30, _SLOW), _sweep)),
    "flow_vs_descent": Section(flow_vs_descent),
}


def set_up(names: Iterable[str]) -> None:
    """Draw the data and the initial weights of some sections; they are kept for the timings."""
    for name in names:
        for draw in SECTIONS[name].draws:
            draw()
