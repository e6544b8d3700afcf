"""What is asked for: the arguments of `ntk`, checked before any work."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import Partial

from lazyjax import checks
from lazyjax.factors import output_shapes
from lazyjax.independence import check_examples
from lazyjax.kernels.methods import METHODS
from lazyjax.kernels.task import REDUCTIONS
from lazyjax.leaves import differentiated
from lazyjax.traces import as_it_is, one_example
from lazyjax.types import ModelFunction, Params


def chosen_outputs(outputs: Sequence[int] | jax.Array | None, out: Any) -> np.ndarray | None:
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


def same_examples(x1: Any, x2: Any) -> None:
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


def check_precision(precision: str) -> None:
    try:
        with jax.default_matmul_precision(precision):
            pass
    except ValueError as error:
        raise ValueError(
            "`precision` must be a name that jax.default_matmul_precision knows, got "
            f"{precision!r}. Use 'highest', 'high' or 'default'."
        ) from error


class Options(NamedTuple):
    """What is asked for: static, so that a call with the same options compiles nothing new."""

    reduce: str
    method: str
    wrt: tuple[bool, ...]  # of each leaf of params
    per_leaf: bool
    batch_size: tuple[int, int] | None
    precision: str
    level: int = 0  # how much memory is saved, as in `tiles.choose_blocks`


class Call(NamedTuple):
    """The arguments of a call, checked: `kernels(*arrays, options=options)`."""

    f: Partial
    params: Params
    x1: Any
    x2: Any | None
    outputs: Any
    options: Options

    @property
    def arrays(self) -> tuple[Any, ...]:
        """What is traced."""
        return self[:-1]


def check(
    f: ModelFunction,
    params: Params,
    x1: Any,
    x2: Any | None,
    *,
    reduce: str,
    wrt: Any,
    outputs: Sequence[int] | None,
    precision: str,
    method: str = "auto",
    per_leaf: bool = False,
    batch_size: int | tuple[int, int] | None = None,
) -> Call:
    """Check the arguments of `ntk`, before any work."""
    f = checks.model_function(f)
    checks.one_of("reduce", reduce, REDUCTIONS)
    checks.one_of("method", method, ["auto", *METHODS])
    check_precision(precision)
    checks.batch("x1", x1)
    if x2 is not None:
        checks.batch("x2", x2)
        same_examples(x1, x2)
    mask = differentiated(params, wrt)
    options = Options(reduce, method, mask, per_leaf, check_batch_size(batch_size), precision)
    f = as_it_is(f, params, one_example(x1))
    index = chosen_outputs(outputs, output_shapes(f, params, x1))
    alone = checks.batch("x1", x1) == 1 and x2 is not None
    check_examples(f, params, x2 if alone else x1)
    return Call(f, params, x1, x2, index, options)


def only_output(call: Call, purpose: str) -> tuple[tuple[int, ...], Any]:
    """Require a model with one output array; give the shape of the outputs that are asked for, and
    their dtype."""
    shapes = jax.tree.leaves(output_shapes(call.f, call.params, call.x1))
    if len(shapes) != 1:
        raise TypeError(
            f"`f` must return one array for {purpose}, got {len(shapes)}. Take one of them, as in "
            "lambda params, x: f(params, x)[0], or concatenate them in f."
        )
    return shapes[0].shape if call.outputs is None else call.outputs.shape, shapes[0].dtype
