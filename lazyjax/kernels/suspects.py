"""Where a model may let the examples of a batch see each other, read from its jaxprs.

The model is traced on two and on three examples, and the two jaxprs are walked through side by
side: an axis that grows by one half holds the batch, alone or folded with others. What joins or
moves its entries is suspect, and no more: a batch may be folded and unfolded, a sum run over zeros.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from lazyjax import checks
from lazyjax.derivatives import inner_jaxprs
from lazyjax.kernels.jaxprs import needed

CROSSING: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(
        ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), lambda s: [s["axis"]]
    ),
    **dict.fromkeys(
        ("reduce_window", "reduce_window_sum", "reduce_window_max", "reduce_window_min"),
        lambda s: [i for i, n in enumerate(s["window_dimensions"]) if n > 1],
    ),
    **dict.fromkeys(
        ("scatter", "scatter-add", "scatter-mul", "scatter-min", "scatter-max"),
        lambda s: s["dimension_numbers"].scatter_dims_to_operand_dims,
    ),
    "sort": lambda s: [s["dimension"]],
    "rev": lambda s: s["dimensions"],
    "gather": lambda s: s["dimension_numbers"].start_index_map,
    "conv_general_dilated": lambda s: s["dimension_numbers"].lhs_spec[2:],
}
"""Axes of the first operand that outlive the joining of their entries: `(settings) -> axes`."""

MOVING = {"slice", "dynamic_slice", "gather", "rev", "concatenate", "dynamic_update_slice"}
"""These join nothing by themselves, so they are the last to be named."""

RANDOM = {"random_bits", "rng_bit_generator", "rng_uniform"}

Marks = frozenset[str]
"""What a value depends on: "x", the examples, and "size", their number."""

NOTHING, X, SIZE = frozenset[str](), frozenset({"x"}), frozenset({"size"})


class Suspect(NamedTuple):
    """An equation that may be at fault."""

    fault: str  # "others", "random" or "size"
    what: str
    moves: bool = False


def _batch_axes(two: Any, three: Any) -> set[int]:
    shapes = (getattr(value.aval, "shape", ()) for value in (two, three))
    pairs = enumerate(zip(*shapes, strict=True))
    return {i for i, (m, n) in pairs if 0 < 3 * m == 2 * n}


def _differ(two: Any, three: Any) -> bool:
    """Tell whether two constants differ, as far as they are known."""
    if two is three or not checks.is_known((two, three)):
        return False
    return not np.array_equal(two, three, equal_nan=True)


def _of_equation(two: Any, three: Any, marks: list[Marks], place: str) -> Iterable[Suspect]:
    """Find what is suspect in one equation that runs no jaxpr."""
    name = two.primitive.name
    inputs = [_batch_axes(*pair) for pair in zip(two.invars, three.invars, strict=True)]
    outputs = [_batch_axes(*pair) for pair in zip(two.outvars, three.outvars, strict=True)]
    if name in RANDOM and any(outputs):
        yield Suspect("random", name + place)
    if not outputs or not any("x" in mark for mark in marks):
        return
    lost = max(map(len, inputs)) > min(map(len, outputs))
    crossed = CROSSING[name](two.params) if name in CROSSING else ()
    if lost or any(int(axis) in inputs[0] for axis in crossed):
        yield Suspect("others", f"{name} along the batch{place}", name in MOVING)
    for variable, mark in zip(two.invars, marks, strict=True):
        if mark == SIZE and jnp.issubdtype(variable.aval.dtype, jnp.inexact):
            yield Suspect("size", f"{name} with a number that depends on it{place}")


def _of_loop(
    two: Any, three: Any, marks: list[Marks], found: list[Suspect], at: str
) -> list[Marks]:
    """Walk through a `scan` or a `while` until the marks of its carry grow no more."""
    settings, others = two.params, three.params
    if two.primitive.name == "scan":
        body, start, carries = "jaxpr", settings["num_consts"], settings["num_carry"]
    else:
        body, start, carries = "body_jaxpr", settings["body_nconsts"], len(two.outvars)
        marks = marks[settings["cond_nconsts"] :]
    while True:
        out = _walk(settings[body].jaxpr, others[body].jaxpr, marks, found, at)
        grown = [a | b for a, b in zip(marks[start:], out[:carries], strict=False)]
        if marks[start : start + carries] == grown:
            break
        marks = [*marks[:start], *grown, *marks[start + carries :]]
    over_batch = settings.get("length") != others.get("length")
    if over_batch and any("x" in mark for mark in out[:carries]):
        found.append(Suspect("others", f"scan along the batch{_place(at)}"))
    return out


def _place(at: str) -> str:
    return at and f", in {at}"


def _through(
    two: Any, three: Any, marks: list[Marks], found: list[Suspect], at: str
) -> list[Marks]:
    """Give the marks of an equation's outputs, and add what is suspect in it."""
    name = two.primitive.name
    at = "/".join(filter(None, (at, str(two.source_info.name_stack))))
    if name in ("scan", "while"):
        return _of_loop(two, three, marks, found, at)
    every = NOTHING.union(*marks)
    inside = [list(inner_jaxprs(list(equation.params.values()))) for equation in (two, three)]
    if not inside[0] or name in CROSSING or name.startswith("reduce"):
        found += _of_equation(two, three, marks, _place(at))
        return [every] * len(two.outvars)
    pairs = list(zip(*inside, strict=True))
    if name == "cond":
        ways = [_walk(a, b, marks[1:], found, at) for a, b in pairs]
        return [marks[0].union(*way) for way in zip(*ways, strict=True)]
    if len(pairs) == 1 and len(inside[0][0].invars) == len(marks):
        return _walk(inside[0][0], inside[1][0], marks, found, at)
    for a, b in pairs:
        _walk(a, b, [every] * len(a.invars), found, at)
    return [every] * len(two.outvars)


