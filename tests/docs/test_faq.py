"""Every heading of the FAQ that quotes a message quotes one that the package has."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import pyro_flows_ext

ROOT = Path(__file__).parents[2]
HOLE = "…"
HEADINGS = re.findall(r"^### (.*)$", (ROOT / "docs" / "faq.md").read_text(), re.M)
QUOTED = [heading for heading in HEADINGS if not heading.endswith("?")]


def _text(node):
    """The text of a string expression, with a hole for each value put into it; None for other expressions."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or HOLE for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _text(node.left), _text(node.right)
        return None if left is None and right is None else (left or HOLE) + (right or HOLE)
    return None


@cache
def _messages():
    sources = Path(pyro_flows_ext.__path__[0]).rglob("*.py")
    nodes = (node for path in sources for node in ast.walk(ast.parse(path.read_text())))
    return [text for text in map(_text, nodes) if text and len(text) > 12]


def quotes_a_message(heading):
    """Whether the words between the holes of a heading follow each other in one message."""
    pattern = ".*".join(re.escape(part.strip()) for part in heading.split(HOLE) if part.strip())
    return any(re.search(pattern, message, re.S) for message in _messages())


@pytest.mark.parametrize("heading", QUOTED)
def test_message_exists(heading):
    assert quotes_a_message(heading)


def test_a_message_that_nobody_raises_is_found():
    assert not quotes_a_message("latent … is a teapot")


def test_headings_are_unique():
    assert len(set(HEADINGS)) == len(HEADINGS) >= 40
