"""Rows to samples: recognise the format, and give every row the same shape.

A sample is a conversation with roles, or a text of which a first part (the prompt) is not trained. Keys that decide
what is trained are honoured or refused; keys that decide nothing here are listed, so that the user can be told.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from nf4lora.train.errors import RunError
from nf4lora.train.samples.keys import REASONING, TURN_FLAGS, check_row, is_trained, unused
from nf4lora.train.samples.rows import Table, bad_rows
from nf4lora.train.samples.tools import calls, check_json, nulls, parsed, schemas, without_nulls

ROLES = ("system", "developer", "user", "assistant", "tool")
DEEPEST = 100  # levels of objects and lists in a row: more is a mistake, and what reads rows calls itself for each
SHAREGPT = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
    "observation": "tool", "tool": "tool", "function_response": "tool", "function_call": "function_call",
}  # fmt: skip
SILENT = "must not be empty: the model would learn to say nothing"
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
    untrained: frozenset[int] = frozenset()  # answers whose row says that they are not trained
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    nulls: int = 0  # keys of tools and calls that were null and left out

    @property
    def has_roles(self) -> bool:
        return self.messages is not None or self.prompt != ""


def recognise(table: Table, wanted: str = "auto") -> tuple[str, str]:
    """The format of a table by the columns of its first row that has any, and why where there was a choice.

    Raises:
        RunError: no column that is known, or not those of the format that was asked for.
    """
    for index in range(min(len(table.rows), 100)):
        try:
            return _recognise(table, index, wanted)
        except RunError:
            continue
    return _recognise(table, 0, wanted)  # the complaint about the first row


def _recognise(table: Table, index: int, wanted: str) -> tuple[str, str]:
    row = table.rows[index]
    first = {name for name, value in row.items() if value is not None}
    columns: dict[str, tuple[str, ...]] = {
        "messages": ("messages",),
        "sharegpt": ("conversations",),
        "prompt_completion": ("prompt", "completion"),
        "alpaca": ("instruction", "output"),
        "text": ("text",),
    }
    if "conversations" in first and "messages" not in first:
        if wanted == "messages":
            columns["messages"] = ("conversations",)
        elif wanted == "auto" and _speaks_roles(row["conversations"]):
            columns["messages"], columns["sharegpt"] = ("conversations",), ("from and value in conversations",)
    fitting = [name for name, needed in columns.items() if set(needed) <= first]
    if wanted != "auto":
        if wanted not in fitting:
            raise RunError(
                f"{table.where(index)} has no {' and '.join(columns[wanted])}, which the format {wanted} needs; "
                f"it has {_listed(first)}"
            )
        return wanted, ""
    if not fitting:
        raise RunError(f"{table.where(index)} has no usable field: {WANTED}; it has {_listed(first)}")
    why = ""
    if len(fitting) > 1:
        kept = (
            "because it keeps the roles"
            if fitting[0] in ("messages", "sharegpt")
            else "because it parts prompt and answer"
        )
        why = f"the rows could be {' or '.join(fitting)}; {fitting[0]} was taken {kept} (--dataset_format changes that)"
    return fitting[0], why


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(sorted(map(str, names))) or "nothing"


def _speaks_roles(turns: Any) -> bool:
    try:
        turns = _listed_turns(turns)
    except ValueError:
        return False
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "role" in turns[0]


@dataclass
class Converted:
    """The rows of a table as samples, and what is to be said about the others."""

    samples: list[Sample] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)  # rows that the samples were made of
    bad: list[str] = field(default_factory=list)  # complaints, each with the row's name
    unused: list[str] = field(default_factory=list)  # columns that hold something and are not read


def convert(table: Table, kind: str) -> Converted:
    result, columns = Converted(), set[str]()
    for index, row in enumerate(table.rows):
        columns |= unused(row, kind)
        try:
            result.samples.append(sample_of(row, kind))
            result.indices.append(index)
        except ValueError as error:
            result.bad.append(f"{table.where(index)}: {error}")
    result.unused = sorted(columns)
    return result


def samples(table: Table, kind: str) -> list[Sample]:
    """All rows as samples; rows that do not fit are an error that counts them and names the first ones."""
    converted = convert(table, kind)
    if converted.bad:
        raise RunError(bad_rows(converted.bad, len(table.rows)))
    return converted.samples


def sample_of(row: dict, kind: str) -> Sample:
    """One row as a sample.

    Raises:
        ValueError: the row does not fit; the text says what is wrong with it.
    """
    if _is_deep(row):
        raise ValueError(f"its objects must not be nested more than {DEEPEST} deep")
    sample = CONVERT[kind](row)
    check_row(row, kind, roles=sample.messages is not None)
    _check_characters(sample)
    return sample


def _is_deep(value: Any) -> bool:
    """Whether objects and lists are nested deeper than what reads and renders them may follow."""
    level = [value]
    for _ in range(DEEPEST):
        level = [
            child
            for value in level
            for child in (value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())
        ]
        if not level:
            return False
    return True


def _check_characters(sample: Sample) -> None:
    """Refuse half characters: JSON can write them (\\ud800), and no tokenizer takes them."""
    text = json.dumps([sample.messages, sample.tools, sample.prompt, sample.text], ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(f"a text must be whole characters, got the lone surrogate {code} (half an emoji)") from None


def _text_of(value: Any, name: str, optional: bool = False) -> str:
    if optional and value is None:
        return ""
    if not isinstance(value, str):
        hint = ' ("" or null for none)' if optional else ""
        raise ValueError(f"{name} must be text{hint}, got {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    return f"{type(value).__name__} {value!r}"[:60]


def _kwargs(row: dict) -> dict[str, Any]:
    options = without_nulls(parsed(row.get("chat_template_kwargs")) or {})
    if not isinstance(options, dict):
        raise ValueError(f"chat_template_kwargs must be an object, got {_kind(options)}")
    reserved = {"messages", "tools", "conversation", "tokenize", "add_generation_prompt", "chat_template"} & {*options}
    if reserved:
        raise ValueError(f"chat_template_kwargs must not hold {', '.join(sorted(reserved))}")
    return options


def _chat(row: dict, turns: list[tuple[dict, bool]], trained_from: int = 0) -> Sample:
    """A sample of the messages, each with whether it is trained, and of what else the row says about the chat."""
    messages = [message for message, _ in turns]
    for index, (message, trained) in enumerate(turns):
        if trained and index >= trained_from and _says_nothing(message):
            raise ValueError(f"message {index} (assistant) {SILENT}; `weight: 0` in it leaves it untrained")
    untrained = {index for index, (_, trained) in enumerate(turns) if not trained}
    system = _text_of(row.get("system"), "system", optional=True)
    if system and messages[0]["role"] in ("system", "developer"):
        if messages[0]["content"] != system:
            raise ValueError("system and the first message both give instructions; keep one")
    elif system:
        messages.insert(0, {"role": "system", "content": system})
        untrained = {index + 1 for index in untrained}
        trained_from += trained_from > 0
    return Sample(messages, schemas(row.get("tools")), trained_from,
                  untrained=frozenset(untrained), template_kwargs=_kwargs(row), nulls=_nulls(row))  # fmt: skip


def _says_nothing(message: dict) -> bool:
    words = message["content"].strip() or message.get("tool_calls") or any(message.get(name) for name in REASONING)
    return message["role"] == "assistant" and not words


def _nulls(row: dict) -> int:
    """Keys of the row's tools and calls that are null, and therefore not trained."""
    count = nulls(row.get("tools"))
    for name in ("messages", "conversations", "prompt", "completion"):
        turns = row.get(name)
        for turn in turns if isinstance(turns, list) else []:
            count += nulls(turn.get("tool_calls")) if isinstance(turn, dict) else 0
    return count


