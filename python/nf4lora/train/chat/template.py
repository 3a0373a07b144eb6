"""Which chat template a run takes: the tokenizer's own, ChatML, a file's, or the text in the options."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from nf4lora.train.errors import RunError, UsageError

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
    written = source(tokenizer)
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


def source(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None)
    return template if isinstance(template, str) else "".join((template or {}).values())
