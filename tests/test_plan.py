"""What the plan counts without weights against what is measured with them: bytes that torch allocates, its FLOPs."""

from __future__ import annotations

import copy
import inspect
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import RunApp
from tiny import tiny_config, tiny_processor
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from train.config import InitConfig, LoraConfig, TrainableConfig, TrainConfig
from train.config_file import load_config
from train.lora import add_adapters_
from train.loss import Objective
from train.optim import build_optimizer, cast_frozen_, checkpoint_activations_, set_trainable_
from train.plan.__main__ import USABLE, Hardware, Plan, _released, app, describe, make_plan, memory_table, verdict
from train.plan.batch import SampleTokens
from train.plan.count import SavedBytes, count_flops, count_saved_bytes
from train.plan.curves import draw_curves
from train.plan.estimate import count_parameters, logit_bytes, step_memory, strategies
from train.plan.flops import Row, batch_flops, step_flops
from train.qlora import read_int4
from yi_vl.config import OpenClipVisionConfig, YiVLConfig, preset
from yi_vl.model import YiVLForConditionalGeneration

ROOT = Path(__file__).parents[1]
STAGES = ("align-224", "upscale-448", "chat-448")
IMAGE_TOKEN_ID, NUM_ROWS = 300, 2
ROW = Row(tokens=61, supervised=20)
TEXT_ROW = Row(tokens=61, supervised=60, has_image=False)
LANGUAGE_STAGE, ONE_SOURCE = ROOT / "train/configs/nano/language.yaml", "data.sources=[{name: books, shards: x}]"
Run = Callable[..., tuple[int, str, str]]

MODEL = YiVLConfig(  # no two dimensions alike
    vision_config=OpenClipVisionConfig(
        image_size=70, patch_size=14, hidden_size=48, intermediate_size=200, num_hidden_layers=5, num_attention_heads=4
    ),
    text_config=LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=168, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    ),
    image_token_id=IMAGE_TOKEN_ID,
)  # fmt: skip
NOTHING_SAVED = SavedBytes(0, 0, 0, 0)
ALL, TOWER_AND_PROJECTOR = TrainableConfig(), TrainableConfig(language=False)
LANGUAGE = TrainableConfig(False, False)
PROJECTOR = TrainableConfig(vision=False, language=False)
COMBINATIONS = [TrainableConfig(*trains) for trains in product([True, False], repeat=3) if any(trains)]
PARTS = [  # of the language model: within layers, across them, with a table, and below all that is frozen
    TrainableConfig(False, False, ["1"]),
    TrainableConfig(False, False, ["1-", "lm_head.*"]),
    TrainableConfig(False, False, ["*.layers.1.self_attn.k_proj.*", "*.layers.2.mlp.gate_proj.*"]),
    TrainableConfig(False, False, ["*.layers.1.post_attention_layernorm.*", "model.norm.*"]),
    TrainableConfig(False, False, ["*.layers.0.self_attn.o_proj.*", "model.embed_tokens.*"]),
    TrainableConfig(False, False, ["lm_head.*"]),
    TrainableConfig(False, True, ["*.v_proj.*", "*.down_proj.*"]),
    TrainableConfig(True, False, ["2"]),
]


def objective(trains: TrainableConfig, dtype: torch.dtype = torch.float32, is_checkpointed: bool = False) -> Objective:
    model = YiVLForConditionalGeneration(MODEL).to(torch.bfloat16).float()  # as released weights are
    set_trainable_(model, TrainConfig(trainable=trains, activation_checkpointing=is_checkpointed))
    if is_checkpointed:
        checkpoint_activations_(model)
    return Objective(model.to(dtype), num_sources=1)


def batch(row: Row = ROW) -> tuple[Any, ...]:
    ids = torch.ones(NUM_ROWS, row.tokens, dtype=torch.long)
    if row.has_image:
        ids[:, : MODEL.vision_config.num_patches] = IMAGE_TOKEN_ID
    labels = torch.full_like(ids, -100)
    labels[:, -row.supervised :] = 5
    pixels = torch.randn(NUM_ROWS, 3, 70, 70) if row.has_image else None
    return ids, torch.ones_like(ids), labels, pixels, torch.zeros(NUM_ROWS, dtype=torch.long)


