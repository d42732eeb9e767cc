"""The start of a program: hidden packages come back, and garbage is collected again."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import subprocess
import sys

import pytest
import torch

from yi_vl import loading, startup
from yi_vl.startup import hidden, paused_garbage_collection


def test_a_hidden_package_is_not_found_until_the_end() -> None:
    sys.modules.pop("this", None)
    with pytest.raises(RuntimeError, match="stopped"), hidden(["this"]):
        assert importlib.util.find_spec("this") is None
        with pytest.raises(ImportError):
            importlib.import_module("this")
        raise RuntimeError("stopped")
    assert importlib.util.find_spec("this") is not None and "this" not in sys.modules


def test_what_is_imported_already_is_not_hidden() -> None:
    with hidden(["pytest"]):
        assert importlib.import_module("pytest") is pytest
    assert sys.modules["pytest"] is pytest


def test_garbage_is_collected_again_unless_it_was_not_before() -> None:
    assert gc.isenabled()
    with pytest.raises(RuntimeError, match="stopped"), paused_garbage_collection():
        assert not gc.isenabled()
        raise RuntimeError("stopped")
    assert gc.isenabled()
    gc.disable()
    try:
        with paused_garbage_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize("imports_triton", [True, False])
def test_at_the_exit_triton_is_collected_and_nothing_without_it(imports_triton: bool) -> None:
    script = (
        "import atexit, gc, sys, types\n"
        "from yi_vl.startup import quick_start\n"
        "atexit.register(lambda: print(gc.get_freeze_count() > 0))\n"  # runs last
        "with quick_start():\n    pass\n"
        f"sys.modules |= {{'triton': types.ModuleType('triton')}} if {imports_triton} else {{}}"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == str(not imports_triton)


@pytest.mark.parametrize("version", ["5.16.1", "5.23.4", "5.25.0", "6.0.0"])
def test_nothing_is_hidden_from_a_transformers_that_was_not_tried(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup.metadata, "version", lambda _: version)
    assert startup.hidden_packages(quantizers=False) == ()
    monkeypatch.setattr(startup.metadata, "version", lambda _: "5.24.1")
    assert "torchvision" in startup.hidden_packages(quantizers=True)


@pytest.mark.parametrize(
    ("quantize", "device", "has_gpu", "is_found"),
    [
        ("int8", None, True, True),
        ("int4", "cuda:0", True, True),
        ("int8", "cuda", False, True),  # refused for want of a GPU, not of torchao
        ("int8", "cpu", True, False),
        ("int8", None, False, False),
        (None, None, True, False),
    ],
)
def test_torchao_is_found_where_it_quantizes(
    quantize: str | None, device: str | None, has_gpu: bool, is_found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert loading._is_for_gpu(quantize, device) is is_found
