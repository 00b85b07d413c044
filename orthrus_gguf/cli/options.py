"""Flags shared by the commands that run a model, under llama.cpp's names, and what they mean."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import Any

from orthrus_gguf.decode import PROMPT_BATCH
from orthrus_gguf.drafting.plan import FUSED_BLOCKS, NAMES
from orthrus_gguf.drafting.registry import KINDS, optional_names
from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.gguf.reader import Value
from orthrus_gguf.runtime.load import RuntimeName, RuntimeSettings
from orthrus_gguf.sampling import MAX_SEED, SamplingSettings, out_of_range
from orthrus_gguf.this_machine import machine

#: Key in the file → field of SamplingSettings (which is also the flag's `dest`).
FILE_DEFAULTS = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repeat_penalty",
    "general.sampling.penalty_last_n": "repeat_last_n",
}


def integer(text: str) -> int:
    """argparse type: an integer."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, found {text!r}") from None


def number(text: str) -> float:
    """argparse type: a number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, found {text!r}") from None


def positive(text: str) -> int:
    """argparse type: an integer of at least 1."""
    value = integer(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: expected at least 1")
    return value


def natural(text: str) -> int:
    """argparse type: an integer of at least 0."""
    value = integer(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value}: expected at least 0")
    return value


def threads(text: str) -> int | None:
    """argparse type: an integer of at least 1; -1, as in llama.cpp, is the default."""
    return None if text == "-1" else positive(text)


def seed(text: str) -> int:
    """argparse type: -1 (random) or a 64-bit seed."""
    value = integer(text)
    if not -1 <= value <= MAX_SEED:
        raise argparse.ArgumentTypeError(f"{value}: expected -1 or 0 .. 2^64-1")
    return value


def listed(kind: Callable[[str], int], example: str) -> Callable[[str], tuple[int, ...]]:
    """argparse type: integers with commas between, each of this kind; none of them is fine."""

    def parse(text: str) -> tuple[int, ...]:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if not all(part.removeprefix("-").isdecimal() for part in parts):
            raise argparse.ArgumentTypeError(f"{text!r}: expected numbers like {example}")
        return tuple(map(kind, parts))

    return parse


def words(text: str) -> str:
    """argparse type: text. Python hands on bytes that the locale does not know; they are UTF-8."""
    try:
        return os.fsencode(text).decode("utf-8") if _has_bytes(text) else text
    except UnicodeDecodeError as error:
        raise argparse.ArgumentTypeError(f"not UTF-8 text (at byte {error.start})") from None


def _has_bytes(text: str) -> bool:
    return any("\udc80" <= char <= "\udcff" for char in text)


def switch(text: str) -> bool | None:
    """argparse type: on or off; None for auto."""
    if text not in ("on", "off", "auto"):
        raise argparse.ArgumentTypeError(f"expected on, off or auto, found {text!r}")
    return None if text == "auto" else text == "on"


#: Spellings of a flag → field of SamplingSettings, type, help.
SAMPLING_FLAGS = (
    ("--temp --temperature", "temperature", number, "temperature; 0 is greedy"),
    ("--top-k", "top_k", integer, "keep the k likeliest tokens; 0 keeps all"),
    ("--top-p", "top_p", number, "keep the likeliest tokens up to this mass; 1 keeps all, 0 one"),
    ("--min-p", "min_p", number, "drop tokens below this share of the likeliest; 0 keeps all"),
    ("--repeat-penalty", "repeat_penalty", number, "penalty of seen tokens; 1 is off"),
    ("--repeat-last-n", "repeat_last_n", integer, "window of the penalties; 0 off, -1 all"),
    ("--presence-penalty", "presence_penalty", number, "penalty of any seen token"),
    ("--frequency-penalty", "frequency_penalty", number, "penalty for each time it was seen"),
)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The model file and how to run it."""
    group = parser.add_argument_group("model")
    group.add_argument("model", nargs="?", metavar="FILE.gguf", help="the model")
    group.add_argument("-m", "--model", dest="model_flag", metavar="FILE.gguf", help="same")
    group.add_argument(
        "-hf",
        "-hfr",
        "--hf-repo",
        metavar="OWNER/NAME[:QUANT]",
        help="a GGUF file of a Hugging Face repository, downloaded once (default QUANT: Q4_K_M)",
    )
    group.add_argument(
        "--heads",
        metavar="HEADS.gguf",
        help="diffusion heads of a split model (default: BASE-heads.gguf beside BASE.gguf)",
    )
    group.add_argument(
        "--no-heads", action="store_true", help="leave out the heads that lie beside the model"
    )
    group.add_argument(
        "--runtime",
        choices=[name.value for name in RuntimeName],
        default=RuntimeName.AUTO.value,
        help="what computes: cuda (NVIDIA GPU), cpu (native kernels), ggml (CPU, any type),"
        " reference (torch, float32, slow) (default: auto, a GPU if there is one)",
    )
    group.add_argument(
        "-dev",
        "--device",
        metavar="DEV",
        help="cuda:N, one of the GPUs, or cpu (default: cuda:0 if there is one)",
    )
    group.add_argument("--list-devices", action=ListDevices, help="list them and leave")
    group.add_argument(
        "-t",
        "--threads",
        type=threads,
        metavar="N",
        help="CPU threads (default: as measured, up to the physical cores)",
    )
    group.add_argument(
        "-b",
        "--batch-size",
        type=positive,
        default=PROMPT_BATCH,
        metavar="N",
        help=f"prompt tokens per pass (default: {PROMPT_BATCH})",
    )
    for key in "kv":
        group.add_argument(
            f"-ct{key}",
            f"--cache-type-{key}",
            metavar="TYPE",
            help=f"cache type of {'keys' if key == 'k' else 'values'}: f32, f16, q8_0, q4_0"
            " (default: f16)",
        )


