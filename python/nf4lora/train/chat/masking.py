"""Samples to tokens and labels: which tokens the loss counts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nf4lora.train.chat.dropped import CALLS, ROLE, TOOLS, left_out, lost_from_last
from nf4lora.train.chat.processor_template import in_parts, wants_parts
from nf4lora.train.chat.template import source
from nf4lora.train.chat.turns import MaskError, Render, Turn, answer_turns, common_prefix, find_ends
from nf4lora.train.samples.formats import Sample
from nf4lora.train.samples.keys import REASONING
from nf4lora.train.samples.tools import functions, shown_as_python, with_arguments_as_text

IGNORED = -100


class RefusedError(MaskError):
    """The template does not render the conversation at all; training on all tokens would not help."""


class DroppedError(MaskError):
    """The template renders the conversation without what was to be learned."""


@dataclass
class Encoder:
    """Tokenizer, and whether only answers are trained; made once, used for every sample."""

    tokenizer: Any
    answers_only: bool
    stop_tokens: Sequence[str] = ()
    left_out: list[str] = field(default_factory=list)  # of the sample that was encoded last; see dropped.py
    parts: bool = False  # whether the template takes texts as parts of a content only
    _refusal: Exception | None = None

    def __post_init__(self) -> None:
        self.parts = wants_parts(self._render(None))
        self.source = source(self.tokenizer)
        self.ends = find_ends(self.tokenizer, self.stop_tokens, self._render(None))
        self.eos = self.tokenizer.eos_token_id
        self.read = [name for name in REASONING if re.search(rf"[.'\"\[]{name}\b", self.source)]

    def _render(self, tools: list | None, options: dict[str, Any] | None = None) -> Render:
        def render(messages: Sequence[dict], add_generation_prompt: bool = False) -> str | None:
            try:
                return self.tokenizer.apply_chat_template(
                    self._taken(messages), tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt,
                    **(options or {}),
                )  # fmt: skip
            except Exception as error:  # a template is a program that came with the model: it may raise anything
                self._refusal = error
                return None

        return render

    def _taken(self, messages: Sequence[dict]) -> list[dict]:
        return in_parts(messages) if self.parts else list(messages)

    def __call__(self, sample: Sample) -> tuple[list[int], list[int]]:
        """-> input_ids, labels (-100 where a token is not trained); the end token is there and trained.

        Raises:
            MaskError: the chat template hides the answers, drops them, or refuses the conversation.
        """
        self.left_out = []
        ids, trained = self._chat(sample) if sample.messages is not None else self._plain(sample)
        return ids, [token if train else IGNORED for token, train in zip(ids, trained, strict=True)]

    def _plain(self, sample: Sample) -> tuple[list[int], list[bool]]:
        text = sample.prompt + sample.text
        ended = self._closing(text)
        end = len(text.rstrip()) if ended else 1 << 60
        ids, trained = self._tokens(text, [Turn(len(sample.prompt), max(end, len(sample.prompt)))], specials=True)
        if not self.answers_only:
            trained = [True] * len(ids)
        if ids[:2] == [self.tokenizer.bos_token_id] * 2 and text.startswith(str(self.tokenizer.bos_token)):
            ids, trained = ids[1:], trained[1:]  # the text was rendered with it, and the tokenizer puts its own before
            self.left_out.append(DOUBLE_START)
        if ids[-2:] == [self.eos] * 2 and text.endswith(str(self.tokenizer.eos_token)):
            ids, trained = ids[:-1], trained[:-1]
        return (ids, trained) if ended and ids[-1:] != [self.eos] else self._ended(ids, trained)

    def _closing(self, text: str) -> bool:
        """Whether a text ends with a token that closes a turn."""
        return any(text.rstrip().endswith(token) for token in self.ends.closing)

    def _rendered(self, sample: Sample) -> tuple[list[dict], str, Render]:
        """The messages in the form that the template takes, and what it makes of them.

        Arguments of tool calls are given as objects; where that is refused, or printed as Python prints a dict, as
        strings. Reasoning is given under the name that the template reads.
        """
        render = self._render(sample.tools, sample.template_kwargs)
        messages = [self._named(message) for message in sample.messages or []]
        rendered, refusal = render(messages), self._refusal
        calls_tools = any(functions(message) for message in messages)
        if calls_tools and (rendered is None or shown_as_python(messages, rendered)):
            as_text = with_arguments_as_text(messages)
            other = render(as_text)
            if other is not None:
                messages, rendered = as_text, other
        if rendered is None:
            raise RefusedError(f"the chat template refuses this conversation ({refusal})")
        return messages, rendered, render

    def _named(self, message: dict) -> dict:
        given = [name for name in REASONING if message.get(name)]
        if not given or not self.read or set(given) & set(self.read):
            return message
        return {**{key: value for key, value in message.items() if key not in given}, self.read[0]: message[given[0]]}

    def _chat(self, sample: Sample) -> tuple[list[int], list[bool]]:
        messages, rendered, render = self._rendered(sample)
        self._compare(sample, messages, rendered)
        untrained = {index for index in sample.untrained if messages[index]["role"] == "assistant"}
        turns: list[Turn] = []
        if self.answers_only or untrained:
            try:
                turns = answer_turns(
                    messages, render, self.ends, sample.trained_from if self.answers_only else 0, rendered
                )
            except MaskError as error:
                if {ROLE["assistant"], CALLS} & set(self.left_out):
                    raise DroppedError(f"{error}; the template leaves it out") from None
                if sample.trained_from or untrained or not self.has_tags:
                    raise
                return self._tagged(sample, messages)
        first = sample.trained_from if self.answers_only else 0
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant" and index >= first]
        silent = [turn for index, turn in zip(answers, turns, strict=False) if index in untrained]
        ids, trained = self._tokens(rendered, [turn for turn in turns if turn not in silent], specials=False)
        if not self.answers_only:
            trained = [not inside for inside in self._tokens(rendered, silent, specials=False)[1]]
        ends_open = not any(rendered.rstrip().endswith(token) for token in self.ends.special)
        if messages[-1]["role"] == "assistant" and len(messages) - 1 not in untrained and ends_open:
            return self._ended(ids, trained)
        return ids, trained

    def _compare(self, sample: Sample, messages: list[dict], rendered: str) -> None:
        """Note what the template leaves out; refuse where the last answer loses a part of its content.

        Raises:
            DroppedError: it does.
        """
        self.left_out = left_out(messages, rendered)
        if sample.tools and rendered == self._render(None, sample.template_kwargs)(messages):
            self.left_out.append(TOOLS)
        last = len(messages) - 1
        if messages[-1]["role"] == "assistant" and last not in sample.untrained:
            lost = lost_from_last(messages, rendered) if self.left_out else ""
            if lost:
                raise DroppedError(
                    f"message {last} (assistant), the last answer, loses its {lost} in the chat template; name a "
                    "template that keeps them (--chat_template FILE.jinja), or take them out of the data"
                )

    def advice(self, sample: Sample, error: MaskError) -> str:
        """What gets around an answer that cannot be found; nothing where nothing does."""
        if isinstance(error, (RefusedError, DroppedError)) or sample.untrained:
            return ""
        tags = "" if sample.trained_from or self.has_tags else "a template with {% generation %} tags, or "
        return f"; {tags}--assistant_only_loss false{',' if tags else ''} gets around this"

    @property
    def has_tags(self) -> bool:
        """Whether the template marks what the assistant says with {% generation %}."""
        return "{% generation" in self.source.replace("{%-", "{%")

    def _tagged(self, sample: Sample, messages: list[dict]) -> tuple[list[int], list[bool]]:
        """What the template's own {% generation %} tags mark, and the end token behind each answer."""
        encoded = self.tokenizer.apply_chat_template(
            self._taken(messages), tools=sample.tools, tokenize=True, return_dict=True,
            return_assistant_tokens_mask=True, **sample.template_kwargs,
        )  # fmt: skip
        ids, mask = list(encoded["input_ids"]), [bool(bit) for bit in encoded["assistant_masks"]]
        special = set(self.tokenizer.convert_tokens_to_ids(list(self.ends.special)))
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
            start, end = (common_prefix(tokens(text[:cut]), ids) for cut in (turn.start, turn.end))
            trained[start:end] = [True] * (end - start)
        return ids, trained


DOUBLE_START = "a second start token"
