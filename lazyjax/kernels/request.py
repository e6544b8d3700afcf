"""What is asked for: the arguments of `ntk`, checked once, in one record that travels whole."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import Partial

from lazyjax import checks
from lazyjax.centering import pair_of_weights
from lazyjax.costs import Rates, rates, using
from lazyjax.factors import output_shapes
from lazyjax.holomorphy import check_convention, check_holomorphic, in_parts
from lazyjax.independence import check_examples
from lazyjax.kernels.methods import METHODS
from lazyjax.kernels.task import REDUCTIONS
from lazyjax.leaves import differentiated, numbers_of_leaves
from lazyjax.traces import as_it_is, one_example
from lazyjax.types import ModelFunction, Params, PyTree, Wrt


def chosen_outputs(
    outputs: Sequence[int] | jax.Array | None, shapes: Sequence[jax.ShapeDtypeStruct]
) -> np.ndarray | None:
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
    size = min(math.prod(leaf.shape) for leaf in shapes)
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


def check_batch_size(
    batch_size: int | tuple[int, int] | None, name: str = "batch_size"
) -> tuple[int, int] | None:
    """Require a whole number or a pair of them; give the pair."""
    if batch_size is None:
        return None
    if isinstance(batch_size, tuple | list):
        if len(batch_size) != 2:
            raise ValueError(
                f"`{name}` must be a whole number or a pair of them, got {batch_size}. "
                "Use (examples of x1, examples of x2)."
            )
        b1, b2 = batch_size
    else:
        b1 = b2 = batch_size
    for size in (b1, b2):
        checks.whole(name, size, least=1, cure="Use None to have it chosen.")
    return int(b1), int(b2)


def same_examples(x1: PyTree, x2: PyTree, names: tuple[str, str] = ("x1", "x2")) -> None:
    """Require two batches of examples of the same shapes."""
    shapes = [
        (jax.tree.structure(x), [np.shape(leaf)[1:] for leaf in jax.tree.leaves(x)])
        for x in (x1, x2)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"`{names[1]}` must hold examples like those of `{names[0]}`, of shapes "
            f"{shapes[0][1]} in {shapes[0][0]}, got {shapes[1][1]} in {shapes[1][0]}. "
            "Pass inputs of the same model."
        )


def check_precision(precision: str) -> None:
    """Require a name that JAX knows."""
    try:
        with jax.default_matmul_precision(precision):
            pass
    except ValueError as error:
        raise ValueError(
            "`precision` must be a name that jax.default_matmul_precision knows, got "
            f"{precision!r}. Use 'highest', 'high' or 'default'."
        ) from error


class Options(NamedTuple):
    """What is asked for beside arrays: with the same options nothing is compiled anew."""

    reduce: str
    method: str
    wrt: tuple[bool, ...]  # of each leaf of params
    per_leaf: bool
    batch_size: tuple[int, int] | None
    precision: str
    rates: Rates  # by which method, orders and blocks are chosen
    signs: bool = False  # whether the derivatives of x2 enter by their signs alone
    center: bool = False  # whether the mean derivative over the examples is taken away
    level: int = 0  # how much memory is saved, as in `tiles.choose_blocks`

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """Decide by these rates, and multiply in this precision, inside the `with` block."""
        with using(self.rates), jax.default_matmul_precision(self.precision):
            yield


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Request:
    """What is asked for, checked: a pytree of arrays, and static what they are to become."""

    f: Partial
    params: Params
    x1: PyTree
    x2: PyTree | None
    outputs: jax.Array | np.ndarray | None  # indices; None: all
    weights: tuple[jax.Array | None, jax.Array | None]  # of the examples of x1 and of x2
    metric: tuple[jax.Array, ...] | None  # of each leaf that is differentiated
    options: Options = field(metadata={"static": True})
    tree: Any = field(metadata={"static": True})  # the structure of what f gives
    shapes: tuple[jax.ShapeDtypeStruct, ...] = field(metadata={"static": True})  # for one example

    @property
    def n1(self) -> int:
        """Examples of x1."""
        return checks.batch("x1", self.x1)

    @property
    def n2(self) -> int:
        """Examples of x2, or of x1 again."""
        return self.n1 if self.x2 is None else checks.batch("x2", self.x2)

    def of(self, x1: PyTree, x2: PyTree | None = None) -> "Request":
        """Ask the same of other examples."""
        return replace(self, x1=x1, x2=x2)

    def at(self, params: Params) -> "Request":
        """Ask the same at other parameters."""
        return replace(self, params=params)

    def having(self, **options: Any) -> "Request":
        """Ask for the same with other options."""
        return replace(self, options=self.options._replace(**options))


def _check_signs(metric: str, method: str, complex: str | None) -> None:
    """Require the one metric that has a name, and what it can be computed by."""
    if metric != "sign":
        raise ValueError(
            f"`metric` must be numbers for each leaf, or 'sign', got {metric!r}. Use 'sign' for "
            "the kernel of sign descent."
        )
    if method not in ("auto", "jacobian_contraction"):
        raise ValueError(
            f"`method` must be jacobian_contraction for metric='sign', got {method!r}. Use 'auto'."
        )
    if complex is not None:
        raise ValueError(
            "`complex` must be None for metric='sign', as complex numbers have no sign, got "
            f"{complex!r}. Split them into real and imaginary parts inside f."
        )


def check(
    f: ModelFunction,
    params: Params,
    x1: PyTree,
    x2: PyTree | None = None,
    *,
    reduce: str = "none",
    wrt: Wrt | None = None,
    outputs: Sequence[int] | None = None,
    precision: str = "highest",
    method: str = "auto",
    per_leaf: bool = False,
    batch_size: int | tuple[int, int] | None = None,
    center: bool = False,
    weights: Any = None,
    complex: str | None = None,
    metric: Any = None,
) -> Request:
    """Check the arguments of `ntk`, before any work."""
    f = checks.model_function(f)
    checks.one_of("reduce", reduce, REDUCTIONS)
    checks.one_of("method", method, ["auto", *METHODS])
    check_precision(precision)
    checks.batch("x1", x1)
    if x2 is not None:
        checks.batch("x2", x2)
        same_examples(x1, x2)
    checks.flag("center", center)
    n2 = None if x2 is None else checks.batch("x2", x2)
    own = pair_of_weights(weights, checks.batch("x1", x1), n2)
    mask = differentiated(params, wrt)
    signs = isinstance(metric, str)
    if signs:
        _check_signs(metric, method, complex)
        x2 = x1 if x2 is None else x2  # the kernel is not symmetric
    scales = None if signs else numbers_of_leaves(metric, params, mask)
    batch_size = check_batch_size(batch_size)
    options = Options(reduce, method, mask, per_leaf, batch_size, precision, rates(), signs, center)
    f = as_it_is(f, params, one_example(x1))
    check_convention(complex, params, mask, output_shapes(f, params, x1))
    if complex == "real":
        f = in_parts(f)
    elif complex == "hermitian":
        check_holomorphic(f, params, one_example(x1), mask)
    out, tree = jax.tree.flatten(output_shapes(f, params, x1))
    shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in out)
    index = chosen_outputs(outputs, shapes)
    alone = checks.batch("x1", x1) == 1 and x2 is not None
    check_examples(in_parts(f) if complex else f, params, x2 if alone else x1)
    return Request(f, params, x1, x2, index, own, scales, options, tree, shapes)


def only_output(request: Request, purpose: str) -> tuple[tuple[int, ...], np.dtype]:
    """Require a model with one output array; give shape and dtype of the outputs asked for."""
    if len(request.shapes) != 1:
        raise TypeError(
            f"`f` must return one array for {purpose}, got {len(request.shapes)}. Take one of "
            "them, as in lambda params, x: f(params, x)[0], or concatenate them in f."
        )
    (shape,) = request.shapes
    return shape.shape if request.outputs is None else request.outputs.shape, shape.dtype
