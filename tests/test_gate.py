"""The gate on compiler figures: the reader, on the text of a small program, and the verdict. No compiler is needed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (Path(__file__).parent / "goldens" / "hlo_tpu.txt").read_text()


def benchmark(name, monkeypatch):
    """A script of benchmarks/, which finds its neighbours."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def hlo(monkeypatch):
    return benchmark("hlo", monkeypatch)


def test_times_of_a_tpu_program(hlo):
    """Forty turns of a loop, then one copy; a copy that is started and awaited apart runs beside the rest."""
    chip = hlo.CHIPS["v6e"]
    report = hlo.read(TEXT, chip)
    assert report.matmul == pytest.approx(40 * 0.4e-3)
    assert report.elementwise == pytest.approx(40 * 0.2e-3)
    assert report.copies == pytest.approx(41 * 0.1e-3)
    assert report.attention == pytest.approx(40 * 4 * 8 * 8192 * 8192 * 128 / chip.peak)
    gather, trade = 4096 * 4096 * 2 * 3 / 4 / 200e9, 8192 * 4096 * 2 / 200e9  # of four chips, over two links
    assert report.collectives == pytest.approx(40 * (gather + trade))
    assert (report.large_copies, report.windowed, report.calls) == (1, 0, {"tpu_custom_call": 1})


def test_the_same_text_without_a_chip_has_no_times(hlo):
    report = hlo.read(TEXT.replace("all-gather.1 =", "windowed_dot_general.1 =", 1))
    assert report.matmul == report.attention == report.collectives == 0 and report.windowed == 1


def test_library_calls(hlo):
    call = '  %c.1 = (bf16[8,8]{1,0}, s8[9]{0}) custom-call(%p0, %p1), custom_call_target="__cublas$lt$matmul", '
    call += 'backend_config={"gemm_backend_config":{"epilogue":"BIAS_GELU"}}\n'
    turn = "  %input_transpose_fusion.3 = bf16[8,8]{1,0} fusion(%p1), kind=kInput, calls=%fused_computation.2\n"
    report = hlo.read(TEXT.replace("  %constant.0 =", call + turn + "  %constant.0 =", 1))
    assert report.calls["__cublas$lt$matmul"] == report.gelu == report.transposes == 1


def test_trips_that_the_text_tells(hlo):
    loop = "body=%body"
    known = TEXT.replace(loop, loop + ', backend_config={"known_trip_count":{"n":"3"}}')
    assert hlo.read(known, hlo.CHIPS["v6e"]).matmul == pytest.approx(3 * 0.4e-3)


def test_shapes(hlo):
    assert hlo.arrays("(f32[]{:T(128)}, bf16[2,3]{1,0}, pred[5], f8e4m3fn[7]{0})") == [
        (4, ()), (12, (2, 3)), (5, (5,)), (7, (7,))
    ]  # fmt: skip


def test_verdict(hlo, monkeypatch):
    gate = benchmark("compile_gate", monkeypatch)
    figures = {"peak_gib": 8.0, "non_attention": 1.0, "copies": 0.2, "large_copies": 5, "windowed": 0, "transposes": 0}
    tpu = {"versions": {"libtpu": "1"}, "figures": figures}
    assert gate.compare(tpu, tpu) == [] and gate.compare(tpu, None) == []
    worse = {"versions": {"libtpu": "1"}, "figures": figures | {"copies": 0.21, "windowed": 2, "peak_gib": 8.2}}
    assert gate.compare(worse, tpu) == ["2 windowed", "copies 0.21, was 0.2"]
    gpu = {"versions": {"nvidia-cublas": "1"}, "figures": figures | {"gelu": 1, "__cudnn$fmhaSoftmax": 2, "__cu8": 3}}
    poor = {"versions": gpu["versions"], "figures": figures | {"gelu": 0, "__cudnn$fmhaSoftmax": 1, "__cu8": 3}}
    assert gate.compare(gpu, gpu) == [] and len(gate.compare(poor, None)) == 2
    assert gate.compare(poor, gpu)[2:] == ["1 __cudnn$fmhaSoftmax, were 2"]
