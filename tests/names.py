"""Find home-made words that have a standard name in the field: `python tests/names.py` exits with 1 if there are any.

`IDENTIFIERS` are whole names in Python code and YAML keys, `PARTS` are words inside such names (`num_pictures`),
`PROSE` are patterns for comments, strings and documents, `FILES` are file names. `ALLOWED` lists what must stay,
and why.
"""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = (".md", ".yaml", ".toml", ".js", ".css", ".jinja")

IDENTIFIERS = {
    "Ahead": "BufferedStream",
    "CLIENT_LEFT": "CLIENT_CLOSED_REQUEST",
    "Chooser": "Sampler",
    "Epochs": "EpochPlan",
    "Keys": "PrefixKey",
    "Places": "AdmissionLimit",
    "Rest": "Remainder",
    "Rows": "RunningBatch",
    "Share": "ShardSlice",
    "RoomyLayer": "GrowableLayer",
    "VectorLinear": "TunedLinear",
    "advance": "step",
    "answer_nobody": "cancel_on_disconnect",
    "asked": "user_message, prompt",
    "bad_steps": "spike_guard",
    "begin_answers": "new_request",
    "behind": "skip",
    "complained": "error_message",
    "draws": "generator",
    "forbidden": "suppress_tokens",
    "forget": "clear_cache, reset_prefix_cache",
    "form": "layout, format, variant",
    "found": "name what was found",
    "from_ours": "from_native",
    "has_had_enough": "should_stop",
    "hold_back": "the detokenizer's stop-string buffer",
    "how": "name the thing",
    "is_right": "is_correct",
    "keep_frozen_low": "cast_frozen_",
    "kind": "variant, type",
    "learns": "trainable",
    "make_room": "reserve",
    "meaning": "parsed",
    "micros": "micro_batches",
    "mine": "local",
    "never_run": "unused_modules",
    "newcomers": "prefilled requests",
    "num_in_a_row": "num_consecutive",
    "one": "name the thing",
    "ours": "native, yi_vl",
    "own": "local, params",
    "places": "position_ids",
    "printed": "format_official",
    "read_beginning": "prefill_shared_prefix",
    "said": "response",
    "says": "logs, generates",
    "seats": "slots",
    "share_of": "split_count",
    "share_out": "split_slices",
    "square": "image_uint8",
    "squares": "images_uint8",
    "tell_health": "health",
    "theirs": "reference, hf",
    "to_ours": "to_native",
    "told": "prompt",
    "unless_gone": "cancel_on_disconnect",
    "wanted": "expected",
    "way": "variant, layout",
}
PARTS = {
    "picture": "image",
    "pictures": "images",
    "optimiser": "optimizer",
    "optimisers": "optimizers",
    "normalise": "normalize",
    "normalised": "normalized",
    "quantise": "quantize",
    "quantised": "quantized",
    "anew": "again",
    "lest": "so that ... not",
    "newcomer": "request",
    "ours": "native, yi_vl",
    "theirs": "reference, hf",
}
PROSE = {
    r"pictures?": "image",
    r"anew": "again",
    r"lest": "so that ... not",
    r"who(so)?ever": "the caller, the user",
    r"nought": "zero",
    r"newcomers?": "prefilled requests",
    r"Called by": "delete: grep answers it",
    r"; calls": "delete: grep answers it",
    r"goes? on where": "resumes",
    r"(is|be|was) to be had": "is available",
    r"hears? (4|5)\d\d": "gets",
    r"words (a|per) second": "tokens/s",
    r"words? by word": "token by token",
    r"is no number": "NaN/Inf",
    r"of the peak": "MFU",
}
FILES = {
    "actions.py": "handlers.py",
    "adapters.py": "lora.py",
    "answers.py": "generations.py",
    "costs.py": "estimate.py",
    "guard.py": "spike_guard.py",
    "initial.py": "init.py",
    "int4.py": "qlora.py",
    "loop.py": "trainer.py",
    "machine.py": "hardware.py",
    "objective.py": "loss.py",
    "parallel.py": "distributed.py",
    "parts.py": "assemble.py",
    "picture.py": "image.py",
    "reshare.py": "reshard.py",
    "rows.py": "batch.py",
    "sizes.py": "summary.py",
    "texts.py": "i18n.py",
    "visitors.py": "uploads.py",
}


@dataclass(frozen=True)
class Allowed:
    """Where a word may stay: in files that match, on lines that the pattern is in."""

    words: str  # a pattern for the whole word
    files: str  # a glob of paths
    reason: str
    line: str = ""


