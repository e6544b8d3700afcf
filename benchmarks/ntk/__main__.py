"""How fast is our kernel against everybody else's? `python -m benchmarks.ntk --rivals DIR`

Every contender computes the same kernels from the same weights, in float32, on the same machine in
the same run, one at a time, each in a process of its own: lazyjax; neural-tangents 0.6.5 with its
three implementations; the two methods of PyTorch's tutorial; nngeometry; and the few lines of plain
JAX that a user writes without a library. Each kernel is compared with ours. A rival within five
times of the best is called in turn with ours, and the median of the ratios is printed; others are
timed once, after a warm-up call (which stands for the time if it took 20 s). More than 12 GB is not
tried.

neural-tangents needs jax 0.4.23, so it gets an environment of its own: `--rivals DIR` makes it in
DIR (jax and jaxlib 0.4.23, numpy < 2, scipy < 1.13; neural-tangents and tf2jax without what they
depend on) or finds it there. Without `--rivals` it is left out. nngeometry asks for torchvision,
which it does not use: `python -m pip install --no-deps nngeometry`.
"""

import json
import math
import platform
import signal
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.ntk import cases, environment
from benchmarks.ntk.race import RIVALS, Entry, Run, Setting, race

NOTES = """\
Seconds of one call. Over ours: the rival's seconds over ours, the median of the pairs, or of single
times where it was too slow to be paired. Operations: multiply-adds; of the rate: two operations
each, over the rate of a 2048^3 product in JAX before or after, the faster. Peak: what the process
grew by in its first call; XLA: temporaries and results of the compiled code. With K = 1 full and
trace are equal.
* neural-tangents in blocks is nt.batch, timed on 256 examples and scaled by the pairs of blocks."""


