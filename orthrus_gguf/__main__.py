"""`python -m orthrus_gguf COMMAND …` is `orthrus-COMMAND …`."""

from __future__ import annotations

import sys

from orthrus_gguf.entry import COMMANDS, start

USAGE = f"usage: python -m orthrus_gguf {{{','.join(COMMANDS)}}} …    (--help after a command)"


def main() -> int:
    """Start the command that the first word names; returns the exit code if there is none."""
    word = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if word in COMMANDS:
        sys.argv[:2] = [f"orthrus-{word}"]
        start(word)
    if word in ("-h", "--help"):
        print(USAGE)
        return 0
    from orthrus_gguf.errors import did_you_mean

    print(
        f"orthrus_gguf: error: no command {word!r}{did_you_mean(word, COMMANDS)}; {USAGE}",
        file=sys.stderr,
    )
    return 1


if __name__ == "__main__":
    sys.exit(main())
