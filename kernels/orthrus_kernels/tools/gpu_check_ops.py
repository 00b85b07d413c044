"""Checks and figures of attention, small ops, sampling and commit, for `gpu_check`.

Shapes are those of Qwen3-8B: 32 query and 8 kv heads of 128, width 4096, vocabulary 151,936.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from orthrus_kernels.attention import attention
from orthrus_kernels.attention import plain as reference_attention
from orthrus_kernels.attention.kv_cache import FORMATS, KvPlanes, new_planes
from orthrus_kernels.elementwise import ops
from orthrus_kernels.elementwise import plain as reference_ops
from orthrus_kernels.elementwise import rows as planning
from orthrus_kernels.elementwise.activation_rows import new_f16_rows, new_int8_rows
from orthrus_kernels.sampling import accept as commit
from orthrus_kernels.sampling import plain as reference_sample
from orthrus_kernels.sampling import sample
from orthrus_kernels.tools.gpu_check_report import Check, Figure, Machine, median_time

N_HEAD, HEADS, HEAD_DIM, WIDTH, VOCAB = 32, 8, 128, 4096, 151_936
EPS = 1e-6

ROW_COUNTS = ((1, 0), (16, 0), (32, 0), (64, 0), (32, 32))
"""Timed: AR rows, and rows of a diffusion block in the same launch."""


@dataclasses.dataclass(frozen=True)
class Pass:
    """What attention needs to know about the rows of one pass of one layer."""

    q: Tensor
    keys: KvPlanes
    values: KvPlanes
    block_keys: KvPlanes
    block_values: KvPlanes
    visible: Tensor
    block_first: Tensor
    block_stop: Tensor

    def fields(self) -> list[Any]:
        """The arguments of `attention` before its scratch."""
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    def run(self, kernel: Callable[..., None], out: Tensor | None = None) -> Tensor:
        """f16 rows in the order of the products (or what `out` holds)."""
        rows, n_head, head_dim = self.q.shape
        device = self.q.device
        if out is None:
            out = new_f16_rows(rows, n_head * head_dim, device)
        scratch = attention.new_attention_scratch(64, n_head, self.keys.heads, head_dim, device)
        scratch.sums.fill_(float("nan"))
        scratch.stats.fill_(float("nan"))
        kernel(*self.fields(), scratch, out)
        return out

    def first_rows(self, count: int, capacity: int) -> Pass:
        """The same first rows in a smaller pass, the cache copied into another capacity."""
        caches = []
        for planes in (self.keys, self.values):
            roomy = new_planes(
                planes.type_name, planes.heads, capacity, planes.head_dim, self.q.device
            )
            held = min(capacity, planes.capacity)
            roomy.values[:, :held] = planes.values[:, :held]
            if planes.type_name != "f16":
                roomy.scales[:, :held] = planes.scales[:, :held]
            caches.append(roomy)
        part = slice(0, count)
        return dataclasses.replace(
            self,
            q=self.q[part].contiguous(),
            keys=caches[0],
            values=caches[1],
            visible=self.visible[part].contiguous(),
            block_first=torch.zeros_like(self.block_first[part]),
            block_stop=torch.zeros_like(self.block_stop[part]),
        )


def random_planes(type_name: str, heads: int, capacity: int, device: str) -> KvPlanes:
    """Numbers of about unit size."""
    planes = new_planes(type_name, heads, capacity, HEAD_DIM, device)
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
    keys, values = (random_planes(type_name, heads, context + ar_rows, device) for _ in "kv")
    block_keys, block_values = (random_planes("f16", heads, rows, device) for _ in "kv")
    q = torch.randn(rows, heads * group, HEAD_DIM, device=device).half()
    sees = [context + 1 + i for i in range(ar_rows)] + [context + min(2, ar_rows)] * block_rows
    columns = [sees, [0] * ar_rows + [ar_rows] * block_rows, [0] * ar_rows + [rows] * block_rows]
    visible, first, stop = (torch.tensor(c, dtype=torch.int32, device=device) for c in columns)
    return Pass(q, keys, values, block_keys, block_values, visible, first, stop)


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
    yield from norm_checks(machine)
    yield from rope_checks(machine)
    yield from sampling_checks(machine)
    yield commit_check(machine)


def attention_error(case: Pass, name: str) -> Check:
    """Error against float64 on the device."""
    found = case.run(attention.attention)
    wanted = case.run(reference_attention.attention, torch.zeros_like(found, dtype=torch.float64))
    error = float((found.double() - wanted).pow(2).sum() / wanted.pow(2).sum())
    return Check(name, error <= 1e-6, f"NMSE {error:.1e}")


def attention_rows(case: Pass, name: str) -> Check:
    """AR rows bit for bit: 1, 2, 5, 16, 32, 33 rows, another capacity, no block beside them."""
    together = case.run(attention.attention)
    capacity = case.keys.capacity + 1000
    counts = (1, 2, 5, 16, 32, 33)
    wrong = [
        count
        for count in counts
        if not torch.equal(
            case.first_rows(count, capacity).run(attention.attention), together[:count]
        )
    ]
    return Check(name, not wrong, f"rows {wrong} differ" if wrong else "bits equal")


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
    norms = torch.randn(2, 2, HEAD_DIM, device=device)
    products = torch.randn(2, rows, (n_head + 2 * heads) * HEAD_DIM, device=device)
    results = []
    for count in (rows, 1):
        plan = ar_rows_at(count, 5, device)
        q = torch.zeros(count, n_head, HEAD_DIM, dtype=torch.float16, device=device)
        planes = [random_planes("q8_0", heads, 100, device) for _ in "kv"]
        blocks = [random_planes("f16", heads, count, device) for _ in "kv"]
        given = products[:, :count].contiguous()
        ops.finish_qkv(given, norms, EPS, plan, q, *planes, *blocks)
        results.append((q[0], *(p.values[:, 5] for p in planes), *(p.scales[:, 5] for p in planes)))
    same = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    yield Check("finish_qkv q8_0: rows", same)


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


def ar_rows_at(count: int, position: int, device: str) -> planning.Rows:
    """A plan of `count` AR rows from `position`, the rotary base that of Qwen3."""
    state = torch.zeros(planning.STATE_SIZE, dtype=torch.int32, device=device)
    state[planning.POSITION] = position
    history = torch.zeros(position + count + 1, dtype=torch.int32, device=device)
    segments = torch.tensor([[planning.AR, 0, count, 0, -1]], dtype=torch.int32, device=device)
    pairs = torch.arange(HEAD_DIM // 2, dtype=torch.float64, device=device)
    inv_freq = 1e6 ** (-2 * pairs / HEAD_DIM)
    rows = planning.new_rows(count, HEAD_DIM, device)
    planning.plan_rows(state, history, segments, history, 0, position + count, inv_freq, 1.0, rows)
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
    "penalties": {"temperature": 0.7, "top_k": 20, "repeat_penalty": 1.2, "repeat_last_n": 64},
    "greedy": {"temperature": 0.0},
}


def sampler(name: str, n_vocab: int, device: str) -> sample.SamplingParameters:
    """One of SAMPLERS, with a seed that uses all 64 bits."""
    return sample.sampling_parameters(n_vocab, device, seed=2**64 - 12345, **SAMPLERS[name])


def sampling_problem(rows: int, n_vocab: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, positions, history."""
    logits = torch.randn(rows, n_vocab, device=device) * 3
    positions = torch.arange(rows, dtype=torch.int32, device=device) + 100
    history = torch.randint(0, 300, (1000,), dtype=torch.int32, device=device)
    return logits, positions, history


