"""Seconds on a GPU: many launches in one captured graph, replayed.

A graph leaves out what the host does between launches; events around a replay, divided by its
launches, then give the time of one. Whoever wants memory to be read must rotate through more of it
than the cache holds.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch

_WARM_REPLAYS = 3


def time_graph(launch: Callable[[], Any], count: int, replays: int = 15) -> tuple[float, float]:
    """Median seconds of one of `count` launches in a graph, and its interquartile range."""
    launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            launch()
    for _ in range(_WARM_REPLAYS):
        graph.replay()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / count)
    low, middle, high = statistics.quantiles(times, n=4)
    return middle, high - low
