"""Records, dictionaries, lists and arrays as named arrays, and back.

What is nested becomes a flat dictionary of arrays by path (`network/loss`), and one entry more,
`structure`, which says in JSON how they were nested. So a record keeps in an npz file what it is.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lazyjax.types import leaf_names
from lazyjax.widening import widened

_STRUCTURE = "structure"
_PLAIN = (str, int, float, bool, type(None))


def named_arrays(value: Any, prefix: str = "", kinds: Iterable[type] = ()) -> dict[str, np.ndarray]:
    """Take a nested value apart.

    Parameters
    ----------
    value : record, dict, list, tuple, array, number, string or None, nested
        Any other pytree (a Flax or an Equinox module) is kept as a dictionary of its leaves by
        path; floats of less than float32 as float32.
    prefix : str
        Put before every name.
    kinds : iterable of types
        The dataclasses that are records, to be given to `nested` again.

    Returns
    -------
    dict of str to array
    """
    arrays: dict[str, np.ndarray] = {}
    records = set(kinds)

    def entries(pairs: Iterable[tuple[Any, Any]], path: str) -> dict[str, Any]:
        return {str(key): take(part, f"{path}/{key}" if path else str(key)) for key, part in pairs}

    def take(value: Any, path: str) -> Any:
        if isinstance(value, _PLAIN):
            return {"plain": value}
        if type(value) in records:
            own = ((f.name, getattr(value, f.name)) for f in fields(value))
            return {"record": [type(value).__name__, entries(own, path)]}
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return {"dict": entries(value.items(), path)}
        if isinstance(value, list | tuple):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: entries(enumerate(value), path)}
        leaf: Any = value
        leaves = jax.tree.leaves(leaf)
        if len(leaves) != 1 or leaves[0] is not leaf:  # a node that only JAX knows
            return {"dict": entries(zip(leaf_names(leaf), leaves, strict=True), path)}
        if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        while prefix + path in arrays or path in ("", _STRUCTURE):  # a/b, and b in a
            path += "'"
        arrays[prefix + path] = np.asarray(widened(leaf))
        return {"array": path}

    structure = take(value, "")
    arrays[prefix + _STRUCTURE] = np.array(json.dumps(structure))
    return arrays


def nested(arrays: Mapping[str, np.ndarray], kinds: Iterable[type], prefix: str = "") -> Any:
    """Put together what `named_arrays` took apart.

    Parameters
    ----------
    arrays : mapping of str to array
        Others may be among them.
    kinds : iterable of types
        The records that may come, by their names.
    prefix : str
        As it was.

    Returns
    -------
    the value
        Named tuples come back as tuples.

    Raises
    ------
    ValueError
        If there is nothing of that prefix, or a record of another kind.
    """
    if prefix + _STRUCTURE not in arrays:
        raise ValueError(
            f"`arrays` must hold {prefix + _STRUCTURE}, got {sorted(arrays)[:5]} and others. Pass "
            "what a comparison was saved as."
        )
    by_name = {kind.__name__: kind for kind in kinds}

    def put(structure: Any) -> Any:
        ((kind, content),) = structure.items()
        if kind == "plain":
            return content
        if kind == "array":
            return arrays[prefix + content]
        if kind == "record":
            name, entries = content
            if name not in by_name:
                raise ValueError(
                    f"`arrays` must hold records of {', '.join(by_name)}, got {name}. Pass what "
                    "this version saved."
                )
            return by_name[name](**{key: put(part) for key, part in entries.items()})
        parts = {key: put(part) for key, part in content.items()}
        if kind == "dict":
            return parts
        return list(parts.values()) if kind == "list" else tuple(parts.values())

    return put(json.loads(str(arrays[prefix + _STRUCTURE])))
