"""One self-contained page with every figure, the conclusions, the configs and the timings."""

import base64
import dataclasses
import html
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments import results as disk
from lazyjax.checkpoints import write_whole

_STYLE = """
:root { --ink: #1c2430; --soft: #5b6675; --line: #d9dee5; --paper: #ffffff; --wash: #f4f6f9;
        --accent: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaf0; --soft: #9aa6b5; --line: #36404d; --paper: #161b22; --wash: #1e252e;
          --accent: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0; font: 16px/1.55 system-ui, sans-serif; color: var(--ink);
       background: var(--paper); }
main { max-width: 1100px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; margin: 0; } h2 { font-size: 1.35rem; margin: 0 0 .2rem; }
p.lead, .meta { color: var(--soft); }
a { color: var(--accent); }
nav { background: var(--wash); border-radius: 8px; padding: .8rem 1.2rem; margin: 1.5rem 0 2.5rem; }
nav ol { margin: .2rem 0; padding-left: 1.4rem; columns: 2 22rem; }
section { border-top: 1px solid var(--line); padding: 1.8rem 0; }
.conclusions { background: var(--wash); border-left: 4px solid var(--accent); margin: 1rem 0;
               padding: .6rem 1.2rem .6rem 2rem; border-radius: 0 8px 8px 0; }
figure { margin: 1.2rem 0; break-inside: avoid; }
figure img { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
             border-radius: 6px; }
figcaption { color: var(--soft); font-size: .9rem; }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--accent); }
table { border-collapse: collapse; font-size: .88rem; margin: .5rem 0; display: block;
        overflow-x: auto; }
td, th { border-bottom: 1px solid var(--line); padding: .2rem .8rem .2rem 0; text-align: left;
         vertical-align: top; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
@media print { nav { break-after: page; } details { display: none; } }
"""


def _flat(value: Any, path: tuple[str, ...] = ()) -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _flat(entry, (*path, str(key)))
    else:
        yield " / ".join(path), value


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(_show(entry) for entry in value)
    return str(value)


def _table(value: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><td>{html.escape(name)}</td><td class="number">{html.escape(_show(entry))}</td></tr>'
        for name, entry in _flat(value)
    )
    return f"<table>{rows}</table>"


def _fold(title: str, value: Mapping[str, Any]) -> str:
    return f"<details><summary>{title}</summary>{_table(value)}</details>" if value else ""


def _figure(folder: Path, name: str) -> str:
    picture = folder / f"{name}.png"
    if not picture.is_file():
        return ""
    data = base64.b64encode(picture.read_bytes()).decode()
    caption = html.escape(name.replace("_", " "))
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _section(name: str, experiment: Any, folder: Path) -> str:
    results = disk.load(folder, experiment.Config)
    lines = experiment.__doc__.strip().splitlines()
    body = html.escape("\n".join(lines[1:]).strip()).replace("\n\n", "</p><p>")
    conclusions = "".join(f"<li>{html.escape(s)}</li>" for s in experiment.conclude(results))
    marker = disk.read_json(folder / disk.MARKER)
    timings = disk.read_json(folder / "timings.json") or {}
    figures = "".join(_figure(folder, figure) for figure in marker["figures"])
    place = f"sections {experiment.SECTIONS} of the practical, " if experiment.SECTIONS else ""
    return (
        f'<section id="{name}"><h2>{html.escape(lines[0])}</h2>'
        f'<p class="meta"><code>{name}</code>, {place}'
        f"{sum(timings.values()):.1f} s</p>"
        f'<ul class="conclusions">{conclusions}</ul><p>{body}</p>{figures}'
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
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>lazyjax: experiments</title><style>{_STYLE}</style></head><body><main>"
        "<h1>Does this network train like its linearization?</h1>"
        '<p class="lead">Networks, their tangent models and the closed form, side by side.</p>'
        f"<nav><ol>{entries}</ol>{note}</nav>{sections}</main></body></html>\n"
    )
    path = out / "index.html"
    write_whole(path, page.encode())
    return path
