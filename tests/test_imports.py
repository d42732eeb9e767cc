"""Who may import whom, held as data; and what must stay cheap to import."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from yi_vl.startup import hidden_packages

ROOT = Path(__file__).parents[1]

# Inside yi_vl a module imports only modules of earlier lines, and of its own entry: a module, or a package, that stands
# for its modules that have no entry of their own.
LAYERS = (
    {"arguments", "chat", "connector", "files", "hardware", "program", "runtime", "startup", "versions"}
    | {"autotune", "engine.fingerprint", "checkpoint.key_map"},
    {"decoder"},
    {"config", "chat_template", "encode", "linear", "tokenizer"},
    {"vision_blocks"},
    {"image", "messages", "generation", "quantize", "vision", "engine.cache_layers", "checkpoint.json_files"},
    {"engine.kv_cache"},
    {"engine.prefix_cache"},
    {"model", "checkpoint.weight_files"},
    {"processor"},
    {"auto"},
    {"engine"},
    {"checkpoint"},
    {"predict"},
    {"server", "conversion", "info", "hybrid_info", "terminal", "loading"},
    {"expand", "upcycle"},
    {"cli_architecture"},
    {"cli", "vllm_plugin"},
    {"__main__"},
)
# Inside train/nano likewise.
NANO_LAYERS = (
    {"data"},
    {"text"},
    {"data.shards"},
    {"pretrain"},
    {"measure"},
    {"connectors", "tiles"},
    {"__main__"},
)
APPLICATIONS = ("train", "eval", "demo")
LIGHT = ("", ".cli", ".chat")  # importable without torch: yi_vl, yi_vl.cli, yi_vl.chat
HEAVY = ("torch", "transformers", "open_clip", "numpy", "rich.table")

# A program's command line, its exit code, and what it must not have imported by its end.
FRAMEWORKS = ("torch", "transformers", "open_clip", "torchvision")
WEB = ("fastapi", "uvicorn", "gradio")
UNUSED = ("open_clip", "timm", *hidden_packages(quantizers=False), "peft", "pandas", *WEB)
STARTS = (
    (["yi_vl", "--version"], 0, (*FRAMEWORKS, *WEB, "numpy", "PIL", "rich")),
    *(
        ([program, *arguments, "--help"], 0, (*FRAMEWORKS, *WEB, "numpy", "PIL", "datasets"))
        for program, *arguments in (
            ["yi_vl"], ["yi_vl", "ask"], ["yi_vl", "chat"], ["yi_vl", "serve"], ["yi_vl", "info"], ["yi_vl", "convert"],
            ["yi_vl", "expand"], ["yi_vl", "upcycle"],
            ["train"], ["demo"], ["eval"], ["eval", "mmmu"], ["eval", "score"], ["eval", "speed"],
        )
    ),
    (["yi_vl", "ask"], 2, (*FRAMEWORKS, *WEB, "numpy", "PIL")),
    (["yi_vl", "ask", "Hi", "--dtype", "int8"], 2, (*FRAMEWORKS, *WEB, "numpy", "PIL")),
    (["yi_vl", "ask", "Hi", "--model", "nothing-here"], 2, (*FRAMEWORKS, *WEB, "numpy", "PIL")),
    (["yi_vl", "ask", "Hi", "--no-such-option"], 2, (*FRAMEWORKS, *WEB, "numpy", "PIL")),
    (["yi_vl", "ask", "missing.png", "Hi"], 2, (*FRAMEWORKS, *WEB)),
    (["yi_vl", "ask", "README.md", "README.md", "Hi"], 2, (*FRAMEWORKS, *WEB)),
    (["yi_vl", "ask", "https://example.org/image.png", "Hi"], 2, (*FRAMEWORKS, *WEB)),
    (["yi_vl", "chat", "missing.png"], 2, (*FRAMEWORKS, *WEB)),
    (["yi_vl", "serve", "nothing-here"], 2, (*FRAMEWORKS, *WEB, "numpy", "PIL")),
    (["yi_vl", "serve", "--port", "70000"], 2, FRAMEWORKS),
    (["yi_vl", "info", "nothing-here"], 2, (*FRAMEWORKS, *WEB, "numpy", "PIL")),
    (["yi_vl", "convert", "nothing-here", "there"], 2, (*FRAMEWORKS, *WEB, "numpy", "PIL")),
    (["yi_vl", "expand", "nothing-here", "there", "--double", "1:2"], 2, (*FRAMEWORKS, *WEB, "numpy", "PIL")),
    (["yi_vl", "upcycle", "nothing-here", "there", "--every", "2"], 2, (*FRAMEWORKS, *WEB, "numpy", "PIL")),
    (["yi_vl", "convert", "nothing-here"], 2, (*FRAMEWORKS, *WEB, "numpy", "PIL")),
    (["demo", "--model", "nothing-here"], 2, (*FRAMEWORKS, *WEB, "numpy", "PIL")),
    (["demo", "--host", "0.0.0.0"], 2, (*FRAMEWORKS, *WEB, "numpy", "PIL")),
    (["eval", "mmmu", "--split", "none"], 2, (*FRAMEWORKS, *WEB, "numpy", "PIL")),
    (["train", "no-such-file.yaml"], 2, (*FRAMEWORKS, *WEB)),
    *(
        (["yi_vl", "ask", "docs/images/dog.png", "What is this?", "--max-new-tokens", "2", *options], 0, UNUSED)
        for options in ([], ["--quantize", "int8", "--device", "cpu"])
    ),
)  # fmt: skip


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


Layers = tuple[set[str], ...]


def unit_of(name: str, layers: Layers) -> str | None:
    """The entry of `layers` for a dotted name: `engine.kv_cache.GrowableLayer` -> `engine.kv_cache`."""
    parts = name.split(".")
    units = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((unit for unit in units if any(unit in layer for layer in layers)), None)


def layer_of(unit: str, layers: Layers) -> int:
    return next(index for index, layer in enumerate(layers) if unit in layer)


def check_layers(path: Path, package: str, layers: Layers) -> None:
    """A module of `package` imports only from its own unit and units of earlier layers."""
    name = ".".join(path.relative_to(ROOT / package.replace(".", "/")).with_suffix("").parts)
    if name == "__init__":
        return  # names, resolved when they are used
    importer = unit_of(name, layers)
    assert importer, f"give {name} a layer in {Path(__file__).name}"
    for imported_name in imports_of_file(path):
        is_inside = imported_name.startswith(f"{package}.")
        imported = unit_of(imported_name.removeprefix(f"{package}."), layers) if is_inside else None
        if imported and imported != importer:
            assert layer_of(imported, layers) < layer_of(importer, layers), f"{importer} must not import {imported}"


@pytest.mark.parametrize(
    "path",
    [path for path in sources("yi_vl") if path.parent.name != "nano"],  # what save_pretrained wrote
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_arrows_inside_yi_vl(path: Path) -> None:
    check_layers(path, "yi_vl", LAYERS)


@pytest.mark.parametrize("path", sources("train/nano"), ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_inside_nano(path: Path) -> None:
    check_layers(path, "train.nano", NANO_LAYERS)


@pytest.mark.parametrize("package", ["yi_vl", *APPLICATIONS])
def test_applications_stand_on_yi_vl_alone(package: str) -> None:
    others = set(APPLICATIONS) - {package}
    for path in sources(package):
        for name in imports_of_file(path):
            assert name.split(".")[0] not in others, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_nothing_heavy(module: str) -> None:
    check = f"import sys, yi_vl{module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    command = [sys.executable, "-c", check]
    assert subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip() == "[]"


@pytest.mark.parametrize(("arguments", "code", "unwanted"), STARTS, ids=lambda value: str(value).replace("/", "."))
def test_a_start_imports_no_more_than_it_needs(arguments: list[str], code: int, unwanted: tuple[str, ...]) -> None:
    """As `python -m PROGRAM` would run it."""
    program, *rest = arguments
    script = (
        "import atexit, runpy, sys\n"
        f"atexit.register(lambda: print('imported', [name for name in {unwanted!r} if sys.modules.get(name)]))\n"
        f"sys.argv[1:] = {rest!r}\n"
        f"runpy.run_module({program!r}, run_name='__main__', alter_sys=True)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == code, ended.stderr
    assert ended.stdout.splitlines()[-1] == "imported []"


def test_public_names_resolve() -> None:
    import yi_vl

    for name in yi_vl.__all__:
        assert getattr(yi_vl, name).__module__.startswith("yi_vl.")
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = yi_vl.nonsense


def test_every_variant_of_import_is_found() -> None:
    source = (
        "import train.data.loader as d\n"
        "from yi_vl import chat\n"
        "def f():\n"
        "    from ..config import preset\n"
        "    from . import keys\n"
    )
    imported = set(imports_of(source, ["yi_vl", "checkpoint"]))
    assert {
        "train.data.loader",
        "yi_vl.chat",
        "yi_vl.config",
        "yi_vl.config.preset",
        "yi_vl.checkpoint.keys",
    } <= imported
