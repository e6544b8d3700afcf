"""`python -m experiments list | run NAME... | plot NAME... | report | table [FILE...]`."""

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import tyro
from rich.console import Console
from rich.table import Table

from experiments import runner
from experiments.listing import table_of, write_table
from experiments.report import write_report
from lazyjax import checks

_ABOUT = """Run the experiments of the practical and look at their figures.

    list                 what there is, and what is finished
    run NAME... | all    run them; with one NAME, every field of its config is a flag
                         (run NAME --help shows them)
    plot NAME... | all   draw the figures again, without computing
    report               write the page with every figure again
    table [FILE...]      print the table of a README, or put it into each FILE
"""


_COMMANDS = ("list", "run", "plot", "report", "table")


def _parser() -> argparse.ArgumentParser:
    """Make the parser of what every command takes."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        usage="python -m experiments list | run NAME... | plot NAME... | report | table [FILE...]"
        "  [options]",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="everything in small: a first look")
    parser.add_argument("--seed", type=int, help="seed of every experiment that is run")
    parser.add_argument("--force", action="store_true", help="run what is finished again")
    parser.add_argument("-h", "--help", action="store_true", help="show this, or the flags of NAME")
    return parser


def _split(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Separate the command and its names, what all commands take, and the flags of one config."""
    first_flag = next((i for i, word in enumerate(arguments) if word.startswith("-")), None)
    words, flags = arguments[:first_flag], arguments[len(arguments[:first_flag]) :]
    options, rest = _parser().parse_known_args(flags)
    options.command, options.names = (words[0] if words else None), words[1:]
    return options, rest


def _configs(options: argparse.Namespace, rest: list[str], table: dict[str, Any]) -> dict[str, Any]:
    names = runner.chosen(options.names, table)
    configs = {
        name: runner.make_config(table[name], quick=options.quick, seed=options.seed)
        for name in names
    }
    if rest or options.help:
        if len(names) != 1:
            raise ValueError(
                f"`{(rest or ['--help'])[0]}` must come with one experiment, got {len(names)}. "
                "Name one: python -m experiments run NAME --help"
            )
        (name,) = names
        configs[name] = tyro.cli(
            table[name].Config,
            prog=f"python -m experiments run {name}",
            description=f"{table[name].__doc__}\nAlways: --out DIR, --quick, --seed N, --force.",
            default=configs[name],
            args=[*rest, *(["--help"] if options.help else [])],
        )
    return configs


def _list(table: dict[str, Any], out: Path, console: Console) -> None:
    view = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("experiment", "sections", "question", "results"):
        view.add_column(column)
    for name, experiment in table.items():
        state = "finished" if runner.disk.is_whole(out / name) else ""
        view.add_row(name, experiment.SECTIONS, runner.question(experiment), state)
    console.print(view)


def _stop(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; give the exit code."""
    console = Console()
    signal.signal(signal.SIGTERM, _stop)
    options, rest = _split(sys.argv[1:] if arguments is None else arguments)
    if options.command is None or (options.help and not options.names):
        _parser().print_help()
        return 0 if options.help else 2
    try:
        checks.one_of("command", options.command, _COMMANDS)
        table = runner.discover()
        if rest and options.command != "run":
            raise ValueError(
                f"`{rest[0]}` must come with run, got {options.command}. Leave it out."
            )
        if options.command == "list":
            _list(table, options.out, console)
        elif options.command == "table":
            for name in options.names:
                write_table(table, Path(name))
            if not options.names:
                print(table_of(table), end="")
        elif options.command == "report":
            runner.check_folder(options.out)
            console.print(f"[bold]{write_report(table, options.out)}[/]")
        elif options.command == "plot":
            for name in runner.chosen(options.names, table):
                runner.redraw(table[name], options.out / name)
                console.print(f"[bold]{name}[/] drawn again")
            write_report(table, options.out)
        else:
            configs = _configs(options, rest, table)
            failed = runner.run_all(
                table, configs, options.out, force=options.force, console=console
            )
            if failed:
                console.print(f"[bold red]Failed:[/] {', '.join(failed)}")
                return 1
    except (ValueError, TypeError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SystemExit as told:  # help, or a flag that tyro has refused
        return int(told.code or 0)
    except (KeyboardInterrupt, runner.Interrupted) as stop:
        print(str(stop) or "Interrupted.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
