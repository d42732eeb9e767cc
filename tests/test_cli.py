"""The command line: streamed answers, a chat loop, sizes; what a user can cause is one line and exit code 2."""

from __future__ import annotations

import copy
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import OFFICIAL, tiny_yi_vl
from transformers.utils import logging

from yi_vl import cli
from yi_vl.config import OpenClipVisionConfig
from yi_vl.model import YiVLForConditionalGeneration
from yi_vl.predict import YiVL, load

WIDE, TALL = str(OFFICIAL / "wide.png"), str(OFFICIAL / "tall.png")
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def yi_vl() -> YiVL:
    return tiny_yi_vl()


@pytest.fixture(scope="module")
def folder(yi_vl: YiVL, tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("model")
    yi_vl.model.save_pretrained(directory)
    yi_vl.processor.save_pretrained(directory)
    return str(directory)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs `yi-vl` in this process: (exit code, stdout, stderr), those of C libraries and of logging included."""

    def call(*arguments: str, typed: Iterator[str] | None = None) -> tuple[int, str, str]:
        def read(_: str) -> str:
            line = next(typed or iter(()), EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        logging.set_verbosity_warning()  # as in a fresh process
        monkeypatch.setattr(sys, "argv", ["yi-vl", *arguments])
        monkeypatch.setattr("builtins.input", read)
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capfd.readouterr()
        return caught.value.code or 0, out, err  # type: ignore[return-value]

    return call


def test_ask_prints_the_answer_and_nothing_else(run: Run, folder: str, yi_vl: YiVL) -> None:
    code, out, err = run("ask", WIDE, TALL, "Compare.", "--model", folder, "--max-new-tokens", "12")
    assert (code, err) == (0, "")
    assert out == yi_vl.predict([WIDE, TALL], "Compare.", max_new_tokens=12) + "\n"


def test_ask_takes_options_and_no_image(run: Run, folder: str, yi_vl: YiVL) -> None:
    options = [
        "--temperature",
        "1.0",
        "--top-p",
        "0.9",
        "--seed",
        "5",
        "--system",
        "Be brief.",
        "--max-new-tokens",
        "9",
    ]
    _, out, _ = run("ask", "Hi", "-m", folder, *options)
    expected = yi_vl.predict(None, "Hi", system="Be brief.", temperature=1.0, top_p=0.9, seed=5, max_new_tokens=9)
    assert out == expected + "\n"


@pytest.mark.core
@pytest.mark.slow
def test_ask_is_quiet_as_a_program(folder: str) -> None:
    """As a user starts it: transformers' own warnings and progress bars would come from the fresh process."""
    command = [sys.executable, "-m", "yi_vl", "ask", WIDE, "What?", "-m", folder, "--max-new-tokens", "3"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(cli.__file__).parents[1])
    assert (ended.returncode, ended.stderr) == (0, "") and ended.stdout.strip()


@pytest.mark.core
@pytest.mark.slow
@pytest.mark.parametrize("tower", [None, "eva02_tiny_patch14_224"])
@pytest.mark.parametrize("options", [[], ["--quantize", "int8"]])
def test_what_a_start_does_not_import_is_there_when_it_is_needed(
    yi_vl: YiVL, tmp_path: Path, tower: str | None, options: list[str]
) -> None:
    """A fresh process answers as this one: also with a tower of timm, which needs torchvision."""
    if tower is not None:
        config = copy.deepcopy(yi_vl.model.config)
        vision = {"timm_model": tower, "hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3}
        config.vision_config = OpenClipVisionConfig(image_size=56, patch_size=14, intermediate_size=512, **vision)
        yi_vl = YiVL(YiVLForConditionalGeneration(config), yi_vl.processor)
    yi_vl.save(tmp_path / "model")
    arguments = ["ask", WIDE, "What?", "-m", str(tmp_path / "model"), "--max-new-tokens", "3", *options]
    script = (
        "import runpy, sys\n"
        f"sys.argv[1:] = {arguments!r}\n"
        "try:\n    runpy.run_module('yi_vl', run_name='__main__', alter_sys=True)\n"
        "finally:\n    import timm, torchvision, scipy.optimize"
    )
    command = [sys.executable, "-c", script]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(cli.__file__).parents[1])
    assert (ended.returncode, ended.stderr) == (0, "")
    expected = load(tmp_path / "model", quantize="int8" if options else None)
    assert ended.stdout == expected.predict(WIDE, "What?", max_new_tokens=3) + "\n"


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda tmp: ["missing.png", "What?"], "missing.png: there is no such file"),
        (lambda tmp: [write(tmp / "text.png", b"text"), "What?"], "text.png is not an image"),
        (lambda tmp: [write(tmp / "empty.png", b""), "What?"], "empty.png is empty (0 bytes)"),
        (lambda tmp: [write(tmp / "cut.png", Path(TALL).read_bytes()[:2000]), "What?"], "cut.png is damaged"),
        (lambda tmp: [WIDE, ""], "The question is empty"),
        (lambda tmp: [WIDE], "the last argument is the question"),
        (lambda tmp: [WIDE] * 40 + ["What?"], "for 40 images"),
        (lambda tmp: ["a dog " * 600], "Give fewer images or a shorter text"),
        (lambda tmp: ["Hi", "--temperature", "-1"], "temperature is -1"),
        (lambda tmp: ["Hi", "--top-p", "7"], "top_p is 7"),
        (lambda tmp: ["Hi", "--max-new-tokens", "0"], "max_new_tokens is 0"),
    ],
)
def test_bad_requests_are_one_line(
    run: Run, folder: str, tmp_path: Path, make: Callable[[Path], list[str]], problem: str
) -> None:
    code, out, err = run("ask", "--model", folder, *make(tmp_path))
    assert (code, out) == (2, "")
    assert err.startswith("yi-vl: ") and problem in err and err.count("\n") == 1


