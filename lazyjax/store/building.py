"""The public function that writes a kernel to the disk."""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lazyjax import checks
from lazyjax.kernels import COPIES, Request, check, check_batch_size, jobs, only_output
from lazyjax.memory import bytes_of, format_bytes, too_little
from lazyjax.store import files, recipe, workers
from lazyjax.store.panels import OF_A_DEVICE, SMALLER, Schedule, choose, dealt, grid_of
from lazyjax.store.programs import Programs, compile_programs
from lazyjax.store.stored import StoredKernel, open_kernel
from lazyjax.store.workers import Build, Hand
from lazyjax.types import ModelFunction, Params, PyTree, Wrt
from lazyjax.verification import verified

_HEAD = 4  # examples that are looked at beforehand


def _on_host(name: str, x: PyTree) -> Any:
    """Give the inputs as numpy arrays; those that are mapped from the disk stay there."""
    checks.known(name, x, "kernel_store")
    x = jax.tree.map(np.asarray, x)
    checks.batch(name, x)
    return x


def _devices(mesh: Mesh | None) -> tuple[list[Any], list[int]]:
    """Give the devices, the same list in every process, and which of them are of this one."""
    if mesh is None:
        first = {device.process_index: device for device in reversed(jax.devices())}
        devices = [first[process] for process in sorted(first)]
    elif isinstance(mesh, Mesh):
        devices = list(mesh.devices.flat)
    else:
        raise TypeError(
            f"`mesh` must be a jax.sharding.Mesh, got {type(mesh).__name__}. "
            'Use jax.make_mesh((jax.device_count(),), ("x",)).'
        )
    mine = [i for i, d in enumerate(devices) if d.process_index == jax.process_index()]
    if not mine:
        raise ValueError(
            f"`mesh` must hold devices of every process, got none of process "
            f"{jax.process_index()}. Use jax.devices()."
        )
    return devices, mine


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"lazyjax kernel_store: {name}")


@contextlib.contextmanager
def _bar(show: bool, totals: dict[str, int]) -> Iterator[Callable[[str], None]]:
    """Show how far it is, on a terminal; give what is to be called after each step."""
    if not show or not sys.stderr.isatty():
        yield lambda name: None
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        tasks = {name: bar.add_task(name, total=total) for name, total in totals.items() if total}
        yield lambda name: bar.advance(tasks[name])


def _require_room(path: Path) -> None:
    """Refuse a path where no new store can be."""
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"`path` must be in a folder that exists, got {path}. Make {path.parent} first."
        )
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(
            f"`path` must be a new folder or a stored kernel, got {path}, which is neither. "
            "Name another path."
        )


