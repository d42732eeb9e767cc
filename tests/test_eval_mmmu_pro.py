"""MMMU-Pro as it is: every shape of its rows, whole runs, and prediction files in the official format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from benchmark_rows import encoded_image, write_parquet
from tiny import tiny_model, tiny_processor
from typer.testing import CliRunner

from eval import scoring
from eval.__main__ import app
from eval.benchmarks import mmmu_pro, mmmu_pro_official
from yi_vl.files import read_json_lines

NESTED = "[['A', 'B', 'Not enough information']]"


def row(key: str, options: str, answer: str = "A", **changes: Any) -> dict[str, Any]:
    """A row of a standard config with all of its columns."""
    return {
        "id": key,
        "question": "<image 1> Which?",
        "options": options,
        "explanation": "?",
        "image_1": encoded_image("red"),
        **{f"image_{number}": None for number in range(2, 8)},
        "img_type": "['Diagrams']",
        "answer": answer,
        "topic_difficulty": "Easy",
        "subject": "Art_Theory",
    } | changes


def texts(num: int) -> str:
    return str([f"choice {number}" for number in range(num)])


ROWS = [
    row("validation_Accounting_29", NESTED, "B", subject="Accounting"),
    row("test_Math_1", "['one']", subject="Math"),
    row("test_Math_2", "[1, 2.50, -3, None]", "C", subject="Math"),
    row("validation_Art_Theory_3", texts(10), "J", image_1=encoded_image("red", "JPEG")),
    row("validation_Art_Theory_4", texts(12), "L", image_1=encoded_image("blue", "WEBP")),
    row("test_Art_Theory_5", texts(26), "Z", image_1=encoded_image("red", "PNG", "P")),
    row("test_Art_Theory_6", "['', 'x', '']", "B", image_1=encoded_image("red", "TIFF", "CMYK")),
    row("test_Art_Theory_7", "('a tuple', 'will do')", image_1=encoded_image("grey", "PNG", "LA")),
    row("test_Art_Theory_8", "['$\\delta$', \"it's\", 'a \"b\"']", "B", question="No marker; <image 8>"),
    row("test_Art_Theory_9", "['<image 7>', '<image 1>', '<image 7>']", image_7=encoded_image("blue")),
    row("test_Art_Theory_10", "['<image 2>', 'no']", question="<image 1> or <image 1>?"),
]


def write_configs(folder: Path, rows: Sequence[dict[str, Any]] = ROWS) -> str:
    """The three configs as the hub lays them out."""
    half = len(rows) // 2
    for config in ("standard (10 options)", "standard (4 options)"):
        for index, part in enumerate((rows[:half], rows[half:])):
            write_parquet(folder / config / f"test-0000{index}-of-00002.parquet", part)
    vision = [
        {
            "id": item["id"],
            "image": encoded_image("green"),
            **{key: item[key] for key in ("options", "answer", "subject")},
        }
        for item in rows
    ]
    write_parquet(folder / "vision" / "test-00000-of-00001.parquet", vision)
    return str(folder)


def run_cli(*arguments: str) -> str:
    """What a command prints; whatever goes wrong is raised."""
    return CliRunner().invoke(app, arguments, catch_exceptions=False).stdout


def test_every_shape_of_row_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = write_configs(tmp_path)
    questions = {question.id: question for question in mmmu_pro.load(data, "test")}
    assert list(questions) == [item["id"] for item in ROWS]
    options = {key.rsplit("_", 1)[1]: question.options for key, question in questions.items()}
    assert options["29"] == {"A": "['A', 'B', 'Not enough information']"} and options["1"] == {"A": "one"}
    assert options["2"] == {"A": "1", "B": "2.5", "C": "-3", "D": "None"}
    assert ["".join(options[key]) for key in ("3", "4")] == ["ABCDEFGHIJ", "ABCDEFGHIJKL"]
    assert (options["5"]["Z"], options["6"], options["7"]) == (
        "choice 25",
        {"A": "", "B": "x", "C": ""},
        {"A": "a tuple", "B": "will do"},
    )
    assert options["8"] == {"A": "$\\delta$", "B": "it's", "C": 'a "b"'}
    assert questions["validation_Art_Theory_4"].gold == "L"
    assert questions["validation_Accounting_29"].prompt == (
        "<image 1> Which?\nA. ['A', 'B', 'Not enough information']\n"
        "Answer with the option letter from the given choices directly."
    )
    shown = {
        key: [part["image"].name.split(".image_")[1] for part in question.content() if part["type"] == "image"]
        for key, question in questions.items()
    }
    assert shown["test_Art_Theory_8"] == ["1"]  # unmarked, so it comes first; there is no eighth image column
    assert shown["test_Art_Theory_9"] == ["1", "7", "1", "7"] and shown["test_Art_Theory_10"] == ["1", "1"]
    assert "A. <image 2>\n" in questions["test_Art_Theory_10"].prompt
    assert scoring.chance([questions["validation_Accounting_29"]]) == 0, "its B is none of its options"
    assert scoring.chance([questions["test_Math_1"], questions["test_Math_2"]]) == (1 + 1 / 4) / 2
    assert "1 of 11 questions speak of an image that their row does not have" in caplog.text
    assert caplog.text.strip().endswith("test_Art_Theory_10")


def test_only_the_main_process_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate import PartialState

    monkeypatch.setattr(PartialState, "is_main_process", False)
    mmmu_pro.load(write_configs(tmp_path, [ROWS[0], ROWS[-1]]), "test")
    assert "speak of an image" not in caplog.text


def test_options_may_be_a_column_of_lists(tmp_path: Path) -> None:
    """As `datasets` writes them, with features in the file, as on the hub; the images among them are not decoded."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature
    from datasets import List as ListFeature

    for options, values in (
        (ListFeature(Value("string")), [["x", "y"], ["<image 1>"]]),
        (ListFeature(Value("float64")), [[1.0, 2.5], [-0.5]]),
        (ListFeature(ListFeature(Value("string"))), [[["x", "y"]], [["z"]]]),
    ):
        features = {name: Value("string") for name in ("id", "question", "answer", "subject")}
        features |= {"options": options} | {f"image_{number}": ImageFeature() for number in range(1, 8)}
        columns = {name: [row(f"test_Math_{i}", "")[name] for i in (1, 2)] for name in features}
        table = Dataset.from_dict(columns | {"options": values}, Features(features))
        (tmp_path / "standard (4 options)").mkdir(exist_ok=True)
        table.to_parquet(tmp_path / "standard (4 options)" / "test-00000-of-00001.parquet")
        questions = mmmu_pro.load(str(tmp_path), "test", "standard (4 options)")
        assert [list(question.options.values()) for question in questions] == [list(map(str, item)) for item in values]
        assert questions[0].images[0].read() == encoded_image("red")["bytes"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("[]", "question 'test_Math_7': .* has no options"),
        ("", "has no options"),
        (None, "options holds a NoneType, not a list"),
        (texts(27), "question 'test_Math_7': it has 27 options, more than the 26 letters"),
        ("{'a': 1}", "holds a dict, not a list"),
        ("{[]: 1}", "not the text of a list"),
        ("[print(1)]", "not the text of a list"),
    ],
)
def test_options_that_cannot_be_asked_are_refused_by_name(tmp_path: Path, options: str | None, message: str) -> None:
    data = write_configs(tmp_path, [row("test_Math_7", options), row("test_Math_8", texts(2))])  # type: ignore[arg-type]
    for variant in ("standard (4 options)", "vision"):
        with pytest.raises(ValueError, match=message):
            mmmu_pro.load(data, "test", variant)  # type: ignore[arg-type]


