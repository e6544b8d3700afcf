"""Infinitely wide networks as Gaussian processes: trained to any time, and given the data.

At the start the outputs of an ensemble are a Gaussian process of covariance K, the NNGP kernel.
Training is affine in them (`dynamics`): with Theta the NTK, training points X, P = Theta_xX S(t),

    f_t(x) = f0(x) - P (f0(X) - y)

so that they stay Gaussian, with mean P y and covariance K_xx - P K_Xx - K_xX P^T + P K_XX P^T. The
posterior is of this form too: K in the place of Theta, at the end, and noise in the targets.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lazyjax import checks, laws
from lazyjax.dynamics import gradient_descent, gradient_flow
from lazyjax.limits.wide import Infinite
from lazyjax.norms import asymmetry
from lazyjax.operators import KernelOperator, as_operator, solve
from lazyjax.widening import widened

_FLOW = "no `learning_rate`"
_POINTS = {"train": "x_train", "test_train": "x_test, x_train", "test": "x_test"}
_dot = partial(jnp.matmul, precision="highest")


class Posterior(NamedTuple):
    """A Gaussian process at M points, its outputs independent of each other.

    Attributes
    ----------
    mean : (*t.shape, M, *out)
    covariance : (*t.shape, M, M)
        Of the function, the same for every output; symmetric to the last bit, and positive
        semi-definite to the rounding of the kernels.
    """

    mean: jax.Array
    covariance: jax.Array


@jax.jit
def _at_train(P: jax.Array, y: jax.Array, K: jax.Array, noise: ArrayLike) -> Posterior:
    D = jnp.eye(P.shape[0], dtype=P.dtype) - P  # f_t = D f0 + P y: no difference of kernels
    covariance = _dot(_dot(D, K), D.T) + jnp.asarray(noise, P.dtype) * _dot(P, P.T)
    return Posterior(_dot(P, y), (covariance + covariance.T) / 2)


@jax.jit
def _at_test(
    P: jax.Array, y: jax.Array, KP: jax.Array, noise: ArrayLike, K_xX: jax.Array, K_xx: jax.Array
) -> Posterior:
    """Compute it from P (M, N) and KP = K_XX P^T."""
    both = _dot(P, K_xX.T)
    covariance = K_xx - both - both.T + _dot(P, KP + jnp.asarray(noise, P.dtype) * P.T)
    return Posterior(_dot(P, y), (covariance + covariance.T) / 2)


def _array(record: str, field: str, kernel: Any, shape: tuple[int, ...]) -> jax.Array:
    """Require an array of floats, symmetric where it is of points with themselves."""
    name, cure = f"{record}.{field}", f"infinite(f, params, {_POINTS[record]}, ...)"
    if isinstance(kernel, KernelOperator):
        raise TypeError(
            f"`{name}` must be an array, got a KernelOperator; only those of `train` may be that. "
            "Use its rows_of(jnp.arange(M))."
        )
    checks.floating(name, kernel)
    checks.finite(name, kernel)
    rounding = float(jnp.finfo(jnp.result_type(kernel)).eps) ** 0.5
    kernel = jnp.asarray(widened(kernel))
    if kernel.shape != shape:
        raise ValueError(f"`{name}` must have shape {shape}, got {kernel.shape}. Use {cure}.")
    if record != "test_train" and checks.is_known(kernel):
        skew = float(asymmetry(kernel))
        if skew > rounding:
            raise ValueError(
                f"`{name}` must be symmetric, got norm(K - K^T) / norm(K) = {skew:.1e}. "
                f"Use {cure}, x2=None."
            )
    return kernel


def _operator(field: str, kernel: Any, n: int) -> KernelOperator:
    """Require a kernel of the training points; give it as an operator."""
    if not isinstance(kernel, KernelOperator):
        return as_operator(_array("train", field, kernel, (n, n)))
    if kernel.shape != (n, n) or not kernel.psd:
        raise ValueError(
            f"`train.{field}` must have shape {(n, n)} and be positive semi-definite, got "
            f"{kernel.shape} and psd={kernel.psd}. Use the kernel of the points of `y`, one for "
            "all outputs."
        )
    if np.any(kernel.shift):
        raise ValueError(
            f"`train.{field}` must be without a shift, got {kernel.shift}. Pass it as `ridge`."
        )
    return kernel


def _of_times(kernel: Any, y: Any, cross: Any, t: Any, learning_rate: Any, ridge: Any) -> jax.Array:
    """Compute P (times, M, N) by training on each unit vector, as outputs are affine in targets."""
    if learning_rate is None:
        run = gradient_flow(kernel, y, 0 * y, ridge=ridge)
    else:
        run = gradient_descent(kernel, y, 0 * y, learning_rate=learning_rate, ridge=ridge)
    if checks.is_known((t, run)):
        run.law.check(np.asarray(t), _FLOW)
        laws.require_stable(run.law, np.asarray(t), run.eigenvalues[-1] + run.ridge, _FLOW)
    vectors = run.eigenvectors
    run, t = replace(run, residual=-vectors.T, f0=0 * vectors), jnp.asarray(t).reshape(-1)
    return run.train(t) if cross is None else run.test(t, cross, 0 * cross)


def gp(
    train: Infinite,
    y: ArrayLike,
    *,
    test_train: Infinite | None = None,
    test: Infinite | None = None,
    by: str = "ntk",
    t: Any = np.inf,
    learning_rate: ArrayLike | None = None,
    ridge: ArrayLike = 0.0,
    tolerance: float | None = None,
    iterations: int = 1000,
    preconditioner: Callable[[jax.Array], jax.Array] | None = None,
) -> Posterior:
    """Compute mean and covariance of infinitely wide networks, trained or given the data.

    P y,  K_xx - P K_Xx - K_xX P^T + P (K + noise I) P^T,  with P = Theta_xX S(t) of the ensemble
    trained to time t, noise 0; or P = K_xX (K + ridge I)^-1 of the posterior, noise the ridge

    Parameters
    ----------
    train : Infinite
        Kernels `nngp` and `ntk` (N, N) of the training points, from `infinite`; by="nngp" uses
        `nngp` alone. For large N a `KernelOperator` each.
    y : (N, *out)
        Targets.
    test_train, test : Infinite, optional
        Those of M test points with the training points (M, N), and with themselves (M, M). Without
        both the result is that at the training points.
    by : str
        "ntk" for the ensemble, trained on the mean squared error over all elements of y, without
        1/2; "nngp" for the Bayesian posterior.
    t : array of any shape
        Of the ensemble: times of the flow, or steps of descent, 0 or more; infinity, the default.
    learning_rate : float, optional
        Of gradient descent, t being its steps; without it t is a time of the gradient flow.
    ridge : float
        0 or more, in the units of the kernel. Of the ensemble it pulls each network to its own
        start, as in `gradient_descent`; of the posterior it is the variance of the noise of y.
    tolerance, iterations, preconditioner
        As for `solve`, which takes operators.

    Returns
    -------
    Posterior

    Raises
    ------
    TypeError
        If an array holds no floats, a kernel of test points is an operator, or arrays are traced
        together with operators; or as `solve`.
    ValueError
        If shapes do not fit, a value is not finite, a kernel is not symmetric, `by` is not known,
        the ridge is negative, the learning rate not positive, t negative, no whole step of descent
        or infinite above the critical learning rate; if one of `test_train` and `test` is missing;
        if the posterior, or operators, come with a finite t or a learning rate; if operators come
        without test points, with a shift, or not positive semi-definite; or as `solve`.
    NotConverged
        If `solve` does not reach its tolerance.

    Warns
    -----
    UserWarning
        If the kernel is singular to rounding and the ridge, not 0, below that rounding.

    Notes
    -----
    The ensemble differs in its start alone, of which a ridge leaves a part at any t. The posterior
    is that of networks whose last layer alone is trained, to noisy targets. Directions in which the
    kernel is 0 to rounding stay as at the start, as in `dynamics`. O(N^3) once, O(M N (M + N)) and
    M N numbers a time. With operators, M solves at once, O(M N) numbers, not under `jit`.

    References
    ----------
    Lee et al. 2019, equations 14-16. Rasmussen and Williams 2006, equations 2.25 and 2.26. Matthews
    et al. 2017, "Sample-then-optimize posterior sampling for Bayesian linear models".

    Examples
    --------
    >>> K = Infinite(nngp=jnp.eye(2), ntk=2 * jnp.eye(2), error=jnp.zeros(()))
    >>> gp(K, jnp.ones((2, 1)), t=1, learning_rate=0.25).covariance.tolist()
    [[0.25, 0.0], [0.0, 0.25]]
    """
    checks.one_of("by", by, ("ntk", "nngp"))
    checks.not_negative("ridge", ridge)
    checks.floating("y", y)
    checks.finite("y", y)
    n, y = checks.batch("y", y), jnp.asarray(widened(y))
    kernels = (train.nngp, train.ntk if by == "ntk" else None)
    products = any(isinstance(kernel, KernelOperator) for kernel in kernels)
    what = "with operators" if products else "of the posterior"
    end = checks.is_known(t) and np.all(np.isposinf(t)) and learning_rate is None
    if (products or by == "nngp") and not end:
        raise ValueError(
            f"`t` must be infinity, and `learning_rate` None, {what}, got {t} and {learning_rate}. "
            "Use arrays and by='ntk' for training to other times."
        )
    if (test_train is None) != (test is None) or (products and test is None):
        raise ValueError(
            "`test_train` and `test` must be given both, or neither where `train` has arrays, got "
            f"{type(test_train).__name__} and {type(test).__name__}. Use infinite for each of them."
        )
    m, at, cross = n, None, None
    if test_train is not None and test is not None:
        m = (*np.shape(test.nngp), 1)[0]
        K_xX = _array("test_train", "nngp", test_train.nngp, (m, n))
        at = K_xX, _array("test", "nngp", test.nngp, (m, m))
        cross = K_xX if by == "nngp" else _array("test_train", "ntk", test_train.ntk, (m, n))

    columns, noise = y.reshape(n, -1), ridge if by == "nngp" else 0.0
    if products and at is not None and cross is not None:
        checks.known("train", (train, cross, at, y, ridge), "gp with operators")
        K = _operator("nngp", train.nngp, n)
        A = (K if by == "nngp" else _operator("ntk", train.ntk, n)) + ridge
        P = solve(
            A, cross.T, tolerance=tolerance, iterations=iterations, preconditioner=preconditioner
        ).x.T
        found = _at_test(P, columns, K @ P.T, noise, *at)
    else:
        K = _array("train", "nngp", train.nngp, (n, n))
        kernel = K if by == "nngp" else _array("train", "ntk", train.ntk, (n, n))
        P = _of_times(kernel, y, cross, t, learning_rate, ridge)
        if at is None:
            found = jax.vmap(lambda P: _at_train(P, columns, K, noise))(P)
        else:
            found = jax.vmap(lambda P: _at_test(P, columns, _dot(K, P.T), noise, *at))(P)
    mean, covariance = (jnp.broadcast_to(a, (np.size(t), *a.shape[-2:])) for a in found)
    return Posterior(
        mean.reshape(*np.shape(t), m, *y.shape[1:]), covariance.reshape(*np.shape(t), m, m)
    )
