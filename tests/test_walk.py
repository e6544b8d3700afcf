"""The walk finds where each leaf enters, and a model whose products are open is the model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lazyjax.factors.walk import find, run, split_bias, zeros


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


X, W, V, B = normal(0, 4), normal(1, 4, 4), normal(2, 4, 4), normal(3, 4)
TWO = {
    "a product and its bias": (lambda w, b, x: jnp.tanh(x @ w + b), [W, B]),
    "a bias that comes first": (lambda w, b, x: jnp.tanh(b + x @ w), [W, B]),
    "a factor of a bias": (lambda w, b, x: x @ (w / 2) + 0.1 * b, [W, B]),
    "a bias at positions": (lambda w, b, x: (jnp.outer(x, x) @ w + b[None]).sum(0), [W, B]),
    "what is added to each position alone": (
        lambda w, v, x: (jnp.outer(x, x) @ w + v).sum(0),
        [W, V],
    ),
    "two products": (lambda w, v, x: jnp.tanh(x @ w) @ v, [W, V]),
    "a leaf that is not used": (lambda w, v, x: x @ w, [W, V]),
    "a leaf that is used for nothing": (lambda w, v, x: (x @ w, x @ v)[0], [W, V]),
    "tied": (lambda w, v, x: jnp.tanh(x @ w) @ w.T @ v, [W, V]),
    "a bias of two products": (lambda w, b, x: jnp.tanh(x @ w + b) @ w + b, [W, B]),
    "a scale": (lambda w, s, x: (x @ w) * s, [W, B]),
    "a sum that something else reads": (lambda w, b, x: (lambda z: z * (z + b))(x @ w), [W, B]),
    "halves of a leaf": (lambda w, v, x: jnp.tanh(x[:2] @ w[:2]) * (x[2:] @ w[2:]) @ v, [W, V]),
    "halves that overlap": (lambda w, v, x: (x[:3] @ w[:3]) * (x[1:] @ w[1:]) @ v, [W, V]),
    "in a jit": (lambda w, v, x: jax.jit(lambda h: jnp.tanh(h @ w))(x) @ v, [W, V]),
    "in a scan": (
        lambda w, v, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, w)[0] @ v,
        [normal(4, 3, 4, 4), V],
    ),
    "the carry of a scan": (
        lambda w, v, x: lax.scan(lambda h, x: (h * x, None), w, x)[0][0] @ v,
        [W, V],
    ),
}
FOUND = {  # leaves of parts with (straight, swapped, biases), plain leaves, leaves without use
    "a product and its bias": ({0: (1, 0, 1)}, {}, ()),
    "a bias that comes first": ({0: (1, 0, 1)}, {}, ()),
    "a factor of a bias": ({0: (1, 0, 1)}, {}, ()),
    "a bias at positions": ({0: (1, 0, 1)}, {}, ()),
    "what is added to each position alone": ({0: (1, 0, 0)}, {1: "add"}, ()),
    "two products": ({0: (1, 0, 0), 1: (1, 0, 0)}, {}, ()),
    "a leaf that is not used": ({0: (1, 0, 0)}, {}, (1,)),
    "a leaf that is used for nothing": ({0: (1, 0, 0)}, {}, (1,)),
    "tied": ({0: (1, 1, 0), 1: (1, 0, 0)}, {}, ()),
    "a bias of two products": ({0: (2, 0, 0)}, {1: "add"}, ()),
    "a scale": ({0: (1, 0, 0)}, {1: "mul"}, ()),
    "a sum that something else reads": ({0: (1, 0, 0)}, {1: "add"}, ()),
    "halves of a leaf": ({0: (2, 0, 0), 1: (1, 0, 0)}, {}, ()),
    "halves that overlap": ({1: (1, 0, 0)}, {0: "products that do not agree"}, ()),
    "in a jit": ({0: (1, 0, 0), 1: (1, 0, 0)}, {}, ()),
    "in a scan": ({0: (1, 0, 0), 1: (1, 0, 0)}, {}, ()),
    "the carry of a scan": ({1: (1, 0, 0)}, {0: "the carry of a scan"}, ()),
}


def traced(name):
    f, leaves = TWO[name]
    return jax.make_jaxpr(f)(*leaves, X), leaves


@pytest.mark.parametrize("name", TWO)
def test_each_leaf_is_found_where_it_enters(name):
    closed, leaves = traced(name)
    structure = find(closed.jaxpr, len(leaves))
    found = {}
    for part in structure.parts:
        straight, swapped, biases = found.get(part.leaf, (0, 0, 0))
        found[part.leaf] = (
            straight + len(part.straight),
            swapped + len(part.swapped),
            biases + (part.bias is not None),
        )
    parts, plain, unused = FOUND[name]
    assert found == parts
    assert structure.plain == plain
    assert structure.unused == unused


@pytest.mark.parametrize("name", TWO)
def test_a_model_with_open_products_is_the_model(name):
    closed, leaves = traced(name)
    uses = find(closed.jaxpr, len(leaves)).uses
    added = zeros(closed.jaxpr, set(uses))
    outputs, kept = run(closed, [*leaves, X], added, uses=uses)
    assert set(kept) == set(added) == set(uses)
    for found, expected in zip(
        outputs, jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *leaves, X), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", TWO)
def test_the_derivative_by_a_zero_is_that_by_what_is_added_to_the_product(name):
    closed, leaves = traced(name)
    uses = find(closed.jaxpr, len(leaves)).uses
    added = zeros(closed.jaxpr, set(uses))

    def model(added):
        return run(closed, [*leaves, X], added, uses=uses)[0][0]

    y, pullback = jax.vjp(model, added)
    (cotangents,) = pullback(jnp.ones_like(y))
    step = 1e-5
    for place, zero in added.items():
        direction = normal(5, *zero.shape)
        moved = [model(added | {place: sign * step * direction}) for sign in (1, -1)]
        expected = float(jnp.sum(moved[0] - moved[1])) / (2 * step)
        np.testing.assert_allclose(
            jnp.vdot(cotangents[place], direction), expected, rtol=1e-6, atol=1e-8
        )


def test_the_factor_of_a_bias_is_kept_beside_that_of_its_product():
    closed, leaves = traced("a factor of a bias")
    (part,) = find(closed.jaxpr, len(leaves)).parts
    assert part.bias.leaf == 1
    assert part.bias.factor == pytest.approx(0.1)
    product, bias = split_bias(part)
    assert (product.leaf, product.bias) == (0, None)
    assert (bias.leaf, bias.bias) == (None, part.bias)
