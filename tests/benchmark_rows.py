"""What tests of benchmarks share: rows in their hubs' schemas, the published responses, and eval's commands."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from eval.__main__ import app

ROOT = Path(__file__).parents[1]
REFERENCE = Path(os.environ.get("YI_VL_REFERENCE", ROOT.parent / "shared" / "reference"))
with_reference = pytest.mark.skipif(
    not (REFERENCE / "edge_cases.json").exists(),
    reason="the benchmarks' published responses are not here (YI_VL_REFERENCE names their folder)",
)
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def encoded_image(colour: str, image_format: str = "PNG", mode: str = "RGB") -> dict[str, Any]:
    buffer = io.BytesIO()
    image = Image.new("RGBA", (8, 8), colour)
    if mode == "P":  # a palette whose first colour is transparent
        image.convert("RGB").convert("P").save(buffer, image_format, transparency=0)
    else:
        image.convert(mode).save(buffer, image_format)
    return {"bytes": buffer.getvalue(), "path": f"{colour}.{image_format.lower()}"}


def write_parquet(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A table with the columns of its first row: image structs, and text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema(
        [(name, IMAGE if name.startswith("image") and not name.endswith("name") else pa.string()) for name in rows[0]]
    )
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path)


def mmmu_row(subject: str, number: int, question: str = "<image 1> What is it?", **changes: Any) -> dict[str, Any]:
    return {
        "id": f"validation_{subject}_{number}",
        "question": question,
        "options": "['red', 'green', \"it's blue\"]",
        "explanation": "",
        "image_1": encoded_image("red"),
        "image_2": encoded_image("blue"),
        **{f"image_{i}": None for i in range(3, 8)},
        "img_type": "['Photographs']",
        "answer": "B",
        "topic_difficulty": "Easy",
        "question_type": "multiple-choice",
        "subfield": "x",
    } | changes


def write_mmmu(folder: Path, **by_subject: list[dict[str, Any]]) -> str:
    for subject, rows in by_subject.items():
        write_parquet(folder / subject / "validation-00000-of-00001.parquet", rows)
    return str(folder)


def run_cli(*arguments: str) -> str:
    """What a command prints; whatever goes wrong is raised."""
    return CliRunner().invoke(app, arguments, catch_exceptions=False).stdout
