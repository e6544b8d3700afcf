"""The kernels of an infinitely wide network, read off its jaxpr."""

import warnings
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import Partial

from lazyjax import checks
from lazyjax.independence import check_examples
from lazyjax.kernels import symmetric
from lazyjax.leaves import of_floats, path_of
from lazyjax.limits.initialisers import of_each_leaf
from lazyjax.limits.layouts import positions
from lazyjax.limits.moments import Moments
from lazyjax.limits.nodes import Query
from lazyjax.limits.operations import OPERATIONS
from lazyjax.limits.reading import Reader
from lazyjax.limits.refusals import refuse
from lazyjax.limits.values import Fixed, Leaf, Value, Wide, fixed
from lazyjax.memory import bytes_needed, bytes_of, too_little
from lazyjax.tiling import tiled
from lazyjax.traces import as_it_is, one_example
from lazyjax.types import ModelFunction, Params, PyTree
from lazyjax.widening import widened

_TILE = 2**17  # entries of the largest array of a tile: work for two cores, within their cache


class Infinite(NamedTuple):
    """The kernels of a network in the limit of infinite width.

    Attributes
    ----------
    nngp : (N1, N2)
        E f_k(x1) f_k(x2), the same for every output k.
    ntk : (N1, N2)
        E <df_k(x1), df_k(x2)>.
    error : ()
        Of the quadratures: the largest difference that a fifth of their degree makes, over the
        largest value; 0 where all is in closed form.
    """

    nngp: jax.Array
    ntk: jax.Array
    error: jax.Array


class _Network(NamedTuple):
    """What is static of a network: with the same, nothing is compiled anew."""

    tree: Any
    shapes: tuple[tuple[tuple[int, ...], Any], ...]
    names: tuple[str, ...]
    variances: tuple[float | None, ...]
    zeros: tuple[bool, ...]  # not random, and known to be 0, as most biases are
    zero_constants: tuple[bool, ...]  # the same of what f holds, as of running means
    degree: int

    @property
    def fixed(self) -> list[int]:
        """Which leaves are not random."""
        return [i for i, v in enumerate(self.variances) if v is None]


def _read(
    network: _Network, f: Any, values: list[Any], x1: Any, x2: Any, *, trusted: bool
) -> tuple[Moments, Any, Query]:
    """Read a network for a block of examples; give its output."""
    given = iter(values)
    leaves = [
        next(given) if v is None else jax.ShapeDtypeStruct(*shape)
        for v, shape in zip(network.variances, network.shapes, strict=True)
    ]
    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype), x1)
    shapes = [jax.ShapeDtypeStruct(*shape) for shape in network.shapes]
    closed, out = jax.make_jaxpr(f, return_shape=True)(network.tree.unflatten(shapes), one)
    outputs = jax.tree.leaves(out)
    if len(outputs) != 1 or len(outputs[0].shape) not in (1, 2):
        raise ValueError(
            "`f` must give one array (N, K), got "
            f"{[tuple(o.shape) for o in outputs]} for one example. Reshape it, or take one of them."
        )
    n = checks.batch("x1", x1)
    sizes = (n,) if x2 is None else (n, checks.batch("x2", x2))
    dtype = jnp.promote_types(outputs[0].dtype, jnp.float32)
    moments = Moments(sizes, network.degree, dtype)
    count = sum(int(np.prod(shape)) for shape, _ in network.shapes)
    held = zip(jax.tree.leaves(f), network.zero_constants, strict=True)
    zeros = [constant for constant, zero in held if zero]
    reader = Reader(moments, OPERATIONS, count, zeros, trusted=trusted)
    inputs: list[Value] = []
    offset = 0
    for leaf, (shape, kind), name, v, zero in zip(
        leaves, network.shapes, network.names, network.variances, network.zeros, strict=True
    ):
        size = int(np.prod(shape))
        entries = np.arange(offset, offset + size).reshape(shape)
        offset += size
        if v is not None:
            inputs.append(Leaf(entries, name, v))
        elif jnp.issubdtype(kind, jnp.floating):
            known = replace(fixed(leaf, len(sizes)), zero=zero)
            inputs.append(Leaf(entries, name, None, None, known))
        else:
            inputs.append(fixed(leaf, len(sizes)))
    sides = [jax.tree.leaves(x) for x in ((x1,) if x2 is None else (x1, x2))]
    for parts in zip(*sides, strict=True):
        inputs.append(Fixed(tuple(a[:, None] for a in parts), (1, *parts[0].shape[1:])))
    (y,) = reader.read(closed, inputs)
    return moments, _output(reader, y), Query(0, len(sizes) - 1, True, False)


