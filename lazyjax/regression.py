"""The tangent model trained to any time, by products with its kernel alone.

Kernel regression is training to the end: a linear system. Before the end the coefficients are a
function of the kernel applied to the residual at the start, -S(t, K) (f0 - y) in the words of
`dynamics`, which Lanczos' method takes from a small tridiagonal matrix.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike

from lazyjax import checks
from lazyjax.convolutions import plain_convolutions
from lazyjax.dynamics import Dynamics, warn_of_rounding
from lazyjax.independence import check_examples
from lazyjax.laws import Law, descent, flow, require_stable
from lazyjax.meshes import in_any_program
from lazyjax.norms import norm, scale_of
from lazyjax.operators import (
    KernelOperator,
    NotConverged,
    Nystrom,
    by_evaluation,
    lanczos,
    require_symmetric,
    solve,
)
from lazyjax.traces import as_it_is, one_example
from lazyjax.types import ModelFunction, Params, PyTree
from lazyjax.widening import widened

_FLOW = "no `learning_rate`"
_FIRST_DEPTH = 16
_FEW = 4  # steps of Lanczos that tell the order of the largest eigenvalue


class Regression(NamedTuple):
    """A trained tangent model.

    Attributes
    ----------
    coefficients : (*t.shape, N, *out)
        a(t), with params(t) = params0 + J^T a(t).
    fit : (*t.shape, N, *out)
        f(t) - f0 on the training points, Theta a(t).
    error : float
        What is missing, as the root of the mean square over that of f0 - y: of the equation at
        t = infinity; before that, and where the ridge is below the kernel's rounding, by how much
        the fit changed when the Krylov space was last doubled.
    products : int
        Products with the kernel that it took, a block of vectors counted once.
    """

    coefficients: jax.Array
    fit: jax.Array
    error: float
    products: int


def _columns(A: KernelOperator, y: jax.Array) -> jax.Array:
    """Give values (N, *out) as vectors (n, B): one, or one an output where they share A."""
    if A.shape[0] == y.size:
        return y.reshape(-1, 1)
    if A.shape[0] == y.shape[0]:
        return y.reshape(y.shape[0], -1)
    raise ValueError(
        f"`y` must have shape (N, *out) with N or N K = {A.shape[0]}, got {y.shape}. "
        "Use the kernel of the points of `y`."
    )


def _rounding(y: jax.Array, A: KernelOperator, values: jax.Array) -> jax.Array:
    """Compute N K eps lambda_max of the kernel, from Ritz values of A."""
    return y.size * jnp.finfo(A.dtype).eps * jnp.max(jnp.abs(values - A.shift))


@partial(jax.jit, static_argnames="depth")
def _trained(
    A: KernelOperator,
    residual: jax.Array,
    t: jax.Array,
    law: Law,
    *,
    depth: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Compute coefficients and fit (T, n, B) in Krylov spaces of the residual (n, B).

    And N K eps lambda_max, and whether it explains a Ritz value.
    """
    tridiagonal = lanczos(A, residual.T, depth=depth)
    values, inner = tridiagonal.eigh()
    noise = _rounding(residual, A, values)
    values = jnp.where(jnp.abs(values - A.shift) < noise, 0, values - A.shift)

    def column(vectors: jax.Array, values: jax.Array, inner: jax.Array, r0: jax.Array) -> Any:
        unseen = (values == 0)[None] & (A.shift < noise)  # J^T a has nothing of it: see the Notes
        ritz = jnp.matmul(vectors.T, inner, precision="highest")
        run = Dynamics(
            eigenvalues=values,
            eigenvectors=ritz,
            residual=jnp.where(unseen, 0, inner[:1] * norm(r0)).T,
            f0=jnp.zeros_like(r0),
            law=law,
            ridge=A.shift,
            noise=noise,
            shared=True,
        )
        return run.coefficients(t), run.train(t)

    every = jax.vmap(column, out_axes=-1)
    return *every(tridiagonal.vectors, values, inner, residual.T), noise, jnp.any(values == 0)


