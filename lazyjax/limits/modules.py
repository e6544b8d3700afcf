"""The variances that a Flax module gives its weights at the start, read off its initialisation.

The initialisation is traced, and each leaf followed from the random bits on. What is known of a
value: the array, where no random number enters; or it is a `_Key`; a `_Law`, where all entries are
independent and of that law; or a text, why it is not read, "" where no random number enters.
"""

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import Literal
from jax.extend.source_info_util import summarize

from lazyjax.equations import evaluate, inlined, needed, settings
from lazyjax.leaves import path_of
from lazyjax.models import from_linen, from_nnx
from lazyjax.types import Params, PyTree

_Make = Callable[..., nnx.Module]
_NORMAL = NormalDist()


class _Key(NamedTuple):
    value: Any  # of one or several, made from a first key like any other


class _Law(NamedTuple):
    """Of shift + scale t, with t uniform in (low, high), or normal with 2 Phi(t) - 1 in there."""

    keys: frozenset[bytes]  # that it is drawn with
    low: float
    high: float
    normal: bool = False
    scale: float = 1.0
    shift: float = 0.0


_SAME = "broadcast_in_dim convert_element_type copy copy_p name reshape rev slice squeeze"
_SAME = {*_SAME.split(), "sharding_constraint", "stop_gradient", "transpose"}
"""Operations that leave each entry as it is, if they keep it."""

_AFFINE: dict[str, Callable[[float, bool], tuple[float, float]]] = {
    "neg": lambda c, first: (-1, 0),
    "add": lambda c, first: (1, c),
    "sub": lambda c, first: (1, -c) if first else (-1, c),
    "mul": lambda c, first: (c, 0),
    "div": lambda c, first: (1 / c if first and c else math.nan, 0),
    "shift_right_logical": lambda c, first: (0.5**c if first else math.nan, 0),
    "or": lambda c, first: (1, c),  # bits that are 0 so far, or else the float is not recognised
}
"""Factor and summand of an operation with the number c, by whether the law is its first operand."""

_OF_BITS = {"shift_right_logical", "or"}
_EACH = {*_SAME, *_AFFINE, "bitcast_convert_type", "erf_inv", "max", "min"}


def _moments(law: _Law) -> tuple[float, float]:
    """Give mean and variance."""
    mean, variance = (law.low + law.high) / 2, (law.high - law.low) ** 2 / 12
    if law.normal:  # cut off at a and b; at 99 the density is 0
        a, b = (_NORMAL.inv_cdf((1 + u) / 2) if abs(u) < 1 else 99.0 for u in (law.low, law.high))
        p, q, mass = _NORMAL.pdf(a), _NORMAL.pdf(b), (law.high - law.low) / 2
        mean = (p - q) / mass
        variance = 1 + (a * p - b * q) / mass - mean**2
    return law.shift + law.scale * mean, law.scale**2 * variance


def _is_cut(law: _Law, c: float, above: bool, eps: float) -> bool:
    """Tell whether more than rounding is cut off above c, or below it."""
    t = (c - law.shift) / law.scale if law.scale else math.nan
    u = 2 * _NORMAL.cdf(t) - 1 if law.normal else t
    part = law.high - u if above == (law.scale > 0) else u - law.low
    return not part <= min(4 * eps, 0.01)  # so that NaN is cut


def _moved(name: str, law: _Law, c: float, first: bool, old: Any, new: Any) -> _Law | None:
    """Give the law after an operation on each entry, with the number c if it has two operands."""
    ends = sorted(law.shift + law.scale * t for t in (law.low, law.high))
    is_float, to_float = jnp.issubdtype(old, jnp.floating), jnp.issubdtype(new, jnp.floating)
    if name == "bitcast_convert_type" and to_float:  # from 1 to 2, if all of the mantissa is random
        one = int(np.ones((), new).view(old))
        return _Law(law.keys, 1, 2) if ends == [one, one + 2 ** jnp.finfo(new).nmant] else None
    if is_float != to_float or not (is_float or new.itemsize >= old.itemsize):
        return None
    if name in _AFFINE and is_float != (name in _OF_BITS):
        factor, summand = _AFFINE[name](c, first)
        scale, shift = factor * law.scale, factor * law.shift + summand
        return law._replace(scale=scale, shift=shift) if math.isfinite(scale + shift) else None
    eps = float(jnp.finfo(new).eps) if is_float else 0.0
    if name == "erf_inv" and not law.normal:
        low, high = (math.copysign(1, t) if abs(abs(t) - 1) <= eps else t for t in ends)
        is_inside = -1 <= low < high <= 1
        return _Law(law.keys, low, high, True, math.sqrt(0.5)) if is_inside else None
    kept = name in ("max", "min") and not _is_cut(law, c, name == "min", eps)
    return law if kept or name in _SAME else None


