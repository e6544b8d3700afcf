"""One call, one word: cases of which it is known whether they are lazy."""

import functools
import re
import warnings
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparison_example import example

from lazyjax.comparison import Thresholds, compare, verdicts
from lazyjax.data import make_dataset
from lazyjax.kernels import ntk
from lazyjax.models import Sinusoidal, deep_mlp, from_linen, shallow_mlp
from lazyjax.spectrum import critical_learning_rate
from lazyjax.tangent import linearize
from lazyjax.training import train
from lazyjax.types import Dataset


@functools.cache
def data():
    return make_dataset(jax.random.key(0), n=12)


def network(module, seed=1):
    return from_linen(module, jax.random.key(seed), data().x)


def verdict(f, params, optimizer=None, steps=2000, **options):
    rate = 0.5 * critical_learning_rate(ntk(f, params, data().x))
    compared = compare(f, params, data(), optimizer or optax.sgd(rate), steps=steps, **options)
    return verdicts(compared)[0]


def practical(width):
    """Section 9 of the practical, less than half of its steps."""
    return verdict(*network(shallow_mlp(width)), optax.sgd(0.002), steps=20_000)


def scaled(alpha):
    """Sections 11 to 14."""
    return verdict(*network(deep_mlp(8)), optax.sgd(0.01), steps=10_000, alpha=alpha)


def spoiled(bad_steps):
    """Section 10: two steps of rate 1 before training."""
    f, params = network(shallow_mlp(100))
    if bad_steps:
        params = train(f, params, data(), optax.sgd(1.0), steps=bad_steps).final
    return verdict(f, params, optax.sgd(0.001), steps=1000)


def small_outputs():
    """As under muP: outputs are small at first, and steps large in units of them."""
    return verdict(*network(shallow_mlp(300)), steps=500, alpha=0.03)


def diverging():
    with pytest.warns(UserWarning, match="diverged"):
        return verdict(*network(shallow_mlp(50)), optax.sgd(1e3), steps=200)