def _check_stable(A: KernelOperator, residual: jax.Array, law: Law, t: np.ndarray) -> None:
    """Refuse an infinite time above the critical learning rate, as the residual sees it."""
    if np.any(np.isinf(t)) and np.isfinite(float(law.limit)):
        first = lanczos(A, residual.T, depth=min(_FIRST_DEPTH, A.shape[0]))
        require_stable(law, t, jnp.max(first.eigh()[0]), _FLOW)


def _below_rounding(
    A: KernelOperator, residual: jax.Array, preconditioner: Any
) -> tuple[bool, int]:
    """Tell whether the ridge is below N K eps lambda_max, and the products that this took."""
    if not A.shift > 0:
        return True, 0
    if isinstance(preconditioner, Nystrom):  # P is nowhere above A, and nearly there at its top
        return bool(A.shift < _rounding(residual, A, preconditioner.values[-1] + A.shift)), 0
    steps = min(_FEW, A.shape[0])
    values, _ = lanczos(A, residual.T, depth=steps).eigh()
    return bool(A.shift < _rounding(residual, A, values)), steps


def _in_growing_spaces(
    run: Callable[..., tuple[jax.Array, ...]], size: float, tolerance: float, most: int
) -> tuple[jax.Array, jax.Array, float, int, tuple[jax.Array, ...]]:
    """Double the depth until the fit stays.

    Give coefficients, fit, its change, the products, and what else there is.
    """
    depth, taken, before, error = 1, 0, None, np.inf
    while True:
        depth = min(most, max(_FIRST_DEPTH, 2 * depth))
        coefficients, fit, *others = run(depth=depth)
        taken += depth
        if before is not None:
            error = float(jnp.max(jax.vmap(norm)(fit - before))) / size if size else 0.0
        if depth == fit.shape[1]:  # the whole space
            return coefficients, fit, 0.0, taken, tuple(others)
        if error <= tolerance:
            return coefficients, fit, error, taken, tuple(others)
        if depth == most:
            raise NotConverged(
                f"The trained model changed by {error:.1e} of f0 - y when the Krylov space was "
                f"last enlarged, to {depth} products, not by {tolerance:.1e} or less. Use more "
                "`products`, smaller times, or a larger ridge.",
                (coefficients, fit),
            )
        before = fit