def test_a_variant_that_is_not_there_is_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "vision" / "test" / "0000.parquet", [row("test_Math_1", texts(2)) | {"image": None}])
    with pytest.raises(ValueError, match="standard \\(4 options\\)"):
        mmmu_pro.load(str(tmp_path), "test", "standard (4 options)")
    with pytest.raises(ValueError, match="'test_Math_1': it has no image"):
        mmmu_pro.load(str(tmp_path), "test", "vision")


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("for-mmmu-pro")
    tiny_model(max_position_embeddings=1024).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("variant", ["standard (10 options)", "standard (4 options)", "vision"])
@pytest.mark.parametrize("style", ["direct", "cot"])
def test_a_run_starts_and_ends(tmp_path: Path, tiny_folder: Path, variant: str, style: str) -> None:
    out = tmp_path / "out"
    command = ["mmmu-pro", "--model", str(tiny_folder), "--data", write_configs(tmp_path), "--max-new-tokens", "4"]
    table = run_cli(*command, "--variant", variant, "--prompt", style, "--out", str(out))
    records, verdicts = (read_json_lines(out / f"{name}.jsonl") for name in ("predictions", "verdicts"))
    results = json.loads((out / "results.json").read_text())
    assert [record["id"] for record in records] == [item["id"] for item in ROWS] and not results["config"]["errors"]
    assert (results["config"]["variant"], results["config"]["prompt"]) == (variant, style)
    assert results["official"]["num"] == len(verdicts) == len(ROWS) and f"of {len(ROWS)} (printed as " in table
    assert results["official"]["random_guesses"] == [
        verdict["id"] for verdict in verdicts if verdict["is_random_guess"]
    ]
    assert all(record["prompt"].endswith("step by step before answering.") for record in records) == (style == "cot")
    assert (out / "page.html").exists() and (out / "results.png").exists()

    again = run_cli("score", "mmmu-pro", "--predictions", str(out / "predictions.jsonl"), "--partial")
    assert f"(printed as {results['official']['formatted']})" in again


