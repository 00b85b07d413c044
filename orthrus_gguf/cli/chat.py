"""The interactive chat of orthrus-run."""

from __future__ import annotations

import contextlib
import sys

from orthrus_gguf.cli.drafts_view import has_colours, painted, summary
from orthrus_gguf.cli.finished import statistics_block
from orthrus_gguf.cli.loaded import Loaded, say
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.text.chat import Message

HELP = "Ctrl-C stops an answer, Ctrl-D leaves, /clear forgets the conversation"


def chat_loop(loaded: Loaded, system: list[Message], *, statistics: bool, show_drafts: bool) -> int:
    """Read prompts from the terminal and answer them until end of input.

    With a chat template the conversation so far goes into each prompt (the cache keeps its rows,
    so only what is new gets processed). A completion model continues each line by itself.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - line editing and history in input(), where Python has it
    say(f"{loaded.banner}\n{HELP}")
    history = list(system)
    while True:
        try:
            prompt = input("\n> ")
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            say(f"\n{HELP}")
            continue
        if prompt.strip() == "/clear":
            history = list(system)
        elif prompt:
            history = _turn(loaded, history, prompt, statistics=statistics, show_drafts=show_drafts)


def _turn(
    loaded: Loaded, history: list[Message], prompt: str, *, statistics: bool, show_drafts: bool
) -> list[Message]:
    """Answer one prompt; returns the history after it (without a turn that failed)."""
    messages = [*history, Message("user", prompt)]
    try:
        request = loaded.request(loaded.render(messages))
        generation = loaded.start(request)
    except OrthrusError as error:
        say(f"error: {error}")
        return history
    try:
        for piece in painted(generation, sys.stdout) if show_drafts else generation:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        generation.cancel()
    except OrthrusError as error:
        say(f"\nerror: {error}")
        return history
    print(flush=True)
    result = generation.result
    if statistics:
        say("\n" + statistics_block(loaded.plan, request, result))
    if show_drafts:
        say(summary(result, colours=has_colours(sys.stdout, sys.stderr)))
    if loaded.template is None:
        return history
    return [*messages, Message("assistant", result.text)]
