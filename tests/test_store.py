"""Kernels on the disk: the array is ntk's, whatever happens on the way."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zarr
from jax.tree_util import Partial
from thoroughness import few

from lazyjax import costs
from lazyjax.dynamics import gradient_flow
from lazyjax.kernels import METHODS, check, jobs, matrix, ntk
from lazyjax.operators import nystrom, solve
from lazyjax.regression import kernel_regression
from lazyjax.store import StoredKernel, files, kernel_store, open_kernel, workers
from lazyjax.store.panels import dealt, grid_of, panels

RANDOM = np.random.default_rng(0)
PARAMS = {
    "a": RANDOM.normal(size=(4, 12)),
    "b": RANDOM.normal(size=(12, 12)),
    "bias": RANDOM.normal(size=(12,)),
    "c": RANDOM.normal(size=(12, 3)),
}
X1, X2 = RANDOM.normal(size=(23, 5, 4)), RANDOM.normal(size=(14, 5, 4))


def model(params, x):
    """Two hidden layers at five positions, K = 3 outputs."""
    h = jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"] + params["bias"][None, None])
    return h.mean(1) @ params["c"]


def store(path, f=model, params=PARAMS, x1=X1, x2=None, **options):
    defaults = {"memory": "1GiB", "tile": 6, "method": "structured_derivatives"}
    return kernel_store(f, params, x1, x2, **(defaults | options), path=path)


def least(tmp_path, **options):
    """The smallest budget: the features of one block are held, and one passes by."""
    with pytest.raises(ValueError, match=r"`memory` must be at least") as refusal:
        store(tmp_path / "refused", memory=1000, **options)
    return str(refusal.value).split("at least ")[1].split(" ")[0]


@pytest.fixture
def disk_rate(monkeypatch):
    """Sets how fast the disk is: with a slow one features are made again, else spilled."""

    def set_rate(rate):
        monkeypatch.setitem(costs.RATES, "cpu", costs.RATES["cpu"]._replace(disk=rate))

    return set_rate


@pytest.fixture
def log(monkeypatch):
    """The tiles that are computed; `log.stop_at` raises at the tile of that number."""

    class Log(list):
        stop_at = None

    log, compute = Log(), workers.compute_tile

    def logged(*arguments):
        if len(log) == log.stop_at:
            raise KeyboardInterrupt
        log.append(1)
        return compute(*arguments)

    monkeypatch.setattr(workers, "compute_tile", logged)
    return log


def chunks(path):
    return {
        str(p.relative_to(path)): p.read_bytes() for p in Path(path, "c").rglob("*") if p.is_file()
    }


def close(found, wanted):
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12 * np.abs(wanted).max())


# --- the array ---------------------------------------------------------------------------------


@few("reduce", ["none", "diagonal", "trace", "sum"])
@few("x2", [pytest.param(None, id="symmetric"), pytest.param(X2, id="two sides")])
def test_the_array_is_that_of_ntk_and_opens_in_zarr_and_numpy(tmp_path, reduce, x2):
    stored = store(tmp_path / "k", x2=x2, reduce=reduce)
    wanted = np.asarray(ntk(model, PARAMS, X1, x2, reduce=reduce))
    close(np.asarray(stored), wanted)
    close(zarr.open_array(tmp_path / "k", mode="r")[:], wanted)
    assert stored.shape == wanted.shape
    assert len(stored) == 23
    if x2 is None:
        mirrored = stored[20, 2].T if reduce == "none" else stored[20, 2]
        np.testing.assert_array_equal(stored[2, 20], mirrored)


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["jacobian_contraction", "ntk_vector_products"])
def test_every_method_and_a_choice_of_leaves_and_outputs(tmp_path, method):
    options = {"method": method, "outputs": (2, 0), "wrt": lambda path: path != "b"}
    stored = store(tmp_path / "k", x2=X2, tile=(8, 5), **options)
    close(np.asarray(stored), np.asarray(ntk(model, PARAMS, X1, X2, **options)))
    assert stored.recipe["method"] == method
    assert stored.recipe["wrt"] == ["a", "bias", "c"]


@few("rate", [pytest.param(1e15, id="spilled"), pytest.param(1e-3, id="recomputed")])
@few("x2", [pytest.param(None, id="symmetric"), pytest.param(X2, id="two sides")])
def test_features_that_do_not_fit_are_made_again_or_spilled(tmp_path, disk_rate, log, rate, x2):
    disk_rate(rate)
    kept = store(tmp_path / "kept", x2=x2)
    assert not kept.recipe["spilled"]
    del log[:]
    stored = store(tmp_path / "k", x2=x2, memory=least(tmp_path, x2=x2))
    assert stored.recipe["spilled"] == (rate > 1)
    assert len(log) == (10 if x2 is None else 12)  # 4 blocks of 6, 3 of 5
    assert chunks(tmp_path / "k") == chunks(tmp_path / "kept")
    assert not (tmp_path / "k" / files.FEATURES).exists()


@pytest.mark.thorough
def test_pytrees_memory_maps_and_models_with_arrays_of_their_own_are_stored(tmp_path):
    np.save(tmp_path / "x.npy", X1)
    x = {"own": np.load(tmp_path / "x.npy", mmap_mode="r")}
    f = Partial(lambda mean, p, x: model(p, x["own"] - mean), jnp.ones((1, 1, 4)))
    stored = store(tmp_path / "k", f=f, x1=x, reduce="trace")
    close(np.asarray(stored), np.asarray(ntk(model, PARAMS, X1 - 1, reduce="trace")))


def test_a_kernel_of_nothing_but_nan_has_all_its_tiles_on_the_disk(tmp_path):
    params = PARAMS | {"c": np.full((12, 3), np.nan)}
    assert np.isnan(store(tmp_path / "k", params=params)[:]).all()
    assert len(chunks(tmp_path / "k")) == 16


@pytest.mark.thorough
def test_tile_and_method_are_chosen_where_nothing_is_said(tmp_path):
    stored = store(tmp_path / "k", tile=None, method="auto")
    assert stored.recipe["tile"][0] <= 23
    assert [leaf for leaf, _ in stored.recipe["orders"]] == ["a", "b", "c"]
    timings = json.loads((tmp_path / "k" / files.TIMINGS).read_text())
    assert set(timings) == {"features", "contraction", "writing"}
    assert all(one["seconds"] > 0 and one["times"] >= 1 for one in timings.values())


@pytest.mark.parametrize(
    "key",
    [
        np.s_[3], np.s_[-1], np.s_[2:9], np.s_[::4, 1], np.s_[::-3], np.s_[[5, -1, 5]],
        np.s_[:, [1, 2]], np.s_[[0, 3], [4, 6]], np.s_[..., 0, 2], np.s_[5:5], np.s_[7:100, -3:],
        np.arange(23) % 2 == 0, np.s_[4, 5, 1, 2],
    ],
    ids=str,
)  # fmt: skip # to be read as a table
def test_parts_are_indexed_as_in_numpy(whole, key):
    stored, array = whole
    np.testing.assert_array_equal(stored[key], array[key])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    stored = store(tmp_path_factory.mktemp("whole") / "k", x2=X2)
    return stored, np.asarray(stored)


@pytest.mark.parametrize("key", [23, [0, 23], 1.5, (0,) * 5, np.zeros(3, bool)])
def test_an_index_that_does_not_fit_is_refused(whole, key):
    with pytest.raises(IndexError, match="an index of a kernel must"):
        whole[0][key]


def test_the_matrix_view_multiplies_and_gives_rows(whole):
    stored, array = whole
    dense = np.asarray(matrix(array))
    v, u = RANDOM.normal(size=(14 * 3, 2)), RANDOM.normal(size=(23 * 3, 2))
    close(stored.product(v), dense @ v)
    close(stored.transposed_product(u), dense.T @ u)
    rows = dense.reshape(23, 3, -1)[[20, 0, 20]].reshape(9, -1)
    np.testing.assert_array_equal(stored.rows([20, 0, 20]), rows)
    assert stored.rows([]).shape == (0, 42)


def test_a_stored_kernel_is_its_path(whole):
    again = open_kernel(whole[0].path)
    assert again == whole[0]
    assert {again: 1}[whole[0]] == 1
    assert isinstance(again, StoredKernel)


# --- going on ----------------------------------------------------------------------------------


@few("elsewhere", [False, True])
def test_what_was_interrupted_goes_on_with_what_is_recorded(tmp_path, log, monkeypatch, elsewhere):
    undisturbed = store(tmp_path / "whole")
    smaller = least(tmp_path)
    del log[:]
    log.stop_at = 4
    with pytest.raises(KeyboardInterrupt):
        store(tmp_path / "k")
    with pytest.raises(ValueError, match=r"`path` must be a finished kernel, got .*goes on"):
        open_kernel(tmp_path / "k")
    log.stop_at = None
    if elsewhere:
        other = costs.RATES["cpu"]._replace(products=1e3, cache=2**10, working=1)
        monkeypatch.setitem(costs.RATES, "cpu", other)
        jax.clear_caches()  # as in another process
        assert store(tmp_path / "new").recipe["orders"] != undisturbed.recipe["orders"]
    del log[:]
    assert store(tmp_path / "k", memory=smaller, tile=None) == open_kernel(tmp_path / "k")
    assert len(log) == 6
    assert chunks(tmp_path / "k") == chunks(tmp_path / "whole")
    store(tmp_path / "k")  # there already
    assert len(log) == 6


@pytest.mark.parametrize("order", ["jacobian", "apply"])
def test_the_orders_that_are_recorded_are_taken(order):
    (job,) = jobs(check(model, PARAMS, X1, reduce="trace"))
    engine = METHODS["structured_derivatives"].engine
    free = [own for _, own in engine(job.model, X1, job.task).orders]
    assert free != [order] * 3
    settled = engine(job.model, X1, job.task._replace(orders=(order,) * 3))
    assert settled.orders == tuple((leaf, order) for leaf in (0, 1, 3))


KILLED = """
import os, signal, sys
import jax
jax.config.update("jax_enable_x64", True)
import tests.test_store as t
from lazyjax import costs
from lazyjax.store import files, workers

