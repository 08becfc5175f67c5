"""Products of few rows with int8 weights on a GPU, by tiles: what targets/runtimes/few_rows.py is planned by.

    python benchmarks/few_rows.py [--json benchmarks/results/gpu-few-rows.json] [--rows 1 8 16 64 256]

The kernel with each plan, cuBLAS on weights in bfloat16, and inductor on int8 weights that it writes out first. Each is
captured into a graph over copies of the weights that no cache holds; the fastest of three replays, per product.
"""

import argparse
import itertools
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from optimize.targets.runtimes.few_rows import FEW, Plan, launch, plan

# outputs and inputs of the layers of Llama 1B's and 7B's shapes
SHAPES = [(3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192), (32000, 2048),
          (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]  # fmt: skip
BEYOND_CACHES = 160_000_000  # bytes
SHARED = 220_000  # bytes of shared memory that a plan may take
BEST = 5  # plans of each shape that are kept


def configurations(rows: int) -> Iterator[Plan]:
    """Plans that are worth a try, of one part."""
    few = rows <= FEW
    high = (8 if rows <= 8 else FEW) if few else min(128, 1 << (rows - 1).bit_length())
    tiles, steps, warps = ((32, 64, 128), (128, 256), (2, 4)) if few else ((64, 128), (64, 128), (4, 8))
    for tile, step, count, stages in itertools.product(tiles, steps, warps, (3, 4)):
        taken = (2 * high + 1.5 * tile) * step * stages
        if tile * step <= 32768 and taken < SHARED:
            yield Plan(high, tile, step, count, stages)


def parts_of(outputs: int, inputs: int, how: Plan) -> list[int]:
    most = 2000 if how.rows <= FEW else 1000  # programs
    return [1, *(parts for parts in (2, 4, 8) if -(-outputs // how.tile) * parts <= most
                 and inputs >= 2 * parts * how.step)]  # fmt: skip


def compiled(job: tuple[int, Plan]) -> float:
    """Have Triton compile a kernel into its cache. Returns its largest error, of the largest output."""
    import torch

    (rows, how), errors = job, []
    for outputs, inputs in ((256, 4096), (250, 4000)):  # whole tiles, and others
        left = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
        values = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device="cuda")
        exact = left.float() @ values.float().t()
        found = launch(left, values, how._replace(parts=2)).sum(0)
        errors.append(float((found - exact).abs().max() / exact.abs().max()))
    return max(errors)


def microseconds(calls: list[Callable[[], Any]]) -> float:
    """Of each, in one graph."""
    import torch

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    start, end, times = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True), []
    for _ in range(4):
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return round(min(times[1:]), 2)


def measured(rows: int, outputs: int, inputs: int) -> dict[str, Any]:
    """Microseconds of one shape."""
    import torch
    from torch.nn.functional import linear

    copies = BEYOND_CACHES // (outputs * inputs) + 2
    left = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
    weights = torch.randint(-127, 128, (copies, outputs, inputs), dtype=torch.int8, device="cuda")
    scale = torch.rand(outputs, device="cuda")
    torch._dynamo.reset()
    dequantized = torch.compile(lambda each: linear(left, each.to(left.dtype) / 128) * (scale * 128), dynamic=False)

    def ours(how: Plan) -> float:
        return microseconds([lambda each=each: launch(left, each, how) for each in weights])

    plans = [how._replace(parts=parts) for how in configurations(rows) for parts in parts_of(outputs, inputs, how)]
    planned = plan(rows, outputs, inputs)
    return {
        "rows": rows, "outputs": outputs, "inputs": inputs,
        "cublas_bf16": microseconds([lambda each=each: linear(left, each) for each in weights[::2].bfloat16()]),
        "inductor": microseconds([lambda each=each: dequantized(each) for each in weights]),
        "planned": [ours(planned), planned],
        "best": sorted((ours(each), each) for each in plans)[:BEST],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 8, 16, 64, 256])
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "gpu-few-rows.json")
    arguments = parser.parse_args()
    jobs = [(rows, how) for rows in arguments.rows for how in configurations(rows)]
    with ProcessPoolExecutor(14, mp_context=multiprocessing.get_context("spawn")) as pool:
        errors = dict(zip(jobs, pool.map(compiled, jobs, chunksize=3), strict=True))
    assert max(errors.values()) < 1e-4, max(errors, key=lambda job: errors[job])
    import torch

    found: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/few_rows.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "plan": Plan._fields, "microseconds": [],
    }  # fmt: skip
    for rows, (outputs, inputs) in itertools.product(arguments.rows, SHAPES):
        one = measured(rows, outputs, inputs)
        found["microseconds"].append(one)
        print(*one.values(), flush=True)
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
