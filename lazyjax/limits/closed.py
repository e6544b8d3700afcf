"""Expectations of activations in closed form, and how an activation is recognised.

A family knows, of phi and psi in it and (z, z') Gaussian with variances k11, k22 and covariance
k12: `mean` E phi(z), `second` E phi(z) psi(z'), and the same of the derivatives: `slope`, `dual`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Covariances = tuple[jax.Array, jax.Array, jax.Array]
"""k11, k12, k22."""


def _rest(k: Covariances) -> jax.Array:
    """Give sqrt(k11 k22 - k12^2), 0 where rounding explains it."""
    k11, k12, k22 = k
    product = k11 * k22
    rest = product - jnp.square(k12)
    return jnp.sqrt(jnp.where(rest > 8 * jnp.finfo(rest.dtype).eps * product, rest, 0))


class Piecewise(NamedTuple):
    """a z above 0 and b z below: ReLU, leaky ReLU, abs. Cho and Saul 2009, equations 1-6."""

    a: float
    b: float

    def _parts(self) -> tuple[float, float]:  # phi = alpha z + beta abs(z)
        return (self.a + self.b) / 2, (self.a - self.b) / 2

    def mean(self, k: jax.Array) -> jax.Array:
        """Compute E phi(z)."""
        return (self.a - self.b) * jnp.sqrt(k / (2 * np.pi))

    def slope(self, k: jax.Array) -> jax.Array:
        """Compute E phi'(z)."""
        return jnp.full_like(k, self._parts()[0])

    def second(self, other: "Piecewise", k: Covariances) -> jax.Array:
        """Compute E phi(z) psi(z')."""
        (alpha, beta), (gamma, delta) = self._parts(), other._parts()
        rest = _rest(k)
        sizes = 2 / np.pi * (rest + k[1] * jnp.arctan2(k[1], rest))
        return alpha * gamma * k[1] + beta * delta * sizes

    def dual(self, other: "Piecewise", k: Covariances) -> jax.Array:
        """Compute E phi'(z) psi'(z')."""
        (alpha, beta), (gamma, delta) = self._parts(), other._parts()
        return alpha * gamma + beta * delta * 2 / np.pi * jnp.arctan2(k[1], _rest(k))


def _moment(a: int, b: int, k: Covariances) -> Any:
    """Compute E z^a z'^b (Isserlis 1918)."""
    if (a + b) % 2:
        return 0.0
    total = jnp.zeros_like(k[1])
    for j in range(a % 2, min(a, b) + 1, 2):
        left, right = (a - j) // 2, (b - j) // 2
        count = math.factorial(a) * math.factorial(b) / math.factorial(j)
        count /= math.factorial(left) * math.factorial(right) * 2 ** (left + right)
        total = total + count * k[0] ** left * k[1] ** j * k[2] ** right
    return total


class Polynomial(NamedTuple):
    """sum_p c_p z^p."""

    coefficients: tuple[float, ...]

    def derivative(self) -> "Polynomial":
        """Give the derivative."""
        return Polynomial(tuple(p * c for p, c in enumerate(self.coefficients) if p) or (0.0,))

    def mean(self, k: jax.Array) -> jax.Array:
        """Compute E phi(z)."""
        one = jnp.ones_like(k)
        return self.second(Polynomial((1.0,)), (k, 0 * k, one))

    def slope(self, k: jax.Array) -> jax.Array:
        """Compute E phi'(z)."""
        return self.derivative().mean(k)

    def second(self, other: "Polynomial", k: Covariances) -> jax.Array:
        """Compute E phi(z) psi(z')."""
        total = jnp.zeros(jnp.broadcast_shapes(*(v.shape for v in k)), k[1].dtype)
        for a, c in enumerate(self.coefficients):
            for b, d in enumerate(other.coefficients):
                if c and d:
                    total = total + c * d * _moment(a, b, k)
        return total

    def dual(self, other: "Polynomial", k: Covariances) -> jax.Array:
        """Compute E phi'(z) psi'(z')."""
        return self.derivative().second(other.derivative(), k)


class Erf(NamedTuple):
    """c erf(z). Williams 1997, equation 11."""

    c: float

    def mean(self, k: jax.Array) -> None:
        """Give none: it is 0."""

    def slope(self, k: jax.Array) -> jax.Array:
        """Compute E phi'(z)."""
        return self.c * 2 / np.sqrt(np.pi) / jnp.sqrt(1 + 2 * k)

    def second(self, other: "Erf", k: Covariances) -> jax.Array:
        """Compute E phi(z) psi(z')."""
        product = (1 + 2 * k[0]) * (1 + 2 * k[2])
        return self.c * other.c * 2 / np.pi * jnp.arcsin(2 * k[1] / jnp.sqrt(product))

    def dual(self, other: "Erf", k: Covariances) -> jax.Array:
        """Compute E phi'(z) psi'(z')."""
        product = (1 + 2 * k[0]) * (1 + 2 * k[2])
        return self.c * other.c * 4 / np.pi / jnp.sqrt(product - 4 * jnp.square(k[1]))


