"""A step as a CUDA graph: what a call costs where its launches cost nothing."""

from __future__ import annotations

import torch

from .timing import Step

WARM_UPS = 3  # kernels are compiled and loaded before a capture begins


def captured(step: Step, device: torch.device) -> Step:
    """Captures ``step`` on a stream of its own; each call of the result replays it. Raises what the capture raises."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay() -> None:
        graph.replay()

    return replay
