"""From the start of `orthrus-run` to its first token, on a file with a vocabulary of real size.

    PYTHONPATH=tests/helpers python tests/bench/load_time.py FILE.gguf [-r RUNS] [-t THREADS]

Writes FILE.gguf if it does not exist: random Q4_K_M weights in the shape of Orthrus-Qwen3-1.7B
(1.3 GB), 151,936 tokens and 151,387 merges that fit together, a chat template of Qwen's kind. Every
run is a process of its own, with the file in the page cache; the kinds take turns: `--version`
(Python's start and what the command line imports), a prompt of one token (`--raw`), and a chat
message, which adds the template and a prompt of several tokens. The clock stops at the first byte
on stdout: the first token's text, or the end of the line where it has none. Prints a markdown
table.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import gguf
from synthetic_model import byte_letters, q4_k_m, qwen3_1_7b, write_model

from orthrus_gguf.ggml.library import load_library

N_MERGES = 151387
MAX_TOKEN = 24  # letters

FREQUENT = "Ġetaoinsrhldcumfpgwybvkxjqz.,_()='Ċ"

#: Where Qwen3 has its control tokens, the vocabulary's end and what fills the embedding up.
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
N_NAMED, N_VOCAB = 151670, 151936

#: ChatML with the switch, the tools and the tool calls of Qwen3's own template.
TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- '# Tools\\n' }}
    {%- for tool in tools %}{{- '\\n' + tool | tojson }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""


def write_file(path: Path) -> None:
    """The file that the benchmark loads."""
    config = qwen3_1_7b()
    config = replace(config, n_vocab=N_VOCAB, mask_token=N_NAMED - 1)
    rule = q4_k_m(config.n_layers)
    write_model(load_library().api, path, config, rule, add_tokenizer=_add_tokenizer)


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    tokens, merges = made_up_bpe(random.Random(0), N_MERGES)
    control = [*CONTROL, *(f"<|control_{i}|>" for i in range(N_NAMED - len(tokens) - len(CONTROL)))]
    padding = [f"[PAD{i}]" for i in range(N_NAMED, N_VOCAB)]
    types = (
        *[gguf.TokenType.NORMAL] * len(tokens),
        *[gguf.TokenType.CONTROL] * len(control),
        *[gguf.TokenType.UNUSED] * len(padding),
    )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([*tokens, *control, *padding])
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(len(tokens))
    writer.add_eos_token_id(len(tokens) + CONTROL.index("<|im_end|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)


def made_up_bpe(rng: random.Random, n_merges: int) -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-level BPE vocabulary: every merge joins two older tokens.

    Old tokens are the frequent ones, as in a trained vocabulary, which keeps the mean length near
    Qwen3's six to seven letters.
    """
    letters = byte_letters()
    pool = sorted(letters, key=lambda letter: FREQUENT.find(letter) % len(letters))
    known = set(letters)
    merges: list[str] = []
    while len(merges) < n_merges:
        left, right = (pool[int(len(pool) * rng.random() ** 5)] for _ in range(2))
        token = left + right
        if len(token) <= MAX_TOKEN and token not in known:
            known.add(token)
            pool.append(token)
            merges.append(f"{left} {right}")
    return letters + pool[len(letters) :], merges


def seconds_to_output(arguments: list[str], bytecode: str) -> float:
    """From starting `orthrus-run` to the first byte on its stdout.

    bytecode: folder for compiled modules, which an installation has beside its sources.
    """
    command = [str(Path(sys.executable).with_name("orthrus-run")), *arguments]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = bytecode
    started = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    ) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - started
        process.stdout.read()
    if not first or process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE.gguf")
    parser.add_argument("-r", "--runs", type=int, default=11)
    parser.add_argument("-t", "--threads", type=int, default=1)
    args = parser.parse_args()
    if not args.file.exists():
        write_file(args.file)
    answer = [str(args.file), "-p", "x", "-n", "1", "--temp", "0", "-t", str(args.threads)]
    kinds = {
        "`--version`": ["--version"],
        "a prompt of one token": [*answer, "--raw"],
        "a chat message": answer,
    }
    times: dict[str, list[float]] = {name: [] for name in kinds}
    with tempfile.TemporaryDirectory() as bytecode:
        for turn in range(args.runs + 1):
            for name, arguments in kinds.items():
                seconds = seconds_to_output(arguments, bytecode)
                if turn:  # the first turn compiles, and warms the page cache
                    times[name].append(seconds)
    print(f"{args.file.stat().st_size / 1e9:.2f} GB, {args.runs} runs, -t {args.threads}\n")
    print("| from process start to first output | median, s | range |\n|---|--:|--:|")
    for name, values in times.items():
        print(f"| {name} | {statistics.median(values):.3f} | {min(values):.3f}–{max(values):.3f} |")


if __name__ == "__main__":
    main()
