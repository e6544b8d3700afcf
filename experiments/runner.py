"""Runs experiments: finds them, skips the finished, shows progress, keeps what they leave.

An experiment is a module of this package with `SECTIONS`, `QUICK`, `Config`, `run`, `plot` and
`conclude`; see any of them. Adding one is adding its file.
"""

import dataclasses
import importlib
import pkgutil
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast

import jax
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

import experiments
from experiments import results as disk
from experiments.report import write_report
from experiments.settings import Settings
from lazyjax import checks, plots
from lazyjax.training import progress as training_progress


class Experiment(Protocol):
    """What a module must have to be an experiment."""

    __name__: str
    __doc__: str
    SECTIONS: str
    QUICK: dict[str, Any]
    Config: type[Settings]
    run: Callable[[Any], disk.Results]
    plot: Callable[[disk.Results], dict[str, Figure]]
    conclude: Callable[[disk.Results], list[str]]


def _first_section(module: ModuleType) -> float:
    digits = "".join(c if c.isdigit() else " " for c in module.SECTIONS).split()
    return int(digits[0]) if digits else float("inf")  # not in the practical


def discover() -> dict[str, Experiment]:
    """Find the experiments of this package, in the order of the practical's sections."""
    modules = [
        importlib.import_module(f"experiments.{info.name}")
        for info in pkgutil.iter_modules(experiments.__path__)
        if not info.name.startswith("_")
    ]
    found = [module for module in modules if hasattr(module, "SECTIONS")]
    found.sort(key=_first_section)
    return {module.__name__.split(".")[-1]: cast(Experiment, module) for module in found}


def chosen(names: Sequence[str], table: dict[str, Experiment]) -> list[str]:
    """Give the experiments that are meant, in order; `all` means all.

    Raises
    ------
    ValueError
        If there is no experiment of a name.
    """
    if not names:
        raise ValueError(
            "`name` must be given: the name of an experiment, or all. "
            "`python -m experiments list` shows them."
        )
    for name in names:
        checks.one_of("name", name, ["all", *table])
    return [name for name in table if name in names or "all" in names]


def check_folder(out: Path) -> None:
    """Require a folder that can be written, before any work.

    Raises
    ------
    ValueError
        If it cannot be made, or a file cannot be written in it.
    """
    probe = out / ".probe.tmp"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"`out` must be a folder that can be written, got {out} ({error.strerror}). "
            "Choose another with --out."
        ) from error


def question(experiment: Experiment) -> str:
    """Give the first line of an experiment's docstring, its question."""
    return experiment.__doc__.strip().splitlines()[0]


def draw(experiment: Experiment, results: disk.Results, folder: Path) -> list[str]:
    """Draw and write the figures; give their names."""
    with plots.style():
        figures = experiment.plot(results)
        disk.save_figures(folder, figures)
    plt.close("all")
    return list(figures)


def run_one(experiment: Experiment, config: Any, folder: Path) -> list[str]:
    """Run one experiment and keep all that it leaves; give its conclusions."""
    disk.clear(folder)
    jax.config.update("jax_enable_x64", config.float64)
    begin = time.perf_counter()
    results = experiment.run(config)
    ran = time.perf_counter()
    disk.save(folder, results)
    results = disk.read(folder, experiment.Config)  # figures are drawn from what is on disk
    names = draw(experiment, results, folder)
    drawn = time.perf_counter()
    disk.finish(folder, names, {"run, seconds": ran - begin, "figures, seconds": drawn - ran})
    return experiment.conclude(results)


class Interrupted(Exception):
    """Ctrl-C, or a polite signal: what it holds is the message to show."""


def run_all(
    table: dict[str, Experiment],
    configs: dict[str, Any],
    out: Path,
    *,
    force: bool,
    console: Console,
) -> list[str]:
    """Run experiments one after the other, and refresh the report.

    Parameters
    ----------
    table : dict
        All experiments.
    configs : dict
        A config for each one to run.
    out : Path
    force : bool
        Run finished ones too.
    console : rich.console.Console

    Returns
    -------
    list of str
        The experiments that failed. One that lacks an optional package is left out, and has failed
        only if it is the one that was asked for.

    Raises
    ------
    Interrupted
        On Ctrl-C; what was finished is kept, and the report says it.
    ValueError
        If the folder cannot be written.
    """
    check_folder(out)
    failed = []
    live = console.is_terminal
    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not live,
    ) as bars:
        overall = bars.add_task("experiments", total=len(configs))
        training = bars.add_task("", total=None, visible=False)

        def show(done: int, total: int, label: str | None) -> None:
            bars.update(
                training,
                description=f"  training {label or 'a model'}, steps",
                completed=done,
                total=total,
                visible=True,
            )

        for name, config in configs.items():
            folder = out / name
            bars.update(overall, description=f"experiments: {name}")
            try:
                if not force and disk.is_finished(folder, config):
                    if not disk.has_figures(folder):
                        redraw(table[name], folder)
                    console.print(f"[bold]{name}[/] is finished already (--force runs it again)")
                else:
                    begin = time.perf_counter()
                    with training_progress(show):
                        sentences = run_one(table[name], config, folder)
                    seconds = time.perf_counter() - begin
                    console.print(f"[bold]{name}[/] {seconds:.1f} s: {question(table[name])}")
                    for sentence in sentences:
                        console.print(f"  {sentence}", highlight=False)
            except KeyboardInterrupt:
                write_report(table, out)
                raise Interrupted(
                    f"Interrupted in {name}. What was finished is whole in {out}; the same command "
                    "goes on from there."
                ) from None
            except disk.Missing as missing:
                console.print(f"[bold]{name}[/] is left out: {missing}", highlight=False)
                if len(configs) == 1:
                    failed.append(name)
            except Exception:
                failed.append(name)
                console.print(f"[bold red]{name} failed[/]")
                console.print(traceback.format_exc(), highlight=False, markup=False)
            bars.update(training, visible=False)
            bars.advance(overall)
    page = write_report(table, out)
    console.print(f"[bold]{page}[/] has every figure and what to conclude.")
    return failed


def redraw(experiment: Experiment, folder: Path) -> None:
    """Draw the figures of a finished experiment again, from what it left."""
    results = disk.load(folder, experiment.Config)
    names = draw(experiment, results, folder)
    disk.finish(folder, names, disk.read_json(folder / "timings.json") or {})


def make_config(experiment: Experiment, *, quick: bool, seed: int | None, **fields: Any) -> Any:
    """Make a config: the default, in small if quick, with a seed of one's own."""
    changes = dict(experiment.QUICK) if quick else {}
    changes |= fields
    if seed is not None:
        changes["seed"] = seed
    return dataclasses.replace(experiment.Config(), **changes)
