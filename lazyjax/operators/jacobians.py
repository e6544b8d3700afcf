"""The Jacobian of a batch as a linear map: J^T c and J u, never its entries.

What is kept between two products is a choice: nothing (the model is evaluated again), the residuals
of one linearization, or the features of the kernel engine, from which both products follow without
differentiating anything.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from lazyjax.derivatives import linearization
from lazyjax.kernels import structured
from lazyjax.kernels.arguments import model_of, split
from lazyjax.kernels.blocks import even, in_blocks
from lazyjax.kernels.costs import operations, rates, results
from lazyjax.kernels.factors import Shape

_ALIVE = 2  # bytes made by a forward pass that its residuals take, at most this many times


class Setting(NamedTuple):
    """What is static about the Jacobian of a batch."""

    wrt: tuple[bool, ...]  # of each leaf of params
    reduce: str
    keep: str  # a row of `KEEPS`
    block: int  # examples that are evaluated at once, where nothing is kept
    precision: str


class Arrays(NamedTuple):
    """The arrays of a model, with one example for its shapes."""

    f: Partial
    params: Any
    outputs: Any
    one: Any  # x, with a batch of one


def batch_function(arrays: Arrays, setting: Setting) -> tuple[list[jax.Array], Callable[..., Any]]:
    """Give the leaves w and `(w, x) -> y (n, C)`, C the outputs that products see."""
    w, rebuild = split(arrays.params, setting.wrt)

    def function(w: list[jax.Array], x: Any) -> jax.Array:
        (y,) = jax.tree.leaves(arrays.f(rebuild(w), x))
        y = y.reshape(y.shape[0], -1)
        y = y if arrays.outputs is None else y[:, arrays.outputs]
        return jnp.sum(y, 1, keepdims=True) if setting.reduce == "sum" else y

    return w, function


class Maps(NamedTuple):
    """The two products with the Jacobian (n, C) x P of one batch."""

    pull: Callable[[jax.Array, Any], Any]  # c (n, C) -> J^T c; with k, c (n,) is for output k alone
    push: Callable[[Any, Any], jax.Array]  # u -> J u (n, C); with k, (n,)


class Keep(NamedTuple):
    """A row of `KEEPS`."""

    prepare: Callable[[Arrays, Any, Setting], Any]  # x -> what is kept
    maps: Callable[[Arrays, Any, Setting], Maps]


# --- through the model -------------------------------------------------------------------------


def _alone(c: jax.Array, k: Any, outputs: int) -> jax.Array:
    """Spread c (n,) to output k of (n, C)."""
    return c[:, None] * jax.nn.one_hot(k, outputs, dtype=c.dtype)[None]


def _of_linear(product: Callable[[Any], jax.Array], w: list[jax.Array]) -> Maps:
    """Give the maps of the linear function v -> J v."""
    like = jax.eval_shape(product, w)
    transposed = jax.linear_transpose(product, w)

    def pull(c: jax.Array, k: Any) -> Any:
        return transposed(c if k is None else _alone(c, k, like.shape[1]))[0]

    def push(u: Any, k: Any) -> jax.Array:
        found = product(u)
        return found if k is None else found[:, k]

    return Maps(pull, push)


def _linearize(arrays: Arrays, x: Any, setting: Setting) -> Any:
    w, function = batch_function(arrays, setting)
    return linearization(lambda w: function(w, x), w)[1]


def _by_residuals(arrays: Arrays, kept: Any, setting: Setting) -> Maps:
    return _of_linear(kept, split(arrays.params, setting.wrt)[0])


def _by_evaluation(arrays: Arrays, x: Any, setting: Setting) -> Maps:
    n = jax.tree.leaves(x)[0].shape[0]
    if setting.block >= n:
        return _by_residuals(arrays, _linearize(arrays, x, setting), setting)
    w, _ = batch_function(arrays, setting)
    cut = jax.tree.map(lambda a: a.reshape(-1, setting.block, *a.shape[1:]), x)

    def maps(x: Any) -> Maps:
        return _of_linear(_linearize(arrays, x, setting), w)

    def pull(c: jax.Array, k: Any) -> Any:
        def step(u: Any, at: Any) -> tuple[Any, None]:
            x, c = at
            return jax.tree.map(jnp.add, u, maps(x).pull(c, k)), None

        zero = jax.tree.map(jnp.zeros_like, w)
        return jax.lax.scan(step, zero, (cut, c.reshape(-1, setting.block, *c.shape[1:])))[0]

    def push(u: Any, k: Any) -> jax.Array:
        found = jax.lax.map(lambda x: maps(x).push(u, k), cut)
        return found.reshape(-1, *found.shape[2:])

    return Maps(pull, push)


# --- through the features of the kernel engine -------------------------------------------------


def _by_factors(s: Shape, outputs: int) -> float:
    """Count the multiply-adds of one product by factors, for an example and its outputs."""
    return s.b * s.s * ((1 if s.tokens else s.p) * s.q + outputs * s.q)


def _order(s: Shape) -> str:
    """Choose what is kept of a part: its Jacobian, or the two factors of it."""
    if s.mixed:
        return "jacobian"
    return "jacobian" if s.jacobian <= min(s.factors, _by_factors(s, s.outputs)) else "gram"


def _plan(arrays: Arrays, setting: Setting) -> tuple[structured.Plan, list[jax.Array]]:
    model = model_of(
        arrays.f,
        arrays.params,
        arrays.one,
        setting.wrt,
        leaf=0,
        outputs=arrays.outputs,
        summed=setting.reduce == "sum",
    )
    if not model.reverse:
        raise ValueError(
            "`f` must have a derivative in reverse mode for products with its kernel, and has forward "
            "mode only (a while loop). Use ntk(f, params, x) and as_operator."
        )
    return structured.plan(model.jaxpr, len(model.w), _order, apart=False), model.w


def _features(arrays: Arrays, x: Any, setting: Setting) -> Any:
    plan, w = _plan(arrays, setting)
    made = results(plan.jaxpr.jaxpr) * (1 + plan.jaxpr.out_avals[0].shape[0])
    n = jax.tree.leaves(x)[0].shape[0]
    at_once = int(rates().working / 4 // max(1.0, structured.ALIVE * made))
    return in_blocks(partial(structured.features, plan, w), x, even(n, max(1, at_once)))


def _pull_part(f: Any, s: Shape, c: jax.Array) -> Any:
    z = jnp.einsum("nkbsq,nk->nbsq", f.d, c)
    if s.tokens:
        ids = jnp.where(f.a >= 0, f.a, s.tokens).reshape(-1)
        return jax.ops.segment_sum(z.reshape(-1, s.q), ids, num_segments=s.tokens), None
    bias = jnp.sum(z, (0, 2)) * s.bias**0.5 if s.bias else None
    return jnp.einsum("nbsp,nbsq->bpq", f.a, z), bias


def _push_part(f: Any, s: Shape, u: Any) -> jax.Array:
    weight, bias = u
    if s.tokens:
        z = jnp.where((f.a >= 0)[..., None], weight[jnp.maximum(f.a, 0)], 0)[:, None]
    else:
        z = jnp.einsum("nbsp,bpq->nbsq", f.a, weight)
        z = z if bias is None else z + bias[None, :, None] * s.bias**0.5
    return jnp.einsum("nkbsq,nbsq->nk", f.d, z)


def _of_features(arrays: Arrays, kept: Any, setting: Setting) -> Maps:
    plan, _ = _plan(arrays, setting)
    shapes = dict(enumerate(plan.shapes))

    def of_output(k: Any) -> Any:
        if k is None:
            return kept
        chosen = partial(jax.lax.dynamic_index_in_dim, index=k, axis=1)
        factors = {i: f._replace(d=chosen(f.d)) for i, f in kept.get("gram", {}).items()}
        return {"gram": factors, "jacobian": jax.tree.map(chosen, kept.get("jacobian", {}))}

    def pull(c: jax.Array, k: Any) -> Any:
        own, c = of_output(k), c if k is None else c[:, None]
        return {
            "gram": {i: _pull_part(f, shapes[i], c) for i, f in own.get("gram", {}).items()},
            "jacobian": {
                i: jnp.einsum("nkp,nk->p", j, c) for i, j in own.get("jacobian", {}).items()
            },
        }

    def push(u: Any, k: Any) -> jax.Array:
        own = of_output(k)
        found = [_push_part(f, shapes[i], u["gram"][i]) for i, f in own.get("gram", {}).items()]
        found += [
            jnp.einsum("nkp,p->nk", j, u["jacobian"][i])
            for i, j in own.get("jacobian", {}).items()
        ]
        total = sum(found[1:], found[0])
        return total if k is None else total[:, 0]

    return Maps(pull, push)


KEEPS = {
    "nothing": Keep(lambda arrays, x, setting: x, _by_evaluation),
    "residuals": Keep(_linearize, _by_residuals),
    "features": Keep(_features, _of_features),
}
"""What is kept of a batch between two products: the batch alone, and its examples are evaluated
again, `block` of them at once; the residuals of one linearization; or the features of the kernel
engine."""


class Cost(NamedTuple):
    """What a way to keep a batch costs, of one example."""

    seconds: float  # of one product there and back, by the rates of the backend
    bytes: float  # that are kept


def cost(arrays: Arrays, setting: Setting) -> dict[str, Cost]:
    """Predict what each row of `KEEPS` costs, for one example."""
    plan, _ = _plan(arrays, setting)
    rate, jaxpr = rates(), plan.jaxpr.jaxpr
    dtype, outputs = plan.jaxpr.out_avals[0].dtype, plan.jaxpr.out_avals[0].shape[0]
    vectors = outputs if setting.reduce == "trace" else 1
    forward, made = operations(jaxpr), results(jaxpr)

    def seconds(multiply_adds: float, read: float) -> float:
        return 2 * multiply_adds / rate.small + read / rate.bytes

    seen = 1 if setting.reduce == "trace" else outputs  # that one product multiplies
    plain = sum(plan.jaxpr.in_avals[i].size for i in plan.plain)
    kept, multiplied = outputs * plain, seen * plain
    for s, order in zip(plan.shapes, plan.orders, strict=True):
        held = order == "jacobian"
        kept += s.jacobian if held else s.factors
        multiplied += seen * s.jacobian / outputs if held else _by_factors(s, seen)
    kept *= dtype.itemsize
    return {
        "nothing": Cost(seconds((1 + 4 * vectors) * forward, 3 * vectors * made), 0),
        "residuals": Cost(seconds(4 * vectors * forward, 2 * vectors * made), _ALIVE * made),
        "features": Cost(seconds(2 * vectors * multiplied, 2 * kept), kept),
    }
