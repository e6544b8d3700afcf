import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lazyjax import checkpoints
from lazyjax.checkpoints import (
    fingerprint,
    load_history,
    load_tree,
    pack,
    save_tree,
    unpack,
    write_whole,
)
from lazyjax.models import from_linen, shallow_mlp

TREE = {"layer": {"kernel": np.arange(6.0).reshape(2, 3), "bias": np.zeros(3, np.float32)}}


@pytest.fixture
def file(tmp_path):
    save_tree(tmp_path / "params.npz", TREE)
    return tmp_path / "params.npz"


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_a_trained_network_comes_back_as_it_was(file):
    assert_equal(load_tree(file, TREE), TREE)


def test_outputs_of_a_loaded_network_are_the_same_bits(tmp_path):
    x = jnp.linspace(-1, 1, 7)[:, None]
    f, params = from_linen(shallow_mlp(5), jax.random.key(0), x)
    save_tree(tmp_path / "network.npz", params)
    _, fresh = from_linen(shallow_mlp(5), jax.random.key(1), x)
    np.testing.assert_array_equal(f(load_tree(tmp_path / "network.npz", fresh), x), f(params, x))


def test_dtypes_that_numpy_does_not_own_and_keys_come_back(tmp_path):
    tree = [jnp.arange(3, dtype=jnp.bfloat16), jax.random.key(7), jnp.asarray(True)]
    save_tree(tmp_path / "odd.npz", tree)
    back = load_tree(tmp_path / "odd.npz", tree)
    assert back[0].dtype == jnp.bfloat16
    np.testing.assert_array_equal(back[0], tree[0])
    np.testing.assert_array_equal(jax.random.key_data(back[1]), jax.random.key_data(tree[1]))


def test_the_same_arrays_are_the_same_bytes():
    arrays = {"b": np.ones(3), "a": np.zeros((2, 2), int)}
    assert pack(arrays) == pack(dict(reversed(arrays.items())))


def test_what_is_packed_is_a_plain_npz(tmp_path):
    write_whole(tmp_path / "a.npz", pack({"x": np.arange(3)}))
    with np.load(tmp_path / "a.npz") as archive:
        np.testing.assert_array_equal(archive["x"], np.arange(3))


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(file, monkeypatch):
    before = file.read_bytes()

    def fail(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr(checkpoints.os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        save_tree(file, {"other": np.ones(3)})
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("keep", [0, 10, 300, -1])
def test_a_torn_file_is_never_read(keep, file):
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(
        ValueError, match="`path` must be a whole file of saved arrays, got a broken"
    ):
        load_tree(file, TREE)


def test_a_flipped_bit_is_found(file):
    content = bytearray(file.read_bytes())
    where = content.find(np.float64(5.0).tobytes())
    content[where] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="got a broken one"):
        load_tree(file, TREE)


def test_what_does_not_fit_is_refused(file, tmp_path):
    with pytest.raises(ValueError, match=r"`like` must have the leaves of the file.*layer/bias"):
        load_tree(file, {"layer": {"kernel": TREE["layer"]["kernel"]}})
    with pytest.raises(
        ValueError, match=r"`like` must have shape \(2, 3\) at layer/kernel, got \(3, 3"
    ):
        load_tree(file, {"layer": {**TREE["layer"], "kernel": np.zeros((3, 3))}})
    with pytest.raises(FileNotFoundError, match="`path` must be a saved file, got"):
        load_tree(tmp_path / "nothing.npz", TREE)
    with pytest.raises(ValueError, match="`path` must hold history, got a file of parameters"):
        load_history(file, TREE)
    np.savez(tmp_path / "other.npz", x=np.ones(2))
    with pytest.raises(ValueError, match="got a file of arrays of another origin"):
        load_tree(tmp_path / "other.npz", TREE)
    with pytest.raises(ValueError, match="`tree` must have one path a leaf"):
        save_tree(tmp_path / "twins.npz", {"a/b": np.ones(1), "a": {"b": np.ones(1)}})
    with pytest.raises(OSError, match="No such file"):
        save_tree(tmp_path / "no" / "folder.npz", TREE)
    assert unpack(file).keys() == {"about", "leaf/layer/bias", "leaf/layer/kernel"}


def test_fingerprints_tell_values_names_shapes_and_text():
    base = fingerprint("text", TREE)
    assert base == fingerprint("text", jax.tree.map(np.copy, TREE))
    moved = {"layer": {**TREE["layer"], "bias": np.ones(3, np.float32)}}
    renamed = {"other": TREE["layer"]}
    reshaped = {"layer": {**TREE["layer"], "kernel": TREE["layer"]["kernel"].reshape(3, 2)}}
    assert len({base, *(fingerprint("text", t) for t in (moved, renamed, reshaped))}) == 4
    assert fingerprint("other", TREE) != base
