"""The model of sweeps against published speeds and limits that are known exactly."""

import pytest

from benchmarks.gpu import model, predict, published, resources
from benchmarks.gpu.model import H200, Prediction, Sweep, Tile, predicted, throughput
from contrastive_kernels.triton import machine_code
from contrastive_kernels.triton.machine_code import Count


@pytest.mark.parametrize("one", published.ATTENTIONS, ids=lambda one: f"{one.name} {one.dim}")
def test_published_speeds_come_out(one):
    assert one.teraflops() == pytest.approx(one.measured, rel=0.15)


def test_chains_wait_for_each_other():
    assert throughput((3.0, 5.0, 0.0), 1) == pytest.approx(1 / 8)
    assert throughput((4.0, 4.0, 0.0), 2) == pytest.approx(2 / 12)
    assert throughput((3.0, 5.0, 0.0), 60) == pytest.approx(1 / 5, rel=1e-3)
    one, two = (throughput((3.0, 5.0, 0.0), count) for count in (1, 2))
    assert throughput((3.0, 5.0, 0.0), 1.5) == pytest.approx((one + two) / 2)


def milliseconds(programs: int, resident: int = 3, **tile: float) -> float:
    sweep = Sweep(Tile(500.0, 500.0, **tile), programs, 100, resident)
    return predicted(H200, sweep).milliseconds


def test_the_last_wave_is_shorter():
    wave = milliseconds(3 * 132)
    assert milliseconds(6 * 132) == pytest.approx(2 * wave)
    # one program alone, without others to wait for
    assert milliseconds(3 * 132 + 1) == pytest.approx(wave + milliseconds(1))
    assert milliseconds(1) == pytest.approx(1e3 * 100 * 1000 / H200.clock)
    assert milliseconds(1) < wave < 3 * milliseconds(1)


def test_what_limits():
    sweep = Sweep(Tile(100.0, 10.0), 1320, 10, resident=8)
    assert predicted(H200, sweep).limit == "products 100 %"
    l2 = sweep._replace(tile=Tile(100.0, 10.0, bytes=1e6))
    seconds = 1320 * 10 * 1e6 / H200.l2
    assert predicted(H200, l2) == Prediction(pytest.approx(1e3 * seconds), "L2 100 %")
    stored = predicted(H200, sweep._replace(stored=H200.memory)).milliseconds
    assert stored == pytest.approx(1e3)


def test_shared_memory_delivers_the_operands_of_wgmma():
    narrow, wide = (model.wgmma_cycles(H200, 64, n, 16, True) for n in (32, 128))
    assert wide == 64  # as the tensor cores need
    assert narrow == (64 + 32) * 32 / 128  # 16 for those
    assert model.wgmma_cycles(H200, 64, 32, 16, False) == 16


CODE = """
        /*0010*/                   MOV R1, R2 ;
.L_x_4:
        /*0020*/                   IADD3 R1, R1, R2, RZ ;
.L_x_0:
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2 ;
        /*0040*/              @!P0 BRA `(.L_x_0) ;
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0060*/               @P1 BRA `(.L_x_1) ;
        /*0070*/                   FSEL R1, R1, R2, P0 ;
        /*0080*/                   FSEL R2, R1, R2, P0 ;
.L_x_1:
        /*0090*/                   MUFU.EX2 R3, R3 ;
        /*00a0*/               @P0 BRA `(.L_x_4) ;
        /*00b0*/                   STG.E desc[UR6][R2.64], R3 ;
        /*00c0*/                   EXIT ;
.L_x_9:
        /*00d0*/                   BRA `(.L_x_9);
"""


def test_instructions_are_counted_on_the_way_of_most_tiles():
    found = machine_code.read(CODE)
    assert found.inner == Count(7, 1, 1)  # without the two FSEL
    assert found.outer == Count(10, 1, 1)
    assert found.of_tile(1) == found.inner
    assert found.of_tile(3) == Count(24, 3, 3)


def test_a_loop_that_was_unrolled_is_the_whole_kernel():
    found = machine_code.read(CODE.replace("@P0 BRA `(.L_x_4)", "@P0 FADD R1, R1, R2"))
    assert found == (Count(), Count(10, 1, 1))


def test_the_table_has_these_cases():
    text = resources.DOC.read_text()
    page = text[text.index("<!-- predict:begin -->") : text.index("<!-- predict:end -->")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()]
    cases = [[case.title, f"{case.at_most_ms:g} ms"] for case in predict.WORKLOADS]
    assert [cells[:2] for cells in rows if cells and cells[0].startswith("`")] == cases
    assert rows[rows.index(list(published.HEAD)) + 2 :][: len(published.ATTENTIONS)] == (
        published.rows()
    )
