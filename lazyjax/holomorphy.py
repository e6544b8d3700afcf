"""Complex parameters and outputs: their real parts, and whether a model is holomorphic."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jax.tree_util import Partial

from lazyjax.equations import INLINE, Jaxpr, inner_jaxprs, known, settings
from lazyjax.leaves import split
from lazyjax.types import Params, PyTree

CONVENTIONS = ("real", "hermitian")
"""What becomes of complex numbers: the kernel of real and imaginary parts, or J J^H."""


def is_complex(leaf: Any) -> bool:
    """Tell whether an array holds complex numbers."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating)


def parts(y: jax.Array) -> jax.Array:
    """Put the real part (.., 0) and the imaginary part (.., 1) of a complex array side by side."""
    return jnp.stack([y.real, y.imag], -1) if is_complex(y) else y


def _in_parts(f: Partial, params: Params, x: PyTree) -> Any:
    return jax.tree.map(parts, f(params, x))


def in_parts(f: Partial) -> Partial:
    """Give the model whose outputs are the parts of those of f."""
    return Partial(_in_parts, f)


def check_convention(
    convention: str | None, params: Params, wrt: tuple[bool, ...], outputs: PyTree
) -> None:
    """Require a convention where, and only where, something is complex."""
    moving = zip(jax.tree_util.tree_leaves_with_path(params), wrt, strict=True)
    found = [
        f"`params`{jax.tree_util.keystr(path)}"
        for (path, leaf), m in moving
        if m and is_complex(leaf)
    ]
    if any(map(is_complex, jax.tree.leaves(outputs))):
        found.append("the output of f")
    if found and convention is None:
        raise TypeError(
            f"`complex` must say what is meant where numbers are complex, as {found[0]} is. Use "
            'ntk(..., complex="real"), the kernel of real and imaginary parts, (.., 2, .., 2), or '
            'complex="hermitian", J J^H. Elsewhere split them into real and imaginary parts '
            "inside f."
        )
    if convention is None:
        return
    if convention not in CONVENTIONS:
        raise ValueError(
            f"`complex` must be 'real', 'hermitian' or None, got {convention!r}. Use 'real' for "
            "the kernel of real and imaginary parts, 'hermitian' for J J^H."
        )
    if not found:
        raise ValueError(
            "`complex` must be None where neither the outputs nor the parameters that are "
            f"differentiated are complex, got {convention!r}. Leave it out."
        )
    if convention == "hermitian" and not all(map(is_complex, jax.tree.leaves(outputs))):
        raise ValueError(
            "`complex` must not be 'hermitian' where f(params, x) is real, which no holomorphic "
            "function is. Use complex='real'."
        )


def _linear(f: Partial, params: Params, x: PyTree, mine: tuple[bool, ...]) -> Jaxpr:
    """Give the jaxpr of the derivative by some leaves, as the linear map that it is."""
    found = []

    def backward(w: Any, x: PyTree) -> Any:
        y, pullback = jax.vjp(lambda w: f(rebuild(w), x), w)
        found.append(jax.make_jaxpr(pullback)(y))
        return y

    def forward(w: Any, x: PyTree) -> Any:
        product = jax.linearize(lambda w: f(rebuild(w), x), w)[1]
        found.append(jax.make_jaxpr(product)(w))
        return w

    w, rebuild = split(params, mine)
    try:
        jax.eval_shape(backward, w, x)
    except Exception:  # no reverse mode
        jax.eval_shape(forward, w, x)
    return found[-1].jaxpr


def _is_taken_apart(jaxpr: Jaxpr, moving: list[bool]) -> tuple[list[bool], str | None]:
    """Follow what depends on some inputs of a linear map.

    Parameters
    ----------
    jaxpr : Jaxpr
    moving : list of bool
        Which of its inputs are followed.

    Returns
    -------
    moving : list of bool
        Which outputs depend on them.
    name : str or None
        Of the first equation that makes a real number of a complex one, or the other way round, or
        a conjugate.
    """
    follows = {v for v, moves in zip(jaxpr.invars, moving, strict=True) if moves}
    fault = None

    def is_moving(atom: Any) -> bool:
        return not isinstance(atom, Literal) and atom in follows

    for equation in jaxpr.eqns:
        marks = list(map(is_moving, equation.invars))
        if not any(marks):
            continue
        name, inner = equation.primitive.name, inner_jaxprs(equation)
        outs = [True] * len(equation.outvars)
        if inner and (name in INLINE or name == "scan") and known(equation):
            own = settings(equation)
            outs, found = _is_taken_apart(own.body.jaxpr, marks)
            if name == "scan":  # what a carry becomes, it is in the next step
                while True:
                    carried = slice(own.constants, own.constants + own.carries)
                    grown = [a or b for a, b in zip(marks[carried], outs, strict=False)]
                    if grown == marks[carried]:
                        break
                    marks[carried] = grown
                    outs, found = _is_taken_apart(own.body.jaxpr, marks)
            fault = fault or found
        elif inner:
            for body in inner:
                fault = fault or _is_taken_apart(body, [True] * len(body.invars))[1]
        else:
            every = [v for v in equation.invars if is_moving(v)] + list(equation.outvars)
            numbers = [v.aval.dtype for v in every if jnp.issubdtype(v.aval.dtype, jnp.inexact)]
            if name == "conj" or len(set(map(is_complex, numbers))) > 1:
                fault = fault or name
        follows |= {v for v, moves in zip(equation.outvars, outs, strict=True) if moves}
    return list(map(is_moving, jaxpr.outvars)), fault


def check_holomorphic(f: Partial, params: Params, x: PyTree, wrt: tuple[bool, ...]) -> None:
    """Require a model that is holomorphic in its complex leaves.

    The derivative then is linear over complex numbers: what depends on a direction is complex all
    the way, and so it is in the transpose.
    """
    mine = tuple(
        m and is_complex(leaf) for leaf, m in zip(jax.tree.leaves(params), wrt, strict=True)
    )
    if not any(mine):
        return
    jaxpr = _linear(f, params, x, mine)
    _, name = _is_taken_apart(jaxpr, [True] * len(jaxpr.invars))
    if name is not None:
        raise ValueError(
            "`f` must be holomorphic in its complex parameters for complex='hermitian', but its "
            f"derivative takes complex numbers apart ({name}). Use complex='real'."
        )
