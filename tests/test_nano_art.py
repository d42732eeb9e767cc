"""Nano's artwork cache: made without a network, test artwork kept apart, countries not taken for languages."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("resvg_py")

from train.nano.data import art, packages, paint
from train.nano.data.labels import FLAGS, THINGS
from train.nano.data.unknown import unknown_icons


def _icon(colour: str) -> dict[str, str]:
    return {"body": f'<rect x="4" y="4" width="16" height="8" fill="{colour}"/>'}


def _svg(colour: str) -> str:
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24">{_icon(colour)["body"]}</svg>'


def _write_archive(folder: Path, package: packages.Package, members: dict[str, bytes]) -> None:
    with tarfile.open(folder / package.archive, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of made-up archives under the pinned names: red training drawings, blue ones for the test."""
    folder = tmp_path_factory.mktemp("nano")
    npm = folder / "npm"
    npm.mkdir()
    for name, package in (packages.THING_ART | packages.MORE_THING_ART | packages.FLAG_ART).items():
        colour = "#ff0000" if package.split == "train" else "#0000ff"
        icons = {icon: _icon(colour) for named in THINGS.values() for icon in named.icons}
        icons |= {f"flag-for-{art_name}": _icon(colour) for art_name in ("japan", "ireland", "argentina")}
        icons |= {"jp": _icon(colour), "jp-4x3": _icon(colour), "jp-1x1": _icon(colour)}
        icons |= {icon: _icon("currentColor") for names in art.read_icons().get(name, {}).values() for icon in names}
        if name == "circle-flags":  # two letters may be a language's: those drawings are green
            icons = {key: _icon("#00ff00" if key in ("ie", "io", "la", "ar") else colour) for key in FLAGS}
            icons |= {key: _icon(colour) for key in ("lang-ga", "dg", "lo")}
        if name == "emojione-monotone":
            icons["flag-for-japan"] = _icon("currentColor")
        if name == "noto":
            icons[next(iter(THINGS.values())).icons[0]] = {"body": "<rect"}
        icons |= {icon: _icon(colour) for split in ("train", "test") for icon in unknown_icons(split)}  # type: ignore[arg-type]
        members = {"icons.json": json.dumps({"width": 24, "height": 24, "icons": icons}).encode()}
        if name == "country-flag-icons":  # files; one drawing is the held-out one, in almost the same blue
            files = {"3x2/JP": "#0000ee", "1x1/JP": colour, "1x1/GB-ENG": colour, "3x2/AC": colour}
            members = {f"{file}.svg": _svg(ink).encode() for file, ink in files.items()}
        _write_archive(npm, package, members)
    for name, package in packages.FONTS.items():
        _write_archive(npm, package, {f"files/{name}-latin-400-normal.woff2": b"", "../outside": b""})
    art.render_art(folder)
    return folder


def test_splits_come_from_their_own_packages(data_dir: Path) -> None:
    loaded = art.load_art(data_dir)
    for drawings, channel in ((loaded.train, 0), (loaded.heldout, 2)):
        for label, drawn in drawings.items():
            coloured = [drawing for drawing in drawn if not drawing.is_glyph]
            assert coloured and all(drawing.pixels[..., channel].min() == 255 for drawing in coloured), label
    assert not {path.name for path in loaded.fonts["train"]} & {path.name for path in loaded.fonts["test"]}
    num_train, num_test = (len(loaded.fonts[split]) for split in ("train", "test"))  # type: ignore[index]
    text = (Path(art.__file__).parents[3] / "docs/nano.md").read_text(encoding="utf-8")
    assert num_test == 11 and f" {num_test} of the {num_train + num_test} fonts" in text
    assert not any(drawing.is_glyph for drawn in loaded.heldout.values() for drawing in drawn)
    known = {f"thing {key}" for key in THINGS} | {f"flag {key}" for key in FLAGS}
    assert set(loaded.heldout) == known | {"unknown"}
    assert len(loaded.heldout["unknown"]) == len(unknown_icons("test"))  # of other classes than those of training


def test_no_unknown_class_is_in_both_splits_or_is_known() -> None:
    train, test = (set(unknown_icons(split)) for split in ("train", "test"))  # type: ignore[arg-type]
    assert len(train) > 100 and len(test) > 50 and not train & test
    assert not (train | test) & {icon for named in THINGS.values() for icon in named.icons}


