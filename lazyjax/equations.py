"""The equations of JAX: what their parameters are called, by version, and how they are evaluated.

Nothing else in the library knows a parameter of an equation by name. What is not written here, a
primitive with a new parameter or without one that is read, has no settings: whoever asks takes the
way that needs none.
"""

import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr
from jax.extend import core
from jax.extend.core import JaxprEqn, Literal

Jaxpr = Any
"""A jaxpr with its constants, which JAX has a type for until 0.11 and another since 0.12."""

INLINE = {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"}
"""Primitives whose jaxpr may be run in their place."""


class _Layout(NamedTuple):
    """The parameters of a primitive."""

    read: dict[str, str]  # the name that `settings` gives it -> JAX's own
    others: frozenset[str]  # those that change no number: sharding, hints, what older versions had


def _layout(others: str = "", **read: str) -> _Layout:
    return _Layout(read, frozenset(others.split()))


_WINDOW = _layout(
    window="window_dimensions",
    strides="window_strides",
    padding="padding",
    input_steps="base_dilation",
    steps="window_dilation",
)
_CUMULATED = _layout("reverse", axis="axis")
_SCATTER = _layout(
    "indices_are_sorted mode unique_indices update_consts update_jaxpr", numbers="dimension_numbers"
)
_CALL = _layout(
    "name inline keep_unused donated_invars in_shardings out_shardings in_layouts out_layouts "
    "ctx_mesh compiler_options_kvs resource_env",
    body="jaxpr",
)
_REMAT = _layout("policy prevent_cse differentiated", body="jaxpr")

PARAMETERS: dict[str, _Layout] = {
    # calls and loops
    "jit": _CALL,
    "pjit": _CALL,
    "closed_call": _layout("name", body="call_jaxpr"),
    "core_call": _layout("name", body="call_jaxpr"),
    "remat": _REMAT,
    "remat2": _REMAT,
    "checkpoint": _REMAT,
    "scan": _layout(  # which inputs are constants and carries: `_of_scan`
        "num_consts num_carry "  # until 0.11
        "linear _split_transpose "  # until 0.9
        "ft_in ft_out",  # since 0.12
        body="jaxpr",
        length="length",
        reverse="reverse",
        unroll="unroll",
    ),
    "while": _layout(
        cond="cond_jaxpr",
        body="body_jaxpr",
        cond_constants="cond_nconsts",
        body_constants="body_nconsts",
    ),
    # products
    "dot_general": _layout(
        "precision preferred_element_type out_sharding", numbers="dimension_numbers"
    ),
    "conv_general_dilated": _layout(
        "out_sharding",
        numbers="dimension_numbers",
        strides="window_strides",
        padding="padding",
        input_steps="lhs_dilation",
        filter_steps="rhs_dilation",
        groups="feature_group_count",
        batch_groups="batch_group_count",
        precision="precision",
        dtype="preferred_element_type",
    ),
    "gather": _layout(
        "fill_value indices_are_sorted unique_indices",
        numbers="dimension_numbers",
        mode="mode",
        sizes="slice_sizes",
    ),
    # what changes a layout, or multiplies by a constant
    "reshape": _layout("sharding", shape="new_sizes", order="dimensions"),
    "transpose": _layout(order="permutation"),
    "squeeze": _layout(axes="dimensions"),
    "broadcast_in_dim": _layout("sharding", shape="shape", axes="broadcast_dimensions"),
    "slice": _layout(starts="start_indices", stops="limit_indices", strides="strides"),
    "rev": _layout(axes="dimensions"),
    "convert_element_type": _layout("weak_type sharding", dtype="new_dtype"),
    "copy": _layout(),
    "copy_p": _layout(),
    "name": _layout("name"),
    "neg": _layout(),
    "mul": _layout("out_dtype"),  # since 0.9
    "div": _layout(),
    "add": _layout(),
    "integer_pow": _layout(power="y"),
    # what cuts and joins arrays, and what sums
    "concatenate": _layout(axis="dimension"),
    "stack": _layout(axis="axis"),  # since 0.12
    "split": _layout(axis="axis", sizes="sizes"),
    "dynamic_slice": _layout(sizes="slice_sizes"),
    "reduce_sum": _layout("out_sharding", axes="axes"),
    # what may join the entries of an axis
    "iota": _layout("dtype shape sharding", axis="dimension"),
    "pad": _layout(edges="padding_config"),
    "fft": _layout("fft_type", lengths="fft_lengths"),
    "sort": _layout("is_stable num_keys", axis="dimension"),
    "cumsum": _CUMULATED,
    "cumprod": _CUMULATED,
    "cummax": _CUMULATED,
    "cummin": _CUMULATED,
    "cumlogsumexp": _CUMULATED,
    "reduce_window": _layout(
        "window_strides padding base_dilation window_dilation jaxpr consts",
        window="window_dimensions",
    ),
    "reduce_window_sum": _WINDOW,
    "reduce_window_max": _WINDOW,
    "reduce_window_min": _WINDOW,
    "scatter": _SCATTER,
    "scatter-add": _SCATTER,
    "scatter-mul": _SCATTER,
    "scatter-min": _SCATTER,
    "scatter-max": _SCATTER,
}
"""Primitives whose parameters are read, as JAX 0.8 to 0.12 have them."""


def _of_scan(equation: JaxprEqn, body: Jaxpr, length: int) -> dict[str, int] | None:
    """Tell constants, carries and what is run over by their shapes.

    `num_consts` and `num_carry` until JAX 0.11 are `ft_in` and `ft_out` since 0.12; what the body
    takes says the same in all of them.
    """

    def over(outer: Any, inner: Any) -> list[bool]:
        pairs = zip(outer, inner, strict=True)
        return [lengths(a) != lengths(b) for a, b in pairs]

    inputs = over(equation.invars, body.jaxpr.invars)
    outputs = over(equation.outvars, body.jaxpr.outvars)
    carries = outputs.count(False)
    constants = inputs.count(False) - carries
    in_order = inputs == sorted(inputs) and outputs == sorted(outputs) and constants >= 0
    sliced = [
        lengths(v) == (length, *lengths(inner))
        for v, inner, runs in (
            *zip(equation.invars, body.jaxpr.invars, inputs, strict=True),
            *zip(equation.outvars, body.jaxpr.outvars, outputs, strict=True),
        )
        if runs
    ]
    return {"constants": constants, "carries": carries} if in_order and all(sliced) else None


def settings(equation: JaxprEqn) -> Any:
    """Give what an equation does, by the names of `PARAMETERS`.

    Parameters
    ----------
    equation : jaxpr equation

    Returns
    -------
    namespace or None
        None where the primitive, or how this version of JAX has it, is not known; the latter with a
        warning. Jaxprs are closed; a `scan` also has the numbers of its `constants` and `carries`.
    """
    name = equation.primitive.name
    if name not in PARAMETERS:
        return None
    layout, parameters = PARAMETERS[name], equation.params
    needed = set(layout.read.values())
    known: dict[str, Any] | None = None
    if needed <= set(parameters) <= needed | layout.others:
        known = {own: parameters[theirs] for own, theirs in layout.read.items()}
        known |= {k: _closed(known[k]) for k in ("body", "cond") if k in known}
        if name == "scan":
            counts = _of_scan(equation, known["body"], known["length"])
            known = None if counts is None else known | counts
    if known is None:
        warnings.warn(
            f"`{name}` of JAX {jax.__version__} has parameters that this lazyjax does not know "
            f"({', '.join(sorted(parameters))}): what goes through it is differentiated plainly, "
            "right but slower. Look for a newer lazyjax.",
            stacklevel=2,
        )
        return None
    return SimpleNamespace(**known)


def known(equation: JaxprEqn) -> bool:
    """Tell whether an equation can be read, or has nothing that would be."""
    return equation.primitive.name not in PARAMETERS or settings(equation) is not None


def _closed(jaxpr: Jaxpr) -> Jaxpr:
    if hasattr(jaxpr, "jaxpr"):
        return jaxpr
    return vars(core)["ClosedJaxpr"](jaxpr, ())  # until 0.11; since then all have constants


def lengths(v: Any) -> tuple[int, ...]:
    """Give the shape of what a variable or a literal of a jaxpr stands for."""
    return v.aval.shape


def is_custom_vjp(equation: JaxprEqn) -> bool:
    """Tell whether an equation calls a `custom_vjp`, which has no forward mode."""
    return equation.primitive.name.startswith("custom_vjp_call")


def is_custom_jvp(equation: JaxprEqn) -> bool:
    """Tell whether an equation calls a `custom_jvp`, whose body is never differentiated."""
    return equation.primitive.name.startswith("custom_jvp_call")


def has_custom_rule(equation: JaxprEqn) -> bool:
    """Tell whether an equation has a rule for its derivative that is a Python function."""
    return equation.primitive.name.startswith("custom_")


def inlined(equation: JaxprEqn) -> Jaxpr | None:
    """Give the closed jaxpr that may be evaluated in the place of an equation; None if none may."""
    if is_custom_jvp(equation):
        body = equation.params.get("call_jaxpr")
        return None if body is None else _closed(body)
    if equation.primitive.name not in INLINE:
        return None
    call = settings(equation)
    return None if call is None else call.body


def source_of_rule(equation: JaxprEqn) -> str:
    """Give the name and the file of the function that has a custom rule; "" if it is not known."""
    body = equation.params.get("call_jaxpr")
    source = getattr(getattr(body, "jaxpr", body), "debug_info", None)
    return str(getattr(source, "func_src_info", ""))


def _jaxprs(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for entry in value:
            yield from _jaxprs(entry)
    elif hasattr(value, "eqns") or hasattr(value, "jaxpr"):
        yield value


def inner_jaxprs(equation: JaxprEqn) -> list[Any]:
    """Give the jaxprs in an equation, opened, in the order of its parameters."""
    return [getattr(j, "jaxpr", j) for value in equation.params.values() for j in _jaxprs(value)]


def equations(jaxpr: Jaxpr) -> Iterator[Any]:
    """Run over the equations of a jaxpr and of those inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in inner_jaxprs(equation):
            yield from equations(inner)


def epsilon(jaxpr: Jaxpr) -> float:
    """Give the machine epsilon of the coarsest floats on the way."""
    made = [v.aval for equation in equations(jaxpr) for v in equation.outvars]
    avals = [a for a in (*made, *(v.aval for v in jaxpr.outvars)) if hasattr(a, "dtype")]
    dtypes = {a.dtype for a in avals if jnp.issubdtype(a.dtype, jnp.inexact)}
    return max(float(jnp.finfo(dtype).eps) for dtype in dtypes)


def constants(jaxpr: Jaxpr) -> list[Any]:
    """Give the constants of a jaxpr and of those inside it: what a `jit` in a function holds."""
    every = list(getattr(jaxpr, "consts", ()))
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        for value in equation.params.values():
            for inner in _jaxprs(value):
                every += constants(inner)
    return every


def needed(jaxpr: Jaxpr) -> list[bool]:
    """Tell which equations the outputs depend on."""
    alive = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    marks = [False] * len(jaxpr.eqns)
    for i in reversed(range(len(jaxpr.eqns))):
        equation = jaxpr.eqns[i]
        if equation.effects or any(v in alive for v in equation.outvars):
            marks[i] = True
            alive |= {v for v in equation.invars if not isinstance(v, Literal)}
    return marks


def evaluate(jaxpr: Jaxpr, equation: JaxprEqn, read: Callable[[Any], Any]) -> list[Any]:
    """Evaluate one equation as it is."""
    inputs = list(dict.fromkeys(v for v in equation.invars if not isinstance(v, Literal)))
    alone = jaxpr.replace(
        constvars=[],
        invars=inputs,
        outvars=equation.outvars,
        eqns=[equation],
        effects=equation.effects,
        debug_info=jaxpr.debug_info._replace(arg_names=None, result_paths=None),
    )
    return eval_jaxpr(alone, (), *map(read, inputs))


def rescan(
    equation: JaxprEqn,
    inputs: list[Any],
    body: Callable[[Any, list[Any], Any], Any],
    more: Any = None,
) -> tuple[list[Any], Any]:
    """Run a `scan` equation with another body.

    Parameters
    ----------
    equation : jaxpr equation
    inputs : list
        Values of its operands.
    body : callable
        `(closed jaxpr, values, more) -> outputs, other`.
    more : pytree, optional
        What the scan runs over besides; `body` is given a slice.

    Returns
    -------
    outputs : list
    other : pytree
        What `body` gave besides, stacked.
    """
    scan = settings(equation)
    outside = inputs[: scan.constants]
    runs_over = scan.constants + scan.carries

    def turn(carry: Any, now: Any) -> tuple[Any, Any]:
        over, more = now
        out, other = body(scan.body, [*outside, *carry, *over], more)
        return out[: scan.carries], (out[scan.carries :], other)

    carry, (out, other) = jax.lax.scan(
        turn,
        inputs[scan.constants : runs_over],
        (inputs[runs_over:], more),
        length=scan.length,
        reverse=scan.reverse,
        unroll=scan.unroll,
    )
    return [*carry, *out], other
