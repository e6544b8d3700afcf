"""What does one step of stochastic reconfiguration cost? `python -m benchmarks.vmc`

Variational Monte Carlo takes at each step the update A^T (A A^T + damping)^-1 e, in the small
system of N samples (minSR: Chen and Heyl 2024; with momentum SPRING: Goldshlager, Abrahamsen and
Lin 2024): A are the derivatives of log psi, centred, and e the local energies, centred, both over
sqrt(N). Every side gets the same weights, samples and local energies, in float32, in a process of
its own, one at a time: `lazyjax.natural_gradient`; a few lines of plain JAX, with the N x P matrix
of all derivatives; NetKet with that matrix, and with its kernel on the fly.

The sides of a case are called in turn (`--rounds`), after a first call, which compiles. Each
update is compared with ours in float64; and in float64, of some samples, with ours.

NetKet gets an environment of its own, as it may want another jax: `--rivals DIR` makes it in DIR or
finds it there. Without `--rivals` it is left out.
"""

import contextlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.vmc import cases, environment

ROOT = Path(__file__).parents[2]
QUICK = ("ffn", "rbm")
SLOW = 8.0  # seconds of a call: such a side is called once
AGREED = {"single": 1e-4, "double": 1e-8}  # relative
NOTES = """\
First: the first call, compilation included. Median and least: of the calls that follow. Over ours:
the median of the ratios of a round. Peak: the most that the process has held, compilation included.
Errors: norms of differences over the norm of ours; in float32 from ours in float64, in float64 from
ours, of 256 samples."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is run."""

    cases: tuple[str, ...] = ()
    """Rows of `cases.CASES`; all of them if none is named."""
    sides: tuple[str, ...] = ()
    """Rows of `SIDES` beside ours; all of them if none is named."""
    rounds: int = 7
    """Calls of each side, in turn."""
    rivals: Path | None = None
    """The folder of the environment of NetKet; made if it is not there."""
    damping: float = 0.01
    """Of A A^T."""
    limit: int = 120
    """Seconds for one answer of a process: compiling and the first call, or a call."""
    quick: bool = False
    """Tiny sizes, of all cases a few: does everything run? No times to report."""


SIDES: dict[str, tuple[str, dict[str, Any]]] = {  # module, and what its task has
    "lazyjax": ("ours", {}),
    "plain JAX": ("plain", {}),
    "NetKet, dense": ("netket_worker", {"way": "dense", "chunk": None}),
    "NetKet, on the fly": ("netket_worker", {"way": "on the fly", "chunk": None}),
    "NetKet, on the fly, in chunks": ("netket_worker", {"way": "on the fly", "chunk": 256}),
}


@dataclass
class Entry:
    """What a side did in one case."""

    process: subprocess.Popen
    first: float = math.nan  # seconds, with compilation
    megabytes: float = math.nan
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)  # over ours, of one round
    errors: dict[str, float] = field(default_factory=dict)  # single and double
    failure: str = ""
    versions: str = ""

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Ask for one thing and wait for the answer; a failure is kept, and the answer empty."""
        if self.failure:
            return {}
        asked, answered = self.process.stdin, self.process.stdout
        assert asked is not None  # both are pipes
        assert answered is not None
        with contextlib.suppress(OSError):  # of one that has ended there is no answer either
            asked.write(json.dumps(message).encode() + b"\n")
            asked.flush()
        line = answered.readline()
        if not line:
            code = self.process.wait()
            self.failure = "over the limit" if code == -signal.SIGALRM else f"exit code {code}"
            return {}
        answer = json.loads(line)
        self.failure = answer.get("error", "")
        return answer


@contextlib.contextmanager
def started(python: str, module: str) -> Iterator[Entry]:
    """Start a process, and end it whatever it does."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.Popen(
        [python, "-m", f"benchmarks.vmc.{module}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        env=clean,
    )
    try:
        yield Entry(process)
    finally:
        process.kill()
        process.communicate()


def _difference(file: Path, reference: Path) -> float:
    ours = np.load(reference)
    return float(np.linalg.norm(np.load(file) - ours) / np.linalg.norm(ours))


