"""Conjugate gradients, as steps and as a pure function of so many of them.

`solve` takes the steps until it is done; `conjugate_gradients` takes a fixed number of them, so
that it can stand in a program of the user's own, and be differentiated.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jax.typing import ArrayLike

from lazyjax import checks
from lazyjax.meshes import alike, in_any_program
from lazyjax.norms import norm, scale_of
from lazyjax.operators.algebra import KernelOperator, require_symmetric
from lazyjax.operators.preconditioners import Nystrom


class Iterate(NamedTuple):
    """Where `conjugate_gradients` ended.

    Attributes
    ----------
    x : (n,) or (n, B)
    residuals : (iterations + 1,) or (iterations + 1, B)
        norm(b - A x) / norm(b) after each step, by the recursion; the last row is computed from x.
        No derivative goes through them.
    """

    x: jax.Array
    residuals: jax.Array


class State(NamedTuple):
    """Conjugate gradients for B columns: iterate, residual, direction, r . P^-1 r, who runs.

    P^-1 is taken over the scale of what it makes of the first residual, and `scale` is that.
    """

    x: jax.Array
    r: jax.Array
    p: jax.Array
    scale: jax.Array
    rz: jax.Array
    running: jax.Array
    step: jax.Array


def _inner(u: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.sum(u * v, axis=0)


def sizes(r: jax.Array) -> jax.Array:
    """Compute the norms of the columns of r (n, B), whose squares are in range."""
    return jnp.linalg.norm(r, axis=0)


def right_hand_side(A: KernelOperator, b: ArrayLike) -> jax.Array:
    """Require b (n,) or (n, B) of floats that are finite."""
    checks.floating("b", b)
    b = jnp.asarray(b)
    if b.ndim not in (1, 2) or b.shape[0] != A.shape[0]:
        raise ValueError(
            f"`b` must have shape ({A.shape[0]},) or ({A.shape[0]}, B), got {b.shape}. "
            "Use y.reshape(-1) for values y (N, *out)."
        )
    checks.finite("b", b)
    return b


def _same(v: jax.Array) -> jax.Array:
    return v


def preconditioning(preconditioner: Any) -> Callable[[jax.Array], jax.Array]:
    """Require a function, or None for the identity; give it as a pytree."""
    if not callable(preconditioner) and preconditioner is not None:
        raise TypeError(
            "`preconditioner` must be a function (n, B) -> (n, B), got "
            f"{type(preconditioner).__name__}. Use nystrom(key, A, rank=...)."
        )
    travels = isinstance(preconditioner, Nystrom | Partial)
    return preconditioner if travels else Partial(preconditioner or _same)


@jax.jit
def begin(M: Callable, x: jax.Array, r: jax.Array, target: jax.Array, step: jax.Array) -> State:
    """Start from x (n, B), whose residual is r; columns stop at norms of `target` (B,)."""
    z = M(r)
    scale = scale_of(z, 0)
    z = z / scale
    return State(x, r, z, scale, _inner(r, z), sizes(r) > target, step)


def _advance(A: KernelOperator, M: Callable, target: jax.Array, s: State) -> State:
    size = scale_of(s.p, 0)
    p = s.p / size
    q = A @ p
    curvature = _inner(p, q)
    running = s.running & (curvature > 0)  # rounding, where it is not
    alpha = jnp.where(running, s.rz / size[0] / jnp.where(running, curvature, 1), 0)[None]
    x, r = s.x + alpha * p, s.r - alpha * q
    z = M(r) / s.scale
    rz = _inner(r, z)
    beta = jnp.where(running, rz / jnp.where(running, s.rz, 1), 0)
    running = running & (sizes(r) > target)
    return State(x, r, z + beta[None] * s.p, s.scale, rz, running, s.step + 1)


@partial(jax.jit, static_argnames="length")
def advance(
    A: KernelOperator,
    M: Callable,
    state: State,
    target: jax.Array,
    last: jax.Array,
    *,
    length: int,
) -> tuple[State, jax.Array]:
    """Take up to `length` steps, none after step `last`; give the norms (length, B) of residuals.

    A column that is done stays, and so do all when none runs.
    """

    def step(s: State, _: None) -> tuple[State, jax.Array]:
        s = jax.lax.cond(
            jnp.any(s.running) & (s.step < last),
            partial(_advance, A, M, target),
            lambda same: same,
            s,
        )
        return s, sizes(s.r)

    return jax.lax.scan(step, state, length=length)


def _per(over: jax.Array, under: jax.Array) -> jax.Array:
    """Divide norms by norms; 0 of what is 0."""
    return over / jnp.where(under == 0, 1, under)


_norms = jax.vmap(norm, 1)


@partial(jax.jit, static_argnames="iterations")
def _solved(
    A: KernelOperator, b: jax.Array, M: Callable, x0: jax.Array | None, *, iterations: int
) -> Iterate:
    """Solve for a block b (n, B)."""
    M = jax.lax.stop_gradient(M)
    eps = jnp.finfo(A.dtype).eps

    def run(_: Callable, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        order = scale_of(b, 0)
        b = b / order
        size = sizes(b)
        state = begin(M, jnp.zeros_like(b), b, eps * size, jnp.zeros((), int))
        state, history = advance(
            A, M, state, eps * size, jnp.asarray(iterations), length=iterations
        )
        history = jnp.concatenate([size[None], history])
        return order * state.x, _per(history, size[None])

    # from x0 it is the correction that is solved for; the solution does not depend on x0
    start = None if x0 is None else jax.lax.stop_gradient(x0)
    r = b if start is None else b - A @ start
    implicitly: Any = jax.lax.custom_linear_solve
    x, history = implicitly(lambda v: A @ v, r, run, symmetric=True, has_aux=True)
    if start is not None:
        x = start + x
    A, b, r, done, history = jax.lax.stop_gradient((A, b, r, x, history))
    history = history * _per(_norms(r), _norms(b))[None]
    last = _per(_norms(b - A @ done), _norms(b))
    return Iterate(x, history.at[-1].set(last))


@in_any_program()
def conjugate_gradients(
    A: KernelOperator,
    b: ArrayLike,
    *,
    iterations: int,
    preconditioner: Callable[[jax.Array], jax.Array] | None = None,
    x0: ArrayLike | None = None,
) -> Iterate:
    """Take so many steps of preconditioned conjugate gradients towards A x = b, as a pure function.

    Parameters
    ----------
    A : KernelOperator
        Symmetric and positive definite, as K + ridge is.
    b : (n,) or (n, B)
        y.reshape(-1) for values y (N, *out).
    iterations : int
        Steps, 1 or more; columns that are within rounding before are left as they are.
    preconditioner : Nystrom or function, optional
        As for `solve`; no derivative goes through it.
    x0 : as b, optional
        Where to start, such as the solution of the step before; zeros by default. No derivative
        goes through it.

    Returns
    -------
    Iterate
        x, and the relative residuals, by which the caller judges it.

    Raises
    ------
    TypeError
        If A is no operator, b or x0 holds no floats, the iterations are no whole number, or the
        preconditioner is no function.
    ValueError
        If A is not symmetric and positive semi-definite, b does not fit or is not finite, x0 has
        not the shape of b, or the iterations are fewer than 1.

    Notes
    -----
    A product with a block (n, B) a step, and one more for the last residual. It runs under `jit`,
    `vmap` and `scan`, and never complains: `solve` is the one that does, and that ends when it is
    done. Free of the scales of A and of each column of b.

    The derivative is that of the solution, dx = A^-1 (db - dA x), whose system is solved by as many
    steps of the same iteration: by b and by all that A is made of. It is as accurate as both solves
    are, forgets how x was found, and keeps nothing of the steps. Where b alone is differentiated, A
    may have products without derivatives.

    References
    ----------
    Hestenes and Stiefel 1952. Christianson 1994, "Reverse accumulation and attractive fixed points"
    (the derivative of what an iteration finds).

    Examples
    --------
    >>> from lazyjax.operators.algebra import as_operator
    >>> A = as_operator(jnp.diag(jnp.array([1.0, 3.0])), ridge=1.0)
    >>> x, residuals = conjugate_gradients(A, jnp.array([2.0, 4.0]), iterations=2)
    >>> x.round(4).tolist(), residuals.shape
    ([1.0, 1.0], (3,))
    """
    require_symmetric(A)
    b = right_hand_side(A, b)
    checks.whole("iterations", iterations, least=1)
    M = preconditioning(preconditioner)
    block = alike(b.astype(A.dtype).reshape(b.shape[0], -1), A)
    if x0 is not None:
        checks.floating("x0", x0)
        x0 = jnp.asarray(x0)
        if x0.shape != b.shape:
            raise ValueError(
                f"`x0` must have the shape of `b`, {b.shape}, got {x0.shape}. "
                "Leave it out to start from zeros."
            )
        x0 = alike(x0.astype(A.dtype).reshape(block.shape), A)
    x, residuals = _solved(A, block, M, x0, iterations=iterations)
    return Iterate(x.reshape(b.shape), residuals.reshape(-1, *b.shape[1:]))
