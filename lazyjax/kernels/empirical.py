"""The empirical NTK of any model function."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from lazyjax import checks
from lazyjax.derivatives import jvp
from lazyjax.kernels.blocks import assemble, block_sizes
from lazyjax.kernels.costs import operations
from lazyjax.kernels.methods import (
    METHODS,
    REDUCTIONS,
    Model,
    Sizes,
    Weights,
    cheapest,
    parameter_count,
)
from lazyjax.types import ModelFunction, Params


def _is_real(name: str, tree: Any) -> list[bool]:
    """Tell which leaves are real floats; refuse complex ones."""
    real = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        dtype = jnp.result_type(leaf)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(
                f"`{name}`{jax.tree_util.keystr(path)} must be real, got {dtype}. "
                "Split it into a real and an imaginary part inside f."
            )
        real.append(jnp.issubdtype(dtype, jnp.floating))
    return real


def _split(params: Params) -> tuple[Weights, Callable[[Weights], Params]]:
    """Give the leaves that are differentiated, and how to put the tree together again."""
    leaves, structure = jax.tree.flatten(params)
    real = _is_real("params", params)
    if not any(real):
        raise ValueError(
            "`params` must hold at least one array of floats to differentiate by, got "
            f"{[str(jnp.result_type(leaf)) for leaf in leaves]}. "
            "Convert it: jnp.asarray(params, jnp.float32)."
        )

    def rebuild(w: Weights) -> Params:
        new = iter(w)
        return structure.unflatten(
            [next(new) if moves else leaf for leaf, moves in zip(leaves, real, strict=True)]
        )

    return [leaf for leaf, moves in zip(leaves, real, strict=True) if moves], rebuild


def _on_one(f: Partial, params: Params, x: Any) -> Any:
    """Evaluate the model on one example, as a batch of one."""
    y = f(params, jax.tree.map(lambda a: a[None], x))
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(y)]
    if not shapes or any(shape[:1] != (1,) or not math.prod(shape) for shape in shapes):
        raise ValueError(
            "`f` must return at least one output, with the batch on axis 0, and for a batch of one "
            f"it gave shapes {shapes}. Return y (N, *out)."
        )
    return jax.tree.map(lambda leaf: leaf[0], y)


@jax.jit
def _outputs_of_one(f: Partial, params: Params, x: Any) -> Any:
    return _on_one(f, params, jax.tree.map(lambda a: a[0], x))


def _output_shapes(f: Partial, params: Params, x: Any) -> Any:
    """Give the shapes and dtypes of the outputs of one example; traced once, then cached."""
    try:
        out = _outputs_of_one.eval_shape(f, params, x)
    except Exception as error:
        if str(error).startswith("`f` must"):
            raise
        raise ValueError(
            "`params` and `x1` must fit the model: f(params, x) failed for one example of x1, of "
            f"shapes {[np.shape(leaf)[1:] for leaf in jax.tree.leaves(x)]}. Pass parameters and "
            f"inputs of the same model. It said: {error}"
        ) from error
    if not all(_is_real("f(params, x)", out)):
        raise TypeError(
            "`f` must return floats, got "
            f"{[str(leaf.dtype) for leaf in jax.tree.leaves(out)]}. Return y before it is rounded."
        )
    return out


def _chosen(outputs: Sequence[int] | jax.Array | None, out: Any) -> np.ndarray | None:
    """Check the indices of outputs against every leaf."""
    if outputs is None:
        return None
    if not checks.is_known(outputs):
        raise TypeError(
            "`outputs` must be known where the kernel is called, got a traced array. "
            "Pass a tuple of ints."
        )
    index = np.asarray(outputs)
    if index.ndim != 1 or not index.size:
        raise ValueError(
            f"`outputs` must be a list of at least one index, got shape {index.shape}. "
            "Use None for all outputs."
        )
    if not np.issubdtype(index.dtype, np.integer):
        raise TypeError(f"`outputs` must be whole numbers, got {index.dtype}. Use indices.")
    size = min(math.prod(leaf.shape) for leaf in jax.tree.leaves(out))
    wrong = sorted({int(i) for i in index if not 0 <= i < size})
    if wrong:
        raise ValueError(
            f"`outputs` must be indices from 0 to {size - 1} into the flattened output, "
            f"got {wrong}. Drop those."
        )
    if len(np.unique(index)) < index.size:
        raise ValueError(
            f"`outputs` must be distinct, got {index.tolist()}. Drop those that come twice."
        )
    return index


def _same_examples(x1: Any, x2: Any) -> None:
    shapes = [
        (jax.tree.structure(x), [np.shape(leaf)[1:] for leaf in jax.tree.leaves(x)])
        for x in (x1, x2)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "`x2` must hold examples like those of `x1`, of shapes "
            f"{shapes[0][1]} in {shapes[0][0]}, got {shapes[1][1]} in {shapes[1][0]}. "
            "Pass inputs of the same model."
        )


def _check_precision(precision: str) -> None:
    try:
        with jax.default_matmul_precision(precision):
            pass
    except ValueError as error:
        raise ValueError(
            "`precision` must be a name that jax.default_matmul_precision knows, got "
            f"{precision!r}. Use 'highest', 'high' or 'default'."
        ) from error


def _model(f: Partial, params: Params, x: Any, leaf: int, outputs: Any, summed: bool) -> Model:
    """Give output leaf `leaf` on one example, flat, with the outputs that are asked for."""
    w, rebuild = _split(params)

    def function(w: Weights, x: Any) -> jax.Array:
        y = jax.tree.leaves(_on_one(f, rebuild(w), x))[leaf].reshape(-1)
        y = y if outputs is None else y[outputs]
        return jnp.sum(y, keepdims=True) if summed else y

    def backward(w: Weights, x: Any) -> Any:
        y, pullback = jax.vjp(lambda w: function(w, x), w)
        return pullback(jnp.ones_like(y))

    def forward(w: Weights, x: Any) -> Any:  # jax.jvp would not raise at a custom_vjp
        return jvp(lambda w: function(w, x), w, w)

    one = jax.tree.map(lambda a: a[0], x)
    try:
        jax.eval_shape(backward, w, one)
    except Exception as error:  # a while, or a rule that cannot be transposed
        try:
            jax.eval_shape(forward, w, one)
        except Exception:
            raise ValueError(
                "`f` must have a derivative in reverse or in forward mode by its parameters, and "
                f"has neither. Give it a jax.custom_vjp. Reverse mode said: {error}"
            ) from error
        return Model(function, w, reverse=False)
    return Model(function, w, reverse=True)


@partial(jax.jit, static_argnames=("reduce", "method", "sizes", "precision"))
def _kernels(
    f: Partial,
    params: Params,
    x1: Any,
    x2: Any | None,
    outputs: jax.Array | None,
    *,
    reduce: str,
    method: str,
    sizes: tuple[int, int],
    precision: str,
) -> Any:
    def kernel(leaf: int, out: tuple[int, ...]) -> jax.Array:
        if outputs is not None:
            out = outputs.shape
        model = _model(f, params, x1, leaf, outputs, summed=reduce == "sum")
        name = method
        if method == "auto":
            wanted = Sizes(
                n1=checks.batch("x1", x1),
                n2=checks.batch("x1", x1 if x2 is None else x2),
                symmetric=x2 is None,
                outputs=1 if reduce == "sum" else math.prod(out),
                mixed=reduce == "none",
                parameters=parameter_count(model.w),
                forward=operations(
                    model.function, model.w, jax.tree.map(lambda a: jnp.asarray(a)[0], x1)
                ),
            )
            name = cheapest(wanted, reverse=model.reverse)
        if METHODS[name].needs_reverse and not model.reverse:
            raise ValueError(
                f"`method` must not be {name} for a model that has forward mode only (a while "
                "loop). Use 'jacobian_contraction' or 'auto'."
            )
        found = assemble(
            lambda a, b: METHODS[name].block(model, a, b, reduce),
            x1,
            x2,
            sizes,
        )
        if reduce in ("trace", "sum"):
            return found / math.prod(out)
        return found.reshape(*found.shape[:2], *out * (found.ndim - 2))

    with jax.default_matmul_precision(precision):
        shapes = _output_shapes(f, params, x1)
        leaves, structure = jax.tree.flatten(shapes)
        return structure.unflatten([kernel(i, leaf.shape) for i, leaf in enumerate(leaves)])


def ntk(
    f: ModelFunction,
    params: Params,
    x1: Any,
    x2: Any | None = None,
    *,
    reduce: str = "none",
    method: str = "auto",
    outputs: Sequence[int] | None = None,
    batch_size: int | tuple[int, int] | None = None,
    precision: str = "highest",
) -> Any:
    """Compute the empirical neural tangent kernel.

    Theta[n, m, k, l] = <df_k(x1_n) / dparams, df_l(x2_m) / dparams>

    Parameters
    ----------
    f : ModelFunction
        `f(params, x) -> y (N, *out)`; K = prod(out). A `jax.tree_util.Partial` keeps its arrays out
        of the compiled code. Each example is evaluated alone, as a batch of one, so examples must
        not see each other (batch normalisation in training mode does).
    params : pytree
        Leaves that are no floats are constants.
    x1 : array (N1, ...) or pytree, batch on axis 0 of every leaf
    x2 : array (N2, ...) or pytree, optional
        None is x1 again, and the kernel is then symmetric to the last bit.
    reduce : str
        What is kept of the K x K outputs: `"none"` all, `"diagonal"` k = l only, `"trace"` the mean
        of the diagonal, (1/K) sum_k Theta_kk, `"sum"` the kernel of the sum of the outputs over
        sqrt(K), (1/K) sum_kl Theta_kl. All but the first never form the K x K outputs.
    method : str
        A row of `METHODS`, or `"auto"`: the one with fewer operations (see Notes).
    outputs : sequence of distinct ints, optional
        Indices into the flattened out, from 0. The kernel is then that of a model with these
        outputs alone: out = (len(outputs),), means are over those, and only they are
        differentiated. For a pytree output, the same indices in every leaf.
    batch_size : int or pair of int, optional
        Examples of x1 and of x2 in a block, at most; memory for Jacobians is that of two blocks. It
        need not divide N, and changes nothing but rounding in the result. Without x2 blocks are
        square, of the smaller size.
    precision : str
        Of every product on the way, the model's own included, as in
        `jax.default_matmul_precision`. The default of a GPU costs the kernel its symmetry and
        positivity.

    Returns
    -------
    array, or a pytree of them for a pytree output (one a leaf, no blocks across leaves)
        `(N1, N2, *out, *out)`, `(N1, N2, *out)` for "diagonal", `(N1, N2)` for "trace" and "sum".
        Its dtype is that of y.

    Raises
    ------
    TypeError
        If `f` is not callable, `params` or `y` is complex, `y` holds no floats, or `outputs` or
        `batch_size` is not made of whole numbers.
    ValueError
        If `params` has nothing to differentiate by, does not fit `x1`, or `x2` does not fit `x1`;
        if a batch is empty; if `f` keeps no batch on axis 0, has no derivative, or has forward mode
        only under "ntk_vector_products"; if `reduce`, `method` or `precision` is unknown; if
        `outputs` is empty, out of range or repeats itself; if `batch_size` is below 1 or no pair.

    Notes
    -----
    No 1/N and no 1/P: with the parameters of a standard network the kernel grows with its width.
    With F operations for one evaluation of one example, P parameters and N examples on each side,
    Jacobian contraction takes about 2 N K F + N^2 K^2 P (K instead of K^2 unless reduce="none"; 1
    for "sum") and NTK-vector products 2 N^2 K F. "auto" counts F in the jaxpr and takes the
    smaller; only contraction works without reverse mode (`while`), then by P columns.
    Works under `jit`, `vmap` over params, and is differentiable by them.

    References
    ----------
    Jacot, Gabriel, Hongler 2018, "Neural tangent kernel: convergence and generalization in neural
    networks". Novak, Sohl-Dickstein, Schoenholz 2022, "Fast finite width neural tangent kernel",
    section 3 and table 1. Mohamadi, Bae, Sutherland 2023, "A fast, well-founded approximation to
    the empirical neural tangent kernel" (the kernel of the sum).

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
    f = checks.model_function(f)
    checks.one_of("reduce", reduce, REDUCTIONS)
    checks.one_of("method", method, ["auto", *METHODS])
    _check_precision(precision)
    n1 = checks.batch("x1", x1)
    n2 = None
    if x2 is not None:
        n2 = checks.batch("x2", x2)
        _same_examples(x1, x2)
    sizes = block_sizes(batch_size, n1, n2)
    _split(params)
    index = _chosen(outputs, _output_shapes(f, params, x1))
    return _kernels(
        f, params, x1, x2, index, reduce=reduce, method=method, sizes=sizes, precision=precision
    )


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
    n1, n2 = kernel.shape[:2]
    size = math.prod(out)
    return kernel.reshape(n1, n2, size, size).transpose(0, 2, 1, 3).reshape(n1 * size, n2 * size)