KNOWN = {
    "a linear model": (lambda: verdict(*network(nn.Dense(1, param_dtype=float))), "lazy"),
    "width 5": (lambda: practical(5), ("in between", "not lazy")),
    "width 1000": (lambda: practical(1000), "lazy"),
    "alpha 1": (lambda: scaled(1.0), "not lazy"),
    "alpha 1000": (lambda: scaled(1000.0), "lazy"),
    "before a bad init": (lambda: spoiled(0), "lazy"),
    "after a bad init": (lambda: spoiled(2), "not lazy"),
    "deep and narrow": (
        lambda: verdict(*network(deep_mlp(10)), optax.sgd(0.1), steps=10_000),
        "not lazy",
    ),
    "LinSin": (lambda: verdict(*network(Sinusoidal(8))), "lazy"),
    "muP-like large steps": (small_outputs, "not lazy"),
    "a diverging run": (diverging, "diverged"),
    "a frozen network": (
        lambda: verdict(*network(shallow_mlp(50)), optax.set_to_zero(), steps=200),
        "nothing learned",
    ),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", KNOWN)
def test_what_is_known_of_a_case_is_what_the_verdict_says(name):
    made, words = KNOWN[name]
    found = made()
    assert found.word in (words if isinstance(words, tuple) else (words,)), str(found)
    assert bool(found.advice) == (found.word in ("in between", "not lazy"))
    if name in ("LinSin", "a linear model"):
        assert found.gap == 0
        assert found.kernel_change < 1e-12
        assert found.until is None
    if found.word == "nothing learned":
        assert "did not change" in str(found)


@pytest.mark.thorough
def test_the_advice_holds_where_it_is_tried():
    thin = practical(10)
    assert thin.word != "lazy"
    factor = float(re.search(r"about ([\d.,]+) times as wide", str(thin))[1].replace(",", ""))
    assert practical(round(40 * factor)).word == "lazy"  # the limit is that of large widths
    rich = scaled(1.0)
    alpha = float(re.search(r"alpha of ([\d.,]+) ", str(rich))[1].replace(",", ""))
    assert scaled(10 * alpha).word == "lazy"  # and of large alpha


@pytest.mark.thorough
def test_a_tangent_model_that_still_learns_and_a_large_rate_are_warned_of():
    f, params = network(deep_mlp(8, activation="tanh"))
    critical = float(critical_learning_rate(ntk(f, params, data().x)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it diverges in the end, which training says too
        found = verdict(f, params, optax.sgd(1.2 * critical), steps=20)
    assert any("times the critical one" in warning for warning in found.warnings)
    assert any("smaller learning rate" in advice for advice in found.advice)


@pytest.mark.thorough
def test_rounding_is_no_gap_where_nothing_is_learned_yet():
    compared = example()
    rounded = compared.gap_train + 1e-17 * np.abs(compared.network.train).max()
    assert verdicts(replace(compared, gap_train=rounded))[0].until is None
    off = compared.gap_train + 1e-3
    assert verdicts(replace(compared, gap_train=off))[0].until == 0


@pytest.mark.thorough
def test_a_tangent_model_is_its_own_tangent_model():
    f, params = network(shallow_mlp(5))
    assert verdict(linearize(f, params), params).gap < 1e-10


@pytest.mark.thorough
def test_an_anchor_elsewhere_is_another_model():
    f, params = network(shallow_mlp(30))
    _, anchor = network(shallow_mlp(30), seed=2)
    found = verdict(f, params, steps=50, anchor=anchor)
    assert found.word != "lazy"
    assert found.until == 0


@pytest.mark.thorough
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


def test_runs_that_diverge_or_learn_nothing_have_words_of_their_own():
    compared = example()
    (own,) = verdicts(
        replace(compared, tangent=replace(compared.tangent, diverged_at=np.array([7])))
    )
    assert own.word == "diverged"
    assert own.warnings == ("the tangent model diverged at step 7.",)
    still = np.repeat(compared.network.train[:, :1], len(compared.steps), axis=1)
    (own,) = verdicts(replace(compared, network=replace(compared.network, train=still)))
    assert own.word == "nothing learned"
    assert "did not change" in str(own)


def test_a_rate_above_the_critical_one_is_warned_of():
    compared = example()
    above = replace(compared, learning_rate=1.2 * compared.critical_learning_rate)
    (own,) = verdicts(above, Thresholds(1e-9, 1e-8))
    assert any("1.2 times the critical one" in warning for warning in own.warnings)
    assert "smaller learning rate" in own.advice[0]


def test_a_tangent_model_that_still_learns_where_the_network_does_not_is_warned_of():
    compared = example()
    falling = np.exp(-compared.curve_steps / 300)[None]
    still = np.ones_like(falling)

    def said(network_loss, tangent_loss):
        own = replace(
            compared,
            network=replace(compared.network, loss=network_loss),
            tangent=replace(compared.tangent, loss=tangent_loss),
        )
        return any("has not converged" in warning for warning in verdicts(own)[0].warnings)

    assert said(still, falling)
    assert not said(falling, falling)
    assert not said(falling, still)
    assert not said(still, still)


def test_the_word_follows_the_thresholds():
    compared = example()
    (own,) = verdicts(compared)
    largest = max(own.gap, own.kernel_change)
    for thresholds, word in (
        (Thresholds(1.1 * largest, 2 * largest), "lazy"),
        (Thresholds(0.5 * largest, 2 * largest), "in between"),
        (Thresholds(0.5 * largest, 0.9 * largest), "not lazy"),
    ):
        assert verdicts(compared, thresholds)[0].word == word


def test_thresholds_that_do_not_rise_are_refused():
    compared = example()
    with pytest.raises(ValueError, match="`thresholds` must rise from above 0"):
        verdicts(compared, Thresholds(0.5, 0.1))
    with pytest.raises(TypeError, match="`thresholds` must be two numbers"):
        verdicts(compared, 0.1)
