"""One loop for what is pretrained alone, tower or language model: resumes exactly, keeps a log and draws its curves.

A batch and the learning rate are pure functions of the step; weights and optimizer lie in `state.pt`, so that a run
that was stopped continues as if it had not been.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.progress import track
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from yaml import YAMLError

from train.config import ScheduleConfig
from train.schedule import WSD, learning_rate_factor
from yi_vl.arguments import one_line
from yi_vl.files import atomic_path, read_json_lines, write_json_lines, write_text

STATE, LOG, RECIPE = "state.pt", "log.jsonl", "recipe.json"
Batch = TypeVar("Batch")  # a dataclass of tensors
Recipe = TypeVar("Recipe")
# When a run is continued.
_MAY_CHANGE = {
    "num_steps", "save_every", "measure_every", "num_workers", "num_threads", "num_questions",
    "lists_until", "signs_until",
}  # fmt: skip
_SMOOTH_STEPS = 50


@dataclass
class LoopRecipe:
    """How long and how fast: warm-up, a constant rate, and linear decay over the last part."""

    num_steps: int = 6000
    learning_rate: float = 1.5e-3
    uses_muon: bool = True  # for the matrices of the layers; AdamW trains the rest, or everything
    warmup_steps: int = 200
    decay_fraction: float = 0.3
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    save_every: int = 100
    measure_every: int = 250
    seed: int = 0
    num_workers: int = 1  # processes that make batches

    def __post_init__(self) -> None:
        for name in ("num_steps", "save_every", "measure_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it has to be at least 1.")

    def rate_factor(self, step: int) -> float:
        """The factor on the learning rate in the step after `step` others."""
        schedule = ScheduleConfig(shape=WSD, warmup=self.warmup_steps, decay_fraction=self.decay_fraction, final=0.02)
        return learning_rate_factor(step, self.num_steps, schedule)


def read_yaml(path: Path) -> DictConfig:
    """A YAML file's keys and values.

    Raises:
        ValueError: no such file, not YAML, or something else than keys and values.
    """
    try:
        content = OmegaConf.load(path)
    except (OmegaConfBaseException, YAMLError, OSError) as error:
        raise ValueError(f"{path}: {one_line(error)}") from error
    if not isinstance(content, DictConfig):
        raise ValueError(f"{path}: expected keys and values at the top.")
    return content


def read_recipe(schema: type[Recipe], path: Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe, a dataclass of dataclasses: its defaults, then a YAML file, then `key.sub=value` overrides.

    Raises:
        ValueError: no such file, not YAML, an unknown key or a wrong value; one line.
    """
    from_file: Any = read_yaml(path) if path is not None else {}
    where = " ".join([*([str(path)] if path is not None else []), *overrides])
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), from_file, OmegaConf.from_dotlist(list(overrides)))
        return cast(Recipe, OmegaConf.to_object(merged))
    except (OmegaConfBaseException, YAMLError, ValueError, TypeError) as error:
        raise ValueError(f"{where}: {one_line(error)}") from error


def prepare_run(run_dir: Path, recipe: Any, num_threads: int, seed: int) -> None:
    """Make the run's folder, write its recipe, a dataclass, to it, and set this process's threads and seed.

    Raises:
        ValueError: the run was started with another recipe.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    _remember_recipe(run_dir, asdict(recipe))
    torch.set_num_threads(num_threads)
    torch.manual_seed(seed)


def _remember_recipe(run_dir: Path, recipe: dict[str, Any]) -> None:
    path = run_dir / RECIPE
    if path.exists():
        before = _flat(json.loads(path.read_text(encoding="utf-8")))
        now = _flat(recipe)
        for key in sorted(before.keys() | now.keys()):
            if key.split(".")[-1] not in _MAY_CHANGE and before.get(key) != now.get(key):
                raise ValueError(
                    f"{run_dir} was started with {key}={before.get(key)}, not {now.get(key)}; "
                    "continue it with its own recipe or name another folder."
                )
    write_text(path, json.dumps(recipe, indent=1))


def _flat(recipe: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"loop": {"seed": 0}} -> {"loop.seed": 0}"""
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def to_device(batch: Batch, device: torch.device) -> Batch:
    """A copy of the batch with all its tensors on the device."""
    values = {each.name: getattr(batch, each.name) for each in fields(batch)}  # type: ignore[arg-type]
    return replace(batch, **{name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)})  # type: ignore[type-var]


