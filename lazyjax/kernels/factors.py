"""The two factors of the Jacobian of a part, and their sizes."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lazyjax.kernels.rules import Use
from lazyjax.kernels.views import arrange, count
from lazyjax.kernels.walk import Part, Place, Structure


class Factors(NamedTuple):
    """The factors of a part, for a batch of examples n and outputs k."""

    a: Any  # (n, b, s, p), or tokens (n, s)
    d: Any  # (n, k, b, s, q)
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
    bias: float  # what a bias of the product adds to the Gram of a; 0 if it has none

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


def _factor_a(use: Use, value: jax.Array, dtype: Any, tokens: int) -> jax.Array:
    """Give a (b, s, x), or tokens (s,)."""
    value = _prepared(use, value)
    if tokens:
        return value.reshape(-1)
    if use.tokens:
        value = jax.nn.one_hot(value, use.tokens, dtype=dtype)
    return arrange(value.astype(dtype), use.a)


def _factor_d(use: Use, cotangents: jax.Array, dtype: Any) -> jax.Array:
    """Give d (k, b, s, x)."""
    found = jax.vmap(lambda d: arrange(d, use.d))(cotangents.astype(dtype))
    return found if use.view.factor == 1 else use.view.factor * found


def factors(
    part: Part, uses: dict[Place, Any], kept: dict[Place, Any], d: dict[Place, Any], dtype: Any
) -> Factors:
    """Gather the factors of a part of one example, its uses along the positions."""

    def gather(places: Any) -> tuple[Any, Any]:
        chosen = [(uses[place][number], place, number) for place, number in places]
        if not chosen:
            return None, None
        left = [_factor_a(u, kept[place][i], dtype, part.tokens) for u, place, i in chosen]
        right = [_factor_d(u, d[place], dtype) for u, place, _ in chosen]
        axis = 0 if part.tokens else 1
        return jnp.concatenate(left, axis), jnp.concatenate(right, 2)

    a, cotangents = gather(part.straight)
    if part.leaf is None:  # a bias alone, by which the product has the derivative 1
        use = first_use(part, uses)
        a = jnp.full((*cotangents.shape[1:3], 1), 1 / use.view.factor, dtype)
    return Factors(a, cotangents, *gather(part.swapped))


def side_by_side(every: list[Factors]) -> Factors:
    """Put the factors of parts of the same sizes, of one example, next to each other along b."""

    def join(name: str, axis: int) -> jax.Array | None:
        arrays = [getattr(f, name) for f in every]
        return None if arrays[0] is None else jnp.concatenate(arrays, axis)

    if len(every) == 1:
        return every[0]
    return Factors(join("a", 0), join("d", 1), join("a_swapped", 0), join("d_swapped", 1))


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
    own = [atom for axis in use.a.axes for kind, atom in axis or () if kind == "x"]
    alone = part.leaf is None
    return Shape(
        b=b,
        s=sum(s for _, s, _ in sizes),
        p=1 if alone else part.tokens or math.prod(atom.length for atom in own),
        q=q,
        outputs=outputs,
        tokens=0 if alone else part.tokens,
        mixed=bool(part.swapped),
        bias=0.0 if alone or part.bias is None else use.view.factor**-2,
    )