@in_any_program()
def kernel_regression(
    A: KernelOperator,
    y: ArrayLike,
    f0: ArrayLike,
    *,
    t: Any = np.inf,
    learning_rate: float | None = None,
    momentum: float = 0.0,
    tolerance: float | None = None,
    products: int = 1000,
    preconditioner: Any = None,
) -> Regression:
    """Train the tangent model to time t, by products with its kernel.

    a(infinity) = (Theta + ridge I)^-1 (y - f0);  a(t) = -S(t, Theta) (f0 - y), as in `dynamics`

    As there, what rounding explains of the kernel is 0.

    Parameters
    ----------
    A : KernelOperator
        Theta + ridge of the training points, from `ntk_operator`, `as_operator` or a stored kernel.
        Of shape (N K, N K), or (N, N) for a kernel that is the same for every output.
    y, f0 : (N, *out)
        Targets, and outputs at the start.
    t : array of any shape
        Steps or times; infinity, the default, is the end of training.
    learning_rate : float, optional
        Of gradient descent, t being its steps; without it t is a time of the gradient flow.
    momentum : float
        Of the heavy ball, in [0, 1).
    tolerance : float, optional
        Of the result, relative to f0 - y; the root of the dtype's epsilon by default.
    products : int
        With the kernel, at most, for each kind of t.
    preconditioner : optional
        For t = infinity, from `nystrom`. Where the ridge is below the kernel's rounding there is no
        use for it.

    Returns
    -------
    Regression

    Raises
    ------
    TypeError
        If A is no operator, or y or f0 hold no floats.
    ValueError
        If A is not symmetric and positive semi-definite, shapes do not fit or a value is not
        finite; if t is negative, or no whole step of gradient descent; if t is finite and the
        learning rate above twice the critical one, or t is infinite and it is above the critical
        one.
    NotConverged
        If the tolerance was not reached with so many products.

    Warns
    -----
    UserWarning
        If the kernel is singular to rounding and the ridge, not 0, below N K eps lambda_max.

    Notes
    -----
    t = infinity is a linear system, but for a ridge (or none) below N K eps lambda_max, which takes
    four products to tell, or a preconditioner: conjugate gradients would divide rounding by it.
    Such a t and finite times share one Krylov space, of which N K numbers a product are kept, and
    whose Ritz values below N K eps lambda_max are 0, as the eigenvalues in `dynamics`. With such a
    ridge or none, nothing of the coefficients is in their directions at any time: J^T a would have
    nothing of it, and growing as t it would drown the rest in its rounding. The space needs about
    as many products as the root of the largest c (lambda + ridge) t (`dynamics` has c), or as
    conjugate gradients where that is less. In parameter space the same training is `train` of
    `linearize(f, params0)` with `optax.sgd`.

    References
    ----------
    Lee et al. 2019, equations 8-11. Druskin and Knizhnerman 1989, "Two polynomial methods of
    calculating functions of symmetric matrices" (the Lanczos method for f(A) b).

    Examples
    --------
    >>> from lazyjax.operators import as_operator
    >>> A = as_operator(jnp.eye(2), ridge=1.0)
    >>> kernel_regression(A, jnp.ones((2, 1)), jnp.zeros((2, 1))).fit[:, 0].tolist()
    [0.5, 0.5]
    """
    require_symmetric(A)
    checks.floating("y", y)
    checks.floating("f0", f0)
    y, f0 = jnp.asarray(widened(y)), jnp.asarray(widened(f0))
    if f0.shape != y.shape or not y.ndim:
        raise ValueError(
            f"`y` must have the shape of `f0`, {f0.shape}, got {y.shape}. "
            "Pass f0 = f(params0, x) and its targets."
        )
    checks.finite("y", y)
    checks.finite("f0", f0)
    if learning_rate is None:
        law = flow(y.size, A.dtype)
    else:
        law = descent(learning_rate, momentum, y.size, A.dtype)
    t = np.asarray(t, float)
    law.check(t, _FLOW)
    checks.whole("products", products, least=1)
    within = float(jnp.finfo(A.dtype).eps) ** 0.5 if tolerance is None else tolerance
    checks.positive("tolerance", within)
    residual = _columns(A, f0 - y).astype(A.dtype)
    order = scale_of(residual, 0)  # each output in its own
    residual = residual / order
    _check_stable(A, residual, law, t)

    flat = t.reshape(-1)
    coefficients = np.zeros((len(flat), *residual.shape), A.dtype)
    fit, errors, taken = coefficients.copy(), [0.0], 0
    spaces = np.isfinite(flat)  # the times that Krylov spaces take
    if not np.all(spaces):
        singular, spent = _below_rounding(A, residual, preconditioner)
        taken += spent
        spaces = spaces | singular
    if not np.all(spaces):
        solution = solve(
            A, -residual, tolerance=within, iterations=products, preconditioner=preconditioner
        )
        coefficients[~spaces] = solution.x
        fit[~spaces] = -residual - A.shift * solution.x  # Theta a, as (Theta + shift) a = -residual
        errors.append(float(jnp.max(solution.residuals[-1])))
        taken += solution.iterations
    if np.any(spaces):
        run = partial(_trained, A, residual, jnp.asarray(flat[spaces], A.dtype))
        *both, error, spent, (noise, dropped) = _in_growing_spaces(
            partial(run, law),
            float(norm(residual)),
            within,
            min(products, A.shape[0]),
        )
        if dropped:
            warn_of_rounding(A.shift, noise, stacklevel=3)
        coefficients[spaces], fit[spaces] = both
        errors.append(error)
        taken += spent
    shape = (*t.shape, *y.shape)
    return Regression(
        jnp.asarray(coefficients * np.asarray(order)).reshape(shape),
        jnp.asarray(fit * np.asarray(order)).reshape(shape),
        max(errors),
        taken,
    )


