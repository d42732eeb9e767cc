"""Kernels chosen by measurement: all give the same product, and a tuned layer is an `nn.Linear` to all who use it."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tiny import tiny_model, tiny_processor
from torch import Tensor, nn

import yi_vl
from yi_vl import autotune, linear
from yi_vl.autotune import fastest, least_seconds
from yi_vl.linear import (
    _MANY_ROWS,
    _PACKED,
    _PLAIN,
    Kernel,
    TunedLinear,
    kernels_of,
    measure_kernels,
    pack,
    tune_linears_,
    untune_linears_,
)
from yi_vl.model import YiVLForConditionalGeneration

KERNELS = [kernel for kernels in (_PLAIN, _PACKED) for by_rows in kernels.values() for kernel in by_rows]
BF16 = torch.bfloat16
Measure = Callable[[dict[str, Any]], dict[str, float]]


def measure_as(**fastest_names: float) -> Measure:
    """A measurement by which candidates whose name begins so take so many seconds, and others one."""

    def measure(candidates: dict[str, Any]) -> dict[str, float]:
        return {
            name: min([seconds for begin, seconds in fastest_names.items() if name.startswith(begin)] or [1.0])
            for name in candidates
        }

    return measure


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small matrices are tuned too, and packed weights are always the fastest."""
    monkeypatch.setattr(linear, "_MIN_ELEMENTS", 0)
    monkeypatch.setattr(linear, "_measured", {})
    measure = linear.measure_kernels
    monkeypatch.setattr(linear, "measure_kernels", lambda weights: measure(weights, measure_as(packed=0.5)))
    yield


def tuned_model(seed: int = 0) -> YiVLForConditionalGeneration:
    model = tiny_model(seed).to(BF16)
    tune_linears_(model)
    assert sum(type(module) is TunedLinear and module.is_packed for module in model.modules()) == 2 * 7 + 1
    return model


def logits(model: nn.Module, num_tokens: int = 1) -> Tensor:
    with torch.inference_mode():
        output: Tensor = model(input_ids=torch.arange(5, 5 + num_tokens)[None]).logits
    return output


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (200, 96), (33, 70)])
def test_every_kernel_gives_the_product(kernel: Kernel, shape: tuple[int, int], has_bias: bool) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(*shape, dtype=BF16), torch.randn(shape[0], dtype=BF16) if has_bias else None
    given = pack(weight) if kernel.operation == "packed" else weight
    for num_rows in (1,) if kernel.operation == "mv" else range(1, max(2, kernel.num_rows + 1)):
        if kernel.num_rows % num_rows and num_rows < kernel.num_rows:
            continue
        rows = torch.randn(num_rows, shape[1], dtype=BF16)
        exact = F.linear(rows.double(), weight.double(), None if bias is None else bias.double())
        with torch.inference_mode():
            y = kernel(rows, given, bias)
        assert y.shape == exact.shape and y.dtype == BF16
        torch.testing.assert_close(y.double(), exact, atol=0.05, rtol=0.01)


