"""Which things and flags nano knows, and the making of `classes.tsv` from emojibase's English and Chinese labels.

`classes.tsv` is kept in the repository, so that the label space is fixed and needs no network; run `write_classes`
again after editing the lists here.
"""

import json
import unicodedata
from pathlib import Path

from train.nano.data.packages import EMOJIBASE, fetch, read_members

# One thing per entry: icon name[+further drawings of the same thing][=English name][/Chinese name].
# Names left out are emojibase's label without "face"; "_" stands for a space. Further drawings are for training only.
THINGS = """
dog-face+dog  cat-face+cat/猫  mouse-face+mouse/老鼠  rabbit-face+rabbit/兔子  fox/狐狸  bear/熊  panda  koala
tiger-face+tiger/老虎  lion/狮子  cow-face+cow/奶牛  pig-face+pig/猪  frog  monkey-face+monkey/猴子
rooster/公鸡  penguin  baby-chick+front-facing-baby-chick=chick/小鸡  duck/鸭子  owl/猫头鹰
horse-face+horse/马  honeybee=bee/蜜蜂  butterfly/蝴蝶  snail/蜗牛  lady-beetle=ladybug/瓢虫  spider/蜘蛛
turtle/乌龟  snake/蛇  octopus/章鱼  crab/螃蟹  tropical-fish+fish=fish/鱼  spouting-whale+whale=whale/鲸鱼
crocodile/鳄鱼  elephant/大象  two-hump-camel+camel=camel/骆驼  grapes=grapes/葡萄  watermelon
tangerine=orange/橙子  lemon/柠檬  banana  pineapple  red-apple+green-apple=apple/苹果  pear/梨
cherries=cherries/樱桃  strawberry/草莓  kiwi-fruit=kiwi  tomato  avocado/牛油果  eggplant/茄子  carrot/胡萝卜
ear-of-corn=corn/玉米  hot-pepper=chili/辣椒  mushroom/蘑菇  bread/面包  croissant/牛角面包
cheese-wedge=cheese/奶酪  hamburger/汉堡  pizza/披萨  hot-dog/热狗  egg+cooking=egg/鸡蛋  popcorn/爆米花
sushi/寿司  soft-ice-cream+ice-cream=ice_cream/冰淇淋  doughnut=donut/甜甜圈  cookie/饼干
birthday-cake+shortcake=cake/蛋糕  lollipop/棒棒糖  hot-beverage=coffee/咖啡  beer-mug=beer/啤酒
wine-glass=wine/红酒  glass-of-milk=milk/牛奶  rose/玫瑰  sunflower/向日葵  tulip/郁金香  cactus/仙人掌
palm-tree/棕榈树  four-leaf-clover+shamrock=clover/三叶草  evergreen-tree+christmas-tree=pine_tree/松树
maple-leaf/枫叶  automobile+oncoming-automobile=car/汽车  bus+oncoming-bus/公交车  ambulance/救护车
fire-engine=fire_truck/消防车  delivery-truck+articulated-lorry=truck/卡车  tractor/拖拉机  motorcycle/摩托车
bicycle/自行车  locomotive=train/火车  airplane+small-airplane/飞机  helicopter/直升机  rocket/火箭
ship+passenger-ship/轮船  sailboat/帆船  house+house-with-garden/房子  castle/城堡  tent+camping/帐篷
alarm-clock/闹钟  hourglass-done+hourglass-not-done=hourglass/沙漏  sun+sun-with-face/太阳
crescent-moon=moon/月亮  rainbow/彩虹  umbrella+umbrella-with-rain-drops/雨伞  snowman+snowman-without-snow/雪人
fire/火  balloon/气球  wrapped-gift=gift/礼物  trophy/奖杯  soccer-ball/足球  basketball/篮球  crown/皇冠
ring/戒指  bell/铃铛  guitar/吉他  violin/小提琴  trumpet/小号  drum/鼓  mobile-phone=phone/手机
laptop/电脑  television/电视  camera+camera-with-flash/相机  light-bulb/灯泡
closed-book+green-book+blue-book+orange-book=book/书  envelope/信封  pencil/铅笔  locked+unlocked=lock/锁
key/钥匙  hammer/锤子  bomb/炸弹  gear/齿轮  t-shirt/T恤  dress/连衣裙  top-hat/礼帽  candle/蜡烛
anchor/锚  toilet/马桶
"""
UNCOUNTABLE = {"bread", "corn", "cheese", "popcorn", "rice", "sushi", "fire", "coffee", "beer", "wine", "milk"}
PLURAL = {"grapes", "cherries"}