def _output(reader: Reader, y: Value) -> Any:
    """Require an output whose entries are all alike."""
    if isinstance(y, Leaf):
        axes = tuple((reader.new_width(n),) if n > 1 else () for n in y.shape)
        y = Wide(((y.entries.size, reader.field_of(y, axes, "the output")),), axes)
    if isinstance(y, Fixed) or not y.random:
        refuse("an output that is not random", "End with a product with random weights")
    if positions(y.axes):
        refuse(
            "outputs that differ, as each is of another position",
            "Let f give one array (N, K) of the same last product",
        )
    if len(y.parts) > 1:
        refuse("outputs of several kinds, joined", "Take one kind after the other")
    if reader.is_contracted(y.axes):
        refuse("a wide axis that meets the output", "End with a product with random weights")
    (node,) = [node for _, node in y.parts]
    return node


def _tile(
    network: _Network, f: Any, values: list[Any], x1: Any, x2: Any, *, trusted: bool
) -> tuple[jax.Array, ...]:
    """Compute the kernels of a block, (n1, n2) each; symmetric where x2 is None.

    Then the pairs of an example and itself are computed apart: of these rounding must not make two
    fields of one. To choose them in every layer would double the time of all pairs.
    """
    read = partial(_read, network, f, values, x1, trusted=trusted)
    moments, y, q = read(x1 if x2 is None else x2)
    kernels = _asked(moments, y, q)
    errors = moments.errors
    if x2 is None:
        moments, y, q = read(None)
        diagonals = _asked(moments, y, q._replace(crossed=False))
        at = jnp.diag_indices(len(diagonals[0]))  # of a tile of one example it is all there is
        kernels = [
            symmetric(k, "trace").at[at].set(d) for k, d in zip(kernels, diagonals, strict=True)
        ]
        errors = errors + moments.errors
    if not errors:
        return tuple(kernels)
    error = jnp.max(jnp.stack([jnp.asarray(e, moments.dtype) for e in errors]))
    return (*kernels, jnp.broadcast_to(error, kernels[0].shape))


def _asked(moments: Moments, y: Any, q: Query) -> list[jax.Array]:
    """Give both kernels at every pair of a query, zeros for None."""
    shape = moments.sizes if q.crossed else moments.sizes[:1]
    found = (moments.second(y, y, q), moments.tangent(y, y, q))
    full = (jnp.zeros((), moments.dtype) if k is None else k for k in found)
    return [jnp.broadcast_to(k, shape).astype(moments.dtype) for k in full]


@partial(jax.jit, static_argnames=("network", "side"))
def _kernels(
    f: Partial, values: list[Any], x1: Any, x2: Any, *, network: _Network, side: int
) -> Infinite:
    contract = partial(_tile, network, f, values, trusted=True)
    found = tiled(contract, x1, x2, rows=side, columns=side)
    nngp, ntk, *errors = found
    error = jnp.max(errors[0]) if errors else jnp.zeros((), nngp.dtype)
    return Infinite(nngp, ntk, error)


