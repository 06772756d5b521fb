"""The folders of psyche are layers: each imports from those below it only, so that there are no circles."""

from __future__ import annotations

import ast
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import psyche

ROOT = Path(psyche.__file__).parent
LAYERS = [
    "numerics",
    "protocol",
    "config",
    "network",
    "telemetry",
    "training",
    "exchange",
    "data",
    "ledger",
    "diloco",
    "audit",
    "coordinator",
    "worker",
    "tools",
    "federated",
    "payouts",
    "processes",
    "bench",
    "cli",
]
"""From the bottom up."""


def imported(path: Path) -> set[str]:
    """Rooms that a module imports from."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("psyche.")}


def test_every_room_has_its_place() -> None:
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert rooms == set(LAYERS)


OPTIONAL = {"federated": {"processes", "bench"}, "payouts": {"cli"}}
"""Rooms that the core does not know, each with those that may import it."""


@pytest.mark.parametrize("room", OPTIONAL)
def test_the_core_does_not_import_an_optional_room(room: str) -> None:
    importers = {path.relative_to(ROOT).parts[0] for path in ROOT.rglob("*.py") if room in imported(path)}
    assert importers - {room} == OPTIONAL[room]


@pytest.mark.parametrize("room", LAYERS)
def test_a_room_imports_only_from_below(room: str) -> None:
    allowed = set(LAYERS[: LAYERS.index(room) + 1])
    for path in sorted((ROOT / room).rglob("*.py")):
        rooms = imported(path) & set(LAYERS)
        assert rooms <= allowed, f"{path.relative_to(ROOT.parent)} imports from {sorted(rooms - allowed)}"


def test_the_protocol_is_pure() -> None:
    """No clock, socket, file or tensor: every rule can be tested by replaying events."""
    for path in sorted((ROOT / "protocol").glob("*.py")):
        assert imported(path) & set(LAYERS) <= {"protocol", "numerics"}, path
        tree = ast.parse(path.read_text())
        modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        modules |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not modules & {"time", "random", "secrets", "socket", "asyncio", "os", "pathlib", "torch"}, path


def test_only_processes_construct_the_libp2p_node() -> None:
    """Other rooms depend on ``network/transport.py``, so that another carrier can take its place.

    ``psyche doctor`` starts a node of its own, for a key that nobody knows; the bench and tests construct nodes, too.
    """
    for path in sorted(ROOT.rglob("*.py")):
        inside = path.relative_to(ROOT).as_posix()
        if not inside.startswith(("network/", "processes/", "bench/")) and inside != "tools/doctor.py":
            assert "psyche.network.node" not in path.read_text(), f"{inside} imports the libp2p node"


def test_no_module_imports_itself_through_others() -> None:
    """Imports at the top of modules; those within functions may point back."""
    modules = {".".join(path.relative_to(ROOT.parent).with_suffix("").parts): path for path in ROOT.rglob("*.py")}
    graph = {name.removesuffix(".__init__"): set[str]() for name in modules}
    for name, path in modules.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                names = {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                names = {alias.name for alias in node.names}
            else:
                continue
            graph[name.removesuffix(".__init__")] |= names & graph.keys()
    for name, targets in graph.items():
        # A package runs before its modules, so "from package import module" within it is no circle.
        targets -= {name, *(package for package in targets if name.startswith(f"{package}."))}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


SHARED_NAMES = {"__init__", "__main__", "base"}


def test_no_two_modules_have_the_same_name() -> None:
    names = Counter(path.stem for path in ROOT.rglob("*.py"))
    assert {name for name, count in names.items() if count > 1} <= SHARED_NAMES


LARGE_FOLDERS = {
    "tests/protocol": 26,
    "tests/bench": 21,
    "kernels/cpu": 22,
}
"""Folders with more than 20 files, and how many they may have: these numbers only shrink."""


def test_no_folder_has_more_than_20_files() -> None:
    top = ROOT.parent
    folders = [
        folder
        for name in ("psyche", "tests", "configs", "scripts", "kernels")
        for folder in (top / name, *(top / name).rglob("*"))
        if folder.is_dir() and not {"__pycache__", "build"} & set(folder.parts)
    ]
    for folder in folders:
        files = [path for path in folder.iterdir() if path.is_file() and path.suffix not in (".so", ".md")]
        assert len(files) <= LARGE_FOLDERS.get(str(folder.relative_to(top)), 20), folder
