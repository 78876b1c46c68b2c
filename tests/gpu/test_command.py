"""`make gpu` without a GPU: what can be shown of it, and the sentence that it ends with."""

import json
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import bench_gpu, gpu

without_a_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens where no GPU is")


def clock(call):
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


@without_a_gpu
def test_without_a_gpu_it_says_so_and_fails(capsys, tmp_path):
    assert gpu.main(tmp_path) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "torch sees no GPU" in said
    assert list(tmp_path.iterdir()) == []


def test_the_sanitizer_runs_where_it_is():
    assert [step.name for step in gpu.steps("python", None)] == ["tests", "benchmarks"]
    named = {step.name: step.command for step in gpu.steps("python", "compute-sanitizer")}
    assert named["compute-sanitizer racecheck"][:3] == ["compute-sanitizer", "--tool", "racecheck"]
    assert len(named) == 4


def test_a_step_that_fails_is_noted(capfd):
    good = gpu.run(gpu.Step("good", [sys.executable, "-c", "print('3 passed')"]), {})
    bad = gpu.run(gpu.Step("bad", [sys.executable, "-c", "raise SystemExit(3)"]), {})
    assert good["exit"] == 0 and good["last line"] == "3 passed" and bad["exit"] == 3
    assert "== good" in capfd.readouterr().out


def test_results_are_json_with_versions(tmp_path):
    found = gpu.circumstances("NVIDIA H100 80GB HBM3", "13.0")
    found["benchmarks"] = [{"what": "loss", "seconds": {"pefast": 1e-3}}]
    path = gpu.write(found, tmp_path / "results")
    assert path.name == "nvidia-h100-80gb-hbm3.json" and json.loads(path.read_text()) == found
    assert found["versions"]["torch"] == torch.__version__ and len(found["date"]) == 10
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_benchmarks_compute_here_too(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PEFAST_ROWS", str(tmp_path / "rows"))
    layer = bench_gpu.measure_layer("minilm attention", 8, 4, 0.05, torch.float32, "cpu", clock, rounds=1)
    loss = bench_gpu.measure_loss(4, 8, 20, torch.float32, "cpu", clock, rounds=1)
    for line in (layer, loss):
        bench_gpu.note(line)
    assert {"frozen", "peft", "hand", "pefast"} <= set(layer["seconds"]) and set(loss["seconds"]) == {
        "pefast",
        "torch",
    }
    assert [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()] == [layer, loss]
    assert "pefast" in capsys.readouterr().out


def test_medians_leave_the_first_rounds_out():
    times = iter([9.0, 9.0, 9.0, 1.0, 3.0, 2.0])
    assert bench_gpu.in_turn({"one": lambda: None}, lambda call: next(times), 3) == {"one": 2.0}


@without_a_gpu
def test_the_gpus_benchmarks_are_skipped_with_the_reason():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/bench_gpu.py"]
    done = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "needs a GPU" in done.stdout and "passed" not in done.stdout
