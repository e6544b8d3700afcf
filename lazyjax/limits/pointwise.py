"""Which operations act entry by entry, and which functions have a derivative of their own."""

from pathlib import Path
from typing import Any

import jax

from lazyjax.equations import equations, inner_jaxprs, source_of_rule

_OF_JAX = str(Path(jax.__file__).parent)

POINTWISE = set(
    [
        "abs",
        "max",
        "min",
        "exp",
        "exp2",
        "expm1",
        "log",
        "log1p",
        "tanh",
        "sinh",
        "cosh",
        "sin",
        "cos",
        "tan",
        "asin",
        "acos",
        "atan",
        "atan2",
        "asinh",
        "acosh",
        "atanh",
        "erf",
        "erfc",
        "erf_inv",
        "logistic",
        "sqrt",
        "rsqrt",
        "cbrt",
        "square",
        "integer_pow",
        "pow",
        "sign",
        "floor",
        "ceil",
        "round",
        "clamp",
        "gt",
        "ge",
        "lt",
        "le",
        "eq",
        "ne",
        "and",
        "or",
        "not",
        "xor",
        "select_n",
        "lgamma",
        "digamma",
        "is_finite",
        "stop_gradient",
        "rem",
        "mul",
        "div",
        "add",
        "sub",
        "neg",
        "add_any",
        "convert_element_type",
        "reduce_precision",
        "copy",
        "name",
    ]
)
"""Primitives that act entry by entry."""


def as_text(equation: Any) -> str:
    """Write an equation in a line, for a message."""
    text = " ".join(str(equation).split())
    return text if len(text) < 200 else f"{text[:200]} ..."


def has_own_rule(equation: Any) -> bool:
    """Tell whether the derivative of a function may be another than that of its body.

    A function of JAX that is given a rule tells by its source where it is from itself, as if the
    rule were JAX's; so what has none of its own is named.
    """
    name, _, file = source_of_rule(equation).partition(" at ")
    return name not in ("relu", "relu6") or _OF_JAX not in file


def is_pointwise(equation: Any) -> bool:
    """Tell whether all that a function does is entry by entry, and its output one array."""
    inside = [e for body in inner_jaxprs(equation) for e in equations(body)]
    return (
        all(e.primitive.name in POINTWISE or inner_jaxprs(e) or _is_scalar(e) for e in inside)
        and len(equation.outvars) == 1
    )


def _is_scalar(equation: Any) -> bool:
    small = all(not v.aval.shape for v in equation.invars)
    return small and equation.primitive.name == "broadcast_in_dim"
