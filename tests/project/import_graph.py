"""The import graph of a checkout: modules, imports, loops and arrows between rooms.

A room is a folder or a module directly inside an area: `geodiag.hooks.measure.formulas` is in the
room `measure` of the area `geodiag.hooks`.
"""

import ast
from functools import cache
from pathlib import Path

TOP_LEVEL = ("hooks", "dashboard", "cli", "reference_models", "benchmarks")
"""Folders beside geodiag/ whose import names are geodiag.hooks, geodiag.dashboard, …"""

Graph = dict[str, set[str]]
"""Module → the modules of the project that it imports."""


def source_files(root: Path, folder: str = "") -> list[Path]:
    """Return the real Python files of a top-level folder; "" is the core."""
    if folder:
        return sorted((root / folder).rglob("*.py"))
    links = {root / "geodiag" / name for name in TOP_LEVEL}
    return sorted(p for p in (root / "geodiag").rglob("*.py") if links.isdisjoint(p.parents))


def module_name(root: Path, path: Path) -> str:
    """Return the import name of a file, e.g. `geodiag.hooks.monitor`."""
    parts = path.relative_to(root).with_suffix("").parts
    if parts[0] != "geodiag":
        parts = ("geodiag", *parts)
    return ".".join(part for part in parts if part != "__init__")


@cache
def imports(path: Path) -> list[tuple[tuple[str, ...], bool]]:
    """Return each import of a file and whether it runs when the file is loaded.

    An import is the tuple of names that it may mean, the longest first: `from a import b` is
    `("a.b", "a")`. Imports under `if TYPE_CHECKING:` are left out.
    """
    tree = ast.parse(path.read_text(), str(path))
    for_types = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    late = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.walk(node)
    }
    found: list[tuple[tuple[str, ...], bool]] = []
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            found += [((alias.name,), id(node) not in late) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports by dots; write from geodiag.x import y"
            for alias in node.names:
                names = (f"{node.module}.{alias.name}", node.module or "")
                found.append((names, id(node) not in late))
    return found


def import_graph(root: Path) -> Graph:
    """Return the graph of all modules of a checkout; imports inside functions count."""
    folders = ("", *TOP_LEVEL)
    files = {module_name(root, path): path for f in folders for path in source_files(root, f)}
    graph: Graph = {}
    for module, path in files.items():
        meant = (next((n for n in names if n in files), None) for names, _ in imports(path))
        graph[module] = {name for name in meant if name is not None} - {module}
    return graph


def import_loops(graph: Graph) -> set[frozenset[str]]:
    """Return the sets of modules that import one another in a circle."""
    reachable = {module: _reachable(graph, module) for module in graph}
    return {
        frozenset(other for other in reachable[module] if module in reachable[other])
        for module in graph
        if module in reachable[module]
    }


def _reachable(graph: Graph, start: str) -> set[str]:
    """Return the modules that `start` imports, directly or through others."""
    found: set[str] = set()
    waiting = list(graph[start])
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += graph[module]
    return found


def room_arrows(graph: Graph, area: str) -> dict[tuple[str, str], list[str]]:
    """Return the arrows between rooms of an area, each with the imports behind it."""
    arrows: dict[tuple[str, str], list[str]] = {}
    for module, imported in graph.items():
        for other in imported:
            here, there = _room(module, area), _room(other, area)
            if here and there and here != there:
                arrows.setdefault((here, there), []).append(f"{module} imports {other}")
    return {arrow: sorted(reasons) for arrow, reasons in arrows.items()}


def rooms(graph: Graph, area: str) -> set[str]:
    """Return the names of the rooms of an area."""
    return {_room(module, area) for module in graph} - {""}


def _room(module: str, area: str) -> str:
    """Return the room of a module; "" for a module of another area, or for the area itself."""
    if not module.startswith(f"{area}."):
        return ""
    name = module.removeprefix(f"{area}.").split(".")[0]
    return "" if area == "geodiag" and name in TOP_LEVEL else name