ALLOWED = (
    Allowed(".*", "tests/names.py", "the words themselves"),
    Allowed(".*", "tests/test_names.py", "the words themselves"),
    Allowed("pictures?", "*", "questions that nano is trained on", "in this picture|Do both pictures"),
    Allowed("pictures?", "train/nano/text/phrases.py", "phrases that nano is trained on"),
    Allowed("advance", "*", "rich's method", r"(progress|bar)\w*\.advance"),
    Allowed("kind", "*", "numpy's and inspect's attribute", r"(dtype|parameter|param)\.kind"),
    Allowed("adapters.py", "yi_vl/checkpoint/adapters.py", "reads the adapters of PEFT"),
    Allowed("int4.py", "yi_vl/quantize/int4.py", "4-bit layers; the trainer's file is qlora.py"),
    Allowed("parts.py", "eval/gpu/parts.py", "the parts of the command, as in its option --parts"),
    Allowed("pictures?", "train/nano/data/vocabulary.py", "words that nano is trained to read"),
    Allowed("advance", "eval/runner.py", "rich's method"),
    Allowed("draws?|behind", "eval/*", "random draws of the official rules; the text behind a match"),
    Allowed("guard.py", "eval/gpu/guard.py", "runs a part under a time limit"),
)


@dataclass(frozen=True)
class Finding:
    path: str
    line: int
    word: str
    instead: str
    context: str  # identifier, prose or file

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.context} {self.word!r} -> {self.instead}"


def parts_of(identifier: str) -> list[str]:
    """`numPictures_of` -> num, pictures, of"""
    return [part.lower() for part in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", identifier)]


def of_identifier(name: str) -> Iterator[tuple[str, str]]:
    bare = name.strip("_")
    if bare in IDENTIFIERS:
        yield name, IDENTIFIERS[bare]
    else:
        for part in parts_of(bare):
            if part in PARTS:
                yield name, PARTS[part]
                return


_PROSE = re.compile("|".join(rf"(?P<g{i}>(?<!\w){word}(?!\w))" for i, word in enumerate(PROSE)), re.IGNORECASE)
_INSTEAD = tuple(PROSE.values())


def of_prose(text: str) -> Iterator[tuple[int, str, str]]:
    """Line within the text, word, what to write instead."""
    for match in _PROSE.finditer(text):
        group = next(name for name, value in match.groupdict().items() if value is not None and name.startswith("g"))
        yield text.count("\n", 0, match.start()), match[0], _INSTEAD[int(group[1:])]


def in_python(source: str) -> Iterator[tuple[int, str, str, str]]:
    """Line, word, what to write instead, and what it stands in."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME:
            for word, instead in of_identifier(token.string):
                yield token.start[0], word, instead, "identifier"
        elif tokenize.tok_name[token.type] in ("COMMENT", "STRING", "FSTRING_MIDDLE"):
            for offset, word, instead in of_prose(token.string):
                yield token.start[0] + offset, word, instead, "prose"


def in_document(text: str) -> Iterator[tuple[int, str, str, str]]:
    for offset, word, instead in of_prose(text):
        yield offset + 1, word, instead, "prose"


def in_yaml(text: str) -> Iterator[tuple[int, str, str, str]]:
    yield from in_document(text)
    for number, line in enumerate(text.splitlines(), 1):
        for key in re.findall(r"(\w+):(?:\s|$)", line.split("#")[0]):
            for word, instead in of_identifier(key):
                yield number, word, instead, "identifier"


def findings_in(path: str, text: str) -> list[Finding]:
    """The home-made words of one file that are not allowed there."""
    read = in_python if path.endswith(".py") else in_yaml if path.endswith(".yaml") else in_document
    lines = text.splitlines() or [""]
    findings = [Finding(path, *finding) for finding in read(text)]
    name = Path(path).name
    if name in FILES:
        findings.append(Finding(path, 1, name, FILES[name], "file"))
    return [finding for finding in findings if not is_allowed(finding, lines[min(finding.line, len(lines)) - 1])]


def is_allowed(finding: Finding, line: str) -> bool:
    return any(
        re.fullmatch(allowed.words, finding.word, re.IGNORECASE)
        and fnmatch(finding.path, allowed.files)
        and re.search(allowed.line, line)
        for allowed in ALLOWED
    )


def tracked() -> list[str]:
    """The repository's text files that are checked: code, configs, documents, the Makefile."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    names = listed.stdout.splitlines()
    is_checked = (name for name in names if name.endswith((".py", *DOCUMENTS)) or name in ("Makefile", ".ci/run"))
    return [name for name in is_checked if (ROOT / name).is_file()]


def is_under(name: str, paths: list[str]) -> bool:
    return not paths or any(name == path or name.startswith(path.rstrip("/") + "/") for path in paths)


def main() -> int:
    parser = argparse.ArgumentParser(description="List words that have a name in the field.")
    parser.add_argument("paths", nargs="*", help="files or folders; by default everything that git tracks")
    parser.add_argument("--count", action="store_true", help="only counts, by folder and by word")
    arguments = parser.parse_args()
    names = [name for name in tracked() if is_under(name, arguments.paths)]
    findings = [finding for name in names for finding in findings_in(name, (ROOT / name).read_text(encoding="utf-8"))]
    if arguments.count:
        for counter in (
            Counter("/".join(Path(finding.path).parts[:-1][:2]) or "." for finding in findings),
            Counter(f"{finding.context} {finding.word.lower()}" for finding in findings),
        ):
            print(*(f"{number:5} {name}" for name, number in counter.most_common()), "", sep="\n")
    else:
        print(*findings, sep="\n")
    print(f"{len(findings)} home-made words in {len({finding.path for finding in findings})} of {len(names)} files")
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
