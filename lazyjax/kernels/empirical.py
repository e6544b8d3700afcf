"""The empirical NTK of any model function."""

import math
from collections.abc import Sequence
from typing import Any

import jax

from lazyjax import checks
from lazyjax.centering import pair_of_weights
from lazyjax.holomorphy import is_complex
from lazyjax.kernels.budgets import pair_within_budget, within_budget
from lazyjax.kernels.computation import diagonals, kernels
from lazyjax.kernels.pairs import kernels_between
from lazyjax.kernels.request import check, only_output
from lazyjax.meshes import in_any_program
from lazyjax.types import ModelFunction, Params, PyTree, Wrt


@in_any_program()
def ntk(
    f: ModelFunction,
    params: Params,
    x1: PyTree,
    x2: PyTree | None = None,
    *,
    reduce: str = "none",
    method: str = "auto",
    wrt: Wrt | None = None,
    per_leaf: bool = False,
    outputs: Sequence[int] | None = None,
    batch_size: int | tuple[int, int] | None = None,
    memory: int | float | str | None = None,
    precision: str = "highest",
    center: bool = False,
    weights: Any = None,
    complex: str | None = None,
    metric: Any = None,
    g: ModelFunction | None = None,
) -> Any:
    """Compute the empirical neural tangent kernel.

    Theta[n, m, k, l] = <df_k(x1_n) / dparams, df_l(x2_m) / dparams>

    Parameters
    ----------
    f : ModelFunction
        `f(params, x) -> y (N, *out)`; K = prod(out). A `jax.tree_util.Partial` keeps its arrays out
        of the compiled code. Each example is evaluated alone, as a batch of one; a model whose
        examples see each other, or whose dropout is on, is refused.
    params : pytree
        Leaves that are no floats are constants, and so is whatever `f` holds itself: the running
        statistics of a batch normalisation in evaluation mode, for one.
    x1 : array (N1, ...) or pytree, batch on axis 0 of every leaf
    x2 : array (N2, ...) or pytree, optional
        None is x1 again, and the kernel is then symmetric; on one device to the last bit.
    reduce : str
        What is kept of the K x K outputs: `"none"` all, `"diagonal"` k = l only, `"trace"` the mean
        of the diagonal, (1/K) sum_k Theta_kk, `"sum"` the kernel of the sum of the outputs over
        sqrt(K), (1/K) sum_kl Theta_kl. All but the first never form the K x K outputs.
    method : str
        A row of `METHODS`, or `"auto"`: the fastest by the operations and bytes counted (Notes).
    wrt : callable or pytree of bool, optional
        What is differentiated: leaves whose path (`Dense_0/kernel`) the function says True of, or a
        mask, which may be a prefix of `params`. What is left out costs nothing. A pytree that can
        be called, such as a filter specification of Equinox, is a mask.
    per_leaf : bool
        Whether to give a kernel for each leaf, in a tree like `params`, None for constants. They
        add up to the whole kernel.
    outputs : sequence of distinct ints, optional
        Indices into the flattened out, from 0. The kernel is then that of a model with these
        outputs alone: out = (len(outputs),), means are over those, and only they are
        differentiated. For a pytree output, the same indices in every leaf.
    batch_size : int or pair of int, optional
        Examples of x1 and of x2 in a tile, at most. It need not divide N; features of an example
        are computed once whatever it is, and it changes nothing but rounding. Without x2 tiles are
        square, of the smaller size.
    memory : str or number of bytes, optional
        A budget like `"2GiB"` for parameters, inputs, temporaries and kernel, as XLA counts them.
        Method and blocks are chosen to keep to it, which compiles a few ways to do it, once for
        each kind of arguments.
    precision : str
        Of every product on the way, the model's own included, as in
        `jax.default_matmul_precision`. The default of a GPU costs the kernel its symmetry and
        positivity.
    center : bool
        Whether the mean derivative over the examples of each batch is taken away: the kernel of
        J - mean J. With weights the mean is sum_n w_n J_n / sum_n w_n. Inside `jax.shard_map` it is
        that of what the device holds.
    weights : (N1,) array, or pair of (N1,) and (N2,) for two batches, optional
        0 or more: the kernel of diag(sqrt(w)) J, or of diag(sqrt(w)) (J - mean J). Weights 1/N
        with `center` give (J - mean J) (J - mean J)^T / N, whose eigenvalues are those of the
        covariance of the derivatives.
    complex : str, optional
        What is meant where parameters or outputs are complex; without it they are refused.
        `"real"`: the kernel of Re f and Im f by the real and imaginary parts of the parameters, of
        shape (N1, N2, *out, 2, *out, 2); real outputs have no axis of two. In all other arguments
        the two count as outputs. `"hermitian"`: J J^H, complex, of J = df / dparams, for f that is
        holomorphic in those of its parameters that are complex.
    metric : pytree of positive numbers, callable or "sign", optional
        M of J M J^T, the kernel of training with a diagonal preconditioner: of each leaf one
        number, or an array of its shape (of Adam 1 / (sqrt(v) + eps)), in a tree that may be a
        prefix of `params`; or a function of the path that gives the number. A leaf with an array
        is contracted by its Jacobian, as its factors alone do not know its entries. `"sign"`: the
        kernel of sign descent, sum_p J1_p sign(J2_p), which is not symmetric, by Jacobians alone.

    g : ModelFunction, optional
        Another function of the same parameters, for x2, which then need not be like x1: the kernel
        is J_f(x1) J_g(x2)^T, (N1, N2, *out_f, *out_g), as between the values of a network and
        its derivatives. Each is differentiated on its own inputs alone. Reductions need equal
        outputs; `outputs` are those of both.

    Returns
    -------
    array, or a pytree of them for a pytree output (one a leaf, no blocks across leaves)
        `(N1, N2, *out, *out)`, `(N1, N2, *out)` for "diagonal", `(N1, N2)` for "trace" and "sum".
        Its dtype is that of y, float32 at least; with `complex`, of the parameters where these have
        more digits. With `per_leaf`, a tree of these in the place of
        each.

    Raises
    ------
    TypeError
        If `f` is not callable, `params` holds what is no array, `params` or `y` is complex, `y`
        holds no floats, `wrt` says anything but True or False, `outputs` or `batch_size` is not
        made of whole numbers, or `memory` is no amount.
    ValueError
        If `params` has nothing to differentiate by, does not fit `x1`, or `x2` does not fit `x1`;
        if a batch is empty; if `f` keeps no batch on axis 0, lets examples see each other, is
        random, has no derivative, or has forward mode only under a method that needs reverse mode;
        if `reduce`, `method` or `precision` is unknown; if `wrt` does not fit or leaves nothing; if
        `outputs` is empty, out of range or repeats itself; if `batch_size` is below 1 or no pair;
        if `memory` is no amount, or too little: the message says what would do.

    Notes
    -----
    No 1/N and no 1/P: with the parameters of a standard network the kernel grows with its width.
    For a leaf that enters by products, J_k = sum_s a_s (x) d_ks with a_s the input of the product
    at position s and d_ks the derivative of output k by the product there. Its kernel is contracted
    from these factors in the order that is fastest for their sizes; `explain` tells which. With F
    operations for one evaluation of one example, P parameters and N examples on each side, Jacobian
    contraction takes about 4 N K F + N^2 K^2 P (K instead of K^2 unless reduce="none"; 1 for "sum")
    and NTK-vector products 4 N^2 K F. "auto" counts all in the jaxpr, weighed by the rates of
    the backend (`lazyjax.costs.RATES`), never by a clock; only contraction works without
    reverse mode (`while`), then by P columns.
    Works under `jit`, `vmap` over params, and is differentiable by them. Inside `jax.shard_map` it
    is the kernel of what the device holds; where inputs are sharded over a mesh, rows stay with
    their examples.

    References
    ----------
    Jacot, Gabriel, Hongler 2018, "Neural tangent kernel: convergence and generalization in neural
    networks". Novak, Sohl-Dickstein, Schoenholz 2022, "Fast finite width neural tangent kernel",
    section 3 and table 1. Mohamadi, Bae, Sutherland 2023, "A fast, well-founded approximation to
    the empirical neural tangent kernel" (the kernel of the sum). Malladi et al. 2023, "A
    kernel-based view of language model fine-tuning" (the kernel of sign descent).

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> f = lambda w, x: x @ w
    >>> x = jnp.array([[1.0, 0.0], [1.0, 2.0]])
    >>> ntk(f, jnp.ones((2, 3)), x, reduce="trace").tolist()
    [[1.0, 1.0], [1.0, 5.0]]
    >>> ntk(f, jnp.ones((2, 3)), x).shape
    (2, 2, 3, 3)
    """
    options = {
        "reduce": reduce,
        "method": method,
        "wrt": wrt,
        "per_leaf": per_leaf,
        "outputs": outputs,
        "batch_size": batch_size,
        "precision": precision,
        "center": center,
        "complex": complex,
        "metric": metric,
    }
    if g is not None:
        return _between(f, g, params, x1, x2, weights, memory, options)
    request = check(f, params, x1, x2, weights=weights, **options)
    if memory is not None:
        request = within_budget(request, memory)
    return kernels(request)


