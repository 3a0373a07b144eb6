"""Tool calls and tool schemas in one form, so that the file format which carried a row does not change its tokens.

Parquet files fill absent keys of an object with nulls, and many rows carry JSON inside strings, because their
columns could not hold objects of several shapes. Here nulls inside objects go, and strings become the objects that
they hold; a chat template that wants the arguments of a call as a string gets them back as one.
"""

from __future__ import annotations

import json
import math
from typing import Any


def parsed(value: Any) -> Any:
    """A JSON list or object inside a string, as csv and some parquet files carry it."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"a field is not valid JSON ({error.msg}, column {error.colno})") from None
        except RecursionError:
            raise ValueError("a field holds JSON that is nested too deeply") from None
    return value


def without_nulls(value: Any) -> Any:
    """Objects without the keys that are null; a null in a list has its place and stays."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, (list, tuple)) else value


def nulls(value: Any) -> int:
    """How many keys `without_nulls` leaves out, those inside strings that hold objects included."""
    value = _object(value)
    if isinstance(value, dict):
        return sum(item is None or nulls(item) for item in value.values())
    return sum(map(nulls, value)) if isinstance(value, (list, tuple)) else 0


def check_json(value: Any, name: str) -> None:
    """Refuse what JSON cannot hold: bytes, dates and sets of other file formats, NaN and infinities."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{name}: keys must be text, got {key!r}")
            check_json(item, name)
    elif isinstance(value, (list, tuple)):
        for item in value:
            check_json(item, name)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must hold finite numbers, got {value}")
    elif value is not None and not isinstance(value, (str, bool, int, float)):
        raise ValueError(f"{name} must hold JSON values, got {type(value).__name__}")


def _object(value: Any) -> Any:
    """The object that a string holds; any other value as it is."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            content = json.loads(value)
        except (ValueError, RecursionError):
            return value  # the model wrote this text, and it is trained as it stands
        return content if isinstance(content, dict) else value
    return value


def schemas(value: Any) -> list[dict] | None:
    """The tools of a row, as a list of objects; None where there are none.

    Raises:
        ValueError: no list of objects.
    """
    tools = parsed(value)
    if tools is None or tools == "" or tools == []:
        return None
    if not isinstance(tools, list):
        raise ValueError("tools must be a list")
    tools = [without_nulls(parsed(tool)) for tool in tools]
    for index, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise ValueError(f"tools[{index}] must be an object with the schema of a function, got {tool!r}")
        holder = tool["function"] if isinstance(tool.get("function"), dict) else tool
        if "parameters" in holder:
            holder["parameters"] = without_nulls(_object(holder["parameters"]))
        check_json(tool, f"tools[{index}]")
    return tools


def calls(value: Any, name: str) -> list[dict]:
    """The tool calls of a message, each {"type": "function", "function": {"name", "arguments"}}, arguments decoded.

    Raises:
        ValueError: something else.
    """
    called = parsed(value)
    called = [called] if isinstance(called, dict) else called
    if not isinstance(called, list):
        raise ValueError(f"{name} must be a list of tool calls, got {called!r}")
    return [_call(parsed(call), f"{name}[{index}]") for index, call in enumerate(called)]


def _call(call: Any, name: str) -> dict:
    function = parsed(call.get("function")) if isinstance(call, dict) and call.get("function") is not None else call
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f'{name} must be an object like {{"function": {{"name": ..., "arguments": {{...}}}}}}')
    function = without_nulls(function)
    if "arguments" in function:
        function["arguments"] = without_nulls(_object(function["arguments"]))
    around = {} if function is call or "function" not in call else without_nulls(call)
    call = {"type": "function", **around, "function": function}
    check_json(call, name)
    return call


def functions(message: dict) -> list[dict]:
    """Names and arguments that a message calls."""
    return [call.get("function", call) for call in message.get("tool_calls") or []]


def with_arguments_as_text(messages: list[dict]) -> list[dict]:
    """The same conversation with the arguments of its calls as JSON strings, as OpenAI's form has them."""

    def text(function: dict) -> dict:
        arguments = function.get("arguments")
        return (
            {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}
            if isinstance(arguments, dict)
            else function
        )

    return [
        {**message, "tool_calls": [{**call, "function": text(call["function"])} for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def shown_as_python(messages: list[dict], rendered: str) -> bool:
    """Whether a template prints arguments as Python writes a dict, {'a': 1}, because it expects a string."""
    for message in messages:
        for function in functions(message):
            arguments = function.get("arguments")
            if isinstance(arguments, dict) and arguments and str(arguments) in rendered:
                return True
    return False
