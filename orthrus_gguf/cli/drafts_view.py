"""`--show-drafts`: the text coloured by how its tokens came about, and how drafts fared."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import TextIO

from orthrus_gguf.engine import Generation
from orthrus_gguf.request import Origin, Result, origins

#: SGR codes; plain text keeps the terminal's own colour.
COLOURS = {Origin.DRAFTED: "32", Origin.CORRECTED: "33"}

MEANINGS = {
    Origin.DRAFTED: "accepted drafts",
    Origin.CORRECTED: "in place of a refused draft",
    Origin.PLAIN: "without a draft",
}


def has_colours(*streams: TextIO) -> bool:
    """Whether escape codes mean colours on all of these (see no-color.org)."""
    wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return wanted and all(stream.isatty() for stream in streams)


def painted(generation: Generation, stream: TextIO) -> Iterator[str]:
    """The pieces of a generation, each in the colour of the token that released it.

    They stay as they are where `stream`, which is to show them, has no colours.
    """
    colours = has_colours(stream)
    for piece in generation:
        yield paint(piece, generation.origin) if colours else piece


def paint(text: str, origin: Origin) -> str:
    """`text` in the colour of `origin`. Nothing stays switched on, wherever the output ends."""
    colour = COLOURS.get(origin)
    return text if colour is None else f"\x1b[{colour}m{text}\x1b[0m"


def legend(*, colours: bool) -> str:
    """What the colours mean, on one line; nothing where there are none."""
    if not colours:
        return ""
    return ": " + ", ".join(paint(MEANINGS[origin], origin) for origin in COLOURS)


def text_origins(result: Result) -> list[Origin]:
    """Origin of every output token; the first comes out of the prompt's pass."""
    found = [Origin.PLAIN, *(origin for cycle in result.cycles for origin in origins(cycle))]
    return found[: len(result.output)]  # the last cycle may reach beyond the end of the text


def summary(result: Result, *, colours: bool) -> str:
    """Tokens of the text by origin, which is also the legend; verified drafts by their source.

    Drafts that were accepted beyond the end of the text count as accepted all the same.
    """
    tokens = Counter(text_origins(result))
    lines = [f"text    {len(result.output):6d} tokens"]
    for origin, meaning in MEANINGS.items():
        name = f"{origin.value:<9}"
        lines.append(
            f"        {tokens[origin]:6d} {paint(name, origin) if colours else name}"
            f" {_percent(tokens[origin], len(result.output))}  {meaning}"
        )
    sources = result.statistics.sources
    lines.append(f"drafts  {sum(cycles for _, cycles, _, _ in sources):6d}")
    lines += [
        f"        {cycles:6d} {source.name:<9} {_percent(accepted, offered)}"
        f"  {accepted} of {offered} tokens accepted"
        for source, cycles, offered, accepted in sources
    ]
    return "\n".join(lines)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:3.0f} %" if whole else "  – %"