TWELVE = dict(zip("ABCDEFGHIJKL", [f"choice {number}" for number in range(11)] + ["the moon"]))
TEN = dict(zip("ABCDEFGHIJ", [f"choice {number}" for number in range(10)]))


@pytest.mark.parametrize(
    ("response", "options", "letter"),
    [
        # What stands behind the last "Answer:" counts if exactly one letter of the question is in it, even in a word.
        ("Answer: K", TWELVE, "K"),
        ("Answer: L) the moon", TWELVE, "L"),
        ("Answer: Kite", TWELVE, "K"),
        ("Answer: Kite", TEN, None),  # no K there; four words or fewer quote nothing
        ("Answer: A\nAnswer: J.", TEN, "J"),
        ("Answer: \\(I\\)", TEN, "I"),
        # Two letters in it: the whole response is read.
        ("Answer: KLM", TWELVE, None),
        ("Answer: KL", TWELVE, "L"),  # "L " at the end of the padded text
        ("Answer: DNA", TEN, "A"),
        ("I chose (C). Answer: (F)A. 4.6%", TEN, "F"),
        ("Answer: A or I think B", TEN, "B"),
        # No "Answer:": brackets, then a capital before a space, then one before a dot.
        ("(L) then (K)", TWELVE, "K"),
        ("J. A dramatic increase", TEN, "A"),
        ("F. 1-III, 2-IV, 4-I", TEN, "I"),  # the mere "I " of the padding
        ("I'm sorry, I can't help with that.", TEN, "I"),
        ("I'm sorry, I can't help with that.", {"A": "yes", "B": "no"}, None),
        ("L. the moon", TWELVE, "L"),
        ("L. the moon", TEN, None),
        ("it must be the moon, of course", TWELVE, "L"),
        ("it must be the moon", TWELVE, None),  # five words are too few to quote
        # One option: it is the only letter, whatever the response; a nested one is looked for as Python writes it.
        ("Answer: B", {"A": "['A', 'B', 'Not enough information']"}, None),
        ("(A)", {"A": "['A', 'B', 'Not enough information']"}, "A"),
        ("one of ['a', 'b', 'not enough information'] it is", {"A": "['A', 'B', 'Not enough information']"}, "A"),
        # An empty option is quoted by every long enough response, and last of all.
        ("here nobody names any letter at all", {"A": "nobody", "B": ""}, "B"),
    ],
)
def test_letters_are_those_of_the_questions_own_options(
    response: str, options: dict[str, str], letter: str | None
) -> None:
    """Worked out by hand from the official rules; None where they leave it to chance."""
    guesses: list[Sequence[str]] = []

    def random_guess(letters: Sequence[str]) -> str:
        guesses.append(letters)
        return letters[0]

    parsed = mmmu_pro_official.parse_choice(response, options, random_guess)
    assert (None if guesses else parsed) == letter
    assert guesses == ([] if letter else [list(options)])


def official_record(number: int, response: Any, answer: str = "B", options: str = texts(3)) -> dict[str, Any]:
    """A line of a prediction file as the official scripts leave it, their own verdicts included."""
    published = {key: value for key, value in row(f"test_Art_{number}", options, answer, subject="Art").items()}
    return {key: value for key, value in published.items() if not key.startswith("image")} | {
        "response": response,
        "pred_indexs": "B",
        "if_right": True,
    }


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return str(path)


