"""What `make gpu` runs on a machine with a GPU; benchmarks/results/<device>.json says what came of it.

    the tests     all of them, kernels and operations on the GPU
    the sanitizer compute-sanitizer's memcheck and racecheck over the kernels' tests, where it is installed
    benchmarks    layers and the loss beside PEFT, PEFT compiled, autograd by hand, and Liger and bitsandbytes
                  where they are installed

Ends with 1 where something failed, and at once, with one sentence, where torch sees no GPU.
"""

import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "liger-kernel", "numpy")
KERNELS = ["tests/ladder/kernels/test_delta_linear.py", "-k", "every_form and bfloat16"]


class Step(NamedTuple):
    """One thing that is run."""

    name: str
    command: list[str]


def steps(python: str, sanitizer: str | None) -> list[Step]:
    """In their order; the sanitizer's where there is one."""
    pytest = [python, "-m", "pytest", "-q"]
    found = [Step("tests", pytest)]
    for tool in ("memcheck", "racecheck") if sanitizer else ():
        watch = [sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
        found.append(Step(f"compute-sanitizer {tool}", [*watch, *pytest, *KERNELS]))
    return [*found, Step("benchmarks", [*pytest, "-s", "benchmarks/bench_gpu.py"])]


def run(step: Step, environment: dict[str, str]) -> dict:
    """Runs a step, shows what it says, and returns what becomes of it."""
    print(f"\n== {step.name}: {' '.join(step.command)}", flush=True)
    begin, lines = time.perf_counter(), [""]
    started = subprocess.Popen(
        step.command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for line in started.stdout:
        print(line, end="", flush=True)
        if line.strip():
            lines.append(line.strip())
    code = started.wait()
    seconds = round(time.perf_counter() - begin, 1)
    return {"name": step.name, "exit": code, "seconds": seconds, "last line": lines[-1]}


def circumstances(device: str, cuda: str) -> dict:
    """What a number of this machine depends on."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    changed = subprocess.run(
        ["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "device": device,
        "CUDA": cuda,
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip() + (" and changes" if changed.stdout.strip() else ""),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def file_of(device: str, folder: Path) -> Path:
    """The file of a device's results: its name in small letters."""
    return folder / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json")


def write(found: dict, folder: Path) -> Path:
    """Writes results as JSON, all or nothing."""
    path = file_of(found["device"], folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=folder, delete=False, encoding="utf-8") as temporary:
        json.dump(found, temporary, indent=1)
        temporary.write("\n")
    os.replace(temporary.name, path)
    return path


def main(folder: Path = ROOT / "benchmarks" / "results") -> int:
    """The command line."""
    import torch

    if not torch.cuda.is_available():
        print("make gpu: torch sees no GPU here; it runs on a machine that has one", file=sys.stderr)
        return 1
    cuda = str(torch.version.cuda or torch.version.hip)
    found = circumstances(torch.cuda.get_device_name(), cuda)
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows"
        rows.touch()
        environment = {**os.environ, "PEFAST_ROWS": str(rows)}
        sanitizer = shutil.which("compute-sanitizer")
        found["steps"] = [run(step, environment) for step in steps(sys.executable, sanitizer)]
        if not sanitizer:
            found["steps"].append({"name": "compute-sanitizer", "exit": None, "last line": "not installed"})
        found["benchmarks"] = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    print(f"\nwritten: {write(found, folder)}")
    return int(any(step["exit"] for step in found["steps"]))


if __name__ == "__main__":
    sys.exit(main())