costs.RATES["cpu"] = costs.RATES["cpu"]._replace(disk=1e15)
path, memory, where, count = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])

def dies(module, name, after=False):
    function, calls = getattr(module, name), []
    def counted(*arguments):
        calls.append(1)
        if len(calls) == count and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        found = function(*arguments)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return found
    setattr(module, name, counted)

compute = workers.compute_tile
def logged(*arguments):
    with open(path + ".log", "a") as file:
        file.write("tile\\n")
    return compute(*arguments)
workers.compute_tile = logged
dies(*{
    "features": (files, "write_features"),
    "tile": (workers, "write_tile"),
    "mirror": (workers, "_mirrored"),
    "last": (workers, "write_tile", True),
}[where])
t.store(path, memory=memory)
"""


@pytest.mark.thorough
def test_killed_at_any_moment_it_goes_on_with_the_same_bits(tmp_path, disk_rate, log):
    disk_rate(1e15)
    memory = least(tmp_path)
    store(tmp_path / "whole", memory=memory)
    del log[:]
    root = Path(__file__).parent.parent
    for where, count in (("features", "3"), ("tile", "2"), ("mirror", "2"), ("last", "4")):
        command = [sys.executable, "-c", KILLED, str(tmp_path / "k"), memory, where, count]
        died = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        assert died.returncode == -signal.SIGKILL, died.stderr
    stored = store(tmp_path / "k", memory=memory)
    assert stored.recipe["spilled"]
    assert chunks(tmp_path / "k") == chunks(tmp_path / "whole")
    computed = len((tmp_path / "k.log").read_text().splitlines()) + len(log)
    assert computed == 10 + 2  # two died with a tile computed and not whole on the disk


DEVICES = """
import sys
import jax
jax.config.update("jax_enable_x64", True)
import tests.test_store as t
from lazyjax import costs

