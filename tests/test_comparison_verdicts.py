"""One call, one word: cases of which it is known whether they are lazy."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lazyjax.comparison import Thresholds, compare, verdicts
from lazyjax.data import make_dataset
from lazyjax.kernels import ntk
from lazyjax.models import Sinusoidal, deep_mlp, from_linen, shallow_mlp
from lazyjax.spectrum import critical_learning_rate
from lazyjax.tangent import center, linearize, scale
from lazyjax.training import scale_loss, train
from lazyjax.types import Dataset

DATA = make_dataset(jax.random.key(0), n=12)


def network(module, seed=1):
    return from_linen(module, jax.random.key(seed), DATA.x)


def verdict(f, params, optimizer=None, steps=2000, data=DATA, **options):
    rate = 0.5 * critical_learning_rate(ntk(f, params, data.x))
    return verdicts(compare(f, params, data, optimizer or optax.sgd(rate), steps=steps, **options))[
        0
    ]


def test_a_wide_network_is_lazy_and_a_thin_or_a_deep_narrow_one_is_not():
    assert verdict(*network(shallow_mlp(2000))).word == "lazy"
    thin = verdict(*network(shallow_mlp(5)), steps=20_000)
    assert thin.word == "in between"
    assert 0 < thin.until < 20_000
    assert verdict(*network(deep_mlp(10)), optax.sgd(0.1), steps=3000).word == "not lazy"


@pytest.mark.parametrize(("alpha", "word"), [(1.0, "not lazy"), (1e4, "lazy")])
def test_a_large_alpha_makes_a_deep_narrow_network_lazy(alpha, word):
    f, params = network(deep_mlp(8, activation="tanh"))
    model = scale(center(f, params), alpha)
    loss = scale_loss(optax.losses.squared_error, alpha)
    assert verdict(model, params, optax.sgd(0.1), steps=1000, loss=loss).word == word


@pytest.mark.parametrize("module", [Sinusoidal(8), nn.Dense(1)])
def test_a_linear_model_is_its_tangent_model(module):
    found = verdict(*network(module))
    assert found.word == "lazy"
    assert found.gap < 1e-10
    assert found.kernel_change < 1e-12
    assert found.until is None


def test_rounding_is_no_gap_where_nothing_is_learned_yet():
    compared = compare(*network(shallow_mlp(30)), DATA, optax.sgd(0.01), steps=20)
    rounded = compared.gap_train + 1e-17 * np.abs(compared.network.train).max()
    assert verdicts(replace(compared, gap_train=rounded))[0].until is None
    off = compared.gap_train + 1e-3
    assert verdicts(replace(compared, gap_train=off))[0].until == 0


def test_a_tangent_model_is_its_own_tangent_model():
    f, params = network(shallow_mlp(5))
    assert verdict(linearize(f, params), params).gap < 1e-10


def test_an_anchor_elsewhere_is_another_model():
    f, params = network(shallow_mlp(30))
    _, anchor = network(shallow_mlp(30), seed=2)
    found = verdict(f, params, steps=50, anchor=anchor)
    assert found.word != "lazy"
    assert found.until == 0


def test_what_diverged_and_what_did_not_move_is_said_so():
    f, params = network(shallow_mlp(50))
    with pytest.warns(UserWarning, match="diverged"):
        assert verdict(f, params, optax.sgd(1e3), steps=200).word == "diverged"
    frozen = verdict(f, params, optax.set_to_zero(), steps=5)
    assert frozen.word == "nothing learned"
    assert "did not change" in str(frozen)


def test_a_classifier_on_tokens_is_compared_by_its_loss():
    tokens = jax.random.randint(jax.random.key(0), (10, 4), 0, 7)
    labels = tokens[:, 0] % 3
    f = lambda p, x: jnp.tanh(p["e"][x].mean(1) @ p["a"]) @ p["b"]  # noqa: E731 (one line)
    shapes = {"e": (7, 5), "a": (5, 40), "b": (40, 3)}
    params = {
        name: jax.random.normal(jax.random.key(i), shape) / shape[0] ** 0.5
        for i, (name, shape) in enumerate(shapes.items())
    }
    loss = optax.losses.softmax_cross_entropy_with_integer_labels
    data = Dataset(tokens, labels)
    compared = compare(f, params, data, optax.adam(0.01), steps=60, loss=loss)
    own = train(f, params, data, optax.adam(0.01), steps=60, loss=loss)
    np.testing.assert_allclose(compared.network.loss[0, -1], own.loss[-1], rtol=1e-9)
    assert compared.closed is None
    assert compared.network.train.shape[2:] == (10, 3)
    assert verdicts(compared)[0].word in ("lazy", "in between", "not lazy")


def test_the_word_follows_the_thresholds():
    f, params = network(shallow_mlp(100))
    compared = compare(f, params, DATA, optax.sgd(0.01), steps=300)
    (own,) = verdicts(compared)
    largest = max(own.gap, own.kernel_change)
    for thresholds, word in (
        (Thresholds(1.1 * largest, 2 * largest), "lazy"),
        (Thresholds(0.5 * largest, 2 * largest), "in between"),
        (Thresholds(0.5 * largest, 0.9 * largest), "not lazy"),
    ):
        assert verdicts(compared, thresholds)[0].word == word


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "`steps` must be at least 1"),
        ({"test_x": jnp.ones((3, 2))}, "`test_x` must hold examples like those of `data.x`"),
        ({"test_x": {"x": jnp.ones((3, 1))}}, "`test_x` must hold examples like those of `data.x`"),
        ({"test_x": jnp.ones(())}, "`test_x` must have the batch on axis 0"),
        ({"anchor": jnp.ones(3)}, "`anchor` must have the structure of `params`"),
        ({"batch_size": 3}, "`key` must be given for mini-batches"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    f, params = network(shallow_mlp(5))
    with pytest.raises(ValueError, match=message):
        compare(f, params, DATA, optax.sgd(0.1), **({"steps": 3} | change))


def test_thresholds_that_do_not_rise_are_refused():
    f, params = network(shallow_mlp(5))
    compared = compare(f, params, DATA, optax.sgd(0.1), steps=3)
    with pytest.raises(ValueError, match="`thresholds` must rise from above 0"):
        verdicts(compared, Thresholds(0.5, 0.1))
