"""Every notebook runs from top to bottom, with a tenth of the steps of training (`make notebooks` takes them all)."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.slow

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
SHARE = 10
# Before the imports of a notebook, which then find these. What is left are the calls and pictures of every cell.
SHORTER = f"""
import functools, pyro_flows_ext.infer

def shorter(train):
    @functools.wraps(train)
    def run(*args, **options):
        steps = {{k: v // {SHARE} for k, v in options.items() if k.endswith("_steps")}}
        return train(*args, **{{**options, **steps}})
    return run

for name in ("fit", "fit_density"):
    setattr(pyro_flows_ext.infer, name, shorter(getattr(pyro_flows_ext.infer, name)))
"""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("default")  # the kernel's own machinery warns of itself
def test_notebook_runs(path):
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(SHORTER))
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
