"""The Python blocks of the README and of every page run, in order, one test for each page.

A block that cannot run in a test follows a line `<!-- not run: REASON -->`. Blocks see what earlier blocks of their page define.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^\n]*?) -->\n+)?```python\n(?P<code>.*?)```", re.S
)
# Pages that take less than two seconds of CPU.
FAST = {
    "docs/transforms.md",
    "docs/which_flow.md",
}


def _pages():
    return {
        str(path.relative_to(ROOT)): list(BLOCK.finditer(path.read_text()))
        for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    }


PAGES = {name: blocks for name, blocks in _pages().items() if blocks}
RUN = {name: [b for b in blocks if not b["reason"]] for name, blocks in PAGES.items()}


def _parameters():
    for name, blocks in RUN.items():
        if blocks:
            yield pytest.param(name, id=name, marks=[] if name in FAST else [pytest.mark.slow])


def run_page(name):
    """The names that the blocks of a page define. Each block keeps its line numbers in tracebacks."""
    text = (ROOT / name).read_text()
    names = {"__name__": "__page__"}
    for block in RUN[name]:
        above = "\n" * text[: block.start("code")].count("\n")
        exec(compile(above + block["code"], name, "exec"), names)
    return names


@pytest.mark.parametrize("name", list(_parameters()))
def test_page_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(name)


def test_transforms_of_the_page_keep_the_contract():
    from pyro_flows_ext.testing import check_transform

    names = run_page("docs/transforms.md")
    check_transform(lambda: names["Shift"](3, context_dim=2), points=[1, 2, 3, 5])
    check_transform(lambda: names["Coupling"](3, transformer=names["Wave"]()), points=[1, 2, 3, 7])


def test_blocks_that_do_not_run_give_a_reason_and_are_few():
    skipped = {n: [b["reason"] for b in blocks if b["reason"]] for n, blocks in PAGES.items()}
    own = {n: reasons for n, reasons in skipped.items() if not n.startswith("docs/coming_from/")}
    assert all(len(reason) > 8 for reasons in skipped.values() for reason in reasons)
    assert sum(map(len, own.values())) <= 6, own
