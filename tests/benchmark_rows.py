"""Rows of benchmarks in their hubs' schemas, written by the tests."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

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