def _messages(row: dict) -> Sample:
    given = row.get("messages")
    return _chat(row, _conversation(given if given is not None else row.get("conversations"), "messages"))


def _listed_turns(value: Any) -> Any:
    """Turns as a list: some readers of data sets give an object of columns, {"role": [...], "content": [...]}."""
    turns = parsed(value)
    if isinstance(turns, dict) and turns and all(isinstance(column, list) for column in turns.values()):
        if len({len(column) for column in turns.values()}) == 1:
            return [dict(zip(turns, turn, strict=True)) for turn in zip(*turns.values(), strict=True)]
    return turns


def _conversation(turns: Any, name: str) -> list[tuple[dict, bool]]:
    turns = _listed_turns(turns)
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{name} must be a list of messages that is not empty")
    return [_message(_in_roles(turn, f"{name}[{index}]"), f"{name}[{index}]") for index, turn in enumerate(turns)]


def _in_roles(turn: Any, name: str) -> dict:
    """A turn that says who speaks under `role` or `from`, and what under `content` or `value`, as role and content."""
    turn = parsed(turn)
    if not isinstance(turn, dict):
        raise ValueError(f"{name} must be an object with role and content")
    turn = dict(turn)
    speaker = turn.pop("from", None) if turn.get("role") is None else None
    if speaker is not None and (not isinstance(speaker, str) or speaker not in SHAREGPT):
        raise ValueError(f"{name}: from must be one of {', '.join(SHAREGPT)}, got {speaker!r}")
    if turn.get("content") is None and (speaker is not None or turn.get("value") is not None):
        turn["content"] = turn.pop("value", None)
        if not isinstance(turn["content"], str):
            raise ValueError(f"{name}: value must be text, got {_kind(turn['content'])}")
    if speaker == "function_call":
        return {**turn, "role": "assistant", "content": "", "tool_calls": _function_call(turn["content"], name)}
    return turn if speaker is None else {**turn, "role": SHAREGPT[speaker]}