def infinite(
    f: ModelFunction,
    params: Params,
    x1: PyTree,
    x2: PyTree | None = None,
    *,
    variance: Any,
    degree: int = 160,
    batch_size: int | None = None,
    memory: int | float | str | None = None,
) -> Infinite:
    """Compute the kernels that a network has in the limit of infinite width.

    nngp = E f_k(x1) f_k(x2),   ntk = E <df_k(x1) / dparams, df_k(x2) / dparams>

    Parameters
    ----------
    f : ModelFunction
        `f(params, x) -> y (N, K)`, an ordinary model function.
    params : pytree
        Of what is random only shapes and dtypes matter; `jax.ShapeDtypeStruct` will do.
    x1 : array (N1, ...) or pytree, batch on axis 0 of every leaf
    x2 : array (N2, ...) or pytree, optional
        None is x1 again; the kernels are then symmetric to the last bit.
    variance : float, callable or pytree
        The variance of the entries of each leaf at the start, Gaussian, independent, of mean 0: one
        number, a function `(path, shape) -> variance`, or a tree that may be the upper part of
        that of `params`, as from `variances`. None: the leaf is not random, its value in `params`
        counts, as the scale 1 and the bias 0 of a norm, and so does its derivative.
    degree : int
        Of the quadratures for activations that have no closed form, 16 or more.
    batch_size : int, optional
        Examples on each side of a tile, at most.
    memory : str or number of bytes, optional
        A budget like `"2GiB"` for inputs, temporaries and kernels, as XLA counts them.

    Returns
    -------
    Infinite
        With `nngp` and `ntk`, (N1, N2) each, and the `error` of the quadratures.

    Raises
    ------
    TypeError
        If `f` is not callable, a variance is no number, or a leaf that is not random is not known.
    ValueError
        If an operation of `f` has no limit that is known here, which the text names; examples see
        each other; shapes do not fit; or `memory` is too little.

    Warns
    -----
    UserWarning
        Outside of `jit`, if the error of the quadratures is above 1e-6.

    Notes
    -----
    Every axis that a product with random weights sums over, of what is random itself, is taken as
    wide; the sum keeps the factor of its length. So with factors 1 / sqrt(n) in f and variance 1
    (NTK parametrisation) it is the limit, and with variances c / n (standard parametrisation) the
    leading order at the widths that the model has. Weights that are not Gaussian have the same
    limit where a product sums over many; after a first layer of few inputs, with uniform weights,
    kernels stay a few percent away at any width. The derivation, with what it assumes, is in
    `docs/infinite_width.md`. Time is that of N1 N2 S^2 entries a layer, where positions are pooled
    (S of them), N1 N2 S otherwise. ReLU, leaky ReLU, abs, polynomials, erf, sin, cos and exact GELU
    are in closed form.

    References
    ----------
    Neal 1996; Lee et al. 2018, "Deep neural networks as Gaussian processes"; Jacot, Gabriel,
    Hongler 2018; Novak et al. 2019, "Bayesian deep convolutional networks with many channels are
    Gaussian processes"; Yang 2020, "Tensor programs II" (gradient independence).

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> f = lambda w, x: jnp.maximum(x @ w[0], 0) @ w[1] / 8
    >>> w = (jnp.zeros((2, 64)), jnp.zeros((64, 1)))
    >>> x = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    >>> kernels = infinite(f, w, x, variance=1.0)
    >>> [[round(float(k), 4) for k in row] for row in kernels.ntk]
    [[1.0, 0.1592], [0.1592, 1.0]]
    """
    f = checks.model_function(f)
    checks.batch("x1", x1)
    if x2 is not None:
        checks.batch("x2", x2)
    checks.whole("degree", degree, least=16)
    if batch_size is not None:
        checks.whole("batch_size", batch_size, least=1)
    leaves, tree = jax.tree.flatten(params)
    paths = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    own = of_each_leaf(variance, params)
    params, x1, x2 = _made(params, own), widened(x1), None if x2 is None else widened(x2)
    of_floats("params", params)
    leaves = [widened(leaf) for leaf in jax.tree.leaves(params)]
    x1, x2 = (None if x is None else jax.tree.map(jnp.asarray, x) for x in (x1, x2))
    checks.outputs(f, params, x1)
    f = as_it_is(f, params, one_example(x1))
    check_examples(f, params, x1)
    shapes = tuple((tuple(np.shape(leaf)), jnp.result_type(leaf)) for leaf in leaves)
    names = tuple(p or "params" for p in paths)
    zeros = tuple(v is None and _is_zero(leaf) for v, leaf in zip(own, leaves, strict=True))
    constants = tuple(map(_is_zero, jax.tree.leaves(f)))
    network = _Network(tree, shapes, names, own, zeros, constants, degree)
    values = [jnp.asarray(leaves[i]) for i in network.fixed]
    side = _side(network, f, values, x1, x2, batch_size)
    if memory is None:
        found = _kernels(f, values, x1, x2, network=network, side=side)
    else:
        found = _within(memory, f, values, x1, x2, network, side)
    if not isinstance(found.error, Tracer):
        _tell(float(found.error))
    return found


def _is_zero(leaf: Any) -> bool:
    """Tell whether a leaf is known to be 0, before `jit` makes it unknown."""
    known = not isinstance(leaf, Tracer) and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    return known and not np.any(np.asarray(leaf))


def _made(params: Params, own: tuple[float | None, ...]) -> Params:
    """Give arrays in the place of shapes."""
    leaves, tree = jax.tree.flatten(params)
    made = []
    for leaf, v in zip(leaves, own, strict=True):
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            made.append(leaf)
        elif v is None:
            raise TypeError(
                "`params` must hold the values of leaves that are not random, got "
                f"{leaf}. Give it a variance, or an array."
            )
        else:
            made.append(jnp.zeros(leaf.shape, leaf.dtype))
    return tree.unflatten(made)


def _side(
    network: _Network, f: Any, values: list[Any], x1: Any, x2: Any, batch_size: int | None
) -> int:
    """Choose the examples of a tile, after the network has been read once, in concrete numbers."""
    largest: list[int] = []

    def once(one: Any, two: Any) -> Any:
        moments, y, q = _read(network, f, values, one, two, trusted=False)
        found = moments.second(y, y, q), moments.tangent(y, y, q)
        largest.append(moments.largest)
        return found

    one = one_example(x1)
    jax.eval_shape(once, one, None if x2 is None else one_example(x2))
    n = max(jax.tree.leaves(x)[0].shape[0] for x in (x1, x2) if x is not None)
    side = max(1, round((_TILE / largest[0]) ** 0.5))
    return min(side, n if batch_size is None else batch_size)


def _within(
    memory: Any, f: Any, values: list[Any], x1: Any, x2: Any, network: _Network, side: int
) -> Infinite:
    """Compute in tiles that keep to a budget."""
    budget = bytes_of(memory)
    while True:
        compiled = _kernels.lower(f, values, x1, x2, network=network, side=side).compile()
        needs = bytes_needed(compiled)
        if needs <= budget:
            return compiled(f, values, x1, x2)
        if side == 1:
            raise too_little(needs, "these kernels", memory, "fewer examples")
        side = side // 2


def _tell(error: float) -> None:
    """Warn of a rough quadrature."""
    if error > 1e-6:
        warnings.warn(
            f"the quadratures of activations have an error of about {error:.1e} of the largest "
            "value. Use a larger degree.",
            UserWarning,
            stacklevel=3,
        )
