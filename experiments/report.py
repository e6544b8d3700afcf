"""One self-contained page with every figure, the conclusions, the configs and the timings."""

import dataclasses
import html
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments import results as disk
from lazyjax import pages
from lazyjax.checkpoints import write_whole


def _flat(value: Any, path: tuple[str, ...] = ()) -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _flat(entry, (*path, str(key)))
    else:
        yield " / ".join(path), value


def _fold(title: str, value: Mapping[str, Any]) -> str:
    return pages.fold(title, pages.table(_flat(value))) if value else ""


def _figure(folder: Path, name: str) -> str:
    file = folder / f"{name}.png"
    return pages.picture(file.read_bytes(), name.replace("_", " ")) if file.is_file() else ""


def _section(name: str, experiment: Any, folder: Path) -> str:
    results = disk.load(folder, experiment.Config)
    lines = experiment.__doc__.strip().splitlines()
    body = html.escape("\n".join(lines[1:]).strip()).replace("\n\n", "</p><p>")
    marker = disk.read_json(folder / disk.MARKER)
    timings = disk.read_json(folder / "timings.json") or {}
    figures = "".join(_figure(folder, figure) for figure in marker["figures"])
    place = f"sections {experiment.SECTIONS} of the practical, " if experiment.SECTIONS else ""
    return (
        f'<section id="{name}"><h2>{html.escape(lines[0])}</h2>'
        f'<p class="meta"><code>{name}</code>, {place}'
        f"{sum(timings.values()):.1f} s</p>"
        f"{pages.conclusions(experiment.conclude(results))}<p>{body}</p>{figures}"
        + _fold("All numbers", results.summary)
        + _fold("Settings", dataclasses.asdict(results.config))
        + _fold("Timings", timings)
        + "</section>"
    )


def write_report(table: Mapping[str, Any], out: Path) -> Path:
    """Write `index.html` with every experiment that is finished in `out`.

    Parameters
    ----------
    table : mapping
        All experiments by name.
    out : Path

    Returns
    -------
    Path
        Of the page. It needs no other file.

    Raises
    ------
    OSError
        If the folder cannot be written.
    """
    finished = [name for name in table if disk.is_whole(out / name)]
    missing = [name for name in table if name not in finished]
    entries = "".join(
        f'<li><a href="#{name}">{html.escape(table[name].__doc__.strip().splitlines()[0])}</a></li>'
        for name in finished
    )
    note = f'<p class="meta">Not run yet: {html.escape(", ".join(missing))}.</p>' if missing else ""
    sections = "".join(_section(name, table[name], out / name) for name in finished)
    path = out / "index.html"
    body = (
        "<h1>Does this network train like its linearization?</h1>"
        '<p class="lead">Networks, their tangent models and the closed form, side by side.</p>'
        f"<nav><ol>{entries}</ol>{note}</nav>{sections}"
    )
    write_whole(path, pages.page("lazyjax: experiments", body))
    return path
