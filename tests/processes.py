"""Programs in processes of their own, to be killed too: forked from a server that has imported everything once."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from train.config import TrainConfig
from train.config_file import to_yaml

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train.trainer", "eval.runner", "processes"])
TIMEOUT_SECONDS = 300


@dataclass(frozen=True)
class Ended:
    code: int | None
    stdout: str
    stderr: str


def run_program(folder: Path, module: str, *arguments: str, num_ranks: int = 1, **environment: str) -> list[Ended]:
    """`python -m MODULE ARGUMENTS` on so many ranks of gloo, with files in `folder`; how each rank ended."""
    ranks = [
        CONTEXT.Process(target=_run, args=(folder, rank, module, arguments, variables | environment))
        for rank, variables in enumerate(_ranks(num_ranks))
    ]
    for process in ranks:
        process.start()
    codes = finish(ranks)
    texts = [[(folder / f"{name}-{rank}.txt").read_text() for name in ("out", "err")] for rank in range(num_ranks)]
    return [Ended(code, out, err) for code, (out, err) in zip(codes, texts)]


def start(config: TrainConfig, num_ranks: int = 1, **environment: str) -> list[BaseProcess]:
    """Start `python -m train` on so many ranks of gloo; the output of rank N goes to run_dir/../output-N.txt."""
    run_dir = Path(config.run_dir)
    settings = run_dir.with_name(f"{run_dir.name}.yaml")
    settings.write_text(to_yaml(config))
    ranks = []
    for rank, variables in enumerate(_ranks(num_ranks)):
        process = CONTEXT.Process(
            target=_train, args=(str(settings), output_path(config, rank), variables | environment)
        )
        process.start()
        ranks.append(process)
    return ranks


def output_path(config: TrainConfig, rank: int = 0) -> Path:
    return Path(config.run_dir).with_name(f"output-{rank}.txt")


def finish(ranks: list[BaseProcess]) -> list[int | None]:
    """Wait for the end; the exit codes."""
    for process in ranks:
        process.join(TIMEOUT_SECONDS)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise AssertionError("a rank hangs")
    return [process.exitcode for process in ranks]


def wait_for(path: Path, pattern: str, process: BaseProcess) -> None:
    """Wait until a file or folder is there."""
    while not list(path.glob(pattern)):
        assert process.exitcode is None, "the run ended too early"
        time.sleep(0.001)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _ranks(num_ranks: int) -> list[dict[str, str]]:
    """What `accelerate launch` puts into the environment of each rank."""
    if num_ranks == 1:
        return [{}]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "ACCELERATE_USE_CPU": "true"}
    size = {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    return [shared | size | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]


def _run(folder: Path, rank: int, module: str, arguments: tuple[str, ...], variables: dict[str, str]) -> None:
    with (folder / f"out-{rank}.txt").open("w") as out, (folder / f"err-{rank}.txt").open("w") as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
    os.environ.update(variables)
    _set_torch()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _train(settings: str, output: Path, variables: dict[str, str]) -> None:
    from accelerate import DistributedType, PartialState

    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(variables)
    _set_torch()
    sys.argv = ["train", settings]
    if "ACCELERATE_USE_FSDP" in variables:  # which accelerate ignores on ranks without an accelerator
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    runpy.run_module("train", run_name="__main__", alter_sys=True)


def _set_torch() -> None:
    import torch
    from torch.utils.data._utils import worker

    torch.set_num_threads(1)
    worker.MP_STATUS_CHECK_INTERVAL = 0.1  # how soon data workers notice that their rank was killed
