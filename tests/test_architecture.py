"""Imports point down, from the code itself. This is where each package's floor is written."""

import ast
from pathlib import Path
from typing import Dict, Iterator, List, Set, Tuple

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "kd_plugin"

# Lowest first. A module or folder may import what is on its own floor or below, but no two may
# import each other, however long the way round. Imports inside functions count.
FLOORS = [
    ["errors", "files", "shards", "timing", "pages", "calibration", "objective"],
    ["checkpoints"],
    ["teachers", "cache"],
    ["flags", "plan", "tasks", "criterion"],
    ["decoding", "vocabulary"],
    ["export"],
    ["sequences", "initialisation"],
    ["report", "benchmark"],
    ["commands"],
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
OBJECTIVE_MAY_IMPORT = {
    *("torch", "errors"),
    *("abc", "contextlib", "dataclasses", "functools", "math", "re", "typing"),
}

Imported = Tuple[int, str, List[str]]  # line, module as it is written in full, names


def imports(file: Path, module: str) -> Iterator[Imported]:
    """All imports of a file; relative ones as if they were written in full."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, []
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) - node.level + 1] if node.level else []
            full = ".".join([*base, *filter(None, [node.module])])
            yield node.lineno, full, [alias.name for alias in node.names]


def modules(folder: Path) -> Dict[str, Path]:
    """Every module below a package's folder by its full name."""
    found = {}
    for file in sorted(folder.rglob("*.py")):
        parts = [folder.name, *file.relative_to(folder).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def packages(folder: Path) -> Set[str]:
    """What is right below a package: folders and modules."""
    return {name.split(".")[1] for name in modules(folder) if "." in name}


def uses(folder: Path) -> Iterator[Tuple[str, str, str]]:
    """Who imports what of its own package, and where: names right below the package."""
    below = packages(folder)
    for module, file in modules(folder).items():
        if module == folder.name:
            continue  # the package itself only opens the house
        for line, full, names in imports(file, module):
            first, *rest = full.split(".")
            if first == folder.name:
                targets = rest[:1] or [name if name in below else folder.name for name in names]
                for target in targets or [folder.name]:
                    yield module.split(".")[1], target, f"{file.relative_to(folder)}:{line}"


def upwards(folder: Path) -> List[str]:
    """Imports that do not point down, or at nothing that has a floor."""
    return [
        f"{where}: {user} imports {used}"
        for user, used, where in uses(folder)
        if user != used and FLOOR.get(user, -1) < FLOOR.get(used, len(FLOORS))
    ]


def cycles(folder: Path) -> List[Set[str]]:
    """Folders and modules that import each other, on whatever way."""
    reached: Dict[str, Set[str]] = {}
    for user, used, _ in uses(folder):
        if user != used:
            reached.setdefault(user, set()).add(used)
    for _ in reached:
        for targets in reached.values():
            targets.update(*(reached.get(target, ()) for target in set(targets)))
    circles = []
    for name in sorted(reached):
        if name in reached[name]:
            circle = {other for other in reached[name] if name in reached.get(other, ())}
            if circle not in circles:
                circles.append(circle)
    return circles


def test_every_package_has_a_floor():
    assert packages(PACKAGE) <= set(FLOOR)
    assert len(FLOOR) == sum(map(len, FLOORS))  # and no more than one


def test_imports_point_down():
    assert upwards(PACKAGE) == []


def test_no_packages_import_each_other():
    assert cycles(PACKAGE) == []


def test_the_objective_knows_nothing_of_fairseq():
    """Torch is enough for it, and for anybody who wants to compute a divergence."""
    found = {
        full.replace(PACKAGE.name + ".", "").split(".")[0]
        for module, file in modules(PACKAGE / "objective").items()
        for _, full, _ in imports(file, f"{PACKAGE.name}.{module}")
    }
    assert found - {"objective"} <= OBJECTIVE_MAY_IMPORT


# that a fault would be found


def house(folder: Path, **files: str) -> Path:
    for name, content in files.items():
        path = folder / "kd_plugin" / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder / "kd_plugin"


@pytest.mark.parametrize(
    "line",
    [
        "from ..teachers import run",
        "from ..teachers.run import Teacher",
        "from .. import teachers",
        "import kd_plugin.teachers.run",
        "from kd_plugin.teachers import run",
        "def f():\n    from ..teachers.run import Teacher",
        "try:\n    from .. import attic\nexcept ImportError:\n    pass",
    ],
)
def test_an_import_that_points_up_is_found(line, tmp_path):
    folder = house(
        tmp_path, checkpoints__a="import os\nfrom ..files import b\n" + line, teachers__run="", b=""
    )
    (found,) = upwards(folder)
    assert found.startswith("checkpoints/a.py:") and found.split()[1] == "checkpoints"
    assert upwards(house(tmp_path, checkpoints__a="from ..files import b\nfrom . import c")) == []


def test_a_way_round_is_found(tmp_path):
    folder = house(
        tmp_path,
        plan="from .tasks import x",
        tasks__a="from ..criterion import y\nfrom . import b",
        tasks__b="from .a import c",
        criterion="import kd_plugin.plan\nfrom .files import z",
    )
    assert cycles(folder) == [{"plan", "tasks", "criterion"}]
    assert cycles(house(tmp_path, criterion="")) == []