class Wave(NamedTuple):
    """c sin(z), or c cos(z). Rahimi and Recht 2007; Pearce et al. 2019."""

    c: float
    even: bool

    def mean(self, k: jax.Array) -> jax.Array | None:
        """Compute E phi(z)."""
        return self.c * jnp.exp(-k / 2) if self.even else None

    def slope(self, k: jax.Array) -> jax.Array | None:
        """Compute E phi'(z)."""
        return None if self.even else self.c * jnp.exp(-k / 2)

    def _sum(self, other: "Wave", k: Covariances, even: bool) -> Any:
        if self.even != other.even:
            return 0.0
        half = -(k[0] + k[2]) / 2
        sign = 1 if even else -1
        return self.c * other.c / 2 * (jnp.exp(half + k[1]) + sign * jnp.exp(half - k[1]))

    def second(self, other: "Wave", k: Covariances) -> Any:
        """Compute E phi(z) psi(z')."""
        return self._sum(other, k, self.even)

    def dual(self, other: "Wave", k: Covariances) -> Any:
        """Compute E phi'(z) psi'(z')."""
        return self._sum(other, k, not self.even)


class Gelu(NamedTuple):
    """c z Phi(z), Phi the normal distribution. Tsuchida et al. 2021, by integration by parts."""

    c: float

    def mean(self, k: jax.Array) -> jax.Array:
        """Compute E phi(z)."""
        return self.c * k / jnp.sqrt(2 * np.pi * (1 + k))

    def slope(self, k: jax.Array) -> jax.Array:
        """Compute E phi'(z)."""
        return jnp.full_like(k, self.c / 2)

    def _both(self, k: Covariances) -> tuple[jax.Array, jax.Array, jax.Array]:
        k11, k12, k22 = k
        product = (1 + k11) * (1 + k22)
        d = product - jnp.square(k12)
        p = 1 / 4 + jnp.arcsin(k12 / jnp.sqrt(product)) / (2 * np.pi)  # E Phi Phi'
        return p, 1 / (2 * np.pi * jnp.sqrt(d)), d  # and E phi phi', phi the density

    def second(self, other: "Gelu", k: Covariances) -> jax.Array:
        """Compute E phi(z) psi(z')."""
        k11, k12, k22 = k
        p, q, _ = self._both(k)
        inside = k11 * (k22 - jnp.square(k12) / (1 + k11)) + jnp.square(k12) / (1 + k22)
        return self.c * other.c * (inside * q + k12 * p)

    def dual(self, other: "Gelu", k: Covariances) -> jax.Array:
        """Compute E phi'(z) psi'(z')."""
        k11, k12, k22 = k
        p, q, d = self._both(k)
        return self.c * other.c * (p + k12 * q * (1 / (1 + k11) + 1 / (1 + k22) + 1 / d))


Family = Piecewise | Polynomial | Erf | Wave | Gelu

_COPIES = {"neg", "add", "sub", "mul", "div", "copy", "convert_element_type"}
_LINEAR_PIECES = _COPIES | {"max", "min", "abs", "select_n", "gt", "ge", "lt", "le", "sign"}
_LINEAR_PIECES |= {"clamp"}
_SMOOTH = _COPIES | {"erf", "erfc", "sin", "cos"}


def _gelu(z: np.ndarray) -> np.ndarray:
    return z * np.array([math.erfc(-v / math.sqrt(2)) / 2 for v in z])


_KINDS: tuple[tuple[Callable[[np.ndarray], np.ndarray], Callable[[float], Family]], ...] = (
    (lambda z: np.array([math.erf(v) for v in z]), Erf),
    (np.sin, lambda c: Wave(c, False)),
    (np.cos, lambda c: Wave(c, True)),
    (_gelu, Gelu),
)


def recognise(function: Callable[[Any], Any], names: set[str]) -> Family | None:
    """Find the family of a function of one variable that is made of some primitives.

    Its values tell: where it is made of what has linear pieces, that it is linear on either side of
    0 at all scales; where of what is smooth, that it is one of the functions of the table.
    """
    with jax.ensure_compile_time_eval():
        near = 64 * float(jnp.finfo(function(jnp.zeros(1)).dtype).eps)

    def values(z: np.ndarray) -> np.ndarray:
        with jax.ensure_compile_time_eval():
            return np.broadcast_to(np.asarray(function(jnp.asarray(z)), float), z.shape)

    if names <= _LINEAR_PIECES:
        sizes = np.logspace(-6, 6, 49)  # 1 in the middle
        up, down = values(sizes) / sizes, values(-sizes) / -sizes
        if all(np.ptp(side) <= near * np.max(np.abs(side)) for side in (up, down)):
            return Piecewise(float(up[24]), float(down[24]))
    if names <= _SMOOTH:
        z = np.linspace(-4, 4, 65)  # numbers that float32 has
        found = values(z)
        for kind, make in _KINDS:
            known = kind(z)
            c = float(found @ known / (known @ known))
            if np.max(np.abs(found - c * known)) <= near * np.max(np.abs(found)):
                short = float(f"{c:.6g}")
                return make(short if abs(c - short) <= near * abs(c) else c)
    return None