def measure(name: str, config: Config, pythons: dict[str, str], folder: Path) -> dict[str, Entry]:
    """Run all sides of one case."""
    data = folder / f"{name}.npz"
    cases.write(name, data, quick=config.quick)
    found: dict[str, Entry] = {}
    with contextlib.ExitStack() as stack:
        for i, (side, (module, own)) in enumerate(SIDES.items()):
            if module not in pythons or (i > 0 and config.sides and side not in config.sides):
                continue
            entry = found[side] = stack.enter_context(started(pythons[module], module))
            task = {"case": name, "data": str(data), "damping": config.damping, **own}
            if config.quick and task.get("chunk"):
                task["chunk"] = 12  # of 24 samples
            files = {kind: str(folder / f"{i}-{kind}.npy") for kind in AGREED}
            answer = entry.ask({**task, **files, "limit": config.limit})
            entry.first = answer.get("first", math.nan)
            entry.versions = answer.get("versions", "")
        ours = found["lazyjax"]
        for _ in range(config.rounds):
            for entry in found.values():
                if not entry.seconds or entry.seconds[0] < SLOW:
                    answer = entry.ask({"do": "call"})
                    if answer:
                        entry.seconds.append(answer["seconds"])
                        entry.megabytes = answer["MB"]
                        if ours.seconds:
                            entry.ratios.append(answer["seconds"] / ours.seconds[-1])
        reference = folder / "reference.npy"
        ours.ask({"do": "double", "samples": None, "file": str(reference)})
        for i, entry in ((i, found[side]) for i, side in enumerate(SIDES) if side in found):
            files = {kind: folder / f"{i}-{kind}.npy" for kind in AGREED}
            entry.ask({"do": "double", "samples": 256, "file": str(files["double"])})
            if not entry.failure and not ours.failure:
                entry.errors["single"] = _difference(files["single"], reference)
                entry.errors["double"] = _difference(files["double"], folder / "0-double.npy")
    return found


def _number(value: float, digits: int = 3) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}g}"


def table_of(results: dict[str, dict[str, Entry]]) -> Table:
    """Show every side of every case."""
    table = Table(title="One step of stochastic reconfiguration, float32", title_justify="left")
    for head in (
        "case",
        "N",
        "side",
        "first\ns",
        "median\ns",
        "least\ns",
        "over\nours",
        "peak\nMB",
    ):
        left = head in ("case", "side")
        table.add_column(head, justify="left" if left else "right", no_wrap=True)
    for head in ("error\nfloat32", "error\nfloat64"):
        table.add_column(head, justify="right", no_wrap=True)
    for name, entries in results.items():
        case = cases.CASES[name]
        first = True
        for side, entry in entries.items():
            table.add_row(
                case.title if first else "",
                str(case.n) if first else "",
                side,
                _number(entry.first),
                entry.failure[:20] or _number(median(entry.seconds)),
                _number(min(entry.seconds, default=math.nan)),
                _number(median(entry.ratios), 2) if entry.ratios else "",
                _number(entry.megabytes, 4),
                *(f"{entry.errors[kind]:.0e}" if entry.errors else "" for kind in AGREED),
            )
            first = False
        table.add_section()
    return table


def agreement(results: dict[str, dict[str, Entry]]) -> str:
    """Say in a line whether all sides gave the same updates."""
    entries = [entry for case in results.values() for entry in case.values() if entry.errors]
    most = {kind: max((entry.errors[kind] for entry in entries), default=0.0) for kind in AGREED}
    agreed = all(most[kind] < bound for kind, bound in AGREED.items())
    return (
        f"All sides give the same update: {'yes' if agreed else 'NO'}. Largest relative "
        f"difference {most['single']:.0e} in float32 (allowed: {AGREED['single']:.0e}), "
        f"{most['double']:.0e} in float64 ({AGREED['double']:.0e})."
    )


def main(config: Config) -> None:
    """Run the benchmark and print its table."""
    for name, given, known in (
        ("cases", config.cases, cases.CASES),
        ("sides", config.sides, SIDES),
    ):
        if unknown := set(given) - set(known):
            raise SystemExit(f"--{name} must be some of {', '.join(known)}, got {unknown}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = Console(width=150)
    pythons = {"ours": sys.executable, "plain": sys.executable}
    if config.rivals is not None:
        pythons["netket_worker"] = str(environment.prepare(config.rivals))
    results: dict[str, dict[str, Entry]] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name in config.cases or (QUICK if config.quick else cases.CASES):
                with console.status(name):
                    results[name] = measure(name, config, pythons, Path(folder))
        except KeyboardInterrupt:
            console.print("stopped; what was measured so far:")
    console.print(table_of(results))
    everything = [entry for entries in results.values() for entry in entries.values()]
    for line in sorted({entry.failure for entry in everything} - {""}):
        console.print(line, style="dim", markup=False)
    console.print(NOTES, highlight=False)
    console.print(agreement(results), highlight=False)
    if config.quick:
        console.print("Tiny sizes (--quick), not those of the titles: no times to report.")
    versions = sorted({entry.versions for entry in everything} - {""})
    console.print(", ".join([*versions, f"Python {platform.python_version()}"]), highlight=False)
    if config.quick and any(entry.failure for entry in everything):
        raise SystemExit("a side fails, at tiny sizes")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
