"""What the plan counts without weights against what is measured with them: bytes that torch allocates, its FLOPs."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
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
from train.lora import add_adapters_
from train.loss import Objective
from train.optim import build_optimizer, cast_frozen_, checkpoint_activations_, set_trainable_
from train.plan.count import SavedBytes, count_flops, count_saved_bytes
from train.plan.estimate import count_parameters, logit_bytes, step_memory, strategies
from train.plan.flops import Row, batch_flops, step_flops
from train.qlora import read_int4
from yi_vl.config import OpenClipVisionConfig, YiVLConfig, preset
from yi_vl.model import YiVLForConditionalGeneration

ROOT = Path(__file__).parents[1]
IMAGE_TOKEN_ID, NUM_ROWS = 300, 2
ROW = Row(tokens=61, supervised=20)
TEXT_ROW = Row(tokens=61, supervised=60, has_image=False)

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
