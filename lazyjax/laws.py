"""The laws by which a coefficient of a tangent model follows its eigenvalue in training.

With mu = lambda + ridge it goes from 0 towards -r0 / mu as -r0 S(t), S(t) = (1 - g(t)) / mu, with
g(t) = (1 - c mu)^t for gradient descent without momentum and exp(-c mu t) for the flow. A law is a
record with the rate c, which knows

- `gap(q, t)`, (1 - g(t)) / q at q = c mu: without cancellation, and with its limit at q = 0;
- `limit`, the largest q at which it does not diverge;
- `check(t, flow)`: which times it has; `flow` names what has those of the flow.

Adding a law is adding its record, and the function that makes one from what users know.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lazyjax import checks


def check_momentum(momentum: Any) -> None:
    """Require a momentum in [0, 1)."""
    if checks.is_known(momentum) and not 0 <= float(np.asarray(momentum)) < 1:
        raise ValueError(f"`momentum` must be in [0, 1), got {momentum}. Use 0.9.")


def _check_start(t: np.ndarray) -> None:
    if np.any(np.isnan(t)) or np.any(t < 0):
        raise ValueError(f"`t` must be 0 or more, got {t}. Training starts at 0.")


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


class Descent(NamedTuple):
    """Full-batch gradient descent, with a heavy ball; t counts steps.

    Polyak 1964.
    """

    rate: jax.Array  # c = 2 eta / (N K)
    momentum: jax.Array

    @property
    def limit(self) -> jax.Array:
        """The largest q at which it does not diverge."""
        return 2 * (1 + self.momentum)

    def gap(self, q: jax.Array, t: jax.Array) -> jax.Array:
        """Compute (1 - g(t)) / q."""
        return _heavy_ball_gap(q, t, self.momentum)

    def check(self, t: np.ndarray, flow: str) -> None:
        """Require whole steps."""
        _check_start(t)
        steps = t[np.isfinite(t)]
        if np.any(steps != np.floor(steps)):
            raise ValueError(
                f"`t` must be whole steps of gradient descent, got {t}. "
                f"Use np.rint(t), or {flow} for times."
            )


class Flow(NamedTuple):
    """Gradient flow; t is a time, eta times the steps of a small learning rate."""

    rate: jax.Array  # c = 2 / (N K)

    @property
    def limit(self) -> float:
        """The largest q at which it does not diverge."""
        return np.inf

    def gap(self, q: jax.Array, t: jax.Array) -> jax.Array:
        """Compute (1 - g(t)) / q."""
        return _flow_gap(q, t)

    def check(self, t: np.ndarray, flow: str) -> None:
        """Require times of 0 or more."""
        _check_start(t)


Law = Descent | Flow


def descent(learning_rate: Any, momentum: Any, elements: int, dtype: DTypeLike) -> Descent:
    """Give the law of descent on the mean squared error over N K elements, without 1/2."""
    checks.positive("learning_rate", learning_rate)
    check_momentum(momentum)
    rate = 2 * learning_rate / elements
    return Descent(jnp.asarray(rate, dtype), jnp.asarray(momentum, dtype))


def flow(elements: int, dtype: DTypeLike) -> Flow:
    """Give the law of the flow of that loss."""
    return Flow(jnp.asarray(2 / elements, dtype))


def require_stable(law: Law, t: np.ndarray, largest: Any, flow: str) -> None:
    """Refuse an infinite time where the largest mu makes a law diverge."""
    if not np.any(np.isinf(t)):
        return
    times = float(law.rate * largest) / float(law.limit)
    if times > 1:
        raise ValueError(
            "`t` must be finite above the critical learning rate, where gradient descent diverges, "
            f"got infinity at {times:.3g} times that rate. Lower `learning_rate`, or use {flow}."
        )
