"""`pefast bench`: what a layer costs by each road, predicted."""

from typing import Annotated

import typer

from .screen import console, in_words, table


def bench(
    layer: Annotated[str, typer.Option(help="A layer of a known model, such as bert-base.up.")],
    roofline: Annotated[bool, typer.Option("--roofline", help="Predict; nothing is measured.")] = False,
    rank: Annotated[int, typer.Option(min=1, help="Of the waist.")] = 16,
    tokens: Annotated[int, typer.Option(min=1, help="Rows of x.")] = 8192,
    dropout: Annotated[bool, typer.Option(help="With a mask on x.")] = True,
    gpu: Annotated[str, typer.Option(help="Whose rates: H100, H200 or A100.")] = "H100",
    tflops: Annotated[float | None, typer.Option(help="Another peak, 10^12 a second.")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="Another bandwidth, 10^12 bytes a second.")] = None,
) -> None:
    """Say what a LoRA layer computes and moves by each road, and the time predicted for a GPU."""
    with in_words():
        if not roofline:
            raise ValueError("bench: only --roofline came to the command line; `pytest benchmarks` measures")
        _predict(layer, rank, tokens, dropout, gpu, tflops, bandwidth)


def _predict(layer, rank, tokens, dropout, gpu, tflops, bandwidth) -> None:
    from .. import roofline
    from ..kernels.forms import RATES, Shape

    if gpu not in RATES:
        raise ValueError(f"bench: no rates for {gpu!r}; there are {', '.join(RATES)}")
    rates = RATES[gpu]
    rates = rates._replace(
        flops=tflops * 1e12 if tflops else rates.flops, bytes=bandwidth * 1e12 if bandwidth else rates.bytes
    )
    n, k = roofline.layer(layer)
    shape = Shape(tokens, n, k, rank, dropout)
    roads = roofline.roads(shape)
    base = roads[0].read + roads[0].written
    lines = [
        (
            road.name,
            len(road.launches),
            f"{road.flops / 1e9:,.0f}",
            f"{road.read / 1e6:,.1f}",
            f"{road.written / 1e6:,.1f}",
            f"{(road.read + road.written) / base:.2f}",
            f"{1e6 * road.seconds(rates):,.0f}",
        )
        for road in roads
    ]
    columns = ("forward + backward", "launches", "GFLOP", "MB read", "MB written", "of the frozen", "µs")
    title = f"predicted, not measured: {layer} M={tokens} N={n} K={k} R={rank} on {gpu}"
    table(title, columns, lines)
    for line in roofline.losses(shape, rates):
        console.print(line, soft_wrap=True)
