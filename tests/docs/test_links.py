"""Relative links in Markdown files and notebooks point to files that exist, and their anchors to headings."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
# Pages that the build writes.
GENERATED = ("reference/", "notebooks/index.md")
SOURCES = [
    *ROOT.glob("*.md"),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "notebooks").glob("*.ipynb")),
]
SOURCES = [p for p in SOURCES if "_build" not in p.parts and p.parent != ROOT / "docs/notebooks"]


def _text(path):
    if path.suffix != ".ipynb":
        # Code holds no links: x[i](y) looks like one.
        return re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(), flags=re.S)
    cells = json.loads(path.read_text())["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def slug(heading):
    """The anchor of a heading, as GitHub and MyST make it."""
    words = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", words).replace(" ", "-")


def _anchors(path):
    return {slug(h) for h in re.findall(r"^#+ (.*)$", path.read_text(), re.M)}


def broken_links(path):
    """The relative links of a file that lead nowhere."""
    broken = []
    for target in LINK.findall(_text(path)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if file.is_relative_to(ROOT / "docs"):
            inside = str(file.relative_to(ROOT / "docs"))
            if inside.startswith(GENERATED):
                continue
            if inside.startswith("notebooks/"):  # copied there by the build
                file = ROOT / inside
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in _anchors(file)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    assert broken_links(path) == []


def test_broken_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A heading\n[a](#a-heading) [b](#another) [c](missing.md) [d](https://pyro.ai)\n"
    )
    assert broken_links(page) == ["#another", "missing.md"]