def _between(
    f: ModelFunction,
    g: ModelFunction,
    params: Params,
    x1: PyTree,
    x2: PyTree | None,
    weights: Any,
    memory: Any,
    options: dict[str, Any],
) -> Any:
    """Compute the kernel between two functions, its arguments checked."""
    if x2 is None:
        raise ValueError("`x2` must be given with `g`, got None. Pass the inputs of g.")
    if options["method"] == "ntk_vector_products":
        raise ValueError("`method` must not be ntk_vector_products with `g`. Use 'auto'.")
    n1, n2 = checks.batch("x1", x1), checks.batch("x2", x2)
    own, others = pair_of_weights(weights, n1, n2)
    one = check(f, params, x1, weights=own, **options)
    other = check(g, params, x2, weights=others, **options)
    shapes = [only_output(request, "a kernel between two functions") for request in (one, other)]
    if options["reduce"] != "none" and shapes[0][0] != shapes[1][0]:
        raise ValueError(
            f"`reduce` must be 'none' where f and g have outputs of different shapes, "
            f"{shapes[0][0]} and {shapes[1][0]}, got {options['reduce']!r}. Use reduce='none'."
        )
    if is_complex(shapes[0][1]) != is_complex(shapes[1][1]):
        raise ValueError(
            "`g` must have complex outputs where f has them, for complex='hermitian'. Use "
            "complex='real'."
        )
    if memory is not None:
        one, other = pair_within_budget(one, other, memory)
    return kernels_between(one, other)


