"""What quantization costs in quality and in acceptance, on the demo model.

    python tests/bench/quant_quality.py TEXT_FILE... [--plot PLOT.png]
    python tests/bench/quant_quality.py TEXT_FILE... --imatrix IMATRIX.gguf

For every type: perplexity and mean KL divergence to F32 on TEXT_FILEs (text that the model was not
trained on; of its windows of 256 tokens all but the first are scored), how much greedy text stays
the same, and tokens per cycle. Then the heads alone, over a base in F16, where only acceptance can
change. Prints two markdown tables. With an importance matrix (`imatrix.py` measures one): one
table, of the types that need it and some that gain by it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orthrus_converters.cli import main as convert

from orthrus_gguf.bench.perplexity import Text, cut, window_logits
from orthrus_gguf.decode import decode, drive, prefill
from orthrus_gguf.drafting.plan import FixedPolicy, Plan, parse
from orthrus_gguf.drafting.sequence import TokenSequence
from orthrus_gguf.model.file import ModelFile
from orthrus_gguf.model.tensors import is_diffusion_tensor
from orthrus_gguf.runtime.load import RuntimeName, RuntimeSettings, load_model
from orthrus_gguf.runtime.protocol import Model
from orthrus_gguf.sampling import Sampler, SamplingSettings
from orthrus_gguf.text.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "models/tiny-orthrus-stdlib"
GOLDEN = ROOT / "tests/golden/tiny-orthrus-stdlib.json"

TYPES = (
    *("f32", "bf16", "f16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s"),
    *("q4_1", "q4_0", "iq4_nl", "iq4_xs", "q3_k_l", "q3_k_m", "q3_k_s", "iq3_m", "iq3_s"),
    "q2_k",
)
IMATRIX_TYPES = (
    *("q4_k_m", "iq4_xs", "q3_k_m", "iq3_m", "iq3_s", "iq3_xs", "iq3_xxs", "q2_k", "q2_k_s"),
    *("iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s"),
)
HEADS_TYPES = ("f16", "q8_0", "q6_k", "q5_k", "q4_k", "q4_0", "iq4_nl", "q3_k", "q2_k")
WINDOW = 256  # the context that the model was trained with
N_NEW = 96


@dataclass(frozen=True)
class Score:
    name: str
    bytes: int
    perplexity: float
    kl: float
    same_text: float
    tokens_per_cycle: float


def generate(model: Model, prompt: list[int], plan: Plan) -> tuple[list[int], int]:
    """Greedy output of N_NEW tokens, and the number of cycles."""
    cache, sampler = model.new_cache(len(prompt) + N_NEW), Sampler(SamplingSettings(temperature=0))
    sequence = TokenSequence(model.config, cache, sampler, list(prompt))
    drive(model, prefill(sequence))
    policy = FixedPolicy(plan, model.config)
    cycles = sum(1 for _ in decode(model, sequence, policy, N_NEW - 1))
    return sequence.tokens[len(prompt) :], cycles


class Judge:
    """Scores files against the F32 one. imatrix: to quantize with."""

    def __init__(
        self, texts: list[Path], folder: Path, imatrix: Path | None, runtime: RuntimeName
    ) -> None:
        self._runtime = runtime
        self._folder = folder
        self._imatrix = imatrix
        cases: list[dict[str, Any]] = json.loads(GOLDEN.read_text())["cases"]
        self._cases = cases
        with ModelFile.open(self.file("f32")) as file:
            tokenizer = load_tokenizer(file.metadata, path=file.paths[0], n_vocab=4096)
            ids = [i for path in texts for i in tokenizer.encode(path.read_text("utf-8"))]
            self._windows = cut(ids, WINDOW)
            model = load_model(file, RuntimeSettings(RuntimeName.REFERENCE, threads=1))
            self._truth = list(window_logits(model, self._windows, 0, batch=WINDOW))
            model.close()
        self.n_tokens = len(self._windows) * (WINDOW - 1)
        self.n_prompts = len(cases)

    def file(self, type_name: str, heads_type: str | None = None) -> Path:
        path = self._folder / f"{type_name}-{heads_type}.gguf"
        if not path.exists():
            flags = [] if heads_type is None else ["--heads-type", heads_type]
            if self._imatrix is not None:
                flags += ["--imatrix", str(self._imatrix)]
            with contextlib.redirect_stdout(sys.stderr):  # where it names its output
                failed = convert([str(CHECKPOINT), str(path), "--type", type_name, *flags])
            if failed:
                raise SystemExit(f"{type_name}: cannot be converted")
        return path

    def score(self, type_name: str, heads_type: str | None = None) -> Score:
        with ModelFile.open(self.file(type_name, heads_type)) as file:
            model = load_model(file, RuntimeSettings(self._runtime, threads=1))
            size = sum(
                info.n_bytes
                for name, info in file.tensors.items()
                if heads_type is None or is_diffusion_tensor(name)
            )
            text, same, n_cycles = Text(self._windows, 0), 0.0, 0
            ours = window_logits(model, self._windows, 0, batch=WINDOW)
            for logits, truth in zip(ours, self._truth, strict=True):
                text.add(logits, truth)
            for case in self._cases:
                output, cycles = generate(model, case["prompt_ids"], parse("two-pass@15"))
                n_cycles += cycles
                different = [a != b for a, b in zip(output, case["output_ids"], strict=True)]
                same += (different.index(True) if True in different else N_NEW) / N_NEW
            model.close()
        return Score(
            heads_type or type_name,
            size,
            text.perplexity.value,
            text.comparison().mean_kl.value,
            same / len(self._cases),
            (N_NEW - 1) * len(self._cases) / n_cycles,
        )


def table(title: str, scores: list[Score]) -> str:
    lines = [
        f"| {title} | MB | perplexity | KL to F32 | text kept | tokens per cycle |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {s.name.upper()} | {s.bytes / 1e6:.2f} | {s.perplexity:.3f} | {s.kl:.5f} |"
        f" {100 * s.same_text:.0f} % | {s.tokens_per_cycle:.2f} |"
        for s in scores
    ]
    return "\n".join(lines)


def plot(path: Path, whole: list[Score], heads: list[Score]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    heights = [len(whole), len(heads)]
    figure, parts = plt.subplots(2, 1, figsize=(8, 9), gridspec_kw={"height_ratios": heights})
    titles = ("whole model quantized", "only the heads quantized (base F16): the text is the same")
    for axes, scores, title in zip(parts, (whole, heads), titles, strict=True):
        names = [s.name.upper() for s in scores]
        bars = axes.barh(names, [s.tokens_per_cycle for s in scores], color="#4477aa")
        axes.bar_label(
            bars,
            [f"{s.tokens_per_cycle:.2f}   {s.bytes / 1e6:.2f} MB   KL {s.kl:.4f}" for s in scores],
            fontsize=8,
            padding=3,
        )
        axes.set_title(title, fontsize=10)
        axes.set_xlim(0, 4)
        axes.invert_yaxis()
    parts[1].set_xlabel("tokens per cycle (two-pass, width 15)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("texts", nargs="+", type=Path, metavar="TEXT_FILE")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--runtime", default="cpu", choices=["cpu", "ggml"])
    parser.add_argument("--types", help="only these, with commas between (no heads alone)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        judge = Judge(args.texts, Path(folder), args.imatrix, RuntimeName(args.runtime))
        print(f"{judge.n_tokens} tokens of text; {judge.n_prompts} prompts of {N_NEW} new tokens\n")
        if args.imatrix is not None:
            print(table("type", [judge.score(type_name) for type_name in IMATRIX_TYPES]))
            return
        if args.types is not None:
            scores = [judge.score(type_name) for type_name in args.types.split(",")]
            print(table(f"type, --runtime {args.runtime}", scores))
            return
        whole = [judge.score(type_name) for type_name in TYPES]
        heads = [judge.score("f16", type_name) for type_name in HEADS_TYPES]
    print(table("type", whole) + "\n\n" + table("heads", heads))
    if args.plot is not None:
        plot(args.plot, whole, heads)


if __name__ == "__main__":
    main()
