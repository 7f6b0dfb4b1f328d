"""lesson/: the notebook runs from top to bottom, its exercises accept the solutions, and its two models match."""

import re
from pathlib import Path

import pytest

from model import load_model

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
FOLDER = Path(__file__).resolve().parent.parent / "lesson"


@pytest.mark.slow
def test_it_runs_from_top_to_bottom_and_the_solutions_are_accepted():
    """Each check runs twice: on the blank answer and, at the end, on the solution."""
    notebook = nbformat.read(FOLDER / "lesson.ipynb", as_version=4)
    (solutions,) = re.findall(r"```python\n(.*?)```", notebook.cells[-1].source, re.DOTALL)
    checks = "\n".join(f"print('solution {i}:', check_{i}())" for i in range(1, 7))
    notebook.cells.append(nbformat.v4.new_code_cell(f"{solutions}\n{checks}"))
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(FOLDER)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    for i in range(1, 7):
        assert f"exercise {i}: not answered yet" in printed and f"solution {i}: correct" in printed


def test_its_models_differ_in_the_position_embedding_alone():
    rope, fope = (load_model(FOLDER / f"{pos}.pt")[1]["config"] for pos in ("rope", "fope"))
    assert {name for name in rope if rope[name] != fope[name]} <= {"pos", "out", "dtype", "compile"}
    assert (rope["pos"], fope["pos"]) == ("rope", "fope")
