"""The benchmarks on tiny shapes: what they print follows from what they ran, and one that fails is told."""

from __future__ import annotations

import importlib
import json
import logging
import math
import sys
from pathlib import Path

import pytest

TINY = dict(dim=64, ffn_dim=128, num_heads=2, num_layers=2)
SHAPE = ["--size", "32x32", "--num-frames", "5", "--repeats", "2"]


@pytest.fixture
def benchmark(monkeypatch):
    """name -> its module, with a small ceiling. What it silences is heard again afterwards."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    measure = importlib.import_module("measure")
    monkeypatch.setitem(measure.MATRIX, "cpu", 128)
    loggers = [logging.getLogger(f"wan_jax.{name}") for name in ("request", "small")]
    levels = [logger.level for logger in loggers]
    yield importlib.import_module
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def check(report: dict, path: Path) -> dict[str, dict]:
    """Rows by name, after what holds for all reports."""
    assert json.loads(path.read_text()) == report
    assert report["versions"].keys() >= {"wan_jax", "jax"} and report["peak_bytes"] > 1e8
    for row in report["rows"]:
        assert 0 < row["min"] <= row["seconds"] <= row["max"] and row["first"] > 0
        assert math.isclose(row["tflop_per_second"], row["tflop"] / row["seconds"])
        assert math.isclose(row["of_ceiling"], row["tflop_per_second"] / report["ceilings"][row["dtype"]])
    return {row["name"]: row for row in report["rows"]}


def test_a_product_reaches_the_ceiling(benchmark, capsys, tmp_path):
    """The operations of a product are known, and no more than a few times what the ceiling says, or less."""
    import jax
    import jax.numpy as jnp

    measure = benchmark("measure")
    parser = measure.parser("", size="", num_frames=1)
    args = parser.parse_args(["--json", str(tmp_path / "a" / "x.json"), "--repeats", "3"])
    run = jax.jit(lambda x: (x @ x) @ x)
    cases = [measure.Case("twice", lambda: run(jnp.ones((128, 128))), 2 * 2 * 128**3, "float32")]
    report = measure.compare("product", cases, args, lambda: 0.5)
    row = check(report, args.json)["twice"]
    assert row["tflop"] == 2 * 2 * 128**3 / 1e12 and 0.001 < row["of_ceiling"] < 5 and row["ratio"] == 1
    said = capsys.readouterr().out
    assert "ceiling of matrix products" in said and "5.0e-01" in said and f"jax {jax.__version__}" in said


def test_a_step(benchmark, tmp_path, monkeypatch):
    dit_step, path = benchmark("dit_step"), tmp_path / "x.json"
    monkeypatch.setattr(dit_step, "SMALL", TINY)
    rows = check(dit_step.main([*SHAPE, "--guidance", "none", "sequential", "--json", str(path)]), path)
    d, f, tokens, text = 64, 128, 2 * 2 * 2, 512
    block = 2 * tokens * (6 * d * d + 2 * d * f) + 4 * text * d * d + 4 * tokens * d * (tokens + text)
    ends = 2 * tokens * 4 * 32 * d + 2 * text * (4096 * d + d * d) + 2 * (256 * d + 7 * d * d)
    once, twice = rows["wan_jax, guidance none"], rows["wan_jax, guidance sequential"]
    assert math.isclose(once["tflop"], (2 * block + ends) / 1e12) and math.isclose(twice["tflop"], 2 * once["tflop"])
    assert twice["ratio"] == twice["seconds"] / once["seconds"] and once["ratio"] == 1


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("name", "small", "options", "limit"),
    [
        ("dit_step", TINY, ["--guidance", "none", "batch"], 1e-4),
        ("text_encoder", dict(vocab_size=64, dim=64, dim_attn=64, dim_ffn=64, num_heads=2), ["--tokens", "16"], 1e-4),
        ("vae_decode", dict(dim=16, dec_dim=16), ["--tiled"], 1e-2),  # of uint8
    ],
)
def test_the_peer_does_the_same_work(name, small, options, limit, benchmark, tmp_path, monkeypatch):
    module, path = benchmark(name), tmp_path / "x.json"
    monkeypatch.setattr(module, "SMALL", small)
    options += ["--layers", "1"] * (name != "vae_decode")
    report = module.main([*SHAPE, *options, "--peer", "diffusers", "--json", str(path)])
    rows = check(report, path)
    assert report["difference"] < limit and "diffusers, eager" in rows and rows["diffusers, eager"]["ratio"] > 0
    assert rows["diffusers, eager"]["tflop"] == report["rows"][-2]["tflop"]


def test_the_peer_is_an_extra(benchmark, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match=r"pip install .*wan_jax\[oracle\]"):
        benchmark("text_encoder").main([*SHAPE, "--layers", "1", "--peer", "diffusers"])


def test_a_list_goes_on_after_a_failure(benchmark, tmp_path, monkeypatch, capsys):
    every = benchmark("all")
    (tmp_path / "there.json").write_text("{}")
    monkeypatch.setattr(every, "CPU", {"wrong": "dit_step --nonsense", "there": "none", "next": "dit_step --help"})
    monkeypatch.setattr(sys, "argv", ["all.py", "--out", str(tmp_path)])
    assert every.main() == 1
    said = capsys.readouterr().out
    assert "failed: exit code 2" in said and "== there" not in said
    assert "--nonsense" in (tmp_path / "wrong.txt").read_text() and "usage" in (tmp_path / "next.txt").read_text()
    monkeypatch.setattr(sys, "argv", ["all.py", "--out", str(tmp_path), "--minutes", "0"])
    monkeypatch.setattr(every, "CPU", {"slow": "dit_step", "next": "dit_step --help"})
    assert every.main() == 1
    said = capsys.readouterr().out
    assert "the time is up" in said and "== next" not in said


def test_starts(benchmark, tmp_path, monkeypatch, capsys):
    """One with an empty folder, then the median of those with the same one."""
    cold_start, homes = benchmark("cold_start"), []

    def run(args, home: str) -> dict:
        homes.append(home)
        i = float((9, 3, 1, 2)[len(homes) - 1])
        return {"marks": {"loaded": [i, 2 * i]}, "jax": {"tracing": i}, "stages": {}, "steps": 2}

    monkeypatch.setattr(cold_start, "run", run)
    path = tmp_path / "x.json"
    report = cold_start.main(["--repeats", "3", "--json", str(path)])
    assert json.loads(path.read_text()) == report and len(set(homes)) == 1
    assert report["cold"]["marks"] == {"loaded": [9.0, 18.0]} and report["warm"]["marks"] == {"loaded": [2.0, 4.0]}
    said = capsys.readouterr().out
    assert "cold, 2 steps: loaded 9.0 s (CPU 18.0)" in said and "warm, median of 3, 2 steps: loaded 2.0 s" in said
