"""What an installed user gets: the library with its weights, and nothing else."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_BYTES = 30_000_000


@pytest.mark.slow
def test_wheel_holds_the_library_and_nothing_else(tmp_path: Path) -> None:
    built = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            str(ROOT),
            "--no-deps",
            "--no-build-isolation",
            "--wheel-dir",
            str(tmp_path),
            "--quiet",
        ],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    outside = [name for name in names if not name.startswith(("yi_vl/", "yi_vl-"))]
    assert not outside, f"the wheel would install {outside}"
    sources = [path for path in (ROOT / "yi_vl").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    expected = {path.relative_to(ROOT).as_posix() for path in sources}
    assert {"yi_vl/py.typed", "yi_vl/model.py", "yi_vl/nano/README.md", "yi_vl/nano/model.safetensors"} <= expected
    assert expected <= set(names), f"the wheel lacks {sorted(expected - set(names))}"
    assert wheel.stat().st_size < MAX_BYTES
