"""Badges of the README, from the metadata of the package: `python docs/badges.py` writes them anew."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "badges"
# The width of a letter in pixels at this font size, on average.
LETTER = 6.6

SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="20" role="img" aria-label="{left}: {right}">
<title>{left}: {right}</title>
<rect width="{split:.0f}" height="20" rx="3" fill="#555"/>
<rect x="{split:.0f}" width="{rest:.0f}" height="20" rx="3" fill="#1f6fb2"/>
<g fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" text-anchor="middle">
<text x="{left_at:.0f}" y="14">{left}</text>
<text x="{right_at:.0f}" y="14">{right}</text>
</g>
</svg>
"""


def svg(left: str, right: str) -> str:
    """A badge with two fields."""
    split, rest = LETTER * len(left) + 12, LETTER * len(right) + 12
    return SVG.format(
        left=left,
        right=right,
        split=split,
        rest=rest,
        width=split + rest,
        left_at=split / 2,
        right_at=split + rest / 2,
    )


def badges() -> dict[str, str]:
    """File name -> content, from pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text()

    def found(pattern: str) -> tuple[str, ...]:
        match = re.search(pattern, text)
        if match is None:
            raise ValueError(f"pyproject.toml: expected {pattern!r}, got no match")
        return match.groups()

    torch, pyro = found(r"torch>=([\d.]+)")[0], found(r"pyro-ppl>=([\d.]+)")[0]
    least, below = found(r'requires-python = ">=3\.(\d+),<3\.(\d+)"')
    return {
        "python.svg": svg("python", f"3.{least} to 3.{int(below) - 1}"),
        "torch.svg": svg("torch", f"{torch} or later"),
        "pyro.svg": svg("pyro", f"{pyro} or later"),
        "license.svg": svg("license", found(r'license = "([^"]+)"')[0]),
    }


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, content in badges().items():
        (FOLDER / name).write_text(content)
