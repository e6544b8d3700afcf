"""Complex parameters and outputs: their real parts, and whether a model is holomorphic."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from lazyjax.equations import Jaxpr, equations
from lazyjax.leaves import split
from lazyjax.types import Params, PyTree

CONVENTIONS = ("real", "hermitian")
"""What becomes of complex numbers: the kernel of real and imaginary parts, or J J^H."""

_SPLITTING = ("real", "imag", "conj", "abs", "complex")
"""What no derivative of a holomorphic function does, nor its transpose."""


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
            f"`complex` must be None for a model without complex numbers, got {convention!r}. "
            "Leave it out."
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


def check_holomorphic(f: Partial, params: Params, x: PyTree, wrt: tuple[bool, ...]) -> None:
    """Require a model that is holomorphic in its complex leaves.

    The derivative then is linear over complex numbers: its jaxpr takes none apart.
    """
    mine = tuple(
        m and is_complex(leaf) for leaf, m in zip(jax.tree.leaves(params), wrt, strict=True)
    )
    if not any(mine):
        return
    for equation in equations(_linear(f, params, x, mine)):
        name = equation.primitive.name
        dtypes = [v.aval.dtype for v in (*equation.invars, *equation.outvars)]
        if name in _SPLITTING and any(map(is_complex, dtypes)):
            raise ValueError(
                "`f` must be holomorphic in its complex parameters for complex='hermitian', but "
                f"its derivative takes complex numbers apart ({name}). Use complex='real'."
            )
