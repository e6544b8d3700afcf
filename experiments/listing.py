"""The table of experiments that a README has."""

import re
from collections.abc import Mapping
from pathlib import Path

from experiments import runner
from lazyjax.checkpoints import write_whole

_HEAD = "| experiment | the question |\n|---|---|\n"


def table_of(experiments: Mapping[str, runner.Experiment]) -> str:
    """Give the table of a README, in Markdown: each experiment and its question."""
    rows = [f"| `{name}` | {runner.question(own)} |\n" for name, own in experiments.items()]
    return _HEAD + "".join(rows)


def write_table(experiments: Mapping[str, runner.Experiment], path: Path) -> None:
    """Put the table in the place of the one that a file has.

    Raises
    ------
    ValueError
        If the file has none.
    """
    text = path.read_text()
    before, head, after = text.partition(_HEAD)
    if not head:
        raise ValueError(f"`file` must have a table with the head {_HEAD!r}, got {path}. Write it.")
    rest = re.sub(r"\A(?:\|.*\n)*", "", after)
    write_whole(path, (before + table_of(experiments) + rest).encode())