def _message(turn: dict, name: str) -> tuple[dict, bool]:
    turn = {key: value for key, value in turn.items() if value is not None}  # parquet fills absent keys with nulls
    role = "tool" if turn.get("role") == "function" else turn.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"{name}: role must be one of {', '.join(ROLES)}, got {turn.get('role')!r}")
    trained = is_trained(turn, role, name)
    called = turn.pop("function_call", None)  # the older name of one tool call
    called = turn.pop("tool_calls", None) or called
    turn = {key: without_nulls(value) for key, value in turn.items() if key not in TURN_FLAGS}
    content = turn.get("content", "")
    if isinstance(content, list):
        content = "".join(_part(part, name) for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{name}: content must be text, got {_kind(content)}")
    check_json(turn, name)
    if "content" not in turn and not called:
        raise ValueError(f"{name} has no content")
    turn = {**turn, "role": role, "content": content}
    if called:
        turn["tool_calls"] = calls(called, f"{name}: tool_calls")
    return turn, trained


def _part(part: Any, name: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise ValueError(f"{name}: content must be text, got a part of type {kind}; images and audio are not trained")
    return part["text"]


def _sharegpt(row: dict) -> Sample:
    return _chat(row, _conversation(row.get("conversations"), "conversations"))


def _function_call(value: Any, name: str) -> list[dict]:
    called = parsed(value)
    called = called if isinstance(called, list) else [called]
    if not all(isinstance(call, dict) and "name" in call and "arguments" in call for call in called):
        raise ValueError(f'{name}: a function_call must be JSON like {{"name": ..., "arguments": ...}}')
    return called


def _alpaca(row: dict) -> Sample:
    context = _text_of(row.get("input"), "input", optional=True)
    instruction = _text_of(row.get("instruction"), "instruction")
    if not (instruction or context):
        raise ValueError("instruction must be text that is not empty")
    output = _text_of(row.get("output"), "output")
    if not output.strip():
        raise ValueError(f"output {SILENT}")
    turns: list[tuple[dict, bool]] = []
    history = parsed(row.get("history")) or []
    for index, pair in enumerate(history if isinstance(history, (list, tuple)) else [history]):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise ValueError("history must be a list of [question, answer]")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            turns.append(({"role": role, "content": _text_of(text, f"history[{index}]")}, True))
    question = "\n".join(part for part in (instruction, context) if part)
    turns += [({"role": "user", "content": question}, True), ({"role": "assistant", "content": output}, True)]
    return _chat(row, turns)


def _prompt_completion(row: dict) -> Sample:
    prompt, completion = _parsed_turns(row.get("prompt")), _parsed_turns(row.get("completion"))
    if isinstance(prompt, list) and isinstance(completion, list):
        before = _conversation(prompt, "prompt")
        return _chat(row, before + _conversation(completion, "completion"), trained_from=len(before))
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise ValueError("prompt and completion must both be text, or both lists of messages")
    if not prompt:
        raise ValueError("prompt must not be empty (use the format text)")
    if not completion.strip():
        raise ValueError(f"completion {SILENT}")
    return Sample(prompt=prompt, text=completion)


def _parsed_turns(value: Any) -> Any:
    """A list of messages that csv carries as a string; a prompt that only looks like JSON stays what it is."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _text(row: dict) -> Sample:
    if not isinstance(row.get("text"), str) or not row["text"].strip():
        raise ValueError(f"text must be text that is not empty, got {_kind(row.get('text'))}")
    return Sample(text=row["text"])


CONVERT: dict[str, Callable[[dict], Sample]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "text": _text,
}
