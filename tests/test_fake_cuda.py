"""The device that is not there, and the engine and its measurements on it; see fake_cuda.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_cuda import CUDA, FakeCuda, device_of, fake_cuda
from packaging.version import Version
from tiny import IMAGE_TOKEN_ID, OFFICIAL, tiny_model, tiny_processor, tiny_yi_vl

import yi_vl
from eval.gpu import parts as gpu_parts
from eval.gpu.guard import Settings as GpuSettings
from eval.models import ModelChoice, Settings, TransformersModel
from eval.speed import engine as speed_engine
from eval.speed import full_size, random_models
from eval.speed import quantize as speed_quantize
from eval.speed import runner as speed_runner
from eval.types import BenchmarkImage, Question
from yi_vl import YiVL
from yi_vl import hardware as machine
from yi_vl.image import YiVLImageProcessor
from yi_vl.quantize import Scheme

WIDE, TALL = OFFICIAL / "wide.png", OFFICIAL / "tall.png"
REQUESTS = [
    (WIDE, "What is this?"),
    (None, "Tell me a long story about a dog and a cat."),
    ([WIDE, TALL], "Compare."),
    ([], "Hi"),
    (TALL, "描述这张图片。"),
]
GREEDY: dict[str, Any] = {}
SAMPLED = {"temperature": 1.0, "seed": 3, "top_p": 0.9}


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    with fake_cuda(monkeypatch) as device:
        yield device


@pytest.fixture
def clock(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A measurement must wait for the device before it reads the time."""
    for module in (machine, speed_engine, speed_quantize, full_size, gpu_parts):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=cuda.clock))
    return cuda


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny_yi_vl(seed=2).save(path)  # random weights whose greedy answers have no near ties, alone or in a batch
    return path


def on_cuda() -> YiVL:
    return YiVL(tiny_model().to("cuda"), tiny_processor())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "work",
    [
        lambda on_gpu: on_gpu + torch.ones(3),
        lambda on_gpu: torch.cat([on_gpu, torch.ones(3)]),
        lambda on_gpu: on_gpu.index_select(0, torch.tensor([0])),
        lambda on_gpu: on_gpu.masked_fill(torch.tensor([True, False, True]), 0),
        lambda on_gpu: torch.nn.functional.linear(on_gpu, torch.ones(2, 3)),
        lambda on_gpu: torch.multinomial(on_gpu, 1, generator=torch.Generator()),
        lambda on_gpu: torch.rand(3, device="cuda", generator=torch.Generator()),
        lambda on_gpu: torch.rand(3, generator=torch.Generator("cuda")),
        lambda on_gpu: on_gpu.numpy(),
        lambda on_gpu: on_gpu.requires_grad_().sum().backward() or on_gpu.grad + torch.ones(3),
        lambda on_gpu: torch.autocast("cpu", torch.bfloat16),
        lambda on_gpu: on_gpu.to("cpu", non_blocking=True),
        lambda on_gpu: (
            torch.ops.aten._weight_int8pack_mm.default(on_gpu.view(1, 3), on_gpu, on_gpu)
            if torch.version.cuda is None
            else torch.ops.aten._weight_int4pack_mm_for_cpu(on_gpu.view(1, 3), on_gpu, 32, on_gpu)
        ),
    ],
)
def test_it_refuses_what_cuda_refuses(cuda: FakeCuda, work: Callable[[torch.Tensor], Any]) -> None:
    on_gpu = torch.ones(3, device="cuda")
    with pytest.raises((RuntimeError, TypeError, AssertionError)):
        work(on_gpu)


def test_it_allows_what_cuda_allows_with_the_values_of_a_cpu(cuda: FakeCuda) -> None:
    on_gpu = torch.arange(3.0, device="cuda")
    made = [
        on_gpu * torch.tensor(2.0),  # a number
        on_gpu[torch.tensor([0, 1])],  # indices may be the CPU's
        on_gpu.new_zeros(3).copy_(torch.ones(3)),
        torch.rand(3, device="cuda", generator=torch.Generator("cuda").manual_seed(0)),
        torch.tensor([1, 2]).to("cuda", non_blocking=True),
        torch.nn.Linear(3, 3).to("cuda").weight.data,
        torch.empty_like(torch.empty(3, device="meta"), device="cuda"),
    ]
    assert {device_of(tensor) for tensor in made} == {CUDA} and {tensor.device.type for tensor in made} == {"cuda"}
    assert on_gpu.cpu().numpy().tolist() == on_gpu.tolist() == [0, 1, 2]
    assert torch.zeros(3).device.type == "cpu" == torch.ones(3, device="cuda").to("cpu").device.type
    on_gpu + 1
    with pytest.raises(AssertionError, match="the clock is read"):
        cuda.clock()
    torch.cuda.synchronize()
    cuda.clock()


def test_pixels_are_normalized_where_the_images_are(cuda: FakeCuda) -> None:
    processor = YiVLImageProcessor(28)
    images = torch.randint(0, 256, (2, 28, 28, 3), dtype=torch.uint8)
    pixels = processor.to_pixel_values(images.to("cuda"))
    assert pixels.device.type == "cuda" and torch.equal(pixels.cpu(), processor.to_pixel_values(images))


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_batches_streams_and_chats_say_what_they_say_on_a_cpu(cuda: FakeCuda, options: dict[str, Any]) -> None:
    """Rows leave and join a batch, the second turn finds the first one's prefix, images come again."""

    def answers(model: YiVL) -> list[Any]:
        chat = model.chat()
        return [
            model.predict_batch(REQUESTS, batch_size=2, max_new_tokens=12, stop=("cat", "li", "three"), **options),
            list(model.stream(TALL, "What?", max_new_tokens=6, **options)),
            [chat.ask("What?", [WIDE], max_new_tokens=4, **options), chat.ask("And?", max_new_tokens=4, **options)],
        ]

    expected = answers(tiny_yi_vl())
    before = cuda.num_operations
    model = on_cuda()
    assert answers(model) == expected and cuda.num_operations - before > 1000
    assert model.engine.prefixes.num_bytes > 0


