"""The chat template that a checkpoint keeps for its processor, where the tokenizer alone has none.

Models that read images too often have it in `chat_template.json` or `processor_config.json`, which transformers reads
for processors only. Such a template may take a text only as a part of a content: [{"type": "text", "text": ...}].
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from nf4lora.train.errors import RunError

FILES = ("chat_template.json", "processor_config.json")
SPECIMEN = "(a text stands here 5fd30a)"


def processor_template(name: str, revision: str | None) -> tuple[str, str] | None:
    """The template, and the file that it stands in; None where the checkpoint has none.

    Raises:
        RunError: there is one, and it cannot be read.
    """
    from nf4lora.compat.transformers import cached_file

    for file in FILES:
        path = cached_file(name, file, revision)
        if path is None:
            continue
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
            template = content.get("chat_template")
            if isinstance(template, list):
                template = {named["name"]: named["template"] for named in template}
            template = template["default"] if isinstance(template, dict) else template
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _unusable(name, file, f"{type(error).__name__}: {error}") from None
        if isinstance(template, str) and template:
            return template, file
        if template is not None or file == FILES[0]:
            raise _unusable(name, file, "it holds no text under chat_template")
    return None


def _unusable(name: str, file: str, why: str) -> RunError:
    return RunError(
        f"the chat template of {name} stands in {file}, which cannot be used ({why}); name another one with "
        "--chat_template FILE.jinja, or --chat_template chatml"
    )


def in_parts(messages: Sequence[dict]) -> list[dict]:
    """The same conversation with each text as the one part of its content."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else message
        for message in messages
    ]


def wants_parts(render: Callable[[list[dict]], str | None]) -> bool:
    """Whether a template shows texts only where they are parts of a content."""
    turns = [{"role": "user", "content": SPECIMEN}, {"role": "assistant", "content": SPECIMEN}]
    shown, shown_in_parts = ((render(conversation) or "").count(SPECIMEN) for conversation in (turns, in_parts(turns)))
    return shown < len(turns) == shown_in_parts
