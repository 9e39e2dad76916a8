"""The page of ten tasks: its counts of lines are right, and no other library needs fewer."""

import re
from pathlib import Path

TEXT = (Path(__file__).parents[2] / "docs" / "coming_from" / "ten_tasks.md").read_text()
OWN = "pyro_flows_ext"
BLOCK = re.compile(r"^\*\*(\w+)\*\*\n\n(?:<!--.*?-->\n)?```python\n(.*?)```", re.M | re.S)


def _counts():
    """Task -> library -> lines of code."""
    counts = {}
    for section in re.split(r"^## ", TEXT, flags=re.M)[1:]:
        blocks = BLOCK.findall(section)
        counts[section.split("\n")[0]] = {
            name: sum(
                bool(line.strip()) and not line.startswith(("import ", "from "))
                for line in code.splitlines()
            )
            for name, code in blocks
        }
    return counts


def test_no_library_needs_fewer_lines():
    counts = _counts()
    assert len(counts) == 10
    for task, lines in counts.items():
        assert len(lines) >= 2, task
        assert lines[OWN] == min(lines.values()), task


def test_the_table_has_these_counts():
    header, *rows = re.findall(r"^\| (.*) \|$", TEXT, re.M)
    libraries = header.split(" | ")[1:]
    table = {}
    for row in rows:
        task, *cells = re.split(r" (?<!\\)\| ", row)
        table[task.replace("\\|", "|")] = {
            library: int(cell)
            for library, cell in zip(libraries, cells, strict=True)
            if cell != "–"
        }
    assert table == _counts()
