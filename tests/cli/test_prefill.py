"""`--prefill-drafter`: prompts are shortened, and every result says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from live_server import chat_model
from orthrus_cpu_kernels.library import NoKernelsError

from orthrus_gguf.cli.conversation import Conversation
from orthrus_gguf.cli.loaded import load
from orthrus_gguf.cli.run import _parser
from orthrus_gguf.cli.run import main as run
from orthrus_gguf.text.chat import Message

DemoFile = Callable[..., Path]
CODE = (Path(__file__).parents[2] / "orthrus_gguf" / "sampling.py").read_text("utf-8")[:3000]
SHORTER = ("--prefill-threshold", "100", "--prefill-keep", "0.1")


@pytest.fixture(scope="module")
def chat_file(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_model(checkpoint, tmp_path_factory.mktemp("chat"))


def answered(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[dict[str, Any], str]:
    """What --json prints, and stderr."""
    capsys.readouterr()
    common = ("--json", "-n", "24", "-t", "1", "-s", "3", "-p", CODE)
    assert run([*map(str, words), *common]) == 0
    out, err = capsys.readouterr()
    return json.loads(out), err


@pytest.mark.parametrize("scorer", ["self:2", "itself"])
def test_the_text_is_the_same_whatever_the_strategy(
    demo_file: DemoFile, capsys: pytest.CaptureFixture[str], scorer: str
) -> None:
    """Given the same kept tokens. A share of 1 is the whole prompt, and nobody scores."""
    file = demo_file("q8_0")
    flags = ("--prefill-drafter", file if scorer == "itself" else scorer, *SHORTER)
    texts = []
    for strategy in ("ar", "two-pass", "fused"):
        found, err = answered(capsys, file, "--strategy", strategy, *flags)
        texts.append((found["text"], found["prompt_ids"]))
        kept = found["prefill"]
        assert kept["lossy"] is True
        assert kept["kept_tokens"] == len(found["prompt_ids"]) < kept["prompt_tokens"] / 3
        assert kept["scored_tokens"] == kept["prompt_tokens"]
        assert ("the first 2 of its" in kept["scorer"]) == (scorer != "itself")
        assert f"prompt shortened: {kept['kept_tokens']} of {kept['prompt_tokens']}" in err
        assert "the answer may differ" in err
    assert texts == texts[:1] * 3
    whole, err = answered(capsys, file, "--strategy", "ar", *flags, "--prefill-keep", "1")
    plain, _ = answered(capsys, file, "--strategy", "ar")
    assert "prefill" not in {*whole, *plain}
    assert (whole["text"], whole["prompt_ids"]) == (plain["text"], plain["prompt_ids"])
    assert "shortened" not in err
    ids = iter(plain["prompt_ids"])
    assert all(token in ids for token in texts[0][1]), "kept tokens, in their order"


def test_the_statistics_say_so(demo_file: DemoFile, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--prefill-drafter", "self:1", *SHORTER, "-n", "4", "-p", CODE)
    assert run([str(demo_file("q8_0")), *flags]) == 0
    err = capsys.readouterr().err
    assert "\nkept:    " in err
    assert "the answer may differ" in err.split("\nkept: ")[1].splitlines()[0]


def test_a_conversation_goes_on_with_what_was_kept(
    chat_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The system message stays; the next turn finds its rows in the cache, and so does its like in
    a turn that is long itself."""
    flags = ("--prefill-drafter", "self:2", *SHORTER, "-n", "6", "--temp", "0", "-t", "1")
    args = _parser().parse_args([str(chat_file), "-sys", CODE[:600], *flags, "--strategy", "ar"])
    with ExitStack() as resources:
        loaded = load(str(chat_file), args, resources)
        conversation = Conversation(loaded, 1, [Message("system", CODE[:600])])
        seen = []
        for question in (CODE, "import re", CODE[800::-1]):
            request = conversation.request(question)
            generation = loaded.start(request)
            for _ in generation:
                pass
            result = generation.result
            conversation.answered(question, result)
            seen.append((request, result))
            assert result.selection is request.selection is not None
    (first, _), (second, next_result), (third, last_result) = seen
    tokenizer = loaded.tokenizer
    assert CODE[:600] in tokenizer.decode(first.prompt)
    assert second.selection is not None
    assert second.selection.scored == 0
    assert second.prompt[: len(first.prompt)] == first.prompt
    assert next_result.statistics.cached_tokens >= len(first.prompt)
    assert third.selection is not None
    assert third.selection.scored > 100
    assert last_result.statistics.cached_tokens >= len(second.prompt)
    assert len(third.prompt) - len(second.prompt) < 400


