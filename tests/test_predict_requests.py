"""Requests to the Python API in every type: taken as their value, or refused with a ValueError of one line."""

from __future__ import annotations

import base64
import io
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import OFFICIAL, tiny_yi_vl

import yi_vl as package
from yi_vl.engine.request_queue import BatchError, Generation
from yi_vl.engine.sampling import Sampling
from yi_vl.image import load_image
from yi_vl.predict import YiVL

pytestmark = pytest.mark.core

WIDE, TALL = OFFICIAL / "wide.png", OFFICIAL / "tall.png"
USER = {"role": "user", "content": "Hi"}
HALF = "a \ud83d b"
DATA_URL = "data:image/png;base64," + base64.b64encode(WIDE.read_bytes()).decode()


@pytest.fixture(scope="module")
def yi_vl() -> YiVL:
    return tiny_yi_vl()


def refuse(problem: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    with pytest.raises(ValueError) as caught:
        function(*arguments, **options)
    message = str(caught.value)
    assert problem in message, message
    assert "\n" not in message and len(message) < 600 and message.isprintable(), repr(message)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"seed": np.int64(3), "temperature": np.float32(0.5), "top_p": np.float64(0.5)}, (512, 0.5, 0.5, 3, ())),
        ({"max_new_tokens": torch.tensor(7), "temperature": np.array(1), "top_p": 1}, (7, 1.0, 1.0, None, ())),
        (dict.fromkeys(("max_new_tokens", "temperature", "top_p", "seed", "stop")), (512, 0.0, 1.0, None, ())),
        ({"max_new_tokens": 10**30, "stop": iter(["a", "b"])}, (10**30, 0.0, 1.0, None, ("a", "b"))),
        ({"stop": np.array(["a", "b"])}, (512, 0.0, 1.0, None, ("a", "b"))),
        ({"stop": "ab"}, (512, 0.0, 1.0, None, ("ab",))),
    ],
)
def test_options_are_taken_as_their_value(given: dict[str, Any], expected: tuple[Any, ...]) -> None:
    sampling = Sampling(**given)
    assert tuple(vars(sampling).values()) == expected
    assert [type(value) for value in vars(sampling).values()] == [type(value) for value in expected]
    assert sampling.stop == sampling.stop == expected[-1]


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("max_new_tokens", [True, "5", 5.0, np.float64(5), [5], -(10**5000), 0, np.True_, torch.ones(2)]),
        ("temperature", [True, "1", float("nan"), float("inf"), 10**400, 1j, [1.0], -1, np.float32("nan")]),
        ("top_p", [False, "1", 0, 1.5, float("nan"), np.float64("-inf"), {}]),
        ("seed", [True, 1.5, "1", -1, 2**63, np.uint64(2**63), b"1"]),
        ("stop", [3, b"###", {"a": 1}, [""], ["a", 3], ["a", None], HALF, [HALF], np.array(3), iter(["x", ""])]),
    ],
)
def test_options_of_other_types_and_ranges_are_named(yi_vl: YiVL, option: str, values: list[Any]) -> None:
    for value in values:
        refuse(option, yi_vl.predict, None, "Hi", **{option: value})
    with pytest.raises(ValueError, match="more than 1000"):
        Sampling(stop=iter(lambda: "endless", None))


def test_a_temperature_beyond_float32_is_a_very_high_or_low_one(yi_vl: YiVL) -> None:
    def answer(temperature: float) -> str:
        return yi_vl.predict(None, "Hi", temperature=temperature, seed=1, max_new_tokens=4)

    assert answer(1e-300) == answer(0)
    assert answer(1e300) == answer(1e20)


