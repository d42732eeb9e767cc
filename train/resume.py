"""Finds the checkpoint to resume from, and compares its config with the run's.

A changed key takes effect from the next step, and is reported; or it would change the data order or cannot take effect,
and is refused.
"""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from .checkpoint import load_state, newest_good
from .config import DPO, LORA, TrainConfig, batch_sizes, num_steps
from .config_file import load_config
from .config_flat import flat_settings
from .distributed import raise_on_all_ranks

_ORDER = "which changes the order of the data: samples would be repeated or skipped"
_REFUSED = {  # keys, or patterns of them, and why they cannot change
    "seed": _ORDER,
    "data.shuffle_buffer": _ORDER,
    "data.long_text": _ORDER,
    "data.sources": _ORDER,
    "data.sources.*.shards": _ORDER,
    "data.sources.*.weight": _ORDER,
    "data.sources.*.max_samples": _ORDER,
    "chat_format": "but the model was trained in another chat format so far",
    "objective": "but the checkpoint's optimizer and log are of another loss",
    "image_size": "but the checkpoint's position grid has its own size",
    "image.tiles": "but the model was trained with other tiles so far, which are saved with it",
    "init_from.*": "but the weights are the checkpoint's, and no others are loaded",
    "trainable.*": "but the checkpoint holds the optimizer's state of other parameters",
    "lora.rank": "but the checkpoint's adapters have their own rank",
}
_NOT_COMPARED = ("run_dir", "resume")
_NO_RESULT = (  # keys that do not change the trained weights
    "checkpoint.*", "validation", "validation.*", "generations", "generations.*", "log_every", "log_samples",
    "trackers", "micro_batch", "compile", "activation_checkpointing", "data.workers", "data.max_broken_fraction",
    "spike_guard.stop_after",
)  # fmt: skip


def find_checkpoint(
    accelerator: Accelerator, config: TrainConfig
) -> tuple[Path | None, dict[str, Any] | None, list[str]]:
    """The newest whole checkpoint, chosen by the first rank for all, its state, and lines about it for the user.

    Raises:
        ValueError: on every rank, when all checkpoints are damaged, or the config cannot change as it did.
    """
    choice: list[Any] = [None, []]
    error = ""
    if accelerator.is_main_process:
        try:
            choice = list(newest_good(Path(config.run_dir)))
        except ValueError as none_good:
            error = str(none_good)
    raise_on_all_ranks(error)
    directory, notes = broadcast_object_list(choice)
    if directory is None:
        return None, None, notes
    is_main = accelerator.is_main_process
    state = load_state(directory, lazily=not is_main)
    if is_main:
        try:
            notes += check_resumed(directory, state["step"], config)
        except ValueError as refused:
            error = str(refused)
    raise_on_all_ranks(error)
    return directory, state, notes


def check_resumed(checkpoint: Path, done_steps: int, config: TrainConfig) -> list[str]:
    """Lines for the user about settings that take effect from now on.

    Args:
        done_steps: steps of the checkpoint.

    Raises:
        ValueError: settings differ that cannot change in the middle of a run.
    """
    before = _read_config(checkpoint)
    if done_steps > num_steps(config):
        raise ValueError(
            f"{checkpoint} is at step {done_steps}, but this run has {num_steps(config)} steps; raise `steps`, or take "
            "another run_dir."
        )
    differing = _differences(before, config)
    refused = []
    for key, (old, new) in differing.items():
        reason = _refusal(key, before, config, done_steps)
        if reason is not None:
            refused.append(f"{key} {_show(old)}, this run has {_show(new)}, {reason}")
    if refused:
        raise ValueError(
            f"{checkpoint} was trained with {'; with '.join(refused)}. Set it back, or start a new run in another "
            "run_dir."
        )
    changed = [f"{key} {_show(new)} instead of {_show(old)}" for key, (old, new) in differing.items()]
    return [f"From step {done_steps + 1} on: {', '.join(changed)}."] if changed else []


def check_finished(final: Path, config: TrainConfig) -> None:
    """
    Raises:
        ValueError: the finished model was trained with settings that make another model.
    """
    changed = changed_results(final, config)
    if changed:
        raise ValueError(
            f"{final} is finished already, with {'; with '.join(changed)}. Set it back, or take another run_dir; "
            f"init_from.checkpoint={final} trains a finished model further."
        )


def changed_results(directory: Path, config: TrainConfig) -> list[str]:
    """Each setting that makes another model than that of a directory's config.yaml, as in `steps 6, this run has 5`.

    Raises:
        ValueError: that config cannot be read.
    """
    return [
        f"{key} {_show(old)}, this run has {_show(new)}"
        for key, (old, new) in _differences(_read_config(directory), config).items()
        if not any(fnmatch(key, pattern) for pattern in _NO_RESULT)
    ]


def _read_config(checkpoint: Path) -> TrainConfig:
    try:
        return load_config(checkpoint / "config.yaml")
    except ValueError as error:
        raise ValueError(f"The config of {checkpoint} cannot be read, take another run_dir: {error}") from error


def _differences(before: TrainConfig, config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Settings that differ, with both values; the length of a run is one setting, `steps`."""
    old, new = flat_settings(before), flat_settings(config)
    for settings, run in ((old, before), (new, config)):
        settings["data.sources"] = [source.name for source in run.data.sources]
        settings["steps"] = num_steps(run)
        for key in (*_NOT_COMPARED, "epochs", "samples"):
            settings.pop(key, None)
    names = set(old["data.sources"]) ^ set(new["data.sources"])
    return {
        key: (old.get(key), new.get(key))
        for key in dict.fromkeys((*old, *new))
        if not _is_same(key, old.get(key), new.get(key))
        and not any(key.startswith(f"data.sources.{name}.") for name in names)  # reported as data.sources
        and (not key.startswith("lora.") or LORA in (before.trainable.language, config.trainable.language))
    }


def _is_same(key: str, old: Any, new: Any) -> bool:
    if key.startswith("init_from.") and isinstance(old, str) and isinstance(new, str):
        return old == new or Path(old).expanduser().resolve() == Path(new).expanduser().resolve()
    return bool(old == new)


def _refusal(key: str, before: TrainConfig, config: TrainConfig, done_steps: int) -> str | None:
    """Why a key cannot change; None when it can."""
    is_loaded_again = config.trainable.language == LORA == before.trainable.language or config.objective == DPO
    if key == "init_from.checkpoint" and is_loaded_again:
        return None  # the base model, or the reference, may have been moved
    if key in ("global_batch", "batch_ramp") and config.epochs is not None:
        done = [list(batch_sizes(run).stretches(done_steps)) for run in (before, config)]
        if done[0] != done[1]:
            return "but the steps already done were of another size; give `steps` instead of `epochs`"
    if key == "distill.teacher" and None in (before.distill.teacher, config.distill.teacher):
        return "but the checkpoint's log is of another loss"
    if config.checkpoint.keep_best and before.validation is not None and fnmatch(key, "validation.s*"):
        return "but checkpoint.keep_best compares its losses with earlier ones"
    return next((reason for pattern, reason in _REFUSED.items() if fnmatch(key, pattern)), None)


def _show(value: Any) -> str:
    return "null" if value is None else "true" if value is True else "false" if value is False else str(value)