def test_turns_are_forgotten_by_what_was_kept_of_them(
    chat_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each turn has twice as many tokens as the context."""
    flags = ("--prefill-drafter", "self:1", *SHORTER, "-n", "4", "-t", "1", "-c", "640")
    args = _parser().parse_args([str(chat_file), *flags, "--strategy", "ar"])
    with ExitStack() as resources:
        loaded = load(str(chat_file), args, resources)
        conversation, lengths = Conversation(loaded, 1, []), []
        while "forgotten" not in (err := capsys.readouterr().err):
            request = conversation.request(CODE)
            loaded.tell(request)
            lengths.append(len(request.prompt))
            assert request.selection is not None
            assert request.selection.full > 1280 * (len(conversation.messages) // 2 + 1) * 0.7
            assert len(request.prompt) + 4 <= 640
            conversation.messages += [Message("user", CODE), Message("assistant", "import re")]
            assert len(lengths) < 12, "it goes on for ever"
    assert len(lengths) > 2, "more turns than one fit"
    assert lengths[:-1] == sorted(lengths[:-1])
    assert lengths[-1] < lengths[-2], "some are forgotten"
    assert "turns are forgotten]" in err
    assert err.count("prompt shortened") == 1, "one line, of the prompt that is read"


@pytest.mark.parametrize("scorer", ["self:2", "itself"])
def test_without_cpu_kernels_nothing_is_scored(
    demo_file: DemoFile,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    scorer: str,
) -> None:
    """ggml runs the model then, as it says."""

    def none() -> None:
        raise NoKernelsError("none of them")

    monkeypatch.setattr("orthrus_gguf.runtime.load.load", none)
    file = str(demo_file("q8_0"))
    name = file if scorer == "itself" else scorer
    capsys.readouterr()
    assert run([file, "-p", CODE, "--prefill-drafter", name, *SHORTER]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "does not tell what a model attends to; use --runtime reference" in err.splitlines()[-1]


def test_a_scorer_for_shorter_prompts_says_so(
    demo_file: DemoFile, capsys: pytest.CaptureFixture[str]
) -> None:
    file = demo_file("q8_0")
    flags = ("--prefill-drafter", file, "--strategy", "ar", *SHORTER)
    _, err = answered(capsys, file, *flags, "-c", "2049")
    assert f"--prefill-drafter {file}: was trained for 2048 tokens of context" in err
    assert "was trained for 2048 tokens" not in answered(capsys, file, *flags, "-c", "2048")[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--prefill-keep 0.5", "name it with --prefill-drafter"),
        ("--prefill-threshold 5", "name it with --prefill-drafter"),
        ("--prefill-drafter self:2 --prefill-keep 0", "--prefill-keep 0: expected a share"),
        ("--prefill-drafter self:2 --prefill-keep 1.5", "--prefill-keep 1.5: expected a share"),
        ("--prefill-drafter self:x", "self:x: expected self:N"),
        ("--prefill-threshold 9 --prefill-drafter self:0", "has 4 layers; expected self:1"),
        ("--prefill-threshold 9 --prefill-drafter self:9", "has 4 layers; expected self:1"),
        ("--prefill-threshold 9 --prefill-drafter nowhere.gguf", "nowhere.gguf"),
        ("--prefill-drafter self:2 --runtime ggml", "--runtime ggml does not tell"),
        ("--prefill-drafter self:2 -c 512", "--prefill-threshold 2048: no prompt is longer"),
        (
            "--prefill-drafter self:2 --prefill-threshold 512 -c 512",
            "--prefill-threshold 512: no prompt is longer, since the context has 512 tokens",
        ),
    ],
)
def test_what_makes_no_sense(
    demo_file: DemoFile, capsys: pytest.CaptureFixture[str], flags: str, message: str
) -> None:
    """One line each, and nothing else."""
    file = str(demo_file("q8_0"))
    capsys.readouterr()
    assert run([file, "-p", "x", *flags.split()]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = [line for line in err.splitlines() if "no chat template" not in line]
    assert message in line