@in_any_program()
def ntk_diagonal(
    f: ModelFunction,
    params: Params,
    x: PyTree,
    *,
    reduce: str = "none",
    wrt: Wrt | None = None,
    per_leaf: bool = False,
    outputs: Sequence[int] | None = None,
    batch_size: int | None = None,
    precision: str = "highest",
    complex: str | None = None,
) -> Any:
    """Compute the kernel of each example with itself.

    Theta[n, k, l] = <df_k(x_n) / dparams, df_l(x_n) / dparams>

    Parameters
    ----------
    f, params, reduce, wrt, per_leaf, outputs, precision, complex
        As for `ntk`.
    x : array (N, ...) or pytree, batch on axis 0 of every leaf
    batch_size : int, optional
        Examples that are differentiated at once, at most.

    Returns
    -------
    array, or a pytree of them for a pytree output
        `(N, *out, *out)`, `(N, *out)` for "diagonal", `(N,)` for "trace" and "sum", like
        ntk(f, params, x)[n, n].

    Raises
    ------
    TypeError, ValueError
        As `ntk`.

    Notes
    -----
    Little more than the features: those of a block of examples are contracted and forgotten, and
    nothing has the size N^2, nor N P where a leaf is kept by its factors.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> f = lambda w, x: x @ w
    >>> x = jnp.array([[1.0, 0.0], [1.0, 2.0]])
    >>> ntk_diagonal(f, jnp.ones((2, 3)), x, reduce="trace").tolist()
    [1.0, 5.0]
    """
    request = check(
        f,
        params,
        x,
        reduce=reduce,
        wrt=wrt,
        per_leaf=per_leaf,
        outputs=outputs,
        batch_size=batch_size,
        precision=precision,
        complex=complex,
    )
    return diagonals(request)


def matrix(kernel: jax.Array) -> jax.Array:
    """Reshape a kernel to the matrix that eigensolvers want.

    Parameters
    ----------
    kernel : (N1, N2, *out, *out)
        From `ntk` with reduce="none". (N1, N2) is a matrix already.

    Returns
    -------
    (N1 K, N2 K)
        Row n K + k is output k of example n, as in y.reshape(-1).

    Raises
    ------
    ValueError
        If the axes after the first two are not a shape twice.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> matrix(jnp.zeros((4, 5, 3, 3))).shape
    (12, 15)
    """
    half = (kernel.ndim - 2) // 2
    out = kernel.shape[2 : 2 + half]
    if kernel.ndim < 2 or kernel.shape[2 + half :] != out:
        raise ValueError(
            f"`kernel` must have shape (N1, N2, *out, *out), got {kernel.shape}. "
            'Use ntk(..., reduce="none").'
        )
    if not out:
        return kernel
    n1, n2 = kernel.shape[:2]
    size = math.prod(out)
    return kernel.reshape(n1, n2, size, size).transpose(0, 2, 1, 3).reshape(n1 * size, n2 * size)
