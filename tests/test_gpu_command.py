"""`python -m eval gpu`: what becomes of parts that work, fail, hang, die or miss a package; and some at nano size."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import CONTEXT, run_program
from typer.testing import CliRunner

from eval.__main__ import app
from eval.gpu import guard as gpu_guard
from eval.gpu import measure as gpu
from eval.gpu.guard import Measured, Part, Settings, Skipped

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def processes_that_start_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes of parts are forked from a server, instead of importing everything themselves."""
    monkeypatch.setattr(gpu_guard.multiprocessing, "get_context", lambda method: CONTEXT)


def works(settings: Settings, shared: dict[str, Any]) -> Iterator[Measured]:
    shared["calls"] = shared.get("calls", 0) + 1
    yield Measured("calls", float(shared["calls"]), "calls", 4.0, "the | most")


def fails_late(settings: Settings, shared: dict[str, Any]) -> Iterator[Measured]:
    yield Measured("before", 1.0, "s")
    raise RuntimeError("CUDA out of memory.\nTried to allocate everything.")


def is_killed(settings: Settings, shared: dict[str, Any]) -> Iterator[Measured]:
    print("the last words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
    yield Measured("never", 0.0)


def hangs(settings: Settings, shared: dict[str, Any]) -> Iterator[Measured]:
    child = subprocess.Popen(["sleep", "600"])
    (settings.logs / "child").write_text(str(child.pid))
    time.sleep(600)
    yield Measured("never", 0.0)


def misses_a_package(settings: Settings, shared: dict[str, Any]) -> Iterator[Measured]:
    import a_package_that_nobody_has  # noqa: F401

    yield Measured("never", 0.0)


def is_skipped(settings: Settings, shared: dict[str, Any]) -> Iterator[Measured]:
    yield Measured("before", 1.0)
    raise Skipped("needs a GPU")


def knows_the_rates(settings: Settings, shared: dict[str, Any]) -> Iterator[Measured]:
    yield Measured("rate", settings.rates["a rate"], "GB/s")


def has_a_rate(settings: Settings, shared: dict[str, Any]) -> Iterator[Measured]:
    yield Measured("a rate", 3.0, "GB/s")
    yield Measured("machine", "a machine")


def test_whatever_becomes_of_a_part_the_rest_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    group = [("first", works), ("fails", fails_late), ("again", works), ("misses", misses_a_package)]
    parts = [
        Part("environment", "environment", 60, has_a_rate),
        *(Part(name, "group", 60, run) for name, run in group),
        Part("skipped", "group", 60, is_skipped),
        Part("killed", "killed", 60, is_killed),
        Part("hangs", "hangs", 3, hangs),
        Part("rates", "rates", 60, knows_the_rates),
    ]
    outcomes = gpu.measure(tmp_path, "cpu", "nano", parts=parts)
    assert list(outcomes) == [part.name for part in parts]
    result = {name: (outcome.status, outcome.reason) for name, outcome in outcomes.items()}
    assert result == {
        "environment": ("ok", ""),
        "first": ("ok", ""),
        "fails": ("failed", "RuntimeError: CUDA out of memory."),
        "again": ("ok", ""),
        "misses": ("skipped", "needs a_package_that_nobody_has"),
        "skipped": ("skipped", "needs a GPU"),
        "killed": ("failed", "its process died of SIGSEGV; its last output: the last words"),
        "hangs": ("failed", "it was stopped after 3 seconds"),
        "rates": ("ok", ""),
    }
    assert outcomes["fails"].measured == [Measured("before", 1.0, "s")]
    assert outcomes["again"].measured[0].value == 1, "a new process shares nothing with the one that failed"
    assert outcomes["rates"].measured[0].value == 3
    child = Path("/proc") / (tmp_path / "logs/child").read_text() / "stat"
    assert not child.exists() or child.read_text().split()[2] == "Z", "what a part has started goes with it"
    assert not (tmp_path / "work").exists()

    written = json.loads((tmp_path / gpu.JSON_FILE).read_text(encoding="utf-8"))
    assert written["size"] == "nano" and written["parts"]["hangs"]["status"] == "failed"
    item = {"name": "calls", "value": 1.0, "unit": "calls", "limit": 4.0, "limit_name": "the | most"}
    assert written["parts"]["first"]["measured"] == [item]
    table = (tmp_path / gpu.TABLE_FILE).read_text(encoding="utf-8")
    assert "| first | calls | 1 calls | 4 calls, the \\| most | 25.0% |" in table and "a machine." in table
    assert "- killed: failed: its process died of SIGSEGV" in table and ": 4 ok, 3 failed, 2 skipped." in table
    assert "failed" in capsys.readouterr().err


def test_when_the_time_is_over_the_rest_is_skipped(tmp_path: Path) -> None:
    parts = [Part("hangs", "a", 60, hangs), Part("late", "b", 60, works)]
    outcomes = gpu.measure(tmp_path, "cpu", "nano", minutes=0.05, parts=parts)
    assert [outcome.status for outcome in outcomes.values()] == ["failed", "skipped"]
    assert outcomes["late"].reason == "the 0.05 minutes were over"


def test_the_parts_themselves_at_nanos_size(tmp_path: Path) -> None:
    """Through the command line; the parts that take longest are tried with the whole command."""
    command = ["gpu", "--device", "cpu", "--size", "nano", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, [*command, "--parts", "stream,flash-attn,train align-224"])
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / gpu.JSON_FILE).read_text(encoding="utf-8"))
    parts = written["parts"]
    assert {name: part["status"] for name, part in parts.items()} == {
        "stream": "ok",
        "flash-attn": "skipped",
        "train align-224": "ok",
    }
    assert parts["flash-attn"]["reason"] == "needs a GPU"
    assert all(part["reason"] or part["measured"] for part in parts.values())
    units = {item["unit"] for part in parts.values() for item in part["measured"]}
    assert units == {"", "ms", "tokens/s", "TFLOP/s"}
    assert done.stdout.rstrip() == (tmp_path / gpu.TABLE_FILE).read_text(encoding="utf-8").rstrip()


@pytest.mark.parametrize(
    ("arguments", "output"),
    [(["--parts", "nonsense"], "there is no part 'nonsense'"), (["--device", "cuda"], "finds no CUDA device")],
)
def test_a_users_mistake_is_one_line(arguments: list[str], output: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    (done,) = run_program(tmp_path, "eval", "gpu", "--out", out, "--size", "nano", *arguments, CUDA_VISIBLE_DEVICES="")
    assert done.code == 2 and output in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
