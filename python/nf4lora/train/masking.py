"""Samples to tokens and labels: which tokens the loss counts.

Where an answer starts and ends is found by rendering: the chat template is applied to the conversation up to the answer
and with the answer, and what differs is the answer with its end-of-turn token. That needs no {% generation %} tags and
works on any template that renders a conversation from left to right. Templates that rewrite earlier turns (some drop
old reasoning) are read with a marker in place of the answer; every span found is checked to hold the answer's text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nf4lora.train.errors import RunError
from nf4lora.train.formats import Sample

IGNORED = -100
MARKER = "(the answer stands here 8cb1f2)"

# `eos_token` ends each turn, so that generation stops there whichever token the model was made with; where it is
# <|im_end|>, this is ChatML to the letter.
CHATML = (
    "{%- for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + eos_token + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class MaskError(ValueError):
    """The template hides where an answer starts or ends."""


@dataclass(frozen=True)
class Turn:
    """Characters [start, end) of the rendered conversation that the model has to produce."""

    start: int
    end: int


def install_chat_template(tokenizer: Any) -> str:
    """Give the tokenizer a ChatML template where it has none; returns what to say about it, or nothing."""
    if getattr(tokenizer, "chat_template", None):
        return ""
    if not tokenizer.eos_token:
        raise RunError("the tokenizer has neither a chat template nor an end token; data with roles needs one of them")
    starts = tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id] and tokenizer.bos_token_id is not None
    tokenizer.chat_template = ("{{- bos_token }}" if starts else "") + CHATML
    return f"the tokenizer has no chat template; ChatML was installed, each turn ended by {tokenizer.eos_token}"


def answer_turns(
    messages: Sequence[dict],
    render: Callable[..., str | None],
    ends: Sequence[str],
    first: int = 0,
) -> list[Turn]:
    """The turns of the assistant in the rendered conversation, from message `first` on.

    Args:
        render: messages, add_generation_prompt=False -> text; None where the template refuses the conversation
        ends: special tokens; the one that follows an answer belongs to it

    Raises:
        MaskError: a turn cannot be found.
    """
    whole = render(messages)
    if whole is None:
        raise MaskError("the chat template refuses this conversation")
    turns: list[Turn] = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and index >= first:
            turns.append(_turn(messages, index, whole, render, ends, turns[-1].end if turns else 0))
    return turns


def _turn(
    messages: Sequence[dict],
    index: int,
    whole: str,
    render: Callable[..., str | None],
    ends: Sequence[str],
    low: int,
) -> Turn:
    """The first way of reading the template that gives a span which holds the answer."""
    with_answer = whole if index + 1 == len(messages) else render(messages[: index + 1])
    behind = len(with_answer) if with_answer is not None and whole.startswith(with_answer) else None
    marked_start, marked_end = _around_marker(messages, index, whole, render)
    for start in (_start(messages, index, whole, render), marked_start):
        for end in (behind, marked_end):
            if start is not None and end is not None and low <= start <= end:
                end = _with_end_token(whole, start, end, ends)
                if _holds(messages[index], whole[start:end]):
                    return Turn(start, end)
    raise MaskError(f"message {index} (assistant) cannot be found in what the chat template renders")


def _start(messages: Sequence[dict], index: int, whole: str, render: Callable[..., str | None]) -> int | None:
    """Where the generation prompt ends; it may announce more than the finished conversation shows (`<think>`)."""
    if index == 0:
        return None  # nothing to render before it
    base, prompt = render(messages[:index]), render(messages[:index], add_generation_prompt=True)
    if base is None or prompt is None or not whole.startswith(base):
        return None
    shared = len(prompt) if whole.startswith(prompt) else _common_prefix(prompt, whole)
    return shared if shared >= len(base) else None


def _common_prefix(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _around_marker(
    messages: Sequence[dict], index: int, whole: str, render: Callable[..., str | None]
) -> tuple[int | None, int | None]:
    """Where the answer's text starts and ends, by rendering a marker in its place."""
    marked = render([*messages[:index], {**messages[index], "content": MARKER}, *messages[index + 1 :]])
    if marked is None or marked.count(MARKER) != 1:
        return None, None
    head, tail = marked.split(MARKER)
    start = len(head) if whole.startswith(head) else None
    end = len(whole) - len(tail) if whole.endswith(tail) else None
    return start, end


def _with_end_token(whole: str, start: int, end: int, ends: Sequence[str]) -> int:
    """Move the end to just behind the turn's end token; white space behind that is the template's, not the model's."""
    body = whole[start:end].rstrip()
    if any(body.endswith(token) for token in ends):
        return start + len(body)
    following = whole[end:].lstrip()
    skipped = len(whole) - end - len(following)
    token = max((token for token in ends if following.startswith(token)), key=len, default="")
    return end + skipped + len(token) if token else end


def _holds(message: dict, text: str) -> bool:
    content = message.get("content") or ""
    return content.rpartition("</think>")[2].strip() in text


