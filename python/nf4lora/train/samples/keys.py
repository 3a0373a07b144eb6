"""Keys of rows and turns that decide what is trained. They are honoured or refused by name, never passed over."""

from __future__ import annotations

from typing import Any

# 0 or false takes an answer out of the loss. OpenAI's and Axolotl's files, among others, carry these.
TURN_FLAGS = ("weight", "loss_weight", "train", "training", "trainable", "loss", "loss_mask")
TURN_REFUSED = ("train_detail", "training_detail", "mask")
REASONING = ("reasoning_content", "reasoning", "thinking")  # what a model thought before its answer
ROW_WEIGHTS = ("weight", "sample_weight", "loss_weight", "train")
MASKED, TEXT_ONLY = "which tokens are trained follows from the roles here", "only text is trained here"
ROW_REFUSED = {
    **dict.fromkeys(("loss_mask", "completion_mask", "assistant_masks"), MASKED),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), TEXT_ONLY),
}
CHAT = ("tools", "system", "chat_template_kwargs")
USED = {
    "messages": ("messages", "conversations", *CHAT),
    "sharegpt": ("conversations", *CHAT),
    "alpaca": ("instruction", "input", "output", "history", *CHAT),
    "prompt_completion": ("prompt", "completion", *CHAT),
    "text": ("text",),
}


def filled(value: Any) -> bool:
    return value is not None and not (isinstance(value, (str, list, dict)) and not value)


def check_row(row: dict, kind: str, roles: bool) -> None:
    """Refuse a row whose other columns say something about its training.

    Raises:
        ValueError: names the column.
    """
    for name in ROW_WEIGHTS:
        if row.get(name) not in (None, 1, "1"):
            raise ValueError(f"{name} must be 1 (whole rows are not weighted here), got {row[name]!r}")
    for name, why in ROW_REFUSED.items():
        if filled(row.get(name)):
            raise ValueError(f"the column {name} cannot be honoured: {why}; remove it if the rest is to be trained")
    for name in () if roles else ("system", "tools"):
        if filled(row.get(name)):
            raise ValueError(f"{name} has no place in {kind} without roles; write it into the text, or use messages")


def unused(row: dict, kind: str) -> set[str]:
    """Columns of a row that hold something and that nothing is read from."""
    names = {str(name) for name, value in row.items() if filled(value)}
    passed_over = {"conversations"} if {"messages", "conversations"} <= names else set()
    return names - ({*USED[kind], *ROW_WEIGHTS} - (passed_over if kind == "messages" else set()))


def is_trained(turn: dict, role: str, name: str) -> bool:
    """Whether a turn's own keys leave it in the loss.

    Raises:
        ValueError: they ask for something else than a whole answer or none of it.
    """
    answer = True
    for key in TURN_REFUSED:
        if key in turn:
            raise ValueError(f"{name}: {key} cannot be honoured; whole answers are trained or not (weight: 0 or 1)")
    for key in TURN_FLAGS:
        if key not in turn:
            continue
        value = turn[key]
        if isinstance(value, (list, dict, str)) or value not in (0, 1):
            raise ValueError(f"{name}: {key} must be 0 or 1 (a whole answer is trained or not), got {value!r}")
        if value and role != "assistant":
            raise ValueError(f"{name}: {key} asks to train a turn of {role}; only the assistant's turns are trained")
        answer = answer and bool(value)
    return answer
