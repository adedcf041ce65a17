"""What the grid says: the verdict of a point, the heat maps and the page."""

from __future__ import annotations

import json

from grid_records import CHUNKS, COMPILED, EAGER, head, record_of, timed

from benchmarks.grid import plot, report
from benchmarks.grid import run as grid_run
from benchmarks.grid.verdict import cell


def results() -> list[dict]:
    unfit = [{"name": name, "fits": False, "reason": "r"} for name in (EAGER, COMPILED)]
    half = timed(EAGER, 4.0, 0.25)
    return [
        record_of(1024, 8, timed(EAGER, 2.0, 0.5), timed(COMPILED, 1.6, 0.625)),
        record_of(256, 8, timed(EAGER, 0.5, 2.0), timed(COMPILED, 0.8, 1.25)),
        record_of(1024, 16, *unfit, timed(CHUNKS, 4.0, 0.25)),
        record_of(256, 8, failed="why", name="nt_xent"),
        record_of(256, 8, half, {"name": COMPILED, "reason": "differs"}, dtype="bfloat16"),
    ]


def test_the_faster_dense_form_counts():
    assert [cell(record) for record in results()] == [
        "0.62 compiled", "**2.00 eager**", "dense does not fit", "FAILED", "0.25 eager"
    ]  # fmt: skip
    assert grid_run.told(results()) == (
        "Ours is faster at 3 of 4 points, at 1 of them because the dense form does not fit or "
        "takes too long."
    )
    line = grid_run.row(results()[0], 120.0)
    assert line.split()[:2] == ["2:00", "left"] and "0.62 of compiled" in line


def test_a_picture_for_each_dtype_and_a_panel_for_each_loss(tmp_path):
    result = head() | {"points": results()}
    files = plot.draw(result, tmp_path / "grid.svg")
    assert [file.name for file in files] == [
        f"grid_{dtype}.{suffix}" for dtype in ("float32", "bfloat16") for suffix in ("svg", "png")
    ]
    text = files[0].read_text()
    for words in ("info_nce, M = N", "nt_xent, M = 2N", "0.62", "2.00", "no fit", "Imaginary CPU"):
        assert words in text
    (mesh,) = plot.figure(result, "float32").axes[0].collections
    colors = mesh.get_array()
    # rows 256 and 1024, features 8 and 16
    assert colors[0, 0] == 1.0 and colors[1, 0] < 0 and colors[1, 1] == -plot.LIMIT
    assert colors.mask[0, 1]


def test_the_page_and_the_picture_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    empty = "a\n<!-- grid:begin -->\nold\n<!-- grid:end -->\nb"
    none = "a\n<!-- grid:begin -->\n<!-- grid:end -->\nb"
    assert report.updated(empty) == report.with_picture(empty) == none
    isa = {"ATEN_CPU_CAPABILITY": "avx9", "capability": "AVX9"}
    made = {"commands": ["bench --grid", "bench --grid -N 8"], "points": results()}
    (tmp_path / "x.json").write_text(json.dumps(head(isa=isa) | made))
    page = report.updated(empty)
    assert "| N \\ D | 8 | 16 |" in page and "| 256 | **2.00 eager** | – |" in page
    assert "| 1,024 | 0.62 compiled | dense does not fit |" in page
    assert "`info_nce`, ours / F.linear_cross_entropy" in page and "| 1,024 | – | 0.25 |" in page
    first, second = (f"`ATEN_CPU_CAPABILITY=avx9 {command}`" for command in made["commands"])
    assert f"Measured with {first}, {second}." in page
    assert "](images/grid_x_bfloat16.png)" in page
    readme = report.with_picture(empty)
    assert "](docs/images/grid_x_float32.png)" in readme and "bfloat16" not in readme
    assert report.updated(page) == page
    assert report.with_picture(readme) == readme
