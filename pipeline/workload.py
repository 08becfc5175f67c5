"""The workload as it is asked for: cells of the task's form, read and checked."""

from __future__ import annotations

import re

from optimize.pipeline.contract import Cell, Form
from optimize.pipeline.errors import RequestError

DEFAULT_WORKLOAD = "1x32,1x128,8x128"
EXAMPLES = {Form.TOKENS: "1x32,8x128", Form.PROMPTS: "1x32+32,1x512+16", Form.IMAGES: "1,8,32",
             Form.CLIPS: "1+32,4+32"}  # fmt: skip
PARTS = {"BATCH": "batch", "TOKENS": "sequence", "PROMPT": "sequence", "NEW": "new"}  # of a form: fields of a cell
NUMBER = r"\d{1,9}"
MAX_WEIGHT = 1000
MAX_TOKENS = 1 << 20  # in one cell: more is a typing error, and would only end in an out-of-memory kill


def parse_workload(text: str, max_length: int, form: Form = Form.TOKENS) -> tuple[Cell, ...]:
    """Read cells of that form, such as `1x32*9,8x128`. Raises RequestError for what cannot be run."""
    pattern = (
        re.sub("[A-Z]+", lambda part: rf"(?P<{PARTS[part[0]]}>{NUMBER})", re.escape(form))
        + rf"(\*(?P<weight>{NUMBER}))?"
    )
    cells: list[Cell] = []
    for part in text.split(","):
        match = re.fullmatch(pattern, part.strip(), re.ASCII)
        if match is None:
            raise RequestError(f"--workload: {part[:40]!r} is not {form}", hint=f"for example {EXAMPLES[form]}")
        cell = Cell(**{name: int(number) for name, number in match.groupdict().items() if number})
        if not 0 < cell.weight <= MAX_WEIGHT:
            raise RequestError(f"--workload: {part.strip()}: a weight is a whole number from 1 to {MAX_WEIGHT}")
        if form in (Form.PROMPTS, Form.CLIPS) and cell.new < 2:
            raise RequestError(f"--workload: {cell}: at least 2 new tokens, to tell the first from the rest")
        if form in (Form.IMAGES, Form.CLIPS) and cell.batch < 1:
            raise RequestError(f"--workload: {cell}: at least a batch of 1")
        if form in (Form.TOKENS, Form.PROMPTS) and (cell.batch < 1 or cell.sequence < 4):
            raise RequestError(f"--workload: {part}: at least a batch of 1 and 4 tokens (two of them are special)")
        if cell.sequence + cell.new > max_length:
            raise RequestError(
                f"--workload: {cell} is longer than the model's limit of {max_length} tokens",
                hint="prompt and new tokens count together" if cell.new else "name a shorter one",
            )
        if cell.tokens > MAX_TOKENS:
            raise RequestError(f"--workload: {cell} is more than {MAX_TOKENS} tokens in one call")
        if str(cell) in map(str, cells):
            raise RequestError(f"--workload: {cell} is given twice", hint=f"write it once, with a weight: {cell}*2")
        cells.append(cell)
    return tuple(cells)


def shortened(workload: str, max_length: int) -> str:
    """A workload that nobody asked for, for a model that takes less: prompts are cut, cells that become one are one."""
    cells: dict[str, None] = {}
    for part in workload.split(","):
        batch, x, tokens = part.partition("x")
        sequence, plus, new = tokens.partition("+")
        cells[f"{batch}x{min(int(sequence), max_length - int(new or 0))}{plus}{new}" if x else part] = None
    return ",".join(cells)
