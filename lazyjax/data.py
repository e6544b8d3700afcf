"""The practical's targets and data sets, mini-batches, and the risk of a model."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lazyjax import checks
from lazyjax.types import Dataset, ModelFunction, Params, PyTree
from lazyjax.widening import widened

Target = Callable[[jax.Array], jax.Array]


def _simple(x: jax.Array) -> jax.Array:
    return jnp.maximum(0.3 * x, 0.0)


def _middle(x: jax.Array) -> jax.Array:
    return jnp.abs(x + 0.5) - 2 * jnp.maximum(x - 0.5, 0.0) - 0.4


def _complex(x: jax.Array) -> jax.Array:
    return jnp.sin(10 * x) * jnp.cos(2 * x + 1)


TARGETS: dict[str, Target] = {"simple": _simple, "middle": _middle, "complex": _complex}


def _target(target: str | Target) -> Target:
    if callable(target):
        return target
    checks.one_of("target", target, TARGETS)
    return TARGETS[target]


def _interval(low: float, high: float) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(
            f"`low` must be below `high`, both finite, got {low} and {high}. "
            "Use low=-1.0, high=1.0."
        )


def make_dataset(
    key: jax.Array,
    *,
    n: int,
    low: float = -1.0,
    high: float = 1.0,
    noise: float = 0.0,
    target: str | Target = "middle",
) -> Dataset:
    """Draw a one-dimensional regression problem.

    x_i ~ U(low, high),  y_i = target(x_i) + noise N(0, 1)

    Parameters
    ----------
    key : key
    n : int
        Examples, 1 or more.
    low, high : float
        The interval of x.
    noise : float
        Standard deviation of the noise, in the units of y.
    target : str or callable
        A name of `TARGETS` (simple, middle, complex), or a function of x.

    Returns
    -------
    Dataset
        x (n, 1), y (n, 1), of JAX's default float.

    Raises
    ------
    TypeError, ValueError
        If `n` is no whole number from 1, `low` is not below `high`, `noise` is negative or
        not finite, or the target is unknown.

    Examples
    --------
    >>> data = make_dataset(jax.random.key(0), n=15)
    >>> data.x.shape, data.y.shape
    ((15, 1), (15, 1))
    """
    checks.whole("n", n, least=1)
    _interval(low, high)
    checks.not_negative("noise", noise)
    function = _target(target)
    x_key, noise_key = jax.random.split(key)
    x = jax.random.uniform(x_key, (n, 1), minval=low, maxval=high)
    return Dataset(x, function(x) + noise * jax.random.normal(noise_key, (n, 1)))


def check_dataset(data: Dataset) -> None:
    """Check a data set: as many targets as inputs, at least one, all finite.

    Parameters
    ----------
    data : Dataset
        Pytrees `x` and `y`, batch on axis 0 of every leaf; integers (tokens, labels) may be.

    Raises
    ------
    ValueError
        If the batch is empty, differs between leaves, or holds NaN or infinity.
    """
    n, targets = checks.batch("data.x", data.x), checks.batch("data.y", data.y)
    if n != targets:
        raise ValueError(
            f"`data.y` must have one target for each of the {n} inputs, got {targets}. "
            "Pass x and y of the same length."
        )
    checks.finite("data.x", data.x)
    checks.finite("data.y", data.y)


def batch_indices(
    key: jax.Array | None, start: jax.Array | int, *, n: int, batch_size: int, steps: int
) -> jax.Array:
    """Give the examples of each step of mini-batch training.

    The batches are cut from an endless stream, one random permutation of the examples after the
    other: every example is visited once per epoch, and all batches have the same size, whether or
    not it divides n. What a step gets depends on its number alone.

    Parameters
    ----------
    key : key or None
        None will do for full batches.
    start : int
        The first step; may be traced.
    n : int
        Examples.
    batch_size : int
        Examples a step; n or more gives all of them, in order.
    steps : int
        How many steps.

    Returns
    -------
    (steps, min(batch_size, n)) array of int32

    Raises
    ------
    TypeError, ValueError
        If `n`, `batch_size` or `steps` is no whole number from 1, or the key is missing.

    Examples
    --------
    >>> batches = batch_indices(jax.random.key(0), 0, n=6, batch_size=2, steps=3)
    >>> sorted(batches.reshape(-1).tolist())
    [0, 1, 2, 3, 4, 5]
    """
    for name, value in (("n", n), ("batch_size", batch_size), ("steps", steps)):
        checks.whole(name, value, least=1)
    if batch_size >= n:
        return jnp.broadcast_to(jnp.arange(n, dtype=jnp.int32), (steps, n))
    if key is None:
        raise ValueError(
            f"`key` must be given for mini-batches of {batch_size} of {n} examples, got None. "
            "Use key=jax.random.key(0)."
        )
    epoch, position = _divide_product(jnp.asarray(start, jnp.int32), batch_size, n)
    epochs = epoch + jnp.arange(-(-steps * batch_size // n) + 1, dtype=jnp.int32)

    def order(epoch: jax.Array) -> jax.Array:
        return jax.random.permutation(jax.random.fold_in(key, epoch), n).astype(jnp.int32)

    stream = jax.lax.map(order, epochs).reshape(-1)
    taken = jax.lax.dynamic_slice(stream, (position,), (steps * batch_size,))
    return taken.reshape(steps, batch_size)


def _divide_product(a: jax.Array, b: int, n: int) -> tuple[jax.Array, jax.Array]:
    """Compute divmod(a b, n) for a product of more than 31 bits, bit by bit; b < n < 2^29."""

    def bit(i: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        quotient, rest = state
        rest = 2 * rest + ((a >> (30 - i)) & 1) * b
        return 2 * quotient + rest // n, rest % n

    zero = jnp.zeros((), jnp.int32)
    return jax.lax.fori_loop(0, 31, bit, (zero, zero))


def excess_risk(
    f: ModelFunction,
    params: Params,
    *,
    target: str | Target,
    low: float = -1.0,
    high: float = 1.0,
    panels: int = 500,
) -> jax.Array:
    """Compute the mean squared distance to the target, free of noise, by quadrature.

    R(w) = 1 / (high - low) integral of (f(w, x) - target(x))^2 over [low, high]

    Parameters
    ----------
    f : ModelFunction
        x (N, 1) -> y (N, 1).
    params : pytree
    target : str or callable
        A name of `TARGETS`, or a function of x.
    low, high : float
        The interval, with the uniform distribution.
    panels : int
        Equal panels of four Gauss-Legendre points each. Exact for polynomials of degree 7 on each
        panel; a kink inside a panel costs O(1 / panels^3).

    Returns
    -------
    () array
        In squared units of y.

    Raises
    ------
    TypeError, ValueError
        If the target is unknown, `low` is not below `high`, `panels` is no whole number from 1, or
        f does not give (N, 1).
    """
    function = _target(target)
    _interval(low, high)
    checks.whole("panels", panels, least=1)
    nodes, weights = np.polynomial.legendre.leggauss(4)
    edges = np.linspace(low, high, panels + 1)
    middle, half = (edges[1:] + edges[:-1]) / 2, (high - low) / panels / 2
    x = jnp.asarray((middle[:, None] + half * nodes).reshape(-1, 1))
    share = jnp.asarray(np.tile(weights / 2 / panels, panels))
    prediction: PyTree = widened(f(params, x))
    if prediction.shape != x.shape:
        raise ValueError(
            f"`f` must give shape {x.shape} for x of that shape, got {prediction.shape}. "
            "Give the model one output."
        )
    return share.astype(prediction.dtype) @ jnp.square(prediction - function(x))[:, 0]


def expected_test_error(
    f: ModelFunction,
    params: Params,
    *,
    target: str | Target,
    noise: float,
    low: float = -1.0,
    high: float = 1.0,
    panels: int = 500,
) -> jax.Array:
    """Compute the expected squared error on new data: excess risk plus noise^2.

    Parameters
    ----------
    noise : float
        Standard deviation of the noise of y.
    f, params, target, low, high, panels
        As in `excess_risk`.

    Returns
    -------
    () array
        In squared units of y.

    Raises
    ------
    TypeError, ValueError
        As `excess_risk`; ValueError also if `noise` is negative.
    """
    checks.not_negative("noise", noise)
    risk = excess_risk(f, params, target=target, low=low, high=high, panels=panels)
    return risk + noise**2
