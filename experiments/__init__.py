"""The experiments of the practical, one file each: the real network beside its tangent model.

An experiment is a module with

- a docstring: the question in its first line, what to look at, the source;
- `SECTIONS`: those of the practical, as in "2-3";
- `Config`: a frozen, keyword-only dataclass with documented fields that checks its values, made of
  those that experiments share (`experiments/settings.py`);
- `QUICK`: the fields that `--quick` changes;
- `run(config) -> Results`, `plot(results) -> dict of figures`, `conclude(results) -> list of str`.

Adding one is adding its file: `python -m experiments` finds it.
"""
