import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_models import filled

from lazyjax.metrics import pattern_change
from lazyjax.models import deep_mlp, from_linen, preactivations
from lazyjax.patterns import relu_inputs
from lazyjax.tangent import center, linearize, scale

X = jnp.asarray(np.random.default_rng(0).standard_normal((6, 2)))
A = jnp.asarray(np.linspace(-1, 1, 6).reshape(2, 3))
B = jnp.asarray(np.linspace(1, -1, 9).reshape(3, 3))


def two_layers(w, x):
    return jnp.maximum(0.0, jax.nn.relu(x @ w["a"]) @ w["b"])


def test_the_inputs_of_an_mlp_are_its_preactivations():
    module = deep_mlp(4)
    shapes = jax.eval_shape(module.init, jax.random.key(1), X)
    f, params = from_linen(module, None, X, variables=filled(shapes))
    g, h = relu_inputs(f, params, X), preactivations(module)
    both = jax.jit(lambda p: (g(p, X), h(p, X)))(params)
    for found, wanted in zip(*both, strict=True):
        np.testing.assert_array_equal(found, wanted)
    moved = jax.tree.map(lambda w: np.asarray(w) + 0.3, params)
    changed = pattern_change(g, moved, params, X)
    assert 0 < changed == pattern_change(h, moved, params, X)


@pytest.mark.parametrize("form", ["plain", "jit", "remat", "vmap"])
def test_they_are_found_wherever_a_call_may_be_inlined(form):
    f = {
        "plain": two_layers,
        "jit": lambda w, x: jax.jit(two_layers)(w, x) * 2,
        "remat": jax.checkpoint(two_layers),
        "vmap": lambda w, x: jax.vmap(lambda x: two_layers(w, x))(x),
    }[form]
    w = {"a": A, "b": B}
    first, second = relu_inputs(f, w, X)(w, X)
    np.testing.assert_allclose(first, X @ A, rtol=1e-15)
    np.testing.assert_allclose(second, jnp.maximum(X @ A, 0) @ B, rtol=1e-14)


def test_a_relu_of_the_inputs_alone_is_none():
    assert relu_inputs(lambda w, x: jax.nn.relu(x) @ w, A, X) is None
    assert relu_inputs(lambda w, x: jnp.maximum(x @ w, 1.0), A, X) is None
    assert relu_inputs(lambda w, x: jnp.tanh(x @ w), A, X) is None


def test_those_of_an_anchor_do_not_move():
    w = {"a": A, "b": B}
    f = scale(center(two_layers, w), 3.0)
    found = relu_inputs(f, w, X)(w, X)
    assert [a.shape for a in found] == [(6, 3), (6, 3)]
    assert relu_inputs(linearize(two_layers, w), w, X) is None


def test_what_is_in_a_loop_or_a_branch_is_not_looked_into():
    def looped(w, x):
        return jax.lax.scan(lambda h, _: (jax.nn.relu(h @ B * w), None), x @ A, length=2)[0]

    def branched(w, x):
        return jax.lax.cond(x[0, 0] > 0, lambda: jax.nn.relu(x @ w), lambda: x @ w)

    assert relu_inputs(looped, jnp.ones(()), X) is None
    assert relu_inputs(branched, A, X) is None
    outside = relu_inputs(lambda w, x: jax.nn.relu(x @ w) + looped(1.0, x), A, X)
    np.testing.assert_allclose(outside(A, X)[0], X @ A, rtol=1e-15)


@pytest.mark.parametrize(("activation", "shapes"), [(nn.gelu, None), (nn.relu, [(6, 4)])])
def test_the_variance_of_a_norm_is_no_relu(activation, shapes):
    layers = [nn.Dense(4, param_dtype=float), nn.LayerNorm(param_dtype=float), activation]
    f, params = from_linen(nn.Sequential(layers), jax.random.key(3), X)
    found = relu_inputs(f, params, X)
    assert (None if found is None else [a.shape for a in found(params, X)]) == shapes