def sampling_checks(machine: Machine) -> Iterator[Check]:
    """The tokens of the torch reference on the host, which draws the CPU sampler's tokens."""
    rows, n_vocab = (4, 300) if machine.tiny else (64, VOCAB)
    scratch = sample.new_sample_scratch(rows, n_vocab, machine.device)
    for name in SAMPLERS:
        logits, positions, history = sampling_problem(rows, n_vocab, machine.device)
        at, before = positions.cpu(), history.cpu()
        scores = logits.cpu().clone()
        out = torch.zeros(rows, dtype=torch.int32, device=machine.device)
        sample.sample(
            logits, positions, history, sampler(name, n_vocab, machine.device), scratch, out
        )
        wanted = torch.zeros(rows, dtype=torch.int32)
        parameters = sampler(name, n_vocab, "cpu")
        reference_sample.sample(scores, at, before, parameters, scratch, wanted)
        wrong = int((out.cpu() != wanted).sum())
        yield Check(f"sampling, {name}", wrong == 0, f"{wrong} of {rows} tokens differ")


def commit_check(machine: Machine) -> Check:
    """Twenty random cycles, state and all, against the reference."""
    device = machine.device
    kernel, plain = ([t.to(device) for t in commit_state()] for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    same = True
    for _ in range(20):
        drawn = torch.randint(0, 3, (8,), dtype=torch.int32, generator=generator).to(device)
        for (segments, history, *rest), run in (
            (kernel, commit.accept),
            (plain, reference_sample.accept),
        ):
            position = int(rest[1][planning.POSITION])
            history[position + 1 : position + 8] = 1
            run(drawn, segments, history, *rest)
        same = same and all(torch.equal(a, b) for a, b in zip(kernel, plain, strict=True))
    return Check("accept", same)


def commit_state() -> list[Tensor]:
    """Segments, history, stop tokens, state, ring, log of a request."""
    segments = torch.tensor([[planning.AR, 0, 8, 0, -1]], dtype=torch.int32)
    state = torch.zeros(planning.STATE_SIZE, dtype=torch.int32)
    state[planning.LIMIT] = 30
    history, ring = torch.zeros(300, dtype=torch.int32), torch.zeros(16, dtype=torch.int32)
    return [segments, history, torch.tensor([9], dtype=torch.int32), state, ring,
            commit.new_log(8, "cpu")]  # fmt: skip


def figures(machine: Machine) -> Iterator[Figure]:
    """Times of one layer's attention, of the small ops, of sampling and of a commit."""
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
    n_head, heads = case.q.shape[1], case.keys.heads
    out = new_f16_rows(rows, n_head * HEAD_DIM, machine.device)
    scratch = attention.new_attention_scratch(64, n_head, heads, HEAD_DIM, machine.device)
    kernel: Callable[..., None] = attention.attention
    micros = median_time(lambda: kernel(*case.fields(), scratch, out)) * 1e3
    size = sum(
        t.numel() * t.element_size()
        for planes in (case.keys, case.values)
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
    state = [t.to(device) for t in commit_state()]
    drawn = torch.zeros(8, dtype=torch.int32, device=device)
    yield Figure("accept", median_time(lambda: commit.accept(drawn, *state)) * 1e3, "us")


def sampling_time(name: str, rows: int, n_vocab: int, device: str) -> float:
    """Microseconds for `rows` rows of a vocabulary."""
    logits, positions, history = sampling_problem(rows, n_vocab, device)
    parameters = sampler(name, n_vocab, device)
    scratch = sample.new_sample_scratch(rows, n_vocab, device)
    out = torch.zeros(rows, dtype=torch.int32, device=device)
    return 1e3 * median_time(
        lambda: sample.sample(logits, positions, history, parameters, scratch, out)
    )
