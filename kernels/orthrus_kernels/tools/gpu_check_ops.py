"""Checks and figures of attention, small ops and sampling, for `gpu_check`.

Shapes are those of Qwen3-8B: 32 query and 8 kv heads of 128, width 4096, vocabulary 151,936.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from orthrus_kernels.attention import attention
from orthrus_kernels.attention import plain as reference_attention
from orthrus_kernels.attention.finish_qkv import HeadWeights, finish_qkv
from orthrus_kernels.attention.kv_cache import (
    FORMATS,
    Caches,
    KvPlanes,
    cache_entry,
    move_columns,
    new_planes,
)
from orthrus_kernels.elementwise import ops
from orthrus_kernels.elementwise import plain as reference_ops
from orthrus_kernels.elementwise.activation_rows import new_f16_rows, new_int8_rows
from orthrus_kernels.elementwise.rows import AR, COLUMNS, Rows, new_angles, rotary_angles
from orthrus_kernels.sampling import plain as reference_sample
from orthrus_kernels.sampling import sample
from orthrus_kernels.tools.gpu_check_report import Check, Figure, Machine, median_time

N_HEAD, HEADS, HEAD_DIM, WIDTH, VOCAB = 32, 8, 128, 4096, 151_936
EPS = 1e-6

ROW_COUNTS = ((1, 0), (16, 0), (32, 0), (64, 0), (32, 32))
"""Timed: AR rows, and rows of a diffusion block in the same launch."""


def rows_of(count: int, device: str, **columns: Sequence[int]) -> Rows:
    """Rows of a pass; columns that are not given hold zeros. No row has more than one place."""
    given = {name: columns.get(name, [0] * count) for name in COLUMNS}
    table = {
        name: torch.tensor(column, dtype=torch.int32, device=device)
        for name, column in given.items()
    }
    more = torch.zeros(1, dtype=torch.int32, device=device)
    cos, sin = new_angles(count, HEAD_DIM, device)
    return Rows(**table, more=more, cos=cos, sin=sin)


def caches_of(planes: Sequence[tuple[KvPlanes, KvPlanes]], anchor: Tensor) -> Caches:
    """Caches of one layer each."""
    keys, values = planes[0]
    entries = torch.tensor([cache_entry(*pair, anchor) for pair in planes], device=anchor.device)
    names = keys.type_name, values.type_name
    return Caches(*names, keys.heads, keys.head_dim, anchor, entries, list(planes))


@dataclasses.dataclass(frozen=True)
class Pass:
    """What attention needs to know about the rows of one pass of one layer. runs: by default one
    of all rows, of the first sequence."""

    q: Tensor
    planes: tuple[tuple[KvPlanes, KvPlanes], ...]
    block_keys: KvPlanes
    block_values: KvPlanes
    visible: tuple[int, ...]
    block_first: tuple[int, ...]
    block_stop: tuple[int, ...]
    runs: tuple[attention.Run, ...] = ()

    @property
    def heads(self) -> int:
        return self.block_keys.heads

    def arguments(self) -> list[Any]:
        """The arguments of `attention` before its scratch."""
        count, n_head, head_dim = self.q.shape
        device = str(self.q.device)
        anchor = torch.zeros(256, dtype=torch.uint8, device=device)
        runs = self.runs or (attention.Run(0, count, 0),)
        entries = attention.tile_entries(runs, n_head // self.heads, head_dim)
        table = torch.tensor(entries, dtype=torch.int32, device=device)
        rows = rows_of(
            count,
            device,
            visible=self.visible,
            block_first=self.block_first,
            block_stop=self.block_stop,
        )
        tiles = attention.Tiles(table, ((0, count, 0, len(entries)),))
        caches = caches_of(self.planes, anchor)
        return [self.q, caches, 0, self.block_keys, self.block_values, rows, tiles]

    def run(self, kernel: Callable[..., None], out: Tensor | None = None) -> Tensor:
        """f16 rows in the order of the products (or what `out` holds)."""
        rows, n_head, head_dim = self.q.shape
        device = self.q.device
        if out is None:
            out = new_f16_rows(rows, n_head * head_dim, device)
        scratch = attention.new_attention_scratch(64, n_head, self.heads, head_dim, device)
        scratch.sums.fill_(float("nan"))
        scratch.stats.fill_(float("nan"))
        kernel(*self.arguments(), scratch, out)
        return out

    def first_rows(self, count: int, capacity: int) -> Pass:
        """The same first rows in a smaller pass, the cache copied into another capacity."""
        caches = []
        for planes in self.planes[0]:
            roomy = new_planes(
                planes.type_name, planes.heads, capacity, planes.head_dim, self.q.device, 1
            )
            held = min(capacity, planes.capacity)
            roomy.values[:, :, :held] = planes.values[:, :, :held]
            if planes.type_name != "f16":
                roomy.scales[:, :, :held] = planes.scales[:, :, :held]
            caches.append(roomy)
        return dataclasses.replace(
            self,
            q=self.q[:count].contiguous(),
            planes=((caches[0], caches[1]),),
            visible=self.visible[:count],
            block_first=(0,) * count,
            block_stop=(0,) * count,
        )


def random_planes(
    type_name: str, heads: int, capacity: int, device: str, layers: int | None = None
) -> KvPlanes:
    """Numbers of about unit size."""
    planes = new_planes(type_name, heads, capacity, HEAD_DIM, device, layers)
    if type_name == "f16":
        planes.values.normal_()
    else:
        planes.values.random_(0, 256)
        planes.scales.uniform_(0.005, 0.015) if type_name == "q8_0" else planes.scales.fill_(0.2)
    return planes


def verify_and_draft(
    machine: Machine, type_name: str, context: int, ar_rows: int, block_rows: int
) -> Pass:
    """AR rows after `context` tokens and one block that guesses that two drafts hold."""
    rows, group = ar_rows + block_rows, N_HEAD // HEADS
    heads = 1 if machine.tiny else HEADS
    device = machine.device
    keys, values = (random_planes(type_name, heads, context + ar_rows, device, 1) for _ in "kv")
    block_keys, block_values = (random_planes("f16", heads, rows, device) for _ in "kv")
    q = torch.randn(rows, heads * group, HEAD_DIM, device=device).half()
    visible = [context + 1 + i for i in range(ar_rows)]
    visible += [context + min(2, ar_rows)] * block_rows
    first = [0] * ar_rows + [ar_rows] * block_rows
    stop = [0] * ar_rows + [rows] * block_rows
    return Pass(
        q, ((keys, values),), block_keys, block_values, tuple(visible), tuple(first), tuple(stop)
    )


def checks(machine: Machine) -> Iterator[Check]:
    """Every property that the text of an answer rests on."""
    torch.manual_seed(0)
    for type_name in FORMATS:
        contexts = (37, 300) if machine.tiny else (0, 255, 511, 512, 513, 4095, 4097, 30_000)
        for context in contexts:
            ar_rows, block_rows = (2, 2) if machine.tiny else (33, 31)
            case = verify_and_draft(machine, type_name, context, ar_rows, block_rows)
            yield attention_error(case, f"attention {type_name}, context {context}")
            if machine.device != "cpu":  # the interpreter's BLAS is not row-invariant
                yield attention_rows(case, f"attention {type_name}, context {context}: rows")
                yield attention_company(case, f"attention {type_name}, context {context}: company")
        yield move_check(machine, type_name)
    yield from norm_checks(machine)
    yield from rope_checks(machine)
    yield from sampling_checks(machine)


def attention_error(case: Pass, name: str) -> Check:
    """Error against float64 on the device."""
    found = case.run(attention.attention)
    wanted = case.run(reference_attention.attention, torch.zeros_like(found, dtype=torch.float64))
    error = float((found.double() - wanted).pow(2).sum() / wanted.pow(2).sum())
    return Check(name, error <= 1e-6, f"NMSE {error:.1e}")


def attention_rows(case: Pass, name: str) -> Check:
    """AR rows bit for bit: 1, 2, 5, 16, 32, 33 rows, another capacity, no block beside them."""
    together = case.run(attention.attention)
    capacity = case.planes[0][0].capacity + 1000
    counts = (1, 2, 5, 16, 32, 33)
    wrong = [
        count
        for count in counts
        if not torch.equal(
            case.first_rows(count, capacity).run(attention.attention), together[:count]
        )
    ]
    return Check(name, not wrong, f"rows {wrong} differ" if wrong else "bits equal")


def attention_company(case: Pass, name: str) -> Check:
    """Bits of rows beside those of another sequence, and of a branch of a tree whose keys lie
    elsewhere, against the rows alone."""
    count = 5
    alone = case.first_rows(count, case.planes[0][0].capacity)
    other = case.first_rows(count, case.planes[0][0].capacity + 77)
    edge = max(0, case.visible[0] - 20)
    last = case.visible[count - 1]
    branch = case.first_rows(count, last + 200)
    place = last + 100
    for planes in branch.planes[0]:
        for plane in (planes.values, planes.scales)[: 1 if planes.type_name == "f16" else 2]:
            plane[:, :, place : place + last - edge] = plane[:, :, edge:last].clone()
            plane[:, :, edge:last] = 0
    joined = Pass(
        torch.cat([other.q, alone.q, branch.q]),
        (*other.planes, *alone.planes, *branch.planes),
        case.block_keys,
        case.block_values,
        other.visible + alone.visible + branch.visible,
        (0,) * 3 * count,
        (0,) * 3 * count,
        (
            attention.Run(0, count, 0),
            attention.Run(count, count, 1),
            attention.Run(2 * count, count, 2, edge, place - edge),
        ),
    )
    expected = alone.run(attention.attention)
    found = joined.run(attention.attention).view(3, count, -1)
    wrong = [part for part in range(3) if not torch.equal(found[part], expected)]
    return Check(name, not wrong, f"parts {wrong} differ" if wrong else "bits equal")


def move_check(machine: Machine, type_name: str) -> Check:
    """Columns of a committed path go where they belong, in every layer."""
    heads, layers = (1, 2) if machine.tiny else (HEADS, 5)
    pair = [random_planes(type_name, heads, 40, machine.device, layers) for _ in "kv"]
    copies = [planes.values.clone() for planes in pair]
    anchor = torch.zeros(256, dtype=torch.uint8, device=machine.device)
    caches = caches_of([(pair[0], pair[1])], anchor)
    moves = torch.tensor(
        [[0, 30, 3], [-1, 0, 0], [0, 35, 4]], dtype=torch.int32, device=machine.device
    )
    move_columns(caches, moves, layers)
    for copy in copies:
        copy[:, :, [3, 4]] = copy[:, :, [30, 35]]
    same = all(torch.equal(p.values, copy) for p, copy in zip(pair, copies, strict=True))
    return Check(f"moved columns, {type_name}", same)


def norm_checks(machine: Machine) -> Iterator[Check]:
    """residual_norm and finish_qkv: close to float64, and a row alone equals the row in company."""
    device, rows, n = machine.device, 64, 256 if machine.tiny else WIDTH
    partials = torch.randn(4, rows, n, device=device)
    x, weight = torch.randn(rows, n, device=device), torch.randn(n, device=device)
    whole, exact = x.clone(), x.clone()
    out, wanted = new_f16_rows(rows, n, device), new_f16_rows(rows, n, device)
    ops.residual_norm(partials, whole, weight, EPS, out)
    reference_ops.residual_norm(partials, exact, weight, EPS, wanted)
    close = torch.allclose(out.float(), wanted.float(), rtol=2e-3, atol=1e-5)
    yield Check("residual_norm", close)
    yield Check("residual_norm: rows", norm_rows_equal(partials, x, weight, out, whole))

    heads, n_head = (1, 2) if machine.tiny else (HEADS, N_HEAD)
    columns = (n_head + 2 * heads) * HEAD_DIM
    norms, biases = torch.randn(2, 2, HEAD_DIM, device=device), torch.randn(2, columns).to(device)
    products = torch.randn(2, rows, columns, device=device)
    kinds = {
        "norms": HeadWeights(norms, None, False, EPS),
        "biases, adjacent pairs": HeadWeights(None, biases, True, EPS),
    }
    anchor = torch.zeros(256, dtype=torch.uint8, device=device)
    for name, weights in kinds.items():
        results = []
        for count in (rows, 1):
            plan = ar_rows_at(count, 5, device)
            q = torch.zeros(count, n_head, HEAD_DIM, dtype=torch.float16, device=device)
            keys, values = (random_planes("q8_0", heads, 100, device, 1) for _ in "kv")
            block_keys, block_values = (random_planes("f16", heads, count, device) for _ in "kv")
            given = products[:, :count].contiguous()
            caches = caches_of([(keys, values)], anchor)
            finish_qkv(given, weights, plan, q, caches, 0, block_keys, block_values)
            both = (keys, values)
            results.append(
                (q[0], *(p.values[0, :, 5] for p in both), *(p.scales[0, :, 5] for p in both))
            )
        same = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        yield Check(f"finish_qkv q8_0, {name}: rows", same)


def norm_rows_equal(
    partials: Tensor, x: Tensor, weight: Tensor, out: Tensor, whole: Tensor
) -> bool:
    """Whether 1, 2, 7 and 33 rows give the bits of 64, in f16 and in int8."""
    n = x.shape[1]
    whole8 = new_int8_rows(x.shape[0], n, x.device)
    ops.residual_norm(partials, x.clone(), weight, EPS, whole8)
    for count in (1, 2, 7, 33):
        given = partials[:, :count].contiguous()
        part, part8 = new_f16_rows(count, n, x.device), new_int8_rows(count, n, x.device)
        residual = x[:count].clone()
        ops.residual_norm(given, residual, weight, EPS, part)
        ops.residual_norm(given, x[:count].clone(), weight, EPS, part8)
        same = torch.equal(part, out[:count]) and torch.equal(residual, whole[:count])
        if not same or not torch.equal(part8.quants, whole8.quants[:count]):
            return False
    return True


def ar_rows_at(count: int, position: int, device: str) -> Rows:
    """`count` AR rows from `position`, the rotary base that of Qwen3."""
    places = list(range(position, position + count))
    rows = rows_of(count, device, views=[AR] * count, positions=places, places=places)
    pairs = torch.arange(HEAD_DIM // 2, dtype=torch.float64, device=device)
    rotary_angles(rows, 1e6 ** (-2 * pairs / HEAD_DIM), 1.0)
    return rows


def rope_checks(machine: Machine) -> Iterator[Check]:
    """Angles at positions of a 256k context against double precision on the host."""
    for position in (0, 4095, 262_143):
        rows = ar_rows_at(2, position, machine.device)
        pairs = torch.arange(HEAD_DIM // 2, dtype=torch.float64)
        angles = 1e6 ** (-2 * pairs / HEAD_DIM) * (position + 1)
        error = max(
            float((rows.cos[1].cpu() - angles.cos()).abs().max()),
            float((rows.sin[1].cpu() - angles.sin()).abs().max()),
        )
        yield Check(f"rotary angles at {position}", error < 1.2e-7, f"{error:.1e}")


SAMPLERS: dict[str, dict[str, Any]] = {
    "defaults": {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05},
    "top-p of all": {"temperature": 1.0, "top_p": 0.95},
    "penalties": {"temperature": 0.7, "top_k": 20, "repeat_penalty": 1.2},
    "greedy": {"temperature": 0.0},
}


def draws(names: Sequence[str], n_vocab: int, device: str) -> tuple[sample.Draws, sample.DrawKind]:
    """Rows of SAMPLERS, with seeds that use all 64 bits; penalties look at 64 tokens."""
    settings = [dict(SAMPLERS[name]) for name in names]
    top_k = [s.pop("top_k", 0) for s in settings]
    modes = [
        sample.row_mode(s["temperature"], k, n_vocab) for s, k in zip(settings, top_k, strict=True)
    ]
    numbers = [sample.row_numbers(**s) for s in settings]
    seed = sample.signed(2**64 - 12345)
    integers = [(seed, sample.kept_tokens(k, n_vocab)) for k in top_k]
    windows = torch.randint(0, 300, (64 + len(names),), generator=torch.Generator().manual_seed(5))
    spans = [(i, i + 64 if "repeat_penalty" in s else i) for i, s in enumerate(settings)]

    def tensor(values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.as_tensor(values, dtype=dtype).to(device)

    found = sample.Draws(
        tensor(modes),
        tensor([100 + i for i in range(len(names))]),
        tensor(numbers, torch.float64),
        tensor(integers, torch.int64),
        tensor(windows),
        tensor([first for first, _ in spans]),
        tensor([stop for _, stop in spans]),
        tensor([(i, 7) for i in range(len(names))]),
        tensor([[-1] * -(-n_vocab // 32)] * len(names)),
    )
    penalizes = any("repeat_penalty" in s for s in settings)
    kind = sample.DrawKind(
        greedy=sample.GREEDY in modes,
        extracted=sample.EXTRACTED in modes,
        sorted=sample.SORTED in modes,
        penalizes=penalizes,
    )
    return found, kind


def sampling_checks(machine: Machine) -> Iterator[Check]:
    """The tokens of the torch reference on the host, which draws the CPU sampler's tokens; of each
    sampler alone, and of all of them in one pass, with all that can be asked."""
    rows, n_vocab = (4, 300) if machine.tiny else (64, VOCAB)
    every = [name for name in SAMPLERS for _ in range(rows // len(SAMPLERS))]
    cases: dict[str, tuple[list[str], dict[str, Any]]] = {
        name: ([name] * rows, {}) for name in SAMPLERS
    }
    more = {"bans": True, "masked": True, "detail": True, "top": 5}
    cases["all at once"] = (every, more)
    for label, (names, asked) in cases.items():
        logits = torch.randn(rows, n_vocab, device=machine.device) * 3
        scores = logits.cpu().clone()
        results = []
        for device, given, draw in (
            (machine.device, logits, sample.draw),
            ("cpu", scores, reference_sample.draw),
        ):
            found, kind = draws(names, n_vocab, device)
            kind = dataclasses.replace(kind, **asked)
            scratch = sample.new_sample_scratch(rows, n_vocab, device)
            out = torch.zeros(rows, kind.columns, dtype=torch.int32, device=device)
            draw(given, found, kind, scratch, out)
            results.append(out.cpu())
        wrong = int((results[0][:, :2] != results[1][:, :2]).any(1).sum())
        yield Check(f"sampling, {label}", wrong == 0, f"{wrong} of {rows} rows differ")


def figures(machine: Machine) -> Iterator[Figure]:
    """Times of one layer's attention, of the small ops and of sampling."""
    contexts = (37,) if machine.tiny else (512, 2048, 8192, 32_768, 65_536)
    for type_name in FORMATS:
        for context in contexts:
            for ar_rows, block_rows in ((1, 0), (2, 2)) if machine.tiny else ROW_COUNTS:
                case = verify_and_draft(machine, type_name, context, ar_rows, block_rows)
                rows = f"{ar_rows} rows" + (f" and a block of {block_rows}" if block_rows else "")
                yield attention_figure(machine, case, f"{type_name}, {context}, {rows}")
    yield from small_figures(machine)


