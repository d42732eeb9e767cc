"""vLLM's greedy tokens of several models, and how it refuses settings; test_vllm_hybrid.py runs this in a process.

Each folder of a model has `requests.json`: prompts as token ids, or chats as lists of messages.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any


def main(results: Path, folders: list[Path]) -> None:
    written = {str(folder): generate(folder) for folder in folders}
    settings = ({"pipeline_parallel_size": 2}, {"enable_expert_parallel": True})
    results.write_text(json.dumps(written | {"refused": [refusal(folders[-1], given) for given in settings]}))


def generate(folder: Path) -> dict[str, Any]:
    """Tokens by request, of all at once and then once more, and how many layers have a KV cache of their own."""
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]
    from vllm.distributed import cleanup_dist_env_and_memory  # type: ignore[import-not-found]

    requests = json.loads((folder / "requests.json").read_text())
    is_chat = isinstance(requests[0][0], dict)
    llm = LLM(str(folder), dtype="float32", enforce_eager=True, max_num_seqs=8, skip_tokenizer_init=not is_chat)
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=is_chat)
    prompts = [{"prompt_token_ids": request} for request in requests]
    answers = []
    for _ in range(2):  # the second time prefixes are cached
        outputs = (
            llm.chat(requests, params, use_tqdm=False) if is_chat else llm.generate(prompts, params, use_tqdm=False)
        )
        answers.append([list(output.outputs[0].token_ids) for output in outputs])
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    num_sharing = len(runner.shared_kv_cache_layers)
    del llm, runner, outputs
    gc.collect()
    cleanup_dist_env_and_memory()
    return {"answers": answers, "num_sharing": num_sharing}


def refusal(folder: Path, settings: dict[str, Any]) -> str:
    """The message with which vLLM does not start."""
    from vllm import EngineArgs  # type: ignore[import-not-found]

    try:
        EngineArgs(str(folder), dtype="float32", **settings).create_engine_config()
    except ValueError as error:
        return str(error)
    return "nothing"


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(argument) for argument in sys.argv[2:]])
