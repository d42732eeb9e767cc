"""`trainable.language` as a list: how it is typed, what it selects; all else keeps its bits and costs nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from rich.console import Console
from tiny import tiny_config
from toy_runs import losses, step_once, stop_after, trainer
from transformers import LlamaConfig

from train import checkpoint
from train.config import TrainableConfig, TrainConfig
from train.config_file import load_config, to_yaml
from train.metrics import component_table, read_metrics
from train.optim import LOW_DTYPES, cast_frozen_, parameter_groups, set_trainable_
from train.trainable import language_names, select
from train.trainer import train
from yi_vl.model import YiVLForConditionalGeneration

Configure = Callable[..., TrainConfig]
NANO = Path(__file__).parents[1] / "train/configs/nano/align-224.yaml"
EMBEDDING, NORM, HEAD = "model.language_model.embed_tokens.weight", "model.language_model.norm.weight", "lm_head.weight"
ONLY_LANGUAGE = "trainable={vision: false, projector: false}"


@pytest.mark.parametrize(
    ("typed", "entries"),
    [
        ("[28-, lm_head.*]", ["28-", "lm_head.*"]),
        ("[0-11, 4, 7]", ["0-11", "4", "7"]),
        ("['3', \"4 - 7\"]", ["3", "4 - 7"]),
        ("28-31", ["28-31"]),
        ("28-", ["28-"]),
        ("0", ["0"]),  # not false
        ("1", ["1"]),  # not true
        ("'*.self_attn.*'", ["*.self_attn.*"]),
        ("lm_head.weight", ["lm_head.weight"]),
        ("yes", True),
        ("off", False),
        ("lora", "lora"),
    ],
)
def test_it_is_taken_as_people_type_it(typed: str, entries: object, tmp_path: Path) -> None:
    config = load_config(NANO, [f"trainable.language={typed}"])
    assert config.trainable.language == entries and type(config.trainable.language) is type(entries)
    path = tmp_path / "run.yaml"
    path.write_text(NANO.read_text().replace("language: false}", f"language: {typed}}}"))
    assert load_config(path) == config
    path.write_text(to_yaml(config))
    assert load_config(path) == config, "the config beside a checkpoint is taken back"
    assert load_config(path, ["trainable.language=true"]).trainable.language is True
    assert load_config(path, ["trainable.language=[5]"]).trainable.language == ["5"], "lists are replaced"


@pytest.mark.parametrize(
    ("typed", "reason"),
    [
        ("some", "trainable.language is 'some'; expected true, false or lora, or a list of layers"),
        ("'true'", "trainable.language is 'true'; expected true, false or lora"),
        ("Lora", "trainable.language is 'Lora'; expected true, false or lora"),
        ("null", "trainable.language is None; expected"),
        ("1.5", r"trainable.language is 1\.5; expected"),
        ("-1", "trainable.language is -1; .* Layers are counted from 0"),
        ("-4-", "trainable.language is '-4-'; .* Layers are counted from 0"),
        ("0xffffff", "trainable.language is 16777215; expected"),
        ("{layers: 3}", "trainable.language is {'layers': 3}; expected"),
        ("3,4", "trainable.language is '3,4'; .* Several are a YAML list"),
        ("3 4", "trainable.language is '3 4'; expected"),
        ("'28:'", "trainable.language is '28:'; .* A range of layers is written 4-7"),
        ("[]", "trainable.language is an empty list; set it to false"),
        ("[lora]", "trainable.language lists 'lora'; .* lora stands alone"),
        ("[lora, 4-7]", "trainable.language lists 'lora'; .* lora stands alone"),
        ("[3, true]", "trainable.language lists True; .* stand alone"),
        ("[3, null]", "trainable.language lists None; expected"),
        ("[3, -1]", "trainable.language lists -1; .* Layers are counted from 0"),
        ("[7-4]", "trainable.language lists '7-4'; .* begins with the lower one"),
        ("['4:8']", "trainable.language lists '4:8'; .* A range of layers is written 4-7"),
        ("[28:]", "trainable.language lists {28: None}; .* A range of layers is written 4-7"),
        ("[[1, 2]]", r"trainable.language lists \[1, 2\]; expected"),
        ("[lm_head]", "trainable.language lists 'lm_head'; expected .*lm_head"),
        ("[*.mlp.*]", "cannot be read as YAML: .*quote a text that begins with"),
    ],
)
def test_what_is_no_selection_is_refused(typed: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        load_config(NANO, [f"trainable.language={typed}"])
    assert "\n" not in str(caught.value)


def test_a_list_goes_with_neither_adapters_in_four_bits_nor_nothing() -> None:
    with pytest.raises(ValueError, match=r"lora\.base is int4, but trainable\.language is \['4'\]"):
        load_config(NANO, ["trainable.language=[4]", "lora.base=int4"])
    assert load_config(NANO, [ONLY_LANGUAGE, "trainable.language=0"]).trainable.language == ["0"], "layer 0 is no false"


NAMES = language_names(12)


def layers(*numbers: int) -> set[str]:
    return {name for name in NAMES if any(f".layers.{number}." in name for number in numbers)}


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (["3"], layers(3)),
        (["0-2"], layers(0, 1, 2)),
        (["10-"], layers(10, 11)),
        (["1", "10"], layers(1, 10)),  # not 1 as the beginning of 10
        (["2-4", "3-5", "4"], layers(2, 3, 4, 5)),
        (["lm_head.*"], {HEAD}),
        (["model.embed_tokens.*"], {EMBEDDING}),
        (["model.language_model.norm.weight", "*.layers.11.*"], {NORM, *layers(11)}),
        (["model.layers.[34].self_attn.?_proj.weight"],
         {name for name in layers(3, 4) if name.endswith("_proj.weight") and "self_attn" in name}),
        (["*"], set(NAMES)),
    ],
)  # fmt: skip
def test_entries_select(entries: list[str], expected: set[str]) -> None:
    others = ["model.vision_tower.visual.ln_pre.weight", "model.multi_modal_projector.linear_1.bias"]
    assert select(entries, [*NAMES, *others]) == expected


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        (["12"], "there is no layer 12; the layers are 0 to 11"),
        (["3", "8-12"], "there is no layer 12; the layers are 0 to 11"),
        (["12-"], "there is no layer 12; the layers are 0 to 11"),
        (["248"], "there is no layer 248; .*YAML reads 4:8 as the number 248"),
        (["lm_head.*", "*.attention.*"], r"matches '\*\.attention\.\*'; there are model.embed_tokens.weight, "
         r"model.layers.\[0 to 11\].input_layernorm.weight, .*mlp.down_proj.weight, model.norm.weight, lm_head.weight"),
        (["model.vision_tower.*"], "no parameter of the language model matches 'model.vision_tower"),
        (["*.BIAS"], "no parameter"),
    ],
)  # fmt: skip
def test_an_entry_that_selects_nothing_is_refused(entries: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        select(entries, NAMES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("biases", [(False, False), (True, False), (True, True)])
def test_the_names_are_the_models(biases: tuple[bool, bool]) -> None:
    config = tiny_config()
    text = config.text_config.to_dict() | {"attention_bias": biases[0], "mlp_bias": biases[1], "num_hidden_layers": 3}
    config.text_config = LlamaConfig(**text)
    with torch.device("meta"):
        model = YiVLForConditionalGeneration(config)
    names = {name for name, _ in model.named_parameters() if "language_model" in name or "lm_head" in name}
    assert set(language_names(3, *biases)) == names


def trained_names(model: YiVLForConditionalGeneration) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(("entry", "is_tied"), [("lm_head.*", True), ("*.embed_tokens.*", True), ("lm_head.*", False)])
def test_a_tied_table_is_trained_by_both_its_names(entry: str, is_tied: bool) -> None:
    config = tiny_config()
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = is_tied
    model = YiVLForConditionalGeneration(config)
    settings = TrainConfig(trainable=TrainableConfig(False, False, ["1", entry]))
    set_trainable_(model, settings)
    table = EMBEDDING if is_tied else HEAD
    assert {name for name in trained_names(model) if ".layers.1." not in name} == {table}
    (group, *_) = parameter_groups(model, settings)
    assert len({id(p) for p in group["params"]}) == len(group["params"]) == 1 + 7
    cast_frozen_(model, "bf16")
    assert {p.dtype for p in (model.lm_head.weight, model.get_input_embeddings().weight)} == {torch.float32}


@pytest.fixture
def another_precision() -> Iterator[None]:
    """accelerate keeps the first precision of a process, and refuses another."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("another_precision")
