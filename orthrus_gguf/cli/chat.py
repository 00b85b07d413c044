"""The interactive chat of orthrus-run."""

from __future__ import annotations

import sys

from orthrus_gguf.cli.chat_commands import State, Statistics, is_command, obey
from orthrus_gguf.cli.chat_input import ChatInput
from orthrus_gguf.cli.conversation import Conversation
from orthrus_gguf.cli.drafts_view import has_colours, painted, summary
from orthrus_gguf.cli.finished import statistics_block
from orthrus_gguf.cli.loaded import Loaded, say
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.request import Request, Result
from orthrus_gguf.text.chat import Message

HINT = "Ctrl-C stops an answer, Ctrl-D leaves, /help tells more"


def chat_loop(
    loaded: Loaded,
    system: list[Message],
    *,
    seed: int | None,
    statistics: Statistics,
    show_drafts: bool,
) -> int:
    """Read messages from the terminal and answer them until end of input.

    With a chat template the conversation so far goes into each prompt (the cache keeps its rows,
    so only what is new gets processed). A completion model continues each message by itself.
    seed: of all answers; None draws one for each.
    """
    say(f"{loaded.banner}\n{HINT}")
    state = State(Conversation(loaded, seed, list(system)), ChatInput(), statistics)
    while not state.leaving:
        _step(state, show_drafts=show_drafts)
    return 0


def _step(state: State, *, show_drafts: bool) -> None:
    """Read a line and do what it asks for. What fails leaves the conversation as it was."""
    conversation = state.conversation
    before = list(conversation.messages)
    try:
        line = state.input.read()
        if is_command(line):
            question = obey(state, line)
            if question is not None and not _turn(state, question, True, show_drafts):
                conversation.messages = before
        elif line.strip():
            _turn(state, line, False, show_drafts)
    except EOFError:
        print()
        state.leaving = True
    except KeyboardInterrupt:
        conversation.messages = before
        say(f"\n{HINT}")
    except OrthrusError as error:
        conversation.messages = before
        say(f"error: {error}")


def _turn(state: State, question: str, again: bool, show_drafts: bool) -> bool:
    """Answer one message, and remember both; False if nothing came. again: see `request`."""
    conversation = state.conversation
    request = conversation.request(question, again=again)
    conversation.loaded.tell(request)
    generation = conversation.loaded.start(request)
    try:
        for piece in painted(generation, sys.stdout) if show_drafts else generation:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        generation.cancel()
    finally:
        print(flush=True)
    result = generation.result
    if result.output:
        conversation.answered(question, result)
    note = _ending(request, result, conversation.loaded.session.n_ctx)
    if note is not None:
        say(f"[{note}]")
    if state.statistics is Statistics.ALL:
        say("\n" + statistics_block(conversation.loaded.plan, request, result))
    elif state.statistics is Statistics.LINE:
        say(f"[{statistics_line(result)}]")
    if show_drafts:
        say(summary(result, colours=has_colours(sys.stdout, sys.stderr)))
    return bool(result.output)


def _ending(request: Request, result: Result, n_ctx: int) -> str | None:
    """Why an answer ended, if not by itself."""
    if result.finish_reason == "cancelled":
        return "stopped" if result.output else "stopped before the answer began; it is not kept"
    if result.finish_reason == "stop":
        return None
    if len(result.output) == request.max_tokens:
        return f"cut after {request.max_tokens} tokens (-n, /set predict)"
    return f"cut: the context of {n_ctx} tokens is full (-c)"


def statistics_line(result: Result) -> str:
    """What most people want to know of an answer."""
    stats, timings = result.statistics, result.timings
    parts = [f"{stats.output_tokens} token{'' if stats.output_tokens == 1 else 's'}"]
    if timings.generated_per_second is not None:
        parts.append(f"{timings.generated_per_second:.1f} tok/s")
    if stats.offered and stats.tokens_per_cycle is not None:
        parts.append(f"{stats.tokens_per_cycle:.2f} per cycle")
    if stats.output_tokens:
        parts.append(
            f"prompt {timings.prompt_tokens} new of {stats.prompt_tokens} tokens in"
            f" {timings.prompt:.2f} s"
        )
    if result.selection is not None:
        parts.append(f"kept {result.selection.words}")
    return ", ".join(parts)
