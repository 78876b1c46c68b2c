"""`pefast tune`: the fastest settings of the kernels on this machine's GPU, measured."""

from pathlib import Path
from typing import Annotated

import typer

from .screen import console, in_words, table


def tune(
    layer: Annotated[str, typer.Option(help="A layer of a known model, as `pefast bench` takes it.")],
    rank: Annotated[int, typer.Option(min=1, max=128, help="Of the waist.")] = 16,
    tokens: Annotated[str, typer.Option(help="Rows of x, numbers with commas between.")] = "16,256,4096",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    file: Annotated[Path | None, typer.Option(help="To write; PEFAST_TUNING, or in ~/.cache.")] = None,
) -> None:
    """Measure every allowed setting of the GPU kernels for a layer; keep the fastest that compute right."""
    with in_words():
        _tune(layer, rank, tokens, dtype, file)


def _tune(layer, rank, tokens, dtype, file) -> None:
    import torch

    from .. import roofline, tuner
    from ..kernels import tuning

    n, k = roofline.layer(layer)
    if dtype not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"tune: --dtype {dtype!r}; bfloat16, float16 and float32 are measured")
    if not all(word.strip().isdecimal() and int(word) for word in tokens.split(",")):
        raise ValueError(f"tune: --tokens {tokens!r}; wanted are numbers such as 16,4096")
    if not torch.cuda.is_available():
        raise ValueError("tune: needs a GPU, and torch sees none on this machine")
    measured = []
    for m in dict.fromkeys(int(word) for word in tokens.split(",")):
        for dropout in (0.0, 0.1):
            shape = tuner.Layer(m, n, k, rank, getattr(torch, dtype), dropout)
            measured += tuner.measure(shape, "cuda", _target(torch), _seconds)
    show(measured)
    rows, device = tuner.best(measured), torch.cuda.get_device_name()
    console.print(f"{len(rows)} settings for {device} in {tuning.save(device, rows, file)}", soft_wrap=True)


def _target(torch) -> str:
    """This GPU as the compile gate calls it."""
    if torch.version.hip:
        return torch.cuda.get_device_properties(0).gcnArchName.split(":")[0]
    return "sm{}{}".format(*torch.cuda.get_device_capability())


def _seconds(launch) -> float:
    from triton.testing import do_bench

    return do_bench(launch, return_mode="median") / 1e3


def show(measured) -> None:
    """Prints a line a setting, the dropped ones with the reason."""
    lines = []
    for one in measured:
        sizes = " ".join(str(size) for size in one.asked[1:])
        setting = " ".join(f"{name}={value}" for name, value in one.setting.items())
        time = one.fault if one.seconds is None else f"{1e6 * one.seconds:.1f}"
        lines.append((one.asked.kind.kernel, one.asked.kind.bits, one.asked.kind.slots, sizes, setting, time))
    table("measured on this GPU", ("kernel", "bits", "slots", "M N K", "setting", "µs"), lines)
