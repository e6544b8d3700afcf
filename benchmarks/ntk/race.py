"""One case against all contenders: first times, then pairs with ours."""

import contextlib
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.ntk.cases import CASES
from benchmarks.ntk.process import Failed, Worker

PAIRED_WITHIN = 5.0  # times the best so far
LONG = 20.0  # seconds of a warm-up call that stands for the timed one


class Contender(NamedTuple):
    name: str
    module: str  # of benchmarks.ntk
    method: str = ""
    rival_environment: bool = False
    cases: tuple[str, ...] = tuple(CASES)
    only_symmetric_full: bool = False
    needs: tuple[str, ...] = ()  # packages of this environment

    @property
    def lacks(self) -> list[str]:
        """The packages that are not installed."""
        return [name for name in self.needs if find_spec(name) is None]


OURS = Contender("lazyjax", "ours")
RIVALS = (
    Contender("nt structured", "neural_tangents_worker", "STRUCTURED_DERIVATIVES", True),
    Contender("nt products", "neural_tangents_worker", "NTK_VECTOR_PRODUCTS", True),
    Contender("nt contraction", "neural_tangents_worker", "JACOBIAN_CONTRACTION", True),
    Contender(
        "torch products", "torch_worker", "products", cases=("a", "b", "c"), needs=("torch",)
    ),
    Contender(
        "torch contraction", "torch_worker", "contraction", cases=("a", "b", "c"), needs=("torch",)
    ),
    Contender(
        "nngeometry",
        "torch_worker",
        "nngeometry",
        cases=("a", "c"),
        only_symmetric_full=True,
        needs=("torch", "nngeometry"),
    ),
    Contender("plain JAX", "plain"),
)


class Setting(NamedTuple):
    """A case, and what is asked of it."""

    case: str
    reduce: str
    symmetric: bool

    @property
    def what(self) -> str:
        """The kernel, in the words of the table."""
        return "full" if self.reduce == "none" else self.reduce

    def __str__(self) -> str:
        return f"{self.case} {self.what}, {'x2=None' if self.symmetric else 'x2 given'}"


@dataclass
class Entry:
    """What came of one contender in one setting."""

    name: str
    failure: str = ""
    detail: str = ""
    compile: float | None = None
    first: float | None = None
    seconds: float | None = None  # the median of all timed calls
    peak_mb: float | None = None
    xla_mb: float | None = None
    error: float | None = None  # relative to our kernel, Frobenius
    ratios: list[float] = field(default_factory=list)  # its seconds over ours, pair by pair
    scale: float = 1.0  # of times that were taken on fewer examples
    operations: float | None = None
    rate: float | None = None  # operations a second of a matrix product, before or after

    @property
    def ratio(self) -> float | None:
        """The median of the pairs; without pairs None."""
        return statistics.median(self.ratios) if self.ratios else None

    @property
    def share(self) -> float | None:
        """Of the rate of a matrix product."""
        if self.operations is None or self.seconds is None or self.rate is None:
            return None
        return 2 * self.operations / self.seconds / self.rate


@dataclass(frozen=True, kw_only=True)
class Run:
    """How a run measures."""

    folder: Path
    pairs: int
    limit: float
    quick: bool
    rivals: Path | None  # the environment of neural-tangents
    only_ours: bool
    against: tuple[str, ...] = ()  # names; all rivals if there is none

    def contenders(self, setting: Setting) -> Iterator[Contender]:
        """Give the rivals that can do a setting."""
        for rival in () if self.only_ours else RIVALS:
            if self.against and rival.name not in self.against:
                continue
            full = setting.symmetric and setting.reduce == "none"
            if setting.case not in rival.cases or (rival.only_symmetric_full and not full):
                continue
            if rival.lacks or (rival.rival_environment and self.rivals is None):
                continue
            yield rival

    def start(self, contender: Contender, setting: Setting) -> Worker:
        """Start a worker on a setting."""
        case, python = CASES[setting.case], sys.executable
        if contender.rival_environment and self.rivals is not None:
            python = str(self.rivals / "bin" / "python")
        task = {
            **setting._asdict(),
            "method": contender.method,
            "quick": self.quick,
            "block": case.block and case.block[self.quick],
            "timed": case.timed[self.quick],
            "data": str(self.folder / f"{setting.case}.npz"),
            "result": str(self.folder / f"{contender.module}.npy"),
        }
        return Worker(python, contender.module, task, self.limit)


def _seconds(worker: Worker) -> float:
    time.sleep(0.02)  # threads of the other side go to sleep
    return worker.do("call")["seconds"]


