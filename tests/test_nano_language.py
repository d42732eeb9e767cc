"""Nano's language model alone: a tree of conversations is what they are one by one, held-out questions are kept out,
and a run that was stopped continues exactly."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("sklearn")
from train.nano.data.labels import THINGS
from train.nano.pretrain import language
from train.nano.pretrain.ablation import ablate, measure_runs, overrides
from train.nano.pretrain.language import LanguageRecipe, TreeStream, load_signs
from train.nano.pretrain.mosaic_model import MosaicLanguageModel, Shape, megabytes
from train.nano.pretrain.named_signs import init_signs_by_name, sign_names
from train.nano.pretrain.tasks import greedy_answers, measure_tasks, task_scores
from train.nano.pretrain.trainer import LoopRecipe, read_recipe, read_yaml
from train.nano.pretrain.trees import IGNORED, Row, TreeBatch, TreeEncoder
from train.nano.text import mosaic_texts
from train.nano.text.mosaic import SIGN_IDS
from train.nano.text.mosaic_texts import MosaicText, TextLayout, heldout_questions
from train.nano.text.wording import plural
from yi_vl.processor import prepare_tokenizer

SHAPE = Shape(num_layers=2, width=32, num_heads=4, num_key_heads=2, mlp_width=48, vocab_size=2200)


def recipe(num_steps: int = 4, **changes: object) -> LanguageRecipe:
    loop = LoopRecipe(num_steps=num_steps, warmup_steps=2, save_every=2, measure_every=2, num_workers=0)
    return LanguageRecipe(shape=SHAPE, loop=loop, num_rows=2, row_tokens=260, num_questions=2, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a tokenizer of few texts."""
    folder = tmp_path_factory.mktemp("language")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "_NUM_TEXTS", 300)
        language.load_encoder(folder, recipe())
    return folder


@pytest.fixture(scope="module")
def encoder(tokenizer: Path) -> TreeEncoder:
    return language.load_encoder(tokenizer, recipe())