@pytest.mark.parametrize(
    "settings", [("precision=fp32",), ("precision=bf16", "activation_checkpointing=true")], ids=str
)
@pytest.mark.parametrize("language", ["[1]", "['*.self_attn.*', 'lm_head.*']", "[model.embed_tokens.*, 0-0]"])
def test_what_is_frozen_keeps_its_bits_and_costs_nothing(
    configure: Configure, tmp_path: Path, settings: tuple[str, ...], language: str
) -> None:
    """From a model as it is released, in bf16, so that frozen matrices are cast."""
    base = trainer(configure(*settings))
    base.model.to(torch.bfloat16).float()
    base.save(tmp_path / "base", with_state=False)
    start = f"init_from={{checkpoint: {tmp_path}/base, tower: null, language_model: null}}"
    config = configure(
        start, *settings, ONLY_LANGUAGE, f"trainable.language={language}", "checkpoint.every_steps=3",
        "schedule.warmup=0", "optimizer.weight_decay=0.1",
    )  # fmt: skip
    run = trainer(config)
    zero_grad, run.optimizer.zero_grad = run.optimizer.zero_grad, lambda: None  # keep the gradients
    step_once(run)
    names = select(config.trainable.language, dict(run.model.named_parameters()))
    parameters = dict(run.model.named_parameters())
    assert {name for name, parameter in parameters.items() if parameter.grad is not None} == names
    grouped = {id(parameter) for group in run.optimizer.param_groups for parameter in group["params"]}
    assert grouped == {id(parameters[name]) for name in names}
    low = LOW_DTYPES.get(config.precision, torch.float32)
    frozen_matrices = {name for name in parameters.keys() - names if name.endswith("_proj.weight") and "layers" in name}
    assert all(parameters[name].dtype == low for name in frozen_matrices)
    zero_grad()

    final = train(config)
    before, after = (
        YiVLForConditionalGeneration.from_pretrained(path, dtype=torch.float32).state_dict()
        for path in (tmp_path / "base", final)
    )
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == names
    state = checkpoint.load_state(Path(config.run_dir) / "step-00000003")
    assert {name.removeprefix("model.") for name in state["optimizer"]["state"]} == names
    row = read_metrics(Path(config.run_dir) / "metrics.jsonl")[-1]
    assert row["lr"].keys() == row["grad_norm_per_component"].keys() == {"language"}
    assert row["grad_norm"] == pytest.approx(row["grad_norm_per_component"]["language"])


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_the_backward_pass_ends_at_the_lowest_trained_layer(configure: Configure, checkpointing: str) -> None:
    settings = (ONLY_LANGUAGE, "trainable.language=[1]", f"activation_checkpointing={checkpointing}")
    run = trainer(configure(*settings))
    language_model = run.model.model.language_model
    outputs: list[torch.Tensor] = []
    for layer in language_model.layers:
        layer.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    (micro, *_) = next(iter(run.loader)).micro_batches
    saved: set[int] = set()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.add(len(outputs))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = run.objective(**run._inputs(micro))
    assert [output.requires_grad for output in outputs] == [False, True]
    assert checkpointing == "true" or 0 not in saved, "nothing is kept of what runs before the end of layer 0"
    loss.backward()


