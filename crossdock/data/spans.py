"""Where in a rendered conversation the assistant writes.

A template may mark it with transformers' `{% generation %}` tags. Where it does not, the text of the messages before,
with the header that asks the assistant for its next message, and the text up to the end of that message are compared
with the text of the whole:

    whole     ...<|user|>Why?<|end|><|assistant|>Because.<|end|><|user|>Thanks.<|end|>
    prompt    ...<|user|>Why?<|end|><|assistant|>
    through   ...<|user|>Why?<|end|><|assistant|>Because.<|end|>

Each must begin with the one below it, or some template's habit has been met that would give a wrong answer.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from crossdock.data.config import DataError
from crossdock.data.conversations import ASSISTANT, Conversation

__all__ = ["Renderer", "Span", "assistant_spans"]


class Span(NamedTuple):
    """The characters `start .. end - 1` of a text."""

    start: int
    end: int


class Renderer(Protocol):
    """Renders conversations with a chat template."""

    def render(self, conversation: Conversation, messages: list[dict[str, Any]], **options: Any) -> str: ...

    def generation_spans(self, conversation: Conversation, text: str) -> list[Span] | None: ...


def assistant_spans(
    renderer: Renderer, conversation: Conversation, text: str, special_ends: list[int], *, last: bool
) -> list[Span]:
    """What the assistant writes: each of its messages with the token that ends it, without the header before.

    Args:
        renderer: has the template.
        conversation: with a message of the assistant at least.
        text: the whole conversation as rendered.
        special_ends: where in it special tokens end, ascending.
        last: of its last message alone.

    Raises:
        DataError: with file and line, where the template lets it not be told.
    """
    messages = conversation.messages
    answers = [index for index, message in enumerate(messages) if message["role"] == ASSISTANT]
    marked = renderer.generation_spans(conversation, text)
    if marked is not None and not last:
        return marked
    spans = [
        _without_white_space(text, _answer(renderer, conversation, text, index), special_ends)
        for index in (answers[-1:] if last else answers)
    ]
    if marked is not None:
        return [Span(max(span.start, spans[0].start), span.end) for span in marked]
    return spans


def _answer(renderer: Renderer, conversation: Conversation, text: str, index: int) -> Span:
    """Where message `index`, of the assistant, is in the text of the whole."""
    before, through = conversation.messages[:index], conversation.messages[: index + 1]
    if not before:
        raise _untold(conversation, index, "nothing comes before it")
    prompt = renderer.render(conversation, before, add_generation_prompt=True)
    upto = renderer.render(conversation, through)
    if text.startswith(upto) and upto.startswith(prompt):
        return Span(len(prompt), len(upto))
    return _rewritten_answer(renderer, conversation, text, index, prompt)


def _rewritten_answer(renderer: Renderer, conversation: Conversation, text: str, index: int, prompt: str) -> Span:
    """The same with a template that shows a message in another way when others follow.

    Qwen3's, for one, leaves the thoughts out of all answers but those to the last question. With a placeholder for its
    content, the same message in the same place shows what the template puts before and after it there.
    """
    messages = conversation.messages
    placeholder = next(character for character in map(chr, range(0xE000, 0xF900)) if character not in text)
    replaced = {**messages[index], "content": placeholder}
    whole = renderer.render(conversation, [*messages[:index], replaced, *messages[index + 1 :]])
    alone = renderer.render(conversation, [*messages[:index], replaced])
    if whole.count(placeholder) != 1 or alone.count(placeholder) != 1:
        raise _untold(conversation, index, "its content is not shown once")
    head, rest = whole.split(placeholder)
    end = alone.split(placeholder)[1]  # Of this message; the same, with what follows, is in `rest`.
    following = rest.removeprefix(end)
    if not rest.startswith(end) or not text.endswith(following):
        raise _untold(conversation, index, "it ends in another way when messages follow")
    # The header may go on with the beginning of thoughts that are left out here, and is there in part.
    header = prompt.removeprefix(renderer.render(conversation, messages[:index]))
    most = range(-(-len(header) // 2), len(header) + 1)
    if header == prompt or not any(head.endswith(header[:size]) for size in most) or not text.startswith(head):
        raise _untold(conversation, index, "what is before it is shown in another way when it follows")
    return Span(len(head), len(text) - len(following))


def _without_white_space(text: str, span: Span, special_ends: list[int]) -> Span:
    """Without the end of a line after the token that ends the message, which the template writes."""
    inside = [end for end in special_ends if span.start < end <= span.end]
    return Span(span.start, inside[-1]) if inside and not text[inside[-1] : span.end].strip() else span


def _untold(conversation: Conversation, index: int, why: str) -> DataError:
    return DataError(
        f"{conversation.place}: message {index + 1}, of the assistant, can't be told from the rest: {why}. A chat "
        "template with {% generation %} tags around what the assistant writes tells; data.chat_template = FILE names it"
    )
