"""What a chat template leaves out of a conversation: the rendered text is compared with the row."""

from __future__ import annotations

import json
from collections.abc import Sequence

from nf4lora.train.samples.keys import REASONING
from nf4lora.train.samples.tools import functions

ROLE = {
    "system": "system messages", "developer": "developer messages", "user": "messages of the user",
    "tool": "results of tools", "assistant": "words of an answer",
}  # fmt: skip
LAST_REASONING = "the reasoning of the last answer"
CALLS = "tool calls, or their arguments"
TOOLS = "the tools"


class Shown:
    """Asks whether texts stand in a rendered conversation: as they are, as JSON writes them, or with other white space
    or case. Texts are asked for in the order of the conversation, so that a long one is not searched from its start."""

    def __init__(self, rendered: str):
        self.rendered = rendered
        self.cursor = 0
        self.plain = ""

    def __call__(self, text: str) -> bool:
        text = text.strip()
        for form in (text, json.dumps(text, ensure_ascii=False)[1:-1]):
            at = self.rendered.find(form, self.cursor)
            if at >= 0:
                self.cursor = at
                return True
            if form in self.rendered:
                return True
        self.plain = self.plain or _plain(self.rendered)
        return _plain(text) in self.plain


def _plain(text: str) -> str:
    return "".join(text.split()).casefold()


def thoughts(message: dict) -> list[str]:
    """The reasoning in a message: under keys of its own, and between <think> tags in its content."""
    inside = (message.get("content") or "").rpartition("</think>")[0].rpartition("<think>")[2]
    return [text for text in (inside, *(message.get(name) for name in REASONING)) if text and isinstance(text, str)]


def left_out(messages: Sequence[dict], rendered: str) -> list[str]:
    """Names of the kinds of things that the conversation holds and the rendered text does not."""
    shown, missing = Shown(rendered), []
    last = max((index for index, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    for index, message in enumerate(messages):
        content, closing, answer = (message.get("content") or "").rpartition("</think>")
        if not shown(answer if message["role"] == "assistant" or not closing else content + closing + answer):
            missing.append(ROLE[message["role"]])
        if message["role"] == "assistant" and not all(map(shown, thoughts(message))):
            missing.append(LAST_REASONING if index == last else "the reasoning of earlier answers")
        if not all(shown(str(call.get("name", ""))) and _arguments(call, shown) for call in functions(message)):
            missing.append(CALLS)
    return list(dict.fromkeys(missing))


def lost_from_last(messages: Sequence[dict], rendered: str) -> str:
    """What the last message, an answer, loses of its content; nothing where it is all there."""
    shown, last = Shown(rendered), messages[-1]
    if not shown((last.get("content") or "").rpartition("</think>")[2]):
        return "words"
    if not all(map(shown, thoughts({"content": last.get("content")}))):
        return "reasoning"
    return "" if all(shown(str(call.get("name", ""))) for call in functions(last)) else "tool calls"


def _arguments(function: dict, shown: Shown) -> bool:
    """Whether the texts among the arguments of a call are shown; numbers are not looked for."""
    arguments = function.get("arguments")
    if isinstance(arguments, dict):
        return all(shown(key) and (not isinstance(value, str) or shown(value)) for key, value in arguments.items())
    return not isinstance(arguments, str) or shown(arguments)
