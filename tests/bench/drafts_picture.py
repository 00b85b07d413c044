"""A picture of an answer, its tokens coloured by how they came about, as `--show-drafts` does.

    python tests/bench/drafts_picture.py MODEL.gguf OUT.svg -p PROMPT [flags of orthrus-run]

Runs `orthrus-run --json-stream` and draws what it says.
"""

from __future__ import annotations

import html
import json
import subprocess
import sys

COLOURS = {"plain": "#c9d1d9", "drafted": "#56d364", "corrected": "#e3b341"}
MEANINGS = {
    "plain": "without a draft",
    "drafted": "accepted draft",
    "corrected": "in place of a refused draft",
}
WIDTH, LINE, SIZE, MARGIN = 92, 19, 13.5, 18


def lines_of(pieces: list[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    """Pieces of text with their origin, by line; long lines are broken at spaces."""
    lines: list[list[tuple[str, str]]] = [[]]
    column = 0
    for text, origin in pieces:
        for i, part in enumerate(text.split("\n")):
            if i or column + len(part) > WIDTH:
                lines.append([])
                column = 0
                part = part if i else part.lstrip(" ")
            lines[-1].append((part, origin))
            column += len(part)
    return lines


def picture(pieces: list[tuple[str, str]], caption: str) -> str:
    """The SVG."""
    legend: list[tuple[str, str]] = []
    for origin, meaning in MEANINGS.items():
        legend += [("■ " + meaning + "   ", origin)]
    lines = [*lines_of(pieces), [], legend, [(caption, "plain")]]
    height = 2 * MARGIN + LINE * len(lines)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="800" height="{height}" role="img"'
        f' aria-label="An answer whose tokens are coloured by origin">',
        f'<rect width="800" height="{height}" rx="8" fill="#0d1117"/>',
        f'<g font-family="ui-monospace, Menlo, Consolas, monospace" font-size="{SIZE}">',
    ]
    for i, line in enumerate(lines):
        spans = "".join(
            f'<tspan fill="{COLOURS[origin]}">{html.escape(text)}</tspan>' for text, origin in line
        )
        out.append(
            f'<text x="{MARGIN}" y="{MARGIN + LINE * i + 13}" xml:space="preserve">{spans}</text>'
        )
    return "\n".join([*out, "</g>", "</svg>", ""])


def main() -> None:
    model, to, *flags = sys.argv[1:]
    command = [sys.executable, "-m", "orthrus_gguf", "run", model, "--json-stream", *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *pieces, last = map(json.loads, done.stdout.splitlines())
    stats = last["stats"]
    caption = (
        f"{stats['output_tokens']} tokens in {stats['forwards']} passes:"
        f" {stats['tokens_per_cycle']:.2f} tokens per cycle"
    )
    with open(to, "w", encoding="utf-8") as file:
        file.write(picture([(piece["piece"], piece["origin"]) for piece in pieces], caption))


if __name__ == "__main__":
    main()
