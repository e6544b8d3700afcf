"""The shape of the house: imports go one way, no private JAX, no global flags."""

import ast
import re
from functools import cache
from importlib.metadata import version
from pathlib import Path

import lazyjax

ROOT = Path(__file__).parent.parent
GROUPS = (
    ("types",),
    ("equations", "meshes", "memory", "widening"),
    ("checks", "derivatives", "checkpoints", "archives", "norms", "costs", "convolutions"),
    ("patterns", "traces", "leaves", "blocks", "laws", "centering"),
    ("tiling",),
    ("holomorphy",),
    ("data", "models", "tangent", "spectrum", "factors", "independence"),
    ("kernels", "loop"),
    ("stages",),
    ("runs",),
    ("dynamics", "metrics", "training"),
    ("curvature", "operators", "sketches", "natural"),
    ("selection", "verification", "limits"),
    ("store", "regression"),
    ("comparison",),
    ("plots",),
    ("pages",),
    ("commands",),
    ("__main__",),
)
SHOWING = ("lazyjax.plots", "lazyjax.pages")
PLACE = {module: place for place, group in enumerate(GROUPS) for module in group}
LIBRARY = sorted((ROOT / "lazyjax").rglob("*.py"))
ALL = LIBRARY + sorted((ROOT / "experiments").rglob("*.py"))


def room(path: Path) -> str:
    """Give the module, or the folder, right under `lazyjax`."""
    return path.relative_to(ROOT / "lazyjax").parts[0].removesuffix(".py")


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported_rooms(path: Path) -> set[str]:
    """Give the rooms that a module imports when it is imported itself.

    What a method imports when it is called is for the drawing of records (`History.plot`): it may
    be any room that shows.
    """
    tree, rooms = parsed(path), set()
    methods = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    late = {inner for method in methods for inner in ast.walk(method)}
    for node in ast.walk(tree):
        if node in late and getattr(node, "module", None) in SHOWING:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "lazyjax":
                rooms |= {alias.name for alias in node.names}
            elif node.module.startswith("lazyjax."):
                rooms.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            rooms |= {a.name.split(".")[1] for a in node.names if a.name.startswith("lazyjax.")}
    return rooms


def test_every_module_has_a_place_and_every_place_a_module():
    assert {room(path) for path in LIBRARY} - {"__init__"} == set(PLACE)


def test_imports_go_up_the_map_only():
    down = [
        f"{path} imports {other}"
        for path in LIBRARY
        if room(path) != "__init__"
        for other in imported_rooms(path) - {room(path)}
        if PLACE[other] >= PLACE[room(path)]
    ]
    assert not down


def test_a_room_is_entered_through_its_face():
    reaching = [
        f"{path} reaches into {node.module}"
        for path in LIBRARY
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.ImportFrom)
        and (node.module or "").startswith("lazyjax.")
        and node.module.count(".") > 1
        and room(path) not in (node.module.split(".")[1], "__init__")
    ]
    assert not reaching


def test_no_file_imports_private_jax():
    private = re.compile(r"jax\._src|jax\.interpreters\.(xla|mlir)")
    assert not [path for path in ALL if private.search(path.read_text())]


def test_the_library_changes_no_global_flag():
    calls = [
        (path, ast.unparse(node.func))
        for path in LIBRARY
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call)
    ]
    assert not [path for path, name in calls if name == "jax.config.update"]


def test_the_public_list_is_what_can_be_imported():
    assert len(set(lazyjax.__all__)) == len(lazyjax.__all__)
    for name in lazyjax.__all__:
        assert hasattr(lazyjax, name)


def test_every_file_that_names_the_version_names_the_same():
    assert f"\n## {lazyjax.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {lazyjax.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert version("lazyjax") == lazyjax.__version__
