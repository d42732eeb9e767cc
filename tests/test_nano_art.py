"""Nano's artwork cache: made without a network, test artwork kept apart, countries not taken for languages."""

import io
import json
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("resvg_py")

from train.nano.data import art, packages
from train.nano.data.labels import FLAGS, THINGS
from train.nano.data.unknown import unknown_icons


def _icon(colour: str) -> dict[str, str]:
    return {"body": f'<rect x="4" y="4" width="16" height="8" fill="{colour}"/>'}


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
    for name, package in (packages.THING_ART | packages.FLAG_ART).items():
        colour = "#ff0000" if package.split == "train" else "#0000ff"
        icons = {icon: _icon(colour) for named in THINGS.values() for icon in named.icons}
        icons |= {f"flag-for-{art_name}": _icon(colour) for art_name in ("japan", "ireland", "argentina")}
        icons |= {"jp-4x3": _icon(colour), "jp-1x1": _icon(colour)}
        if name == "circle-flags":  # two letters may be a language's: those drawings are green
            icons = {key: _icon("#00ff00" if key in ("ie", "io", "la", "ar") else colour) for key in FLAGS}
            icons |= {key: _icon(colour) for key in ("lang-ga", "dg", "lo")}
        if name == "noto":
            icons[next(iter(THINGS.values())).icons[0]] = {"body": "<rect"}
        icons |= {icon: _icon(colour) for split in ("train", "test") for icon in unknown_icons(split)}  # type: ignore[arg-type]
        content = json.dumps({"width": 24, "height": 24, "icons": icons}).encode()
        _write_archive(npm, package, {"icons.json": content})
    for name, package in packages.FONTS.items():
        _write_archive(npm, package, {f"files/{name}-latin-400-normal.woff2": b"", "../outside": b""})
    art.render_art(folder)
    return folder


def test_splits_come_from_their_own_packages(data_dir: Path) -> None:
    loaded = art.load_art(data_dir)
    for drawings, channel in ((loaded.train, 0), (loaded.heldout, 2)):
        for label, drawn in drawings.items():
            assert all(drawing.pixels[..., channel].min() == 255 for drawing in drawn), label
    assert not {path.name for path in loaded.fonts["train"]} & {path.name for path in loaded.fonts["test"]}
    assert len(loaded.fonts["test"]) * 3 >= len(loaded.fonts["train"])
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
    first = f"thing {next(iter(THINGS))}"
    assert json.loads((data_dir / "art.json").read_text())["num_failed"] == 1
    assert "noto" not in [drawing.style for drawing in art.load_art(data_dir).train[first] if drawing.is_primary]


def test_every_package_is_pinned_and_has_a_licence() -> None:
    licences = (Path(art.__file__).parents[1] / "LICENCES.md").read_text(encoding="utf-8")
    for package in packages.PACKAGES:
        row = f"| `{package.name}` | {package.version} | {package.licence} | {package.use} | {package.split} |"
        assert row in licences
