"""A pass as a list of steps for the kernels' thread pool."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Sequence
from dataclasses import field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from orthrus_cpu_kernels import library as k
from orthrus_cpu_kernels.library import LANES, Kernels, Matrix, Step

from orthrus_gguf.model.architectures import Pairing
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.records import dataclass
from orthrus_gguf.runtime.cpu.buffers import Buffers
from orthrus_gguf.runtime.cpu.state import tile_columns
from orthrus_gguf.runtime.cpu.weights import Attention, Floats, Layer, Weights
from orthrus_gguf.runtime.protocol import View


@dataclass(frozen=True, eq=False)
class Watch:
    """Attention of the last rows of a pass that is asked for, in these layers.

    weights: where it is brought into, [n_head_kv, rows, columns in whole panels].
    """

    layers: tuple[int, ...]
    weights: Floats


@dataclass(frozen=True)
class Shape:
    """What passes have in common that can use the same steps.

    ar_rows, diffusion_rows: rows by view. wanted: rows that the head is for. groups: of rows that
    attend together. taps: layers whose input is kept. runs: by view, how many go through a
    DeltaNet layer, the AR rows of a sequence or the rows of a block together. layers: that run,
    unless all do. blocks: of columns that attention takes at most, if it is to be sparse. watch:
    what the attention of the last rows is asked of.
    """

    ar_rows: int
    diffusion_rows: int
    wanted: int
    groups: int
    taps: tuple[int, ...] = ()
    runs: tuple[int, int] = (0, 0)
    layers: int | None = None
    blocks: int = 0
    watch: Watch | None = None

    @property
    def rows(self) -> int:
        return self.ar_rows + self.diffusion_rows

    def views(self) -> list[tuple[View, int, int]]:
        """(view, first row, rows) of the views present."""
        ar, diffusion = self.ar_rows, self.diffusion_rows
        views = [(View.AR, 0, ar), (View.DIFFUSION, ar, diffusion)]
        return [view for view in views if view[2]]


@dataclass
class Builder:
    """Puts the steps of one shape of pass together."""

    kernels: Kernels
    config: ModelConfig
    weights: Weights
    buffers: Buffers
    shape: Shape
    steps: list[Step] = field(default_factory=list)

    def build(self) -> ctypes.Array[Step]:
        """The rows of tokens through the model."""
        self.embed()
        return self.through()

    def embed(self) -> None:
        """Begin with the tokens' embeddings."""
        b, matrices = self.buffers, [self.weights.token_embd]
        self.add(k.EMBED, self.shape.rows, matrices=matrices, y=b.x, row=b.row.ctypes.data)

    def through(self) -> ctypes.Array[Step]:
        """All layers; the head where rows are wanted."""
        b, shape, config = self.buffers, self.shape, self.config
        last = (shape.layers or config.n_layers) - 1
        whole = any(tap > last for tap in shape.taps)  # rows that nobody wants are looked at
        x, rows = b.x, shape.rows
        for index, layer in enumerate(self.weights.layers[: last + 1]):
            if index in shape.taps:
                self._keep(b.tap(index), b.x)
            # Behind the last layer's keys and values, only rows that somebody asks about count.
            stop = index == last and not shape.wanted and not whole
            if layer.attention:
                self._attend(layer, index, store_only=stop)
            else:
                self._remember(layer, store_only=stop)
            if stop:
                return k.steps_array(self.steps)
            if index == last and shape.wanted < shape.rows and not whole:
                self.add(
                    k.PICK, shape.wanted, x=b.x, y=b.picked, width=config.n_embd,
                    index=b.index.ctypes.data,
                )  # fmt: skip
                x, rows = b.picked, shape.wanted
            self._mlp(layer, x, rows)
        if config.n_layers in shape.taps:
            self._keep(b.tap(config.n_layers), b.x)
        if config.n_layers + 1 in shape.taps:
            self.norm(x, rows, self.weights.output_norm, [])
            self._keep(b.tap(config.n_layers + 1), b.normed)
        if whole:
            self.add(
                k.PICK, shape.wanted, x=b.x, y=b.picked, width=config.n_embd,
                index=b.index.ctypes.data,
            )  # fmt: skip
            x, rows = b.picked, shape.wanted
        if rows:
            forms = self.norm(x, rows, self.weights.output_norm, [self.weights.output])
            self.products(forms, [(self.weights.output, None)], 0, rows, b.logits)
        return k.steps_array(self.steps)

    def _attend(self, layer: Layer, index: int, *, store_only: bool) -> None:
        b, shape, c = self.buffers, self.shape, self.config
        used = [layer.attention[view] for view, _, _ in shape.views()]
        forms = self.norm(
            b.x,
            shape.rows,
            layer.attn_norm,
            [m for a in used for m in (a.q, a.k, a.v, a.gate) if m],
        )
        for view, first, rows in shape.views():
            a = layer.attention[view]
            matrices = [(a.q, a.biases[0]), (a.k, a.biases[1]), (a.v, a.biases[2])]
            matrices += [(a.gate, None)] if a.gate else []
            self.products(forms, matrices, first, rows, b.qkv)
            self.heads(a, layer.place, first, rows)
        if shape.watch is not None and index in shape.watch.layers:
            self._weigh(shape.watch.weights, layer.place)
        if store_only:
            return
        self.add(
            k.ATTENTION, shape.groups * c.n_head_kv, x=b.qkv, y=b.mixed, groups=shape.groups,
            row=self.sight(layer).ctypes.data, cache=b.caches[layer.place].ctypes.data,
            group=b.group.ctypes.data, scale=1 / math.sqrt(c.head_dim), count=shape.blocks,
        )  # fmt: skip
        width = c.n_head * c.head_dim
        if c.architecture.hybrid:
            gates = b.qkv[:, width + 2 * c.n_head_kv * c.head_dim :]
            self.add(k.SIGMOID, shape.rows, x=gates, y=b.mixed, width=width)
        forms = self._quantize(b.mixed, shape.rows, [a.output for a in used])
        for view, first, rows in shape.views():
            output = layer.attention[view].output
            self.products(forms, [(output, None)], first, rows, b.x, add=True)

    def sight(self, layer: Layer) -> NDArray[np.void]:
        """`library.ROW` records: what the rows of the pass see in a layer."""
        return self.buffers.row

    def _weigh(self, weights: Floats, place: int) -> None:
        """What the last rows attend to in a layer."""
        b, (_, rows, _) = self.buffers, weights.shape
        first = self.shape.rows - rows
        self.add(
            k.WEIGHTS, self.config.n_head_kv, x=b.qkv[first:], y=weights[0], rows=rows,
            row=b.row[first:].ctypes.data, cache=b.caches[place].ctypes.data,
            scale=1 / math.sqrt(self.config.head_dim),
        )  # fmt: skip

    def _remember(self, layer: Layer, *, store_only: bool) -> None:
        """What a gated DeltaNet adds to the rows, and does to the state of their sequences."""
        b, hybrid = self.buffers, self.config.hybrid
        assert hybrid is not None
        parts = -(-(2 * hybrid.n_key_heads + hybrid.n_value_heads) // k.HEADS_PER_TASK)
        tables: dict[str, Any] = {
            "state_row": b.state_row.ctypes.data, "state": b.states[layer.place].ctypes.data,
            "n_head": hybrid.n_value_heads, "n_head_kv": hybrid.n_key_heads,
            "head_dim": hybrid.head_dim,
        }  # fmt: skip
        nets = layer.delta_net
        views = [(nets[view], first, rows) for view, first, rows in self.shape.views()]
        inputs = [matrix for w, _, _ in views for matrix in (w.qkv, w.gate, w.alpha, w.beta)]
        forms = self.norm(b.x, self.shape.rows, layer.attn_norm, inputs)
        tiles, run = hybrid.inner // tile_columns(hybrid), 0
        # First AR rows: blocks begin from what these leave behind.
        for (w, first, rows), runs in zip(views, filter(None, self.shape.runs), strict=True):
            matrices = [(matrix, None) for matrix in (w.qkv, w.gate, w.alpha, w.beta)]
            self.products(forms, matrices, first, rows, b.qkv)
            self.add(
                k.CONVOLVE, rows * parts, x=b.qkv, y=b.convolved, weight=_address(w.conv),
                weight_k=_address(w.a), biases=[w.dt], first=first, **tables,
            )  # fmt: skip
            self.add(
                k.RECUR, runs * tiles, x=b.convolved, y=b.mixed, run=b.run[run:].ctypes.data,
                **tables,
            )  # fmt: skip
            run += runs
        for w, first, rows in () if store_only else views:
            form = self._form(w.out)
            q = b.q[form].ctypes.data
            behind = first * self.kernels.row_bytes(form, w.out.k)
            self.add(
                k.GATED_NORM, rows, x=b.qkv[first:, hybrid.channels :], y=b.mixed[first:],
                q=q + behind, form=form, weight=_address(w.norm), epsilon=self.config.rms_eps,
                **tables,
            )  # fmt: skip
            self.products({form: q}, [(w.out, None)], first, rows, b.x, add=True)

    def heads(self, a: Attention, place: int, first: int, rows: int) -> None:
        """Norm and turn the heads of rows; their keys and values into the cache of a layer.

        place: of the layer, among those with attention.
        """
        b, c = self.buffers, self.config
        self.add(
            k.HEADS, rows, y=b.qkv[first:], epsilon=c.rms_eps, width=c.rotary_dim,
            weight=_address(a.q_norm), weight_k=_address(a.k_norm),
            adjacent=c.architecture.pairing is Pairing.ADJACENT,
            row=b.row[first:].ctypes.data, cache=b.caches[place].ctypes.data,
        )  # fmt: skip

    def _mlp(self, layer: Layer, x: Floats, rows: int) -> None:
        b = self.buffers
        forms = self.norm(x, rows, layer.ffn_norm, [layer.gate, layer.up])
        if len(forms) == 1:
            self.add(
                k.GATED, _tasks(layer.gate.panels), q=forms[self._form(layer.gate)], rows=rows,
                y=b.gated, matrices=[layer.gate, layer.up],
            )  # fmt: skip
        else:
            for matrix, y in ((layer.gate, b.gated), (layer.up, b.other)):
                own = {self._form(matrix): forms[self._form(matrix)]}
                self.products(own, [(matrix, None)], 0, rows, y)
            self.add(k.SILU, rows, x=b.other, y=b.gated, width=self.config.n_ff)
        forms = self._quantize(b.gated, rows, [layer.down])
        self.products(forms, [(layer.down, None)], 0, rows, x, add=True)

    def _form(self, matrix: Matrix) -> int:
        form = self.kernels.form(matrix.type)
        assert form is not None
        return form

    def norm(
        self, x: Floats, rows: int, weight: Floats, readers: Sequence[Matrix]
    ) -> dict[int, int]:
        """Norms of rows, in the forms that `readers` take: form → address of the rows."""
        forms = sorted({self._form(matrix) for matrix in readers})
        common: dict[str, Any] = {
            "x": x, "width": self.config.n_embd, "weight": weight.ctypes.data,
            "epsilon": self.config.rms_eps,
        }  # fmt: skip
        if len(forms) == 1:
            (form,) = forms
            self.add(k.NORM, rows, q=self.buffers.q[form].ctypes.data, form=form, **common)
            return {form: self.buffers.q[form].ctypes.data}
        self.add(k.NORM, rows, y=self.buffers.normed, **common)
        return self._quantize(self.buffers.normed, rows, readers, width=self.config.n_embd)

    def _quantize(
        self, x: Floats, rows: int, readers: Sequence[Matrix], *, width: int | None = None
    ) -> dict[int, int]:
        """Rows in the forms that `readers` take: form → address of the rows."""
        found = {}
        for matrix in readers:
            form = self._form(matrix)
            if form not in found:
                found[form] = self.buffers.q[form].ctypes.data
                self.add(k.QUANTIZE, rows, x=x, q=found[form], form=form, width=width or matrix.k)
        return found

    def products(
        self,
        forms: dict[int, int],
        matrices: Sequence[tuple[Matrix, Floats | None]],
        first: int,
        rows: int,
        y: Floats,
        *,
        add: bool = False,
    ) -> None:
        """Rows from `first` on times matrices side by side; one step per form."""
        column = 0
        for form, q in forms.items():
            column, mine = 0, []
            for matrix, bias in matrices:
                if self._form(matrix) == form:
                    mine.append((matrix, bias, column))
                column += matrix.panels * LANES
            # Those that follow one another share a step.
            while mine:
                run = [mine.pop(0)]
                while mine and mine[0][2] == run[-1][2] + run[-1][0].panels * LANES:
                    run.append(mine.pop(0))
                bytes_ = self.kernels.row_bytes(form, run[0][0].k)
                self.add(
                    k.PRODUCT, sum(_tasks(m.panels) for m, _, _ in run), rows=rows, count=len(run),
                    q=q + first * bytes_, y=y[first:, run[0][2] :], add=add,
                    matrices=[m for m, _, _ in run], biases=[bias for _, bias, _ in run],
                )  # fmt: skip

    def _keep(self, to: Floats, x: Floats) -> None:
        """Copy all rows."""
        self.add(
            k.PICK, self.shape.rows, x=x, y=to, width=self.config.n_embd,
            index=_every_row(self.buffers.rows).ctypes.data,
        )  # fmt: skip

    def add(
        self,
        op: int,
        tasks: int,
        *,
        x: Floats | None = None,
        y: Floats | None = None,
        matrices: Sequence[Matrix] = (),
        biases: Iterable[Floats | None] = (),
        **values: Any,
    ) -> None:
        """A step; see `library.Step`."""
        c = self.config
        step = Step(op=op, tasks=tasks)
        step.n_head, step.n_head_kv, step.head_dim = c.n_head, c.n_head_kv, c.head_dim
        if x is not None:
            step.x, step.x_stride = x.ctypes.data, x.strides[0] // 4
        if y is not None:
            step.y, step.y_stride = y.ctypes.data, y.strides[0] // 4
        for i, matrix in enumerate(matrices):
            step.matrix[i] = matrix
        for i, bias in enumerate(biases):
            step.bias[i] = _address(bias)
        for name, value in values.items():
            setattr(step, name, value)
        self.steps.append(step)


_EVERY: dict[int, NDArray[np.int32]] = {}


def _every_row(rows: int) -> NDArray[np.int32]:
    return _EVERY.setdefault(rows, np.arange(rows, dtype=np.int32))


def _address(array: Floats | None) -> int | None:
    return None if array is None else array.ctypes.data


def _tasks(panels: int) -> int:
    return -(-panels // k.PANELS_PER_TASK)
