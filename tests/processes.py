"""`python -m train` in processes of its own, to be killed: forked from a server that has imported everything once."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from train.config import TrainConfig, exit_on_user_error, to_yaml

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["train.loop", "processes"])
TIMEOUT_SECONDS = 300


def start(config: TrainConfig, num_ranks: int = 1, **environment: str) -> list[BaseProcess]:
    """Start a run on so many ranks of gloo; what rank N says comes to run_dir/../said-N.txt."""
    run_dir = Path(config.run_dir)
    settings = run_dir.with_name(f"{run_dir.name}.yaml")
    settings.write_text(to_yaml(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(num_ranks):
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        variables = {name: str(value) for name, value in (places | address).items()} if num_ranks > 1 else {}
        process = _CONTEXT.Process(target=_main, args=(str(settings), said(config, rank), variables | environment))
        process.start()
        ranks.append(process)
    return ranks


def said(config: TrainConfig, rank: int = 0) -> Path:
    return Path(config.run_dir).with_name(f"said-{rank}.txt")


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


def _main(settings: str, said_path: Path, variables: dict[str, str]) -> None:
    import torch
    from accelerate import DistributedType, PartialState

    from train.__main__ import main

    file = os.open(said_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(variables)
    torch.set_num_threads(1)
    if "ACCELERATE_USE_FSDP" in variables:  # which accelerate ignores on ranks without an accelerator
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    sys.argv = ["train", settings]
    exit_on_user_error(main)
