"""Images in requests: every spelling of base64, and every format that web browsers show."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
from typing import Any

import pytest
import torch
from openai import OpenAI
from PIL import Image, features
from serving import TALL, WIDE, address, answer, chat_message, client, yi_vl

from yi_vl.image import WEB_FORMATS, YiVLImageProcessor
from yi_vl.predict import YiVL
from yi_vl.server.images import ImageDecoder, _decode_data_url
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


class CountingProcessor(YiVLImageProcessor):
    """Counts the images that it prepares, once `may_go` is set."""

    def __init__(self) -> None:
        super().__init__(size_px=28)
        self.num_prepared, self.may_go = 0, threading.Event()

    def prepare(self, *arguments: Any, **options: Any) -> Image.Image:
        assert self.may_go.wait(60)
        self.num_prepared += 1
        return super().prepare(*arguments, **options)


def test_what_nobody_waits_for_any_more_is_not_decoded() -> None:
    processor = CountingProcessor()
    decoder = ImageDecoder(processor, num_threads=1, max_images=2)

    async def run() -> None:
        first = asyncio.create_task(decoder.decode(WIDE.read_bytes(), ""))
        leaving = [asyncio.create_task(decoder.decode(TALL.read_bytes(), "")) for _ in range(2)]
        await asyncio.sleep(0)
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        processor.may_go.set()
        await first
        await decoder.decode(b"%b " % WIDE.read_bytes(), "")  # after what waits before it
        assert processor.num_prepared == 2
        await decoder.decode(TALL.read_bytes(), "")
        assert processor.num_prepared == 3  # sent again, it is decoded

    asyncio.run(run())
    decoder.close()


def test_an_image_is_decoded_once_for_all_who_send_it() -> None:
    """Also when the first of them leaves; a broken one is refused each time, by its own name."""
    processor, content = CountingProcessor(), WIDE.read_bytes()
    decoder = ImageDecoder(processor, num_threads=2, max_images=2)

    async def refuse(param: str) -> str:
        with pytest.raises(ApiError) as caught:
            await decoder.decode(b"no image", param)
        assert caught.value.status == 422
        return str(caught.value)

    async def run() -> None:
        leaving, staying = (asyncio.create_task(decoder.decode(content, "")) for _ in range(2))
        await asyncio.sleep(0)
        leaving.cancel()
        processor.may_go.set()
        expected = YiVLImageProcessor(size_px=28).to_uint8(content)
        for (pixels,) in (await staying, await decoder.decode(content, "")):
            assert torch.equal(pixels, expected)
        assert processor.num_prepared == 1
        assert [error.partition(":")[0] for error in await asyncio.gather(refuse("a"), refuse("b"))] == ["a", "b"]
        assert await refuse("c") and processor.num_prepared == 3  # the two at once are one
        for path in (TALL, WIDE, TALL, WIDE):
            await decoder.decode(path.read_bytes(), "")
        assert processor.num_prepared == 5  # only the two latest are kept

    asyncio.run(run())
    decoder.close()
