"""Marks of chat templates are found where that is all they do, and nowhere else."""

import pytest
from jinja2 import Environment

from optimize.passes._modelfile import TRIED, Marks, find_marks

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_DEFAULT = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + CHATML
)
LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
TRIMS = CHATML.replace("m.content", "m.content | trim + '!'")
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise('no system') }}{% endif %}" + CHATML


def marks(template: str) -> Marks | None:
    compiled = Environment().from_string(template)

    def render(messages: object, *, prompting: bool) -> str:
        spoken = [{"role": role, "content": content} for role, content in messages]  # type: ignore[attr-defined]
        return compiled.render(messages=spoken, add_generation_prompt=prompting)

    return find_marks(render)


def test_marks_around_messages_become_a_template() -> None:
    found = marks(CHATML)
    assert found is not None
    assert found.system is None
    assert found.go() == (
        '{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
        "{{ end }}{{ end }}<|im_start|>assistant\n"
    )


def test_a_default_system_message_is_told_apart() -> None:
    found = marks(WITH_DEFAULT)
    assert found is not None and found.system == "Be kind."
    assert found.render(TRIED[0]) == "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nOne.<|im_end|>\n" + (
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("template", [LLAMA3, NO_SYSTEM, CHATML.replace("m.content", "'x'")])
def test_what_does_more_is_left_to_the_template_itself(template: str) -> None:
    assert marks(template) is None