@dataclass
class Encoder:
    """Tokenizer, and whether only answers are trained; made once, used for every sample."""

    tokenizer: Any
    answers_only: bool
    stop_tokens: Sequence[str] = ()

    def __post_init__(self) -> None:
        tokenizer = self.tokenizer
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        never = {tokenizer.bos_token, tokenizer.pad_token, tokenizer.unk_token, "", None} - {tokenizer.eos_token}
        self.ends = sorted({*special, *tokenizer.all_special_tokens, *self.stop_tokens} - never)
        self.eos = tokenizer.eos_token_id

    def __call__(self, sample: Sample) -> tuple[list[int], list[int]]:
        """-> input_ids, labels (-100 where a token is not trained); the end token is there and trained.

        Raises:
            MaskError: the chat template hides the answers.
        """
        ids, trained = self._chat(sample) if sample.messages is not None else self._plain(sample)
        if not self.answers_only:
            trained = [True] * len(ids)
        return ids, [token if train else IGNORED for token, train in zip(ids, trained, strict=True)]

    def _plain(self, sample: Sample) -> tuple[list[int], list[bool]]:
        ids, trained = self._tokens(sample.prompt + sample.text, [Turn(len(sample.prompt), 1 << 60)], specials=True)
        return self._ended(ids, trained)

    def _chat(self, sample: Sample) -> tuple[list[int], list[bool]]:
        messages = sample.messages or []

        def render(some: Sequence[dict], add_generation_prompt: bool = False) -> str | None:
            from jinja2.exceptions import TemplateError

            try:
                return self.tokenizer.apply_chat_template(
                    list(some), tools=sample.tools, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            except (TemplateError, TypeError, KeyError, IndexError, ValueError):
                if some is messages:
                    raise
                return None

        try:
            whole = render(messages)
        except Exception as error:
            raise MaskError(f"the chat template refuses this conversation ({error})") from None
        assert whole is not None
        if not self.answers_only:
            turns = []
        else:
            try:
                turns = answer_turns(messages, render, self.ends, sample.trained_from)
            except MaskError:
                if sample.trained_from or "{% generation" not in self._template().replace("{%-", "{%"):
                    raise
                return self._tagged(sample)
        ids, trained = self._tokens(whole, turns, specials=False)
        ends_with_answer = messages[-1]["role"] == "assistant"
        if ends_with_answer and not any(whole.rstrip().endswith(token) for token in self.ends):
            return self._ended(ids, trained)
        return ids, trained

    def _template(self) -> str:
        template = self.tokenizer.chat_template
        return template if isinstance(template, str) else "".join((template or {}).values())

    def _tagged(self, sample: Sample) -> tuple[list[int], list[bool]]:
        """What the template's own {% generation %} tags mark, and the end token behind each answer."""
        encoded = self.tokenizer.apply_chat_template(
            sample.messages, tools=sample.tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = list(encoded["input_ids"]), [bool(bit) for bit in encoded["assistant_masks"]]
        special = set(self.tokenizer.convert_tokens_to_ids(list(self.ends)))
        for position in range(1, len(ids)):
            if mask[position - 1] and not mask[position] and ids[position - 1] not in special:
                mask[position] = ids[position] in special
        return ids, mask

    def _ended(self, ids: list[int], trained: list[bool]) -> tuple[list[int], list[bool]]:
        if self.eos is not None and ids[-1:] != [self.eos]:
            return [*ids, self.eos], [*trained, True]
        return ids, [*trained[:-1], True]

    def _tokens(self, text: str, turns: Sequence[Turn], specials: bool) -> tuple[list[int], list[bool]]:
        """Tokens of the text, and which of them lie in a turn.

        The text is tokenised in one piece, as it is at inference. A token across the start of an answer counts where
        the part before is white space (` answer` after `ASSISTANT:`), one across its end counts always.
        """
        if not self.tokenizer.is_fast:
            return self._slow_tokens(text, turns, specials)
        encoded = self.tokenizer(text, add_special_tokens=specials, return_offsets_mapping=True)
        trained, current = [], 0
        for start, end in encoded["offset_mapping"]:
            while current < len(turns) and turns[current].end <= start:
                current += 1
            turn = turns[current] if current < len(turns) else None
            inside = turn is not None and end > turn.start and not text[start : turn.start].strip()
            trained.append(bool(inside and (start, end) != (0, 0)))
        return list(encoded["input_ids"]), trained

    def _slow_tokens(self, text: str, turns: Sequence[Turn], specials: bool) -> tuple[list[int], list[bool]]:
        """Without offsets: a turn starts and ends where the tokens of the text up to there stop agreeing."""

        def tokens(part: str) -> list[int]:
            return list(self.tokenizer(part, add_special_tokens=specials)["input_ids"])

        ids = tokens(text)
        trained = [False] * len(ids)
        for turn in turns:
            start, end = (self._agree(tokens(text[:cut]), ids) for cut in (turn.start, turn.end))
            trained[start:end] = [True] * (end - start)
        return ids, trained

    @staticmethod
    def _agree(part: list[int], ids: list[int]) -> int:
        return next((i for i, (x, y) in enumerate(zip(part, ids, strict=False)) if x != y), min(len(part), len(ids)))
