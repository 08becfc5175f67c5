"""Ollama's Modelfile beside a GGUF: the chat template in Go's language, parameters, what ends an answer.

A chat template is a program; most only put marks around each message. The marks are found by rendering marked messages,
put together again, and compared with what the template itself makes of whole conversations: one that does more is left
out, and the caller is told.
Source: https://docs.ollama.com/modelfile, https://docs.ollama.com/template
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimize.models.tasks import read_json

Messages = Sequence[tuple[str, str]]  # role, content
Render = Callable[..., str]  # (messages, prompting: bool) -> text
SAMPLING = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "repetition_penalty": "repeat_penalty"}
ROLES = ("system", "user", "assistant")
TRIED: tuple[Messages, ...] = (
    (("user", "One."),),
    (("system", "Two."), ("user", "Three?")),
    (("user", "Four"), ("assistant", "Five"), ("user", "Six")),
    (("system", "Seven"), ("user", "Eight"), ("assistant", "Nine"), ("user", "{{ten}}"), ("assistant", "")),
)


@dataclass(frozen=True)
class Marks:
    """What a chat template puts around the messages of each role, and before an answer."""

    before: Mapping[str, str]
    after: Mapping[str, str]
    prompt: str
    system: str | None = None  # the message that is there where a conversation has none

    def render(self, messages: Messages, *, prompting: bool = True) -> str:
        if self.system is not None and messages[0][0] != "system":
            messages = (("system", self.system), *messages)
        parts = [self.before[role] + content + self.after[role] for role, content in messages]
        return "".join(parts) + (self.prompt if prompting else "")

    def go(self) -> str:
        """As a template of Ollama's."""
        branches = [
            f'{{{{ {"if" if index == 0 else "else if"} eq .Role "{role}" }}}}'
            f"{self.before[role]}{{{{ .Content }}}}{self.after[role]}"
            for index, role in enumerate(ROLES)
        ]
        return "{{ range .Messages }}" + "".join(branches) + "{{ end }}{{ end }}" + self.prompt


def find_marks(render: Render) -> Marks | None:
    """The marks of a chat template; None where it does more than put marks around messages."""
    system, user, answer, last = (f"\x01{name}\x02" for name in ("system", "user", "answer", "last"))
    messages = (("system", system), ("user", user), ("assistant", answer), ("user", last))
    try:
        text, silent = render(messages, prompting=True), render(messages, prompting=False)
        alone = render((("user", last),), prompting=True)
        pieces = []
        rest = text
        for content in (system, user, answer, last):
            piece, found, rest = rest.partition(content)
            if not found:
                return None
            pieces.append(piece)
        if not text.startswith(silent):
            return None
        prompt = text[len(silent) :]
        after_user = rest.removesuffix(prompt)
        before_answer = pieces[2].removeprefix(after_user)
        after_answer = render(messages[:3], prompting=False).partition(answer)[2]
        before_user = pieces[3].removeprefix(after_answer)
        marks = Marks(
            {"system": pieces[0], "user": before_user, "assistant": before_answer},
            {
                "system": pieces[1].removesuffix(before_user), "user": after_user,
                "assistant": after_answer,
            },
            prompt,
        )  # fmt: skip
        default = alone.partition(last)[0].removesuffix(before_user)
        if default:
            inside = default.removeprefix(pieces[0])
            marks = Marks(marks.before, marks.after, prompt, inside.removesuffix(marks.after["system"]))
        same = all(
            marks.render(tried, prompting=prompting) == render(tried, prompting=prompting)
            for tried in TRIED
            for prompting in (True, False)
        )
    except Exception:  # templates refuse conversations by raising what they like
        return None
    return marks if same else None


def modelfile(folder: Path, model: str) -> tuple[str, str | None]:
    """The text of a Modelfile for a checkpoint's folder, and what it could not say, or None."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)

    start = tokenizer.bos_token if _adds(tokenizer) else ""

    def render(messages: Messages, *, prompting: bool) -> str:
        spoken = [{"role": role, "content": content} for role, content in messages]
        text = str(tokenizer.apply_chat_template(spoken, tokenize=False, add_generation_prompt=prompting))
        return text.removeprefix(start)  # which llama.cpp puts there itself

    lines, remark = [f"FROM ./{model}"], None
    if tokenizer.chat_template is None:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    elif (marks := find_marks(render)) is None:
        remark = "the chat template does more than put marks around messages: Ollama takes it from the GGUF"
    else:
        lines.append(f'TEMPLATE """{marks.go()}"""')
        if marks.system:
            lines.append(f'SYSTEM """{marks.system}"""')
    path = folder / "generation_config.json"
    settings = read_json(path) if path.is_file() else {}
    ends = settings.get("eos_token_id", tokenizer.eos_token_id)
    for end in ends if isinstance(ends, list) else [ends]:
        if end is not None:
            lines.append(f'PARAMETER stop "{tokenizer.convert_ids_to_tokens(end)}"')
    lines += [f"PARAMETER {theirs} {settings[ours]}" for ours, theirs in SAMPLING.items() if settings.get(ours)]
    return "\n".join(lines) + "\n", remark


def _adds(tokenizer: Any) -> bool:
    """Whether the tokenizer, and so llama.cpp, puts its first token there by itself."""
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id
