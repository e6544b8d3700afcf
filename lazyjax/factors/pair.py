"""The two factors of the Jacobian of a part, and their sizes."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lazyjax.factors.rules import Use
from lazyjax.factors.views import arrange, count
from lazyjax.factors.walk import Bias, Part, Place, Structure
from lazyjax.norms import scale_of


class Factors(NamedTuple):
    """The factors of a part, for a batch of examples n and outputs k."""

    a: Any  # (n, b, s, p), or tokens (n, s)
    d: Any  # (n, k, b, s, q)
    bias: Any = None  # (n, b), the input of a bias, which all positions share
    a_swapped: Any = None  # (n, b, s, q)
    d_swapped: Any = None  # (n, k, b, s, p)


class Shape(NamedTuple):
    """The sizes of a part, of one example."""

    b: int
    s: int  # positions of all its uses
    p: int
    q: int
    outputs: int
    tokens: int  # of a one-hot a, p is their number
    mixed: bool  # whether some uses are swapped
    bias: bool  # whether a bias goes with it

    @property
    def jacobian(self) -> int:
        """Numbers in the Jacobian of an example."""
        return self.outputs * self.b * self.p * self.q

    @property
    def factors(self) -> int:
        """Numbers in its factors."""
        left = self.s if self.tokens else self.b * self.s * self.p
        return left + self.outputs * self.b * self.s * self.q


def _prepared(use: Use, value: jax.Array) -> jax.Array:
    prepare = use.prepare
    for _ in use.view.levels:
        prepare = jax.vmap(prepare)
    return prepare(value)


def _factors_of_use(
    use: Use,
    value: jax.Array,
    cotangents: jax.Array,
    dtype: DTypeLike,
    tokens: int,
    bias: float,
    balanced: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Give a (b, s, x) or tokens (s,), d (k, b, s, x), and the input (b,) of a bias.

    Balanced, a power of two that brings a near 1 goes over to d, and the Jacobian has the same
    digits: a Gram of a or of d alone may overflow where their product is ordinary.
    """
    d = jax.vmap(lambda d: arrange(d, use.d))(cotangents.astype(dtype))
    scale = None
    if tokens:
        a = _prepared(use, value).reshape(-1)
    elif use.tokens:
        a = arrange(jax.nn.one_hot(_prepared(use, value), use.tokens, dtype=dtype), use.a)
    else:
        value = value.astype(dtype)
        if balanced:
            largest = jnp.max(jnp.abs(value), initial=abs(bias))
            scale = scale_of(largest)
            value, d = value / scale, d * scale
        a = arrange(_prepared(use, value), use.a)
    d = d if use.view.factor == 1 else d * use.view.factor
    input_of_bias = jnp.asarray(bias, dtype) if scale is None else bias / scale
    return a, d, jnp.broadcast_to(input_of_bias, d.shape[1:2])


def factors(
    part: Part,
    uses: dict[Place, Any],
    kept: dict[Place, Any],
    d: dict[Place, Any],
    dtype: DTypeLike,
    *,
    balanced: bool,
) -> Factors:
    """Gather the factors of a part of one example, its uses along the positions.

    Balanced, each factor may be multiplied by itself.
    """
    if part.leaf is None:  # a bias alone, whose input is its factor at every position
        (place, number), *_ = part.straight
        own = jax.vmap(lambda d: arrange(d, uses[place][number].d))(d[place].astype(dtype))
        return Factors(jnp.ones((*own.shape[1:3], 1), dtype), bias_of(part).factor * own)

    def gather(places: Any, bias: float = 0.0) -> tuple[Any, Any, Any]:
        every = [
            _factors_of_use(
                uses[place][i], kept[place][i], d[place], dtype, part.tokens, bias, balanced
            )
            for place, i in places
        ]
        if not every:
            return None, None, None
        a, cotangents, biases = zip(*every, strict=True)
        return jnp.concatenate(a, 0 if part.tokens else 1), jnp.concatenate(cotangents, 2), biases

    ratio = part.bias.factor / first_use(part, uses).view.factor if part.bias else 0.0
    a, cotangents, biases = gather(part.straight, ratio)
    swapped = gather(part.swapped)
    return Factors(a, cotangents, biases[0] if part.bias else None, *swapped[:2])


def bias_jacobian(d: jax.Array, bias: jax.Array) -> jax.Array:
    """Give the Jacobian (k, b q) of a bias by its product, of d (k, b, s, q) and its input (b,)."""
    return (jnp.sum(d, 2) * bias[None, :, None]).reshape(d.shape[0], -1)


def side_by_side(every: list[Factors]) -> Factors:
    """Put the factors of parts of the same sizes, of one example, next to each other along b."""

    def join(name: str, axis: int) -> jax.Array | None:
        arrays = [getattr(f, name) for f in every]
        return None if arrays[0] is None else jnp.concatenate(arrays, axis)

    if len(every) == 1:
        return every[0]
    return Factors(
        a=join("a", 0),
        d=join("d", 1),
        bias=join("bias", 0),
        a_swapped=join("a_swapped", 0),
        d_swapped=join("d_swapped", 1),
    )


def bias_of(part: Part) -> Bias:
    """Give the bias of a part that has one."""
    assert part.bias is not None
    return part.bias


def first_use(part: Part, uses: dict[Place, Any]) -> Use:
    """Give the use that a part with a bias has, the only one."""
    place, number = part.straight[0]
    return uses[place][number]


def shape_of(part: Part, structure: Structure, avals: dict[Place, Any], outputs: int) -> Shape:
    """Give the sizes of a part from the shapes of its factors."""
    sizes = []
    for place, number in (*part.straight, *part.swapped):
        use = structure.uses[place][number]
        sizes.append(count(use.d, avals[place].shape))
    b, _, q = sizes[0]
    use = first_use(part, structure.uses)
    own = use.a.atoms("x")
    alone = part.leaf is None
    return Shape(
        b=b,
        s=sum(s for _, s, _ in sizes),
        p=1 if alone else part.tokens or math.prod(atom.length for atom in own),
        q=q,
        outputs=outputs,
        tokens=0 if alone else part.tokens,
        mixed=bool(part.swapped),
        bias=not alone and part.bias is not None,
    )


def jacobian_of(f: Factors, shape: Shape) -> jax.Array:
    """Give J (k, P) of one example, without the bias."""
    a, d = f.a, f.d
    if shape.tokens:
        summed = jax.vmap(lambda d: jax.ops.segment_sum(d, a, num_segments=shape.tokens))(d[:, 0])
        return summed.reshape(shape.outputs, -1)
    k, _, s, _ = d.shape  # q before p: the larger side of the product first
    if s == 1:
        j = d[:, :, 0, :, None] * a[None, :, 0, None, :]
    else:
        j = jnp.einsum("bsp,kbsq->kbqp", a, d)
    if f.d_swapped is not None:
        j = j + jnp.einsum("kbsp,bsq->kbqp", f.d_swapped, f.a_swapped)
    return j.reshape(k, -1)