@partial(jax.jit, static_argnames="size")
def _moved(f: Partial, params0: Params, x: PyTree, c: jax.Array, *, size: int) -> Params:
    """Compute params0 + J^T c, so many examples at once."""
    w, structure = jax.tree.flatten(params0)

    def function(w: list[jax.Array], x: PyTree) -> jax.Array:
        (y,) = jax.tree.leaves(widened(f(structure.unflatten(w), x)))
        return y.reshape(y.shape[0], -1)

    maps = by_evaluation(function, w, x, block=size)
    pull = plain_convolutions(lambda c: maps.pull(c, None))
    moved = pull(c.reshape(1, c.shape[0], -1))
    return structure.unflatten([a + b[0] for a, b in zip(w, moved, strict=True)])


@in_any_program()
def tangent_parameters(
    f: ModelFunction, params0: Params, x: PyTree, coefficients: ArrayLike, *, batch_size: int = 256
) -> Params:
    """Give the parameters of a trained tangent model, params0 + J(x)^T a.

    With them `linearize(f, params0)` predicts on any input, without a kernel between test and
    training points.

    Parameters
    ----------
    f : ModelFunction
    params0 : pytree of floats
        The anchor.
    x : array (N, ...) or pytree
        The training inputs.
    coefficients : (N, *out)
        a, of one time.
    batch_size : int
        Examples that are differentiated at once.

    Returns
    -------
    pytree like `params0`

    Raises
    ------
    TypeError
        If `f` is not callable or gives several arrays, `params0` or the coefficients hold no
        floats, or the batch size is no whole number.
    ValueError
        If the coefficients do not have the shape of f(params0, x), or the batch size is below 1; if
        examples see each other (batch normalisation in training mode) and there are more than the
        batch size.

    Examples
    --------
    >>> f = lambda w, x: x @ w
    >>> tangent_parameters(f, jnp.zeros((2, 1)), jnp.eye(2), jnp.ones((2, 1)))[:, 0].tolist()
    [1.0, 1.0]
    """
    f = as_it_is(checks.model_function(f), params0, one_example(x))
    checks.floating("params0", params0)
    checks.floating("coefficients", coefficients)
    checks.whole("batch_size", batch_size, least=1)
    n = checks.batch("x", x)
    outputs = jax.tree.leaves(jax.eval_shape(f, params0, x))
    if len(outputs) != 1:
        raise TypeError(
            f"`f` must return one array, got {len(outputs)}. Choose one: lambda p, x: f(p, x)[0]."
        )
    (like,) = outputs
    if np.shape(coefficients) != like.shape:
        raise ValueError(
            f"`coefficients` must have the shape of f(params0, x), {like.shape}, got "
            f"{np.shape(coefficients)}. Pass those of one time, a[i]."
        )
    size = min(batch_size, n)
    if size < n:  # in blocks; a whole batch is right for any model
        check_examples(f, params0, x)
    missing = -n % size

    def pad(a: Any, mode: str) -> jax.Array:
        return jnp.pad(jnp.asarray(a), [(0, missing)] + [(0, 0)] * (np.ndim(a) - 1), mode)

    x = jax.tree.map(lambda a: pad(a, "edge"), x)
    c = pad(jnp.asarray(coefficients, like.dtype), "constant")
    return _moved(f, params0, x, c, size=size)
