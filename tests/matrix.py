"""The core tests (`pytest -m core`) on the oldest and the newest libraries that are allowed, and on each Python.

`python tests/matrix.py` makes a throw-away environment for every row, runs the tests in it, and prints what ran:

    oldest    the lowest torch and transformers of pyproject.toml, on this Python
    newest    the highest that the package index has, on this Python
    lock      constraints.txt, on each Python from 3.10 to 3.13 that is found

    sglang    the transformers that SGLang pins, on this Python: what inference servers ask of us

`--short` is for CI: this Python only, and only transformers differs; torch and everything else are those of the
environment that runs this file.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
# torchvision has a release for every torch; this one is for the lowest torch allowed.
LOWEST = ("torch", "torchvision", "transformers")
TESTS = ["-m", "pytest", "-q", "-m", "core", "-p", "no:cacheprovider"]
SGLANG_TRANSFORMERS = "transformers==5.19.0"  # of SGLang 0.5.23; vLLM 0.32 takes 5.16.1 to 5.19
SERVING_TESTS = ("tests/test_serving_engines.py", "tests/test_native.py")
VERSIONS = (
    "import platform, torch, transformers;"
    "print(f'Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}')"
)


@dataclass(frozen=True)
class Row:
    """One environment: what it is, whose Python it has, and how packages get into it."""

    name: str
    python: str
    install: list[list[str]]  # commands, with {python} for the environment's own
    is_overlay: bool = False  # whether it also sees the packages of the environment that runs this file
    tests: tuple[str, ...] = ("tests",)


def lowest_requirements() -> list[str]:
    """`torch==2.11.0` and so on, from the lower bounds in pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    bounds = {name: re.search(rf'^    "{name}>=([0-9.]+)', text, re.MULTILINE) for name in LOWEST}
    missing = [name for name, bound in bounds.items() if bound is None]
    if missing:
        raise SystemExit(f"pyproject.toml has no lower bound for {', '.join(missing)}.")
    return [f"{name}=={bound[1]}.*" for name, bound in bounds.items() if bound]


def short_rows() -> Iterator[Row]:
    """The lowest and the highest transformers, and SGLang's, over the packages of this environment."""
    allowed = re.search(r'"(transformers>=[^"]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert allowed is not None
    oldest = next(name for name in lowest_requirements() if name.startswith("transformers"))
    for name, requirement in (("oldest", oldest), ("newest", allowed[1])):
        yield _overlay(name, requirement, ("tests",))
    yield _overlay("sglang", SGLANG_TRANSFORMERS, SERVING_TESTS)


def _overlay(name: str, requirement: str, tests: tuple[str, ...]) -> Row:
    # pip, unlike uv, takes what the overlay sees for installed, and brings only what has to differ.
    install = [["{python}", "-m", "pip", "install", "-q", "--upgrade", requirement]]
    return Row(name, sys.executable, install, is_overlay=True, tests=tests)


def long_rows() -> Iterator[Row]:
    """Oldest, newest, SGLang's, and the lock on each Python."""
    install = [
        "uv",
        "pip",
        "install",
        "-q",
        "--compile-bytecode",
        "--python",
        "{python}",
        "--editable",
        ".[train,nano,eval,quantize,serve,demo,test]",
    ]
    yield Row("oldest", sys.executable, [[*install, *lowest_requirements()]])
    yield Row("newest", sys.executable, [[*install, "--upgrade"]])
    yield Row("sglang", sys.executable, [[*install, SGLANG_TRANSFORMERS]], tests=SERVING_TESTS)
    for version in PYTHONS:
        if python := _find_python(version):
            yield Row("lock", python, [[*install, "--constraint", "constraints.txt"]])
        else:
            print(f"lock      Python {version} was not found; skipped", flush=True)


def run(row: Row) -> bool:
    """Make the environment, run the tests in it, print one line, and remove it."""
    with tempfile.TemporaryDirectory(prefix="yi-vl-matrix-") as folder:
        started = time.monotonic()
        subprocess.run([row.python, "-m", "venv", folder], check=True)
        python = Path(folder) / "bin" / "python"
        if row.is_overlay:
            here = sysconfig.get_path("purelib")
            (Path(_purelib(python)) / "outer.pth").write_text(f"{here}\n", encoding="utf-8")
        environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1"}
        for command in row.install:
            full = [part.format(python=python) for part in command]
            subprocess.run(_uv() + full[1:] if full[0] == "uv" else full, check=True, cwd=ROOT, env=environment)
        versions = subprocess.run([python, "-W", "ignore", "-c", VERSIONS], capture_output=True, text=True, check=True)
        tests = subprocess.run([python, *TESTS, *row.tests], cwd=ROOT, env=environment, capture_output=True, text=True)
        seconds = time.monotonic() - started
        lines = tests.stdout.strip().splitlines() or [tests.stderr.strip()[-500:]]
        print(f"{row.name:9} {versions.stdout.strip()}: {lines[-1]}, {seconds:.0f} s with the installation", flush=True)
        if tests.returncode:
            print(tests.stdout[-6000:], tests.stderr[-2000:], sep="\n")
        return tests.returncode == 0


def _find_python(version: str) -> str | None:
    """Where uv finds it, or among pyenv's, of which only the chosen ones are on the path."""
    search = subprocess.run([*_uv(), "python", "find", version], capture_output=True, text=True, check=False)
    if search.returncode == 0:
        return search.stdout.strip()
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    return next(map(str, sorted(pyenv.glob(f"versions/{version}.*/bin/python"))), None)


def _purelib(python: Path) -> str:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def _uv() -> list[str]:
    return [sys.executable, "-m", "uv"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="only transformers' oldest and newest, on this Python")
    rows = list(short_rows() if parser.parse_args().short else long_rows())
    results = [run(row) for row in rows]
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
