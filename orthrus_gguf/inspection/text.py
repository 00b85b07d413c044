"""Reports as text, for a terminal of any width and files of any content."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from orthrus_gguf.gguf.reader import GGUFFile, TensorInfo, Value
from orthrus_gguf.inspection.anatomy import anatomy_rows
from orthrus_gguf.inspection.diff import Comparison
from orthrus_gguf.inspection.gpu import GpuFit
from orthrus_gguf.inspection.report import Report
from orthrus_gguf.inspection.summary import LayerGroup, Tally
from orthrus_gguf.inspection.verify import TensorCheck

MIN_WIDTH = 72
MAX_KEY_WIDTH = 48
MAX_SHOWN = 6  # elements of an array
LONG_TEXT = 200  # characters from which on their number is told

WORDS = ("type", "types", "what")  # heads of last columns that hold words

Row = Sequence[str]


def visible(text: str) -> str:
    """`text` with everything that a terminal would not print replaced by its escape."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def shorten(text: str, width: int) -> str:
    """At most `width` characters of `text`."""
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…"


def size(n_bytes: float) -> str:
    """Bytes in the binary unit that suits them."""
    for unit in ("B", "KiB", "MiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.2f} GiB"


def value_text(value: Value, width: int) -> str:
    """A metadata value on one line of at most `width` characters."""
    if isinstance(value, str):
        text = visible(value[: 2 * width].replace("\n", "\\n"))
        note = f" ({len(value):,} characters)" if len(value) > LONG_TEXT else ""
        return shorten(text, width - len(note)) + note
    if isinstance(value, list):
        kind, shown = "strings", [visible(repr(item[:width])) for item in value[:MAX_SHOWN]]
    elif isinstance(value, np.ndarray):
        kind, shown = value.dtype.name, [str(item) for item in value[:MAX_SHOWN].tolist()]
    else:
        return shorten(f"{value:.7g}" if isinstance(value, float) else str(value), width)
    more = ", …" if len(value) > MAX_SHOWN else ""
    return shorten(f"{len(value):,} {kind}: {', '.join(shown)}{more}", width)


def report_text(report: Report, width: int, *, all_tensors: bool = False) -> str:
    """The whole report."""
    width = max(width, MIN_WIDTH)
    parts = [_metadata(file, width) for file in report.files]
    summary = report.summary
    if report.config is not None:
        parts.append(table("model", [("part", "what"), *anatomy_rows(report.config)]))
    if summary.total.tensors:
        parts.append(table("tensors by type", _type_rows(report)))
        parts.append(table("tensors by layer", _layer_rows(summary.by_layer, width)))
        if all_tensors:
            parts.append(table("all tensors", _tensor_rows([info for _, info in report.tensors])))
        parts.append(table("sizes", _size_rows(report)))
    parts.append(_memory(report, width))
    if report.drafter is not None:
        title = f"drafter {visible(report.drafter.config.name)}, besides"
        parts.append(table(title, [("part", "what"), *report.drafter.rows]))
    return "\n".join(parts)


def table(title: str, rows: Sequence[Row]) -> str:
    """Columns wide enough for their cells, words to the left (they come first and last) and
    numbers to the right. The first row is the head."""
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    words = {0, len(columns) - 1} if rows[0][-1] in WORDS else {0}
    lines = [title]
    for row in rows:
        cells = [
            cell.ljust(wide) if column in words else cell.rjust(wide)
            for column, (cell, wide) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines) + "\n"


def _metadata(file: GGUFFile, width: int) -> str:
    more = f" and {len(file.paths) - 1} more files" if len(file.paths) > 1 else ""
    lines = [
        f"{visible(str(file.path))}{more}: {size(file.n_bytes)}, GGUF {file.version}, "
        f"alignment {file.alignment}, {len(file.metadata)} keys, {len(file.tensors)} tensors"
    ]
    keys = {key: shorten(visible(key), MAX_KEY_WIDTH) for key in file.metadata}
    wide = max(map(len, keys.values()), default=0)
    for key, value in file.metadata.items():
        lines.append(f"  {keys[key]:<{wide}}  {value_text(value, width - wide - 4)}")
    return "\n".join(lines) + "\n"


def _counts(count: Tally) -> tuple[str, str, str, str]:
    bits = count.bits_per_weight
    per_weight = "–" if bits is None else f"{bits:.3f}"
    return f"{count.tensors:,}", f"{count.elements:,}", size(count.n_bytes), per_weight


def _type_rows(report: Report) -> list[Row]:
    rows: list[Row] = [("type", "tensors", "elements", "size", "bits/weight", "share")]
    whole = report.summary.total.n_bytes
    for name, count in report.summary.by_type:
        rows.append((name, *_counts(count), f"{100 * count.n_bytes / whole:.1f} %"))
    return rows


def _layer_rows(groups: Sequence[LayerGroup], width: int) -> list[Row]:
    rows: list[Row] = [("layers", "tensors", "elements", "size", "bits/weight", "types")]
    for group in groups:
        name = f"each of {ranges(group.layers)}" if group.layers else "outside"
        types = ", ".join(f"{count} {kind}" for kind, count in group.types)
        rows.append((shorten(name, 30), *_counts(group.each), shorten(types, max(width - 76, 20))))
    return rows


def ranges(numbers: Sequence[int]) -> str:
    """Sorted numbers in short: `0–3, 5`."""
    parts: list[tuple[int, int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1] = (parts[-1][0], number)
        else:
            parts.append((number, number))
    return ", ".join(f"{a}–{b}" if a < b else f"{a}" for a, b in parts)


def _tensor_rows(tensors: Sequence[TensorInfo]) -> list[Row]:
    rows: list[Row] = [("name", "shape", "size", "type")]
    for info in tensors:
        shape = " x ".join(map(str, info.shape))
        rows.append((visible(info.name), shape, size(info.n_bytes), info.type.name))
    return rows


def _size_rows(report: Report) -> list[Row]:
    summary = report.summary
    rows: list[Row] = [("part", "tensors", "elements", "size", "bits/weight", "bytes")]
    parts = (("base", summary.base), ("heads", summary.heads), ("total", summary.total))
    for name, count in parts:
        if count.tensors:
            rows.append((name, *_counts(count), f"{count.n_bytes:,}"))
    return rows


def _memory(report: Report, width: int) -> str:
    if report.config is None or report.cache_per_token is None:
        return f"memory: not for this file: {visible(report.problem or '')}\n"
    types = "/".join(report.cache_types)
    rows: list[Row] = [("context", "base", "heads", "cache", "buffers", "total")]
    for need in report.memory:
        parts = (need.base, need.heads, need.cache, need.buffers, need.total)
        full = " (trained)" if need.context == report.config.n_ctx_train else ""
        rows.append((f"{need.context:,}{full}", *map(size, parts)))
    per_thousand = size(1000 * report.cache_per_token)
    title = f"memory on {report.runtime}, {types} cache: {per_thousand} per 1,000 tokens"
    return table(title, rows) + "  (buffers at most; Python and the tokenizer come on top)\n"


def gpu_text(found: GpuFit) -> str:
    """Tokens of context that fit, by type of cache and size of card."""
    rows: list[Row] = [
        ("cache (keys/values)", "per 1,000", *(f"{card} GB" for card in found.cards), "needs")
    ]
    for fit in found.fits:
        shown = [f"{tokens:,}" if tokens else "–" for tokens in fit.contexts]
        types = "/".join(fit.cache_types)
        rows.append((types, size(1000 * fit.row), *shown, size(fit.needs)))
    beside = "" if found.drafter is None else f" with drafter {visible(found.drafter)} beside"
    title = f"context that fits on a GPU{beside}, in tokens"
    needs = f"{found.fits[0].target:,}"
    return table(title, rows) + (
        f"  (needs: of the card, for {needs} tokens. Beside weights and buffers, 0.5 GiB for torch"
        " and\n  0.75 GiB for CUDA and a desktop are set aside: allowances, not measurements)\n"
    )


def verify_text(checks: Sequence[TensorCheck], digests: dict[str, str], n_bytes: int) -> str:
    """A digest per tensor, of base and heads, and a last line that sums up."""
    lines = ["sha256 of tensors"]
    lines += [f"  {check.sha256}  {visible(check.info.name)}" for check in checks]
    lines += ["", "sha256 of names, types, shapes and bytes"]
    lines += [f"  {digest}  {part}" for part, digest in digests.items()]
    unknown = sorted({check.info.type.name for check in checks if check.bad is None})
    damaged = sum(check.damage is not None for check in checks)
    note = f"; {', '.join(unknown)}: scales not checked" if unknown else ""
    verdict = f"{damaged} damaged" if damaged else "no damage found"
    lines += ["", f"{len(checks)} tensors, {size(n_bytes)} read: {verdict}{note}"]
    return "\n".join(lines) + "\n"


def diff_text(metadata: Comparison, tensors: Comparison, width: int) -> str:
    """What differs, a line each (`<` only in the first, `>` only in the second, `!` in both)."""
    lines = []
    for kind, comparison in (("key", metadata), ("tensor", tensors)):
        lines += [f"< {kind} {visible(name)}" for name in comparison.only_first]
        lines += [f"> {kind} {visible(name)}" for name in comparison.only_second]
        lines += [
            f"! {kind} {visible(name)}: {visible(what)}"
            for name, what in comparison.different.items()
        ]
    for kind, comparison in (("keys", metadata), ("tensors", tensors)):
        lines.append(
            f"{kind}: {len(comparison.same)} the same, {len(comparison.different)} different, "
            f"{len(comparison.only_first)} only in the first, "
            f"{len(comparison.only_second)} only in the second"
        )
    return "\n".join(shorten(line, max(width, MIN_WIDTH)) for line in lines) + "\n"
