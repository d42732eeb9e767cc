"""How programs end: one line on stderr for what users can cause, and the exit code that shells expect."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from yi_vl.program import run

ROOT = Path(__file__).parents[1]


@pytest.mark.core
@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("no such\n  model"), 2, "name: no such model\n"),
        (PermissionError(13, "Permission denied"), 2, "name: [Errno 13] Permission denied\n"),
        (KeyboardInterrupt(), 130, ""),
        (SystemExit(143), 143, ""),
    ],
)  # fmt: skip
def test_what_users_cause_is_one_line(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        run(main, "name")
    assert (caught.value.code, capsys.readouterr().err) == (code, line)


def test_faults_of_the_program_are_not_hidden() -> None:
    with pytest.raises(TypeError):
        run(lambda: len(1), "name")  # type: ignore[arg-type]


@pytest.mark.parametrize("program", ["yi_vl", "eval"])
def test_a_closed_pipe_is_quiet(program: str) -> None:
    command = [sys.executable, "-u", "-m", program, "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert (process.stderr.read(), process.wait(120)) == (b"", 1)