def add_special_option(group: argparse._ArgumentGroup) -> None:
    """Whether prompts may speak for the system."""
    group.add_argument(
        "--special-in-prompt",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="control tokens that a prompt spells out are those tokens; with --no-..., plain text"
        " that opens and closes no turn (default: on, as in llama.cpp)",
    )


def add_decoding_options(parser: argparse.ArgumentParser) -> None:
    """How tokens are found. None of these changes the text."""
    group = parser.add_argument_group("decoding (never changes the text)")
    group.add_argument(
        "--strategy",
        choices=list(NAMES),
        help="auto measures this machine and does what is fastest; ar is plain decoding; two-pass"
        " drafts with the diffusion heads, then verifies; fused drafts and verifies in one pass"
        " (default: auto; two-pass if --draft-width is given)",
    )
    group.add_argument(
        "--draft-width",
        type=positive,
        metavar="N",
        help="draft tokens verified per cycle, at most (default: block size - 1)",
    )
    group.add_argument(
        "--draft-blocks",
        type=positive,
        metavar="N",
        help=f"blocks that ride in a fused pass, at most (default: {FUSED_BLOCKS})",
    )
    group.add_argument(
        "--draft-cut",
        type=number,
        default=0.0,
        metavar="P",
        help="end a draft where its confidence falls below P (default: 0, never; auto weighs it)",
    )
    group.add_argument(
        "--draft-tail",
        action="store_true",
        help="try what a refused draft said further on before drafting again (auto weighs it)",
    )
    group.add_argument(
        "--draft-tree",
        type=positive,
        metavar="N",
        help="two-pass: verify a tree of N draft tokens, of a draft's first and second choices, at"
        " most --draft-width deep (default: none, the first choices only)",
    )
    for name in optional_names():
        group.add_argument(
            f"--{name}",
            action=argparse.BooleanOptionalAction,
            help=f"also draft {KINDS[name].words} (default: only auto)",
        )


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Sampling flags; unset ones are None, which means "what the file says, else the default"."""
    group = parser.add_argument_group("sampling (the file's general.sampling.* go before defaults)")
    group.add_argument(
        "-s", "--seed", type=seed, default=-1, metavar="N", help="seed (default: -1, random)"
    )
    standard = SamplingSettings()
    for names, field, kind, text in SAMPLING_FLAGS:
        group.add_argument(
            *names.split(),
            dest=field,
            type=kind,
            metavar="N",
            help=f"{text} (default: {getattr(standard, field)})",
        )
    group.add_argument("--ignore-eos", action="store_true", help="never end by itself")


def model_path(args: argparse.Namespace) -> str:
    """The model file, given bare, with -m, or with -hf and then downloaded if need be.

    Raises OrthrusError unless exactly one is given.
    """
    given = [path for path in (args.model, args.model_flag, args.hf_repo) if path is not None]
    if len(given) != 1:
        raise OrthrusError("name one model file: FILE.gguf, -m FILE.gguf, or -hf OWNER/NAME")
    if args.heads is not None and args.no_heads:
        raise OrthrusError("--heads and --no-heads exclude each other; leave one of them out")
    if args.hf_repo is None:
        return str(given[0])
    from orthrus_gguf.cli.download import resolve

    return str(resolve(args.hf_repo))


def runtime_settings(args: argparse.Namespace) -> RuntimeSettings:
    """Raises OrthrusError for a device that the runtime is not for."""
    name, device = RuntimeName(args.runtime), args.device
    if device is not None and (device.lower() == "cpu" or device.lower() == "none"):
        if name is RuntimeName.CUDA:
            raise OrthrusError(
                f"--device {device}: --runtime cuda needs a GPU; leave one of them out"
            )
        name = RuntimeName.CPU if name is RuntimeName.AUTO else name
        device = None
    elif device is not None:
        device = re.sub(r"^CUDA(?=\d)", "cuda:", device)  # as llama.cpp calls them
    return RuntimeSettings(
        name=name,
        threads=args.threads,
        cache_type_k=args.cache_type_k,
        cache_type_v=args.cache_type_v,
        device=device,
    )


def random_seed() -> int:
    """A seed that nobody can guess. (`secrets` brings cryptography, which takes long to import.)"""
    return int.from_bytes(os.urandom(4), "little")


def sampling_settings(
    args: argparse.Namespace, metadata: Mapping[str, Value], eog: frozenset[int]
) -> SamplingSettings:
    """Flags over the file's `general.sampling.*` over llama.cpp's defaults.

    eog: the ids that `--ignore-eos` bans.
    """
    base = SamplingSettings(
        seed=random_seed() if args.seed < 0 else args.seed,
        banned=tuple(sorted(eog)) if args.ignore_eos else (),
    )
    flags = {field: names.split()[0] for names, field, _, _ in SAMPLING_FLAGS}
    chosen: dict[str, Any] = {}
    for field, flag in flags.items():
        value = getattr(args, field)
        if value is None:
            continue
        if problem := out_of_range(field, value):
            raise OrthrusError(f"{flag}: {problem}")
        chosen[field] = value
    for key, field in FILE_DEFAULTS.items():
        value = metadata.get(key)
        if value is not None and field not in chosen:
            number = _number(key, flags[field], value)
            if problem := out_of_range(field, number):
                raise _of_file(key, flags[field], problem)
            chosen[field] = type(getattr(base, field))(number)
    return replace(base, **chosen)


def _number(key: str, flag: str, value: Value) -> float:
    """A setting of the file; whether it is a float or not, that is how files differ."""
    fine = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    if not fine:
        raise _of_file(key, flag, f"expected a number, found {value!r:.60}")
    assert isinstance(value, int | float)
    return value


def _of_file(key: str, flag: str, problem: str) -> OrthrusError:
    """An error about a setting that the file brings."""
    return OrthrusError(f"the file's {key}: {problem}; set it with {flag}")


class ListDevices(argparse.Action):
    """`--list-devices`: print what `--device` takes here, and leave."""

    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, nargs=0, **settings)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from orthrus_gguf.runtime.cuda.presence import describe_devices

        print("\n".join(["Available devices:", *(f"  {line}" for line in describe_devices())]))
        print(f"  cpu: {machine()['cpu']}")
        parser.exit()