def _followed(equation: Any, values: list[Any], where: str) -> _Law | str:
    """Follow a law through an equation."""
    name, found = equation.primitive.name, None
    at = [i for i, v in enumerate(values) if isinstance(v, _Law)]
    others = [v for v in values if not isinstance(v, _Law)]
    known = not any(isinstance(v, _Key | str) for v in others)
    if name in _EACH and known and len(at) == 1 and len(others) <= 1:
        operand, out = equation.invars[at[0]].aval, equation.outvars[0].aval
        numbers = np.unique(np.asarray(others[0])).tolist() if others else [0.0]
        if (operand.size == out.size or name == "slice") and len(numbers) == 1:
            law, first = values[at[0]], at[0] == 0
            found = _moved(name, law, numbers[0], first, operand.dtype, out.dtype)
    what = "orthogonal" if name == "qr" else f"`{name}` of"
    return found or f"{what} random numbers{where}"


def _rows(keys: Any, count: int) -> set[bytes]:
    """Give the data of keys, in as many rows, of which some may be the same."""
    is_key = jnp.issubdtype(keys.dtype, jax.dtypes.extended)
    data = np.asarray(jax.random.key_data(keys) if is_key else keys)
    return {row.tobytes() for row in data.reshape(count, -1)}


def _is_random(value: Any) -> bool:
    return isinstance(value, _Key | _Law) or (isinstance(value, str) and value != "")


def _scanned(scan: Any, values: list[Any], why: str, where: str) -> list[Any]:
    """Follow what is random through a scan whose turns have keys of their own."""
    inputs = [why if _is_random(v) else v for v in values[: scan.constants]] + [why] * scan.carries
    for v in values[len(inputs) :]:
        own = isinstance(v, _Key) and len(_rows(v.value, scan.length)) == scan.length
        inputs.append(_Key(v.value[0]) if own else why if _is_random(v) else "")
    out = _read(scan.body, inputs, where)[scan.carries :]
    stacked = [v if isinstance(v, _Law) else why if _is_random(v) else "" for v in out]
    return [why] * scan.carries + stacked


def _step(jaxpr: Any, equation: Any, values: list[Any], where: str) -> list[Any]:
    """Give what is known of the outputs of an equation."""
    name, count, body = equation.primitive.name, len(equation.outvars), inlined(equation)
    where = f" at {text}" if (text := summarize(equation.source_info)) else where
    if body is not None:
        return _read(body, values, where)
    is_random, why = any(map(_is_random, values)), f"`{name}` of random numbers{where}"
    if name == "scan" and is_random and (scan := settings(equation)):
        return _scanned(scan, values, why, where)
    unread = sorted(v for v in values if isinstance(v, str))
    if unread and (unread[-1] or not is_random):
        return unread[-1:] * count
    if name == "random_bits" and is_random:
        keys, bits = values[0].value, equation.outvars[0].aval.dtype.itemsize * 8
        rows = _rows(keys, keys.size)
        return [_Law(frozenset(rows), 0, 2**bits) if len(rows) == keys.size else why]
    if unread or any(isinstance(v, _Law) for v in values):
        return [_followed(equation, values, where)] * count
    plain = [v.value if isinstance(v, _Key) else v for v in values]
    given = {id(v): p for v, p in zip(equation.invars, plain, strict=True)}
    out = evaluate(jaxpr, equation, lambda v: given[id(v)])
    return list(map(_Key, out)) if is_random else out


def _read(closed: Any, inputs: list[Any], where: str = "") -> list[Any]:
    """Give what is known of the outputs of a jaxpr."""
    jaxpr = closed.jaxpr
    known = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    known |= dict(zip(jaxpr.invars, inputs, strict=True))

    def of(atom: Any) -> Any:
        kind: Any = atom.aval
        return np.asarray(atom.val, kind.dtype) if isinstance(atom, Literal) else known[atom]

    for equation, is_needed in zip(jaxpr.eqns, needed(jaxpr), strict=True):
        if is_needed:
            out = _step(jaxpr, equation, list(map(of, equation.invars)), where)
            known |= dict(zip(equation.outvars, out, strict=True))
    return list(map(of, jaxpr.outvars))


