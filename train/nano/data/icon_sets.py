"""Sets of SVG icons in npm archives: one JSON file of all (Iconify), or a file for each."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from train.nano.data.packages import Package, fetch, read_members


class IconifySet:
    """An iconify package's `icons.json`: icon name to SVG text."""

    def __init__(self, package: Package, npm_dir: Path) -> None:
        content = json.loads(read_members(fetch(package, npm_dir), ["icons.json"])["icons.json"])
        self.icons: dict[str, dict[str, Any]] = content["icons"]
        self.aliases: dict[str, dict[str, Any]] = content.get("aliases", {})
        self.size = (content.get("width", 16), content.get("height", 16))

    def svgs(self, names: Iterable[str]) -> list[str]:
        """SVGs of those names that the set has, in order, each drawing once."""
        resolved = [self.aliases.get(name, {}).get("parent", name) for name in names]
        return [self._svg(self.icons[name]) for name in dict.fromkeys(resolved) if name in self.icons]

    def _svg(self, icon: dict[str, Any]) -> str:
        width, height = icon.get("width", self.size[0]), icon.get("height", self.size[1])
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}" width="{width}" height="{height}">'
            f"{icon['body']}</svg>"
        )


class SvgFiles:
    """A package with an SVG file for each icon, whose name is the file's path without its ending."""

    def __init__(self, package: Package, npm_dir: Path, names: Iterable[str]) -> None:
        files = [f"{name}.svg" for name in names]
        members = read_members(fetch(package, npm_dir), files)
        self.texts = {name.removesuffix(".svg"): content.decode() for name, content in members.items()}

    def svgs(self, names: Iterable[str]) -> list[str]:
        """SVGs of those names that the package has, in order."""
        return [self.texts[name] for name in names if name in self.texts]
