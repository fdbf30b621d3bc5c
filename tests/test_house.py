"""The architecture, enforced: imports only go down, and nobody outside its folder names an algorithm."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from localrl.algorithms import ALGORITHMS

ROOT = Path(__file__).parent.parent / "localrl"

# A room imports from rooms of lower floors, and from itself. Rooms of one floor do not know each other unless listed below.
FLOORS = [
    {"__init__", "settings", "quiet", "allocator", "interrupt", "devices", "pieces"},
    {"batch", "algebra", "sections", "oom"},
    {"algorithms", "rewards", "data"},
    {"config"},
    {"folder", "memory", "metrics", "health", "evaluate", "buffer"},
    {"policy", "engines", "export"},
    {"train", "chat", "doctor", "display", "plots", "exports", "status", "sockets"},
    {"simulate"},
    {"planning"},
    {"record", "talk", "serve", "prepare", "probe", "provenance", "runs"},
    {"run"},
    {"outcome", "lab"},
    {"comparison"},
    {"demo"},
    {"cli"},
    {"__main__"},
]
NEIGHBOURS = {
    ("algebra", "batch"), ("engines", "policy"), ("policy", "engines"), ("engines", "export"), ("export", "policy"),
    ("memory", "folder"), ("metrics", "memory"),
}


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Rooms of this package that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
        found |= {name.split(".")[1] for name in names if name.startswith("localrl.")}
    return found


FILES = sorted(ROOT.rglob("*.py"))


def test_every_room_has_a_floor() -> None:
    assert {room(p) for p in FILES} <= set().union(*FLOORS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_go_down(path: Path) -> None:
    floor = {name: level for level, names in enumerate(FLOORS) for name in names}
    own = room(path)
    for other in imports(path) - {own}:
        assert floor[other] < floor[own] or (own, other) in NEIGHBOURS, f"{own} (floor {floor[own]}) imports {other} (floor {floor[other]})"


@pytest.mark.parametrize("path", [p for p in FILES if room(p) not in ("algorithms", "demo")], ids=lambda p: str(p.relative_to(ROOT)))
def test_no_algorithm_is_named_outside_its_folder(path: Path) -> None:
    text = re.sub(r'"""[\s\S]*?"""|"[^"\n]*"|#.*', "", path.read_text("utf-8"))          # code, not prose for people
    names = re.compile(r"\b(" + "|".join(ALGORITHMS) + r")\b", re.IGNORECASE)
    assert not names.findall(text)


def test_only_the_policy_and_export_rooms_know_the_quantiser_and_the_adapters() -> None:
    allowed = {"policy", "export", "engines", "doctor", "simulate"}
    for path in FILES:
        if room(path) not in allowed:
            assert not re.search(r"^\s*(import|from) (bitsandbytes|peft)\b", path.read_text("utf-8"), re.MULTILINE), path


def test_the_package_imports_without_torch() -> None:
    """Reward workers pay for every import at every start."""
    import subprocess
    import sys

    code = "import sys, localrl, localrl.settings, localrl.rewards.worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
