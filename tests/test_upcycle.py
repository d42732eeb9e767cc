"""`yi-vl upcycle`: experts of the same function, and windows and sharing switched on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_cli import Run, run  # noqa: F401  # a fixture
from test_expand import make_source  # noqa: F401  # a fixture
from upcycled import EXPERTS, RELEASE, WIDE, dense, hybrid, logits, windows  # noqa: F401  # fixtures

import yi_vl
from yi_vl.checkpoint import convert, open_checkpoint
from yi_vl.decoder.config import FULL, SLIDING, YiHybridConfig
from yi_vl.decoder.experts import Router
from yi_vl.upcycle import Changes, upcycle

pytestmark = pytest.mark.core

NANO = Path(yi_vl.__file__).parent / "nano"
LAYER = "model.language_model.layers.{}."
ATTENTION = ("--every", "2", "--window", "8")


@pytest.mark.parametrize("layout", ["official", "llava-hf", "yi-vl", "stem"])
def test_experts_compute_what_the_feed_forward_layers_did(
    layout: str, make_source: Callable[[str], Path], tmp_path: Path, run: Run  # noqa: F811
) -> None:  # fmt: skip
    source, target = make_source(layout), tmp_path / "out"
    code, out, err = run("upcycle", str(source), str(target), *EXPERTS)
    assert code == 0 and "Traceback" not in err
    assert "12 experts of width" in out and "4 per token (top-k)" in out and "computes what it did before" in out
    for with_image in (True, False):
        torch.testing.assert_close(logits(target, with_image), logits(source, with_image), rtol=0, atol=1e-4)
    question = ("ask", WIDE, "What is this?", "--max-new-tokens", "6", "-m")
    assert run(*question, str(target))[:2] == run(*question, str(source))[:2]


def test_experts_are_slices_of_copies(dense: Path, tmp_path: Path) -> None:  # noqa: F811
    convert(upcycle(open_checkpoint(dense), Changes(experts=3, slices=4)), tmp_path / "out", "yi-vl")
    torch.testing.assert_close(logits(tmp_path / "out"), logits(dense), rtol=0, atol=1e-4)
    old, new = (
        {name: tensor[...] for name, tensor in open_checkpoint(path).tensors.items()}
        for path in (dense, tmp_path / "out")
    )
    routers = []
    for number in range(6):
        gate, up, down = (old[LAYER.format(number) + f"mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
        prefix = LAYER.format(number) + "mlp."
        for expert in range(12):
            first = expert % 4 * 16
            columns = slice(first, first + 16)
            assert torch.equal(new[prefix + "experts.gate_up_proj"][expert], torch.cat([gate[columns], up[columns]]))
            assert torch.equal(new[prefix + "experts.down_proj"][expert], 4 * down[:, columns])
        rows = new[prefix + "gate.weight"].unflatten(0, (3, 4))
        assert torch.equal(rows, rows[:, :1].expand_as(rows))
        routers.append(rows[:, 0])
    distinct = torch.cat(routers)
    assert len(distinct.unique(dim=0)) == 18 and 0.01 < distinct.std() < 0.03
    assert {name for name in old if ".mlp." not in name} == {name for name in new if ".mlp." not in name}


def test_the_seed_draws_the_routers(dense: Path) -> None:  # noqa: F811
    def router(seed: int) -> torch.Tensor:
        upcycled = upcycle(open_checkpoint(dense), Changes(experts=2, seed=seed))
        return upcycled.tensors[LAYER.format(3) + "mlp.gate.weight"][...]

    assert torch.equal(router(7), router(7)) and not torch.equal(router(7), router(8))


def test_nano_keeps_its_function(tmp_path: Path, run: Run) -> None:  # noqa: F811
    target = tmp_path / "out"
    assert run("upcycle", str(NANO), str(target), "--experts", "4", "--slices", "4")[0] == 0
    for with_image in (True, False):
        torch.testing.assert_close(logits(target, with_image), logits(NANO, with_image), rtol=0, atol=1e-4)


@pytest.mark.parametrize("is_autocast", [False, True])
def test_a_token_gets_a_whole_copy_in_16_bits(is_autocast: bool) -> None:
    """Where probabilities of several copies would often be equal."""
    config = YiHybridConfig(hidden_size=64, num_experts=16, num_experts_per_tok=4)
    router = Router(config).to(torch.float32 if is_autocast else torch.bfloat16)
    torch.manual_seed(0)
    with torch.no_grad():
        router.weight.copy_(torch.randn(4, 64).repeat_interleave(4, 0) * 0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
        _, ids, _ = router(torch.randn(4096, 64, dtype=torch.bfloat16))
    copies = ids // 4
    assert torch.equal(copies, copies[:, :1].expand_as(copies))


def test_what_is_switched_on_later_is_as_if_at_once(dense: Path, hybrid: Path, tmp_path: Path, run: Run) -> None:  # noqa: F811
    steps = (EXPERTS, ATTENTION, ("--top-p", "0.3", "--max-experts", "5"))
    source = dense
    for number, options in enumerate(steps):
        target = tmp_path / str(number)
        code, out, _ = run("upcycle", str(source), str(target), *options)
        assert code == 0
        assert ("computes something else" in out) == (number > 0)
        source = target
    at_once, later = open_checkpoint(hybrid), open_checkpoint(source)
    assert later.config.text_config.to_dict() == at_once.config.text_config.to_dict()
    assert later.tensors.keys() == at_once.tensors.keys()
    assert all(torch.equal(tensor[...], later.tensors[name][...]) for name, tensor in at_once.tensors.items())


def test_windows_and_sharing(dense: Path, windows: Path, hybrid: Path) -> None:  # noqa: F811
    text = open_checkpoint(hybrid).config.text_config
    assert text.layer_types == [SLIDING, FULL] * 3 and text.sliding_window == 8
    assert text.kv_source_layers == [0, 1, 2, 1, 4, 5]
    assert (text.router_top_p, text.max_experts_per_tok, text.num_experts_per_tok) == (0.3, 5, 4)
    old, new = open_checkpoint(dense).tensors, open_checkpoint(windows).tensors
    dropped = {LAYER.format(3) + f"self_attn.{part}_proj.{end}" for part in "kv" for end in ("weight", "bias")}
    assert old.keys() - new.keys() == dropped and not new.keys() - old.keys()
    assert all(torch.equal(tensor[...], old[name][...]) for name, tensor in new.items())
    expected = logits(dense)
    for folder in (windows, hybrid):
        assert (logits(folder) - expected).abs().max() > 0.1


def test_sharing_alone_and_windows_alone(dense: Path) -> None:  # noqa: F811
    source = open_checkpoint(dense)
    shared = upcycle(source, Changes(share=3)).config.text_config
    assert shared.layer_types == [FULL] * 6 and shared.kv_source_layers == [0, 0, 0, 3, 3, 3]
    sliding = upcycle(source, Changes(every=2, window=16, share=1))
    assert sliding.config.text_config.kv_source_layers == list(range(6))
    narrower = upcycle(sliding, Changes(window=4)).config.text_config
    assert (narrower.layer_types, narrower.sliding_window) == (sliding.config.text_config.layer_types, 4)


def test_it_is_saved_loaded_and_generates(hybrid: Path, tmp_path: Path, run: Run) -> None:  # noqa: F811
    loaded = yi_vl.load(hybrid, device="cpu", dtype=torch.float32)
    loaded.save(tmp_path / "saved")
    assert torch.equal(logits(tmp_path / "saved"), logits(hybrid))
    assert run("convert", str(hybrid), str(tmp_path / "converted"), "--verify")[0] == 0
    answer = loaded.predict(WIDE, "What is this?", max_new_tokens=6)
    assert run("ask", WIDE, "What is this?", "--max-new-tokens", "6", "-m", str(hybrid))[:2] == (0, answer + "\n")


def test_info_describes_it(hybrid: Path, dense: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setenv("COLUMNS", "300")
    code, out, _ = run("info", str(hybrid))
    assert code == 0
    for text in (
        "full in layers 1, 3, 5; a window of 8 tokens in layers 0, 2, 4",
        "shared by layers 1+3; all other layers have their own",
        "128 bytes per token beyond the window (bf16); 0.1 MB of 512 tokens, 2.9 times less",
        "12 experts of width 16 in each layer; per token the most probable up to a sum of 0.3, 5 at most (top-p)",
    ):
        assert text in out, text
    model = yi_vl.load(hybrid, device="cpu").model
    total = sum(p.numel() for p in (*model.model.language_model.parameters(), *model.lm_head.parameters()))
    active = total - 6 * 7 * 3 * 32 * 16
    assert f"{total:,} of the language model, at most {active:,} active per token" in out
    assert "int8" not in out and "hybrid" not in run("info", str(dense))[1].replace(str(dense), "")
    code, out, _ = run("info", str(hybrid), "--tensors")
    assert "layers.3.self_attn.k_proj" not in out and "mlp.experts.gate_up_proj" in out


def test_it_is_written_shard_by_shard(tmp_path: Path, saved_bytes: list[int]) -> None:
    convert(upcycle(open_checkpoint(RELEASE), Changes(experts=4)), tmp_path / "out", "yi-vl", shard_bytes=700_000)
    assert len(saved_bytes) > 3 and max(saved_bytes) <= 700_000
    torch.testing.assert_close(logits(tmp_path / "out"), logits(RELEASE), rtol=0, atol=1e-4)


def test_a_factor_that_16_bits_round_is_named(dense: Path, tmp_path: Path, run: Run) -> None:  # noqa: F811
    yi_vl.load(NANO, device="cpu", dtype=torch.bfloat16).save(tmp_path / "source")
    for slices, is_rounded in ((7, True), (8, False)):
        options = ("--experts", "2", "--slices", str(slices))
        _, out, _ = run("upcycle", str(tmp_path / "source"), str(tmp_path / str(slices)), *options)
        assert (f"times {slices} are rounded in bfloat16" in out) == is_rounded
