"""Pages of HTML that need no other file: their parts, that of a comparison, cards of notebooks."""

import base64
import html
import inspect
import io
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from lazyjax import plots
from lazyjax.checkpoints import write_whole
from lazyjax.comparison import Comparison, Verdict, verdicts
from lazyjax.types import History

STYLE = """
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
.conclusions li { overflow-wrap: anywhere; }
figure { margin: 1.2rem 0; break-inside: avoid; overflow-x: auto; }
figure img { width: var(--width); max-width: 100%; height: auto; background: #fff;
             border: 1px solid var(--line); border-radius: 6px; }
figcaption { color: var(--soft); font-size: .9rem; }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--accent); }
table { border-collapse: collapse; font-size: .88rem; margin: .5rem 0; display: block;
        overflow-x: auto; }
td, th { border-bottom: 1px solid var(--line); padding: .2rem .8rem .2rem 0; text-align: left;
         vertical-align: top; }
td.number, th.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
pre { background: var(--wash); border-radius: 8px; padding: .8rem 1rem; overflow-x: auto;
      font-size: .85rem; line-height: 1.45; }
@media (max-width: 600px) { figure img { max-width: none; width: calc(.72 * var(--width)); }
  main { padding: 1.2rem .9rem 3rem; } h1 { font-size: 1.5rem; } }
@media print { nav { break-after: page; } details { display: none; } }
"""

_CAPTIONS = {
    "functions": "What was learned: the network, its tangent model and the closed form.",
    "predictions": "What network and tangent model learned, output by output: a lazy network is on "
    "the diagonal.",
    "training": "Losses, movements of the weights, and the gap between the two. A lazy network has "
    "the loss of its tangent model and hardly moves.",
    "layers": "Which layers moved.",
    "kernels": "The kernel before and after training: a lazy network keeps the one it began with.",
    "measures": "What else changed on the way: the velocity of the kernel, how far it turned to "
    "the targets, the sharpness of the loss, and which units changed sides.",
}
_PIXELS = 0.55  # of the page for one of a figure: letters are as large in all of them
_COLUMNS = 8  # members of a table, beyond which it shows their range
_LINES = 60  # of the code that is shown, at most


def show(value: Any) -> str:
    """Write a value of a table."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(show(entry) for entry in value)
    return str(value)


def table(rows: Iterable[Sequence[Any]], head: Sequence[str] = ()) -> str:
    """Give a table: a name and values a row."""

    def row(cells: Sequence[Any], tag: str) -> str:
        first, *others = (html.escape(show(cell)) for cell in cells)
        numbers = "".join(f'<{tag} class="number">{cell}</{tag}>' for cell in others)
        return f"<tr><{tag}>{first}</{tag}>{numbers}</tr>"

    top = row(head, "th") if head else ""
    return f"<table>{top}{''.join(row(cells, 'td') for cells in rows)}</table>"


def fold(title: str, content: str) -> str:
    """Give content that a click opens."""
    return f"<details><summary>{html.escape(title)}</summary>{content}</details>"


def picture(png: bytes, caption: str) -> str:
    """Give a figure."""
    data, text = base64.b64encode(png).decode(), html.escape(caption)
    width = int.from_bytes(png[16:20]) * _PIXELS
    return (
        f'<figure><img alt="{text}" style="--width: {width:.0f}px" '
        f'src="data:image/png;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def page(title: str, body: str) -> bytes:
    """Give a whole page."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"{body}</main></body></html>\n"
    ).encode()


def _png(figure: Figure, dpi: int = 150) -> bytes:
    buffer = io.BytesIO()
    with plots.style():
        figure.savefig(buffer, format="png", dpi=dpi)
    plt.close(figure)
    return buffer.getvalue()


def conclusions(sentences: Iterable[str]) -> str:
    """Give the sentences to be read first."""
    return (
        f'<ul class="conclusions">{"".join(f"<li>{html.escape(s)}</li>" for s in sentences)}</ul>'
    )


def _headline(found: Sequence[Verdict]) -> str:
    words = [own.word for own in found]
    counts = {word: words.count(word) for word in dict.fromkeys(words)}
    if len(counts) == 1:
        return words[0] if len(words) == 1 else f"{words[0]}, all {len(words)}"
    return ", ".join(f"{count} {word}" for word, count in counts.items())


def _said(found: Sequence[Verdict], labels: Sequence[str] | None) -> list[str]:
    """Give the sentences of a verdict; of many, each warning and each advice once."""
    if len(found) == 1:
        own = found[0]
        return [f"{own.sentence}.", *own.advice, *(f"Warning: {w}" for w in own.warnings)]
    names = labels or [f"member {i}" for i in range(len(found))]
    said = [f"{name}: {own.sentence}." for name, own in zip(names, found, strict=True)]
    return said + [f"Warning: {w}" for w in dict.fromkeys(w for own in found for w in own.warnings)]


