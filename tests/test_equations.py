"""What is known of JAX's equations, and that an equation of another JAX is never read wrongly."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.extend.core import jaxpr_as_fun

from lazyjax.equations import PARAMETERS, equations, known, rescan, settings
from lazyjax.factors.walk import find, run, zeros
from lazyjax.independence.suspects import suspects

W = np.random.default_rng(0).standard_normal((3, 3))
X = np.random.default_rng(1).standard_normal((4, 3))


def conv(w, x):
    return lax.conv_general_dilated(
        x[..., None], w[..., None], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
    )[..., 0]


def scan(w, x):
    return lax.scan(lambda h, _: (jnp.tanh(h @ w), None), x, length=2)[0]


USES = {
    "jit": lambda w, x: jax.jit(jnp.matmul)(x, w),
    "remat2": lambda w, x: jax.checkpoint(jnp.matmul)(x, w),
    "scan": scan,
    "dot_general": lambda w, x: x @ w,
    "conv_general_dilated": lambda w, x: conv(w[:, :1], x),
    "gather": lambda w, x: x @ w[np.array([0, 2, 1])],
    "reshape": lambda w, x: x @ w.reshape(3, 1, 3)[:, 0],
    "transpose": lambda w, x: x @ w.T,
    "squeeze": lambda w, x: x @ w[None].squeeze(0),
    "broadcast_in_dim": lambda w, x: x @ w[None][0],
    "slice": lambda w, x: x[:, :2] @ w[:2],
    "rev": lambda w, x: x @ w[::-1],
    "convert_element_type": lambda w, x: x @ w.astype(jnp.float32).astype(x.dtype),
    "neg": lambda w, x: x @ -w,
    "mul": lambda w, x: x @ (2 * w),
    "div": lambda w, x: x @ (w / 2),
    "add": lambda w, x: x @ (w + 1),
}
"""A model for each primitive on the way of a parameter."""


def traced(f, x=X[:1]):
    return jax.make_jaxpr(f)(W, x)


def of_another_jax(closed, name, change):
    """Give a jaxpr as a JAX would make it that has other parameters for a primitive."""

    def of(jaxpr):
        return jaxpr.replace(eqns=[changed(e) for e in jaxpr.eqns])

    def inside(value):
        if hasattr(value, "jaxpr"):
            return value.replace(jaxpr=of(value.jaxpr))
        return of(value) if hasattr(value, "eqns") else value

    def changed(e):
        params = {k: inside(v) for k, v in e.params.items()}
        return e.replace(params=change(params) if e.primitive.name == name else params)

    return closed.replace(jaxpr=of(closed.jaxpr))


def with_more(params):
    return {**params, "new_in_the_next": 1}


def without_one(params):
    return dict(list(params.items())[1:])


@pytest.mark.parametrize("name", USES)
def test_this_jax_has_the_equations_as_they_are_known(name):
    found = [e for e in equations(traced(USES[name]).jaxpr) if e.primitive.name == name]
    assert found
    assert all(settings(e) is not None for e in found)


@pytest.mark.parametrize("name", USES)
def test_a_leaf_that_meets_an_unknown_equation_is_plain(name):
    closed = of_another_jax(traced(USES[name]), name, with_more)
    with pytest.warns(UserWarning, match=rf"`{name}` of JAX {jax.__version__} .*new_in_the_next"):
        structure = find(closed.jaxpr, 1)
    assert structure.parts == ()
    assert set(structure.plain) == {0}


def test_a_parameter_that_is_missing_is_unknown_too():
    closed = of_another_jax(traced(USES["transpose"]), "transpose", without_one)
    with pytest.warns(UserWarning, match="`transpose` of JAX"):
        assert set(find(closed.jaxpr, 1).plain) == {0}


@pytest.mark.parametrize("name", ["jit", "dot_general", "scan"])
def test_an_unknown_equation_leaves_what_does_not_meet_it_as_it_is(name):
    def f(w, x):
        return USES[name](jnp.eye(3), x) @ w

    closed = of_another_jax(traced(f), name, with_more if name != "dot_general" else dict)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # held by the tests above
        structure = find(closed.jaxpr, 1)
    assert [part.leaf for part in structure.parts] == [0]


@pytest.mark.parametrize(
    ("constants", "carries", "over"), [(0, 1, 0), (1, 1, 1), (2, 3, 2), (1, 0, 2), (0, 2, 1)]
)
def test_what_a_scan_holds_carries_and_runs_over_is_told_by_shapes(constants, carries, over):
    held = [jnp.full((2,), i + 1.0) for i in range(constants)]
    start = [jnp.full((2,), 0.1 * i) for i in range(carries)]
    rows = [jnp.arange(10.0).reshape(5, 2) + i for i in range(over)]

    def f(*values):
        held, start = values[:constants], values[constants : constants + carries]

        def body(carry, xs):
            total = sum(xs, sum(carry, sum(held, jnp.zeros(2))))
            return [c + total for c in carry], [2 * total * x for x in xs]

        return jax.tree.leaves(lax.scan(body, list(start), list(values[constants + carries :]), 5))

    closed = jax.make_jaxpr(f)(*held, *start, *rows)
    (equation,) = (e for e in closed.jaxpr.eqns if e.primitive.name == "scan")
    read = settings(equation)
    assert (read.constants, read.carries) == (constants, carries)
    again, _ = rescan(equation, [*held, *start, *rows], lambda c, v, _: (jaxpr_as_fun(c)(*v), ()))
    for one, other in zip(again, f(*held, *start, *rows), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("change", [with_more, without_one])
def test_a_batch_that_goes_through_an_unknown_loop_is_not_said_to_be_independent(change):
    def f(w, x):
        return lax.scan(
            lambda h, _: (jnp.tanh(h - h.mean(0, keepdims=True)) @ w, None), x, length=2
        )[0]

    two, three = traced(f, X[:2]), traced(f, X[:3])
    assert suspects(two, three, 1)
    changed = [of_another_jax(closed, "scan", change) for closed in (two, three)]
    with pytest.warns(UserWarning, match="`scan` of JAX"):
        assert suspects(*changed, 1) is None


def test_what_is_unknown_is_evaluated_as_it_is():
    closed = traced(lambda w, x: jnp.tanh(x @ w) @ (w + 1))
    structure = find(closed.jaxpr, 1)
    out, _ = run(closed, [W, X[:1]], zeros(closed.jaxpr, set(structure.uses)), uses=structure.uses)
    np.testing.assert_allclose(out[0], jnp.tanh(X[:1] @ W) @ (W + 1), rtol=1e-15)


def test_a_primitive_that_nothing_reads_is_no_matter():
    (equation,) = (e for e in traced(lambda w, x: jnp.tanh(x)).jaxpr.eqns)
    assert equation.primitive.name not in PARAMETERS
    assert known(equation)