QUICK = (  # full and trace, x2 and none, blocks
    Setting("a", "none", True),
    Setting("a", "trace", False),
    Setting("a_blocks", "trace", True),
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is run."""

    cases: tuple[str, ...] = ()
    """Rows of `cases.CASES`; all of them if none is named."""
    pairs: int = 7
    """Alternating calls of ours and a rival."""
    rivals: Path | None = None
    """The folder of the environment of neural-tangents; made if it is not there."""
    only_ours: bool = False
    """No rivals."""
    against: tuple[str, ...] = ()
    """Rivals by name, as in the tables; all of them if none is named."""
    quick: bool = False
    """Tiny sizes, of all cases a few: does everything run? No times to report."""
    limit: float = 180.0
    """Seconds for one answer of a worker: compiling, or a call."""
    save: Path | None = None
    """A file for all results, a JSON object a line; added to what it holds."""
    show: Path | None = None
    """Such a file: nothing is run, and its tables are printed."""


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}g}" if value < 1e4 else f"{value:.2e}"


def _megabytes(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def _seconds(entry: Entry, value: float | None) -> str:
    return entry.failure or _number(value) + (" *" if entry.scale != 1 else "")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def contenders_table(setting: Setting, entries: list[Entry]) -> Table:
    """Show all contenders of one setting."""
    table = _table(
        f"{setting}: {cases.CASES[setting.case].title}",
        "contender",
        "first, s",
        "compile, s",
        "peak, MB",
        "XLA, MB",
        "relative error",
        "pairs",
        "median, s",
        "over ours",
    )
    for entry in entries:
        table.add_row(
            entry.name,
            _seconds(entry, entry.first),
            _number(entry.compile),
            _megabytes(entry.peak_mb),
            _megabytes(entry.xla_mb),
            "" if entry.error is None else f"{entry.error:.0e}",
            str(len(entry.ratios) or ""),
            _number(entry.seconds) if entry.ratios or entry is entries[0] else "",
            _number(entry.ratio),
        )
    return table


def summary(results: dict[Setting, list[Entry]]) -> Table:
    """Show ours and the best rival, a setting a line."""
    table = _table(
        "lazyjax.ntk and the best of the others",
        "case",
        "kernel",
        "x2",
        "ours\ns",
        "compile\ns",
        "peak\nMB",
        "opera-\ntions",
        "of the\nrate",
        "best rival",
        "\ns",
        "compile\ns",
        "over\nours",
    )
    last = None
    for setting, (ours, *rivals) in results.items():
        if last not in (None, setting.case):
            table.add_section()
        last = setting.case
        there = [rival for rival in rivals if not rival.failure]
        best = min(there, key=lambda rival: rival.seconds or math.inf, default=Entry("none"))
        ratio = best.ratio
        if ratio is None and best.seconds is not None and ours.seconds is not None:
            ratio = best.seconds / ours.seconds
        table.add_row(
            setting.case,
            setting.what,
            "None" if setting.symmetric else "given",
            _seconds(ours, ours.seconds),
            _number(ours.compile),
            _megabytes(ours.peak_mb),
            "" if ours.operations is None else f"{ours.operations:.1e}",
            "" if ours.share is None else f"{ours.share:.0%}",
            best.name,
            _seconds(best, best.seconds),
            _number(best.compile),
            _number(ratio),
        )
    return table


def settings(names: Sequence[str] = ()) -> Iterator[Setting]:
    """Give every row of the table, of some cases or of all."""
    for name in names or cases.CASES:
        case = cases.CASES[name]
        for reduce in case.reductions:
            for symmetric in case.symmetric:
                yield Setting(name, reduce, symmetric)


def _versions() -> str:
    found = [f"Python {platform.python_version()}", platform.machine(), "float32"]
    for package in ("torch", "nngeometry", "jaxlib", "jax"):
        try:
            found.insert(0, f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def read(file: Path) -> dict[Setting, list[Entry]]:
    """Read what runs have saved; the last result of a setting and a contender counts."""
    found: dict[Setting, dict[str, Entry]] = {}
    for line in file.read_text().splitlines():
        values = json.loads(line)
        setting = Setting(*(values.pop(name) for name in Setting._fields))
        found.setdefault(setting, {})[values["name"]] = Entry(**values)
    return {setting: list(found[setting].values()) for setting in settings() if setting in found}


def _measure(config: Config, run: Run, console: Console) -> dict[Setting, list[Entry]]:
    results: dict[Setting, list[Entry]] = {}
    try:
        for setting in QUICK if config.quick and not config.cases else settings(config.cases):
            file = run.folder / f"{setting.case}.npz"
            if not file.exists():
                cases.write(setting.case, file, quick=config.quick)
            entries = results[setting] = []
            with console.status("") as status:
                for entry in race(run, setting):
                    entries.append(entry)
                    status.update(f"{setting}: {entry.name} done")
            console.print(contenders_table(setting, entries))
            for entry in entries:
                if entry.detail:
                    console.print(f"  {entry.name}: {entry.detail}", style="dim", markup=False)
            console.print(f"  a matrix product runs at {(entries[0].rate or 0) / 1e9:.0f} GFLOP/s")
            if config.save is not None:
                with config.save.open("a") as lines:
                    for entry in entries:
                        lines.write(json.dumps({**setting._asdict(), **asdict(entry)}) + "\n")
    except KeyboardInterrupt:
        console.print("stopped; what was measured so far:")
    return {setting: entries for setting, entries in results.items() if entries}


def main(config: Config) -> None:
    """Run the benchmark and print its tables."""
    unknown = set(config.cases) - set(cases.CASES)
    if unknown:
        raise SystemExit(f"--cases must be some of {', '.join(cases.CASES)}, got {unknown}")
    for end in (signal.SIGINT, signal.SIGTERM):  # both stop the workers and print what there is
        signal.signal(end, signal.default_int_handler)
    strangers = set(config.against) - {rival.name for rival in RIVALS}
    if strangers:
        names = ", ".join(rival.name for rival in RIVALS)
        raise SystemExit(f"--against must be some of {names}, got {strangers}")
    console = Console(width=124)
    if config.show is not None:
        if not config.show.is_file():
            raise SystemExit(f"--show must be a file that --save has written, got {config.show}")
        results = read(config.show)
        for setting, entries in results.items():
            console.print(contenders_table(setting, entries))
        console.print(summary(results))
        console.print(NOTES)
        return
    if config.rivals is not None and not config.only_ours:
        environment.prepare(config.rivals)
    for rival in () if config.only_ours else RIVALS:
        if rival.lacks:
            console.print(f"{rival.name} is left out: {' and '.join(rival.lacks)} not installed")
    with tempfile.TemporaryDirectory() as folder:
        run = Run(
            folder=Path(folder),
            pairs=config.pairs,
            limit=config.limit,
            quick=config.quick,
            rivals=config.rivals and config.rivals.absolute(),
            only_ours=config.only_ours,
            against=config.against,
        )
        results = _measure(config, run, console)
    if results:
        console.print(summary(results))
    if config.quick:
        console.print("Tiny sizes (--quick), not those of the titles: no times to report.")
    console.print(NOTES)
    if config.rivals is not None:
        console.print("neural-tangents 0.6.5 with jax and jaxlib 0.4.23")
    console.print(_versions())
    if config.quick and any(entry.failure for entries in results.values() for entry in entries):
        raise SystemExit("a contender fails, at tiny sizes")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
