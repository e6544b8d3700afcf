"""What a function reads at the time of the call counts, and what is unchanged compiles once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from kernel_models import normal
from thoroughness import few

from lazyjax import (
    Dataset,
    kappa,
    kernel_store,
    largest_eigenvalue,
    ntk,
    ntk_operator,
    sketch,
    tangent_parameters,
    train,
)
from lazyjax.kernels import kernels

W, X = jnp.asarray(normal(0, 3, 2)), jnp.asarray(normal(1, 5, 3))
Y = jnp.asarray(normal(2, 5, 2))
FACTOR = 1.0


class Net:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, w, x):
        return jnp.tanh(x @ w) * self.scale


def by_attribute():
    net = Net(1.0)
    return net, lambda value: setattr(net, "scale", value)


def by_global():
    def bind(value):
        globals()["FACTOR"] = value

    bind(1.0)
    return lambda w, x: jnp.tanh(x @ w) * FACTOR, bind


def by_array():
    held = np.ones((1, 2))
    return lambda w, x: jnp.tanh(x @ w) * held, lambda value: held.__setitem__(slice(None), value)


def by_method():
    net = Net(1.0)
    return net.__call__, lambda value: setattr(net, "scale", value)


def by_rule():
    """Only the rule of the derivative changes."""
    rate = [1.0]
    turned = jax.custom_vjp(lambda x: x)
    turned.defvjp(lambda x: (x, None), lambda _, g: (rate[0] * g,))
    return lambda w, x: turned(jnp.tanh(x @ w)), lambda value: rate.__setitem__(0, value)


WAYS = {way.__name__: way for way in (by_attribute, by_global, by_array, by_method, by_rule)}
USES = {
    "ntk": lambda f, path: ntk(f, W, X),
    "ntk under jit": lambda f, path: jax.jit(lambda w: ntk(f, w, X))(W),
    "ntk in blocks of memory": lambda f, path: ntk(f, W, X, memory="1MB"),
    "ntk_operator": lambda f, path: ntk_operator(f, W, X) @ jnp.ones(10),
    "sketch": lambda f, path: sketch(jax.random.key(0), f, W, X, dimension=8).features,
    "largest_eigenvalue": lambda f, path: largest_eigenvalue(f, W, X),
    "kappa": lambda f, path: kappa(f, W, X, Y, key=jax.random.key(1)).first,
    "tangent_parameters": lambda f, path: tangent_parameters(f, W, X, Y),
    "kernel_store": lambda f, path: kernel_store(f, W, X, path=path, memory="1GiB")[:],
    "train": lambda f, path: train(f, W, Dataset(X, Y), optax.sgd(0.1), steps=3).loss,
}
FIRST = [
    ("by_attribute", "ntk"),
    ("by_global", "ntk_operator"),
    ("by_array", "ntk in blocks of memory"),
    ("by_method", "tangent_parameters"),
    ("by_rule", "ntk under jit"),
]
# a rule that is not that of a derivative makes different maps of J and J^T
ROWS = [
    (way, use)
    for way in WAYS
    for use in USES
    if way != "by_rule" or use not in ("kappa", "ntk_operator", "largest_eigenvalue")
]


@few(("way", "use"), sorted(ROWS, key=lambda row: row not in FIRST), len(FIRST))
def test_a_function_that_has_changed_is_used_as_it_is(way, use, tmp_path):
    f, change = WAYS[way]()
    before = np.asarray(USES[use](f, tmp_path / "one"))
    change(3.0)
    fresh, change_fresh = WAYS[way]()
    change_fresh(3.0)
    expected = np.asarray(USES[use](fresh, tmp_path / "two"))
    found = np.asarray(USES[use](f, tmp_path / "three"))
    np.testing.assert_array_equal(found, expected)
    assert np.linalg.norm(found - before) > 0.01 * np.linalg.norm(before)
    change(1.0)
    np.testing.assert_array_equal(USES[use](f, tmp_path / "four"), before)


def test_a_checkpoint_of_what_the_function_was_is_of_another_run(tmp_path):
    f, change = by_attribute()
    file = tmp_path / "run.npz"
    run = lambda: train(f, W, Dataset(X, Y), optax.sgd(0.1), steps=3, checkpoint=file)  # noqa: E731 (a function of one line)
    run()
    change(3.0)
    with pytest.raises(ValueError, match="`checkpoint` must be of this very run"):
        run()


def test_a_loss_that_has_changed_is_used_as_it_is():
    rate = [1.0]
    loss = lambda p, y: rate[0] * jnp.square(p - y)  # noqa: E731 (a function of one line)
    run = lambda: train(lambda w, x: x @ w, W, Dataset(X, Y), optax.sgd(0.1), steps=2, loss=loss)  # noqa: E731 (a function of one line)
    before = run().loss
    rate[0] = 2.0
    assert run().loss[0] == pytest.approx(2 * before[0], rel=1e-12)


def test_a_store_of_what_the_function_was_is_of_another_model(tmp_path):
    f, change = by_attribute()
    store = lambda: kernel_store(f, W, X, path=tmp_path / "k", memory="1GiB", verify=False)  # noqa: E731 (a function of one line)
    store()
    change(3.0)
    with pytest.raises(ValueError, match="another `model`"):
        store()


def test_what_is_made_twice_or_goes_back_is_compiled_once():
    f, change = by_attribute()
    ntk(f, W, X)
    size = kernels._cache_size()
    ntk(f, W, X)
    assert kernels._cache_size() == size
    change(3.0)
    ntk(f, W, X)
    assert kernels._cache_size() == size + 1
    change(1.0)
    ntk(f, W, X)
    change(3.0)
    ntk(f, W, X)
    assert kernels._cache_size() == size + 1


def test_a_model_that_changes_and_lets_examples_see_each_other_is_refused():
    coupled = [False]
    f = lambda w, x: x @ w - ((x @ w).mean(0, keepdims=True) if coupled[0] else 0)  # noqa: E731 (a function of one line)
    ntk(f, W, X)
    coupled[0] = True
    with pytest.raises(ValueError, match="see each other"):
        ntk(f, W, X)


def test_a_function_that_holds_a_traced_array_works_under_jit():
    def outer(scale):
        return ntk(lambda w, x: scale * jnp.tanh(x @ w), W, X)

    run = jax.jit(outer)
    np.testing.assert_allclose(run(2.0), 4 * run(1.0), rtol=1e-12)
    np.testing.assert_allclose(jax.vmap(outer)(jnp.arange(1.0, 3.0))[1], run(2.0), rtol=1e-12)