def attention_figure(machine: Machine, case: Pass, name: str) -> Figure:
    """Microseconds, beside the bytes of the cache at the copy ceiling."""
    rows = case.q.shape[0]
    n_head, heads = case.q.shape[1], case.heads
    out = new_f16_rows(rows, n_head * HEAD_DIM, machine.device)
    scratch = attention.new_attention_scratch(64, n_head, heads, HEAD_DIM, machine.device)
    kernel: Callable[..., None] = attention.attention
    arguments = case.arguments()
    micros = median_time(lambda: kernel(*arguments, scratch, out)) * 1e3
    size = sum(
        t.numel() * t.element_size()
        for planes in case.planes[0]
        for t in (planes.values, planes.scales)
    )
    speed = machine.copy_bytes_per_second
    floor = f"cache alone {size / speed * 1e6:.1f} us" if speed else ""
    return Figure(f"attention {name}", micros, "us", floor)


def small_figures(machine: Machine) -> Iterator[Figure]:
    """The launches between the products, at 1 and 32 rows."""
    device = machine.device
    width, n_vocab = (256, 300) if machine.tiny else (WIDTH, VOCAB)
    for rows in (1, 2) if machine.tiny else (1, 32):
        partials = torch.randn(4, rows, width, device=device)
        x, weight = torch.randn(rows, width, device=device), torch.ones(width, device=device)
        out = new_f16_rows(rows, width, device)
        time = median_time(lambda: ops.residual_norm(partials, x, weight, EPS, out))  # noqa: B023
        yield Figure(f"residual_norm, {rows} rows", time * 1e3, "us")
        for name in SAMPLERS:
            micros = sampling_time(name, rows, n_vocab, device)
            yield Figure(f"sampling {name}, {rows} rows", micros, "us")


def sampling_time(name: str, rows: int, n_vocab: int, device: str) -> float:
    """Microseconds for `rows` rows of a vocabulary."""
    logits = torch.randn(rows, n_vocab, device=device) * 3
    found, kind = draws([name] * rows, n_vocab, device)
    scratch = sample.new_sample_scratch(rows, n_vocab, device)
    out = torch.zeros(rows, kind.columns, dtype=torch.int32, device=device)
    return 1e3 * median_time(lambda: sample.draw(logits, found, kind, scratch, out))