@pytest.mark.parametrize(
    ("arguments", "options", "problem"),
    [
        ((None, HALF), {}, "question holds half a surrogate pair, '\\ud83d', at character 2"),
        ((None, None), {}, "question is None"),
        ((None, b"Hi"), {}, "question is b'Hi'"),
        ((None, {"text": "Hi"}), {}, "question is {'text': 'Hi'}"),
        ((None, ["Hi"]), {}, "question is ['Hi']"),
        ((None, "Hi"), {"system": 3}, "system is 3"),
        ((None, "Hi"), {"system": HALF}, "system holds half"),
        ((None, "Hi"), {"history": "Hello"}, "history is 'Hello'"),
        ((None, "Hi"), {"history": USER}, "expected a list of messages"),
        ((None, "Hi"), {"history": ["Hello"]}, "history[0] is 'Hello'"),
        ((None, "Hi"), {"history": [USER, None]}, "history[1] is None"),
        ((None, "Hi"), {"history": [USER, ("assistant", "Hello")]}, "history[1] is ('assistant', 'Hello')"),
        ((None, "Hi"), {"history": [{"role": ["user"], "content": "Hi"}]}, "history[0] has the role ['user']"),
        ((None, "Hi"), {"history": [{"content": "Hi"}]}, "history[0] has the role None"),
        ((None, "Hi"), {"history": [{"role": "user", "content": HALF}]}, "history[0] holds half"),
        ((None, "Hi"), {"history": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]}, "part 0"),
        ((None, "Hi"), {"history": [{"role": "user", "content": [{"type": np.ones(2)}]}]}, "of type text or image"),
        ((None, "Hi"), {"history": [{"role": "user", "content": ["Hi"]}]}, "of type text or image"),
        (({"path": str(WIDE)}, "Hi"), {}, "images is a dict"),
        (({str(WIDE)}, "Hi"), {}, "images is a set"),
        (([[WIDE]], "Hi"), {}, "given as list is no image"),
        ((3, "Hi"), {}, "given as int is no image"),
        (([None], "Hi"), {}, "given as NoneType is no image"),
        (("", "Hi"), {}, "empty path"),
        (("a\0b.png", "Hi"), {}, "NUL"),
        (("a" * 300, "Hi"), {}, "File name too long"),
        (("a/" * 5000, "Hi"), {}, "File name too long"),
        ((HALF, "Hi"), {}, "half a surrogate pair"),
        (("~no-such-user/x.png", "Hi"), {}, "no such user"),
        (("new\nline.png", "Hi"), {}, "new\\nline.png: there is no such file"),
        (("/dev/zero", "Hi"), {}, "a device"),
        (("https://example.com/x.png", "Hi"), {}, "is a URL"),
        (("data:image/png;base64,****", "Hi"), {}, "the data: URL of 26 characters is not base64"),
        (("data:image/png;base64", "Hi"), {}, "has no comma"),
        (("data:,", "Hi"), {}, "is empty"),
        ((io.StringIO("text"), "Hi"), {}, "gives text"),
        ((io.BytesIO(b""), "Hi"), {}, "is empty"),
    ],
)
def test_requests_of_other_types_are_refused_everywhere(
    yi_vl: YiVL, arguments: tuple[Any, Any], options: dict[str, Any], problem: str
) -> None:
    refuse(problem, yi_vl.predict, *arguments, **options)
    refuse(problem, yi_vl.stream, *arguments, **options)
    if "history" not in options:
        refuse(problem, yi_vl.predict_batch, [arguments], **options)
        refuse(problem, lambda: yi_vl.chat(**options).ask(arguments[1], arguments[0]))
    else:
        refuse(problem.replace("history", "messages"), yi_vl.answer, options["history"])
        refuse(problem.replace("history", "messages"), yi_vl.answer_batch, [options["history"]])
        refuse(problem.replace("history", "messages"), yi_vl.processor.encode_messages, options["history"])


def test_histories_and_images_may_be_iterators(yi_vl: YiVL) -> None:
    history = [USER, {"role": "assistant", "content": "Hello."}]
    expected = yi_vl.predict([WIDE, TALL], "Hi", history=history, max_new_tokens=6)
    assert yi_vl.predict(iter([WIDE, TALL]), "Hi", history=iter(history), max_new_tokens=6) == expected
    assert yi_vl.predict((WIDE, TALL), "Hi", history=tuple(history), system=None, max_new_tokens=6) == expected
    assert yi_vl.predict(None, "Hi", history=None, max_new_tokens=6) == yi_vl.predict([], "Hi", max_new_tokens=6)


def test_a_message_without_content_is_refused(yi_vl: YiVL) -> None:
    refuse("found NoneType", yi_vl.answer, [{"role": "user"}])
    refuse("found NoneType", yi_vl.predict, None, "Hi", history=[USER, {"role": "assistant", "content": None}])


def test_a_question_may_hold_whole_surrogate_pairs(yi_vl: YiVL) -> None:
    assert yi_vl.predict(None, "a \N{DOG FACE} b", max_new_tokens=2) is not None


def in_a_pipe(tmp_path: Path) -> str:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    threading.Thread(target=lambda: path.write_bytes(WIDE.read_bytes()), daemon=True).start()
    return str(path)


def behind_a_prefix(_: Path) -> io.BytesIO:
    file = io.BytesIO(b"prefix" + WIDE.read_bytes())
    file.seek(6)
    return file