costs.RATES["cpu"] = costs.RATES["cpu"]._replace(disk=1e15)
mesh = jax.make_mesh((2,), ("x",))
stored = t.store(sys.argv[1], memory=sys.argv[2], mesh=mesh)
assert stored.recipe["spilled"]
"""


@pytest.mark.thorough
def test_two_devices_give_the_same_kernel(tmp_path, disk_rate):
    disk_rate(1e15)
    memory = least(tmp_path)
    flags = {"XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2"}
    subprocess.run(
        [sys.executable, "-c", DEVICES, str(tmp_path / "k"), memory],
        cwd=Path(__file__).parent.parent,
        env=os.environ | flags,
        check=True,
        timeout=120,
    )
    close(np.asarray(open_kernel(tmp_path / "k")), np.asarray(ntk(model, PARAMS, X1)))


IMAGES = np.random.default_rng(1).normal(size=(6, 5, 5, 2))
FILTERS = {"filters": RANDOM.normal(size=(3, 3, 2, 4)), "w": RANDOM.normal(size=(4, 2))}


def convolutional(params, x):
    layout = jax.lax.conv_dimension_numbers(x.shape, (3, 3, 2, 4), ("NHWC", "HWIO", "NHWC"))
    h = jax.lax.conv_general_dilated(x, params["filters"], (1, 1), "SAME", (1, 1), (1, 1), layout)
    return jnp.tanh(h).mean((1, 2)) @ params["w"]


MORE_DEVICES = """
import sys
import jax
jax.config.update("jax_enable_x64", True)
import tests.test_store as t