def kernel_store(
    f: ModelFunction,
    params: Params,
    x1: PyTree,
    x2: PyTree | None = None,
    *,
    path: str | PathLike[str],
    memory: int | float | str,
    reduce: str = "none",
    method: str = "auto",
    wrt: Wrt | None = None,
    outputs: Sequence[int] | None = None,
    precision: str = "highest",
    tile: int | tuple[int, int] | None = None,
    mesh: Mesh | None = None,
    progress: bool = True,
    verify: bool = True,
) -> StoredKernel:
    """Compute an empirical neural tangent kernel of any size, tile by tile, into a folder.

    The folder is a zarr array (version 3, not compressed, a chunk for each tile), and beside it the
    recipe of the kernel. A call that was interrupted, killed or out of disk goes on where it was
    when it is made again, and the array has the bits that it would have had.

    Parameters
    ----------
    f, params : as for `ntk`
        `f` gives one array.
    x1, x2 : as for `ntk`
        Arrays of numpy may be mapped from the disk (`numpy.load(..., mmap_mode="r")`): blocks of
        them are read where they are needed. `x2=None`: tiles above the diagonal are mirrored, not
        computed.
    path : path
        A new folder, in one that exists; or a store of the same kernel, to go on with it.
    memory : str or number of bytes
        A budget for each device, like `"4GiB"`: parameters, inputs of a block, features that are
        held, temporaries and tiles, as XLA counts them. Beside it the process needs a few hundred
        MB for JAX itself.
    reduce, method, wrt, outputs, precision : as for `ntk`
    tile : int or pair of int, optional
        Examples of x1 and of x2 in a tile, at most; by default chosen with the method.
    mesh : Mesh, optional
        Devices to share the work; by default the first of each process. With several processes
        (`jax.distributed`), each makes the same call, with a path on a disk that all of them see.
    progress : bool
        Whether to show a bar with the time left, if standard error is a terminal.
    verify : bool
        Whether to hold the kernel of the first examples against products with the Jacobian before
        the long work begins, as `verify` does.

    Returns
    -------
    StoredKernel

    Raises
    ------
    TypeError
        As `ntk`; if `f` gives several arrays, x1, x2 or params are traced, or `mesh` is no mesh.
    ValueError
        As `ntk`; if `memory` is too little (the message says what would
        do), `tile` is below 1 or no pair, `mesh` leaves a process out, or `path` holds something
        else: the message names what differs.
    WrongKernel
        If the kernel of the first examples does not agree with products with the Jacobian.
    FileNotFoundError
        If the folder around `path` does not exist.
    OSError
        If the disk is full or cannot be written. What is there is whole.

    Notes
    -----
    Features of a block of examples are held for a panel of blocks while all other blocks pass by.
    What passes is computed once and kept on the disk until the kernel is finished, or computed
    again, whichever is faster by the rates of `lazyjax.costs.RATES`. Time: as `ntk`, plus
    that. Written: N1 N2 numbers (K^2 of them for "none"), and the features where they are spilled.
    Method, tiles and rates are recorded, and a call that goes on takes those, whatever `memory` and
    `mesh` are now. For a kernel that fits in memory use `ntk`.

    Examples
    --------
    >>> import tempfile, jax.numpy as jnp
    >>> f = lambda w, x: jnp.tanh(x @ w)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     k = kernel_store(f, jnp.ones((2, 3)), jnp.ones((5, 2)), path=folder, memory="1GiB")
    ...     k.shape, k[3, :2].shape
    ((5, 5, 3, 3), (2, 3, 3))
    """
    path, budget = Path(path), bytes_of(memory)
    tile = check_batch_size(tile, "tile")
    checks.known("params", (f, params), "kernel_store")
    x = tuple(_on_host(name, a) for name, a in (("x1", x1), ("x2", x2)) if a is not None)
    heads = [jax.tree.map(lambda a: a[:_HEAD], a) for a in x]
    request = check(
        f,
        params,
        heads[0],
        None if x2 is None else heads[1],
        reduce=reduce,
        method=method,
        wrt=wrt,
        outputs=outputs,
        precision=precision,
    )
    only_output(request, "a kernel that is stored")
    (job,) = jobs(request)
    devices, mine = _devices(mesh)
    sizes = checks.batch("x1", x[0]), checks.batch("x2", x[-1])
    shape = (*sizes, *job.out * COPIES[reduce])
    asked = recipe.asked(request, x, shape, str(job.shape.dtype))

    recorded, programs = files.read_json(path / files.RECIPE), None
    if verify and job.model.reverse and not (path / files.DONE).exists():
        verified(request)
    if recorded is None and jax.process_index() == 0:
        _require_room(path)
        schedule, programs = choose(
            request,
            *sizes,
            numbers=math.prod(shape[2:]) * job.shape.dtype.itemsize,
            memory=budget,
            asked=tile,
            devices=[devices[mine[0]], *devices[1:]],
        )
        rows = math.prod(job.out) if shape[2:] else 1
        files.begin(path, asked | recipe.written_down(schedule, asked["wrt"], rows))
    _barrier("begun")
    recorded = recorded or files.read_json(path / files.RECIPE)
    assert recorded is not None
    wanted = asked | ({} if method == "auto" else {"method": method})
    if tile is not None:
        wanted["tile"] = list(grid_of(*sizes, tile, symmetric=x2 is None).tile)
    recipe.require_same(path, recorded, wanted)
    schedule = recipe.replayed(recorded, request.options, *sizes, symmetric=x2 is None)
    request = replace(request, options=schedule.options)
    if not (path / files.DONE).exists():
        if programs is None:
            programs = compile_programs(request, schedule.cut, devices[mine[0]])
        if programs.room(budget) < 1:
            raise too_little(programs.memory(1), OF_A_DEVICE, format_bytes(budget), SMALLER)
        hands = _hands(request, schedule, programs, budget, devices, mine)
        array = files.open_array(path, recorded)
        _write(path, array, schedule, x, hands, show=progress)
    if jax.process_index() == 0:
        files.finish(path)
    _barrier("finished")
    return open_kernel(path)


def _hands(
    request: Request,
    schedule: Schedule,
    programs: Programs,
    budget: int,
    devices: list[Any],
    mine: list[int],
) -> list[Hand]:
    """Give the devices of this process, each with its share of the rows and of the blocks."""
    rows = dealt(schedule.grid, len(devices))
    blocks = schedule.grid.sides()
    hands = []
    for i in mine:
        own = programs if i == mine[0] else compile_programs(request, schedule.cut, devices[i])
        here = jax.device_put(request.of(request.x1), devices[i])
        share = blocks[i :: len(devices)] if schedule.spilled else []
        hands.append(Hand(devices[i], own, here, rows[i], share, own.room(budget)))
    return hands


def _write(
    path: Path,
    array: Any,
    schedule: Schedule,
    x: tuple[Any, ...],
    hands: list[Hand],
    *,
    show: bool,
) -> None:
    """Write what is not yet written."""
    totals = {
        "features": sum(len(hand.blocks) for hand in hands),
        "tiles": sum(len(schedule.grid.columns(row)) for hand in hands for row in hand.rows),
    }
    timings = files.read_json(files.timings_file(path)) or {}
    with _bar(show, totals) as done:
        build = Build(path, array, schedule, x, timings, done)
        workers.everywhere(workers.spill, build, hands)
        _barrier("features")
        workers.everywhere(workers.contract, build, hands)
        workers.save_timings(build)
    _barrier("tiles")
