"""Writing a checkpoint as GGUF, for llama.cpp and what is built on it, with one tensor in memory at a time.

What the files hold: gguf_language.py, gguf_tokenizer.py and gguf_vision.py. A Modelfile for Ollama lies beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..chat import CHATML, IM_END, IM_START, STOP_STRING, SYSTEM_PROMPT, ChatFormat
from ..files import atomic_path
from .gguf_language import language_fields, language_tensors
from .gguf_tensors import Fields, GgufTensor
from .gguf_tokenizer import tokenizer_fields
from .gguf_vision import CLASS_TOKEN_FAULT, vision_fields, vision_tensors, vision_unsupported
from .read import Checkpoint
from .write import check_space, check_target

if TYPE_CHECKING:
    from gguf import GGUFWriter

GgufType = Literal["f16", "bf16", "f32", "q8_0", "q4_k_m"]


class GgufFile(NamedTuple):
    """A GGUF file to be written."""

    name: str
    architecture: str
    fields: Fields
    tensors: list[GgufTensor]


def write_gguf(
    source: Checkpoint,
    target: Path,
    type: GgufType = "f16",
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Write `source` to the new folder `target` as GGUF files and a Modelfile.

    Args:
        type: of the language model's matrices; q8_0 keeps the vision tower in f16. Vectors are always float32.
        progress: is called with the bytes written so far, and all there are.

    Returns:
        What the user should know about the files, one sentence each.

    Raises:
        ValueError: the folder exists, there is no room, the package `gguf` is missing or cannot write the type, or
            llama.cpp cannot hold the language model or its tokenizer.
    """
    check_target(source, target, "gguf")
    files, notes = plan_gguf(source, target.absolute().name, type)
    total_bytes = sum(tensor.num_bytes for file in files for tensor in file.tensors)
    check_space(target, total_bytes)
    with atomic_path(target) as partial:
        partial.mkdir()
        written_bytes = 0

        def count_written(num_bytes: int) -> None:
            nonlocal written_bytes
            written_bytes += num_bytes
            if progress is not None:
                progress(written_bytes, total_bytes)

        count_written(0)
        for file in files:
            _write_file(partial / file.name, file, count_written)
        modelfile = _modelfile(files, source.make_processor().chat_format)
        (partial / "Modelfile").write_text(modelfile, encoding="utf-8")
    return notes


def plan_gguf(source: Checkpoint, name: str, type: GgufType) -> tuple[list[GgufFile], list[str]]:
    """The files, and what the user should know about them."""
    ggml_type = _matrix_type(type)
    general: Fields = {"general.name": name, "general.quantization_version": 2}
    language = GgufFile(
        f"model-{type}.gguf",
        "llama",
        general
        | {"general.type": "model", "general.file_type": _FILE_TYPES[ggml_type]}
        | language_fields(source.config.text_config)
        | tokenizer_fields(source),
        language_tensors(source, ggml_type),
    )
    notes = []
    if "tokenizer.ggml.eot_token_id" not in language.fields:
        notes.append(f"{STOP_STRING} is not one token of this tokenizer: give it to llama.cpp as a stop string.")
    if reason := vision_unsupported(source.config):
        return [language], [*notes, f"Only the language model is written: {reason}."]
    vision_type = "f16" if type == "q8_0" else type
    vision_matrix_type = _matrix_type(vision_type)
    vision = GgufFile(
        f"mmproj-{vision_type}.gguf",
        "clip",
        general
        | {"general.type": "mmproj", "general.file_type": _FILE_TYPES[vision_matrix_type]}
        | vision_fields(source.config),
        vision_tensors(source, vision_matrix_type),
    )
    return [language, vision], [*notes, CLASS_TOKEN_FAULT]


def _matrix_type(type: GgufType) -> str:
    """The name in GGML of a type.

    Raises:
        ValueError: the package that writes the files is missing, or has no such quantization.
    """
    try:
        import gguf  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(f'{error.name} is missing; writing GGUF needs: pip install "yi_vl[gguf]"') from error
    if type == "q4_k_m":
        raise ValueError(
            "q4_k_m is not among what the package gguf can quantize to. Write f16, and let llama.cpp do it: "
            "llama-quantize DST/model-f16.gguf DST/model-q4_k_m.gguf Q4_K_M"
        )
    return type.upper()


# llama.cpp's numbers for what most matrices of a file are.
_FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}


def _write_file(path: Path, file: GgufFile, count_written: Callable[[int], None]) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, file.architecture)
    for key, value in file.fields.items():
        _add_field(writer, key, value)
    for tensor in file.tensors:
        ggml_type = GGMLQuantizationType[tensor.ggml_type]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.num_bytes, ggml_type)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in file.tensors:
            writer.write_tensor_data(tensor.encode())
            count_written(tensor.num_bytes)
    finally:
        writer.close()


def _add_field(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _modelfile(files: Sequence[GgufFile], chat_format: ChatFormat) -> str:
    """Ollama's description of the model. Ollama puts an image's mark directly before the question."""
    lines = [f"FROM ./{file.name}" for file in files]
    if chat_format == CHATML:
        template = (
            f"{{{{ if .System }}}}{IM_START}system\n{{{{ .System }}}}{IM_END}\n{{{{ end }}}}"
            f"{{{{ range .Messages }}}}{IM_START}{{{{ .Role }}}}\n{{{{ .Content }}}}{IM_END}\n{{{{ end }}}}"
            f"{IM_START}assistant\n"
        )
        lines += [f'TEMPLATE """{template}"""', f'PARAMETER stop "{IM_END}"', "PARAMETER temperature 0"]
        return "\n".join(lines) + "\n"
    template = (
        "{{ if .System }}{{ .System }}{{ else }}"
        + SYSTEM_PROMPT
        + "{{ end }}\n\n"
        + STOP_STRING
        + "{{ range .Messages }}"
        '{{ if eq .Role "user" }} Human: {{ .Content }}\n' + STOP_STRING + "{{ end }}"
        '{{ if eq .Role "assistant" }} Assistant: {{ .Content }}\n' + STOP_STRING + "{{ end }}"
        "{{ end }} Assistant:"
    )
    lines += [f'TEMPLATE """{template}"""', f'PARAMETER stop "{STOP_STRING}"', "PARAMETER temperature 0"]
    return "\n".join(lines) + "\n"
