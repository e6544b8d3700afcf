"""Operators of derivatives without their mean over the examples, and of weighted ones."""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from lazyjax import centering, checks
from lazyjax.meshes import in_any_program
from lazyjax.operators.algebra import KernelOperator, operator

_Weights = tuple[jax.Array | None, jax.Array | None]


def _by_example(v: jax.Array, n: int) -> jax.Array:
    """View (n K, B) as (n, K, B)."""
    return v.reshape(n, -1, v.shape[-1])


def _means(base: KernelOperator, weights: jax.Array | None) -> jax.Array:
    """Give a column (n K, K) for each output: the weighted mean of those of all examples."""
    k, n = base.outputs, base.shape[1] // base.outputs
    share = jnp.full(n, 1 / n) if weights is None else weights / jnp.sum(weights)
    return base @ jnp.kron(share.astype(base.dtype)[:, None], jnp.eye(k, dtype=base.dtype))


class _Sampled(NamedTuple):
    """The functions of an operator C1 A C2^T, static; equal ones compile once."""

    what: str
    center: bool

    def __call__(self, base: KernelOperator, weights: _Weights, *arguments: jax.Array) -> jax.Array:
        """Do what it is called for."""
        return getattr(self, self.what)(base, weights, *arguments)

    def product(self, base: KernelOperator, weights: _Weights, v: jax.Array) -> jax.Array:
        """Multiply v (N2 K, B)."""
        k = base.outputs
        right = _by_example(v, base.shape[1] // k)
        right = centering.back(right, weights[1], center=self.center).reshape(v.shape)
        left = _by_example(base @ right, base.shape[0] // k)
        left = centering.forth(left, weights[0], center=self.center)
        return left.reshape(-1, v.shape[1])

    def transposed(self, base: KernelOperator, weights: _Weights, v: jax.Array) -> jax.Array:
        """Multiply v (N1 K, B) by the transpose."""
        return self.product(base.T, (weights[1], weights[0]), v)

    def rows(self, base: KernelOperator, weights: _Weights, examples: jax.Array) -> jax.Array:
        """Give the rows of some examples."""
        one, other = weights
        k, n2 = base.outputs, base.shape[1] // base.outputs
        rows = _by_example(base.rows_of(examples), len(examples))  # (r, K, N2 K)
        if self.center:
            rows = rows - _means(base.T, one).T[None]
        if one is not None:
            rows = jnp.sqrt(one)[examples].astype(rows.dtype)[:, None, None] * rows
        columns = jnp.moveaxis(rows.reshape(-1, n2, k), 1, 0)  # (N2, r K, K)
        columns = centering.forth(columns, other, center=self.center)
        return jnp.moveaxis(columns, 0, 1).reshape(-1, n2 * k)

    def entries(self, base: KernelOperator, weights: _Weights) -> jax.Array:
        """Give the diagonal."""
        k = base.outputs
        own = base.diagonal().reshape(-1, k)
        if self.center:
            means = _by_example(_means(base, weights[0]), len(own))  # (N, K, K)
            middle = centering.mean_over(means, weights[0], 0)
            own = own - 2 * jnp.einsum("nkk->nk", means) + jnp.einsum("nkk->nk", middle)
        return (own if weights[0] is None else weights[0].astype(own.dtype)[:, None] * own).reshape(
            -1
        )


@in_any_program(back=False)
def centered(A: KernelOperator, *, weights: Any = None, center: bool = True) -> KernelOperator:
    """Give the operator of derivatives without their mean over the examples, and weighted.

    C1 A C2^T,  C = diag(sqrt(w)) (I - 1 w^T / sum(w))

    Parameters
    ----------
    A : KernelOperator
        J1 J2^T, without a shift. That of a stored kernel too.
    weights : (N1,) array, or pair of (N1,) and (N2,) for the kernel of two batches, optional
        As for `ntk`.
    center : bool
        Whether the mean is taken away; otherwise C = diag(sqrt(w)).

    Returns
    -------
    KernelOperator
        Of the same shape. A ridge is added afterwards.

    Raises
    ------
    TypeError
        If A is no operator, `center` is not True or False, or weights hold no floats.
    ValueError
        If A has a shift (where that is traced the operator is NaN instead), or the weights do not
        fit or are negative.

    Notes
    -----
    A product takes one with A. Rows take one more, with K vectors, for the mean.

    Examples
    --------
    >>> from lazyjax.operators.algebra import as_operator
    >>> (centered(as_operator(jnp.eye(2))) @ jnp.array([1.0, 1.0])).tolist()
    [0.0, 0.0]
    """
    if not isinstance(A, KernelOperator):
        raise TypeError(
            f"`A` must be a KernelOperator, got {type(A).__name__}. Use as_operator(kernel)."
        )
    checks.flag("center", center)
    if checks.is_known(A.shift) and np.any(np.asarray(A.shift)):
        raise ValueError(
            f"`A` must have no shift, got {A.shift}. Add a ridge afterwards: centered(A) + ridge."
        )
    # a shift that is traced and not 0 must not pass for the kernel's own
    scale = jnp.where(A.shift == 0, A.scale, jnp.nan)
    A = replace(A, scale=scale, shift=jnp.zeros_like(A.shift))
    n1, n2 = (size // A.outputs for size in A.shape)
    pair = isinstance(weights, tuple | list)
    own = centering.pair_of_weights(weights, n1, n2 if pair or not A.psd else None)
    symmetric = A.psd and own[0] is own[1]

    def travelling(what: str) -> Partial:
        return Partial(_Sampled(what, bool(center)), A, own)

    return operator(
        travelling("product"),
        travelling("transposed"),
        rows=None if A.rows is None else travelling("rows"),
        entries=travelling("entries") if symmetric else None,
        shape=A.shape,
        dtype=A.dtype,
        outputs=A.outputs,
        psd=symmetric,
    )