def train_loop(
    run_dir: Path,
    module: nn.Module,
    recipe: LoopRecipe,
    batches: Callable[[int], Iterator[Batch]],
    loss_of: Callable[[Batch], Tensor],
    measure: Callable[[], dict[str, float]],
    layers: nn.Module,
) -> None:
    """Train the module in place, on its device, up to `recipe.num_steps`, from `state.pt` on if there is one.

    Args:
        batches: gives the batches of the steps from a number on.
        measure: what is logged besides the loss, every `measure_every` steps and at the end; the loss at every saving.
        layers: the part of the module whose matrices Muon may train.
    """
    optimizers = make_optimizers(module, layers, recipe)
    first, running = _restore(run_dir, module, optimizers)
    rows = [row for row in read_json_lines(run_dir / LOG, drops_partial=True) if row["step"] <= first] if first else []
    device = next(module.parameters()).device
    started = time.time()
    steps = range(first, recipe.num_steps)
    for step, batch in zip(track(steps, run_dir.name), batches(first)):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = recipe.learning_rate * recipe.rate_factor(step)
        loss = loss_of(to_device(batch, device))
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), recipe.clip_norm)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        done = step + 1
        running += (loss.item() - running) / min(done, _SMOOTH_STEPS)
        is_last = done == recipe.num_steps
        is_measured, is_saved = (is_last or done % every == 0 for every in (recipe.measure_every, recipe.save_every))
        if is_measured or is_saved:
            seconds = (time.time() - started) / (done - first)
            scores = measure() if is_measured else {}
            rows.append({"step": done, "loss": running, "seconds_per_step": round(seconds, 3), **scores})
        if is_saved:
            _save(run_dir, module, optimizers, (done, running), rows)


def make_optimizers(module: nn.Module, layers: nn.Module, recipe: LoopRecipe) -> list[Optimizer]:
    """AdamW, with weight decay for matrices only; or Muon for the matrices of `layers`, and AdamW for all else."""
    of_layers = {id(parameter) for parameter in layers.parameters() if recipe.uses_muon and parameter.ndim == 2}
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    rest = [parameter for parameter in trained if id(parameter) not in of_layers]
    groups = [
        {"params": [parameter for parameter in rest if parameter.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [parameter for parameter in rest if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizers: list[Optimizer] = [AdamW(groups, recipe.learning_rate, betas=(0.9, 0.98), fused=True)]
    if matrices := [parameter for parameter in trained if id(parameter) in of_layers]:
        # Its updates are as large as AdamW's usually are, so that both have one learning rate.
        rate, decay = recipe.learning_rate, recipe.weight_decay
        optimizers.append(Muon(matrices, rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def _restore(run_dir: Path, module: nn.Module, optimizers: Sequence[Optimizer]) -> tuple[int, float]:
    """The number of steps done, and the mean loss of the last."""
    path = run_dir / STATE
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, map_location="cpu", weights_only=True)
    module.load_state_dict(state["module"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return int(state["step"]), float(state["loss"])


def _save(
    run_dir: Path,
    module: nn.Module,
    optimizers: Sequence[Optimizer],
    done: tuple[int, float],
    rows: list[dict[str, Any]],
) -> None:
    write_json_lines(run_dir / LOG, rows)  # first: rows after the saved step are dropped when the run is continued
    draw_curves(run_dir, rows)
    with atomic_path(run_dir / STATE) as path:
        optimizer_states = [optimizer.state_dict() for optimizer in optimizers]
        state = {"step": done[0], "loss": done[1], "module": module.state_dict(), "optimizers": optimizer_states}
        torch.save(state, path)


def draw_curves(run_dir: Path, rows: list[dict[str, Any]]) -> None:
    """curves.png: the loss, and below it everything that `measure` gave, over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if not rows:
        return
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
    steps = [row["step"] for row in rows]
    above.plot(steps, [row["loss"] for row in rows], color="black")
    above.set_ylabel("loss per supervised token")
    for name in dict.fromkeys(key for row in rows for key in row if key not in ("step", "loss", "seconds_per_step")):
        measured = [row for row in rows if name in row]
        below.plot([row["step"] for row in measured], [row[name] for row in measured], marker=".", label=name)
    below.set_ylim(0, 1)
    below.set_ylabel("accuracy, held out")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    if below.get_lines():
        below.legend(fontsize="small", ncols=3)
    above.set_title(run_dir.name)
    with atomic_path(run_dir / "curves.png") as path:
        figure.savefig(path, dpi=110, format="png")
    pyplot.close(figure)
