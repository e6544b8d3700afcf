"""Gradient descent and gradient flow of a tangent model in closed form.

With coefficients a, params(t) = params0 + J^T a(t), the outputs on the training points are
f0 + Theta a(t). In the eigenbasis of Theta every coefficient follows its own scalar recurrence (or
differential equation) from 0 towards -r0 / mu, r0 = f0 - y and mu = lambda + ridge:

    a(t) = -r0 S(t),  S(t) = (1 - g(t)) / mu

with g(t) = (1 - c mu)^t for descent, c = 2 eta / (N K), exp(-c mu t) for the flow, c = 2 / (N K).
S is computed without cancellation, and has the limit of the formula at mu = 0.

What rounding explains of Theta, eigenvalues below N K eps lambda_max, is 0. A ridge below that
cannot be told from rounding: mu is 0 where lambda is.
"""

import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lazyjax import checks
from lazyjax.kernels import matrix
from lazyjax.norms import eigh, norm, widened

_dot = partial(jnp.matmul, precision="highest")


def _power_gap(p: jax.Array, t: jax.Array) -> jax.Array:
    """Compute 1 - (1 - p)^t for whole t; right for small p, and for p > 1."""
    below = jnp.where(p < 1, p, 0.5)
    above = jnp.where(p > 1, p, 1.5)
    sign = 1 - 2 * jnp.mod(t, 2)
    gap_below = -jnp.expm1(t * jnp.log1p(-below))
    gap_above = 1 - sign * jnp.exp(t * jnp.log(above - 1))
    return jnp.where(p == 1, jnp.where(t > 0, 1.0, 0.0), jnp.where(p < 1, gap_below, gap_above))


def _descent_gap(q: jax.Array, t: jax.Array) -> jax.Array:
    """Compute (1 - (1 - q)^t) / q, which is t at q = 0."""
    safe = jnp.where(q == 0, 1, q)
    return jnp.where(q == 0, t, _power_gap(safe, t) / safe)


def _heavy_ball_gap(q: jax.Array, t: jax.Array, momentum: jax.Array) -> jax.Array:
    """Compute (1 - g_t) / q, g_{t+1} = (1 + beta - q) g_t - beta g_{t-1}, g_0 = g_{-1} = 1.

    The roots of z^2 - (1 + beta - q) z + beta are 1 - p and 1 - p', with p + p' = 1 - beta + q and
    p p' = q. Where they are real and apart, g_t is a sum of their powers; where they are complex,
    and near a double root, g_t = S_{t+1} - beta S_t, S_t = (z^t - z'^t) / (z - z') being smooth.
    """
    beta = momentum
    total = 1 - beta + q
    root_beta = jnp.sqrt(beta)
    discriminant = (jnp.square(1 - root_beta) - q) * (jnp.square(1 + root_beta) - q)
    apart = discriminant > 1e-2 * jnp.square(total)

    # two real roots: z_small = 1 - p_small near 1, and the other
    difference = jnp.sqrt(jnp.where(apart, discriminant, 1.0))
    p_small = 2 * q / (total + difference)
    p_large = total - p_small
    safe = jnp.where(q == 0, 1, q)
    slow = jnp.where(q == 0, t / (1 - beta), _power_gap(jnp.where(q == 0, 0.5, p_small), t) / safe)
    fast = _power_gap(jnp.where(apart, p_large, 0.5), t)
    # B / q, with B = -(1 - p_large) p_small / difference: p_small / q = 1 / p_large
    real = ((1 - p_small) * p_large * slow - (1 - p_large) / p_large * fast) / difference

    # z = sqrt(beta) exp(+- i theta), or a real double root of either sign
    half = (1 + beta - q) / 2  # sqrt(beta) cos(theta)
    sine = jnp.sqrt(jnp.maximum(-discriminant, 0.0)) / 2  # sqrt(beta) sin(theta)
    turned = jnp.arctan2(sine, jnp.abs(half))  # theta, or pi - theta where half < 0
    stretch = jnp.sqrt(jnp.maximum(discriminant, 0.0)) / 2 / jnp.where(beta > 0, root_beta, 1)
    delta = jnp.arcsinh(stretch)  # z = +- sqrt(beta) exp(+- delta), slightly apart

    def ratio(n: jax.Array) -> jax.Array:  # S_n
        sign = jnp.where(half < 0, 1 - 2 * jnp.mod(n - 1, 2), 1.0)
        small = (turned < 1e-9) & (delta < 1e-9)
        oscillating = jnp.sin(n * turned) / jnp.where(turned < 1e-9, 1, jnp.sin(turned))
        stretched = jnp.sinh(n * delta) / jnp.where(delta < 1e-9, 1, jnp.sinh(delta))
        value = jnp.where(small, n, jnp.where(discriminant > 0, stretched, oscillating))
        return sign * value * jnp.exp((n - 1) * jnp.log(jnp.where(beta > 0, root_beta, 1)))

    g = ratio(t + 1) - beta * ratio(t)
    complex_ = (1 - g) / safe
    plain = _descent_gap(q, t)
    return jnp.where(beta == 0, plain, jnp.where(apart, real, complex_))


def _flow_gap(q: jax.Array, t: jax.Array) -> jax.Array:
    """Compute (1 - exp(-q t)) / q, which is t at q = 0."""
    safe = jnp.where(q == 0, 1, q)
    return jnp.where(q == 0, t, -jnp.expm1(-safe * t) / safe)


