"""Who may import whom, held as data; and what must stay cheap to import."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Inside yi_vl a module imports only modules of earlier lines. `config <- vision, ... <- model, ...` in DESIGN.md.
LAYERS = (
    {"addresses", "arguments", "config", "machine", "image_samples", "fingerprint"},
    {"image_file", "image_resize", "image_remote"},
    {"image_source"},
    {"vision", "projector", "image", "chat", "messages", "cache", "linear"},
    {"model", "processor", "reuse", "quantize", "generation"},
    {"auto", "decode"},
    {"convert", "batch"},
    {"loading", "sizes"},
    {"predict", "parts"},
    {"server"},
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


def yi_vl_module(name: str) -> str | None:
    """`yi_vl.model.YiVLModel` -> `model`; None for other packages and for yi_vl itself."""
    parts = name.split(".")
    return parts[1] if parts[0] == "yi_vl" and len(parts) > 1 else None


LAYER_OF = {module: index for index, layer in enumerate(LAYERS) for module in layer}


@pytest.mark.parametrize(
    "path",
    [path for path in sources("yi_vl") if path.parent.name != "nano"],  # what save_pretrained wrote
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_arrows_inside_yi_vl(path: Path) -> None:
    importer = path.relative_to(ROOT / "yi_vl").parts[0].removesuffix(".py")
    if importer == "__init__":
        return  # names, resolved when they are used
    assert importer in LAYER_OF, f"give {path.name} a place in LAYERS"
    files = {file.stem for file in (ROOT / "yi_vl").iterdir()}
    for name in imports_of_file(path):
        imported = yi_vl_module(name)
        if imported in files and imported != importer:
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
        "import train.data as d\n"
        "from yi_vl import chat\n"
        "def f():\n"
        "    from ..config import preset\n"
        "    from . import keys\n"
    )
    found = set(imports_of(source, ["yi_vl", "convert"]))
    assert {"train.data", "yi_vl.chat", "yi_vl.config", "yi_vl.config.preset", "yi_vl.convert.keys"} <= found
