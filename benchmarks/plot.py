"""Draws benchmarks/results/compared.svg: the cost of each way, the frozen layer or model being 1.

    python benchmarks/plot.py [result.json ...]

Without names it reads the newest result beside it. Of several, a newer one replaces what an older one says.
"""

import json
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

RESULTS = Path(__file__).parent / "results"
# title: what the names of its benchmarks begin and end with
PANELS = {
    "LoRA layer, bf16": ("bench_delta_linear.py::test_forward_and_backward", "0.0-bf16]"),
    "LoRA layer, bf16, dropout 0.05": ("bench_delta_linear.py::test_forward_and_backward", "0.05-bf16]"),
    "LoRA layer, fp32": ("bench_delta_linear.py::test_forward_and_backward", "0.0-fp32]"),
    "training step, MiniLM": ("bench_model.py::test_training_step", "[minilm]"),
    "training step, MiniLM, fp32": ("bench_model.py::test_training_step", "[minilm-fp32]"),
    "training step, Llama's shape": ("bench_model.py::test_training_step", "[llama]"),
    "training step, GPT-2's shape": ("bench_model.py::test_training_step", "[gpt2]"),
    "attention with a prefix, bf16": ("bench_prefix_attention.py::test_forward_and_backward", "bf16]"),
    "attention with a prefix, fp32": ("bench_prefix_attention.py::test_forward_and_backward", "fp32]"),
    "decoding step, 8 rows, 8 adapters": ("bench_decode.py::test_decoding_step", "]"),
}
COLOURS = {"pefast": "#c2410c", "peft": "#64748b", "full": "#94a3b8", "hand": "#94a3b8"}


def read(files: list[Path]) -> tuple[dict[str, dict[str, float]], dict]:
    """Milliseconds of each way by benchmark, and the circumstances of the newest result."""
    found, newest = {}, {}
    for result in sorted((json.loads(file.read_text()) for file in files), key=lambda r: r["datetime"]):
        newest = result
        for each in result["benchmarks"]:
            if times := each["extra_info"].get("in_turn_ms"):
                found[each["fullname"]] = times
    return found, newest


def ratios(times: list[dict[str, float]]) -> dict[str, float]:
    """The geometric mean, over benchmarks, of each way's time as a multiple of the first one's."""
    ways = [way for way in times[0] if all(way in each for each in times)]
    return {
        way: statistics.geometric_mean(each[way] / next(iter(each.values())) for each in times)
        for way in ways
    }


def draw(found: dict[str, dict[str, float]], newest: dict) -> pyplot.Figure:
    panels = {}
    for title, (begin, end) in PANELS.items():
        times = [t for name, t in found.items() if begin in name and name.endswith(end)]
        if times:
            panels[title] = ratios(times)
    rows = -(-len(panels) // 3)
    figure, grid = pyplot.subplots(rows, 3, figsize=(12, 1.9 * rows), squeeze=False, layout="constrained")
    for axes, (title, ways) in zip(grid.flat, panels.items(), strict=False):
        unit, *others = ways
        colours = [COLOURS.get(name.split(",")[0].split()[0], "#64748b") for name in others]
        bars = axes.barh(others, [ways[name] for name in others], color=colours)
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_title(f"{title}\n1 = {unit}", fontsize=9, loc="left")
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    pefast, cpu = newest["machine_info"]["pefast"], newest["machine_info"]["cpu"]["brand_raw"]
    where = f"one thread of {cpu}, {pefast['instructions']}, torch {pefast['torch']}"
    figure.supxlabel(
        f"{newest['datetime'][:10]}, commit {pefast['commit'][:7]}, {where}; geometric means of medians",
        fontsize=8,
    )
    return figure


def main() -> None:
    files = [Path(name) for name in sys.argv[1:]] or list(RESULTS.glob("*.json"))
    if not files:
        raise SystemExit(f"plot: no result in {RESULTS}; `make bench` writes one")
    if not sys.argv[1:]:
        files = [max(files, key=lambda file: json.loads(file.read_text())["datetime"])]
    # text stays text, and the same numbers give the same file
    pyplot.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "pefast"}
    target = RESULTS / "compared.svg"
    draw(*read(files)).savefig(target, metadata={"Date": None})
    print(f"{target}, {target.stat().st_size / 1e3:.0f} kB, from {', '.join(file.name for file in files)}")


if __name__ == "__main__":
    main()