def allocations(function: Callable[[], Any]) -> tuple[int, int, Any]:
    """Bytes that a call leaves allocated, the most it holds at once, and its result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return now, most, result


@pytest.mark.parametrize("trains", [*COMBINATIONS, *PARTS], ids=str)
def test_weights_gradients_and_moments_are_exact(trains: TrainableConfig) -> None:
    step = objective(trains)
    optimizer = build_optimizer(step.model, TrainConfig(trainable=trains))
    step(*batch())[0].backward()
    optimizer.step()
    parameters = list(step.parameters())
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    counted = count_parameters(MODEL, TrainConfig(trainable=trains, precision="fp32"))
    ddp = step_memory(counted, strategies("fp32")[0], 1, NOTHING_SAVED, logits=0, is_checkpointed=False)
    assert ddp.weights == sum(parameter.nbytes for parameter in parameters)
    assert ddp.gradients == 2 * sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None)
    assert ddp.optimizer == sum(moment.nbytes for moment in moments)


def test_ddp_holds_gradients_twice(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 300))
        num_bytes = sum(parameter.nbytes for parameter in model.parameters())
        # without the first broadcast, whose buffer a thread of gloo's frees at some time
        buckets, _, wrapped = allocations(lambda: DistributedDataParallel(model, init_sync=False))
        gradients, _, _ = allocations(lambda: wrapped(torch.ones(1, 300)).sum().backward())
    finally:
        dist.destroy_process_group()
    assert buckets == pytest.approx(num_bytes, rel=0.01) and gradients == pytest.approx(num_bytes, rel=0.01)


@pytest.mark.parametrize("trains", [*COMBINATIONS, *PARTS], ids=str)
def test_frozen_matrices_take_two_bytes(trains: TrainableConfig) -> None:
    step = objective(trains)
    cast_frozen_(step.model, "bf16")
    counted = count_parameters(MODEL, TrainConfig(trainable=trains, precision="bf16"))
    for strategy in strategies("bf16")[:2]:
        memory = step_memory(counted, strategy, 1, NOTHING_SAVED, logits=0, is_checkpointed=True)
        gathered = counted.outside_units + 2 * counted.largest_unit if strategy.is_sharded else 0
        assert memory.weights - 2 * gathered == sum(parameter.nbytes for parameter in step.parameters())


def log_probability_bytes(model: YiVLConfig, row: Row = ROW) -> int:
    return NUM_ROWS * logit_bytes(model, row) // 3


@pytest.mark.parametrize(
    ("trains", "row"),
    [
        *((trains, ROW) for trains in (ALL, TOWER_AND_PROJECTOR, TrainableConfig(vision=False), *PARTS)),
        *((trains, TEXT_ROW) for trains in (ALL, LANGUAGE, PARTS[0])),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_low", [False, True])
def test_activations_are_what_a_forward_pass_leaves(trains: TrainableConfig, row: Row, is_low: bool) -> None:
    """Within 1%: fp32 weights under autocast, whose copies are kept as well, and bf16 weights, as FSDP gathers them."""
    step, inputs = objective(trains, torch.bfloat16 if is_low else torch.float32), batch(row)
    cast_frozen_(step.model, "bf16")

    def forward() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return step(*inputs)

    forward()  # makes what is made once
    left, _, _ = allocations(forward)
    saved = count_saved_bytes(MODEL, TrainConfig(trainable=trains), row, NUM_ROWS, is_low, "cpu")
    kept = saved.activations + saved.weight_copies + log_probability_bytes(MODEL, row)
    assert left == pytest.approx(kept, rel=0.01)
    with torch.autocast("cpu", torch.bfloat16):
        at_the_end, _, _ = allocations(lambda: step(*inputs))
    assert at_the_end == pytest.approx(kept + saved.forward_copies, rel=0.01)


@pytest.mark.parametrize("trains", [ALL, TOWER_AND_PROJECTOR, TrainableConfig(vision=False), *PARTS], ids=str)
def test_checkpointing_leaves_the_layers_inputs(trains: TrainableConfig) -> None:
    """Within 8%, at a size where what is small beside a layer counts."""
    step, inputs = objective(trains, torch.bfloat16, is_checkpointed=True), batch()
    with_gradient: list[bool] = []
    for layer in step.model.model.language_model.layers:
        layer.register_forward_hook(lambda _module, _inputs, output: with_gradient.append(output.requires_grad))
    step(*inputs)
    num_checkpointed = sum(with_gradient) + 4 * trains.vision
    left, _, _ = allocations(lambda: step(*inputs))
    config = TrainConfig(trainable=trains, activation_checkpointing=True)
    saved = count_saved_bytes(MODEL, config, ROW, NUM_ROWS, True, "cpu")
    random_states = num_checkpointed * torch.get_rng_state().nbytes  # of the host
    assert left == pytest.approx(saved.activations + log_probability_bytes(MODEL) + random_states, rel=0.08)


def test_a_tower_of_timm_is_counted() -> None:
    """Within 1% of what its forward pass leaves; its blocks are not open_clip's own."""
    config = copy.deepcopy(MODEL)
    config.vision_config = OpenClipVisionConfig.from_open_clip("EVA02-B-16", image_size=80)
    model = YiVLForConditionalGeneration(config)
    train_config = TrainConfig(trainable=TOWER_AND_PROJECTOR)
    set_trainable_(model, train_config)
    pixels = torch.randn(NUM_ROWS, 3, 80, 80)

    def forward() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model.model.vision_tower(pixels)

    forward()
    left, _, _ = allocations(forward)
    saved = count_saved_bytes(config, train_config, ROW, NUM_ROWS, False, "cpu")
    text = count_saved_bytes(config, replace(train_config, trainable=PROJECTOR), ROW, NUM_ROWS, False, "cpu")
    saved_by_tower = saved.activations + saved.weight_copies - text.activations - text.weight_copies
    assert left == pytest.approx(saved_by_tower, rel=0.01)