@pytest.mark.parametrize("command", [["ask", "Hi", "-m"], ["chat", "-m"], ["info"]])
@pytest.mark.parametrize("model", ["/no/such/model", str(OFFICIAL)])
def test_bad_models_are_one_line(run: Run, command: list[str], model: str) -> None:
    code, out, err = run(*command, model)
    assert (code, out) == (2, "")
    assert err.startswith("yi-vl: ") and model in err and err.count("\n") == 1


def test_a_damaged_model_is_one_line(run: Run, folder: str, tmp_path: Path) -> None:
    for path in Path(folder).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] += 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, out, err = run("ask", "Hi", "--model", str(tmp_path))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "9 tensors missing" in err and "layers.2.mlp.up_proj.weight" in err


def test_info_lists_tensors(run: Run) -> None:
    code, out, _ = run("info", "34b", "--tensors")
    lines = out.splitlines()
    assert code == 0 and len(lines) == 942  # the official layout has 1070: it keeps queries, keys and values apart
    assert any(line.split() == ["lm_head.weight", "64064", "x", "7168"] for line in lines)


def test_a_release_is_converted_and_its_towers_are_compared(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = str(OFFICIAL / "checkpoint"), tmp_path / "ours"
    code, out, _ = run("convert", source, "--verify")
    assert code == 0 and "differ by 0 at most" in out
    code, out, err = run("convert", source, str(target), "--to", "llava-hf")
    assert code == 0 and out == f"{target} is written.\n" and "Traceback" not in err
    question = ("What is this?", "--max-new-tokens", "6", "-m")
    assert run("ask", WIDE, *question, source)[:2] == run("ask", WIDE, *question, str(target))[:2]
    code, out, err = run("convert", source, str(target))
    assert (code, out, err.count("\n")) == (2, "", 1) and "exists already" in err
    code, out, err = run("convert", source)
    assert (code, out, err.count("\n")) == (2, "", 1) and "say where to write to" in err
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, out, err = run("convert", "no/such", str(tmp_path / "other"))
    assert (code, out, err.count("\n")) == (2, "", 1) and "not a local folder" in err


def test_wrong_usage_exits_with_2(run: Run) -> None:
    assert run("ask")[0] == run("ask", "Hi", "--temprature", "1")[0] == run("nonsense")[0] == 2


def test_info_on_presets_and_folders(run: Run, folder: str, tmp_path: Path) -> None:
    _, out, err = run("info", "6b")
    assert err == ""
    for fact in ("1024 per image", "631,749,120", "22,044,672", "6,061,035,520", "818", "13,431", "4,096 tokens"):
        assert fact in out, fact
    assert "64 per image" in run("info", "nano")[1]
    (tmp_path / "config.json").write_bytes((Path(folder) / "config.json").read_bytes())
    assert "16 per image" in run("info", str(tmp_path))[1]


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        (None, "yi-vl (### Human: ...)"),
        ({"processor_class": "YiVLProcessor"}, "yi-vl (### Human: ...)"),
        ({"chat_format": "chatml"}, "chatml (<|im_start|>user ... <|im_end|>)"),
    ],
)
def test_info_shows_the_chat_format(run: Run, folder: str, tmp_path: Path, content: Any, shown: str) -> None:
    (tmp_path / "config.json").write_bytes((Path(folder) / "config.json").read_bytes())
    if content is not None:
        (tmp_path / "processor_config.json").write_text(json.dumps(content))
    code, out, _ = run("info", str(tmp_path))
    assert code == 0 and shown in out


