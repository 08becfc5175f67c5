"""The table of a comparison that was made: what compare.py prints, from the JSON that it wrote.

python benchmarks/peers/table.py FILE
"""

import json
import sys
from pathlib import Path
from typing import Any

from optimize.pipeline.statistics import Interval

OURS = ("ours-0.001", "ours-0.005")
CLASSES = (0.001, 0.005)


def show(report: dict[str, Any]) -> str:
    """The table, what failed, and ours against the fastest of the others in each class."""
    artifacts = report["artifacts"]
    return "\n".join([table(artifacts, report["cells"]), "", *against_peers(artifacts)])


def table(results: list[dict[str, Any]], cells: list[list[int]]) -> str:
    """As Markdown, fastest first; what failed comes last, in the tool's own words."""
    timed = sorted((each for each in results if "speedup" in each), key=lambda each: -each["speedup"]["value"])
    ours = [name for name in OURS if any(each["name"] == name for each in timed)]
    labelled = any("accuracy" in each for each in timed)
    head = ["artifact", "times eager float32", *(f"{batch}x{sequence}, ms" for batch, sequence in cells), "drop"]
    head += ["accuracy", "answers differ"] * labelled + ["within", *(f"{name} / it" for name in ours)]
    rows = [head, ["---"] * len(head)]
    for each in timed:
        row = [each["name"], text(each["speedup"]), *(f"{1e3 * value:.2f}" for value in each["seconds_by_cell"])]
        row += [f"{max(each['drop'], 0):.5f}", each["within"]]
        if labelled:
            row[-1:-1] = [f"{each['accuracy']:.4f}", f"{each['differing']:.2%}"]
        rows.append(row + [text(each["ours_over_it"][name]) if name != each["name"] else "" for name in ours])
    failed = [f"- {each['name']} ({each['settings']}): {each['error']}" for each in results if "error" in each]
    return "\n".join([f"| {' | '.join(row)} |" for row in rows] + [""] * bool(failed) + failed)


def text(interval: dict[str, float]) -> str:
    return str(Interval(**interval))


def within(drop: float) -> str:
    """The strictest accuracy class that a drop belongs to."""
    return next((f"{limit:g}" for limit in CLASSES if drop <= limit), "neither")


def against_peers(results: list[dict[str, Any]]) -> list[str]:
    """For each gate: ours, and the fastest of the others that are as accurate."""
    sentences = []
    for limit in CLASSES:
        name = f"ours-{limit:g}"
        if any(each["name"] == name and each.get("drop", 1) > limit for each in results):
            sentences.append(f"Drop of at most {limit:g}: {name} is not within it by this measure.")
            continue
        others = [each for each in results if each.get("drop", 1) <= limit and not each["name"].startswith("ours-")]
        if not others or not all(name in each["ours_over_it"] for each in others):
            continue
        best = max(others, key=lambda each: each["speedup"]["value"])
        times = text(best["ours_over_it"][name])
        sentences.append(f"Drop of at most {limit:g}: {name} is {times} times as fast as {best['name']}.")
    return sentences


if __name__ == "__main__":
    print(show(json.loads(Path(sys.argv[1]).read_text())))
