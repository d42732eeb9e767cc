"""Nano's images and questions: true, unambiguous, reproducible, and the test kept out of training."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from matplotlib import get_data_path
from PIL import Image
from sklearn.svm import SVC

from train.nano.data import shards
from train.nano.data.art import Art, Drawing
from train.nano.data.compose import NUM_TEST_DIGITS, Composer, _digits
from train.nano.data.labels import FLAGS, LABEL_IDS, LANGS, THINGS, UNKNOWN
from train.nano.data.layout import direction
from train.nano.data.packages import Split
from train.nano.data.sample import CATEGORIES, Sample, dense_labels
from train.nano.data.unknown import UNKNOWN_STYLES, _test_photos, _training_photos, photo
from train.nano.measure import heldout
from train.nano.measure.evaluate import is_correct
from train.nano.measure.heldout import write_cmmmu, write_mmmu
from train.nano.measure.page import write_pages
from train.nano.text import dialogue
from train.nano.text.choices import choice_prompt, with_image
from train.nano.text.mosaic import SIGN_IDS, random_truth, to_cells
from train.nano.text.wording import noun


def _drawings(colour: tuple[int, int, int, int]) -> dict[str, list[Drawing]]:
    pixels = np.full((24, 32, 4), colour, dtype=np.uint8)
    labels = [f"thing {key}" for key in THINGS] + [f"flag {key}" for key in FLAGS] + [UNKNOWN]
    return {label: [Drawing("made up", pixels)] for label in labels}


@pytest.fixture(scope="module")
def composer() -> Composer:
    fonts = sorted(Path(get_data_path(), "fonts", "ttf").glob("DejaVuSans*.ttf"))
    art = Art(_drawings((200, 30, 30, 255)), _drawings((30, 200, 30, 255)), {"train": fonts[:2], "test": fonts[2:3]})
    return Composer(art)


@pytest.mark.parametrize("split", ["train", "test"])
def test_each_split_draws_from_its_own_artwork_only(composer: Composer, split: str) -> None:
    other = {"train": "test", "test": "train"}[split]
    fonts = {split: composer.art.fonts[split], other: []}
    only = Art(composer.art.train if split == "train" else {}, composer.art.heldout if split == "test" else {}, fonts)
    for seed in range(10):
        for category in CATEGORIES:
            Composer(only).compose(np.random.default_rng(seed), category, 64, split)
    with pytest.raises(ValueError, match="incomplete"):
        Composer(only).compose(np.random.default_rng(0), "thing", 64, other)


def test_dense_labels_name_what_lies_at_a_point(composer: Composer) -> None:
    for seed in range(20):
        sample = composer.compose(np.random.default_rng(seed), CATEGORIES[seed % len(CATEGORIES)], 112)
        labels = dense_labels(sample, 28, sub=2)
        for item in sample.truth.items:
            rows, columns = np.nonzero(labels == LABEL_IDS[item.label])
            same = [other.box for other in sample.truth.items if other.label == item.label]
            for y, x in zip((rows + 0.5) / 56, (columns + 0.5) / 56):
                assert any(x0 <= x < x1 and y0 <= y < y1 for x0, y0, x1, y1 in same)


def test_places_and_counts_that_are_asked_for_are_true(composer: Composer) -> None:
    num_places = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        truth = composer.compose(rng, "scene", 64).truth
        for qa in dialogue.all_questions(rng, truth, "en"):
            if qa.topic == "count":
                assert qa.core == ("no", "one", "two", "three", "four", "five")[len(truth.items)]
            if qa.topic in ("left", "right", "above", "below"):
                by_name = {noun(item, "en"): item for item in truth.items}
                subject = next(name for name in sorted(by_name, key=len, reverse=True) if f"the {name}" in qa.question)
                assert direction(by_name[qa.core], by_name[subject]) == qa.topic, (qa, truth)
                num_places += 1
    assert num_places > 100


def test_scenes_of_more_than_five_items_are_large_and_for_training_only(composer: Composer) -> None:
    def most(size_px: int, split: Split) -> int:
        rng = np.random.default_rng(0)
        return max(len(composer.compose(rng, "scene", size_px, split).truth.items) for _ in range(60))

    assert most(448, "train") == 9
    assert most(448, "test") == most(224, "train") == 5


def test_conversations_alternate_and_mark_their_images(composer: Composer) -> None:
    for seed in range(40):
        rng = np.random.default_rng(seed)
        sample = composer.pair(rng, 64) if seed % 6 == 5 else composer.compose(rng, CATEGORIES[seed % 5], 64)
        turns = dialogue.conversation(rng, sample.truth)
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert sum(turn["value"].count("<image>") for turn in turns) == len(sample.images)
        assert all(turn["value"].strip() and "{" not in turn["value"] for turn in turns)


def test_a_mosaic_shows_each_item_where_it_is() -> None:
    num_words = num_scenes = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        truth = random_truth(rng, dict.fromkeys((*CATEGORIES, "same"), 1 / 6))
        mosaics = to_cells(rng, truth, 8)
        if mosaics is None:
            continue
        assert len(mosaics) == (2 if truth.category == "same" else 1)
        assert all(mosaic.shape == (8, 8) and set(mosaic.flat) <= set(SIGN_IDS) for mosaic in mosaics)
        cells = mosaics[0]
        if truth.category == "word":  # from left to right, whatever the rows
            read = "".join(label.removeprefix("letter ") for label in cells.T.flat if label != "background")
            assert read.upper() == truth.word
            num_words += 1
        elif truth.category == "scene":
            for item in truth.items:
                assert cells[int(item.centre[1] * 8), int(item.centre[0] * 8)] == item.label
            num_scenes += set(map(str, cells.flat)) - {"background"} == {item.label for item in truth.items}
    assert num_words > 30 and num_scenes > 60


def test_choices_hold_the_right_answer_once() -> None:
    for seed in range(60):
        rng = np.random.default_rng(seed)
        truth = random_truth(rng, dict.fromkeys((*CATEGORIES, "same"), 1 / 6))
        qa, options = dialogue.multiple_choice(rng, truth, LANGS[seed % 2])
        assert options["ABCD".index(qa.answer)] == qa.core
        assert len(set(options)) == len(options) >= 2


def test_choice_prompts_are_those_of_the_benchmarks() -> None:
    english = choice_prompt("What is this?", ["dog", "cat"], "en")
    assert (
        english == "What is this?\n(A) dog\n(B) cat\n\nAnswer with the option's letter from the given choices directly."
    )
    chinese = choice_prompt("这是什么？", ["狗", "猫"], "zh")
    assert chinese.endswith("\n\n问题：这是什么？\n选项：\n(A) 狗\n(B) 猫\n\n正确答案：\n")
    turns = [{"from": "human", "value": chinese}, {"from": "gpt", "value": "A"}]
    assert all(with_image(np.random.default_rng(seed), turns)[0]["value"].count("<image>") == 1 for seed in range(9))


def test_shards_are_reproducible_and_readable(
    composer: Composer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tuple(shards.Source(source.folder, 3, source.make) for source in shards.SOURCES)
    monkeypatch.setattr(shards, "SOURCES", small)
    monkeypatch.setattr(shards, "_composer", lambda data_dir: composer)
    for index, source in enumerate(small):
        for folder in ("first", "second"):
            shards._write_shard(tmp_path / folder, index, 0)
        first, second = (shards.shard_path(tmp_path / folder, source, 0) for folder in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()
        samples = list(webdataset.WebDataset(str(first), shardshuffle=False))
        assert [sample["__key__"] for sample in samples] == ["00000000", "00000001", "00000002"]
        for sample in samples:
            assert "txt" in sample or json.loads(sample["json"])["conversations"]
        if source.folder == "chat-448/later":
            user_turns = [turn for turn in json.loads(samples[0]["json"])["conversations"] if turn["from"] == "human"]
            assert (
                "<image>" in user_turns[0]["value"]
                and sum(turn["value"].count("<image>") for turn in user_turns[1:]) == 1
            )
            assert {"0.jpg", "1.jpg"} <= samples[0].keys()


def test_held_out_questions_come_in_the_benchmarks_schemas(composer: Composer, tmp_path: Path) -> None:
    samples = []
    for category in CATEGORIES:
        for seed in range(8):
            samples.append((composer.compose(np.random.default_rng(seed), category, 56, "test"), ()))
    write_mmmu(tmp_path / "mmmu", samples)
    rows = pq.read_table(tmp_path / "mmmu" / "Things" / "validation-00000-of-00001.parquet").to_pylist()
    assert [row["id"] for row in rows] == ["validation_Things_1", "validation_Things_2", "validation_Things_3"]
    assert rows[0]["question_type"] == "multiple-choice" and rows[0]["answer"] in "ABCD"
    assert rows[0]["image_1"]["bytes"].startswith(b"\x89PNG") and rows[0]["image_7"] is None
    write_cmmmu(tmp_path / "cmmmu", samples)
    question_types = set()
    for path in (tmp_path / "cmmmu").glob("*/*.parquet"):
        for row in pq.read_table(path).to_pylist():
            question_types.add(row["type"])
            assert row["image_1_filename"] in row["question"] and row["id"].isdecimal()
            assert (row["option4"] != "") == (
                row["type"] == "选择" and row["option4"] is not None and bool(row["option3"])
            )
    assert question_types == {"选择", "判断", "填空"}


def test_what_has_no_name_is_answered_with_not_sure(composer: Composer) -> None:
    for seed, style in enumerate(UNKNOWN_STYLES * 3):
        rng = np.random.default_rng(seed)
        for split in ("train", "test"):
            sample = composer.unknown(rng, 112, split, style)
            assert sample.image.size == (112, 112) and sample.image.mode == "RGB"
            assert np.asarray(sample.image).std() > 5
            covered = dense_labels(sample, 8) == LABEL_IDS[UNKNOWN]
            assert covered.all() if style != "artwork" else 0 < covered.mean() < 1
        turns = dialogue.conversation(rng, sample.truth)
        assert {turn["value"] for turn in turns[1::2]} <= {"I am not sure.", "我不确定。"}
        cells = to_cells(rng, sample.truth, 8)
        assert cells is not None and len(set(cells[0].flat) - {"background"}) >= 1
    first, second = (composer.unknown(np.random.default_rng(7), 112).image.tobytes() for _ in range(2))
    assert first == second


def test_no_question_gives_away_that_the_image_is_unknown(composer: Composer) -> None:
    """Each that opens a conversation about such an image opens one about an image that nano knows."""

    def openings(sample: Sample) -> set[str]:
        turns = (dialogue.conversation(np.random.default_rng(seed), sample.truth) for seed in range(1500))
        return {conversation[0]["value"] for conversation in turns}

    rng = np.random.default_rng(0)
    known = set().union(*(openings(composer.compose(rng, name, 56)) for name in ("thing", "flag", "digit", "word")))
    unknown = openings(composer.unknown(rng, 56))
    assert unknown <= known and any("Describe" in question for question in unknown)


def test_photographs_of_the_test_are_in_no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    from skimage import data
    from sklearn import datasets

    _test_photos.cache_clear()
    _training_photos.cache_clear()
    rng = np.random.default_rng(0)
    with monkeypatch.context() as patched:
        patched.setattr(datasets, "load_sample_images", lambda: pytest.fail("a photograph of the test"))
        drawn = [photo(rng, 56, "train") for _ in range(40)]
    assert len({image.tobytes() for image in drawn}) == 40
    monkeypatch.setattr(data, "coffee", lambda: pytest.fail("a photograph of the training"))
    assert all(photo(rng, 56, "test").size == (56, 56) for _ in range(20))


def test_held_out_questions_ask_about_unknown_images_last(composer: Composer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("all_test_samples", "all_test_digits"):
        monkeypatch.setattr(Composer, name, lambda self, size_px: iter(()))
    monkeypatch.setattr(heldout, "SIZE_PX", 56)
    categories = [sample.truth.category for sample, _ in heldout.heldout_samples(composer)]
    assert categories[-120:] == ["unknown"] * 120 and "unknown" not in categories[:-120]
    assert is_correct("unknown", "I am not sure", ["I am not sure."]) and not is_correct(
        "unknown", "It is a dog.", ["I am not sure."]
    )


def test_scoring_ignores_case_and_end_marks_only() -> None:
    assert is_correct("things", " it is a dog ", ["It is a dog."])
    assert not is_correct("things", "It is a hot dog.", ["It is a dog."])
    assert is_correct("same", "No, one shows a cat and the other a dog.", ["No, one shows a pig and the other a fox."])
    assert not is_correct("same", "Yes, both show a pig.", ["No, one shows a pig and the other a fox."])


def test_the_pages_of_answers_hold_their_images_by_skill_and_escape_all_text(tmp_path: Path) -> None:
    Image.new("RGB", (900, 900), "red").save(tmp_path / "a.png")
    row = {"skill": "things", "lang": "en", "images": ["a.png"], "question": "<b>?", "answer": "<i>"}
    row |= {"accepted": ['"x" & y'], "right": False}
    rows = [
        row,
        row | {"answer": "x", "right": True, "lang": "zh"},
        row
        | {"skill": "words", "images": ["a.png"] * 2, "answer": "我不确定。"}
        | {"otherwise": "<u>", "otherwise_right": True},
    ]
    index = write_pages(tmp_path / "pages", "my <model>", rows, tmp_path)
    page = (tmp_path / "pages" / "things.html").read_text(encoding="utf-8")
    assert page.count("<article>") == 1 and page.count('src="data:image/jpeg;base64,') == 1 and len(page) < 10_000
    assert "<b>" not in page and "<i>" not in page and "<model>" not in page and page.count("&lt;b&gt;?") == 2
    assert "<dd class=wrong>&lt;i&gt;<small>expected: &quot;x&quot; &amp; y</small></dd>" in page
    assert "<dd class=right>x</dd>" in page and "50.0% of 2 answers right" in page
    table = index.read_text(encoding="utf-8")
    for cells in (
        'things.html">things</a></td><td>2</td><td>0.0%</td><td>100.0%</td><td>0.0%</td><td>0.0%</td>',
        "<td>1</td><td>0.0%</td><td>–</td><td>100.0%</td><td>100.0%</td>",
    ):
        assert cells in table
    words = (tmp_path / "pages" / "words.html").read_text(encoding="utf-8")
    assert words.count("<img") == 2 and "<small>otherwise: &lt;u&gt;</small>" in words


def test_a_page_shows_images_from_the_whole_of_a_long_skill(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    row = {"skill": "flags", "lang": "en", "question": "?", "answer": "x", "accepted": ["x"], "right": True}
    for number in range(400):
        (tmp_path / f"{number}.png").symlink_to("a.png")
    rows = [row | {"images": [f"{number}.png"], "question": f"<{number}>"} for number in range(400)]
    write_pages(tmp_path / "pages", "m", rows, tmp_path)
    page = (tmp_path / "pages" / "flags.html").read_text(encoding="utf-8")
    assert 100 <= page.count("<article>") <= 160 and "&lt;0&gt;" in page and "&lt;399&gt;" in page


def test_held_out_digits_are_harder_than_a_random_split() -> None:
    """docs/nano.md: they are by other people. A support vector machine on the 8 x 8 pixels reads 95.8% of them."""
    digits = sorted(_digits().items(), key=lambda entry: entry[0][0] == "test")  # those of the test last
    pixels = np.stack([np.asarray(image).ravel() for _, images in digits for image in images])
    values = np.array([value for (_, value), images in digits for _ in images])
    order = np.random.default_rng(0).permutation(len(values))
    accuracies = []
    for split in (np.arange(len(values)), order):
        known, held_out = split[:-NUM_TEST_DIGITS], split[-NUM_TEST_DIGITS:]
        accuracies.append(SVC(C=10).fit(pixels[known], values[known]).score(pixels[held_out], values[held_out]))
    assert accuracies[0] == pytest.approx(0.958, abs=0.003) and accuracies[1] > 0.975