LORA_MODEL = YiVLConfig(  # wide enough for blocks of 64 x 256 weights
    vision_config=MODEL.vision_config,
    text_config=LlamaConfig(
        vocab_size=320, hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    ),
    image_token_id=IMAGE_TOKEN_ID,
)  # fmt: skip


@pytest.fixture(scope="module")
def lora_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora_base")
    YiVLForConditionalGeneration(LORA_MODEL).to(torch.bfloat16).float().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def adapted(folder: Path, dropout: float, base: str | None) -> tuple[Objective, TrainConfig]:
    config = TrainConfig(
        init_from=InitConfig(checkpoint=str(folder)),
        trainable=TrainableConfig(False, True, "lora"),
        lora=LoraConfig(8, 16, dropout, base),
    )
    if base is None:
        model = YiVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    else:
        model, _ = read_int4(folder, "bf16", torch.device("cpu"))
    add_adapters_(model, config)
    set_trainable_(model, config)
    cast_frozen_(model, "bf16")
    return Objective(model, num_sources=1), config


@pytest.mark.parametrize("base", [None, "int4"])
def test_weights_under_adapters_are_exact(lora_base: Path, base: str | None) -> None:
    step, config = adapted(lora_base, 0.0, base)
    held = 0
    for parameter in step.parameters():
        held += parameter.nbytes
        if (scales := getattr(parameter, "quant_state", None)) is not None:
            held += scales.absmax.nbytes + scales.state2.absmax.nbytes
    counted = count_parameters(LORA_MODEL, config)
    ddp = strategies("bf16", base is not None)[0]
    memory = step_memory(counted, ddp, 1, NOTHING_SAVED, logits=0, is_checkpointed=False)
    assert memory.weights - 2 * counted.largest_int4 == held
    assert counted.int4 == (6 * 256 * (2 * 256 + 2 * 128 + 3 * 704) if base else 0)


