"""Samples to tokens and labels: which tokens the loss counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nf4lora.train.errors import RunError
from nf4lora.train.formats import Sample
from nf4lora.train.turns import MaskError, Render, Turn, answer_turns, common_prefix, find_ends

IGNORED = -100

# `eos_token` ends each turn, so that generation stops there whichever token the model was made with; where it is
# <|im_end|>, this is ChatML to the letter.
CHATML = (
    "{%- for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + eos_token + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def install_chat_template(tokenizer: Any) -> str:
    """Give the tokenizer a ChatML template where it has none; returns what to say about it, or nothing."""
    if getattr(tokenizer, "chat_template", None):
        return ""
    if not tokenizer.eos_token:
        raise RunError("the tokenizer has neither a chat template nor an end token; data with roles needs one of them")
    starts = tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id] and tokenizer.bos_token_id is not None
    tokenizer.chat_template = ("{{- bos_token }}" if starts else "") + CHATML
    return f"the tokenizer has no chat template; ChatML was installed, each turn ended by {tokenizer.eos_token}"


@dataclass
class Encoder:
    """Tokenizer, and whether only answers are trained; made once, used for every sample."""

    tokenizer: Any
    answers_only: bool
    stop_tokens: Sequence[str] = ()
    _refusal: Exception | None = None

    def __post_init__(self) -> None:
        self.ends = find_ends(self.tokenizer, self.stop_tokens, self._render(None))
        self.eos = self.tokenizer.eos_token_id

    def _render(self, tools: list | None) -> Render:
        from jinja2.exceptions import TemplateError

        def render(messages: Sequence[dict], add_generation_prompt: bool = False) -> str | None:
            try:
                return self.tokenizer.apply_chat_template(
                    list(messages), tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            except (TemplateError, TypeError, KeyError, IndexError, AttributeError, ValueError) as error:
                self._refusal = error
                return None

        return render

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
        messages, render = sample.messages or [], self._render(sample.tools)
        whole = render(messages)
        if whole is None:
            raise MaskError(f"the chat template refuses this conversation ({self._refusal})")
        turns: list[Turn] = []
        if self.answers_only:
            try:
                turns = answer_turns(messages, render, self.ends, sample.trained_from)
            except MaskError:
                if sample.trained_from or "{% generation" not in self._template().replace("{%-", "{%"):
                    raise
                return self._tagged(sample)
        ids, trained = self._tokens(whole, turns, specials=False)
        ends_open = not any(whole.rstrip().endswith(token) for token in self.ends.special)
        return self._ended(ids, trained) if messages[-1]["role"] == "assistant" and ends_open else (ids, trained)

    def _template(self) -> str:
        template = self.tokenizer.chat_template
        return template if isinstance(template, str) else "".join((template or {}).values())

    def _tagged(self, sample: Sample) -> tuple[list[int], list[bool]]:
        """What the template's own {% generation %} tags mark, and the end token behind each answer."""
        encoded = self.tokenizer.apply_chat_template(
            sample.messages, tools=sample.tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
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