def test_a_published_file_is_scored_as_it_is(tmp_path: Path) -> None:
    special = [
        official_record(1, "Let me think.\u2028\x85Answer: B"),  # line breaks to Python, none to JSON lines
        official_record(2, {"error": "timeout"}),
        official_record(3, None),
        official_record(4, "Answer: B", options=NESTED),
        official_record(5, "Answer: L", "L", texts(12)),
    ]
    records = special + [official_record(number, "Answer: B") for number in range(6, 1731)]
    path = write_lines(tmp_path / "gpt-4o_vision_direct.jsonl", records)
    table = run_cli("score", "mmmu-pro", "--predictions", path, "--out", str(tmp_path / "out"))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    verdicts = read_json_lines(tmp_path / "out" / "verdicts.jsonl")
    official = results["official"]
    assert results["split"] == "test" and official["num"] == len(verdicts) == 1730
    assert official["random_guesses"] == ["test_Art_2", "test_Art_3", "test_Art_4"]
    assert [verdict["id"] for verdict in verdicts if verdict["is_random_guess"]] == official["random_guesses"]
    unguessed = [verdict for verdict in verdicts if not verdict["is_random_guess"]]
    assert all(verdict["official"]["correct"] for verdict in unguessed) and len(unguessed) == 1727
    assert (
        official["formatted"] == f"{official['correct'] / 1730 * 100:.2f}%" and f"as {official['formatted']}" in table
    )
    assert "3 guessed at random" in table

    for num, some in ((1729, records[1:]), (1731, [*records, official_record(1731, "A")])):
        with pytest.raises(ValueError, match=f"has {num} responses, and the official script scores exactly 1730"):
            run_cli("score", "mmmu-pro", "--predictions", write_lines(tmp_path / "some.jsonl", some))
    with pytest.raises(ValueError, match="answers test_Art_9 more than once"):
        run_cli("score", "mmmu-pro", "--predictions", write_lines(tmp_path / "twice.jsonl", [*records[1:], records[8]]))


def test_the_number_is_printed_as_the_official_script_prints_it() -> None:
    assert [mmmu_pro.format_official(num, 1730) for num in (865, 1730, 0, 898)] == [
        "50.00%",
        "100.00%",
        "0.00%",
        "51.91%",
    ]


def test_answers_may_come_from_elsewhere_but_must_be_of_the_same_questions(tmp_path: Path) -> None:
    data = write_configs(tmp_path / "data")
    bare = [{"id": item["id"], "response": f"Answer: {item['answer']}"} for item in ROWS]
    command = ["score", "mmmu-pro", "--partial", "--predictions"]
    path = write_lines(tmp_path / "bare.jsonl", bare)
    table = run_cli(*command, path, "--answers", data, "--variant", "vision")
    assert "10 of 11 (printed as 90.91%)" in table and "1 guessed at random" in table  # the nested row's B
    other = write_lines(tmp_path / "other.jsonl", [bare[1] | {"options": "['one', 'two']"}])
    with pytest.raises(ValueError, match="'test_Math_1': it was asked with other options"):
        run_cli(*command, other, "--answers", data)
    for record, message in (
        ({"id": "test_Math_1", "options": "['a']", "answer": "A", "response": 3}, "its response is a int, not text"),
        ({"id": "test_Math_1", "options": {"]": "a"}, "answer": "A", "response": ""}, "named ], not A, B, C"),
        ({"id": "test_Math_1", "options": "['a']", "response": "A"}, "it has no answer"),
        ({"id": ["x"], "options": "['a']", "answer": "A"}, "must have an id and a response"),
    ):
        with pytest.raises(ValueError, match=message):
            run_cli(*command, write_lines(tmp_path / "odd.jsonl", [record]))
    with pytest.raises(ValueError, match="Give --answers: predictions for mmmu do not come with them"):
        run_cli("score", "mmmu", "--predictions", path)
    with pytest.raises(ValueError, match="--partial is for mmmu-pro"):
        run_cli("score", "cmmmu", "--partial", "--predictions", path, "--answers", data)
    with pytest.raises(ValueError, match=r"not\.there\.jsonl cannot be read: No such file"):
        run_cli(*command, "not.there.jsonl")
    with pytest.raises(ValueError, match="MMMU-Pro has no split val"):
        run_cli(*command, path, "--split", "val")


def test_every_image_reaches_a_model_and_an_endpoint(tmp_path: Path) -> None:
    """JPEG, PNG, WebP, palettes with transparency; what endpoints do not take goes as PNG."""
    from eval.models import _as_images, _as_url, read_images

    sent = {}
    for question in mmmu_pro.load(write_configs(tmp_path), "test"):
        content = read_images(question.content())
        sent[question.id] = next(_as_url(part) for part in content if part["type"] == "image")["image_url"]["url"][:16]
        assert all(part["image"].mode == "RGB" for part in _as_images(content) if part["type"] == "image")
    assert [sent[f"validation_Art_Theory_{number}"][11:15] for number in (3, 4)] == ["jpeg", "webp"]
    assert sent["test_Art_Theory_6"].startswith("data:image/png"), "a CMYK TIFF"
