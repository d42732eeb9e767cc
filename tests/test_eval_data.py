"""Questions of MMMU and CMMMU: files that are read or refused, and the official prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmark_rows import REFERENCE, encoded_image, mmmu_row, run_cli, with_reference, write_mmmu, write_parquet
from PIL import Image

from eval.benchmarks import cmmmu, mmmu


def test_mmmu_questions_are_asked_as_the_official_llava_run_asks_them(small_mmmu: str) -> None:
    questions = {question.id: question for question in mmmu.load(small_mmmu, "val")}
    assert list(questions) == [f"validation_Art_Theory_{i}" for i in (1, 2, 3, 4)] + [
        f"validation_Math_{i}" for i in (1, 2, 3)
    ]
    choice, open_, two, bare = (
        questions[f"validation_{key}"] for key in ("Art_Theory_1", "Math_2", "Math_1", "Math_3")
    )
    assert choice.prompt == (
        "<image 1> What is it?\n(A) red\n(B) green\n(C) it's blue\n\nAnswer with the option's letter from the given "
        "choices directly."
    )
    assert open_.prompt == "<image 1> What is it?\n\nAnswer the question using a single word or phrase."
    assert (choice.subject, choice.question_type, choice.gold) == ("Art_Theory", "choice", "B")
    assert (open_.question_type, open_.gold, open_.options) == ("open", ("3.5", "three and a half"), {})

    shown = [part["image"].read() if part["type"] == "image" else part["text"] for part in two.content()]
    red, blue = encoded_image("red")["bytes"], encoded_image("blue")["bytes"]
    assert shown[:4] == [blue, " then ", red, shown[3]] and shown[3].startswith("?\n(A) red")
    first = two.content(first_image_only=True)
    assert [part["type"] for part in first] == ["image", "text"]
    assert first[0]["image"].read() == red and first[1]["text"] == two.prompt
    assert [part["type"] for part in bare.content()] == ["image", "image", "text"]  # what no marker places comes first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_1": None}, "validation_Art_1'.*<image 1>, but the row has no such image"),
        ({"options": "__import__('os').system('true')"}, "not the text of a list"),
        ({"options": "[]"}, "multiple-choice question, but it has no options"),
        ({"options": str(list(range(27)))}, "has 27 options, more than the 26 letters"),
        ({"id": "validation_Art_2"}, "1 ids come more than once: validation_Art_2"),
    ],
)
def test_a_bad_row_is_named_and_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    data = write_mmmu(tmp_path, Art=[mmmu_row("Art", 1, **change), mmmu_row("Art", 2)])
    with pytest.raises(ValueError, match=message):
        mmmu.load(data, "val")


def test_another_benchmarks_files_are_refused(small_mmmu: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no column type, category, option1"):
        write_parquet(tmp_path / "c" / "val-0.parquet", [mmmu_row("Art", 1)])
        cmmmu.load(str(tmp_path / "c"), "val")
    with pytest.raises(ValueError, match=r"has no test-\*.parquet"):
        mmmu.load(small_mmmu, "test")
    with pytest.raises(ValueError, match="there is no such folder"):
        mmmu.load(str(tmp_path / "nowhere" / "at" / "all"), "val")


def test_mmmu_reads_as_many_options_as_there_are_letters_and_knows_what_is_not_public(tmp_path: Path) -> None:
    twelve = [f"take {number}" for number in range(11)] + ["<image 2>, not <image 8>"]
    rows = [
        mmmu_row("Art", 1, options=str(twelve), answer="L", image_2=encoded_image("blue")),
        mmmu_row("Art", 2, options="[1, 2.50]", answer="?"),
        mmmu_row("Art", 3, options="['alone']", answer="A"),
        mmmu_row("Art", 4, options="", question_type="open", answer="?"),
        mmmu_row("Art", 5, options=None, question_type="open", answer="2.5"),
    ]
    # The hub's own conversion has a folder for each split.
    write_parquet(tmp_path / "Art" / "test" / "0000.parquet", rows)
    many, numbers, alone, hidden, open_ = mmmu.load(str(tmp_path), "test")
    assert list(many.options) == list("ABCDEFGHIJKL") and many.gold == "L"
    assert "(K) take 10\n(L) <image 2>, not <image 8>\n\nAnswer" in many.prompt
    assert [part["image"].name[-1] for part in many.content() if part["type"] == "image"] == ["1", "2"]
    assert numbers.options == {"A": "1", "B": "2.5"} and alone.options == {"A": "alone"}
    assert (numbers.gold, hidden.gold, open_.gold, open_.options) == ("", "", "2.5", {})


def cmmmu_row(number: int, question_type: str, answer: str, **changes: Any) -> dict[str, Any]:
    return {
        "id": str(number),
        "type": question_type,
        "question": f'看<img="q_{number}.png">。',
        **{f"option{i}": f"选{i}" if question_type == "选择" else "" for i in range(1, 5)},
        "image_1": encoded_image("red"),
        **{f"image_{i}": None for i in range(2, 6)},
        "answer": answer,
        "category": "商业",
        **{f"image_{i}_filename": f"q_{number}.png" if i == 1 else "" for i in range(1, 6)},
    } | changes


CMMMU_ROWS = [cmmmu_row(1, "选择", "AC"), cmmmu_row(2, "判断", "错"), cmmmu_row(3, "填空", "60")]


def test_cmmmu_from_parquet_and_from_json_lines_is_the_same(tmp_path: Path) -> None:
    write_parquet(tmp_path / "p" / "business" / "val-00000-of-00001.parquet", CMMMU_ROWS)
    from_parquet = cmmmu.load(str(tmp_path / "p"), "val")
    folder = tmp_path / "j"
    (folder / "images").mkdir(parents=True)
    lines = []
    for row in CMMMU_ROWS:
        (folder / "images" / f"q_{row['id']}.png").write_bytes(row["image_1"]["bytes"])
        entry = {key: row[key] for key in ("type", "question", "answer", "category")} | {"id": int(row["id"])}
        lines.append(
            json.dumps(
                entry
                | {"img_list": [f"q_{row['id']}.png"]}
                | {k: v for k, v in row.items() if k.startswith("option") and v}
            )
        )
    (folder / "val.jsonl").write_text("\n".join(lines))
    from_lines = cmmmu.load(str(folder), "val")
    for item, other in zip(from_parquet, from_lines, strict=True):
        assert (item.id, item.question_type, item.gold, item.options, item.prompt) == (
            other.id,
            other.question_type,
            other.gold,
            other.options,
            other.prompt,
        )
        assert item.images[0].read() == other.images[0].read()
    assert from_parquet[0].prompt.endswith(
        "问题：看<图片 1>。\n选项：\n(A) 选1\n(B) 选2\n(C) 选3\n(D) 选4\n\n正确答案：\n"
    )
    assert from_parquet[1].prompt.endswith("问题：看<图片 1>。\n正确答案：\n")
    (folder / "images" / "q_2.png").unlink()
    with pytest.raises(ValueError, match=r"'?2'?: its image q_2.png is nowhere"):
        cmmmu.load(str(folder), "val")


def test_cmmmu_reads_the_official_folders_whose_test_split_has_no_answers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Six images in the order of a list, a name that is none of them, suffixes in capitals, options' keys missing."""
    for split in ("val", "test"):
        (tmp_path / f"cmmmu-data-{split}" / "business").mkdir(parents=True)
    folder = tmp_path / "cmmmu-data-test" / "business"
    names = [f"a_{number}.PNG" for number in range(1, 7)]
    for name in names:
        Image.new("RGB", (4, 4)).save(folder / name)
    choice = {"id": 7, "type": "选择", "question": '看<img="a_6.PNG">与<img="gone.png">', "category": "商业"}
    choice |= {f"option{number}": f'<img="a_{number}.PNG">' for number in range(1, 5)} | {"img_list": names}
    blank = {"id": 8, "type": "填空", "question": "几？", "category": "商业", "img_list": []}
    (folder / "business.jsonl").write_text("\n".join(map(json.dumps, (choice, blank))))
    val = tmp_path / "cmmmu-data-val" / "business" / "business.jsonl"
    val.write_text(json.dumps(blank | {"id": 9, "answer": "3"}))

    first, second = cmmmu.load(str(tmp_path), "test")
    shown = [part["image"].name for part in first.content() if part["type"] == "image"]
    assert shown == ["a_5.PNG", "a_6.PNG", "a_1.PNG", "a_2.PNG", "a_3.PNG", "a_4.PNG"]
    assert '看<图片 6>与<img="gone.png">' in first.prompt and "(D) <图片 4>\n" in first.prompt
    assert (first.gold, second.gold, second.question_type) == ("", "", "blank")
    assert "1 of 2 questions speak of an image that their row does not have" in caplog.text and ": 7" in caplog.text
    assert [question.id for question in cmmmu.load(str(tmp_path), "val")] == ["9"]
    predictions = tmp_path / "p.jsonl"
    predictions.write_text(
        "\n".join(json.dumps({"id": i, "type": t, "response": "A"}) for i, t in ((7, "选择"), (8, "填空")))
    )
    with pytest.raises(ValueError, match="2 of 2 answered questions have no public answer, 7 first"):
        run_cli("score", "cmmmu", "--predictions", str(predictions), "--answers", str(tmp_path), "--split", "test")
    val.write_text("\n")
    with pytest.raises(ValueError, match="The data has no questions of cmmmu's split val"):
        run_cli("cmmmu", "--data", str(tmp_path), "--out", str(tmp_path / "out"))
    val.write_text(json.dumps(blank))
    with pytest.raises(ValueError, match="question 8: it has no answer"):
        cmmmu.load(str(tmp_path), "val")


@with_reference
def test_cmmmu_prompts_are_the_authors(tmp_path: Path) -> None:
    raw = (REFERENCE / "cmmmu" / "sample_raw_records.jsonl").read_text(encoding="utf-8")
    expected = json.loads((REFERENCE / "cmmmu" / "expected_prompts.json").read_text(encoding="utf-8"))
    (tmp_path / "val.jsonl").write_text(raw, encoding="utf-8")
    for line in raw.splitlines():
        for name in json.loads(line)["img_list"]:
            Image.new("RGB", (4, 4)).save(tmp_path / name)
    questions = {question.id: question for question in cmmmu.load(str(tmp_path), "val")}
    assert len(questions) == len(expected) == 9
    for entry in expected:
        question = questions[str(entry["id"])]
        assert question.prompt == entry["prompt"]
        files = json.loads(next(line for line in raw.splitlines() if json.loads(line)["id"] == entry["id"]))["img_list"]
        shown = [part["image"].name for part in question.content() if part["type"] == "image"]
        marked = [files[int(marker.strip("<图片 >")) - 1] for marker in entry["image_order"]]
        assert shown[-len(marked) :] == marked if marked else True
