"""Images in requests: every spelling of base64, and every format that web browsers show."""

from __future__ import annotations

import base64
import io

import pytest
from openai import OpenAI
from PIL import Image, features
from serving import WIDE, address, answer, chat_message, client, yi_vl

from yi_vl.image import WEB_FORMATS
from yi_vl.predict import YiVL
from yi_vl.server.images import _decode_data_url
from yi_vl.server.protocol import ApiError

ENCODED = base64.b64encode(bytes(range(256)) * 3 + b"\xff").decode()


@pytest.mark.parametrize(
    "url",
    [
        f"data:image/png;base64,{ENCODED}", f"data:image/jpg;base64,{ENCODED}", f"data:;base64,{ENCODED}",
        f"DATA:IMAGE/PNG;BASE64,{ENCODED}", f"data:image/png;charset=utf-8;base64,{ENCODED}",
        f"data:application/octet-stream;base64, {ENCODED}\n", f"data:image/png;base64 ,{ENCODED}",
        "data:image/png;base64," + base64.encodebytes(base64.b64decode(ENCODED)).decode(),
        "data:image/png;base64," + "\r\n".join(ENCODED), "data:image/png;base64," + "\t ".join(ENCODED),
        "data:image/png;base64," + ENCODED.rstrip("="), f"data:image/png;base64,{ENCODED}==",
        "data:image/png;base64," + ENCODED.replace("+", "-").replace("/", "_"),
        "data:image/png;base64," + ENCODED.replace("+", "%2B").replace("=", "%3d").replace("/", "%2F"),
    ],
)  # fmt: skip
def test_spellings_of_base64(url: str) -> None:
    assert ENCODED.count("+") and ENCODED.count("/") and ENCODED.endswith("=")
    assert _decode_data_url(url, "", 769) == base64.b64decode(ENCODED)
    with pytest.raises(ApiError) as caught:
        _decode_data_url(url, "", 768)
    assert caught.value.status == 413


@pytest.mark.parametrize(
    ("url", "status"),
    [
        ("data:image/png;base64,AAAAA", 422), ("data:image/png;base64,AA=A", 422), ("data:image/png;base64,AA!A", 422),
        ("data:image/png;base64,ÄAAA", 422), ("data:image/png;base64,%C3%84", 422), ("data:image/png,abc", 400),
        ("data:image/png;base64", 400), ("data:", 400),
    ],
)  # fmt: skip
def test_what_is_no_base64(url: str, status: int) -> None:
    with pytest.raises(ApiError) as caught:
        _decode_data_url(url, "", 100)
    assert caught.value.status == status


@pytest.mark.parametrize("format", [*dict.fromkeys([*WEB_FORMATS, "AVIF", "MPO"])])
def test_formats_of_images(client: OpenAI, yi_vl: YiVL, format: str) -> None:
    if format == "AVIF" and "avif" not in features.get_supported_modules():
        pytest.skip("this Pillow reads no AVIF")
    file = io.BytesIO()
    Image.open(WIDE).convert("RGB").save(file, format)
    url = f"data:image/jpg;base64,{base64.b64encode(file.getvalue()).decode()}"
    message = chat_message("user", [{"type": "image_url", "image_url": url}])
    prompt = yi_vl.engine.prepare([chat_message("user", [{"type": "image", "image": file.getvalue()}])])
    assert len(prompt) > 0
    assert answer(client, messages=[message], max_tokens=3) == yi_vl.answer(
        [chat_message("user", [{"type": "image", "image": file.getvalue()}])], max_new_tokens=3
    )
