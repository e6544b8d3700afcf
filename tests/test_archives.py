from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict

from lazyjax.archives import named_arrays, nested


@dataclass(frozen=True)
class Inner:
    curve: np.ndarray
    note: str


@dataclass(frozen=True)
class Outer:
    inner: Inner | None
    parts: Any


class Pair(NamedTuple):
    x: Any
    y: Any


def test_what_is_nested_comes_back_as_it_was():
    parts = {"a/b": [np.arange(3), (1, None, 2.5, "word")], "c": {}, "d": ()}
    value = Outer(Inner(np.ones((2, 1)), "a note"), parts)
    arrays = named_arrays(value, "case/", (Inner, Outer))
    assert "case/inner/curve" in arrays
    back = nested(arrays | {"other": np.zeros(1)}, (Inner, Outer), "case/")
    assert isinstance(back, Outer)
    assert back.inner is not None
    assert back.inner.note == "a note"
    np.testing.assert_array_equal(back.inner.curve, np.ones((2, 1)))
    assert list(back.parts) == ["a/b", "c", "d"]
    array, plain = back.parts["a/b"]
    np.testing.assert_array_equal(array, np.arange(3))
    assert plain == (1, None, 2.5, "word")
    assert (back.parts["c"], back.parts["d"]) == ({}, ())


def test_arrays_of_jax_named_tuples_and_nodes_become_plain():
    tree = Pair(FrozenDict({"w": jnp.ones(2, jnp.bfloat16)}), jax.random.key(3))
    back = nested(named_arrays(tree), ())
    assert isinstance(back, tuple)
    assert back[0]["w"].dtype == np.float32
    np.testing.assert_array_equal(back[1], jax.random.key_data(jax.random.key(3)))


def test_what_is_not_there_is_told():
    with pytest.raises(ValueError, match="`arrays` must hold b/structure"):
        nested(named_arrays({}, "a/"), (), "b/")
    with pytest.raises(ValueError, match="`arrays` must hold records of Outer, got Inner"):
        nested(named_arrays(Inner(np.ones(1), ""), kinds=(Inner,)), (Outer,))


def test_two_names_do_not_fall_together():
    arrays = named_arrays({"a": {"b": np.zeros(1)}, "a/b": np.ones(1)})
    back = nested(arrays, ())
    assert back["a"]["b"] == 0
    assert back["a/b"] == 1