@pytest.fixture
def run_dir(tokenizer: Path, tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tokenizer").symlink_to(tokenizer / "tokenizer")
    return tmp_path / "run"


def test_a_tree_gives_what_its_conversations_give_one_by_one(encoder: TreeEncoder) -> None:
    torch.manual_seed(0)
    model = MosaicLanguageModel(SHAPE).eval()
    for parameter in model.language_model.get_submodule("layers").parameters():
        parameter.data = torch.randn_like(parameter) * 0.1  # a fresh layer is the identity
    text = MosaicText((tuple(range(64)),), [_turns(f"<image>\nHow many {i}?", "There are two.") for i in range(3)])
    other = MosaicText((tuple(range(16)),), [_turns("<image>\n这是什么？", "这是狗。")])
    trees = [*encoder.trees(text), *encoder.trees(other)]
    row = Row()
    assert [row.add(tree, len(encoder.prefix), 300) for tree in trees] == [3, 1]
    with torch.inference_mode():
        hidden = model(TreeBatch.of([row], 300, encoder.prefix), precision=torch.float32)[0]
        spans = iter(row.spans)
        for tree in trees:
            cells = torch.arange(len(tree.cells[0])) + (16 if len(tree.cells[0]) == 64 else 0)
            mosaic = model.signs(torch.tensor(tree.cells[0])) + model.cells(cells)
            for ids, _ in tree.branches:
                whole = torch.tensor([encoder.prefix + tree.trunk + ids])
                embeddings = model.language_model.get_input_embeddings()(whole)
                embeddings[whole == model.image_token_id] = mosaic
                model.language_model.set_attn_implementation("eager")
                alone = model.language_model(inputs_embeds=embeddings).last_hidden_state[0, -len(ids) :]
                model.language_model.set_attn_implementation("nano_trees")
                start, end = next(spans)
                torch.testing.assert_close(hidden[start:end], alone, atol=1e-4, rtol=1e-4)


def test_labels_are_the_answers_and_their_ends_only(encoder: TreeEncoder) -> None:
    text = MosaicText((tuple(range(16)),), [_turns("<image>\nWhat?", "A dog."), _turns("<image>\nHow many?", "Two.")])
    (tree,) = encoder.trees(text)
    row = Row()
    row.add(tree, len(encoder.prefix), 300)
    for (start, end), answer in zip(row.spans, ("A dog.", "Two.")):
        supervised = [label for label in row.labels[start:end] if label != IGNORED]
        assert encoder.text(supervised) == answer and row.labels[end - 1] == IGNORED


def test_training_begins_with_lists(encoder: TreeEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = TreeStream(encoder, recipe(4, lists_until=2), 0)
    called: list[str] = []

    def remembered(name: str, *args: object) -> MosaicText:
        called.append(name)
        return getattr(mosaic_texts, name)(*args)

    for name in ("list_text", "training_text"):
        monkeypatch.setattr(language, name, partial(remembered, name))
    for step, name in enumerate(["list_text", "list_text", "training_text", "training_text"]):
        called.clear()
        stream.batch(step)
        assert set(called) == {name}


def test_names_of_things_are_one_token_each(encoder: TreeEncoder) -> None:
    """A name of several tokens is looked up far later: they have to be put together first."""
    words = [f" {name}" for thing in THINGS.values() for name in (thing.en, plural(thing.en)) if " " not in name]
    words += [thing.zh for thing in THINGS.values()]
    assert sum(len(encoder.token_ids(word)) == 1 for word in words) >= 0.9 * len(words)


def test_a_stopped_run_continues_exactly(run_dir: Path, tmp_path: Path, tokenizer: Path) -> None:
    settings = recipe(4, signs_until=3)  # in the part that is continued
    language.pretrain_language(run_dir, settings)
    whole = torch.load(run_dir / "state.pt", weights_only=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer").symlink_to(tokenizer / "tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TreeStream, "__iter__", lambda stream: (stream.batch(step) for step in range(3)))
        language.pretrain_language(other, settings)  # its batches end after the third step; saved is the second
    assert torch.load(other / "state.pt", weights_only=True)["step"] == 2
    language.pretrain_language(other, settings)
    again = torch.load(other / "state.pt", weights_only=True)
    assert again["loss"] == whole["loss"]
    assert all(torch.equal(tensor, again["module"][name]) for name, tensor in whole["module"].items())
    rows, rows_again = (
        [json.loads(line) for line in (d / "log.jsonl").read_text().splitlines()] for d in (run_dir, other)
    )
    for row in (*rows, *rows_again):
        row.pop("seconds_per_step")
    assert rows == rows_again and [row["step"] for row in rows] == [2, 4] and (run_dir / "curves.png").exists()


def test_a_fresh_sign_resembles_its_names_and_no_others(encoder: TreeEncoder) -> None:
    assert sign_names("shape red circle") == [" red circle", "红色的圆形", " red circles"] and sign_names(
        "letter ab"
    ) == ["A", "B"]
    torch.manual_seed(0)
    model = MosaicLanguageModel(SHAPE)
    model.language_model.get_input_embeddings().weight.data = torch.randn(2240, 256)  # wide: chance is a small number
    model.lm_head.weight.data, model.signs.weight.data = torch.zeros(2240, 256), torch.zeros(len(SIGN_IDS), 256)
    model.cells.weight.data = torch.zeros(80, 256)
    init_signs_by_name(model, encoder.token_ids)
    words, signs = model.lm_head.weight, model.signs.weight
    named = {sign: sign_names(sign) for sign in ("thing dog", "flag fr", "shape red circle", "digit 3", "letter ab")}
    vectors = {"H8": model.cells.weight[-1]} | {sign: signs[SIGN_IDS[sign]] for sign in named}
    for name, texts in (named | {"H8": ["H8", " H8"]}).items():
        ids = {index for text in texts for index in encoder.token_ids(text)}
        nearest = torch.cosine_similarity(words, vectors[name], dim=-1).topk(len(ids)).indices.tolist()
        assert set(nearest) == ids, name


def test_signs_and_cells_stay_from_a_step_on_while_the_rest_is_trained(run_dir: Path) -> None:
    states = []
    for num_steps in (2, 4):
        language.pretrain_language(run_dir, recipe(num_steps, signs_until=2))
        states.append(torch.load(run_dir / "state.pt", weights_only=True)["module"])
    stayed = {name for name, tensor in states[0].items() if torch.equal(tensor, states[1][name])}
    assert stayed == {"signs.weight", "cells.weight"}


def test_a_finished_run_is_a_checkpoint_with_its_signs_and_can_be_measured(run_dir: Path) -> None:
    language.pretrain_language(run_dir, recipe(2))
    final = run_dir / "final"
    text_model = AutoModelForCausalLM.from_pretrained(final)
    signs, cells = load_signs(final)
    assert signs.shape == (len(SIGN_IDS), 32) and cells.shape == (80, 32)
    assert prepare_tokenizer(str(final)).convert_tokens_to_ids("<image_placeholder>") == SHAPE.vocab_size
    alone, encoder, *_ = language.load_run(run_dir)
    prompt = encoder.prompt(MosaicText((), [[{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]]))
    ids = torch.tensor([encoder.prefix + prompt.trunk + prompt.branches[0][0]])
    row = Row()
    row.add(prompt, len(encoder.prefix), 300)
    batch = TreeBatch.of([row], ids.shape[1] - len(encoder.prefix), encoder.prefix)
    expected = alone.lm_head(alone(batch, precision=torch.float32))[0]
    torch.testing.assert_close(text_model(ids).logits[0, len(encoder.prefix) :], expected, atol=1e-4, rtol=1e-4)
    table = measure_runs([run_dir], 2, num_examples=2)
    assert "run, step 2 |" in table and table.count("expected") == 2
    with pytest.raises(ValueError, match=r"was started with shape.width=32, not 64"):
        language.pretrain_language(run_dir, replace(recipe(2), shape=replace(SHAPE, width=64)))


def test_what_counts_as_correct_is_what_greedy_decoding_gives(encoder: TreeEncoder) -> None:
    """A model trained on one answer gives it, and is then scored as correct for it alone."""
    torch.manual_seed(0)
    model = MosaicLanguageModel(SHAPE)
    questions = heldout_questions(TextLayout(), 2)
    (tree,) = encoder.trees(questions[0].text)
    row = Row()
    row.add(tree, len(encoder.prefix), 300)
    batch = TreeBatch.of([row], 300, encoder.prefix)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(30):
        model.loss(batch, 0.0).backward()
        optimizer.step()
        optimizer.zero_grad()
    scored = measure_tasks(model.eval(), encoder, TextLayout(), 2)
    answers = greedy_answers(model, encoder, [each.question.text for each in scored])
    expected = [each.question.text.conversations[0][1]["value"] for each in scored]
    assert scored[0].is_correct and task_scores(scored)["counting en"] >= 0.5
    assert [each.is_correct for each in scored] == [encoder.text(a) == text for a, text in zip(answers, expected)]


def test_a_wrong_recipe_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("shape: {num_layers: 3}\nloop: {num_steps: 7}\n")
    read = read_recipe(LanguageRecipe, tmp_path / "recipe.yaml", ["loop.learning_rate=1e-3", "layout.image_last=true"])
    assert (read.shape.num_layers, read.loop.num_steps, read.loop.learning_rate) == (3, 7, 1e-3)
    assert read.layout.image_last and not read.layout.lists_first
    for wrong in ("shape.depth=3", "shape.num_layers=many", "loop.num_steps=0", "shape.num_heads=5"):
        with pytest.raises(ValueError, match=wrong.split("=")[0].split(".")[1]) as error:
            read_recipe(LanguageRecipe, None, [wrong])
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"nowhere.yaml"):
        read_recipe(LanguageRecipe, tmp_path / "nowhere.yaml")


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def test_an_ablation_trains_each_row_once_with_the_same_budget(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = "loop: {num_steps: 2, warmup_steps: 1, num_workers: 0}, num_rows: 2, num_questions: 1"
    shape = "shape: {num_layers: 1, width: 32, mlp_width: 48, vocab_size: 2200}"
    (tmp_path / "rows.yaml").write_text(
        f"base: {{{budget}, {shape}}}\nruns: {{plain: , order: {{shape: {{has_cells: false}}}}}}\n"
    )
    for name in ("plain", "order"):
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "tokenizer").symlink_to(tokenizer / "tokenizer")
    table = ablate(tmp_path / "rows.yaml", tmp_path / "out", 2)
    assert table.count("step 2") == 2 and table.index("plain, step 2") < table.index("order, step 2")
    assert not load_signs(tmp_path / "out" / "order" / "final")[1].any()
    monkeypatch.setattr(MosaicLanguageModel, "loss", lambda *_: pytest.fail("trained again"))
    assert ablate(tmp_path / "rows.yaml", tmp_path / "out", 2) == table
    for text, message in (("runs: {}", "at least one"), ("runs: {a: {shape: {depth: 2}}}", "depth"), ("[1]", "keys")):
        (tmp_path / "rows.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            ablate(tmp_path / "rows.yaml", tmp_path / "out", 2)


def test_the_shapes_of_the_ablation_fit_into_the_size_of_nano() -> None:
    content = read_yaml(Path("train/configs/nano/ablation.yaml"))
    for name, changes in content.runs.items():
        recipe = read_recipe(LanguageRecipe, None, overrides(content.base) + overrides(changes))
        assert 23.0 < megabytes(recipe.shape) < 25.0, name