@jax.jit
def _in_eigenbasis(run: "Dynamics", t: jax.Array) -> jax.Array:
    """Compute the coefficients (*t.shape, M, columns) in the eigenbasis."""
    t = t.astype(run.f0.dtype)[..., None]
    nothing = (run.eigenvalues == 0) & (run.ridge < run.noise)
    q = run.rate * jnp.where(nothing, 0, run.eigenvalues + run.ridge)
    shape = (*t.shape[:-1], *q.shape)
    q, endless = jnp.broadcast_to(q, shape), jnp.broadcast_to(jnp.isinf(t), shape)
    finite = jnp.where(endless, 1, jnp.broadcast_to(t, shape))
    descent = partial(_heavy_ball_gap, momentum=run.momentum)
    gap = (_flow_gap if run.continuous else descent)(q, finite)
    limit = jnp.where(q == 0, 0, 1 / jnp.where(q == 0, 1, q))
    gap = run.rate * jnp.where(endless, limit, gap)
    residual = jnp.broadcast_to(run.residual, (*shape, run.residual.shape[1]))
    return -gap[..., None] * residual


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "eigenvalues",
        "eigenvectors",
        "residual",
        "f0",
        "rate",
        "momentum",
        "ridge",
        "noise",
        "largest",
    ],
    meta_fields=["continuous", "shared"],
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
    rate : ()
        c, 2 eta / (N K) for descent and 2 / (N K) for the flow.
    momentum, ridge : ()
    noise : ()
        N K eps lambda_max; a ridge below it is none where the eigenvalue is 0.
    largest : ()
        Largest stable value of rate (lambda_max + ridge).
    continuous : bool
        Whether t is a time (flow) or a number of steps.
    shared : bool
        Whether the kernel is (N, N), the same for every output.
    """

    eigenvalues: jax.Array
    eigenvectors: jax.Array
    residual: jax.Array
    f0: jax.Array
    rate: jax.Array
    momentum: jax.Array
    ridge: jax.Array
    noise: jax.Array
    largest: jax.Array
    continuous: bool
    shared: bool

    def _solve(self, t: Any) -> jax.Array:
        self._check_time(t)
        return _in_eigenbasis(self, jnp.asarray(t))

    def _seen(self, t: Any) -> jax.Array:
        """Give what outputs see of the coefficients, nothing where the eigenvalue is 0."""
        return jnp.where(self.eigenvalues[:, None] == 0, 0, self._solve(t))

    def _check_time(self, t: Any) -> None:
        if not checks.is_known((t, self.rate, self.eigenvalues)):
            return
        t = np.asarray(t)
        if np.any(np.isnan(t)) or np.any(t < 0):
            raise ValueError(f"`t` must be 0 or more, got {t}. Training starts at 0.")
        if self.continuous:
            return
        steps = t[np.isfinite(t)]
        if np.any(steps != np.floor(steps)):
            raise ValueError(
                f"`t` must be whole steps of gradient descent, got {t}. "
                "Use np.rint(t), or gradient_flow for times."
            )
        product = float(self.rate * (self.eigenvalues[-1] + self.ridge))
        if np.any(np.isinf(t)) and product > float(self.largest):
            raise ValueError(
                "`t` must be finite above the critical learning rate, where gradient descent "
                f"diverges, got infinity at {product / float(self.largest):.3g} times that rate. "
                "Lower `learning_rate`, or use gradient_flow."
            )

    def _out(self, values: jax.Array, n: int) -> jax.Array:
        return values.reshape(*values.shape[:-2], n, *self.f0.shape[1:])

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
        return self._out(_dot(self.eigenvectors, self._solve(t)), self.f0.shape[0])

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
        moved = _dot(self.eigenvectors * self.eigenvalues[None], self._seen(t))
        moved = self._out(moved, self.f0.shape[0])
        return jnp.broadcast_to(self.f0, moved.shape) + moved

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
        square = matrix(kernel_test_train)
        moved = self._out(_dot(square, _dot(self.eigenvectors, self._seen(t))), points)
        return jnp.broadcast_to(f0_test, moved.shape) + moved


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


def _make(
    kernel: ArrayLike,
    y: ArrayLike,
    f0: ArrayLike,
    *,
    eta: Any,
    momentum: Any,
    ridge: Any,
    continuous: bool,
) -> Dynamics:
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
    square = matrix(kernel)
    if checks.is_known(square):
        skew = float(norm(square - square.T))
        if skew > rounding * float(norm(square)):
            raise ValueError(
                f"`kernel` must be symmetric, got norm(K - K^T) = {skew:.1e}. Compute it with "
                "ntk(f, params0, x), x2=None, in full precision."
            )
    values, vectors = eigh(square)
    noise = y.size * jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values))
    ridge = jnp.asarray(ridge, values.dtype)
    values = jnp.where(jnp.abs(values) < noise, 0, values)
    if checks.is_known((values, ridge)) and bool(jnp.any(values == 0)):
        warn_of_rounding(ridge, noise, stacklevel=4)
    momentum = jnp.asarray(momentum, values.dtype)
    return Dynamics(
        eigenvalues=values,
        eigenvectors=vectors,
        residual=_dot(vectors.T, (f0 - y).reshape(square.shape[0], -1)),
        f0=f0,
        rate=jnp.asarray(2 * eta / y.size, values.dtype),
        momentum=momentum,
        ridge=ridge,
        noise=noise,
        largest=2 * (1 + momentum),
        continuous=continuous,
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
    checks.positive("learning_rate", learning_rate)
    checks.not_negative("ridge", ridge)
    if checks.is_known(momentum) and not 0 <= float(np.asarray(momentum)) < 1:
        raise ValueError(f"`momentum` must be in [0, 1), got {momentum}. Use 0.9.")
    return _make(kernel, y, f0, eta=learning_rate, momentum=momentum, ridge=ridge, continuous=False)


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
    checks.not_negative("ridge", ridge)
    return _make(kernel, y, f0, eta=1.0, momentum=0.0, ridge=ridge, continuous=True)
