"""From a conversation to text and tokens, by the tokenizer's chat template."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from wrapq.data.sources.base import Chat
from wrapq.errors import CalibrationError, out_of_memory, reason_of

ASSISTANT = "assistant"
DATE = "26 Jul 2024"
"""What a template that writes the date writes, so that samples are the same every day; Llama 3's own default."""
_CLOCK = "strftime_now"
_PARTS = {"%Y": "2024", "%m": "07", "%d": "26", "%B": "July", "%b": "Jul", "%A": "Friday", "%a": "Fri", "%y": "24"}
_PARTS |= {"%H": "12", "%M": "00", "%S": "00"}
_STOPPED = (  # defined before the template, where it hides the function of transformers
    f"{{%- macro {_CLOCK}(format) %}}{{{{ format"
    + "".join(f" | replace('{part}', '{text}')" for part, text in _PARTS.items())
    + " }}{% endmacro +%}"
)
_PROBE = "A text."
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


def rendered(chat: Chat, tokenizer: Any) -> str:
    """The conversation as text, with the special tokens that the template writes; raises `CalibrationError`."""
    return str(_applied(chat, tokenizer, tokenize=False))


def template_of(chat: Chat, tokenizer: Any) -> str:
    """The chat template for the conversation, of those that the tokenizer has; raises `CalibrationError`."""
    if not getattr(tokenizer, "chat_template", None):
        what = "a conversation, but the model's tokenizer has no chat template"
        remedy = "give rows of text, or a tokenizer that has one (model.tokenizer)"
        raise CalibrationError(f"{chat.where}: {what}: {remedy}")
    try:
        return str(tokenizer.get_chat_template(None, chat.tools))
    except ValueError as error:
        raise CalibrationError(f"{chat.where}: {reason_of(error)}") from None


def notes_on(chat: Chat, tokenizer: Any) -> Iterator[str]:
    """What a reader of the run should know of how the conversation is rendered."""
    template = template_of(chat, tokenizer)
    if _CLOCK in template:
        yield f"the chat template writes the date of the day: it is {DATE} in every sample"
    held = {"tools"} if chat.tools else set()
    for key in sorted(held.union(*chat.messages) & {"tools", "tool_calls"}):
        if key not in template:
            yield f"the chat template knows no {key}: what the conversations hold of them is left out"


def answers(chat: Chat, tokenizer: Any, notes: dict[str, None]) -> Iterator[tuple[list[int], list[bool]]]:
    """The token ids [n] of the conversation, and which of them [n] the assistant writes; adds to `notes`.

    Where the template does not mark them, a turn is what the text with it has more than the text up to it with the
    prompt for an answer: its words, its calls and the token that ends it, without the white space behind that. A token
    that reaches into a turn counts, as it does in transformers. A template that writes a turn otherwise once others
    follow, as without its thoughts, gives token ids for each turn, which end with it, as the model would see them.

    Raises:
        CalibrationError: the template fails, or writes what was there before an answer otherwise with it; the tokenizer
            does not say where in the text its tokens lie.
    """
    if _MARKED.search(template_of(chat, tokenizer)):
        found = _applied(chat, tokenizer, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        yield list(found["input_ids"]), [bool(each) for each in found["assistant_masks"]]
        return
    notes["the chat template does not mark the assistant's turns: they are what it writes in answer to each prompt"] = (
        None
    )
    whole = rendered(chat, tokenizer)
    turns = [_turn(chat, tokenizer, i) for i, each in enumerate(chat.messages) if each["role"] == ASSISTANT]
    if all(whole.startswith(text) for _, text in turns):
        yield _inside(whole, [(start, len(text.rstrip())) for start, text in turns], chat, tokenizer)
        return
    notes["the chat template writes answers otherwise once others follow: each is in a sequence of its own"] = None
    for start, text in turns:
        yield _inside(text, [(start, len(text.rstrip()))], chat, tokenizer)


def _turn(chat: Chat, tokenizer: Any, i: int) -> tuple[int, str]:
    """The text that ends with message `i`, and where in it that begins."""
    if i:
        text = _applied(chat, tokenizer, chat.messages[: i + 1], tokenize=False)
        prompt = _applied(chat, tokenizer, chat.messages[:i], tokenize=False, add_generation_prompt=True)
        if text.startswith(prompt):
            return len(prompt), text
        unlike = (at for at, pair in enumerate(zip(prompt, text, strict=False)) if pair[0] != pair[1])
        prompt = prompt[: next(unlike, None)]  # it may open a thought that this answer does without
        if prompt.startswith(_applied(chat, tokenizer, chat.messages[:i], tokenize=False)):
            return len(prompt), text
    what = (
        f"the chat template writes what is before message {i + 1} otherwise with it"
        if i
        else "it begins with an answer"
    )
    remedy = "evaluation.score=all, or a template that marks the turns by {% generation %}"
    raise CalibrationError(f"{chat.where}: {what}, so that it cannot be scored alone: {remedy}")


def _inside(text: str, spans: list[tuple[int, int]], chat: Chat, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """The token ids [n] of `text`, and which of them [n] reach into one of the `spans`."""
    try:
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    except NotImplementedError:
        what = "the tokenizer does not say where its tokens lie, and the template marks no turns of the assistant"
        raise CalibrationError(f"{chat.where}: {what}: evaluation.score=all scores all tokens") from None
    inside = [any(first < end and last > begin for begin, end in spans) for first, last in found["offset_mapping"]]
    return list(found["input_ids"]), inside


def _applied(chat: Chat, tokenizer: Any, messages: list[dict[str, Any]] | None = None, **options: Any) -> Any:
    template = template_of(chat, tokenizer)
    if _CLOCK in template:
        template = _STOPPED + template
    turns = chat.messages if messages is None else messages
    if _takes_parts(template, tokenizer):
        turns = [{**each, **_as_parts(each.get("content"))} for each in turns]
    try:
        return tokenizer.apply_chat_template(turns, tools=chat.tools, chat_template=template, **options)
    except Exception as error:  # a template is a program, which says what it does not take by an exception
        if out_of_memory(error):
            raise
        raise CalibrationError(f"{chat.where}: the chat template does not take it: {reason_of(error)}") from None


def _takes_parts(template: str, tokenizer: Any) -> bool:
    """Whether the template reads contents as lists of parts alone, as those of models that see do."""
    for content in (_PROBE, [{"type": "text", "text": _PROBE}]):
        try:
            turns = [{"role": "user", "content": content}]
            if _PROBE in tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False):
                return content is not _PROBE
        except Exception:  # the other shape, or the conversation itself, shows what is wrong
            continue
    return False


def _as_parts(content: str | None) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": content}]} if content else {}
