"""Where prompts to come are likely to part from one: the places that a cache which cannot go back
everywhere should be able to go back to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.text.chat import ChatTemplate, Message
from orthrus_gguf.text.tokenizer import Tokenizer


def partings(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    text: str,
    ids: Sequence[int],
    messages: Sequence[Message | Mapping[str, Any]],
    **settings: Any,
) -> tuple[int, ...]:
    """Places in a chat prompt, ascending: behind its first message, which other conversations begin
    with too, and where the next turn's prompt will go on otherwise.

    The latter is mostly the end. But templates leave thoughts out of the history, and the place for
    them: the template is asked, with an answer and a question behind `messages`. text, settings:
    what `ChatTemplate.render` gave, and got; ids: of the text.
    """
    first = next((i + 1 for i, id in enumerate(ids) if id in tokenizer.eog), 0)
    later = [*messages, Message("assistant", "x"), Message("user", "x")]
    try:
        following = template.render(later, **settings)
    except OrthrusError:  # no order of messages that it knows: then nobody will go on like that
        following = text
    pairs = enumerate(zip(text, following, strict=False))
    rest = text[next((i for i, (one, other) in pairs if one != other), len(text)) :]
    tail = tokenizer.encode(rest, guarded="guard" in settings, add_bos=False) if rest else []
    place = len(ids) - len(tail)
    if list(ids[place:]) != tail:  # it parts within a token
        place = 0
    return tuple(sorted({at for at in (first, place) if 0 < at < len(ids)}))