def _variance(name: str, leaf: Any, value: Any, seen: dict[bytes, str]) -> float | None:
    """Give the variance of a leaf, None if it is not random."""
    if not jnp.issubdtype(leaf.dtype, jnp.inexact) or not _is_random(value):
        return None
    why = value if isinstance(value, str) else "entries made of a key"
    if isinstance(value, _Law):
        mean, variance = _moments(value)
        other = next((seen[key] for key in value.keys if key in seen), None)
        seen |= dict.fromkeys(value.keys, name)
        rounding = min(16 * float(jnp.finfo(leaf.dtype).eps), 0.03)
        if other is None and abs(mean) <= rounding * variance**0.5:
            return variance
        why = f"entries of mean {mean:.4g}" if other is None else f"the random numbers of {other}"
    raise ValueError(
        "`module` must begin with independent entries of mean 0, in each leaf of one variance, got "
        f"{name} with {why}. Give `infinite` the variance of this leaf by a function (path, shape) "
        "-> variance, or a tree."
    )


def variances(
    module: nn.Module | _Make, x: PyTree = None, *, method: Any = None, **call: Any
) -> Params:
    """Read the variances of the weights at the start off a Flax module's initialisers.

    Parameters
    ----------
    module : flax.linen.Module or callable
        For NNX a function of the keyword `rngs` that makes the module: its class, or
        `lambda rngs: Model(64, rngs=rngs)`. Once made, it no longer has its initialisers.
    x : array (N, ...) or pytree
        An input that a linen module is initialised with, or its shapes and dtypes. NNX needs none.
    method, **call
        As in `from_linen` and `from_nnx`.

    Returns
    -------
    pytree
        Of the structure of the params from `from_linen` or `from_nnx`: of each leaf the variance of
        its entries; None where they are not random, as biases that begin at 0.

    Raises
    ------
    TypeError
        If `module` is neither.
    ValueError
        If `x` is missing, or the entries of a leaf are not independent (orthogonal), not of mean 0
        (`jax.nn.initializers.uniform` draws from 0 on), not of one variance, those of another leaf,
        or not made of normal, truncated normal or uniform numbers by factors and summands.

    Notes
    -----
    The initialisation is traced, not run: initialisers of one's own are read too, and leaves that
    are stacked by `nn.scan`, `nn.vmap` or `nnx.vmap` have the fans of one layer. The variance is
    that of the law in exact numbers, with the scale as rounded to the dtype of the leaf: samples in
    bfloat16 have about 1 % less.

    Of uniform and truncated normal entries only the second moment is used. Sums over a wide axis
    have the Gaussian limit all the same; a sum over few inputs, or a bias, has it at no width.

    Examples
    --------
    >>> module = nn.Dense(3, kernel_init=nn.initializers.normal(0.5))
    >>> jax.tree.map(lambda v: round(v, 6), variances(module, jnp.zeros((1, 2))))
    {'bias': None, 'kernel': 0.25}
    """
    if isinstance(module, nnx.Module) or not callable(module):
        raise TypeError(
            "`module` must be a flax.linen.Module, or a function that makes an NNX module, got "
            f"{type(module).__name__}. Use variances(lambda rngs: Model(..., rngs=rngs)), as a "
            "module that is made no longer has its initialisers."
        )
    if isinstance(module, nn.Module) and x is None:
        raise ValueError("`x` must be given to initialise the module, got None. Pass an input.")

    def params(key: jax.Array, x: PyTree) -> Params:
        if isinstance(module, nn.Module):
            return from_linen(module, key, x, method=method, **call)[1]
        made = module(rngs=nnx.Rngs(key))
        if isinstance(made, nnx.Module):
            made.eval()
        return from_nnx(made, method=method, **call)[1]

    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), jnp.result_type(a)), x)
    with jax.ensure_compile_time_eval():
        key = jax.random.key(0)
        closed, leaves = jax.make_jaxpr(params, return_shape=True)(key, shapes)
        values = _read(closed, [_Key(key), *("" for _ in jax.tree.leaves(shapes))])
    seen: dict[bytes, str] = {}
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf, value: _variance(path_of(path) or "params", leaf, value, seen),
        leaves,
        jax.tree.structure(leaves).unflatten(values),
    )