@pytest.mark.parametrize(
    "make",
    [
        lambda _: WIDE.open("rb"),
        lambda _: WIDE.open("rb", buffering=0),
        behind_a_prefix,
        in_a_pipe,
        lambda _: memoryview(WIDE.read_bytes()),
        lambda _: DATA_URL,
        lambda _: " DATA:;charset=x;BASE64," + DATA_URL.partition(",")[2].rstrip("=").replace("/", "_")[:40] + "\n"
        + DATA_URL.partition(",")[2].rstrip("=")[40:].replace("+", "%2B"),
        lambda _: "data:image/png," + "".join(f"%{byte:02x}" for byte in WIDE.read_bytes()),
    ],
)  # fmt: skip
def test_files_pipes_and_data_urls_are_images(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    assert load_image(make(tmp_path)).tobytes() == load_image(WIDE).tobytes()


class Reader:
    """A file object that gives what it is told."""

    def __init__(self, chunk: Any) -> None:
        self.chunk = chunk

    def read(self, _: int) -> Any:
        if isinstance(self.chunk, Exception):
            raise self.chunk
        return self.chunk


@pytest.mark.parametrize(
    ("chunk", "problem"),
    [
        (bytes(1 << 20), "gives more than 268,435,456 bytes"),
        (3, "gives int when it is read"),
        (None, "gives NoneType"),
        (OSError("the line\nbroke"), "cannot be read: the line"),
        (ValueError("I/O operation on closed file."), "closed file"),
    ],
)
def test_file_objects_are_read_within_bounds(chunk: Any, problem: str) -> None:
    refuse(problem, load_image, Reader(chunk))


@pytest.mark.parametrize("shape", [(3, 4, 3), (3, 9, 3), (4, 9, 4), (1, 9, 3), (3, 9, 1), (3, 3, 3), (1, 1, 1)])
def test_a_tensor_of_ambiguous_layout_is_refused(shape: tuple[int, ...]) -> None:
    tensor = torch.zeros(shape, dtype=torch.uint8)
    refuse("(channels, height, width) or (height, width, channels)", load_image, tensor)
    if shape[-1] != 1:
        assert load_image(tensor.numpy()).size == (shape[1], shape[0])  # of an array channels come last
        assert load_image(tensor.permute(1, 2, 0).numpy()).size == (shape[2], shape[1])


def test_other_arrays_are_refused_in_one_line() -> None:
    refuse("channels come last", load_image, np.zeros((3, 9, 8), np.uint8))
    refuse("expected (H, W)", load_image, np.zeros((2, 9, 8, 3), np.uint8))
    refuse("cannot be decoded", load_image, torch.zeros(3, 9, 8, device="meta"))
    refuse("expected integers or floats", load_image, np.array([["a"]], object))


CUT = WIDE.read_bytes()[:-200]


def test_a_bad_request_costs_a_batch_nothing(yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch) -> None:
    good = [(WIDE, "What?"), (None, "Who?"), (TALL, "Where?")]
    expected = yi_vl.predict_batch(good, max_new_tokens=5)
    bad: list[Any] = ["Hi", (None,), (None, ""), ("missing.png", "What?"), (b"text", "What?"), ([WIDE] * 40, "What?")]
    calls: list[Any] = []
    for request in [*bad, (None, 3)]:
        with monkeypatch.context() as patch:
            patch.setattr(yi_vl.model, "forward", lambda **_: calls.append(1))
            refuse("requests[2]: ", yi_vl.predict_batch, iter([*good[:2], request, good[2]]))
    assert not calls
    requests = [good[0], *bad, good[1], (CUT, "What?"), good[2]]
    for batch_size in (None, 1, 2):
        results = yi_vl.predict_batch(requests, errors="return", batch_size=batch_size, max_new_tokens=5)
        assert [results[index] for index in (0, 7, 9)] == expected
        assert all(isinstance(results[index], ValueError) for index in (*range(1, 7), 8))
        assert "damaged" in str(results[8]) and "missing.png" in str(results[4])
    assert yi_vl.predict_batch(bad[:1], errors="return")[0].args == ("it is 'Hi'; expected (images, question).",)


def test_what_shows_when_it_is_decoded_keeps_the_answers_before(yi_vl: YiVL) -> None:
    good = [(WIDE, "What?"), (None, "Who?")]
    expected = yi_vl.predict_batch(good, max_new_tokens=5)
    with pytest.raises(BatchError, match=r"requests\[2\]: .*damaged.*2 answers are ready") as caught:
        yi_vl.predict_batch([*good, (CUT, "What?"), (None, "Hi")], batch_size=1, max_new_tokens=5)
    assert caught.value.answers == [*expected, None, None]


def test_a_batch_itself_is_checked(yi_vl: YiVL) -> None:
    for requests in ("Hi", None, {"a": 1}, 3, WIDE):
        refuse("requests is", yi_vl.predict_batch, requests)
        refuse("conversations is", yi_vl.answer_batch, requests)
    for batch_size in (0, True, 1.5, "2", -(10**30)):
        refuse("batch_size is", yi_vl.predict_batch, [], batch_size=batch_size)
    refuse("errors is 'ignore'; expected one of raise, return", yi_vl.predict_batch, [], errors="ignore")
    assert yi_vl.answer_batch(iter([[USER], iter([USER])]), batch_size=np.int64(2), max_new_tokens=3)[0]


def test_a_file_object_in_a_batch_is_read_once(yi_vl: YiVL) -> None:
    expected = yi_vl.predict_batch([(WIDE, "What?")] * 2, max_new_tokens=5)
    assert yi_vl.predict_batch([(WIDE.open("rb"), "What?"), (DATA_URL, "What?")], max_new_tokens=5) == expected


def test_save_expands_the_home_folder(yi_vl: YiVL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    yi_vl.save("~/deep/m")
    assert (tmp_path / "home/deep/m/config.json").is_file() and not (tmp_path / "~").exists()
    assert package.load("~/deep/m", device="cpu", dtype="float32").predict(None, "Hi", max_new_tokens=2)
    yi_vl.save("n" * 250)
    assert Path("n" * 250, "config.json").is_file()
    (tmp_path / "file").touch()
    for folder, problem in [
        ("~/deep/m", "exists already"),
        ("", "empty path"),
        (None, "expected a path"),
        (3, "expected a path"),
        ("a\0b", "NUL"),
        ("~no-such-user/m", "no such user"),
        ("n" * 300, "File name too long"),
        ("file/m", "cannot be written"),
        ("/proc/m", "cannot be written"),
    ]:
        refuse(problem, yi_vl.save, folder)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"path": ""}, "empty path"),
        ({"path": 3}, "the model is 3"),
        ({"path": b"model"}, "the model is b'model'"),
        ({"path": "a\0b"}, "NUL"),
        ({"path": "~no-such-user"}, "no such user"),
        ({"path": "x" * 300}, "File name too long"),
        ({"path": "/dev/null"}, "is a file"),
        ({"device": "gpu"}, "device is 'gpu'"),
        ({"device": "cuda:99"}, "cannot be loaded on 'cuda:99'"),
        ({"device": 3.5}, "device is 3.5"),
        ({"device": ""}, "device is ''"),
        ({"device": "meta"}, "device is meta"),
        ({"dtype": "bfloat17"}, "dtype is 'bfloat17'; expected a torch dtype"),
        ({"dtype": "load"}, "dtype is 'load'"),
        ({"dtype": torch.int8}, "dtype is torch.int8"),
        ({"dtype": 16}, "dtype is 16"),
        ({"quantize": "int5"}, "quantize is 'int5'"),
        ({"quantize": True}, "quantize is True"),
        ({"tower_from": "attic"}, "tower_from is 'attic'"),
        ({"tower_from": ["vit"]}, "tower_from is ['vit']"),
    ],
)
def test_load_refuses_what_it_does_not_know(arguments: dict[str, Any], problem: str) -> None:
    refuse(problem, package.load, **arguments)


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_dtypes_may_be_names(dtype: Any) -> None:
    model = package.load(device="cpu", dtype=dtype, tower_from=None, quantize=None).model
    assert model.dtype == torch.bfloat16


def test_an_image_that_is_closed_or_a_pillow_mode_apart_is_one_line() -> None:
    image = Image.open(WIDE)
    image.close()
    refuse("cannot be decoded", load_image, image)


def test_batches_have_finish_reasons(yi_vl: YiVL) -> None:
    conversations = [[{"role": "user", "content": question}] for question in ("Hi", "", "Who are you?")]
    texts = yi_vl.answer_batch(conversations, errors="return", max_new_tokens=4)
    cut = yi_vl.generate_batch(conversations, errors="return", max_new_tokens=4)
    assert [cut[0], cut[2]] == [Generation(texts[0], "length", 4), Generation(texts[2], "length", 4)]
    assert isinstance(cut[1], ValueError) and cut[1].args == texts[1].args
    ended = yi_vl.generate_batch(conversations[:1], stop=[texts[0][0]], max_new_tokens=4)
    assert ended == [Generation("", "stop", 1)]