mesh = jax.make_mesh((2,), ("x",))
t.kernel_store(t.convolutional, t.FILTERS, t.IMAGES, path=sys.argv[1], memory="1GiB", tile=2, mesh=mesh)
"""


@pytest.mark.thorough
def test_what_one_device_began_two_go_on_with_to_the_same_bits(tmp_path, log):
    arguments = convolutional, FILTERS, IMAGES
    kernel_store(*arguments, path=tmp_path / "whole", memory="1GiB", tile=2)
    del log[:]
    log.stop_at = 3
    with pytest.raises(KeyboardInterrupt):
        kernel_store(*arguments, path=tmp_path / "k", memory="1GiB", tile=2)
    flags = {"XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2"}
    subprocess.run(
        [sys.executable, "-c", MORE_DEVICES, str(tmp_path / "k")],
        cwd=Path(__file__).parent.parent,
        env=os.environ | flags,
        check=True,
        timeout=120,
    )
    assert chunks(tmp_path / "k") == chunks(tmp_path / "whole")
    close(np.asarray(open_kernel(tmp_path / "k")), np.asarray(ntk(*arguments)))


def test_rows_are_dealt_out_so_that_all_devices_have_as_many_tiles():
    grid = grid_of(1000, 1000, (10, 10), symmetric=True)
    for hands in (1, 2, 3, 8):
        shares = dealt(grid, hands)
        assert sorted(row for rows in shares for row in rows) == list(range(100))
        work = [sum(len(grid.columns(row)) for row in rows) for rows in shares]
        assert max(work) - min(work) <= 100
    assert dealt(grid_of(10, 10, (10, 10), symmetric=True), 3) == [[], [], [0]]
    assert panels([], 3) == []
    assert panels([0, 1, 4, 5, 7], 4) == [[0, 1, 4], [5, 7]]


# --- refusals ----------------------------------------------------------------------------------


def other_model(params, x):
    return model(params, x) + 0 * x.sum((1, 2))[:, None]


def holding(constant, scale=1.0):
    """A model with an array inside a jit, and another in the rule of its derivative."""

    @jax.custom_vjp
    def through(y):
        return jnp.round(y)

    through.defvjp(lambda y: (jnp.round(y), None), lambda _, d: (d * np.full((1, 3), scale),))
    inner = jax.jit(lambda w, x: jnp.tanh((x * constant).mean(1) @ w["a"]) @ w["c"])
    return lambda params, x: through(inner(params, x))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "k"
    return store(path, f=holding(np.ones((1, 1, 4))), x1=X1[:6]).path


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model", {"f": other_model}),
        ("model", {"f": holding(np.full((1, 1, 4), 2.0))}),
        ("model", {"f": holding(np.ones((1, 1, 4)), 2.0)}),
        ("params", {"params": PARAMS | {"c": PARAMS["c"] + 1}}),
        ("x1", {"x1": X1[:6] + 1}),
        ("x2", {"x2": X1[:6]}),
        ("reduce", {"reduce": "sum"}),
        ("wrt", {"wrt": lambda path: path != "a"}),
        ("outputs", {"outputs": (0,)}),
        ("precision", {"precision": "high"}),
        ("tile", {"tile": 3}),
        ("method", {"method": "jacobian_contraction"}),
    ],
)
def test_a_store_of_another_kernel_is_refused_by_name(made, name, change):
    same = {"f": holding(np.ones((1, 1, 4))), "x1": X1[:6]}
    assert store(made, **same).shape == (6, 6, 3, 3)
    with pytest.raises(ValueError, match=f"another `{name}`: .*Delete it, or name another path"):
        store(made, **(same | change))


def test_a_store_of_another_version_is_refused(tmp_path):
    store(tmp_path / "k")
    recipe = json.loads((tmp_path / "k" / files.RECIPE).read_text())
    (tmp_path / "k" / files.RECIPE).write_text(json.dumps(recipe | {"jaxlib": "0.7.2"}))
    with pytest.raises(ValueError, match="another `jaxlib`: 0.7.2 is recorded"):
        store(tmp_path / "k")


def test_a_path_that_is_no_place_for_a_store_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match=r"`path` must be a new folder or a stored kernel"):
            store(path)
    for path in (tmp_path / "file" / "k", tmp_path / "none" / "k"):
        with pytest.raises(FileNotFoundError, match=r"`path` must be in a folder that exists"):
            store(path)
    with pytest.raises(FileNotFoundError, match=r"`path` must be a stored kernel"):
        open_kernel(tmp_path)


def test_a_full_disk_ends_with_an_error_and_a_store_that_goes_on(tmp_path, disk_rate):
    disk_rate(1e15)
    memory = least(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (4096, 6 * 6 * 9 * 8 - 1):  # a file of features, a chunk
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            with pytest.raises(
                OSError, match=r"`path` must be on a disk .*File too large.*goes on"
            ):
                store(tmp_path / "k", memory=memory)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not list(tmp_path.rglob("*.tmp"))
    close(np.asarray(store(tmp_path / "k", memory=memory)), np.asarray(ntk(model, PARAMS, X1)))


def test_what_cannot_be_stored_is_refused_before_any_work(tmp_path):
    path = tmp_path / "k"
    with pytest.raises(TypeError, match=r"`f` must return one array .*got 2"):
        store(path, f=lambda p, x: (model(p, x), model(p, x)))
    with pytest.raises(TypeError, match=r"`mesh` must be a jax.sharding.Mesh, got int"):
        store(path, mesh=2)
    with pytest.raises(ValueError, match=r"`tile` must be at least 1, got 0"):
        store(path, tile=0)
    with pytest.raises(ValueError, match=r"`tile` must be a whole number or a pair"):
        store(path, tile=(1, 2, 3))
    with pytest.raises(TypeError, match=r"`memory` must be an amount"):
        store(path, memory=None)
    with pytest.raises(ValueError, match=r"`reduce` must be one of"):
        store(path, reduce="all")
    for name, call in (
        ("params", lambda a: store(path, params=PARAMS | {"c": a})),
        ("x1", lambda a: store(path, x1=X1 * a[0, 0])),
    ):
        with pytest.raises(
            TypeError, match=f"`{name}` must be known to kernel_store.*outside of jit"
        ):
            jax.jit(lambda a, call=call: call(a))(PARAMS["c"])
    assert not path.exists()


def test_the_matrix_view_refuses_what_does_not_fit(whole):
    stored = whole[0]
    with pytest.raises(ValueError, match=r"`v` must have shape \(42, B\), got \(42,\)"):
        stored.product(np.ones(42))
    for examples in ([23], [-1], [0.5], 3):
        with pytest.raises(
            ValueError, match="`examples` must be a list of whole numbers from 0 to 22"
        ):
            stored.rows(examples)
    with pytest.raises(ValueError, match=r"`copy` must not be False"):
        stored.__array__(copy=False)


@pytest.mark.thorough
def test_a_diagonal_has_no_matrix_view(tmp_path):
    with pytest.raises(ValueError, match=r"`reduce` must not be \"diagonal\""):
        store(tmp_path / "k", reduce="diagonal").product(np.ones((69, 1)))


# --- as an operator ----------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize("reduce", ["none", "trace"])
def test_a_stored_kernel_is_an_operator(tmp_path, reduce):
    A = store(tmp_path / "k", reduce=reduce).operator(ridge=0.5)
    kernel = np.asarray(matrix(ntk(model, PARAMS, X1, reduce=reduce)))
    dense = kernel + 0.5 * np.eye(len(kernel))
    v = RANDOM.normal(size=(len(dense), 4))
    close(np.asarray(A @ v), dense @ v)
    close(np.asarray(jax.vmap(lambda v: A @ v, 1, 1)(v)), dense @ v)
    wanted = kernel.reshape(23, -1, len(kernel))[[7, 2]].reshape(-1, len(kernel))
    close(np.asarray(A.rows(jnp.array([7, 2]))), wanted)
    found = solve(A, v, preconditioner=nystrom(jax.random.key(0), A, rank=12))
    np.testing.assert_allclose(found.x, np.linalg.solve(dense, v), atol=1e-7 * np.abs(v).max())
    y = v.reshape(23, -1)[:, :3]
    kernel = kernel if reduce == "trace" else ntk(model, PARAMS, X1)
    wanted = gradient_flow(kernel, y, 0 * y, ridge=0.5).train(np.array([1.0, np.inf]))
    found = kernel_regression(A, y, 0 * y, t=[1.0, np.inf]).fit
    np.testing.assert_allclose(found, wanted, atol=1e-6 * np.abs(y).max())


@pytest.mark.thorough
def test_two_batches_make_an_operator_with_a_transpose(whole):
    A = whole[0].operator()
    kernel = np.asarray(matrix(ntk(model, PARAMS, X1, X2)))
    v = RANDOM.normal(size=(len(kernel), 2))
    assert not A.psd
    close(np.asarray(A.T @ v), kernel.T @ v)
    with pytest.raises(ValueError, match="`shift` must be added to a square operator"):
        whole[0].operator(ridge=1.0)