def test_the_fastest_is_chosen_by_the_least_of_interleaved_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that the candidates move: one is slow at times, one always, one has a slow first call."""
    now = 0.0
    called: list[tuple[str, int]] = []

    def candidate(name: str, durations: Callable[[int], float]) -> Callable[[int], None]:
        calls = 0

        def call(index: int) -> None:
            nonlocal now, calls
            now += durations(calls)
            calls += 1
            called.append((name, index))

        return call

    candidates = {
        "default": candidate("default", lambda _: 0.010),
        "interrupted": candidate("interrupted", lambda call: 0.008 if call % 3 == 0 else 0.030),
        "compiles": candidate("compiles", lambda call: 0.009 if call else 5.0),
    }
    seconds = least_seconds(candidates, clock=lambda: now)
    assert seconds == pytest.approx({"default": 0.010, "interrupted": 0.008, "compiles": 0.009})
    assert fastest(seconds) == "interrupted"
    timed = called[len(candidates) :]  # after the first calls
    assert [name for name, _ in timed] == list(candidates) * (len(timed) // 3)
    assert [index for _, index in timed] == list(range(len(timed)))


def test_a_gain_that_may_be_noise_changes_nothing() -> None:
    assert fastest({"default": 1.0, "other": 0.96}) == "default"
    assert fastest({"default": 1.0, "other": 0.94}) == "other"


def test_a_measurement_ends_on_a_machine_that_is_never_quiet() -> None:
    now, calls = 0.0, 0

    def clock() -> float:
        return now

    def never_the_same(index: int) -> None:
        nonlocal now, calls
        calls += 1
        now += 0.001 * 1.1 ** (-calls % 50) if calls < 10_000 else 1e9

    threads = torch.get_num_threads()
    least_seconds({"one": lambda index: never_the_same(index)}, clock)
    assert calls < 1000 and torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({}, {1: "linear, 1 row", 2: "linear, 2 rows"}),
        ({"mv": 0.5}, {1: "mv", 2: "linear, 2 rows"}),
        ({"mv": 0.5, "packed": 0.49}, {1: "mv", 2: "linear, 2 rows"}),
        ({"linear, 2 rows": 0.9, "linear, 4 rows": 0.5}, {1: "linear, 4 rows", 2: "linear, 4 rows"}),
        ({"packed": 0.9}, {1: "packed, 1 row", 2: "packed, 2 rows"}),
        ({"packed": 0.9, "packed, 4 rows": 0.5, "mv": 0.6}, {1: "packed, 4 rows", 2: "packed, 4 rows"}),
        ({"packed": 0.5, f"packed, {_MANY_ROWS} rows": 0.5, "linear, 32 rows": 0.4}, {1: "linear, 1 row"}),
    ],
)
def test_what_is_fastest_is_chosen(seconds: dict[str, float], expected: dict[int, str]) -> None:
    chosen = measure_kernels([torch.randn(64, 32, dtype=BF16)], measure_as(**seconds))
    assert {rows: str(chosen.by_rows[rows]) for rows in expected} == expected
    assert chosen.is_packed == expected[1].startswith("packed")
    assert chosen.is_default == (not seconds or len(expected) == 1)


def test_without_onednn_weights_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(weight: Tensor) -> Tensor:
        raise RuntimeError("fp16 path needs the cpu support avx512_fp16")

    monkeypatch.setattr(linear, "pack", missing)
    chosen = measure_kernels([torch.randn(64, 32, dtype=BF16)], measure_as(packed=0.1))
    assert chosen.is_default and not any(name.startswith("packed") for name in chosen.seconds[1])


def test_a_tuned_model_predicts_the_same(packs: None) -> None:
    plain, tuned = tiny_model().to(BF16), tuned_model()
    for num_tokens in (1, 2, 3, 9):
        torch.testing.assert_close(logits(tuned, num_tokens), logits(plain, num_tokens), atol=0.05, rtol=0.02)
    assert kernels_of(tuned)["32 x 64"].is_packed
    with torch.inference_mode():  # rows of a batch, not contiguous
        layer, like = tuned.lm_head, plain.lm_head
        hidden = torch.randn(2, 5, 32, dtype=BF16)[:, -1:]
        torch.testing.assert_close(layer(hidden), like(hidden), atol=0.05, rtol=0.02)
        assert layer(hidden[:0]).shape == like(hidden[:0]).shape


def test_kernels_are_measured_once_per_shape(packs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    measure = linear.measure_kernels
    monkeypatch.setattr(linear, "measure_kernels", lambda weights: (measured.append(len(weights)), measure(weights))[1])
    tuned_model()
    assert sorted(measured) == [1, 2, 4, 4, 4]  # head; down; q and o; k and v; gate and up
    tuned_model(seed=1)
    assert len(measured) == 5


def test_what_is_not_tuned(packs: None) -> None:
    def types(model: nn.Module) -> set[type]:
        return {type(module) for module in model.modules() if type(module) in (nn.Linear, TunedLinear)}

    exact = tiny_model()
    tune_linears_(exact)
    assert types(exact) == {nn.Linear}, "float32"
    tied = tiny_model().to(BF16)
    tied.config.tie_word_embeddings = True
    tune_linears_(tied)
    assert type(tied.lm_head) is nn.Linear
    tower = tuned_model().model.vision_tower
    assert TunedLinear not in types(tower)
    hooked = tiny_model().to(BF16)
    hooked.lm_head.register_forward_hook(lambda *_: None)
    tune_linears_(hooked)
    assert type(hooked.lm_head) is nn.Linear


def test_a_model_of_somebody_else_is_left_alone(packs: None) -> None:
    model = tiny_model().to(BF16)
    before = list(model.modules())
    yi_vl.YiVL(model, tiny_processor()).predict(None, "Hello!", max_new_tokens=2)
    assert all(now is then and type(now) is type(then) for now, then in zip(model.modules(), before, strict=True))
    assert not any(type(module) is TunedLinear for module in model.modules())


def test_load_tunes_what_it_makes_and_saves_it_whole(packs: None, tmp_path: Path) -> None:
    model = tiny_model().to(BF16)
    yi_vl.YiVL(model, tiny_processor()).save(tmp_path / "saved")
    loaded = yi_vl.load(tmp_path / "saved", device="cpu", dtype=BF16)
    assert type(loaded.model.lm_head) is TunedLinear and loaded.model.lm_head.is_packed
    loaded.save(tmp_path / "again")
    assert loaded.model.lm_head.is_packed  # as before
    again = yi_vl.load(tmp_path / "again", device="cpu", dtype=BF16)
    expected = model.state_dict()
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_copies_pickles_and_casts(packs: None) -> None:
    model = tuned_model()
    expected = logits(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.lm_head.is_packed and model.lm_head.is_packed
        assert torch.equal(logits(copied), expected)
    assert model.to("cpu").lm_head.is_packed
    assert torch.equal(logits(model), expected)
    exact = model.to(torch.float32)
    assert not exact.lm_head.is_packed and exact.lm_head.weight.dtype == torch.float32
    reference = tiny_model().to(BF16).float()
    torch.testing.assert_close(logits(exact), logits(reference))


def test_a_caller_that_takes_weights_gets_them(packs: None) -> None:
    model, plain = tuned_model(), tiny_model().to(BF16)
    parameter = dict(model.named_parameters())["lm_head.weight"]
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight) and model.lm_head.weight is parameter
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert not logits(model).any()
    model.load_state_dict(plain.state_dict())
    torch.testing.assert_close(logits(model), logits(plain), atol=0.05, rtol=0.02)
    model.state_dict()["lm_head.weight"].zero_()
    assert not logits(model).any(), "a state dict shows the weights themselves"
    tune_linears_(model)
    assert model.lm_head.is_packed and not logits(model).any()
    untune_linears_(model)
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is parameter and not logits(model).any()


@pytest.mark.parametrize("calls_train", [False, True])
def test_a_tuned_model_can_be_trained(packs: None, calls_train: bool) -> None:
    """Also by an optimizer that was made before."""
    model = tuned_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if calls_train:
        model.train()
    ids = torch.tensor([[5, 6, 7, 8]])
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


def test_adapters_are_trained_merged_and_seen(packs: None) -> None:
    model = tuned_model()
    torch.manual_seed(0)
    adapted: Any = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    ids = torch.tensor([[5, 6, 7]])
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for n, p in adapted.named_parameters() if p.requires_grad and "language_model" in n)
    expected = logits(adapted)
    assert not torch.equal(expected, logits(tuned_model()))
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=0.2, rtol=0.1)


@pytest.mark.slow
def test_a_tuned_layer_can_be_compiled(packs: None) -> None:
    layer = tuned_model().lm_head
    x = torch.randn(1, 32, dtype=BF16)
    with torch.no_grad():
        expected = layer(x)
        torch.testing.assert_close(torch.compile(layer)(x), expected, atol=0.05, rtol=0.02)
    assert layer.is_packed


def test_an_edit_is_seen_by_the_caches(packs: None) -> None:
    answers = []
    engine = yi_vl.YiVL(tuned_model(), tiny_processor())
    for _ in range(2):
        answers.append(engine.predict(None, "Hello!", max_new_tokens=8))
        with torch.no_grad():
            for layer in engine.model.model.language_model.layers:
                layer.mlp.up_proj.weight.neg_()
    fresh = yi_vl.YiVL(copy.deepcopy(engine.model), tiny_processor())
    with torch.no_grad():
        for layer in fresh.model.model.language_model.layers:
            layer.mlp.up_proj.weight.neg_()
    assert answers[1] == fresh.predict(None, "Hello!", max_new_tokens=8) != answers[0]


FORCED: dict[str, dict[str, str]] = {
    "oneDNN without bf16 instructions": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "oneDNN with AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "torch with AVX2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "both with AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "torch without vectors": {"ATEN_CPU_CAPABILITY": "default"},
}
PROGRAM = """
import torch
from torch import nn
from yi_vl.linear import measure_kernels, TunedLinear
torch.manual_seed(0)
like = nn.Linear(512, 256, bias=False, dtype=torch.bfloat16)
kernels = measure_kernels([like.weight.detach()])
layer = TunedLinear(like, kernels)
for num_rows in (1, 2, 3, 40):
    x = torch.randn(num_rows, 512, dtype=torch.bfloat16)
    exact = x.double() @ like.weight.detach().double().T
    layer.pack_()
    with torch.inference_mode():
        torch.testing.assert_close(layer(x).double(), exact, atol=0.05, rtol=0.01)
seconds = kernels.seconds[1]
assert seconds[str(kernels.by_rows[1])] < max(seconds.values()) or len(set(seconds.values())) == 1
"""


@pytest.mark.slow
@pytest.mark.parametrize("forced", FORCED)
def test_other_processors_as_far_as_they_can_be_forced(forced: str) -> None:
    """The chosen kernel is not the slowest, and gives the product."""
    environment = os.environ | FORCED[forced] | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_threads_are_as_before_after_an_error() -> None:
    before = torch.get_num_threads()

    def fails(index: int) -> None:
        raise RuntimeError("no kernel")

    with pytest.raises(RuntimeError, match="no kernel"):
        autotune.least_seconds({"fails": fails})
    assert torch.get_num_threads() == before
