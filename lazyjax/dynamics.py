"""Gradient descent and gradient flow of a tangent model in closed form.

With coefficients a, params(t) = params0 + J^T a(t), the outputs on the training points are
f0 + Theta a(t). In the eigenbasis of Theta every coefficient follows its own scalar recurrence (or
differential equation) from 0 towards -r0 / mu, r0 = f0 - y and mu = lambda + ridge: its law
(`laws`),

    a(t) = -r0 S(t),  S(t) = (1 - g(t)) / mu

What rounding explains of Theta, eigenvalues below N K eps lambda_max, is 0. A ridge below that
cannot be told from rounding: mu is 0 where lambda is.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lazyjax import checks, laws
from lazyjax.kernels import matrix
from lazyjax.laws import Law
from lazyjax.norms import asymmetry, eigh
from lazyjax.widening import widened

_FLOW = "gradient_flow"
_dot = partial(jnp.matmul, precision="highest")


def _in_eigenbasis(run: "Dynamics", t: jax.Array) -> jax.Array:
    """Compute the coefficients (*t.shape, M, columns) in the eigenbasis."""
    t = t.astype(run.f0.dtype)[..., None]
    nothing = (run.eigenvalues == 0) & (run.ridge < run.noise)
    q = run.law.rate * jnp.where(nothing, 0, run.eigenvalues + run.ridge)
    shape = (*t.shape[:-1], *q.shape)
    q, endless = jnp.broadcast_to(q, shape), jnp.broadcast_to(jnp.isinf(t), shape)
    finite = jnp.where(endless, 1, jnp.broadcast_to(t, shape))
    gap = run.law.gap(q, finite)
    limit = jnp.where(q == 0, 0, 1 / jnp.where(q == 0, 1, q))
    gap = run.law.rate * jnp.where(endless, limit, gap)
    residual = jnp.broadcast_to(run.residual, (*shape, run.residual.shape[1]))
    return -gap[..., None] * residual


def _seen(run: "Dynamics", t: jax.Array) -> jax.Array:
    """Give what outputs see of the coefficients, nothing where the eigenvalue is 0."""
    return jnp.where(run.eigenvalues[:, None] == 0, 0, _in_eigenbasis(run, t))


def _outputs(run: "Dynamics", values: jax.Array, n: int) -> jax.Array:
    return values.reshape(*values.shape[:-2], n, *run.f0.shape[1:])


@jax.jit
def _coefficients(run: "Dynamics", t: jax.Array) -> jax.Array:
    return _outputs(run, _dot(run.eigenvectors, _in_eigenbasis(run, t)), run.f0.shape[0])


@jax.jit
def _train(run: "Dynamics", t: jax.Array) -> jax.Array:
    moved = _dot(run.eigenvectors * run.eigenvalues[None], _seen(run, t))
    moved = _outputs(run, moved, run.f0.shape[0])
    return jnp.broadcast_to(run.f0, moved.shape) + moved


@jax.jit
def _test(
    run: "Dynamics", t: jax.Array, kernel_test_train: jax.Array, f0_test: jax.Array
) -> jax.Array:
    moved = _dot(matrix(kernel_test_train), _dot(run.eigenvectors, _seen(run, t)))
    moved = _outputs(run, moved, f0_test.shape[0])
    return jnp.broadcast_to(f0_test, moved.shape) + moved


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "eigenvalues",
        "eigenvectors",
        "residual",
        "f0",
        "law",
        "ridge",
        "noise",
    ],
    meta_fields=["shared"],
)
@dataclass(frozen=True)
class Dynamics:
    """The training of a tangent model in closed form; made by the two functions of this module.

    Attributes
    ----------
    eigenvalues : (M,)
        Of the kernel, M = N K (or N, where the kernel is the same for every output); those that
        rounding explains are exactly 0.
    eigenvectors : (M, M)
    residual : (M, columns)
        f0 - y in the eigenbasis.
    f0 : (N, *out)
        The outputs at the start.
    law : Descent or Flow
        Whether t is a number of steps or a time, and at which rate.
    ridge : ()
    noise : ()
        N K eps lambda_max; a ridge below it is none where the eigenvalue is 0.
    shared : bool
        Whether the kernel is (N, N), the same for every output.
    """

    eigenvalues: jax.Array
    eigenvectors: jax.Array
    residual: jax.Array
    f0: jax.Array
    law: Law
    ridge: jax.Array
    noise: jax.Array
    shared: bool

    def _times(self, t: Any) -> jax.Array:
        if checks.is_known((t, self.law, self.eigenvalues)):
            t = np.asarray(t)
            self.law.check(t, _FLOW)
            largest = np.asarray(self.eigenvalues)[-1] + np.asarray(self.ridge)
            laws.require_stable(self.law, t, largest, _FLOW)
        return jnp.asarray(t)

    def coefficients(self, t: Any) -> jax.Array:
        """Compute a(t), with params(t) = params0 + J^T a(t).

        Parameters
        ----------
        t : array of any shape
            Steps (whole, for gradient descent) or times (for the flow), 0 or more; infinity too.

        Returns
        -------
        (*t.shape, N, *out) array

        Raises
        ------
        ValueError
            If a time is negative, a step is not whole, or t is infinite above the critical
            learning rate.

        Notes
        -----
        In a direction of eigenvalue 0, with no ridge or one below the kernel's rounding, the
        coefficient grows as t, or as t / (1 - momentum), as in training; at t = infinity it is 0.
        """
        return _coefficients(self, self._times(t))

    def train(self, t: Any) -> jax.Array:
        """Compute the outputs on the training points, f0 + Theta a(t).

        Parameters
        ----------
        t : array of any shape
            As in `coefficients`.

        Returns
        -------
        (*t.shape, N, *out) array

        Raises
        ------
        ValueError
            As `coefficients`.
        """
        return _train(self, self._times(t))

    def test(self, t: Any, kernel_test_train: jax.Array, f0_test: jax.Array) -> jax.Array:
        """Compute the outputs on test points, f0_test + Theta_test,train a(t).

        Parameters
        ----------
        t : array of any shape
            As in `coefficients`.
        kernel_test_train : (M, N, *out, *out) or (M, N)
            As the kernel that the dynamics were made with.
        f0_test : (M, *out)

        Returns
        -------
        (*t.shape, M, *out) array

        Raises
        ------
        ValueError
            As `coefficients`, or if a shape does not fit.

        Notes
        -----
        Where Theta v = 0, Theta_test,train v is 0 too, and counts as that: its rounding is not
        multiplied by what may be a large coefficient.
        """
        kernel_test_train, f0_test = widened((kernel_test_train, f0_test))
        points, out = f0_test.shape[0], self.f0.shape[1:]
        n = self.f0.shape[0]
        if f0_test.shape[1:] != out:
            raise ValueError(
                f"`f0_test` must have shape (M, *{out}), got {f0_test.shape}. "
                "Pass f(params0, x_test)."
            )
        wanted = (points, n) if self.shared else (points, n, *out, *out)
        if kernel_test_train.shape != wanted:
            raise ValueError(
                f"`kernel_test_train` must have shape {wanted}, got {kernel_test_train.shape}. "
                "Use ntk(f, params0, x_test, x_train), reduced as the training kernel."
            )
        return _test(self, self._times(t), kernel_test_train, f0_test)


def warn_of_rounding(ridge: Any, noise: Any, *, stacklevel: int) -> None:
    """Warn where a ridge is below the rounding of a kernel that is singular to rounding."""
    if 0 < float(ridge) < float(noise):
        warnings.warn(
            f"`ridge` is {float(ridge):.1e}, below the rounding of the kernel, N K eps lambda_max "
            f"= {float(noise):.1e}: directions without an eigenvalue above that are taken as "
            "without ridge, and stay at f0. Use a larger ridge, or a kernel of more digits.",
            UserWarning,
            stacklevel=stacklevel,
        )


@jax.jit
def _decomposed(square: jax.Array, difference: jax.Array) -> tuple[jax.Array, ...]:
    """Give eigenvalues, eigenvectors, the difference (M, columns) in these, and the noise."""
    values, vectors = eigh(square)
    noise = difference.size * jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values))
    values = jnp.where(jnp.abs(values) < noise, 0, values)
    return values, vectors, _dot(vectors.T, difference), noise


def _make(
    kernel: ArrayLike,
    y: ArrayLike,
    f0: ArrayLike,
    *,
    law: Callable[[int, Any], Law],  # of the elements of y and of the dtype
    ridge: Any,
) -> Dynamics:
    checks.not_negative("ridge", ridge)
    kernel, y, f0 = jnp.asarray(kernel), jnp.asarray(y), jnp.asarray(f0)
    for name, value in (("kernel", kernel), ("y", y), ("f0", f0)):
        checks.floating(name, value)
        checks.finite(name, value)
    rounding = float(jnp.finfo(kernel.dtype).eps) ** 0.5
    kernel, y, f0 = (jnp.asarray(widened(a)) for a in (kernel, y, f0))
    if y.ndim < 1 or f0.shape != y.shape:
        column = f0.shape == (*y.shape, 1)
        cure = "Use y[:, None]." if column else "Pass f0 = f(params0, x) and its targets."
        raise ValueError(f"`y` must have the shape of `f0`, {f0.shape}, got {y.shape}. {cure}")
    n, out = y.shape[0], y.shape[1:]
    if kernel.shape not in ((n, n), (n, n, *out, *out)):
        raise ValueError(
            f"`kernel` must have shape {(n, n, *out, *out)} or {(n, n)}, got {kernel.shape}. "
            "Use ntk(f, params0, x) on the points of `y`."
        )
    own = law(y.size, kernel.dtype)
    square = matrix(kernel)
    if checks.is_known(square):
        skew = float(asymmetry(square))
        if skew > rounding:
            raise ValueError(
                f"`kernel` must be symmetric, got norm(K - K^T) / norm(K) = {skew:.1e}. Compute it "
                "with ntk(f, params0, x), x2=None, in full precision."
            )
    difference = (f0 - y).reshape(square.shape[0], -1)
    values, vectors, residual, noise = _decomposed(square, difference)
    ridge = jnp.asarray(ridge, values.dtype)
    if checks.is_known((values, ridge)) and bool(np.any(np.asarray(values) == 0)):
        warn_of_rounding(ridge, noise, stacklevel=4)
    return Dynamics(
        eigenvalues=values,
        eigenvectors=vectors,
        residual=residual,
        f0=f0,
        law=own,
        ridge=ridge,
        noise=noise,
        shared=kernel.ndim == 2,
    )


def gradient_descent(
    kernel: ArrayLike,
    y: ArrayLike,
    f0: ArrayLike,
    *,
    learning_rate: ArrayLike,
    momentum: ArrayLike = 0.0,
    ridge: ArrayLike = 0.0,
) -> Dynamics:
    """Solve full-batch gradient descent on a tangent model, for all steps at once.

    Loss: 1 / (N K) norm(f - y)^2 + ridge / (N K) norm(params - params0)^2. Step, without momentum:

    f <- f - (2 eta / (N K)) (Theta (f - y) + ridge (f - f0))

    Parameters
    ----------
    kernel : (N, N, *out, *out), or (N, N)
        Of the tangent model on the training points, K = prod(out); (N, N) where it is the same for
        every output and outputs do not mix.
    y : (N, *out)
        Targets.
    f0 : (N, *out)
        Outputs at the start.
    learning_rate : float
        eta, above 0.
    momentum : float
        Of the heavy ball, as in `optax.sgd(eta, momentum)`; in [0, 1).
    ridge : float
        0 or more, in the units of the kernel.

    Returns
    -------
    Dynamics
        With methods `train`, `test` and `coefficients` of the step t.

    Raises
    ------
    TypeError
        If an array holds no floats.
    ValueError
        If shapes do not fit, a value is not finite, the kernel is not symmetric, the learning rate
        is not positive, momentum is outside [0, 1), or the ridge is negative.

    Warns
    -----
    UserWarning
        If the kernel is singular to rounding and the ridge, not 0, below N K eps lambda_max.

    Notes
    -----
    O((N K)^3) once, then O((N K)^2) a time; in float32 at least. Eigenvalues of absolute value
    below N K eps lambda_max are rounding and exactly 0. Without a ridge, or with one below that,
    the coefficient of such a direction grows as its limit says, and is 0 at t = infinity; its
    outputs stay at f0, on test points too. With a larger ridge the limit is
    f0 + Theta_test,train (Theta + ridge I)^-1 (y - f0).

    References
    ----------
    Lee et al. 2019, equations 8-11, for the flow; Polyak 1964 for the heavy ball.

    Examples
    --------
    >>> run = gradient_descent(
    ...     jnp.eye(2), jnp.ones((2, 1)), jnp.zeros((2, 1)), learning_rate=0.5
    ... )
    >>> run.train(jnp.array([0, 1, 2]))[:, 0, 0].tolist()
    [0.0, 0.5, 0.75]
    """
    law = partial(laws.descent, learning_rate, momentum)
    return _make(kernel, y, f0, law=law, ridge=ridge)


def gradient_flow(
    kernel: ArrayLike, y: ArrayLike, f0: ArrayLike, *, ridge: ArrayLike = 0.0
) -> Dynamics:
    """Solve gradient flow on a tangent model, for all times at once.

    df/dt = -(2 / (N K)) (Theta (f - y) + ridge (f - f0))

    Parameters
    ----------
    kernel, y, f0, ridge
        As in `gradient_descent`.

    Returns
    -------
    Dynamics
        With methods `train`, `test` and `coefficients` of the time t; descent of learning rate eta
        is near t = eta times its step.

    Raises
    ------
    TypeError
        If an array holds no floats.
    ValueError
        If shapes do not fit, a value is not finite, the kernel is not symmetric, or the ridge is
        negative.

    Warns
    -----
    UserWarning
        As `gradient_descent`.

    References
    ----------
    Jacot, Gabriel, Hongler 2018, section 5; Lee et al. 2019, equations 8-11.
    """
    return _make(kernel, y, f0, law=laws.flow, ridge=ridge)
