"""Whether a function is still the one that was compiled.

Compiled code is found again by the identity of the function that it was made of. A function can
change without changing its identity: a global that it reads is bound anew, an attribute of its
object is set, a numpy array that it holds is written to. Its jaxpr and the constants of that tell,
and to trace it costs milliseconds where to compile it costs seconds.
"""

import itertools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.extend.core import Literal
from jax.tree_util import Partial

from lazyjax.equations import Jaxpr, has_custom_rule, inner_jaxprs, source_of_rule
from lazyjax.types import PyTree

_KEPT = 256  # functions, the latest, whose traces are remembered
_OF_JAX = str(Path(jax.__file__).parent)

_seen: OrderedDict[Any, list[tuple[Any, int]]] = OrderedDict()
_numbers = itertools.count(1)


@dataclass(frozen=True)
class _Version:
    """A function that equals another only if it is of the same version."""

    number: int

    def __call__(self, f: Callable[..., Any], *arguments: Any) -> Any:
        return f(*arguments)


class _Constant:
    """An array as it was, equal to another of the same values."""

    def __init__(self, value: Any):
        self.array = value if isinstance(value, jax.Array) else np.array(value)  # may be written to

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Constant):
            return False
        one, two = self.array, other.array
        if one is two:
            return True
        if (one.shape, one.dtype) != (two.shape, two.dtype):
            return False
        if jax.numpy.issubdtype(one.dtype, jax.dtypes.extended):  # keys
            one, two = jax.random.key_data(one), jax.random.key_data(two)
        return np.asarray(one).tobytes() == np.asarray(two).tobytes()

    __hash__ = None  # type: ignore[assignment]  (values may be large)


class _Unknown(Exception):
    """What a jaxpr holds cannot be compared with that of another."""


def _described(jaxpr: Jaxpr) -> Any:
    """Describe a jaxpr, with its constants, by what compares with that of another one."""
    numbers: dict[Any, int] = {}

    def atom(v: Any) -> Any:
        if isinstance(v, Literal):
            return str(v.aval), np.asarray(v.val).tobytes()
        return numbers.setdefault(v, len(numbers))

    def setting(value: Any, of_rule: bool) -> Any:
        if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
            return _described(value)
        if isinstance(value, tuple | list):
            return [setting(entry, of_rule) for entry in value]
        if isinstance(value, np.ndarray | jax.Array):
            return constant(value)
        # a rule is made anew by each trace; `_with_rules` sees what it does
        return type(value).__name__ if of_rule else value

    def constant(value: Any) -> Any:
        if isinstance(value, Tracer):
            raise _Unknown
        return _Constant(value) if hasattr(value, "dtype") or np.isscalar(value) else value

    inner = getattr(jaxpr, "jaxpr", jaxpr)
    equations = [
        (
            e.primitive.name,
            [atom(v) for v in e.invars],
            [(atom(v), str(v.aval)) for v in e.outvars],
            {k: setting(v, has_custom_rule(e)) for k, v in e.params.items()},
        )
        for e in inner.eqns
    ]
    return (
        [(atom(v), str(v.aval)) for v in (*inner.constvars, *inner.invars)],
        equations,
        [atom(v) for v in inner.outvars],
        [constant(c) for c in getattr(jaxpr, "consts", ())],
    )


def _has_own_rules(jaxpr: Jaxpr) -> bool:
    """Tell whether a jaxpr holds a custom rule that is not JAX's own, and may change."""
    for e in jaxpr.eqns:
        if has_custom_rule(e):
            if _OF_JAX not in source_of_rule(e):
                return True
        elif any(map(_has_own_rules, inner_jaxprs(e))):
            return True
    return False


def _traced(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Describe a function as it is now, rules of derivatives included."""
    jaxpr = jax.make_jaxpr(lambda *arguments: function(*arguments))(*arguments)
    if not _has_own_rules(jaxpr.jaxpr):
        return _described(jaxpr)

    def derivative(*arguments: Any) -> Any:
        leaves, structure = jax.tree.flatten(arguments)
        moving = [jax.numpy.issubdtype(leaf.dtype, np.inexact) for leaf in leaves]

        def of_floats(w: list[Any]) -> list[Any]:
            new = iter(w)
            full = [next(new) if m else v for m, v in zip(moving, leaves, strict=True)]
            out = jax.tree.leaves(function(*structure.unflatten(full)))
            return [y for y in out if jax.numpy.issubdtype(y.dtype, np.inexact)]

        y, pullback = jax.vjp(of_floats, [v for m, v in zip(moving, leaves, strict=True) if m])
        return pullback(y)

    try:
        return _described(jaxpr), _described(jax.make_jaxpr(derivative)(*arguments))
    except _Unknown:
        raise
    except Exception as error:  # no reverse mode: nothing is known of the rules
        raise _Unknown from error


def one_example(x: PyTree) -> Any:
    """Give the shapes and dtypes of a batch of one."""

    def one(leaf: Any) -> jax.ShapeDtypeStruct:
        aval = jax.typeof(leaf)
        return jax.ShapeDtypeStruct((1, *aval.shape[1:]), aval.dtype)

    return jax.tree.map(one, x)


def as_it_is(f: Partial, *arguments: Any, function: Callable[..., Any] | None = None) -> Partial:
    """Give a function that equals an earlier one only where that would compute the same.

    Parameters
    ----------
    f : Partial
        A model function.
    *arguments : pytrees
        What it is called with, of which shapes and dtypes matter.
    function : callable, optional
        What is traced, as `function(f, *arguments)`; by default f itself.

    Returns
    -------
    Partial
        f, the first time that it is seen and whenever it is as it was then; otherwise one that
        computes the same and that `jit` takes for a new function.

    Notes
    -----
    A trace, and a comparison that is linear in its equations and in the constants that f holds.
    A function that cannot be traced is given back: whoever calls it sees why.
    """

    def shape(leaf: Any) -> Any:
        aval = jax.typeof(leaf)
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype)

    try:
        leaves, structure = jax.tree.flatten((f, *arguments))
        shapes = [shape(leaf) for leaf in leaves]
        key = (structure, tuple((s.shape, s.dtype) for s in shapes), jax.numpy.result_type(float))
        hash(key)
    except TypeError:  # no arrays; or a function that is told from others by identity alone
        return f
    f_shapes, *of_arguments = structure.unflatten(shapes)
    apply = function or (lambda f, *arguments: f(*arguments))
    try:
        now = _traced(apply, (f_shapes, *of_arguments))
    except _Unknown:
        return Partial(_Version(next(_numbers)), f)
    except Exception:  # the model's own
        return f
    versions = _seen.setdefault(key, [])
    _seen.move_to_end(key)
    if len(_seen) > _KEPT:
        _seen.popitem(last=False)
    for then, number in versions:
        if then == now:
            return Partial(_Version(number), f) if number else f
    number = next(_numbers) if versions else 0
    versions.append((now, number))
    return Partial(_Version(number), f) if number else f
