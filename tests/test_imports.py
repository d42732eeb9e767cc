"""Who may import whom, held as data; and what must stay cheap to import."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Inside yi_vl a module imports only modules of earlier lines, and its own package. A package stands for its modules
# that are not named themselves.
LAYERS = (
    {"arguments", "chat", "config", "connector", "files", "hardware", "program", "runtime"}
    | {"autotune", "engine.fingerprint", "engine.kv_cache", "checkpoint.key_map"},
    {"linear"},
    {"image", "messages", "generation", "quantize", "vision", "engine.prefix_cache", "checkpoint.json_files"},
    {"model", "checkpoint.weight_files"},
    {"processor"},
    {"auto"},
    {"engine"},
    {"checkpoint"},
    {"predict"},
    {"server", "info", "terminal"},
    {"cli"},
    {"__main__"},
)
APPLICATIONS = ("train", "eval", "demo")
LIGHT = ("", ".cli", ".chat")  # importable without torch: yi_vl, yi_vl.cli, yi_vl.chat
HEAVY = ("torch", "transformers", "open_clip", "numpy", "rich.table")


def imports_of(source: str, package: list[str]) -> Iterator[str]:
    """Absolute names of everything that a module of a package imports, wherever in its source it does."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imports_of_file(path: Path) -> Iterator[str]:
    return imports_of(path.read_text(encoding="utf-8"), list(path.relative_to(ROOT).parts[:-1]))


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


LAYER_OF = {module: index for index, layer in enumerate(LAYERS) for module in layer}


def unit_of(name: str) -> str | None:
    """The entry of `LAYERS` for a dotted name inside yi_vl: `engine.kv_cache.GrowableLayer` -> `engine.kv_cache`."""
    parts = name.split(".")
    units = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((unit for unit in units if unit in LAYER_OF), None)


@pytest.mark.parametrize(
    "path",
    [path for path in sources("yi_vl") if path.parent.name != "nano"],  # what save_pretrained wrote
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_arrows_inside_yi_vl(path: Path) -> None:
    name = ".".join(path.relative_to(ROOT / "yi_vl").with_suffix("").parts)
    if name == "__init__":
        return  # names, resolved when they are used
    importer = unit_of(name)
    assert importer, f"give {name} a place in LAYERS"
    for imported_name in imports_of_file(path):
        imported = unit_of(imported_name.removeprefix("yi_vl.")) if imported_name.startswith("yi_vl.") else None
        if imported and imported.split(".")[0] != importer.split(".")[0]:
            assert LAYER_OF[imported] < LAYER_OF[importer], f"{importer} must not import {imported}"


@pytest.mark.parametrize("package", ["yi_vl", *APPLICATIONS])
def test_applications_stand_on_yi_vl_alone(package: str) -> None:
    forbidden = set(APPLICATIONS) - {package}
    for path in sources(package):
        for name in imports_of_file(path):
            assert name.split(".")[0] not in forbidden, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_nothing_heavy(module: str) -> None:
    check = f"import sys, yi_vl{module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    command = [sys.executable, "-c", check]
    assert subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip() == "[]"


def test_public_names_resolve() -> None:
    import yi_vl

    for name in yi_vl.__all__:
        assert getattr(yi_vl, name).__module__.startswith("yi_vl.")
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = yi_vl.nonsense


def test_the_walk_finds_every_kind_of_import() -> None:
    source = (
        "import train.data.loader as d\n"
        "from yi_vl import chat\n"
        "def f():\n"
        "    from ..config import preset\n"
        "    from . import keys\n"
    )
    found = set(imports_of(source, ["yi_vl", "checkpoint"]))
    assert {"train.data.loader", "yi_vl.chat", "yi_vl.config", "yi_vl.config.preset", "yi_vl.checkpoint.keys"} <= found
