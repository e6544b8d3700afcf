"""A kernel as a linear operator: known by its products, never by its entries.

`scale * base + shift * I`, where the base is the kernel itself. Vectors are those of `matrix`: row
n K + k is output k of example n, as in y.reshape(-1).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike, DTypeLike

from lazyjax import checks
from lazyjax.blocks import in_blocks
from lazyjax.kernels import matrix
from lazyjax.meshes import alike, in_any_program, zeros
from lazyjax.norms import asymmetry
from lazyjax.widening import widened

_AT_ONCE = 64  # rows that are held at once for a diagonal


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["product", "transposed", "rows", "entries", "scale", "shift"],
    meta_fields=["shape", "dtype", "outputs", "psd"],
)
@dataclass(frozen=True)
class KernelOperator:
    """A linear map (N1 K, N2 K); made by `ntk_operator` or `as_operator`.

    `A @ v` with v (N2 K,) or a block (N2 K, B), `v @ A`, `A.T`, `A + c` and `A - c` (c times the
    identity), `c * A`, `A / c`, and `A @ B` with another operator. It travels through `jit` and
    `vmap`.

    Attributes
    ----------
    product : Partial
        (N2 K, B) -> (N1 K, B), of the base.
    transposed : Partial
        (N1 K, B) -> (N2 K, B), likewise.
    rows : Partial or None
        Indices of examples (r,) -> those rows of the base, (r K, N2 K); None if it has to multiply
        by unit vectors for them.
    entries : Partial or None
        () -> the diagonal of the base (N1 K,), of a square one; None if it has to be read from
        rows.
    scale, shift : ()
        The operator is scale * base + shift * I.
    shape : pair of int
    dtype : dtype
        float32 or more.
    outputs : int
        K, the rows that an example has.
    psd : bool
        Whether the base is symmetric and positive semi-definite, as the kernel of a batch with
        itself is, and the scale not negative; then `shift` is a lower bound of the spectrum.
    """

    product: Partial
    transposed: Partial
    rows: Partial | None
    entries: Partial | None
    scale: jax.Array
    shift: jax.Array
    shape: tuple[int, int]
    dtype: np.dtype
    outputs: int
    psd: bool

    __array_ufunc__ = None  # so that a numpy array leaves `v @ A` and `c * A` to this class

    def _applied(self, product: Callable[[jax.Array], jax.Array], size: int, v: Any) -> jax.Array:
        v = alike(jnp.asarray(v), self)
        if v.ndim not in (1, 2) or v.shape[0] != size:
            raise ValueError(
                f"`v` must have shape ({size},) or ({size}, B), got {v.shape}. "
                "Use y.reshape(-1) for values y (N, *out)."
            )
        v = v.astype(self.dtype)
        block = v[:, None] if v.ndim == 1 else v
        result = self.scale * product(block)
        if self.shape[0] == self.shape[1]:
            result = result + self.shift * block
        return result.reshape(result.shape[0], *v.shape[1:])

    @in_any_program()
    def __matmul__(self, other: Any) -> Any:
        """Multiply a vector, a block of vectors, or another operator."""
        if isinstance(other, KernelOperator):
            return _composed(self, other)
        return self._applied(self.product, self.shape[1], other)

    def __rmatmul__(self, other: Any) -> jax.Array:
        """Multiply a vector (N1 K,) or rows (B, N1 K) from the left."""
        return (self.T @ jnp.asarray(other).T).T

    def __add__(self, shift: ArrayLike) -> "KernelOperator":
        """Add a multiple of the identity."""
        if self.shape[0] != self.shape[1]:
            raise ValueError(
                f"`shift` must be added to a square operator, got shape {self.shape}. "
                "Use the kernel of a batch with itself."
            )
        return replace(self, shift=self.shift + _number("shift", shift, self.dtype))

    def __sub__(self, shift: ArrayLike) -> "KernelOperator":
        """Subtract a multiple of the identity."""
        return self + (-_number("shift", shift, self.dtype))

    def __mul__(self, factor: ArrayLike) -> "KernelOperator":
        """Multiply by a number."""
        c = _number("factor", factor, self.dtype)
        psd = self.psd and checks.is_known(c) and bool(c >= 0)
        return replace(self, scale=c * self.scale, shift=c * self.shift, psd=psd)

    def __truediv__(self, divisor: ArrayLike) -> "KernelOperator":
        """Divide by a number."""
        return self * (1 / _number("divisor", divisor, self.dtype))

    __radd__, __rmul__ = __add__, __mul__

    @property
    def T(self) -> "KernelOperator":
        """The transpose."""
        if self.psd:
            return self
        return replace(
            self,
            product=self.transposed,
            transposed=self.product,
            rows=None,
            shape=self.shape[::-1],
        )

    def rows_of(self, examples: jax.Array) -> jax.Array:
        """Compute the rows of some examples, those of scale * base.

        Parameters
        ----------
        examples : (r,)
            Whole numbers from 0 to N1 - 1.

        Returns
        -------
        (r K, N2 K) array
            Without the shift.

        Notes
        -----
        By `rows`; where there are none, by a product with r K unit vectors.
        """
        if self.rows is not None:
            return self.scale * self.rows(examples).astype(self.dtype)
        at = rows_at(examples, self.outputs)
        units = zeros((self.shape[0], at.size), self.scale).at[at, jnp.arange(at.size)].set(1)
        return self.scale * self.transposed(units).T

    @in_any_program()
    def diagonal(self) -> jax.Array:
        """Compute the diagonal of scale * base + shift * I, exactly.

        Returns
        -------
        (N1 K,) array

        Raises
        ------
        ValueError
            If the operator is not square.

        Notes
        -----
        From `entries`, where there are any. Otherwise from the rows of a few examples after the
        others, up to 64 rows at once: all entries are computed, 64 N2 K of them held. Runs under
        `jit`.

        Examples
        --------
        >>> (2 * as_operator(jnp.diag(jnp.array([1.0, 3.0]))) + 0.5).diagonal().tolist()
        [2.5, 6.5]
        """
        if self.shape[0] != self.shape[1]:
            raise ValueError(
                f"`diagonal` must be of a square operator, got shape {self.shape}. "
                "Use the kernel of a batch with itself."
            )
        if self.entries is not None:
            return self.scale * self.entries().astype(self.dtype) + self.shift

        def own(examples: jax.Array) -> jax.Array:
            at = rows_at(examples, self.outputs)
            return self.rows_of(examples)[jnp.arange(at.size), at].reshape(-1, self.outputs)

        n = self.shape[0] // self.outputs
        examples = alike(jnp.arange(n), self)
        return in_blocks(own, examples, max(1, _AT_ONCE // self.outputs)).reshape(-1) + self.shift


def rows_at(examples: jax.Array, outputs: int) -> jax.Array:
    """Give the numbers of the rows (r K,) of some examples."""
    every = alike(jnp.arange(outputs), examples)
    return (examples[:, None] * outputs + every[None]).reshape(-1)


def _number(name: str, value: ArrayLike, dtype: DTypeLike) -> jax.Array:
    if np.ndim(value):
        raise ValueError(f"`{name}` must be a number, got shape {np.shape(value)}. Use one value.")
    return jnp.asarray(value, dtype)


def _after(first: KernelOperator, second: KernelOperator, v: jax.Array) -> jax.Array:
    return second @ (first @ v)


def _composed(left: KernelOperator, right: KernelOperator) -> KernelOperator:
    if left.shape[1] != right.shape[0]:
        raise ValueError(
            f"`other` must have {left.shape[1]} rows, got shape {right.shape}. "
            "Compose operators that share their examples."
        )
    return operator(
        Partial(_after, right, left),
        Partial(_after, left.T, right.T),
        shape=(left.shape[0], right.shape[1]),
        dtype=jnp.promote_types(left.dtype, right.dtype),
    )


def operator(
    product: Callable[[jax.Array], jax.Array],
    transposed: Callable[[jax.Array], jax.Array],
    *,
    shape: tuple[int, int],
    dtype: DTypeLike,
    rows: Callable[[jax.Array], jax.Array] | None = None,
    entries: Callable[[], jax.Array] | None = None,
    outputs: int = 1,
    psd: bool = False,
) -> KernelOperator:
    """Make an operator of products with blocks of vectors.

    Parameters
    ----------
    product, transposed, rows, entries, shape, dtype, outputs, psd
        As the attributes of `KernelOperator`; functions that are no `Partial` become one. Of less
        than float32, the dtype becomes float32: what the functions give is widened.

    Returns
    -------
    KernelOperator
        With scale 1 and shift 0.
    """
    dtype = jnp.promote_types(dtype, jnp.float32)  # sums and norms of vectors are taken in it

    def travelling(function: Any) -> Partial:
        return function if isinstance(function, Partial) else Partial(function)

    return KernelOperator(
        product=travelling(product),
        transposed=travelling(transposed),
        rows=None if rows is None else travelling(rows),
        entries=None if entries is None else travelling(entries),
        scale=jnp.ones((), dtype),
        shift=jnp.zeros((), dtype),
        shape=shape,
        dtype=np.dtype(dtype),
        outputs=outputs,
        psd=psd,
    )


def require_operator(name: str, A: Any) -> KernelOperator:
    """Require an operator."""
    if not isinstance(A, KernelOperator):
        raise TypeError(
            f"`{name}` must be a KernelOperator, got {type(A).__name__}. Use as_operator(kernel)."
        )
    return A


def require_symmetric(A: Any) -> KernelOperator:
    """Require an operator that is symmetric and positive semi-definite."""
    if not require_operator("A", A).psd:
        raise ValueError(
            "`A` must be symmetric and positive semi-definite, got an operator of shape "
            f"{A.shape} that is not known to be. Use the kernel of a batch with itself."
        )
    return A


@jax.jit
def _array_product(square: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.matmul(square, v, precision="highest")


@jax.jit
def _array_transposed(square: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.matmul(square.T, v, precision="highest")


@jax.jit
def _array_diagonal(square: jax.Array) -> jax.Array:
    return jnp.diagonal(square)


class _ArrayRows(NamedTuple):
    """The rows of some examples, as a static function; equal ones compile once."""

    outputs: int

    def __call__(self, square: jax.Array, examples: jax.Array) -> jax.Array:
        return square[rows_at(examples, self.outputs)]


def as_operator(kernel: ArrayLike, *, ridge: ArrayLike = 0.0) -> KernelOperator:
    """Take a kernel that is held in memory as an operator.

    Parameters
    ----------
    kernel : (N1, N2, *out, *out) or (N1, N2)
        From `ntk`. Where N1 = N2 and it is symmetric to rounding, it counts as the kernel of a
        batch with itself, positive semi-definite. Of less than float32, it is widened to that.
    ridge : float
        0 or more: the operator is K + ridge I.

    Returns
    -------
    KernelOperator

    Raises
    ------
    TypeError
        If the kernel holds no floats.
    ValueError
        If the axes after the first two are not a shape twice, or the ridge is negative or added to
        a kernel that is not square.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> A = as_operator(2 * jnp.eye(3), ridge=1.0)
    >>> (A @ jnp.ones(3)).tolist()
    [3.0, 3.0, 3.0]
    """
    checks.floating("kernel", kernel)
    checks.not_negative("ridge", ridge)
    kernel = jnp.asarray(kernel)
    rounding = float(jnp.finfo(kernel.dtype).eps) ** 0.5
    square = matrix(widened(kernel))
    symmetric = square.shape[0] == square.shape[1]
    if symmetric and checks.is_known(square):
        symmetric = float(asymmetry(square)) <= rounding
    outputs = square.shape[0] // max(1, kernel.shape[0])
    base = operator(
        Partial(_array_product, square),
        Partial(_array_transposed, square),
        rows=Partial(_ArrayRows(outputs), square),
        entries=Partial(_array_diagonal, square),
        shape=(square.shape[0], square.shape[1]),
        dtype=square.dtype,
        outputs=outputs,
        psd=symmetric,
    )
    return base if checks.is_known(ridge) and not np.any(ridge) else base + ridge
