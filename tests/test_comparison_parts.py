"""`compare` is its parts called by hand, to the last bit, with models unlike each other."""

from functools import partial

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.tree_util import Partial

import lazyjax
from lazyjax.comparison import compare
from lazyjax.curvature import sharpness
from lazyjax.dynamics import gradient_descent
from lazyjax.kernels import ntk
from lazyjax.metrics import (
    kernel_alignment,
    pattern_change,
    relative_kernel_change,
    target_alignment,
)
from lazyjax.patterns import relu_inputs
from lazyjax.spectrum import critical_learning_rate
from lazyjax.tangent import linearize
from lazyjax.training import train
from lazyjax.types import Dataset

LABELS = optax.losses.softmax_cross_entropy_with_integer_labels


def mlp():
    x = jax.random.normal(jax.random.key(1), (9, 3))
    f, params = lazyjax.from_linen(lazyjax.MLP((12, 12), outputs=2), jax.random.key(0), x)
    return f, params, Dataset(x, jnp.sin(x[:, :2])), x[:4] + 1, {"optimizer": optax.sgd(0.05, 0.5)}


def cnn():
    x = jax.random.normal(jax.random.key(1), (6, 5, 5, 1))
    layers = [nn.Conv(3, (3, 3), param_dtype=float), nn.relu, lambda x: x.reshape(len(x), -1)]
    module = nn.Sequential([*layers, nn.Dense(3, param_dtype=float)])
    f, params = lazyjax.from_linen(module, jax.random.key(0), x)
    data = Dataset(x, jnp.arange(6) % 3)
    return f, params, data, x[:2] * 2, {"optimizer": optax.adam(0.01), "loss": LABELS}