def test_an_int4_base_is_never_whole_in_memory(lora_base: Path) -> None:
    device = torch.device("cpu")
    read_int4(lora_base, "bf16", device)  # makes what is made once
    _, most, (model, _) = allocations(lambda: read_int4(lora_base, "bf16", device))
    mapped = (lora_base / "model.safetensors").stat().st_size
    layers = count_parameters(LORA_MODEL, adapted(lora_base, 0.0, "int4")[1]).int4
    kept = sum(p.nbytes for p in model.parameters() if p.dtype != torch.float32)  # which is mapped
    assert most - mapped - kept < layers, "half of what they take in bf16"


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("base", [None, "int4"])
def test_adapters_keep_what_is_said(
    lora_base: Path, base: str | None, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 1%, but for dropout's mask: on a CPU it has the type of what is dropped."""
    of_device = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: of_device(*device) if device else True)  # PEFT's
    step, config = adapted(lora_base, dropout, base)
    inputs = batch()

    def forward() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return step(*inputs)

    forward()
    left, _, _ = allocations(forward)
    saved = count_saved_bytes(LORA_MODEL, config, ROW, NUM_ROWS, False, "cpu")
    kept = saved.activations + saved.weight_copies + log_probability_bytes(LORA_MODEL)
    assert left == pytest.approx(kept, rel=0.01)


def test_the_logits_peak_when_the_backward_pass_begins() -> None:
    num_tokens, vocabulary = 40, 5000
    head = nn.Linear(16, vocabulary, bias=False, dtype=torch.bfloat16)
    hidden = torch.randn(num_tokens, 16, dtype=torch.bfloat16, requires_grad=True)
    target = torch.zeros(num_tokens, dtype=torch.long)
    forward = lambda: F.cross_entropy(head(hidden).float(), target, reduction="none").sum()  # noqa: E731
    left, _, loss = allocations(forward)
    _, most, _ = allocations(loss.backward)
    model = tiny_config()
    model.text_config.vocab_size = vocabulary
    assert left + most == pytest.approx(logit_bytes(model, Row(num_tokens, num_tokens)), rel=0.01)


@pytest.mark.skipif(
    " @ " in inspect.getsource(LlamaRotaryEmbedding.forward), reason="multiplies rotary angles as matrices"
)
@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("trains", [*COMBINATIONS, *PARTS], ids=str)
def test_operations_are_exact(trains: TrainableConfig, is_checkpointed: bool) -> None:
    if is_checkpointed and not trains.vision and trains not in PARTS:
        pytest.skip("a frozen tower is not checkpointed")
    step = objective(trains, is_checkpointed=is_checkpointed)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step(*batch())[0].backward()
    expected = counter.get_total_flops()
    config = TrainConfig(trainable=trains, activation_checkpointing=is_checkpointed)
    assert NUM_ROWS * count_flops(MODEL, config, ROW) == expected
    if not is_checkpointed:
        mask = torch.arange(ROW.tokens + 9).expand(NUM_ROWS, -1)  # rows are padded
        assert batch_flops(MODEL, trains, mask < ROW.tokens, mask < ROW.supervised, NUM_ROWS) == expected
        assert NUM_ROWS * step_flops(MODEL, trains, ROW) == expected


@pytest.mark.skipif(
    " @ " in inspect.getsource(LlamaRotaryEmbedding.forward), reason="multiplies rotary angles as matrices"
)
@pytest.mark.parametrize("trains", [ALL, LANGUAGE, TrainableConfig(False, True), PARTS[1]], ids=str)
def test_operations_of_texts_are_exact(trains: TrainableConfig) -> None:
    """A blank image is encoded for a micro-batch of texts if the tower or the projector is trained."""
    step = objective(trains)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step(*batch(TEXT_ROW))[0].backward()
    assert count_flops(MODEL, TrainConfig(trainable=trains), TEXT_ROW, NUM_ROWS) == counter.get_total_flops()
    if not (trains.vision or trains.projector):
        assert NUM_ROWS * step_flops(MODEL, trains, TEXT_ROW) == counter.get_total_flops()


