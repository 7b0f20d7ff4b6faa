"""Test configs/notebook/demo.ipynb: its cells run in their order; it has no outputs in git."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "configs/notebook/demo.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def test_it_is_kept_without_outputs():
    assert len({cell["id"] for cell in CELLS}) == len(CELLS)
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CODE)


def test_each_cell_is_python():
    for cell in CODE:
        compile("".join(cell["source"]), cell["id"], "exec")
    [tagged] = [cell for cell in CODE if cell["metadata"].get("tags") == ["parameters"]]
    assert tagged is CODE[0]


@pytest.mark.slow
def test_the_cells_run_in_their_order(tmp_path, monkeypatch, capsys):
    """They run in one namespace, as in a kernel, with a smaller experiment as their parameters."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = []
    monkeypatch.setattr(plt, "show", lambda: drawn.append(plt.gcf()))
    monkeypatch.chdir(NOTEBOOK.parent)  # where Jupyter starts a kernel
    parameters = {
        "CONFIG": "tests/resume/micro.yaml",
        "ARTIFACTS": str(tmp_path),
        "SETTINGS": ["launch.device=cpu", "launch.threads=1"],
    }
    namespace = {"__name__": "__main__"}
    for cell in CODE:
        exec(compile("".join(cell["source"]), cell["id"], "exec"), namespace)
        if cell is CODE[0]:
            assert set(parameters) <= set(namespace)
            namespace |= parameters
    said = capsys.readouterr().out
    assert Path.cwd() == ROOT and (tmp_path / "micro/evaluate/results.json").is_file()
    [figure] = drawn
    assert all(len(axis.lines) == 1 and len(axis.lines[0].get_xdata()) > 1 for axis in figure.axes)
    assert "after update 0:" in said and "→" in said
    assert all(f"\n{name} " in said for name in ("base", "sft", "ppo", "dpo", "best_of_n"))
    plt.close("all")