@pytest.mark.parametrize("content", ['{"chat_format": "vicuna"}', '{"chat_format": ["chatml"]}', "[1]", "{"])
def test_info_refuses_a_chat_format_that_there_is_not(run: Run, folder: str, tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_bytes((Path(folder) / "config.json").read_bytes())
    (tmp_path / "processor_config.json").write_text(content)
    code, _, err = run("info", str(tmp_path))
    assert code == 2 and err.count("\n") == 1 and "processor_config.json" in err


def test_help_names_every_command(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0 and all(command in out for command in ("ask", "chat", "info", "expand"))


ROOT = Path(cli.__file__).parents[1]
PROGRAM = [sys.executable, "-m", "yi_vl"]


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="pipes with names")
def test_an_image_may_come_through_a_pipe(run: Run, folder: str, yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of `cat TALL | yi-vl ask <(cat WIDE) - "What?"`."""
    read_end, write_end = os.pipe()
    with open(read_end, "rb"), open(write_end, "wb") as pipe:
        pipe.write(Path(WIDE).read_bytes())  # less than a pipe holds
        pipe.close()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path(TALL).read_bytes())))
        code, out, err = run("ask", f"/dev/fd/{read_end}", "-", "What?", "-m", folder, "--max-new-tokens", "4")
    assert (code, err, out) == (0, "", yi_vl.predict([WIDE, TALL], "What?", max_new_tokens=4) + "\n")


def test_standard_input_holds_one_image(run: Run, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = run("ask", "-", "-", "What?", "-m", folder)
    assert code == 2 and "give it once" in err
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    code, _, err = run("ask", "-", "What?", "-m", folder)
    assert code == 2 and "nothing is piped in" in err


def test_device_and_dtype_reach_every_command(run: Run, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import yi_vl.predict
    import yi_vl.server.launch

    asked_questions: list[tuple[Any, Any]] = []
    load = yi_vl.predict.load

    def watch(model: str, device: Any, dtype: Any, **options: Any) -> YiVL:
        asked_questions.append((device, dtype))
        return load(model, device=device, dtype=dtype, **options)

    monkeypatch.setattr(yi_vl.predict, "load", watch)
    monkeypatch.setattr(yi_vl.server.launch, "run", lambda load, *_, **__: load())
    options = ["--device", "cpu", "--dtype", "bfloat16"]
    assert run("ask", "Hi", "-m", folder, "--max-new-tokens", "1", *options)[0] == 0
    assert run("chat", "-m", folder, *options)[0] == 0
    assert run("serve", folder, *options)[0] == 0
    assert asked_questions == [("cpu", "bfloat16")] * 3
    code, out, err = run("ask", "Hi", "-m", folder, "--device", "cuda:99")
    assert (code, out, err.count("\n")) == (2, "", 1) and "loaded on 'cuda:99'" in err
    assert run("ask", "Hi", "-m", folder, "--dtype", "int8")[0] == 2


def test_the_version_is_printed(run: Run) -> None:
    code, out, err = run("--version")
    assert (code, err) == (0, "") and out.startswith("yi-vl") and out.count("\n") == 1


def test_a_terminal_that_is_not_utf_8_loses_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    monkeypatch.setattr(
        cli, "load_quickly", lambda *_: SimpleNamespace(stream=lambda *_, **__: iter(["一个", " dog \U0001f436"]))
    )
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(buffer, encoding="ascii"))
    assert run("ask", "Hi")[0] == 0
    assert buffer.getvalue() == b"\\u4e00\\u4e2a dog \\U0001f436\n"


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (BrokenPipeError(32, "Broken pipe"), 1)])
def test_leaving_early_is_quiet(run: Run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int) -> None:
    def stream(*_: Any, **__: Any) -> Iterator[str]:
        yield "a"
        raise error

    monkeypatch.setattr(cli, "load_quickly", lambda *_: SimpleNamespace(stream=stream))
    ended, _, err = run("ask", "Hi")
    assert (ended, err) == (code, "")


@pytest.mark.core
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
def test_output_that_cannot_be_written_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run([*PROGRAM, "--version"], stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1) and "No space left" in ended.stderr


def test_conversion_expands_the_home_folder(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run("convert", str(OFFICIAL / "checkpoint"), "~/converted")[0] == 0
    assert (tmp_path / "converted/config.json").is_file()
    assert run("info", "~/converted")[0] == 0
    code, _, err = run("convert", str(OFFICIAL / "checkpoint"), "~no-such-user/converted")
    assert code == 2 and "no such user" in err
