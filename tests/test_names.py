"""`tests/names.py` finds home-made words in code, YAML and prose, and honours what is allowed."""

from __future__ import annotations

import sys
from fnmatch import fnmatch
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from names import ALLOWED, findings_in, parts_of, tracked


def words(path: str, text: str) -> list[tuple[int, str]]:
    return sorted((finding.line, finding.word) for finding in findings_in(path, text))


def test_python() -> None:
    source = '"""Called by a.py."""\nnum_pictures = wanted  # anew\nx = f"{y} pictures"\nPictureCache(x)\n'
    expected = [(1, "Called by"), (2, "anew"), (2, "num_pictures"), (2, "wanted"), (3, "pictures"), (4, "PictureCache")]
    assert words("yi_vl/x.py", source) == expected


def test_words_inside_other_words_are_not_found() -> None:
    assert words("yi_vl/x.py", "founded = owner = kinds_of = None  # depicture, renewed, planewise\n") == []
    assert parts_of("numPictures_ofRGBImages") == ["num", "pictures", "of", "rgb", "images"]


def test_yaml_keys_and_prose() -> None:
    text = "optimiser: {betas: [0.9]}\nbad_steps: {stop_after: 3}\nseed: 0  # whoever reads\n"
    assert words("train/configs/x.yaml", text) == [(1, "optimiser"), (2, "bad_steps"), (3, "whoever")]


def test_file_names() -> None:
    assert words("train/loop.py", "") == [(1, "loop.py")]


def test_allowed() -> None:
    assert words("README.md", 'print("What is in this picture?")\nthe pictures\n') == [(2, "pictures")]
    assert words("yi_vl/x.py", "if dtype.kind == 'f': kind = 1\nkind = 2\n") == [(2, "kind")]


def test_every_exception_has_files_and_a_reason() -> None:
    for allowed in ALLOWED:
        assert allowed.reason and any(fnmatch(name, allowed.files) for name in tracked()), allowed
