"""Text that tokenizers disagree on: a packaged tokenizer has to give the checkpoint's own tokens for all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optimize.models.encoding import load_tokenizer

TEXTS = (
    "Hello, world!",
    " leading space",
    "trailing space ",
    "two  spaces",
    "long" + " " * 40 + "gap",
    "\ttab\t\ttabs",
    "line\nbreak",
    "line\r\nbreak",
    "\n\n\nthree",
    " \n \n mixed \t\n",
    "don't won't I'LL they'RE we'Ve",
    "1",
    "12",
    "123",
    "1234567890",
    "3.14159",
    "1,000,000.50",
    "0x7f",
    "٣٤٥",
    "½ ² Ⅷ",
    "CamelCaseAndSNAKE_CASE",
    "a_b-c.d/e\\f",
    "https://example.org/a?b=c&d=%20#e",
    "name@example.org",
    "def f(x):\n    return x ** 2  # squared\n",
    'if (a != b && c[0] == "d") { e->f(); }',
    "SELECT * FROM t WHERE a='b';",
    "naïve café Ångström",
    "nai\u0308ve cafe\u0301",
    "ﬁ ligature ﬀ",
    "Straße GROẞ",
    "İstanbul ısı",
    "Привет, мир",
    "Γειά σου Κόσμε",
    "שלום עולם",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "你好，世界",
    "こんにちは世界",
    "안녕하세요 세계",
    "日本語とEnglishのmix",
    "👍",
    "👩‍👩‍👧‍👦 family",
    "🇩🇪🇫🇷",
    "👋🏽",
    "☺️ vs ☺",
    "zero\u200bwidth",
    "non\u00a0breaking",
    "soft\u00adhyphen",
    "\u202eright to left\u202c",
    "\ufeffbom",
    "a\u0301\u0328\u0335b",
    "!!!???...",
    "—–-−",
    "“quotes” ‘single’ «guillemets»",
    "$€£¥₿",
    "∑∫√∞≠≤",
    "█▓▒░",
    "\x01\x02 control \x7f",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "pneumonoultramicroscopicsilicovolcanoconiosis",
    "<|im_start|>user\nHi<|im_end|>\n",
    "<|endoftext|>",
    "<s>[INST] x [/INST]</s>",
    "<unk> <pad> <bos> <eos>",
    "<start_of_turn>user\n",
    "<|begin_of_text|><|eot_id|>",
    "a<|im_end|>b",
    "< |im_end| >",
    "<0x0A>",
    "▁under▁score",
    "Ġgpt",
)


def spelling_problems(folder: Path, session: Any) -> list[str]:
    """Where a runtime's own tokenizer differs from that of the checkpoint in `folder`; none if it has no own.

    A server that gives no tokens is known by how many it made of each prompt so far.
    """
    if not hasattr(session, "tokenize"):
        return list(getattr(session, "miscounted", ()))
    tokenizer, found = load_tokenizer(folder), []
    for text in TEXTS:
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens = session.tokenize(text, special=True)
        if tokens != expected:
            found.append(f"its tokenizer makes {tokens[:12]} of {text[:40]!r}, the checkpoint's {expected[:12]}")
            continue
        spelt = tokenizer.decode(expected, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        read = session.detokenize(expected).decode(errors="replace")
        if read != spelt:
            found.append(f"its tokenizer reads {expected[:12]} as {read[:40]!r}, the checkpoint's as {spelt[:40]!r}")
    template = session.chat_template()
    if template != tokenizer.chat_template:
        found.append("its chat template is not the checkpoint's")
    return found
