"""Arrays of pairs, of which None is one of zeros: what is not computed costs nothing."""

import jax

Array = jax.Array | None
"""(n1, n2, *positions, *positions) by the query, of lengths 1 where it is the same; None: 0."""


def add(*arrays: Array) -> Array:
    """Add what is not 0."""
    found = [a for a in arrays if a is not None]
    return sum(found[1:], found[0]) if found else None


def times(one: Array, other: Array) -> Array:
    """Multiply; 0 if one of them is."""
    return None if one is None or other is None else one * other
