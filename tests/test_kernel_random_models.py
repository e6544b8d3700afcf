"""The kernel of a model that nobody thought of is that of its dense Jacobian."""

from contextlib import ExitStack
from typing import NamedTuple
from unittest.mock import patch

import jax
import numpy as np
import pytest
from hypothesis import Phase, assume, example, given, seed, settings
from hypothesis import strategies as st
from kernel_reference import (
    ORDERED,
    check_leaves,
    check_symmetric,
    check_whole,
    error,
    jacobians,
    leaf_kernels,
    quickly,
    reduced,
)
from random_models import Layer, Net, build, nets
from thoroughness import few

from lazyjax.costs import RATES, rates
from lazyjax.kernels import METHODS, REDUCTIONS, ntk
from lazyjax.verification import verify

DEFAULT = "structured_derivatives"


class Call(NamedTuple):
    method: str
    reduce: str
    per_leaf: bool
    n1: int
    n2: int | None  # None: without x2
    outputs: str
    batch_size: int | tuple[int, int] | None
    cache: int  # bytes, by which work is cut to slices and tiles


CALLS = st.builds(
    Call,
    method=st.sampled_from([DEFAULT, DEFAULT, *ORDERED, *METHODS, "auto"]),
    reduce=st.sampled_from(REDUCTIONS),
    per_leaf=st.booleans(),
    n1=st.sampled_from([3, 61]),
    n2=st.sampled_from([None, 2]),
    outputs=st.sampled_from(["all", "the last and the first"]),
    batch_size=st.sampled_from([None, 2, (2, 1), 40]),
    cache=st.sampled_from([2**23, 2**11]),
)


CLOSED_CALL = Net(  # its derivative by x has a closed_call, whose jaxpr goes by another name
    (2, 2),
    [
        Layer("recurrence", {"features": None, "reverse": False, "bias": False}, "none", "remat"),
        Layer("within_heads", {}, "none", "jit"),
        Layer("dense_of_the_mean", {"outputs": 1}, "none", "none"),
    ],
    "grad",
)


def built(net, call):
    """Build a model; one that cannot mix its dtypes, or whose numbers leave them, is no case."""
    case = build(net, call.n1, call.n2)
    if net.dtype != "float64":

        def both(case):
            def of(params, x):
                y, pullback = jax.vjp(lambda p: case.f(p, x), params)
                return y, pullback(y)

            found = quickly(of, case.params, case.x1)
            return [np.asarray(a, float) for a in jax.tree.leaves(found)]

        try:
            leaves = both(case)
        except (TypeError, ValueError, RuntimeWarning):
            assume(False)  # the carry of a scan, a convolution, a rule; 1e20 in float16
        assume(all(np.isfinite(a).all() for a in leaves) and any(a.any() for a in leaves[1:]))
        # XLA joins 1e-20 and 1e-20 to 0, otherwise in every program, and small derivatives are lost:
        # such a model has no one output, or no one kernel
        exact = both(build(net._replace(dtype="float64"), call.n1, call.n2))
        for own, expected in zip(leaves, exact, strict=True):
            assume(error(own, expected) <= 0.1 * np.linalg.norm(expected))
    return case


def in_its_rows(call):
    """Put the orders and the tight cache of a call into the tables."""
    rows = {call.method: ORDERED[call.method]} if call.method in ORDERED else {}
    tight = {jax.default_backend(): rates()._replace(cache=call.cache)}
    stack = ExitStack()
    stack.enter_context(patch.dict(METHODS, rows))
    stack.enter_context(patch.dict(RATES, tight))
    return stack


def check(net, call):
    """Hold a kernel of a model against its dense Jacobian, or against what `verify` knows."""
    with jax.numpy_rank_promotion("allow"), jax.debug_key_reuse(False):
        f, params, x1, x2 = built(net, call)
        if net.dtype != "float64" or call.per_leaf:
            with in_its_rows(call):
                verify(f, params, x1, x2, method=call.method, batch_size=call.batch_size)
        if net.dtype != "float64":  # the tolerance that rounding explains is that of `verify`
            return
        both = x1 if x2 is None else np.concatenate([x1, x2])
        (j,) = jacobians(f, params, both)
        chosen = None
        if call.outputs != "all":
            j = [leaf.reshape(len(both), -1, leaf.shape[-1]) for leaf in j]
            chosen = sorted({0, j[0].shape[1] - 1}, reverse=True)
            j = [leaf[:, chosen] for leaf in j]
        j1 = [leaf[: call.n1] for leaf in j]
        j2 = [leaf[call.n1 :] for leaf in j] if call.n2 else j1
        (leaves,) = leaf_kernels([j1], [j2])
        expected = [[reduced(leaf, call.reduce) for leaf in leaves]]
        assume(np.linalg.norm(sum(expected[0])) > 1e-100)  # squares of squares vanish

        def kernel(params, x1, x2):
            return ntk(
                f,
                params,
                x1,
                x2,
                reduce=call.reduce,
                method=call.method,
                per_leaf=call.per_leaf,
                outputs=chosen,
                batch_size=call.batch_size,
            )

        with in_its_rows(call):
            found = quickly(kernel, params, x1, x2)
        if call.per_leaf:
            check_leaves(found, expected)
        else:
            check_whole(found, expected)
        if call.n2 is None and call.reduce == "none":
            check_symmetric(found)


@few("count", [2, 30])
def test_the_kernel_of_a_random_model_is_that_of_its_dense_jacobian(count):
    settings(max_examples=count)(given(nets(), CALLS)(check))()


@settings(phases=[Phase.explicit])
@given(nets(), CALLS)
@example(CLOSED_CALL, Call(DEFAULT, "none", False, 3, None, "all", None, rates().cache))
def test_a_closed_call_is_followed(net, call):
    check(net, call)


@pytest.mark.thorough(long=True)
@pytest.mark.parametrize("number", range(1, 41))
def test_the_kernels_of_a_thousand_random_models_and_more(number):
    jax.clear_caches()  # each program that is kept maps memory, and that has an end
    seed(number)(given(nets(), CALLS)(check))()
