"""The factors of a rule give the gradient by the leaf: a sum of outer products over positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import Literal
from kernel_reference import quickly

from lazyjax.equations import evaluate, known
from lazyjax.factors.rules import RULES
from lazyjax.factors.views import arrange, of_leaf


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def use_of(function, w, x):
    """Give the equation of a function of one, where w enters it, and its use."""
    jaxpr = jax.make_jaxpr(function)(w, x).jaxpr
    equation = next(e for e in jaxpr.eqns if e.primitive.name in RULES)
    operand = next(i for i, v in enumerate(equation.invars) if v is jaxpr.invars[0])
    assert known(equation)
    return equation, RULES[equation.primitive.name].use(equation, operand, of_leaf(0, w.shape))


def outer(use, value, cotangent):
    """Give J (b, p, q) of one cotangent, from the two factors."""
    prepared = use.prepare(value)
    if use.tokens:
        prepared = jax.nn.one_hot(prepared, use.tokens, dtype=cotangent.dtype)
    return jnp.einsum("bsp,bsq->bpq", arrange(prepared, use.a), arrange(cotangent, use.d))


def convolution(**settings):
    settings = {"window_strides": (1, 1), "padding": "SAME"} | settings
    settings = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")} | settings
    return lambda w, x: lax.conv_general_dilated(x, w, **settings)


W, X = normal(0, 4, 3), normal(1, 2, 5, 4)
IMAGES = normal(2, 1, 5, 6, 4)
CASES = {
    "rows by a matrix": (lambda w, x: x @ w, W, X),
    "a matrix by rows": (lambda w, x: lax.dot(w, x), normal(3, 3, 4), normal(1, 4, 5)),
    "heads": (lambda w, x: jnp.einsum("nsd,dhe->nshe", x, w), normal(3, 4, 2, 3), X),
    "heads first": (lambda w, x: jnp.einsum("hed,nsd->nshe", w, x), normal(3, 2, 3, 4), X),
    "a shared axis": (lambda w, x: jnp.einsum("nsh,hq->nshq", x, w), normal(4, 4, 3), X),
    "two axes contracted": (lambda w, x: jnp.einsum("nsd,sdq->nq", x, w), normal(5, 5, 4, 3), X),
    "3 x 3": (convolution(), normal(6, 3, 3, 4, 2), IMAGES),
    "strides": (convolution(window_strides=(2, 1), padding="VALID"), normal(7, 3, 2, 4, 2), IMAGES),
    "dilated": (
        convolution(rhs_dilation=(2, 1), lhs_dilation=(1, 2), padding=((1, 1), (0, 2))),
        normal(8, 2, 3, 4, 2),
        IMAGES,
    ),
    "uneven padding": (convolution(padding=((2, 0), (0, 1))), normal(9, 3, 2, 4, 2), IMAGES),
    "groups": (convolution(feature_group_count=2), normal(10, 3, 3, 2, 6), IMAGES),
    "depthwise": (convolution(feature_group_count=4), normal(11, 3, 3, 1, 8), IMAGES),
    "rows by index": (lambda w, x: w[x], normal(12, 7, 3), jnp.array([[0, 6, 6], [2, 0, 1]])),
    "columns by index": (lambda w, x: w[:, x], normal(13, 3, 7), jnp.array([0, 6, 6, 2])),
}


def at_the_product(function, w, x):
    """Give the output of the product itself, and the values of its operands."""
    closed = jax.make_jaxpr(function)(w, x)
    jaxpr = closed.jaxpr
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, w, x), strict=True))

    def read(v):
        return v.val if isinstance(v, Literal) else values[v]

    for equation in jaxpr.eqns:
        out = evaluate(jaxpr, equation, read)
        if equation.primitive.name in RULES:
            return out[0], [read(v) for v in equation.invars]
        values |= dict(zip(equation.outvars, out, strict=True))
    raise AssertionError


@pytest.mark.parametrize("name", CASES)
def test_the_outer_products_are_the_gradient(name):
    function, w, x = CASES[name]
    _, use = use_of(function, w, x)
    value = at_the_product(function, w, x)[1][use.kept]
    y = jax.eval_shape(lambda w: at_the_product(function, w, x)[0], w)
    cotangents = [normal(seed, *y.shape) for seed in (20, 21)]

    def both(value, w, cotangents):
        _, pullback = jax.vjp(lambda w: at_the_product(function, w, x)[0], w)
        return [outer(use, value, c) for c in cotangents], [pullback(c)[0] for c in cotangents]

    found, expected = quickly(both, value, w, cotangents)
    for one, other in zip(found, expected, strict=True):  # the same entries, in another order
        assert one.size == other.size
        np.testing.assert_allclose(np.sort(one.ravel()), np.sort(other.ravel()), atol=1e-12)
    # and the same order for every cotangent
    np.testing.assert_allclose(np.vdot(*found), np.vdot(*expected), rtol=1e-10)


NONE = {
    "the filters as the input": (lambda w, x: convolution()(x, w), IMAGES, normal(6, 3, 3, 4, 2)),
    "groups of the batch": (
        convolution(batch_group_count=2),
        normal(14, 3, 3, 4, 4),
        normal(15, 2, 5, 6, 4),
    ),
    "two indices": (lambda w, x: w[x, x], normal(16, 4, 4), jnp.array([0, 1])),
}


@pytest.mark.parametrize("name", NONE)
def test_what_a_rule_does_not_cover_has_no_use(name):
    function, w, x = NONE[name]
    assert use_of(function, w, x)[1] is None