def _first(worker: Worker, entry: Entry) -> float:
    """Compile, call once, and time one more call unless that was long; give its seconds."""
    compiled = worker.do("compile")
    entry.compile, entry.xla_mb = compiled["seconds"], compiled["xla_mb"]
    warm_up = worker.do("call")
    in_compile = entry.scale != 1  # nt.batch compiles in a call
    entry.peak_mb = (compiled if in_compile else warm_up)["peak_mb"]
    seconds: float = warm_up["seconds"] if warm_up["seconds"] > LONG else _seconds(worker)
    entry.first = entry.seconds = seconds = seconds * entry.scale
    return seconds


def _distance(kernel: np.ndarray, ours: np.ndarray) -> float:
    ours = ours[tuple(map(slice, kernel.shape[:2]))]  # of a rival that is timed on fewer examples
    if kernel.shape != ours.shape:
        raise Failed("fails", f"shape {kernel.shape} instead of {ours.shape}")
    difference = np.linalg.norm((kernel - ours).astype(np.float64).ravel())
    return float(difference / np.linalg.norm(ours.astype(np.float64).ravel()))


def _fail(entry: Entry, failure: Failed) -> None:
    entry.failure, entry.detail = str(failure), failure.detail


@dataclass
class _Ours:
    """Our side of a race; no worker if it failed."""

    entry: Entry
    worker: Worker | None = None
    kernel: np.ndarray | None = None
    times: list[float] = field(default_factory=list)

    def fail(self, failure: Failed) -> None:
        _fail(self.entry, failure)
        self.close()

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()
        self.worker = None


def _start_ours(run: Run, setting: Setting) -> _Ours:
    ours = _Ours(Entry(OURS.name))
    try:
        ours.worker = worker = run.start(OURS, setting)
        ours.entry.rate = worker.do("rate")["rate"]
        ours.times.append(_first(worker, ours.entry))
        worker.do("save")
        ours.kernel = np.load(run.folder / f"{OURS.module}.npy")
        with contextlib.suppress(Failed):  # a count is worth no race
            ours.entry.operations = worker.do("operations")["operations"]
    except Failed as failure:
        ours.fail(failure)
    return ours


def _pair(worker: Worker, ours: _Ours, entry: Entry, pairs: int) -> None:
    """Call ours and a rival in turn."""
    theirs, own = [], ours.worker
    if own is None:
        return
    for _ in range(pairs):
        try:
            ours.times.append(_seconds(own))
        except Failed as failure:
            ours.fail(failure)
            return
        theirs.append(_seconds(worker) * entry.scale)
        entry.ratios.append(theirs[-1] / ours.times[-1])
    entry.seconds = statistics.median(theirs)


def _against(run: Run, setting: Setting, rival: Contender, ours: _Ours, best: float) -> Entry:
    """Time one rival, and pair it with ours where it is not far behind."""
    entry = Entry(rival.name)
    try:
        with run.start(rival, setting) as worker:
            if CASES[setting.case].block and rival.rival_environment:
                entry.scale = worker.do("scale")["scale"]
            first = _first(worker, entry)
            worker.do("save")
            if ours.kernel is not None:
                kernel = np.load(run.folder / f"{rival.module}.npy")
                entry.error = _distance(kernel, ours.kernel)
            if first <= PAIRED_WITHIN * best:
                _pair(worker, ours, entry, run.pairs)
    except Failed as failure:
        _fail(entry, failure)
    return entry


def race(run: Run, setting: Setting) -> Iterator[Entry]:
    """Time every contender in one setting, ours first.

    Parameters
    ----------
    run : Run
    setting : Setting
        Its data lies in the folder of the run.

    Yields
    ------
    Entry
        Ours, whose median changes until the end, then one a rival.
    """
    ours = _start_ours(run, setting)
    try:
        yield ours.entry
        best = ours.entry.first or float("inf")
        for rival in run.contenders(setting):
            entry = _against(run, setting, rival, ours, best)
            best = min(best, entry.first or float("inf"))
            yield entry
        try:
            while ours.worker is not None and len(ours.times) < run.pairs:
                ours.times.append(_seconds(ours.worker))
        except Failed as failure:
            ours.fail(failure)
        if ours.worker is not None:
            with contextlib.suppress(Failed):  # the machine may have been slow before
                again = ours.worker.do("rate")["rate"]
                ours.entry.rate = max(ours.entry.rate or 0, again)
        if ours.times:
            ours.entry.seconds = statistics.median(ours.times)
    finally:
        ours.close()
