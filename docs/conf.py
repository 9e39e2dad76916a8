"""The site: Sphinx with MyST Markdown and the furo theme. `make docs` builds it, and a warning fails."""

import re
import shutil
import sys
import warnings
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

import api  # noqa: E402

import pyro_flows_ext  # noqa: E402

warnings.filterwarnings("ignore", module="torch")


project = "pyro_flows_ext"
author = "The pyro_flows_ext developers"
project_copyright = f"2026, {author}"
version = release = pyro_flows_ext.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "myst_nb",
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"pyro_flows_ext {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False

# Pages are Markdown; headings are anchors.
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
# Notebooks are shown with the outputs that they were saved with.
nb_execution_mode = "off"
nb_merge_streams = True
copybutton_exclude = ".linenos, .gp, .go"

autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
autosummary_generate = False
maximum_signature_line_length = 90
python_use_unqualified_type_names = True
# Attributes of one name in several classes, as `domain`: no docstring links to them.
suppress_warnings = ["ref.python"]
napoleon_numpy_docstring = False
napoleon_use_rtype = False
# Arguments that are described together stay together; otherwise each repeats the text of all.
napoleon_use_param = False
napoleon_use_ivar = True

# Notebooks lie beside docs/; Sphinx reads files below it alone.
shutil.rmtree(HERE / "notebooks", ignore_errors=True)
(HERE / "notebooks").mkdir()
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
for path in NOTEBOOKS:
    text = path.read_text().replace("](../docs/", "](../")
    (HERE / "notebooks" / path.name).write_text(text)
(HERE / "notebooks" / "index.md").write_text(
    "# Notebooks\n\nEach runs in minutes on two cores, and is shown with its results.\n\n"
    "```{toctree}\n:maxdepth: 1\n\n" + "\n".join(path.stem for path in NOTEBOOKS) + "\n```\n"
)

api.write(HERE / "reference")
ADDRESSES = api.addresses()

MARKUP = re.compile(
    r"``(?P<literal>.+?)``|`(?P<code>.+?)`(?P<suffix>\w?)|(?P<special>[*|\\])", re.S
)


def as_restructured_text(match):
    """`name` becomes a link or code; what is a formula elsewhere, as in log|det J| and (*, D), loses its meaning as markup."""
    if match["special"]:
        return "\\" + match["special"]
    if match["literal"]:
        return match[0]
    code, suffix = match["code"], match["suffix"] and "\\ " + match["suffix"]
    name = code.removesuffix("()")
    room, _, last = name.rpartition(".")
    if name in ADDRESSES or (room in api.ROOMS and last in api.public_names(room)):
        target = ADDRESSES[name] if name in ADDRESSES else api.address(room, last)
        return f":py:obj:`{code} <{target}>`{suffix}"
    return f"``{code}``{suffix}"


def is_indented(part, by):
    return all(line.startswith(" " * (by + 4)) for line in part.splitlines() if line.strip())


def convert_docstring(app, what, name, obj, options, lines):
    """Docstrings are plain text, with names between single backticks and code in indented paragraphs after a colon."""
    parts = re.split(r"(\n[ \t]*\n)", "\n".join(lines))
    code_from = None  # the indentation of the paragraph that opened a block of code
    for i in range(0, len(parts), 2):
        part = parts[i]
        if code_from is not None and is_indented(part, code_from):
            continue
        code_from = None
        if ">>>" in part:
            continue
        parts[i] = MARKUP.sub(as_restructured_text, part)
        indent = len(part) - len(part.lstrip(" "))
        if part.endswith(":") and i + 2 < len(parts) and is_indented(parts[i + 2], indent):
            parts[i], code_from = parts[i] + ":", indent
    lines[:] = "".join(parts).split("\n")


def setup(app):
    app.connect("autodoc-process-docstring", convert_docstring, priority=400)
