"""From a row of a table to a document: a text, or a conversation; one way for all sources that hold rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from wrapq.data.sources.base import Chat
from wrapq.errors import CalibrationError, nearest

HOLDS = "what holds the document, a text or the messages of a conversation; text when not given, else messages"
TEXT, MESSAGES, TOOLS = "text", "messages", "tools"
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
"""Fields that hold what else belongs to a conversation."""


def field_of(names: Iterable[str], field: str | None, where: str) -> str:
    """Which of the fields called `names` holds the documents: `field`, or when that is None `text`, else `messages`.

    Raises:
        CalibrationError: there is no such field.
    """
    wanted, names = (field,) if field else (TEXT, MESSAGES), list(names)
    for name in wanted:
        if name in names:
            return name
    close = ", ".join(nearest(wanted[0], names)) or "none"
    raise CalibrationError(f"{where}: no field {' or '.join(map(repr, wanted))}; its fields are like: {close}")


def document(row: Mapping[str, Any], field: str | None, where: str) -> str | Chat:
    """The document that `row` holds, empty where it is null.

    A list of messages is a conversation, and so is such a list as JSON text, except in a field called `text`, which is
    text whatever it says. The field `tools` beside a conversation goes with it, as a list or as JSON text.

    Raises:
        CalibrationError: there is no such field, or it holds something else; a message has no role or no content, or
            one that is not text alone; half a surrogate.
    """
    name = field_of(row, field, where)
    value, at = row[name], f"{where}: field {name!r}"
    found = _parsed(value, at, strict=name == MESSAGES) if isinstance(value, str) and name != TEXT else value
    if isinstance(found, list):
        found = _chat(found, row, where)
    elif found is not None and not isinstance(found, str):
        raise CalibrationError(f"{at} is {type(found).__name__}, expected text or messages")
    text = found if isinstance(found, str) else found and json.dumps([found.messages, found.tools], ensure_ascii=False)
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise CalibrationError(f"{at} holds {half}, half a surrogate, which is no text") from None
    return found or ""


def without_nulls(value: Any) -> Any:
    """`value` without the keys that are null at any depth: a column gives every struct the keys of all the others."""
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


def _parsed(text: str, at: str, strict: bool) -> Any:
    """What the JSON `text` holds; unless `strict` the text itself where that is no list of messages."""
    if not strict and not text.lstrip().startswith("["):
        return text
    try:
        found = json.loads(text) if text.strip() else None
    except (ValueError, RecursionError) as error:
        if not strict:
            return text
        raise CalibrationError(f"{at} is text, but not JSON ({error})") from None
    messages = isinstance(found, list) and all(isinstance(each, dict) and "role" in each for each in found)
    return found if strict or messages else text


def _chat(messages: list[Any], row: Mapping[str, Any], where: str) -> Chat:
    if not messages:
        raise CalibrationError(f"{where}: a conversation without messages")
    if media := [name for name in MEDIA if row.get(name)]:
        raise CalibrationError(f"{where}: field {media[0]!r} beside the messages: a language model takes text alone")
    tools = row.get(TOOLS) or None
    if isinstance(tools, str):
        tools = _parsed(tools, f"{where}: field {TOOLS!r}", strict=True) or None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise CalibrationError(f"{where}: field {TOOLS!r} is no list of JSON schemas, one for each function")
    return Chat([_message(each, f"{where}: message {i}") for i, each in enumerate(messages, start=1)], tools, where)


def _message(message: Any, at: str) -> dict[str, Any]:
    """The message as templates expect it: without null keys, which they would print, its content a text."""
    if not isinstance(message, dict):
        raise CalibrationError(f"{at} is {type(message).__name__}, expected an object with role and content")
    found = {key: value for key, value in message.items() if value is not None}
    if not isinstance(found.get("role"), str):
        raise CalibrationError(f"{at} has no role; its keys are: {', '.join(map(str, found)) or 'none'}")
    if len(found) == 1:
        raise CalibrationError(f"{at} has no content")
    content = found.get("content", "")
    if isinstance(content, list):
        found["content"] = "\n".join(_part(part, at) for part in content)
    elif not isinstance(content, str):
        raise CalibrationError(f"{at}: content is {type(content).__name__}, expected text")
    if "tool_calls" in found:
        calls = found["tool_calls"]
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise CalibrationError(f"{at}: tool_calls is no list of objects")
        found["tool_calls"] = [_call(call) for call in calls]
    return found


def _part(part: Any, at: str) -> str:
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise CalibrationError(f"{at} has a part of type {kind!r}: a language model takes text alone")
    return part["text"]


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """A call with its arguments as an object, which templates write as JSON themselves."""
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call(call["function"])}
    try:
        arguments = json.loads(call["arguments"])
    except (KeyError, TypeError, ValueError, RecursionError):  # there are none, or they are no JSON text
        return call
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call
