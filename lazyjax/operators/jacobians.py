"""The Jacobian of a batch as a linear map: J^T c and J u, never its entries.

What is kept between two products is a choice: nothing (the model is evaluated again), the residuals
of one linearization, or the factors of the Jacobian, from which both products follow without
differentiating anything.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lazyjax import factors
from lazyjax.blocks import in_close_blocks
from lazyjax.derivatives import linearization
from lazyjax.factors import FACTORS, JACOBIAN, Model, Plan, Shape, Treatment
from lazyjax.kernels import Request, jobs
from lazyjax.leaves import split
from lazyjax.meshes import zeros
from lazyjax.types import PyTree
from lazyjax.widening import widened


class Setting(NamedTuple):
    """How products with the Jacobian of a batch are computed."""

    keep: str  # a row of `KEEPS`
    block: int  # examples that are evaluated at once, where nothing is kept
    chunk: int  # for the trace, outputs whose products are taken at once; otherwise 0


def batch_function(request: Request) -> tuple[list[jax.Array], Callable[..., Any]]:
    """Give the leaves w and `(w, x) -> y (n, C)`, C the outputs that products see."""
    w, rebuild = split(request.params, request.options.wrt)

    def function(w: list[jax.Array], x: PyTree) -> jax.Array:
        (y,) = jax.tree.leaves(widened(request.f(rebuild(w), x)))
        y = y.reshape(y.shape[0], -1)
        y = y if request.outputs is None else y[:, request.outputs]
        return jnp.sum(y, 1, keepdims=True) if request.options.reduce == "sum" else y

    return w, function


class Maps(NamedTuple):
    """The two products with the Jacobian (n, C) x P of one batch, for vectors v at once.

    For the trace each goes with outputs `start`, `start + 1`, .., `chunk` of them: c (v, n) is
    taken for each of these outputs alone, u has them on axis 1, and J u is summed over them.
    """

    pull: Callable[[jax.Array, Any], Any]  # c (v, n, C) -> J^T c (v, ..)
    push: Callable[[Any, Any], jax.Array]  # u (v, ..) -> J u (v, n, C)


class Keep(NamedTuple):
    """A row of `KEEPS`; the examples of the request count for nothing but their shapes."""

    prepare: Callable[[Request, Any], Any]  # x -> what is kept
    maps: Callable[[Request, Any, Setting], Maps]


# --- through the model -------------------------------------------------------------------------


def _of_linear(product: Callable[[Any], jax.Array], w: list[jax.Array], chunk: int) -> Maps:
    """Give the maps of the linear function v -> J v."""
    outputs = jax.eval_shape(product, w).shape[1]
    transposed = jax.linear_transpose(product, w)

    def pull(c: jax.Array, start: Any) -> Any:
        def one(c: jax.Array) -> Any:
            return transposed(c)[0]

        if not chunk:
            return jax.vmap(one)(c)
        directions = jax.nn.one_hot(start + jnp.arange(chunk), outputs, dtype=c.dtype)
        return jax.vmap(jax.vmap(one))(c[:, None, :, None] * directions[None, :, None])

    def push(u: PyTree, start: Any) -> jax.Array:
        if not chunk:
            return jax.vmap(product)(u)
        pushed = jax.vmap(jax.vmap(product))(u)  # (v, chunk, n, C)
        directions = jax.nn.one_hot(start + jnp.arange(chunk), outputs, dtype=pushed.dtype)
        return jnp.einsum("vjnc,jc->vn", pushed, directions)

    return Maps(pull, push)


def _linearize(request: Request, x: PyTree) -> Any:
    w, function = batch_function(request)
    return linearization(lambda w: function(w, x), w)[1]


def _by_residuals(request: Request, kept: PyTree, setting: Setting) -> Maps:
    return _of_linear(kept, split(request.params, request.options.wrt)[0], setting.chunk)


def by_evaluation(
    function: Callable[[list[jax.Array], Any], jax.Array],
    w: list[jax.Array],
    x: PyTree,
    *,
    block: int,
    chunk: int = 0,
) -> Maps:
    """Give the maps of `(w, x) -> y (n, C)`, nothing kept, so many examples evaluated at once."""

    def maps(x: PyTree) -> Maps:
        return _of_linear(linearization(lambda w: function(w, x), w)[1], w, chunk)

    n = jax.tree.leaves(x)[0].shape[0]
    if block >= n:
        return maps(x)
    cut = jax.tree.map(lambda a: a.reshape(-1, block, *a.shape[1:]), x)

    def pull(c: jax.Array, start: Any) -> Any:
        def step(u: PyTree, at: Any) -> tuple[Any, None]:
            x, c = at
            return jax.tree.map(jnp.add, u, maps(x).pull(c, start)), None

        blocks = jnp.moveaxis(c.reshape(len(c), -1, block, *c.shape[2:]), 1, 0)
        first = jax.tree.map(lambda a: a[0], (cut, blocks))
        zero = jax.tree.map(
            lambda a: zeros(a.shape, a),
            jax.eval_shape(lambda at: maps(at[0]).pull(at[1], start), first),
        )
        return jax.lax.scan(step, zero, (cut, blocks))[0]

    def push(u: PyTree, start: Any) -> jax.Array:
        pushed = jax.lax.map(lambda x: maps(x).push(u, start), cut)  # (blocks, v, block, ..)
        pushed = jnp.moveaxis(pushed, 0, 1)
        return pushed.reshape(len(pushed), n, *pushed.shape[3:])

    return Maps(pull, push)


def _by_evaluation(request: Request, x: PyTree, setting: Setting) -> Maps:
    w, function = batch_function(request)
    return by_evaluation(function, w, x, block=setting.block, chunk=setting.chunk)


# --- through the factors of the Jacobian --------------------------------------------------------


def _treatment(s: Shape) -> Treatment:
    """Choose what is kept of a part: its Jacobian, or the two factors of it."""
    multiplied = s.b * s.s * s.q * ((1 if s.tokens else s.p) + s.outputs)
    return JACOBIAN if s.mixed or s.jacobian <= min(s.factors, multiplied) else FACTORS


def model_with(request: Request) -> Model:
    """Give the model on one example; refuse one without reverse mode."""
    (job,) = jobs(request)
    return factors.require_reverse(job.model, "products with its kernel")


def _plan(request: Request) -> tuple[Plan, list[jax.Array]]:
    model = model_with(request)
    return factors.plan(model.jaxpr, len(model.w), _treatment, apart=False), model.w


def _features(request: Request, x: PyTree) -> Any:
    plan, w = _plan(request)
    return in_close_blocks(partial(factors.features, plan, w), x, plan.jaxpr)


def _weighted(d: jax.Array, c: jax.Array, chunk: int) -> jax.Array:
    """Sum d (n, k, ..) over the outputs, weighed by c; for the trace each alone, (v, j, n, ..)."""
    if chunk:
        return jnp.moveaxis(d, 1, 0)[None] * c.reshape(len(c), 1, -1, *(1,) * (d.ndim - 2))
    if len(c) == 1:  # a product of matrices has no rows then
        return jnp.sum(d * c[0].reshape(*d.shape[:2], *(1,) * (d.ndim - 2)), 1)[None, None]
    return jnp.einsum("nk...,vnk->vn...", d, c)[:, None]  # (v, 1, n, b, s, q)


def _push_part(f: Any, s: Shape, u: PyTree, chunk: int) -> jax.Array:
    weight, bias = u
    if s.tokens:
        rows = weight[:, :, jnp.maximum(f.a, 0)]  # (v, j, n, s, q)
        z = jnp.where((f.a >= 0)[None, None, :, :, None], rows, 0)[:, :, :, None]
    else:
        z = jnp.einsum("nbsp,vjbpq->vjnbsq", f.a, weight)
    if bias is not None:
        z = z + jnp.einsum("nb,vjbq->vjnbq", f.bias, bias)[:, :, :, :, None]
    return _read(f.d, z, chunk)


def _read(d: jax.Array, z: jax.Array, chunk: int) -> jax.Array:
    """Multiply z (v, j, n, ..) by d (n, k, ..): (v, n, k), or for the trace (v, n)."""
    rest = tuple(range(3, z.ndim))
    if chunk:
        return jnp.sum(jnp.moveaxis(d, 1, 0)[None] * z, (1, *rest))
    if len(z) == 1:
        return jnp.sum(d * z[0, 0][:, None], tuple(range(2, d.ndim)))[None]
    return jnp.einsum("nkz,vnz->vnk", d.reshape(*d.shape[:2], -1), z.reshape(len(z), len(d), -1))


def _of_features(request: Request, kept: PyTree, setting: Setting) -> Maps:
    plan, _ = _plan(request)
    shapes, chunk = dict(enumerate(plan.shapes)), setting.chunk

    def chosen(start: Any) -> tuple[dict[int, Any], dict[int, jax.Array]]:
        pairs, jacobians = kept.get("factors", {}), kept.get("jacobian", {})
        if not chunk or chunk == plan.jaxpr.out_avals[0].shape[0]:
            return pairs, jacobians

        def outputs(d: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(d, start, chunk, 1)

        pairs = {i: f._replace(d=outputs(f.d)) for i, f in pairs.items()}
        return pairs, jax.tree.map(outputs, jacobians)

    def pull(c: jax.Array, start: Any) -> Any:
        pairs, jacobians = chosen(start)
        through = "nkp,vn->vkp" if chunk else "nkp,vnk->vp"
        return (
            {
                i: factors.pull_part(f, shapes[i], _weighted(f.d, c, chunk))
                for i, f in pairs.items()
            },
            {i: jnp.einsum(through, j, c) for i, j in jacobians.items()},
        )

    def push(u: PyTree, start: Any) -> jax.Array:
        pairs, jacobians = chosen(start)
        through = "nkp,vkp->vn" if chunk else "nkp,vp->vnk"
        shares = [_push_part(f, shapes[i], u[0][i], chunk) for i, f in pairs.items()]
        shares += [jnp.einsum(through, j, u[1][i]) for i, j in jacobians.items()]
        return sum(shares[1:], shares[0])

    return Maps(pull, push)


KEEPS = {
    "nothing": Keep(lambda request, x: x, _by_evaluation),
    "residuals": Keep(_linearize, _by_residuals),
    "features": Keep(_features, _of_features),
}
"""What is kept of a batch between two products: the batch alone, and its examples are evaluated
again, `block` of them at once; the residuals of one linearization; or the factors of
its Jacobian."""
