"""What programs ask of the operating system and of OpenMP: large pages, and threads that do not spin for long."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from yi_vl.runtime import limit_spinning, use_huge_pages


@pytest.mark.parametrize("chosen", [None, "0"])
def test_large_pages_are_asked_for_unless_the_user_has_chosen(
    chosen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "")
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    if chosen is not None:
        monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", chosen)
    use_huge_pages()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == (chosen or "1")


@pytest.mark.parametrize("chosen", [{}, {"GOMP_SPINCOUNT": "5"}, {"OMP_WAIT_POLICY": "active"}])
def test_waiting_threads_are_limited_unless_the_user_has_chosen(
    chosen: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    limit_spinning()
    assert {name: os.environ[name] for name in names if name in os.environ} == (chosen or {"GOMP_SPINCOUNT": "10000"})


@pytest.mark.parametrize("program", ["yi_vl.cli", "eval.__main__"])
def test_programs_choose_before_torch_is_imported(program: str) -> None:
    check = f"import sys, {program}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=Path(__file__).parents[1]).returncode == 0
