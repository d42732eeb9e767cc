"""`LLM.chat` of vLLM over the conversations of a JSON file; test_vllm.py runs this in a process of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(folder: str, requests: Path, results: Path) -> None:
    from vllm import LLM  # type: ignore[import-not-found]

    llm = LLM(folder, dtype="float32", enforce_eager=True, max_num_seqs=8)
    answers = []
    for request in json.loads(requests.read_text()):
        params = llm.get_default_sampling_params()
        for name, value in request["sampling"].items():
            setattr(params, name, value)
        (output,) = llm.chat(request["messages"], params, use_tqdm=False, **request["options"])
        answers.append(_record(output))
    results.write_text(json.dumps(answers))


def _record(output: Any) -> dict[str, Any]:
    return {
        "prompt_token_ids": output.prompt_token_ids,
        "num_cached_tokens": output.num_cached_tokens,
        "token_ids": [list(choice.token_ids) for choice in output.outputs],
        "texts": [choice.text for choice in output.outputs],
        "finish_reasons": [choice.finish_reason for choice in output.outputs],
    }


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
