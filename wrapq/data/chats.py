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


def notes_on(chat: Chat, tokenizer: Any, turns: bool = False) -> Iterator[str]:
    """What a reader of the run should know of how the conversation is rendered, and of how its `turns` are found."""
    template = template_of(chat, tokenizer)
    if _CLOCK in template:
        yield f"the chat template writes the date of the day: it is {DATE} in every sample"
    if turns and not _MARKED.search(template):
        yield "the chat template does not mark the assistant's turns: they are what it writes in answer to each prompt"


def assistant_tokens(chat: Chat, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """The token ids [n] of the conversation, and which of them [n] the assistant writes.

    Where the template does not mark them, a turn is what the text with it has more than the text up to it with the
    prompt for an answer: its words, its calls and the token that ends it, without the white space behind that. A token
    that reaches into a turn counts, as it does in transformers.

    Raises:
        CalibrationError: the template fails, or rewrites earlier turns when later ones are there, so that a turn cannot
            be told from what is around it; the tokenizer does not say where in the text its tokens lie.
    """
    if _MARKED.search(template_of(chat, tokenizer)):
        found = _applied(chat, tokenizer, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return list(found["input_ids"]), [bool(each) for each in found["assistant_masks"]]
    text = rendered(chat, tokenizer)
    spans = list(_turns(chat, tokenizer, text))
    try:
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    except NotImplementedError:
        what = "the tokenizer does not say where its tokens lie, and the template marks no turns of the assistant"
        raise CalibrationError(f"{chat.where}: {what}: evaluation.score=all scores all tokens") from None
    inside = [any(first < end and last > begin for begin, end in spans) for first, last in found["offset_mapping"]]
    return list(found["input_ids"]), inside


def _turns(chat: Chat, tokenizer: Any, text: str) -> Iterator[tuple[int, int]]:
    """Where in the rendered `text` each turn of the assistant begins and ends."""
    for i, message in enumerate(chat.messages):
        if message["role"] != ASSISTANT:
            continue
        prompt, after = "", ""
        if i:
            prompt = _applied(chat, tokenizer, chat.messages[:i], tokenize=False, add_generation_prompt=True)
            after = _applied(chat, tokenizer, chat.messages[: i + 1], tokenize=False)
        if not (prompt and after.startswith(prompt) and text.startswith(after)):
            what = f"the chat template writes message {i + 1} otherwise than in answer to those before it"
            remedy = "evaluation.score=all, or a template that marks the turns by {% generation %}"
            raise CalibrationError(f"{chat.where}: {what}, so that it cannot be scored alone: {remedy}")
        yield len(prompt), len(after.rstrip())


def _applied(chat: Chat, tokenizer: Any, messages: list[dict[str, Any]] | None = None, **options: Any) -> Any:
    template = template_of(chat, tokenizer)
    if _CLOCK in template:
        template = _STOPPED + template
    try:
        turns = chat.messages if messages is None else messages
        return tokenizer.apply_chat_template(turns, tools=chat.tools, chat_template=template, **options)
    except Exception as error:  # a template is a program, which says what it does not take by an exception
        if out_of_memory(error):
            raise
        raise CalibrationError(f"{chat.where}: the chat template does not take it: {reason_of(error)}") from None
