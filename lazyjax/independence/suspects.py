"""Where a model may let the examples of a batch see each other, read from its jaxprs.

The model is traced on two and on three examples, and the two jaxprs are walked through side by
side: an axis that is longer in the other holds the batch, alone or folded with others. What joins
or moves its entries is suspect, and no more: a batch may be cut and put together again, or a sum
run over zeros. A model without suspects treats each example alone.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import JaxprEqn, Literal

from lazyjax.equations import Jaxpr, inner_jaxprs, lengths, needed, settings


def _cut(equation: JaxprEqn) -> list[int]:
    """Give the axes of which a part is taken or written."""
    update = equation.primitive.name == "dynamic_update_slice"
    part = lengths(equation.invars[1] if update else equation.outvars[0])
    whole = lengths(equation.invars[0])
    return [i for i, n in enumerate(whole) if part[i] != n]


def _spanned(equation: JaxprEqn) -> list[int]:
    """Give the axes of space along which a convolution has more than one weight."""
    numbers, kernel = settings(equation).numbers, lengths(equation.invars[1])
    axes = zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], strict=True)
    return [i for i, k in axes if kernel[k] > 1]


def _scrambles(equation: JaxprEqn, batch: list[int], out: list[int]) -> bool:
    """Tell whether a reshape has more or fewer numbers before an axis of the batch than it had."""
    shape, new = lengths(equation.invars[0]), lengths(equation.outvars[0])
    order = settings(equation).order or range(len(shape))
    before = [
        math.prod(shape[i] for i in order[:n]) for n, axis in enumerate(order) if axis in batch
    ]
    return before != [math.prod(new[:i]) for i in out]


CROSSING: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(
        ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), lambda e: [settings(e).axis]
    ),
    **dict.fromkeys(
        ("reduce_window", "reduce_window_sum", "reduce_window_max", "reduce_window_min"),
        lambda e: [i for i, n in enumerate(settings(e).window) if n > 1],
    ),
    **dict.fromkeys(
        ("scatter", "scatter-add", "scatter-mul", "scatter-min", "scatter-max"),
        lambda e: settings(e).numbers.scatter_dims_to_operand_dims,
    ),
    **dict.fromkeys(("slice", "dynamic_slice", "dynamic_update_slice"), _cut),
    **dict.fromkeys(
        ("pure_callback", "io_callback", "ffi_call"), lambda e: range(len(lengths(e.invars[0])))
    ),
    "pad": lambda e: [i for i, n in enumerate(settings(e).edges) if any(n)],
    "fft": lambda e: range(len(lengths(e.invars[0])))[-len(settings(e).lengths) :],
    "sort": lambda e: [settings(e).axis],
    "rev": lambda e: settings(e).axes,
    "gather": lambda e: settings(e).numbers.start_index_map,
    "conv_general_dilated": _spanned,
}
"""Primitives that can join or move entries along axes of their first operand and keep the axes:
`(equation) -> axes`. All others that join the examples lose an axis.
"""

MOVING = {"slice", "dynamic_slice", "dynamic_update_slice", "gather", "rev", "concatenate", "pad"}
"""These join nothing by themselves, so they are the last to be named."""

RANDOM = {"random_bits", "rng_bit_generator", "rng_uniform"}

Marks = frozenset[str]
"""What a value depends on: "x", the "size" of the batch, the "position" in it."""

NOTHING = frozenset[str]()


class Suspect(NamedTuple):
    """An equation that may be at fault."""

    fault: str  # "others", "random", "size" or "position"
    what: str
    moves: bool = False


def _batch_axes(two: Any, three: Any) -> list[int]:
    shapes = (getattr(value.aval, "shape", ()) for value in (two, three))
    return [i for i, (m, n) in enumerate(zip(*shapes, strict=True)) if m != n]


def _differ(two: Any, three: Any) -> bool:
    return two is not three and not np.array_equal(two, three, equal_nan=True)


def _through_one(
    two: Any, three: Any, marks: list[Marks], noted: list[Suspect], place: str
) -> Marks:
    """Give the marks of the outputs of an equation that runs no jaxpr."""
    name, every = two.primitive.name, NOTHING.union(*marks)
    inputs = [_batch_axes(*pair) for pair in zip(two.invars, three.invars, strict=True)]
    outputs = [_batch_axes(*pair) for pair in zip(two.outvars, three.outvars, strict=True)]
    if name in RANDOM and any(outputs):
        noted.append(Suspect("random", name + place))
    if name == "iota" and settings(two).axis in outputs[0]:
        return frozenset({"position"})
    if not inputs or not outputs:
        return every
    lost = max(map(len, inputs)) > min(map(len, outputs))
    if "x" not in every:
        return every | {"size"} if lost else every
    lost = lost or (name == "reshape" and _scrambles(two, inputs[0], outputs[0]))
    crossed = CROSSING[name](two) if name in CROSSING else ()
    if lost or any(int(axis) in inputs[0] for axis in crossed):
        noted.append(Suspect("others", f"{name} along the batch{place}", name in MOVING))
    for fault in ("size", "position"):
        if any(fault in mark and "x" not in mark for mark in marks):
            noted.append(Suspect(fault, f"{name} with what depends on it{place}"))
    return every


def _through_loop(
    two: Any, three: Any, marks: list[Marks], noted: list[Suspect], at: str
) -> list[Marks]:
    """Walk through a `scan` or a `while` until the marks of its carry grow no more."""
    loop, other = settings(two), settings(three)
    if two.primitive.name == "scan":
        start, carries = loop.constants, loop.carries
    else:
        start, carries = loop.body_constants, len(two.outvars)
        marks = marks[loop.cond_constants :]
    while True:
        out = _walk(loop.body.jaxpr, other.body.jaxpr, marks, noted, at)
        grown = [a | b for a, b in zip(marks[start:], out[:carries], strict=False)]
        if marks[start : start + carries] == grown:
            break
        marks = [*marks[:start], *grown, *marks[start + carries :]]
    over_batch = two.primitive.name == "scan" and loop.length != other.length
    if over_batch and any("x" in mark for mark in out[:carries]):
        noted.append(Suspect("others", f"scan along the batch{_place(at)}"))
    return out


def _place(at: str) -> str:
    return at and f", in {at}"


def _through(
    two: Any, three: Any, marks: list[Marks], noted: list[Suspect], at: str
) -> list[Marks]:
    """Give the marks of an equation's outputs, and add what is suspect in it."""
    name = two.primitive.name
    stack = str(two.source_info.name_stack).split("/")
    at = "/".join(part for part in (at, *stack) if part and not part.endswith("()"))
    if name in ("scan", "while"):
        return _through_loop(two, three, marks, noted, at)
    inside = [inner_jaxprs(equation) for equation in (two, three)]
    if not inside[0] or name in CROSSING or name.startswith("reduce"):
        return [_through_one(two, three, marks, noted, _place(at))] * len(two.outvars)
    pairs = list(zip(*inside, strict=True))
    if name == "cond":
        ways = [_walk(a, b, marks[1:], noted, at) for a, b in pairs]
        return [marks[0].union(*way) for way in zip(*ways, strict=True)]
    if len(pairs) == 1 and len(inside[0][0].invars) == len(marks):
        return _walk(inside[0][0], inside[1][0], marks, noted, at)
    for a, b in pairs:
        _walk(a, b, [NOTHING.union(*marks)] * len(a.invars), noted, at)
    return [_through_one(two, three, marks, noted, _place(at))] * len(two.outvars)


