"""lesson/: the notebook runs from top to bottom, its exercises accept the solutions, and it ships no junk."""

import copy
import re
from pathlib import Path

import pytest
import torch

from model import load_model

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
FOLDER = Path(__file__).resolve().parent.parent / "lesson"
NOTEBOOK = nbformat.read(FOLDER / "lesson.ipynb", as_version=4)


def run(cells):
    """What the cells print, executed in lesson/."""
    notebook = nbformat.v4.new_notebook(cells=copy.deepcopy(cells))
    resources = {"metadata": {"path": str(FOLDER)}}
    nbclient.NotebookClient(notebook, timeout=120, resources=resources).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


@pytest.mark.slow
def test_it_runs_from_top_to_bottom_and_the_solutions_are_accepted():
    """Each check runs twice: on the blank answer and, at the end, on the solution."""
    (solutions,) = re.findall(r"```python\n(.*?)```", NOTEBOOK.cells[-1].source, re.DOTALL)
    checks = "\n".join(f"print('solution {i}:', check_{i}())" for i in range(1, 7))
    printed = run([*NOTEBOOK.cells, nbformat.v4.new_code_cell(f"{solutions}\n{checks}")])
    for i in range(1, 7):
        assert f"exercise {i}: not answered yet" in printed and f"solution {i}: correct" in printed


def test_it_is_committed_with_its_figures_and_without_widget_state():
    outputs = [output for cell in NOTEBOOK.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 6
    assert "widget-view" not in (text := (FOLDER / "lesson.ipynb").read_text()) and len(text) < 1e6
    assert "widgets" not in NOTEBOOK.metadata and not any("execution" in cell.metadata for cell in NOTEBOOK.cells)


def test_its_models_differ_in_the_position_embedding_alone():
    configs = [load_model(FOLDER / f"{pos}.pt")[1]["config"] for pos in ("rope", "fope")]
    shared = [{k: v for k, v in config.items() if k not in ("pos", "out", "dtype", "compile")} for config in configs]
    assert [config["pos"] for config in configs] == ["rope", "fope"] and shared[0] == shared[1]
    assert sum(path.stat().st_size for path in FOLDER.glob("*.pt")) < 4e6
    assert all(isinstance(x, torch.Tensor) for x in load_model(FOLDER / "fope.pt")[1]["model"].values())