def _numbers(compared: Comparison, labels: Sequence[str] | None) -> str:
    """Give the table of all numbers, a column a member, or the range over many."""
    every = [compared.numbers(i) for i in range(compared.members)]
    names = dict.fromkeys(name for own in every for name in own)
    if compared.members <= _COLUMNS:
        if compared.members == 1:
            head: Sequence[str] = ()
        else:
            head = ("", *(labels or [f"member {i}" for i in range(compared.members)]))
        return table(((n, *(own.get(n, np.nan) for own in every)) for n in names), head)
    stable = [own for own, there in zip(every, compared.stable, strict=True) if there]
    values = {n: [own[n] for own in stable if n in own] for n in names}
    rows = ((n, float(np.median(v)), min(v), max(v)) for n, v in values.items() if v)
    lost = compared.members - len(stable)
    note = f'<p class="meta">Without {lost} that diverged.</p>' if lost else ""
    return note + table(rows, ("", "median", "least", "most"))


def _calling_code() -> str | None:
    """Give the lines that made the comparison: those of whoever called, up to the call."""
    frame = inspect.currentframe()
    here = frame
    while here is not None and here.f_globals.get("__name__", "").startswith("lazyjax"):
        here = here.f_back
    if here is None:
        return None
    file = here.f_code.co_filename
    if not Path(file).is_file() and "ipykernel" not in file and "ipython" not in file:
        return None  # typed, or given to exec: what would be found under this name may be another
    try:
        lines, first = inspect.getsourcelines(here)
    except (OSError, TypeError):
        return None
    upto = lines[: here.f_lineno - max(first, 1) + 1][-_LINES:]
    return inspect.cleandoc("".join(upto)) or None


def comparison_page(
    compared: Comparison,
    path: str | PathLike[str],
    labels: Sequence[str] | None = None,
    code: str | None = None,
) -> Path:
    """Write the page of a comparison; see `Comparison.report`."""
    code = _calling_code() if code is None else code
    found = verdicts(compared)
    figures = "".join(
        picture(_png(figure), _CAPTIONS[name]) for name, figure in compared.plot(labels).items()
    )
    why = (
        ""
        if compared.closed is not None
        else f"<p>No closed form: {html.escape(compared.no_closed_form)}.</p>"
    )
    lines = f"<h2>The lines that made it</h2><pre>{html.escape(code)}</pre>" if code else ""
    body = (
        '<p class="lead">Does this network train like its linearization?</p>'
        f"<h1>{html.escape(_headline(found).capitalize())}</h1>"
        f"{conclusions(_said(found, labels))}{why}<section>{figures}</section>"
        f"<section><h2>Numbers, at the end of training</h2>{_numbers(compared, labels)}</section>"
        f"<section><h2>Settings</h2>{table(compared.settings.items())}</section>"
        f"<section>{lines}</section>"
    )
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        path.mkdir(parents=True, exist_ok=True)
        path = path / "index.html"
    write_whole(path, page(f"lazyjax: {_headline(found)}", body))
    return path


def comparison_card(compared: Comparison) -> str:
    """Give what a notebook shows of a comparison: the verdict and small curves."""
    found = verdicts(compared)
    with plots.style():
        figure, axes = plt.subplots(1, 2, figsize=(7, 2.2))
        for i in range(compared.members):
            for name in ("network", "tangent"):
                look, course = plots.MODELS[name], compared.models[name]
                label = look.label if i == 0 else None
                at = 1 + compared.curve_steps
                axes[0].plot(at, course.loss[i], look.line, color=look.colour, label=label)
            axes[1].plot(
                1 + compared.steps, compared.share[i], color=plots.MODELS["network"].colour
            )
        axes[0].set(xscale="log", yscale="log", xlabel="1 + step", title="training loss")
        axes[0].legend(fontsize=7)
        axes[1].set(xscale="log", xlabel="1 + step", title="gap, share of what was learned")
        shown = picture(
            _png(figure, dpi=90), "training loss, and gap as a share of what was learned"
        )
    said = html.escape("\n".join(_said(found, None)[:6])).replace("\n", "<br>")
    return f"<div><b>{html.escape(_headline(found))}</b><p>{said}</p>{shown}</div>"


def history_card(history: History) -> str:
    """Give what a notebook shows of a history: how it ended, and small curves."""
    loss = np.atleast_2d(history.loss)
    ends = f"loss {np.median(loss[:, 0]):.3g} to {np.median(loss[:, -1]):.3g}"
    diverged = history.diverged_at not in (None, (None,) * len(loss))
    who = f"{len(loss)} members, medians: " if history.is_ensemble else ""
    said = f"{who}{ends} in {history.steps[-1]:,} steps" + (", diverged" if diverged else "")
    with plots.style():
        shown = picture(_png(plots.history(history), dpi=60), "loss and movements against the step")
    return f"<div><p>{html.escape(said)}</p>{shown}</div>"