def test_an_older_cache_is_rendered_again(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = json.loads((data_dir / "art.json").read_text())
    (data_dir / "art.json").write_text(json.dumps({"drawings": [], "num_failed": 0}))
    loaded = art.load_art(data_dir)
    assert json.loads((data_dir / "art.json").read_text()) == index and "unknown" in loaded.train
    monkeypatch.setattr(art, "render_art", lambda folder: pytest.fail("rendered although it is new"))
    art.load_art(data_dir)


def test_drawings_are_cropped_to_their_ink(data_dir: Path) -> None:
    pixels = art.load_art(data_dir).heldout["flag jp"][0].pixels
    assert pixels.shape == (art.LONGER_SIDE_PX // 3, art.LONGER_SIDE_PX * 2 // 3, 4)
    assert pixels[..., 3].min() == 255


def test_a_drawing_that_does_not_render_is_left_out_and_counted(data_dir: Path) -> None:
    first = next(iter(THINGS.values()))
    assert json.loads((data_dir / "art.json").read_text())["num_failed"] == 1
    styles = [drawing.style for drawing in art.load_art(data_dir).train[f"thing {first.key}"]]
    assert styles.count("noto") == styles.count("noto-v1") - 1


def test_flags_of_a_set_of_files_are_found_by_code(data_dir: Path) -> None:
    train = art.load_art(data_dir).train
    styles = {key: [drawing.style for drawing in train[f"flag {key}"]] for key in ("jp", "gb-eng", "sh-ac")}
    assert "country-flag-icons-1x1" in styles["jp"]
    assert styles["gb-eng"] == ["country-flag-icons-1x1"] and styles["sh-ac"] == ["country-flag-icons-3x2"]


def test_no_training_drawing_is_nearly_a_held_out_one(data_dir: Path) -> None:
    assert "country-flag-icons-3x2" not in [drawing.style for drawing in art.load_art(data_dir).train["flag jp"]]
    assert json.loads((data_dir / "art.json").read_text())["num_copies"] == 1


def test_a_simplified_flag_keeps_its_layout_in_few_colours() -> None:
    stripes = np.full((90, 120, 4), 255, np.uint8)
    stripes[:45, :, 1:3] = 0
    stripes[40:50, 55:65, :3] = np.random.default_rng(0).integers(0, 256, (10, 10, 3))  # an emblem
    for seed in range(20):
        simple = np.asarray(paint._simplified(np.random.default_rng(seed), Image.fromarray(stripes)))
        assert simple.shape == stripes.shape and (simple[..., 3] == 255).all()
        assert len(np.unique(simple[..., :3].reshape(-1, 3), axis=0)) < 10
        top, bottom = simple[5, 5, :3].astype(int), simple[85, 5, :3].astype(int)
        assert top[0] > top[1:].max() + 150 and bottom.min() > 200


def test_every_package_is_pinned_and_has_a_licence() -> None:
    licences = (Path(art.__file__).parents[1] / "LICENCES.md").read_text(encoding="utf-8")
    for package in packages.PACKAGES:
        row = f"| `{package.name}` | {package.version} | {package.licence} | {package.use} | {package.split} |"
        assert row in licences


def test_a_glyph_is_black_on_the_white_of_what_it_encloses() -> None:
    ring = np.zeros((20, 20, 4), dtype=np.uint8)
    ring[2:18, 2:18, 3] = 255
    ring[6:14, 6:14, 3] = 0
    ring[6, 6, 3] = 51  # antialiased, inside
    ring[1, 5, 3] = 51  # and outside
    filled = art.fill_enclosed(ring)
    assert (filled[0, 0] == 0).all() and (filled[3, 3] == (0, 0, 0, 255)).all() and (filled[10, 10] == 255).all()
    assert (filled[6, 6] == (204, 204, 204, 255)).all() and (filled[1, 5] == (0, 0, 0, 51)).all()


def test_glyphs_are_found_and_coloured(data_dir: Path) -> None:
    train = art.load_art(data_dir).train
    styles = {drawing.style for drawn in train.values() for drawing in drawn if drawing.is_glyph}
    assert styles == set(packages.MORE_THING_ART)  # not the flag of one ink, which is left out
    drawings = train["thing dog"]
    (glyph, *_) = [Image.fromarray(np.asarray(drawing.pixels)) for drawing in drawings if drawing.is_glyph]
    grey = (90, 90, 90)
    colours = {paint.coloured_glyph(np.random.default_rng(seed), glyph, grey).getpixel((9, 9)) for seed in range(30)}
    assert len(colours) > 10 and all(colour[3] == 255 for colour in colours)
    assert all(paint.distance(colour[:3], grey) > 100 for colour in colours)  # it stands out
    ring = Image.fromarray(np.dstack([np.full((9, 9), 255, np.uint8)] * 4))  # all enclosed
    alphas = {paint.coloured_glyph(np.random.default_rng(seed), ring, grey).getpixel((4, 4))[3] for seed in range(30)}
    assert alphas == {0, 255}  # left empty, or filled


def test_icons_of_other_names_are_of_known_things_and_sets() -> None:
    icons = art.read_icons()
    assert set(icons) == set(packages.MORE_THING_ART) and all(icons.values())
    assert {key for names in icons.values() for key in names} <= set(THINGS)
    assert len({key for names in icons.values() for key in names}) > 0.9 * len(THINGS)
