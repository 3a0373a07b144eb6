"""Rows to samples: recognise the format, and give every row the same shape.

A sample is a conversation with roles, or a text of which a first part (the prompt) is not trained.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nf4lora.train.errors import RunError
from nf4lora.train.rows import Table

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
    "observation": "tool", "tool": "tool", "function_call": "function_call",
}  # fmt: skip
WANTED = (
    'messages ([{"role", "content"}]), conversations ([{"from", "value"}]), prompt and completion, '
    "instruction and output, or text"
)


@dataclass
class Sample:
    """A conversation (messages, of which answers from index `trained_from` on are trained), or prompt + text."""

    messages: list[dict] | None = None
    tools: list | None = None
    trained_from: int = 0
    prompt: str = ""
    text: str = ""

    @property
    def has_roles(self) -> bool:
        return self.messages is not None or self.prompt != ""


def recognise(table: Table, wanted: str = "auto") -> tuple[str, str]:
    """The format of a table by the columns of its first row, and why where there was a choice.

    Raises:
        RunError: no column that is known, or not those of the format that was asked for.
    """
    first = {name for name, value in table.rows[0].items() if value is not None}
    columns: dict[str, tuple[str, ...]] = {
        "messages": ("messages",),
        "sharegpt": ("conversations",),
        "prompt_completion": ("prompt", "completion"),
        "alpaca": ("instruction", "output"),
        "text": ("text",),
    }
    if "conversations" in first and "messages" not in first and _speaks_roles(table.rows[0]["conversations"]):
        columns["messages"], columns["sharegpt"] = ("conversations",), ("from and value in conversations",)
    found = [name for name, needed in columns.items() if set(needed) <= first]
    if wanted != "auto":
        if wanted not in found:
            raise RunError(
                f"{table.where(0)} has no {' and '.join(columns[wanted])}, which the format {wanted} needs; "
                f"it has {', '.join(sorted(first)) or 'nothing'}"
            )
        return wanted, ""
    if not found:
        raise RunError(
            f"{table.where(0)} has no usable field: {WANTED}; it has {', '.join(sorted(first)) or 'nothing'}"
        )
    why = ""
    if len(found) > 1:
        kept = (
            "because it keeps the roles"
            if found[0] in ("messages", "sharegpt")
            else "because it parts prompt and answer"
        )
        why = f"the rows could be {' or '.join(found)}; {found[0]} was taken {kept} (--dataset_format changes that)"
    return found[0], why


def _speaks_roles(turns: Any) -> bool:
    turns = _parsed(turns)
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "role" in turns[0]


def samples(table: Table, kind: str) -> list[Sample]:
    """All rows as samples; the first row that does not fit is an error that names it."""
    convert: Callable[[dict], Sample] = CONVERT[kind]
    result = []
    for index in range(len(table.rows)):
        try:
            result.append(convert(table.rows[index]))
        except ValueError as error:
            raise RunError(f"{table.where(index)}: {error}") from None
    return result


def _parsed(value: Any) -> Any:
    """A JSON list or object inside a string, as csv and some parquet files carry it."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"a field is not valid JSON ({error.msg}, column {error.colno})") from None
    return value


def _tools(row: dict) -> list | None:
    tools = _parsed(row.get("tools"))
    if tools in (None, "", []):
        return None
    if not isinstance(tools, list):
        raise ValueError("tools must be a list")
    return tools


def _messages(row: dict) -> Sample:
    return Sample(_conversation(row.get("messages", row.get("conversations")), "messages"), _tools(row))


def _conversation(turns: Any, name: str) -> list[dict]:
    turns = _parsed(turns)
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{name} must be a list of messages that is not empty")
    return [_message(turn, f"{name}[{index}]") for index, turn in enumerate(turns)]


def _message(turn: Any, name: str) -> dict:
    if not isinstance(turn, dict):
        raise ValueError(f"{name} must be an object with role and content")
    turn = {key: value for key, value in turn.items() if value is not None}  # parquet fills absent keys with nulls
    if turn.get("role") not in ROLES:
        raise ValueError(f"{name}: role must be one of {', '.join(ROLES)}, got {turn.get('role')!r}")
    content = turn.get("content", "")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise ValueError(f"{name}: content must be text; images and audio are not trained here")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{name}: content must be text, got {type(content).__name__}")
    if "content" not in turn and not turn.get("tool_calls"):
        raise ValueError(f"{name} has no content")
    return {**turn, "content": content}


def _sharegpt(row: dict) -> Sample:
    turns = _parsed(row.get("conversations"))
    if not isinstance(turns, list) or not turns:
        raise ValueError("conversations must be a list of turns that is not empty")
    messages = []
    if row.get("system"):
        messages.append({"role": "system", "content": row["system"]})
    for index, turn in enumerate(turns):
        speaker = turn.get("from") if isinstance(turn, dict) else None
        if speaker not in SHAREGPT:
            raise ValueError(f"conversations[{index}]: from must be one of {', '.join(SHAREGPT)}, got {speaker!r}")
        if not isinstance(turn.get("value"), str):
            raise ValueError(f"conversations[{index}]: value must be text")
        if speaker == "function_call":
            messages.append(_function_call(turn["value"], index))
        else:
            messages.append({"role": SHAREGPT[speaker], "content": turn["value"]})
    return Sample(messages, _tools(row))


def _function_call(value: str, index: int) -> dict:
    calls = _parsed(value)
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and "name" in call and "arguments" in call for call in calls):
        raise ValueError(f'conversations[{index}]: a function_call must be JSON like {{"name": ..., "arguments": ...}}')
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": dict(call)} for call in calls],
    }


def _alpaca(row: dict) -> Sample:
    instruction, context, output = (row.get(name) for name in ("instruction", "input", "output"))
    if not isinstance(instruction, str) or not (instruction or context):
        raise ValueError("instruction must be text")
    if not isinstance(output, str):
        raise ValueError("output must be text")
    messages = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for pair in _parsed(row.get("history")) or []:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError("history must be a list of [question, answer]")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = "\n".join(part for part in (instruction, context) if part)
    return Sample([*messages, {"role": "user", "content": question}, {"role": "assistant", "content": output}])


def _prompt_completion(row: dict) -> Sample:
    prompt, completion = _parsed_turns(row.get("prompt")), _parsed_turns(row.get("completion"))
    if isinstance(prompt, list) and isinstance(completion, list):
        before = _conversation(prompt, "prompt")
        return Sample(before + _conversation(completion, "completion"), _tools(row), trained_from=len(before))
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise ValueError("prompt and completion must both be text, or both lists of messages")
    if not prompt:
        raise ValueError("prompt must not be empty (use the format text)")
    return Sample(prompt=prompt, text=completion)


def _parsed_turns(value: Any) -> Any:
    """A list of messages that csv carries as a string; a prompt that only looks like JSON stays what it is."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def _text(row: dict) -> Sample:
    if not isinstance(row.get("text"), str) or not row["text"]:
        raise ValueError("text must be text that is not empty")
    return Sample(text=row["text"])


CONVERT: dict[str, Callable[[dict], Sample]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "text": _text,
}
