"""What every benchmark shares: one thread, rivals timed in turn, and the circumstances of each number."""

import statistics
import subprocess
import time

import pytest
import torch

import pefast
from pefast.native import WHY_NOT, C


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def in_turn(benchmark, capsys):
    """Times calls by name in turn, A B C A B C ..., so that a slow moment of the machine slows all of them.

    Prints and returns {name: median seconds}; with --benchmark-disable each runs once and {} comes back.
    """

    def run(title, calls, rounds=21, warm=2):
        spans = {name: [] for name in calls}
        for _ in range(1 if benchmark.disabled else rounds + warm):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                spans[name].append(time.perf_counter() - start)
        if benchmark.disabled:
            return {}
        # the first rounds warm up caches and allocator
        medians = {name: statistics.median(span[warm:]) for name, span in spans.items()}
        first = next(iter(medians.values()))
        rows = (f"{name} {m * 1e3:.3f} ms ({first / m:.2f}x)" for name, m in medians.items())
        with capsys.disabled():
            print(f"\n{title}: {', '.join(rows)}")
        benchmark.extra_info["in_turn_ms"] = {name: m * 1e3 for name, m in medians.items()}
        return medians

    return run


def pytest_benchmark_update_machine_info(config, machine_info):
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=config.rootpath)
    machine_info["pefast"] = {
        "version": pefast.__version__,
        "commit": commit.stdout.strip(),
        "instructions": C.isa() if C else WHY_NOT,
        "torch": torch.__version__,
    }


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """A committed result says what was measured where, and not every single time or the machine's name."""
    for name in ("node", "release"):
        output_json["machine_info"].pop(name, None)
    for name in ("project", "branch"):
        output_json["commit_info"].pop(name, None)
    for each in output_json["benchmarks"]:
        each["stats"].pop("data", None)