def _walk(
    two: Any, three: Any, marks: list[Marks], noted: list[Suspect], at: str = ""
) -> list[Marks]:
    """Give the marks of a jaxpr's outputs from those of its inputs (the last of its variables)."""
    variables = [*two.constvars, *two.invars]
    known = dict(zip(variables[len(variables) - len(marks) :], marks, strict=True))

    def read(a: Any, b: Any) -> Marks:
        if isinstance(a, Literal):
            return frozenset({"size"} if _differ(a.val, getattr(b, "val", None)) else ())
        return known.get(a, NOTHING)

    for used, a, b in zip(needed(two), two.eqns, three.eqns, strict=True):
        if a.primitive is not b.primitive:
            raise ValueError(f"{a.primitive} is not {b.primitive}")
        if used:
            inputs = [read(*pair) for pair in zip(a.invars, b.invars, strict=True)]
            known.update(zip(a.outvars, _through(a, b, inputs, noted, at), strict=True))
    return [read(*pair) for pair in zip(two.outvars, three.outvars, strict=True)]


def suspects(two: Jaxpr, three: Jaxpr, leaves: int) -> list[Suspect] | None:
    """Find the equations that may let the examples of a batch see each other.

    Parameters
    ----------
    two, three : Jaxpr
        The model, traced on two and on three examples.
    leaves : int
        How many of its last inputs are leaves of x.

    Returns
    -------
    list of Suspect, or None
        In the order of the jaxpr. None if the two jaxprs are not made of the same equations, as
        where Python asks for the size of the batch.
    """
    noted: list[Suspect] = []
    others = [NOTHING] * (len(two.jaxpr.invars) - leaves)
    try:
        pairs = zip(two.consts, three.consts, strict=True)
        sized = [frozenset({"size"} if _differ(*pair) else ()) for pair in pairs]
        _walk(two.jaxpr, three.jaxpr, [*sized, *others, *[frozenset({"x"})] * leaves], noted)
    except Exception:  # of `zip`, where they part; a primitive that is built in another way
        return None
    return noted
