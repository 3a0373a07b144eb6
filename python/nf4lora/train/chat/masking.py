"""Samples to tokens and labels: which tokens the loss counts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nf4lora.train.chat.dropped import CALLS, ROLE, TOOLS, left_out, lost_from_last
from nf4lora.train.chat.processor_template import in_parts, wants_parts
from nf4lora.train.chat.turns import MaskError, Render, Turn, answer_turns, common_prefix, find_ends
from nf4lora.train.errors import RunError, UsageError
from nf4lora.train.samples.formats import Sample
from nf4lora.train.samples.keys import REASONING
from nf4lora.train.samples.tools import functions, shown_as_python, with_arguments_as_text

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


def choose_chat_template(tokenizer: Any, wanted: str | None) -> str:
    """Use another chat template than the tokenizer's: ChatML, or that of a file; returns what to say about it.

    The name of a family (`llama3`), as configuration files of other tools have it, must describe the tokenizer's own.

    Raises:
        UsageError: no such file, or a family whose turns the tokenizer's template does not write.
    """
    own = getattr(tokenizer, "chat_template", None)
    if wanted is None:
        return ""
    if wanted == "chatml":
        before = _specimen(tokenizer) if own else None
        tokenizer.chat_template = None
        note = install_chat_template(tokenizer)
        if before is not None and before == _specimen(tokenizer):
            tokenizer.chat_template = own
            return ""
        return "chat_template chatml takes the place of the tokenizer's own" if own else note
    if "{{" in wanted or "{%" in wanted:
        tokenizer.chat_template = wanted
        return "the chat template is the one written in the options"
    if wanted.endswith((".jinja", ".jinja2", ".txt")) or "/" in wanted:
        try:
            tokenizer.chat_template = Path(wanted).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"chat_template: {wanted} cannot be read ({error})") from None
        return f"the chat template is that of {wanted}"
    written = _source(tokenizer)
    sign = next((sign for family, sign in FAMILIES if re.match(family, wanted.lower())), None)
    if sign is None:
        raise UsageError(
            f"chat_template must be chatml, a .jinja file or nothing (the tokenizer's own), got {wanted!r}"
        )
    if sign not in written:
        what = "which has no chat template" if not own else f"whose chat template writes no {sign}"
        raise UsageError(
            f"chat_template {wanted} does not fit the tokenizer, {what}; name a .jinja file, "
            "or drop the line to use what the tokenizer has"
        )
    return f"chat_template {wanted}: the tokenizer's own template, which writes the same turns, is used"


def _specimen(tokenizer: Any) -> str | None:
    """What the template makes of a short conversation."""
    turns = [{"role": role, "content": role.upper()} for role in ("system", "user", "assistant", "user")]
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception:  # a template may raise anything
        return None


FAMILIES = (  # names of templates in other tools' files, and what their turns are known by
    ("llama-?4", "<|header_start|>"),
    ("llama-?3", "<|start_header_id|>"),
    ("(llama-?2|mistral|ministral)", "[INST]"),
    ("(qwen|chatml|smollm|hermes|yi)", "<|im_start|>"),
    ("gemma-?4", "<|turn>"),
    ("gemma", "<start_of_turn>"),
    ("phi-?4$", "<|im_sep|>"),
    ("phi", "<|end|>"),
    ("gpt[-_]?oss", "<|channel|>"),
    ("(cohere|command)", "<|START_OF_TURN_TOKEN|>"),
    ("deepseek", "<\uff5cAssistant\uff5c>"),  # with the wide bars that its tokens have
    ("(glm|chatglm)", "<|assistant|>"),
    ("(falcon)", "<|im_start|>"),
    ("granite", "<|start_of_role|>"),
)


def _source(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None)
    return template if isinstance(template, str) else "".join((template or {}).values())


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
        self.source = _source(self.tokenizer)
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
        whole, refusal = render(messages), self._refusal
        if any(functions(message) for message in messages) and (whole is None or shown_as_python(messages, whole)):
            as_text = with_arguments_as_text(messages)
            other = render(as_text)
            if other is not None:
                messages, whole = as_text, other
        if whole is None:
            raise RefusedError(f"the chat template refuses this conversation ({refusal})")
        return messages, whole, render

    def _named(self, message: dict) -> dict:
        given = [name for name in REASONING if message.get(name)]
        if not given or not self.read or set(given) & set(self.read):
            return message
        return {**{key: value for key, value in message.items() if key not in given}, self.read[0]: message[given[0]]}

    def _chat(self, sample: Sample) -> tuple[list[int], list[bool]]:
        messages, whole, render = self._rendered(sample)
        self._compare(sample, messages, whole)
        untrained = {index for index in sample.untrained if messages[index]["role"] == "assistant"}
        turns: list[Turn] = []
        if self.answers_only or untrained:
            try:
                turns = answer_turns(
                    messages, render, self.ends, sample.trained_from if self.answers_only else 0, whole
                )
            except MaskError as error:
                if {ROLE["assistant"], CALLS} & set(self.left_out):
                    raise DroppedError(f"{error}; the template leaves it out") from None
                if sample.trained_from or untrained or not self.has_tags:
                    raise
                return self._tagged(sample, messages)
        first = sample.trained_from if self.answers_only else 0
        answers = [index for index, each in enumerate(messages) if each["role"] == "assistant" and index >= first]
        silent = [turn for index, turn in zip(answers, turns, strict=False) if index in untrained]
        ids, trained = self._tokens(whole, [turn for turn in turns if turn not in silent], specials=False)
        if not self.answers_only:
            trained = [not inside for inside in self._tokens(whole, silent, specials=False)[1]]
        ends_open = not any(whole.rstrip().endswith(token) for token in self.ends.special)
        if messages[-1]["role"] == "assistant" and len(messages) - 1 not in untrained and ends_open:
            return self._ended(ids, trained)
        return ids, trained

    def _compare(self, sample: Sample, messages: list[dict], whole: str) -> None:
        """Note what the template leaves out; refuse where the last answer loses a part of its content.

        Raises:
            DroppedError: it does.
        """
        self.left_out = left_out(messages, whole)
        if sample.tools and whole == self._render(None, sample.template_kwargs)(messages):
            self.left_out.append(TOOLS)
        last = len(messages) - 1
        if messages[-1]["role"] == "assistant" and last not in sample.untrained:
            lost = lost_from_last(messages, whole) if self.left_out else ""
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