# Flags drawn alike: the territory on the right shares the class of the country on the left.
SHARED_FLAGS = {
    "fr": "bl cp gf gp mf pm re wf yt",
    "us": "um",
    "gb": "sh",
    "au": "hm",
    "no": "bv sj",
    "es": "ea",
    "nl": "bq",
    "io": "dg",
}
# Classes of their own whose drawings differ by proportions or a shade only: either name is accepted.
ALIKE_FLAGS = {"id": "mc", "mc": "id", "td": "ro", "ro": "td"}
NOT_DRAWN = {"cq"}  # Sark: absent from the training artwork
_CODES = {"ac": "sh-ac", "ta": "sh-ta", "gbeng": "gb-eng", "gbsct": "gb-sct", "gbwls": "gb-wls"}
_FLAG_NAMES = {  # short names in place of emojibase's
    "ae": ("United Arab Emirates", "阿联酋"),
    "ba": ("Bosnia and Herzegovina", "波黑"),
    "cc": ("Cocos Islands", "科科斯群岛"),
    "cd": ("DR Congo", "刚果（金）"),
    "cg": ("Congo", "刚果（布）"),
    "ci": ("Ivory Coast", "科特迪瓦"),
    "gs": ("South Georgia", "南乔治亚"),
    "hk": ("Hong Kong", "香港"),
    "mm": ("Myanmar", "缅甸"),
    "mo": ("Macao", "澳门"),
    "ps": ("Palestine", "巴勒斯坦"),
    "sh-ta": ("Tristan da Cunha", "特里斯坦达库尼亚"),
    "tr": ("Turkey", "土耳其"),
    "vi": ("US Virgin Islands", "美属维尔京群岛"),
}
_THE_ENDINGS = (
    "Islands", "Territory", "Territories", "Republic", "Kingdom", "Emirates", "States", "Union", "Nations"
)  # fmt: skip
_THE_NAMES = {"Netherlands", "Philippines", "Bahamas", "Maldives", "Isle of Man"}


def write_classes(path: Path, npm_dir: Path) -> None:
    """Write `classes.tsv`: kind, key, English, article, Chinese, icon names, other accepted keys."""
    members = read_members(fetch(EMOJIBASE, npm_dir), ["en/compact.json", "zh/compact.json"])
    english, chinese = (
        {entry["hexcode"]: entry["label"] for entry in json.loads(members[f"{lang}/compact.json"])}
        for lang in ("en", "zh")
    )
    rows = _thing_rows(english, chinese) + _flag_rows(english, chinese)
    header = "kind\tkey\tenglish\tarticle\tchinese\ticons\tshares\talike"
    path.write_text("\n".join([header, *("\t".join(row) for row in rows)]) + "\n", encoding="utf-8")


def slug(label: str) -> str:
    """Icon name of an English label, as iconify spells it."""
    plain = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode().lower().replace(".", "")
    return "-".join("".join(c if c.isalnum() else " " for c in plain).split())


def _thing_rows(english: dict[str, str], chinese: dict[str, str]) -> list[list[str]]:
    by_slug = {slug(label): code for code, label in english.items()}
    rows = []
    for entry in THINGS.split():
        left, _, zh = entry.partition("/")
        icons, _, en = left.partition("=")
        code = by_slug[icons.split("+")[0]]
        en = en.replace("_", " ") or english[code].lower().removesuffix(" face")
        zh = zh or chinese[code].removesuffix("脸")
        rows.append(["thing", en, en, _article(en), zh, icons.replace("+", " "), "", ""])
    return rows


def _article(name: str) -> str:
    if name in UNCOUNTABLE or name in PLURAL:
        return ""
    return "an" if name[0] in "aeio" or name in {"umbrella", "hourglass"} else "a"


def _flag_rows(english: dict[str, str], chinese: dict[str, str]) -> list[list[str]]:
    dropped = NOT_DRAWN | {code for codes in SHARED_FLAGS.values() for code in codes.split()}
    rows = []
    for hexcode, label in english.items():
        if not label.startswith("flag: ") or (code := _country_code(hexcode)) in dropped:
            continue
        plain = label.removeprefix("flag: ")
        zh = chinese[hexcode].removeprefix("旗: ")
        en, zh = _FLAG_NAMES.get(code, (_plain_english(plain), zh))
        the = "the" if en.endswith(_THE_ENDINGS) or en in _THE_NAMES else ""
        slugs = dict.fromkeys((slug(plain), slug(en), slug(plain.replace("&", "and"))))
        icons = " ".join(f"{prefix}{name}" for name in slugs for prefix in ("flag-for-", "flag-for-flag-", "flag-"))
        rows.append(["flag", code, en, the, zh, icons, SHARED_FLAGS.get(code, ""), ALIKE_FLAGS.get(code, "")])
    return rows


def _country_code(hexcode: str) -> str:
    parts = [int(part, 16) for part in hexcode.split("-")]
    if len(parts) == 2:
        code = "".join(chr(part - 0x1F1E6 + ord("a")) for part in parts)
    else:
        code = "".join(chr(part - 0xE0000) for part in parts[1:-1])
    return _CODES.get(code, code)


def _plain_english(label: str) -> str:
    """An ASCII country name: "St. Kitts & Nevis" becomes "Saint Kitts and Nevis"."""
    ascii_label = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode()
    return ascii_label.replace("&", "and").replace("St. ", "Saint ").replace("U.S.", "US")