def test_counts_are_those_of_the_release() -> None:
    counted = count_parameters(preset("6b"), TrainConfig(trainable=TOWER_AND_PROJECTOR))
    assert [round(count / 1e6, 2) for count in counted.total.values()] == [631.75, 22.04, 6061.56]  # 64 rows added
    assert counted.trained["language"] == 0 and counted.trained["projector"] == counted.total["projector"]
    assert counted.total["vision"] - counted.trained["vision"] == 19_677_440 + 2 * 1280  # the last block and norm


@pytest.fixture
def run(run_app: RunApp, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `python -m train.plan` in this process: (exit code, stdout, stderr)."""
    monkeypatch.chdir(ROOT)
    return partial(run_app, "train.plan", app)


def rows(output: str, first: str) -> list[list[str]]:
    """The words of every line that begins with one."""
    return [line.split()[1:] for line in output.splitlines() if line.split()[:1] == [first]]


@pytest.fixture(scope="module")
def chat_6b() -> Plan:
    return make_plan(ROOT / "train/configs/6b/chat-448.yaml", [])


@pytest.mark.slow
def test_the_stages_of_a_release_are_summed_beside_the_published_hours(run: Run) -> None:
    code, output, _ = run(*(f"train/configs/34b/{stage}.yaml" for stage in STAGES))
    assert code == 0
    assert "24,414 steps of 4,096 samples, 32 at once on a GPU; 288 tokens a sample, 256 of them" in output
    hours = [int(row[4].replace(",", "")) for stage in STAGES for row in rows(output, stage)]
    ((*_, together, checkpointed, low, _, high),) = rows(output, "together")
    assert len(hours) == 3 and abs(sum(hours) - int(together.replace(",", ""))) <= 1
    assert float(high) == pytest.approx(int(checkpointed.replace(",", "")) / 128 / 24, abs=0.05)
    assert float(low) == pytest.approx(sum(hours) / 128 / 24, abs=0.05)
    assert output.count("activation_checkpointing: true, so the rows `checkpointed` hold") == 3
    assert rows(output, "published,")[0][-2:] == ["30,720", "10.0"]
    assert [row[-1] for row in rows(output, "DDP")] == ["no"] * 3, "34 B parameters in fp32 are 140 GB"
    assert len(rows(output, "FSDP")) == len(rows(output, "ZeRO-3")) == 3 and len(rows(output, "checkpointed")) == 9


def test_models_on_yi_1_5_are_known_and_not_published() -> None:
    for size, num_layers in (("6b-1.5", 32), ("9b-1.5", 48), ("34b-1.5", 60)):
        plans = [make_plan(ROOT / f"train/configs/{size}/{stage}.yaml", []) for stage in STAGES]
        assert [made.model.text_config.num_hidden_layers for made in plans] == [num_layers] * 3
        assert plans[0].parameters.trained["language"] == 0 < plans[2].parameters.trained["language"]
        assert _released(plans) is None
    assert _released([make_plan(ROOT / f"train/configs/6b/{stage}.yaml", []) for stage in STAGES]) == "6b"


@pytest.mark.slow
def test_an_int4_base_brings_a_release_to_a_small_gpu(run: Run) -> None:
    code, output, _ = run("train/configs/6b/chat-448-qlora.yaml", "--gpus", 1, "--gpu-memory", 24)
    assert code == 0 and [row[-1] for row in rows(output, "checkpointed")] == ["yes"]
    assert "5,536.5 M frozen weights in 4.127 bits each" in output and not rows(output, "FSDP")


@pytest.mark.slow
def test_settings_matter(run: Run) -> None:
    nano = ("train/configs/nano/align-224.yaml", "--model", "nano", "--gpus", 1)
    code, small, _ = run(*nano, "--gpu-memory", 80)
    assert code == 0 and {row[-1] for name in ("DDP", "checkpointed") for row in rows(small, name)} == {"yes"}
    assert "published" not in small
    _, large, _ = run(*nano, "micro_batch=16", "--utilisation", 0.2, "--caption-tokens", 64)
    assert "16 at once on a GPU; 80 tokens a sample" in large and "32 at once on a GPU; 48 tokens" in small


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_rows_fit_as_long_as_is_said(chat_6b: Plan, is_checkpointed: bool) -> None:
    strategy = strategies("bf16")[1]

    def total(tokens: int) -> float:
        hardware = Hardware(128, 80e9, 312, 0.4)
        return chat_6b.memory(hardware, strategy, Row(tokens, tokens - 1024), is_checkpointed).total

    def output(total_bytes: float) -> str:
        return verdict(chat_6b, Hardware(128, total_bytes / USABLE, 312, 0.4), strategy, is_checkpointed)

    assert (output(total(1279)), output(total(2048))) == ("no", "yes")
    assert output(total(1500)) in ("to 1,499", "to 1,500")


def test_what_is_no_training_config_beside_one_does_not_matter(tmp_path: Path) -> None:
    for stage in ("upscale-448", "chat-448"):
        shutil.copy(ROOT / f"train/configs/6b/{stage}.yaml", tmp_path)
    (tmp_path / "a-search.yaml").write_text("search_dir: runs/search\n")
    with pytest.raises(ValueError, match="runs/6b/align-224/final is not there yet"):
        make_plan(tmp_path / "chat-448.yaml", [])


def test_hours_follow_from_operations(chat_6b: Plan) -> None:
    """About 6 operations per parameter and token, where everything learns."""
    tokens = 7812 * 256 * 1280
    assert chat_6b.flops(is_checkpointed=False) == pytest.approx(6 * 6.7e9 * tokens, rel=0.1)
    hardware = Hardware(num_gpus=128, memory_bytes=80e9, tflops=100, utilisation=0.5)
    assert hardware.gpu_hours(50e12 * 3600 * 7) == pytest.approx(7)


def test_a_ramp_changes_the_hours_and_not_the_memory() -> None:
    def planned(*overrides: str) -> Plan:
        return make_plan(ROOT / "train/configs/nano/align-224.yaml", overrides, "nano")

    hardware = Hardware(num_gpus=2, memory_bytes=80e9, tflops=100, utilisation=0.5)
    sources = "data.sources=[{name: a, shards: x, weight: [1, 0]}, {name: b, shards: y, weight: [0, 1], format: chat}]"
    plain = planned("micro_batch=8")
    ramped = planned("micro_batch=8", "batch_ramp=[[200, 64], [500, 16]]", "schedule={shape: wsd, warmup: 60}")
    assert plain.num_samples == 600 * 32 and ramped.num_samples == 200 * 32 + 300 * 64 + 100 * 16
    assert ramped.flops(False) / plain.flops(False) == ramped.num_samples / plain.num_samples
    strategy = strategies("bf16")[0]
    assert ramped.memory(hardware, strategy, ROW, False) == plain.memory(hardware, strategy, ROW, False)
    assert planned("micro_batch=64", "batch_ramp=[[200, 64]]").rows_per_gpu(hardware) == 32, "of the largest step"
    lines = [line.strip() for line in describe(ramped, hardware)]
    batches = "600 steps: 200 of 32 samples, 300 of 64, 100 of 16, 8 at once on a GPU; "
    assert any(line.startswith(batches) for line in lines)
    assert "learning rate: 60 steps of warm-up, constant, linear to 0 in the last 60 steps" in lines
    assert planned(sources).rows[0][1].supervised == (32 + 256) / 2  # on average over the run
    # 10 of 11 samples are of the second half, of which three quarters are chats
    ramp = "batch_ramp=[[300, 320]]"
    assert planned(sources, ramp).rows[0][1].supervised == round(32 + 224 * (10 * 0.75 + 0.25) / 11)


TEXT_SOURCE = "data.sources=[{name: a, shards: x, format: caption}, {name: b, shards: y, format: text, weight: 3}]"


def test_a_stage_of_texts_has_no_image_tokens(run: Run) -> None:
    code, output, _ = run(
        LANGUAGE_STAGE, "data.format=text", ONE_SOURCE, "--model", "nano", "--gpus", 1, "--text-tokens", 90
    )
    assert code == 0 and "90 tokens a text" in output and "of them its image" not in output
    assert "90 tokens in a text" in output and {row[-1] for row in rows(output, "DDP")} == {"yes"}


@pytest.mark.parametrize(
    ("long_text", "num_tokens", "expected"), [("pack", 7, 512), ("split", 1300, 434), ("split", 80, 80)]
)
def test_documents_become_rows_as_the_trainer_makes_them(long_text: str, num_tokens: int, expected: int) -> None:
    overrides = ["data.format=text", ONE_SOURCE, f"data.long_text={long_text}", "max_tokens=512"]
    made = make_plan(LANGUAGE_STAGE, overrides, "nano", SampleTokens(text=num_tokens))
    assert made.rows == [(1.0, Row(expected, expected - 1, has_image=False))]
    assert made.num_tokens == made.num_samples * expected


def test_a_mixture_of_images_and_texts_is_both() -> None:
    def planned(*overrides: str) -> Plan:
        return make_plan(ROOT / "train/configs/nano/align-224.yaml", ["micro_batch=8", *overrides], "nano")

    both = planned(TEXT_SOURCE, "data.long_text=pack", "max_tokens=300")
    images, texts = planned(), planned("data.format=text", "data.long_text=pack", "max_tokens=300")
    (quarter, image_row), (rest, text_row) = both.rows
    assert (quarter, rest) == (0.25, 0.75) and not text_row.has_image
    assert [image_row] == [row for _, row in images.rows] and [text_row] == [row for _, row in texts.rows]
    assert both.flops(False) == pytest.approx(0.25 * images.flops(False) + 0.75 * texts.flops(False))
    assert both.num_tokens == 0.25 * images.num_tokens + 0.75 * texts.num_tokens
    hardware = Hardware(num_gpus=2, memory_bytes=80e9, tflops=100, utilisation=0.5)
    assert any("; 300 tokens a text (75% of the samples)" in line for line in describe(both, hardware))
    ddp = strategies("bf16")[0]
    totals = [both.memory(hardware, ddp, row, False).total for _, row in both.rows]
    usable = Hardware(2, (min(totals) + max(totals)) / 2 / USABLE, 100, 0.5)
    assert verdict(both, usable, ddp, False) == "no", "as one kind of rows does not fit"
    cells = list(memory_table(both, hardware).columns[-2].cells)
    assert cells[0] == f"{max(totals) / 1e9:,.1f}"


def test_curves_are_drawn(tmp_path: Path) -> None:
    config = load_config(ROOT / "train/configs/nano/align-224.yaml", ["data.sources.0.weight=[1, 2]"])
    draw_curves({"one": config, "two": config}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000
    for name in ("curves.xyz", "no/curves.png"):
        with pytest.raises(ValueError, match=f"{name}: the curves cannot be written"):
            draw_curves({"one": config}, tmp_path / name)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("none.yaml",), "none.yaml: there is no such config file"),
        (("gpus=3",), "name at least one config file"),
        (("train/configs/nano/signs.yaml", "init_from.checkpoint=no/such", "--gpus", "1"), "no/such is not there yet"),
        (("train/configs/6b/chat-448.yaml", "--gpus", "100"), "global_batch 256 does not divide by 100 GPUs"),
        (("train/configs/6b/chat-448.yaml", "batch_ramp=[[9, 200]]"), "448.yaml: batch_ramp: 200 does not divide by"),
        (
            ("train/configs/nano/language.yaml", "--model", "nano", "max_tokens=64", "data.format=text", ONE_SOURCE),
            "yaml: texts of 512 tokens exceed max_tokens 64 and would be skipped; set data.long_text to split or pack",
        ),
        (("train/configs/6b/chat-448.yaml", "--model", "7b"), "7b"),
        (("train/configs/6b/chat-448.yaml", "max_tokens=1100"), "exceed max_tokens 1100"),
        (("train/configs/6b/align-224.yaml", "init_from.tower.name=ViT-none"), "no model named 'ViT-none'"),
    ],
)
def test_mistakes_are_one_line(run: Run, arguments: tuple[str, ...], reason: str) -> None:
    code, _, heard = run(*arguments)
    assert code == 2 and heard.startswith("error: ") and heard.count("\n") == 1 and reason in heard
