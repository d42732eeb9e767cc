"""The bundled model: it is here, it is small, and it answers about images that it was never trained on."""

from __future__ import annotations

from pathlib import Path

import pytest

import yi_vl
from train.nano.measure.evaluate import add_other_answers
from yi_vl.predict import YiVL

pytestmark = pytest.mark.core

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
MAX_BYTES = 25_000_000


@pytest.fixture(scope="module")
def nano() -> YiVL:
    return yi_vl.load()


def test_its_weights_are_small() -> None:
    assert (ROOT / "yi_vl" / "nano" / "model.safetensors").stat().st_size <= MAX_BYTES


@pytest.mark.parametrize(
    ("image", "question", "answer"),
    [
        ("dog.png", "What is in this image?", "It is a dog."),
        ("dog.png", "图片里是什么？", "这是狗。"),
        ("brazil.png", "Which flag is this?", "It is the flag of Brazil."),
        ("brazil.png", "这是哪国的国旗？", "这是巴西的国旗。"),
        ("word.png", "What word is written here?", 'It says "WEEK".'),
        ("digit.png", "这是数字几？", "这是数字7。"),
        ("scene.png", "一共有几个物体？", "有五个。"),
        ("umbrella.png", "What is below the fire truck?", "It is the umbrella."),
        ("flower.jpg", "What do you see?", "I am not sure."),
    ],
)
def test_it_answers_about_new_images(nano: YiVL, image: str, question: str, answer: str) -> None:
    assert nano.predict(IMAGES / image, question) == answer


def test_what_not_being_sure_costs_is_measured_by_the_answer_it_gives_otherwise(nano: YiVL) -> None:
    row = {"skill": "things", "images": ["images/flower.jpg"], "question": "What do you see?", "right": False}
    unsure = [
        row | {"answer": "I am not sure.", "accepted": ["It is a flower."]},
        row | {"answer": "我不确定。", "accepted": ["这是花。"], "question": "你看到了什么？"},
    ]
    others = [row | {"answer": "It is a dog."}, row | {"answer": "I am not sure.", "right": True}]
    add_other_answers(nano, [*unsure, *others], IMAGES.parent)
    assert unsure[0]["otherwise"].startswith("It is ") and unsure[1]["otherwise"].startswith("这是")
    assert not any(each["otherwise_right"] for each in unsure) and "otherwise" not in others[0] | others[1]
    again = unsure[0] | {"accepted": [unsure[0]["otherwise"]]}
    add_other_answers(nano, [again], IMAGES.parent)
    assert again["otherwise_right"]


def test_it_tells_two_images_apart(nano: YiVL) -> None:
    pair = [IMAGES / "cherries.png", IMAGES / "spider.png"]
    assert nano.predict(pair, "Do both images show the same thing?") == "No, one shows cherries and the other a spider."
    assert nano.predict(pair, "两张图是同一种东西吗？") == "不是，一张是樱桃，另一张是蜘蛛。"


def test_it_stops_by_itself(nano: YiVL) -> None:
    answer = nano.predict(IMAGES / "dog.png", "What is this?", max_new_tokens=200)
    assert 0 < len(answer) < 100 and "#" not in answer


def test_one_by_one_and_in_a_batch_it_says_the_same(nano: YiVL) -> None:
    requests = [
        (IMAGES / "scene.png", "How many items are there?"),
        (None, "Hello!"),
        ([IMAGES / "dog.png", IMAGES / "brazil.png"], "Do both images show the same?"),
        (IMAGES / "brazil.png", "这是什么旗？"),
    ]
    assert nano.predict_batch(requests) == [nano.predict(*request) for request in requests]


def test_a_conversation_remembers_the_image(nano: YiVL) -> None:
    chat = nano.chat()
    chat.ask("What is in this image?", [IMAGES / "dog.png"])
    assert chat.ask("用中文怎么说？") == "这是狗。"


def test_a_later_question_is_about_the_image_that_comes_with_it(nano: YiVL) -> None:
    chat = nano.chat()
    assert chat.ask("What is this?", [IMAGES / "dog.png"]) == "It is a dog."
    assert chat.ask("这是哪国的国旗？", [IMAGES / "brazil.png"]) == "这是巴西的国旗。"
    assert chat.ask("What word is written here?", [IMAGES / "word.png"]) == 'It says "WEEK".'