class Normalised(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Linear(3, 8, rngs=rngs, param_dtype=float)
        self.norm = nnx.BatchNorm(8, rngs=rngs, param_dtype=float)
        self.outer = nnx.Linear(8, 1, rngs=rngs, param_dtype=float)

    def __call__(self, x):
        return self.outer(nnx.tanh(self.norm(self.inner(x))))


def normalised():
    module = Normalised(nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (8, 3))
    module.norm.mean = nnx.BatchStat(jnp.linspace(-0.1, 0.1, 8))
    module.norm.var = nnx.BatchStat(jnp.linspace(0.5, 2.0, 8))
    module.eval()
    f, params = lazyjax.from_nnx(module)
    return f, params, Dataset(x, x[:, :1] ** 2), x[:3] - 1, {"optimizer": optax.sgd(0.02)}


def equinox():
    module = eqx.nn.MLP(2, 1, 10, 2, key=jax.random.key(0), dtype=float)
    params, static = eqx.partition(module, eqx.is_inexact_array)
    f = lambda p, x: jax.vmap(eqx.combine(p, static))(x)  # noqa: E731 (one line)
    x = jax.random.normal(jax.random.key(1), (8, 2))
    data = Dataset(x, jnp.sign(x[:, :1]))
    options = {"optimizer": optax.sgd(0.05), "batch_size": 3, "key": jax.random.key(2)}
    return f, params, data, x[:3] * 3, options


def transformer():
    tokens = jax.random.randint(jax.random.key(1), (6, 5), 0, 7)
    shapes = {"embed": (7, 4), "q": (4, 4), "k": (4, 4), "v": (4, 4), "out": (4, 7)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = {
        name: jax.random.normal(k, shape) / 2
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }

    def f(p, tokens):
        x = p["embed"][tokens]
        weights = jax.nn.softmax(jnp.einsum("nsd,ntd->nst", x @ p["q"], x @ p["k"]), axis=-1)
        return (x + weights @ (x @ p["v"])) @ p["out"]

    data = Dataset(tokens, jnp.roll(tokens, 1, axis=1))
    return f, params, data, tokens[:2], {"optimizer": optax.sgd(0.1), "loss": LABELS}


def of_a_tree():
    x = {"left": np.linspace(-1, 1, 7)[:, None], "right": np.linspace(0, 2, 14).reshape(7, 2)}
    params = {"a": np.ones((1, 5)) / 3, "b": np.ones((2, 5)) / 4, "c": np.linspace(-1, 1, 5)}
    x, params = jax.tree.map(jnp.asarray, (x, params))

    def f(p, x):
        return (jnp.tanh(x["left"] @ p["a"] + x["right"] @ p["b"]) @ p["c"])[:, None]

    test = jax.tree.map(lambda a: a[:2] + 1, x)
    return f, params, Dataset(x, x["left"] ** 2), test, {"optimizer": optax.sgd(0.1)}


MODELS = {made.__name__: made for made in (of_a_tree, mlp, cnn, normalised, equinox, transformer)}
_call = jax.jit(lambda f, w, x: f(w, x))


def same_bits(found, wanted):
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert found.shape == wanted.shape
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.thorough
@pytest.mark.parametrize("name", MODELS)
def test_a_comparison_is_its_parts_to_the_last_bit(name):
    f, params, data, test, options = MODELS[name]()
    optimizer, key = options.pop("optimizer"), options.pop("key", None)
    options["steps"] = 12
    again = [None, None] if key is None else [jax.random.clone(key) for _ in range(2)]
    compared = compare(f, params, data, optimizer, test=test, key=key, **options)
    f_lin = linearize(f, params)
    network = train(f, params, data, optimizer, key=again[0], **options)
    tangent = train(f_lin, params, data, optimizer, key=again[1], **options)

    for own, history, model in (
        (compared.network, network, partial(_call, f if isinstance(f, Partial) else Partial(f))),
        (compared.tangent, tangent, partial(_call, f_lin)),
    ):
        whole = history.loss[compared.curve_steps] if again[0] is None else history.data_loss
        same_bits(own.loss[0], whole)
        same_bits(own.movement[0], history.weight_movement[compared.curve_steps])
        for i in (0, 5, -1):
            same_bits(own.train[0, i], model(history.at(i), data.x))
            same_bits(own.test[0, i], model(history.at(i), test))
    gap = np.sqrt(np.mean((compared.network.test - compared.tangent.test)[0, -1] ** 2))
    assert compared.gap_test[0, -1] == pytest.approx(gap, rel=1e-14, abs=0)

    w0, w = network.at(0), network.final
    before, after = (ntk(f, p, data.x, reduce="trace") for p in (w0, w))
    same_bits(compared.kernels[0, 0], before)
    same_bits(compared.kernels[0, -1], after)
    for found, wanted in (
        (compared.kernel_change, relative_kernel_change(after, before)),
        (compared.kernel_alignment, kernel_alignment(after, before)),
        (
            compared.sharpness,
            sharpness(f, w, data, loss=options.get("loss", optax.losses.squared_error)),
        ),
    ):
        assert found[0, -1] == pytest.approx(float(wanted), rel=1e-12, abs=1e-15)
    if name == "transformer":  # a label a token: no target of an example
        assert np.all(np.isnan(compared.target_alignment))
    else:
        y = data.y if data.y.ndim == 2 else jnp.eye(3)[data.y]
        wanted = target_alignment(after, y)
        assert compared.target_alignment[0, -1] == pytest.approx(float(wanted), rel=1e-12)
    inputs = relu_inputs(f, params, data.x)
    assert (inputs is None) == (compared.pattern_change is None)
    if inputs is not None:
        changed = pattern_change(inputs, w, w0, data.x)
        assert compared.pattern_change[0, -1] == pytest.approx(float(changed), rel=1e-6)

    assert (compared.closed is None) == bool(compared.no_closed_form)
    assert (compared.closed is None) == (name in ("cnn", "equinox", "transformer"))
    if compared.closed is not None:
        rate, momentum = float(compared.learning_rate[0]), float(compared.momentum[0])
        dynamics = gradient_descent(
            ntk(f, params, data.x),
            data.y,
            f(params, data.x),
            learning_rate=rate,
            momentum=momentum,
        )
        wanted = dynamics.train(compared.steps)
        np.testing.assert_allclose(compared.closed.train[0], wanted, rtol=1e-10, atol=1e-13)
        critical = critical_learning_rate(ntk(f, params, data.x), momentum=momentum)
        assert compared.critical_learning_rate[0] == pytest.approx(float(critical), rel=1e-10)
    assert (compared.disagreement_train is None) == (name in ("mlp", "normalised", "of_a_tree"))
