"""Files appear when they are complete, JSON lines are read or refused by number, and sums are SHA-256."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from yi_vl.files import atomic_path, read_json_lines, sha256, write_json_lines, write_text

pytestmark = pytest.mark.core


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("is_folder", [False, True])
def test_a_file_or_folder_replaces_the_old_one_when_it_is_complete(
    is_folder: bool, flush: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("new/made")

    def write(target: Path, text: str) -> None:
        if is_folder:
            target.mkdir()
        (target / "content" if is_folder else target).write_text(text)

    for text in ("old", "new"):
        with atomic_path(path, flush) as temporary:
            write(temporary, text)
        assert (path / "content" if is_folder else path).read_text() == text
    with pytest.raises(KeyboardInterrupt), atomic_path(path, flush) as temporary:
        write(temporary, "partial")
        raise KeyboardInterrupt
    assert (path / "content" if is_folder else path).read_text() == "new"
    assert [left.name for left in path.parent.iterdir()] == ["made"]


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "a\u2028b"}, {"text": "狗"}]
    write_json_lines(path, rows)
    assert read_json_lines(path) == rows
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b'\n{"text": "c')
    assert read_json_lines(path, drops_partial=True) == rows
    with pytest.raises(ValueError, match=r"rows.jsonl, line 4 is not JSON"):
        read_json_lines(path)
    for line, message in (("[1]", "line 1 is a list, not an object"), ("[" * 100_000, "line 1 is not JSON")):
        write_text(path, line)
        with pytest.raises(ValueError, match=message):
            read_json_lines(path)
    path.write_bytes(json.dumps({"text": "狗"}, ensure_ascii=False).encode("gb18030"))
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        read_json_lines(path)
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_json_lines(tmp_path / "none")


def test_sums(tmp_path: Path) -> None:
    content = bytes(range(256)) * 9000  # more than a block
    (tmp_path / "content").write_bytes(content)
    assert sha256(tmp_path / "content") == hashlib.sha256(content).hexdigest()
