"""Four bits share a scale among a group of a row's weights."""

from __future__ import annotations

from optimize.pipeline.contract import Checkpoint


def why_no_groups(checkpoint: Checkpoint, group: int) -> str | None:
    """Why rows of a model's products cannot be cut into groups of so many weights; or None, as far as its config says:
    not of experts, nor of what DeepSeek's attention has in between.
    """
    if group < 1:
        return f"group={group} is not at least 1"
    sizes = checkpoint.dimensions
    cut = next((size for size in (sizes.hidden, sizes.intermediate, sizes.attended) if size % group), None)
    return None if cut is None else f"rows of {cut} weights are no whole groups of {group}: a smaller group may fit"
