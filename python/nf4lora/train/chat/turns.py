"""Where the answers stand in a rendered conversation.

The chat template is applied to the conversation up to an answer and with the answer, and what differs is the answer
with its end-of-turn token. That needs no {% generation %} tags and works on any template that renders a conversation
from left to right. Templates that rewrite earlier turns (some drop old reasoning) are read with a marker in place of
the answer. Whatever way a span was found, it must hold the answer's text, and no word of a tool. In long conversations
most turns are found by what the template writes around them (marks.py).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nf4lora.train.chat.marks import Place, Shortcuts, places
from nf4lora.train.samples.tools import functions

MARKER = "(the answer stands here 8cb1f2)"
FEW = 3  # answers that are all found by rendering up to them; in longer conversations shortcuts are looked for


class MaskError(ValueError):
    """The template hides where an answer starts or ends."""


@dataclass(frozen=True)
class Turn:
    """Characters [start, end) of the rendered conversation that the model has to produce."""

    start: int
    end: int


@dataclass(frozen=True)
class Ends:
    """Special tokens of a tokenizer, and those among them that close a turn."""

    special: Sequence[str]
    closing: Sequence[str]


Render = Callable[..., "str | None"]  # messages, add_generation_prompt=False -> text; None where the template refuses


def find_ends(tokenizer: Any, stop_tokens: Sequence[str], render: Render) -> Ends:
    """The end token, those that end generation, and what the template itself writes behind an answer."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    never = {tokenizer.bos_token, tokenizer.pad_token, tokenizer.unk_token, "", None} - {tokenizer.eos_token}
    special = {*special, *tokenizer.all_special_tokens, *stop_tokens} - never
    ask, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": MARKER}
    last = (render([ask, answer]) or "").rpartition(MARKER)[2]
    inner = (render([ask, answer, ask]) or "").rpartition(MARKER)[2].lstrip()
    closing = {token for token in special if token in last or inner.startswith(token)}
    return Ends(sorted(special), sorted((closing | {tokenizer.eos_token, *stop_tokens}) - never))


def answer_turns(
    messages: Sequence[dict], render: Render, ends: Ends, first: int = 0, rendered: str | None = None
) -> list[Turn]:
    """The turns of the assistant in the rendered conversation, from message `first` on.

    Raises:
        MaskError: a turn cannot be found, or holds what a tool said.
    """
    rendered = render(messages) if rendered is None else rendered
    if rendered is None:
        raise MaskError("the chat template refuses this conversation")
    answers = [index for index in range(first, len(messages)) if messages[index]["role"] == "assistant"]
    known: list[Place | None] = [None] * len(messages)
    if len(answers) > FEW:
        known = places(messages, render, rendered)
    shortcuts = Shortcuts(messages, rendered, ends.special, known)
    turns: list[Turn] = []
    for index in answers:
        low = turns[-1].end if turns else 0
        span = shortcuts.find(index)
        if span is None or span[0] < low or not _holds(messages[index], rendered[slice(*span)]):
            turn = _turn(messages, index, rendered, render, ends, low)
            shortcuts.learn(index, turn.start, turn.end)
        else:
            turn = Turn(*span)
        turns.append(turn)
    starts = [turn.start for turn in turns]
    for index, message in enumerate(messages):
        if message["role"] == "tool":
            place = known[index]
            start = place.start if place else _around_marker(messages, index, rendered, render)[0]
            before = -1 if start is None else bisect_right(starts, start) - 1
            if before >= 0 and (start or 0) < turns[before].end:
                raise MaskError(f"the chat template puts message {index} (tool) into an answer")
    return turns


def _turn(messages: Sequence[dict], index: int, rendered: str, render: Render, ends: Ends, low: int) -> Turn:
    """The first way of reading the template that gives a span which holds the answer."""
    for start, end in _readings(messages, index, rendered, render, ends):
        if start is not None and end is not None and low <= start <= end:
            end = _with_end_token(rendered, start, end, ends)
            if _holds(messages[index], rendered[start:end]):
                return Turn(start, end)
    raise MaskError(f"message {index} (assistant) cannot be found in what the chat template renders")


def _readings(
    messages: Sequence[dict], index: int, rendered: str, render: Render, ends: Ends
) -> Iterator[tuple[int | None, int | None]]:
    """Starts and ends to try, the surest first; the rest is rendered only where it is needed."""
    start = _start(messages, index, rendered, render)
    with_answer = rendered if index + 1 == len(messages) else render(messages[: index + 1])
    behind = len(with_answer) if with_answer is not None and rendered.startswith(with_answer) else None
    yield start, behind
    marked_start, marked_end = _around_marker(messages, index, rendered, render)
    following = _around_marker(messages, index + 1, rendered, render)[0] if index + 1 < len(messages) else len(rendered)
    for begin in (start, marked_start):
        closed = _closed(rendered, max(begin or 0, marked_end or 0), ends)
        yield begin, closed if following is not None and (closed or 0) <= following else None
        yield begin, behind
        yield begin, marked_end


def _start(messages: Sequence[dict], index: int, rendered: str, render: Render) -> int | None:
    """Where the generation prompt ends; it may announce more than the finished conversation shows (`<think>`)."""
    if index == 0:
        return None  # nothing to render before it
    base, prompt = render(messages[:index]), render(messages[:index], add_generation_prompt=True)
    if prompt is not None and rendered.startswith(prompt):
        return len(prompt)
    if base is None or prompt is None or not rendered.startswith(base):
        return None
    shared = common_prefix(prompt, rendered)
    return shared if shared >= len(base) else None


def common_prefix(a: Sequence, b: Sequence) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _around_marker(
    messages: Sequence[dict], index: int, rendered: str, render: Render
) -> tuple[int | None, int | None]:
    """Where the text of a message starts and ends, by rendering a marker in its place."""
    marked = render([*messages[:index], {**messages[index], "content": MARKER}, *messages[index + 1 :]])
    if marked is None or marked.count(MARKER) != 1:
        return None, None
    head, tail = marked.split(MARKER)
    start = len(head) if rendered.startswith(head) else None
    end = len(rendered) - len(tail) if rendered.endswith(tail) else None
    return start, end


def _closed(rendered: str, start: int, ends: Ends) -> int | None:
    """Behind the first token from `start` on that closes a turn."""
    ends_at = [(at, -len(token)) for token in ends.closing if (at := rendered.find(token, start)) >= 0]
    return min(ends_at)[0] - min(ends_at)[1] if ends_at else None


def _with_end_token(rendered: str, start: int, end: int, ends: Ends) -> int:
    """Move the end to just behind the turn's end token; white space behind that is the template's, not the model's."""
    body = rendered[start:end].rstrip()
    if any(body.endswith(token) for token in ends.special):
        return start + len(body)
    following = rendered[end:].lstrip()
    skipped = len(rendered) - end - len(following)
    token = max((token for token in ends.closing if following.startswith(token)), key=len, default="")
    return end + skipped + len(token) if token else end


def _holds(message: dict, text: str) -> bool:
    """Whether a span has the text of the message (reasoning aside) and the names of the tools that it calls."""
    answer = (message.get("content") or "").rpartition("</think>")[2].strip()
    return answer in text and all(function.get("name", "") in text for function in functions(message))
