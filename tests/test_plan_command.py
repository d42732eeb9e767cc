"""`python -m train.plan`: what it prints and draws, and what it says of mistakes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from conftest import RunApp

from train.config_file import load_config
from train.plan.__main__ import USABLE, Hardware, Plan, _released, app, describe, make_plan, memory_table, verdict
from train.plan.batch import SampleTokens
from train.plan.curves import draw_curves
from train.plan.estimate import strategies
from train.plan.flops import Row

ROOT = Path(__file__).parents[1]
ROW = Row(tokens=61, supervised=20)
STAGES = ("align-224", "upscale-448", "chat-448")
STAGE, ONE_SOURCE = ROOT / "train/configs/nano/chat-448.yaml", "data.sources=[{name: books, shards: x}]"
Run = Callable[..., tuple[int, str, str]]


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
    code, output, _ = run(STAGE, "data.format=text", ONE_SOURCE, "--model", "nano", "--gpus", 1, "--text-tokens", 90)
    assert code == 0 and "90 tokens a text" in output and "of them its image" not in output
    assert "90 tokens in a text" in output and {row[-1] for row in rows(output, "DDP")} == {"yes"}


@pytest.mark.parametrize(
    ("long_text", "num_tokens", "expected"), [("pack", 7, 512), ("split", 1300, 434), ("split", 80, 80)]
)
def test_documents_become_rows_as_the_trainer_makes_them(long_text: str, num_tokens: int, expected: int) -> None:
    overrides = ["data.format=text", ONE_SOURCE, f"data.long_text={long_text}", "max_tokens=512"]
    made = make_plan(STAGE, overrides, "nano", SampleTokens(text=num_tokens))
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
        (("train/configs/nano/align-224.yaml", "init_from.checkpoint=no/such", "--gpus", "1"), "no/such is not there"),
        (("train/configs/6b/chat-448.yaml", "--gpus", "100"), "global_batch 256 does not divide by 100 GPUs"),
        (("train/configs/6b/chat-448.yaml", "batch_ramp=[[9, 200]]"), "448.yaml: batch_ramp: 200 does not divide by"),
        (
            ("train/configs/nano/chat-448.yaml", "--model", "nano", "max_tokens=64", "data.format=text", ONE_SOURCE),
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