def _walk(
    two: Any, three: Any, marks: list[Marks], found: list[Suspect], at: str = ""
) -> list[Marks]:
    """Give the marks of a jaxpr's outputs from those of its inputs (the last of its variables)."""
    variables = [*two.constvars, *two.invars]
    known = dict(zip(variables[len(variables) - len(marks) :], marks, strict=True))

    def read(a: Any, b: Any) -> Marks:
        if isinstance(a, Literal):
            return SIZE if _differ(a.val, getattr(b, "val", None)) else NOTHING
        return known.get(a, NOTHING)

    for used, a, b in zip(needed(two), two.eqns, three.eqns, strict=True):
        if a.primitive is not b.primitive:
            raise ValueError(f"{a.primitive} is not {b.primitive}")
        if used:
            inputs = [read(*pair) for pair in zip(a.invars, b.invars, strict=True)]
            known.update(zip(a.outvars, _through(a, b, inputs, found, at), strict=True))
    return [read(*pair) for pair in zip(two.outvars, three.outvars, strict=True)]


def suspects(two: ClosedJaxpr, three: ClosedJaxpr, leaves: int) -> list[Suspect] | None:
    """Find the equations that may let the examples of a batch see each other.

    Parameters
    ----------
    two, three : ClosedJaxpr
        The model, traced on two and on three examples.
    leaves : int
        How many of its last inputs are leaves of x.

    Returns
    -------
    list of Suspect, or None
        In the order of the jaxpr. None if the two jaxprs are not made of the same equations.
    """
    found: list[Suspect] = []
    others = [NOTHING] * (len(two.jaxpr.invars) - leaves)
    try:
        pairs = zip(two.consts, three.consts, strict=True)
        sized = [SIZE if _differ(*pair) else NOTHING for pair in pairs]
        _walk(two.jaxpr, three.jaxpr, [*sized, *others, *[X] * leaves], found)
    except ValueError:  # of `zip`, where they part
        return None
    return found
