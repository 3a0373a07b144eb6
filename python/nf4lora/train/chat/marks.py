"""Where the words of each message stand in a rendered conversation, and shortcuts to the answers from there.

Rendering a conversation once for each of its turns takes a time that grows with the square of its length. Instead,
all messages get an invisible mark in the middle of their words, and the conversation is rendered once more: the marks
tell where each message went. What the template writes between two messages repeats itself from turn to turn, so where
an answer starts and ends is worked out once for each such text (turns.py), and recognised afterwards.

Nothing is taken for granted: the text with its marks taken out must be the text without them, and an answer that is
found by a shortcut must hold its message's words like any other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nf4lora.train.samples.keys import REASONING
from nf4lora.train.samples.tools import functions

OPEN, CLOSE = "\ue0e1", "\ue0e2"  # of Unicode's private area: they mean nothing, and JSON writes them as they are
MARK = re.compile(f"{OPEN}([0-9]+){CLOSE}")


@dataclass(frozen=True)
class Place:
    """Characters [start, end) of the rendered conversation in which the words of a message lie."""

    start: int
    end: int


@dataclass
class Marker:
    """Puts marks into texts, and remembers which text each of them stands in."""

    parts: list[tuple[int, str, str]] = field(default_factory=list)  # message, the text before the mark and behind it

    def mark(self, index: int, text: str) -> str:
        """`text` with a mark in the middle of its words; white space around them is often trimmed."""
        words = text.strip()
        if not words:
            return text
        middle = text.find(words) + len(words) // 2
        self.parts.append((index, text[:middle], text[middle:]))
        return f"{text[:middle]}{OPEN}{len(self.parts) - 1}{CLOSE}{text[middle:]}"

    def message(self, index: int, message: dict) -> dict:
        marked = dict(message)
        for name in REASONING:
            if isinstance(message.get(name), str):
                marked[name] = self.mark(index, message[name])
        content = message.get("content") or ""
        thought, closing, answer = content.rpartition("</think>")
        if closing:
            opened = thought.rpartition("<think>")
            thought = "".join(opened[:2]) + self.mark(index, opened[2])
        marked["content"] = thought + closing + self.mark(index, answer)
        if message.get("tool_calls"):
            marked["tool_calls"] = [
                {**call, "function": {**function, "name": self.mark(index, function["name"])}}
                for call, function in zip(message["tool_calls"], functions(message), strict=True)
            ]
        return marked


def places(messages: Sequence[dict], render: Callable[..., str | None], rendered: str) -> list[Place | None]:
    """Where each message went; None for one of which no mark is found, and for all where marks change the rendering."""
    nowhere: list[Place | None] = [None] * len(messages)
    if OPEN in rendered:
        return nowhere
    marker = Marker()
    pieces = MARK.split(render([marker.message(index, message) for index, message in enumerate(messages)]) or "")
    if "".join(pieces[::2]) != rendered:
        return nowhere
    at, positions = 0, {}
    for piece, name in zip(pieces[::2], pieces[1::2], strict=False):
        at += len(piece)
        positions[int(name)] = None if int(name) in positions else at  # a text that is written twice has no one place
    result = list(nowhere)
    for number, position in positions.items():
        if position is not None:
            index, before, behind = marker.parts[number]
            place, earlier = _grown(rendered, position, before, behind), result[index]
            if earlier is not None:
                place = Place(min(place.start, earlier.start), max(place.end, earlier.end))
            result[index] = place
    return result


def _grown(rendered: str, at: int, before: str, behind: str) -> Place:
    """The text around a mark, written as it is or as JSON writes it, with the white space around it or without; else
    the mark alone."""
    for left, right in ((before, behind), (before.lstrip(), behind.rstrip()), (_json(before), _json(behind))):
        if rendered.endswith(left, 0, at) and rendered.startswith(right, at):
            return Place(at - len(left), at + len(right))
    return Place(at, at)


def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


@dataclass
class Shortcuts:
    """Starts and ends of answers by the template's text before the next known place."""

    messages: Sequence[dict]
    rendered: str
    special: Sequence[str]
    places: list[Place | None]
    starts: dict[tuple, tuple[str, int]] = field(default_factory=dict)  # -> that text, how far before its end
    ends: dict[tuple, tuple[str, int]] = field(default_factory=dict)

    def find(self, index: int) -> tuple[int, int] | None:
        """The answer at `index`, if the text around it has been seen before."""
        own, following = self.places[index], self._place(index + 1)
        if own is None or following is None or self._holds_special(own):
            return None
        start = self._recognised(self.starts.get(self._key(index - 1)), own)
        end = self._recognised(self.ends.get(self._key(index)), following)
        before = self._place(index - 1)
        if start is None or end is None or not start <= own.start <= own.end <= end <= following.start:
            return None
        return None if before is not None and start < before.end else (start, end)

    def learn(self, index: int, start: int, end: int) -> None:
        """Remember what stands around an answer that was found by rendering."""
        own, before, following = self.places[index], self._place(index - 1), self._place(index + 1)
        if own is None or before is None or following is None or self._holds_special(own):
            return
        if before.end <= start <= own.start:
            self.starts[self._key(index - 1)] = self._text(before.end, start, own.start)
        if own.end <= end <= following.start:
            low = end if self.messages[index].get("tool_calls") else own.end  # arguments differ from call to call
            self.ends[self._key(index)] = self._text(own.end, end, following.start, low)

    def _place(self, index: int) -> Place | None:
        return self.places[index] if 0 <= index < len(self.places) else None

    def _holds_special(self, place: Place) -> bool:
        """An answer that quotes the template's own tokens tells nothing about others."""
        return any(self.rendered.find(token, place.start, place.end) >= 0 for token in self.special)

    def _key(self, index: int) -> tuple:
        """What the text between two messages can depend on: their roles, and which parts they have."""
        pair = self.messages[max(index, 0) : index + 2]
        return tuple((message["role"], *(bool(message.get(name)) for name in ("content", "tool_calls", *REASONING)),
                      "</think>" in (message.get("content") or "")) for message in pair)  # fmt: skip

    def _text(self, low: int, at: int, high: int, otherwise: int | None = None) -> tuple[str, int]:
        """The template's text up to `high`, from the last special token before `at` on, and the distance of `at`.

        Without such a token it begins at `otherwise`, or at `low`.
        """
        tokens = [self.rendered.rfind(token, low, at) for token in self.special]
        begin = max([position for position in tokens if position >= 0], default=low if otherwise is None else otherwise)
        return self.rendered[begin:high], high - at

    def _recognised(self, known: tuple[str, int] | None, place: Place) -> int | None:
        if known is None or not known[0] or not self.rendered.endswith(known[0], 0, place.start):
            return None
        return place.start - known[1]
