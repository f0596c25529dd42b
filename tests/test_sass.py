"""The counts of machine instructions: in a listing, and of a kernel that is compiled here."""

import pytest

from gpuconv import BackendError
from gpuconv.gpu import compiler, report, sass

LISTING = """
.text.second:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   EXIT ;
.L_x_9:
        /*0020*/                   BRA `(.L_x_9);
        /*0030*/                   NOP;
.text.first:
        /*0000*/                   I2F.U32.RP R5, R11 ;
        /*0010*/                   MUFU.RCP R5, R5 ;
.L_x_1:
        /*0020*/                   IADD3 R25, R124, 0x3, RZ ;
        /*0030*/              @!P1 BRA `(.L_x_1) ;
        /*0040*/                   I2F.RP R5, R11 ;
.L_x_2:
        /*0050*/                   FFMA R1, R2, R3, R1 ;
        /*0060*/                   FFMA R1, R2, R3, R1 ;
        /*0070*/                   FFMA R1, R2, R3, R1 ;
.L_x_3:
        /*0080*/               @P0 BRA `(.L_x_4) ;
        /*0090*/                   HMMA.16816.F32 R96, R4, R5, R96 ;
        /*00a0*/                   HMMA.16816.F32 R92, R4, R5, R92 ;
.L_x_4:
        /*00b0*/              @!P0 BRA `(.L_x_3) ;
        /*00c0*/               @P1 BRA `(.L_x_2) ;
        /*00d0*/               @P2 EXIT ;
        /*00e0*/                   STG.E [R2], R4 ;
        /*00f0*/                   EXIT ;
        /*0100*/                   NOP;
"""


def test_the_main_loop_is_the_shortest_with_most_products():
    """Products of tensor cores decide if there are any; padding behind the last EXIT does not count."""
    assert sass.counts_of(LISTING) == {
        "second": sass.Counts(2, 0, 0, 0, 0),
        "first": sass.Counts(prologue=8, loop=4, epilogue=4, products=2, divisions=2),
    }


def test_without_the_disassembler_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(sass, "nvdisasm", lambda: None)
    with pytest.raises(RuntimeError, match="counting instructions needs nvdisasm: pip install nvidia-cuda-nvdisasm"):
        sass.counted(b"")


@pytest.mark.skipif(sass.nvdisasm() is None, reason=f"nvdisasm is not installed: {sass.INSTALL_HINT}")
def test_a_tile_of_128x64_half_has_32_products_in_an_iteration():
    """A warp of 64 x 32 x 32 with 16 x 8 x 16 a product."""
    try:
        compiler.version()
    except BackendError as error:
        pytest.skip(str(error))
    wanted = {"DIRECTION": 0, "TILE_ROWS": 128, "TILE_COLUMNS": 64, "DEPTH": 32, "TENSOR_PRODUCTS": 1, "TERMS": 0}
    (module, *_) = (
        module
        for module in report.modules()
        if wanted.items() <= dict(module.constants).items() and ("First", "float16") in module.types and not module.wide
    )
    cubin, _ = compiler.compiled(module, "sm_80")
    found = sass.counted(cubin)["implicit_gemm_forward"]
    assert found.products == 32
    assert 32 < found.loop < 300
    assert found.prologue > 0 < found.epilogue
