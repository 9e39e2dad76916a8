"""The version, the changelog, the citation and the badges agree with the package."""

import importlib.util
import re
from pathlib import Path

import pyro_flows_ext

ROOT = Path(__file__).parents[2]


def test_version_is_the_same_everywhere():
    version = pyro_flows_ext.__version__
    changelog = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    citation = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert changelog[0] == version
    assert citation[1] == version
    assert changelog == sorted(changelog, reverse=True)


def test_badges_show_the_metadata():
    spec = importlib.util.spec_from_file_location("badges", ROOT / "docs" / "badges.py")
    badges = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(badges)
    readme = (ROOT / "README.md").read_text()
    for name, content in badges.badges().items():
        assert (badges.FOLDER / name).read_text() == content, "run python docs/badges.py"
        assert f"(docs/badges/{name})" in readme


def test_readme_is_a_landing_page():
    assert len((ROOT / "README.md").read_text().split()) <= 600
    assert len((ROOT / "docs" / "index.md").read_text().split()) <= 600
