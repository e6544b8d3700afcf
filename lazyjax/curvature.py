"""Sharpness: the largest eigenvalue of the Hessian of a training loss, by products alone."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from lazyjax import checks
from lazyjax.derivatives import jvp
from lazyjax.loop import objective
from lazyjax.meshes import in_any_program
from lazyjax.norms import norm
from lazyjax.traces import as_it_is, one_example
from lazyjax.training import as_dataset, as_loss, check_member
from lazyjax.types import Dataset, Loss, ModelFunction, Params
from lazyjax.widening import widened


class _State(NamedTuple):
    """Of Lanczos' method: the last two vectors, and the length of what is to become the next."""

    before: Params
    now: Params
    beta: jax.Array


@jax.jit
def _first(params: Params, key: jax.Array) -> _State:
    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, w.dtype), widened(params))
    flat, unravel = ravel_pytree(zeros)
    start = unravel(jax.random.normal(key, flat.shape, flat.dtype))  # one draw compiles sooner
    start = optax.tree.scale(1 / norm(start), start)
    return _State(optax.tree.zeros_like(start), start, jnp.zeros((), norm(start).dtype))


@jax.jit
def _step(
    f: Partial, loss: Partial, params: Params, data: Dataset, state: _State
) -> tuple[_State, jax.Array]:
    """Multiply by the Hessian; give the next state, and the diagonal entry."""
    before, v, beta = state
    gradient = jax.grad(lambda w: objective(f, loss, w, data))
    like = jax.tree.map(lambda a, w: a.astype(w.dtype), v, params)
    w = optax.tree.sub(widened(jvp(gradient, params, like)[1]), optax.tree.scale(beta, before))
    alpha = jnp.asarray(optax.tree.vdot(w, v))
    w = optax.tree.sub(w, optax.tree.scale(alpha, v))
    beta = norm(w)
    after = optax.tree.scale(1 / jnp.where(beta > 0, beta, 1), w)  # zeros once all is spanned
    return _State(v, after, beta), alpha


@jax.jit
def _largest(diagonal: list[jax.Array], beside: list[jax.Array]) -> jax.Array:
    alpha, beta = jnp.stack(diagonal), jnp.stack(beside)[:-1]
    spanned = jnp.cumprod(jnp.concatenate([jnp.ones(1, bool), beta > 0]))
    alpha = jnp.where(spanned, alpha, alpha[0])  # what is not spanned is no eigenvalue of its own
    return jnp.linalg.eigvalsh(jnp.diag(alpha) + jnp.diag(beta, 1) + jnp.diag(beta, -1))[-1]


def largest_curvature(
    f: Partial, loss: Partial, params: Params, data: Dataset, depth: int = 24
) -> jax.Array:
    """Compute `sharpness`, unchecked, from the start of seed 0."""
    return _by_lanczos(f, loss, params, data, jax.random.key(0), depth)


def _by_lanczos(
    f: Partial, loss: Partial, params: Params, data: Dataset, key: jax.Array, depth: int
) -> jax.Array:
    state, diagonal, beside = _first(params, key), [], []
    for _ in range(min(depth, sum(w.size for w in jax.tree.leaves(params)))):
        # on the host: in a loop convolutions are slow, or long to compile
        state, alpha = _step(f, loss, params, data, state)
        diagonal.append(alpha)
        beside.append(state.beta)
    return _largest(diagonal, beside)


@in_any_program()
def sharpness(
    f: ModelFunction,
    params: Params,
    data: Dataset,
    *,
    loss: Loss = optax.losses.squared_error,
    key: jax.Array | None = None,
    depth: int = 24,
) -> jax.Array:
    """Compute the largest eigenvalue of the Hessian of the training loss.

    lambda_max of D^2 L(w), L(w) = mean(loss(f(w, x), y))

    Gradient descent with rate eta is stable near w where eta is below 2 / lambda_max; of a tangent
    model and the squared error it is 2 lambda_max(Theta) / (N K).

    Parameters
    ----------
    f : ModelFunction
        A network or its tangent model.
    params : pytree of floats
    data : Dataset
        x (N, ...) and y, what the loss takes.
    loss : callable
        As in `train`.
    key : key, optional
        Of the start; by default that of seed 0.
    depth : int
        Steps of Lanczos' method, each a product with the Hessian.

    Returns
    -------
    () array
        A lower bound, up to rounding; in float32 at least.

    Raises
    ------
    TypeError, ValueError
        If `params` holds anything but floats, `depth` is no whole number from 1, or data, loss and
        model do not fit, as in `train`.

    Notes
    -----
    A product takes about twice the time of a gradient, and the memory of a backward pass and of
    three copies of the parameters. Largest means that of the largest value, not the most negative.

    References
    ----------
    Cohen, Kaur, Li, Kolter, Talwalkar 2021, "Gradient descent on neural networks typically occurs
    at the edge of stability".

    Examples
    --------
    >>> data = Dataset(jnp.eye(2) * 2, jnp.zeros((2, 1)))
    >>> round(sharpness(lambda w, x: x @ w, jnp.ones((2, 1)), data).item(), 6)
    4.0
    """
    checks.floating("params", params)
    checks.whole("depth", depth, least=1)
    data, loss = as_dataset(data), as_loss(loss)
    f = as_it_is(checks.model_function(f), params, one_example(data.x))
    check_member(f, loss, params, data)
    return _by_lanczos(f, loss, params, data, jax.random.key(0) if key is None else key, depth)