def test_the_table_at_the_start_tells_what_is_trained(configure: Configure) -> None:
    run = trainer(configure("trainable.vision=false", "trainable.language=['1', 'lm_head.*']"))
    parameters = dict(run.model.named_parameters())
    trained = sum(parameters[name].numel() for name in trained_names(run.model) if "projector" not in name)
    console = Console(width=120)
    with console.capture() as shown:
        console.print(component_table(run.model, run.config))
    assert f" {trained:,} " in shown.get() and "of the language model: 1, lm_head.*" in shown.get()


def test_an_entry_that_this_model_lacks_is_one_line(configure: Configure) -> None:
    with pytest.raises(ValueError, match="there is no layer 2; the layers are 0 to 1") as caught:
        train(configure("trainable.language=[1-2]"))
    assert "\n" not in str(caught.value)


def test_it_resumes_exactly_and_with_another_selection_not_at_all(configure: Configure, tmp_path: Path) -> None:
    settings = (ONLY_LANGUAGE, "trainable.language=[1, lm_head.*]", "checkpoint={every_steps: 2, keep_last: 2}")
    whole = configure(f"run_dir={tmp_path}/whole", *settings)
    final = train(whole)
    stopped = configure(f"run_dir={tmp_path}/stopped", *settings)
    stop_after(trainer(stopped), 5)
    for other in ("[0, lm_head.*]", "true", "[1]"):
        with pytest.raises(ValueError, match=r"trainable\.language \['1', 'lm_head\.\*'\], this run has .*, but the"):
            train(configure(f"run_dir={tmp_path}/stopped", *settings, f"trainable.language={other}"))
    shutil.rmtree(Path(stopped.run_dir) / "step-00000004")
    resumed = train(stopped)
    assert losses(stopped) == losses(whole)
    assert (resumed / "model.safetensors").read_bytes() == (final / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"is finished already, with trainable\.language"):
        train(configure(f"run_dir={tmp_path}/whole", *settings, "trainable.language=[1]"))


def test_answers_during_training_do_not_unfreeze(configure: Configure, tmp_path: Path) -> None:
    """For them the model is in eval mode, and then set back."""
    answers = f"generations={{shards: {tmp_path}/chats/0.tar, every_steps: 1, count: 1, max_new_tokens: 2}}"
    config = configure(ONLY_LANGUAGE, "trainable.language=[1]", answers)
    run = trainer(config)
    Path(config.run_dir).mkdir()
    before = trained_names(run.model)
    assert run.held_out is not None
    run._generate(run.held_out)
    assert trained_names(run.model) == before and run.model.model.language_model.training
