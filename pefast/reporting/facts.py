"""All that a report says, as JSON holds it: what was measured in training, and what the answers show."""

import json
import math
import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import pefast

from .. import doctor
from .. import recipe as recipes
from ..gauges import held, trained_by_method
from ..model import attached
from ..report import fused_layers
from ..trainer import ADAPTER
from ..training import Run, trainable
from . import loading
from .findings import findings

REPORT = "report.json"
PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "numpy", "triton")


def trained(run: Run, numbers: Mapping[str, object]) -> dict[str, object]:
    """What there is to say of a run that has just ended; `numbers` are those of metrics.json."""
    record, methods = run.record, settings(run)
    groups = record.get("held") or held(trained_by_method(run.model), None)
    fused, whole = fused_layers(run.model)
    return {
        "when": datetime.now(timezone.utc).isoformat(timespec="minutes"),
        "numbers": dict(numbers),
        "curves": curves(record.get("log", []), run.task.METRIC),
        "step": {"measured": record.get("measured_steps", 0), "seconds": record.get("seconds", {})},
        "methods": [
            {"name": name, "settings": methods.get(name.rpartition("/")[2], {}), **sizes}
            for name, sizes in groups.items()
        ],
        "memory": {"peak": record.get("peak_bytes"), "model": _bytes(run), "on": _device()},
        "parameters": dict(zip(("trained", "all"), trainable(run.model), strict=True)),
        "layers": {"fused": fused, "all": whole, "said": pefast.explain(run.model).splitlines()},
        "versions": versions(),
        "machine": machine(),
    }


def collect(
    run: Run, folder: Path, answers, scores: Mapping[str, object], trained: Mapping[str, object]
) -> dict[str, object]:
    """The facts of a report on the rows that `answers` answer, the run's held-out ones.

    scores     {"after": metrics, "before": metrics or None, "baseline": metrics and "what", or None}
    trained    what `trained` gave when the run had ended
    """
    facts = {
        "pefast": pefast.__version__,
        "title": folder.name or folder.resolve().name,
        "task": run.recipe.task,
        "metric": run.task.METRIC,
        "model": run.recipe.model,
        "scores": dict(scores),
        "data": {
            "source": run.recipe.data.source,
            "rows": {
                "train": None if run.stream else len(run.train),
                "valid": len(run.valid),
                "test": len(run.test),
            },
        },
        "trained": dict(trained),
        "findings": findings(run.task, answers, run.test, run.names),
        "load": loading.snippets(run, folder),
        "adapter": str(folder / ADAPTER),
        "files": "peft" if loading.reads_in_peft(folder / ADAPTER) else "pefast",
        "max_length": run.recipe.training.max_length,
        "recipe": recipes.written(run.recipe),
    }
    return finite(facts)


def read(folder: Path) -> dict[str, object]:
    """The facts of a report that was written. Raises FileNotFoundError where there is none."""
    if not (folder / REPORT).is_file():
        raise FileNotFoundError(f"{folder} holds no {REPORT}; `pefast report {folder}` writes it")
    return json.loads((folder / REPORT).read_text(encoding="utf-8"))


def finite(value: object) -> object:
    """The same with None for every number that JSON has not: NaN and the infinities."""
    if isinstance(value, Mapping):
        return {str(key): finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def settings(run: Run) -> dict[str, dict]:
    """What the recipe says of each method, by the keys that attach gave them."""
    (methods,) = attached(run.model, "report").adapters.values()
    entries = [{key: value for key, value in each.items() if key != "method"} for each in run.recipe.methods]
    return dict(zip(methods, entries, strict=True))


def curves(log: list[dict], metric: str) -> dict[str, dict[str, list]]:
    """{chart: {series: [[step, value], ...]}} of the Trainer's log."""
    found: dict[str, dict[str, list]] = {}

    def add(chart: str, series: str, line: dict, value: float) -> None:
        found.setdefault(chart, {}).setdefault(series, []).append([line["step"], value])

    for line in log:
        for key, value in line.items():
            chart, _, name = key.partition("/")
            if name and chart in ("learning_rate", "grad_norm"):
                add(chart, name, line, value)
            elif key in ("loss", "tokens_per_second"):
                add(key, key, line, value)
            elif key == f"eval_{metric}":
                add("metric", metric, line, value)
    return found


def versions() -> dict[str, str]:
    """Of pefast, Python, and the packages that decide about numbers and speed."""
    found = {"pefast": pefast.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, str]:
    """Processor, memory, GPU and system; nothing that names the machine."""
    found = {"system": platform.platform(terse=True), "processor": _processor()}
    found |= {line.name: line.found for line in doctor.look() if line.name in ("CPU threads", "GPU")}
    memory = Path("/proc/meminfo")
    if memory.exists():
        kilobytes = int(memory.read_text(encoding="ascii").split()[1])
        found["memory"] = f"{kilobytes / 2**20:.0f} GiB"
    return found


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} × {names[0]}" if names else platform.machine()


def _bytes(run: Run) -> int:
    """Of the model's parameters, adapters included, each piece of memory once."""
    pieces = {each.data_ptr(): each.nbytes for each in run.model.parameters()}
    return sum(pieces.values())


def _device() -> str:
    return "The GPU" if torch.cuda.is_available() else "The process"