@pytest.mark.parametrize(("is_official", "device"), [(False, None), (True, "cuda:0"), (True, torch.device("cuda"))])
def test_a_checkpoint_is_loaded_to_the_gpu(cuda: FakeCuda, folder: Path, is_official: bool, device: Any) -> None:
    path = OFFICIAL / "checkpoint" if is_official else folder
    model = yi_vl.load(path, device=device, dtype=torch.float32)
    everything = [*model.model.parameters(), *model.model.buffers()]
    assert {device_of(tensor) for tensor in everything} == {CUDA}
    expected = yi_vl.load(path, device="cpu").predict(WIDE, "What?", max_new_tokens=4)
    assert model.predict(WIDE, "What?", max_new_tokens=4) == expected


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.14"), reason="earlier ones look through this device into torchao's tensors"
)
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_quantized_load_is_torchaos(cuda: FakeCuda, folder: Path, scheme: Scheme) -> None:
    pytest.importorskip("torchao")
    model = yi_vl.load(folder, quantize=scheme)
    layers = model.model.model.language_model.layers.modules()
    kinds = {type(layer.weight).__name__ for layer in layers if isinstance(layer, torch.nn.Linear)}
    assert kinds == {"Int8Tensor" if scheme == "int8" else "Int4TilePackedTo4dTensor"}
    assert isinstance(model.predict(WIDE, "What?", max_new_tokens=3), str)


def test_what_was_quantized_for_cpus_stays_there(cuda: FakeCuda, folder: Path, tmp_path: Path) -> None:
    yi_vl.load(folder, device="cpu", quantize="int8").save(tmp_path / "int8")
    with pytest.raises(ValueError, match="was quantised for CPUs, and cuda is none"):
        yi_vl.load(tmp_path / "int8")


def test_the_position_grid_is_resized_and_the_model_runs_as_transformers_calls_it(cuda: FakeCuda) -> None:
    model = tiny_model().to("cuda")  # type: ignore[arg-type]
    model.model.vision_tower.resize_grid_(28)
    ids = torch.tensor([[5, *[IMAGE_TOKEN_ID] * 4, 7]], device="cuda")
    pixels = torch.zeros(1, 3, 28, 28, device="cuda")
    loss = model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids), labels=ids).loss
    loss.backward()
    grid = model.model.vision_tower.visual.positional_embedding
    assert device_of(grid) == CUDA and grid.grad is not None and bool(grid.grad.abs().sum() > 0)
    tokens = model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=3, do_sample=True)
    assert tokens.device.type == "cuda"


@pytest.mark.usefixtures("two_rounds")
def test_the_engines_speed_is_measured_when_the_gpu_is_done(clock: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_engine, "read_bandwidth", lambda _: 1e9)  # of half a gigabyte, else
    model = on_cuda()
    measurements = [
        speed_engine.compare_chat(model, WIDE, 2, 3),
        speed_engine.compare_decode(model, 20, 4),
        speed_engine.compare_batch(model, 2, 20, 4),
        speed_engine.compare_prefill(model, 40),
    ]
    assert all(measured["variants"] for measured in measurements)
    assert machine.matrix_rate(8, 8, 8, torch.bfloat16, "cuda") > 0
    assert machine.copy_bandwidth("cuda", 1 << 10) > 0


def test_loading_is_measured_when_the_gpu_is_done(clock: FakeCuda, folder: Path) -> None:
    sent: list[dict[str, Any]] = []
    results = SimpleNamespace(send=sent.append)
    speed_quantize.measure_load(folder, None, results)
    clock.synchronize()  # each is a process of its own
    full_size._measure(folder, WIDE, 2, None, results)
    peak_gb = torch.cuda.max_memory_allocated() / 1e9
    assert sent[0]["peak_gb"] == peak_gb and sent[1]["peak memory, answering"].startswith(f"{peak_gb:.2f} GB")


@pytest.mark.usefixtures("two_rounds")
def test_the_runner_is_compared_over_the_same_answers(clock: FakeCuda, folder: Path) -> None:
    images = (BenchmarkImage("wide", WIDE.read_bytes), BenchmarkImage("tall", TALL.read_bytes))
    questions = [Question(str(i), "s", "open", "", {}, (f"What? {i}",), images[:i]) for i in range(3)]
    choice = ModelChoice(str(folder))
    measurements = speed_runner.compare_runner(choice, questions, 2, 4)
    assert measurements["same_answers"] == "3 of 3"
    replies = TransformersModel(str(folder)).answer([question.content() for question in questions], Settings(3))
    assert not any(reply.error for reply in replies)


@pytest.mark.usefixtures("two_rounds")
@pytest.mark.parametrize("part", ["logits", "stream", "chat"])
def test_parts_of_the_gpu_command_run_on_a_gpu(
    clock: FakeCuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, part: str
) -> None:
    monkeypatch.setattr(random_models, "_one_billion", lambda: tiny_model().config)
    settings = GpuSettings("cuda", "nano", tmp_path, tmp_path, {gpu_parts.COPY_BANDWIDTH: 1000.0})
    model = random_models.make("1b", torch.float32)
    assert {device_of(parameter) for parameter in model.model.parameters()} == {CUDA}
    clock.synchronize()  # an engine on the CPU, as a part compares with, does not wait for what the GPU still does
    measured = list(getattr(gpu_parts, part)(settings, {"model": model}))
    assert measured and all(measurement.limit is None or measurement.limit > 0 for measurement in measured)
