"""What a pass of a model has to read, multiply and launch, by the shape and the file type."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby

import gguf

from orthrus_gguf.errors import OrthrusError
from orthrus_gguf.model.architectures import LayerKind
from orthrus_gguf.model.config import ModelConfig
from orthrus_gguf.model.mix import Kind, Mix, counted, fitting
from orthrus_gguf.model.tensors import (
    DELTA_NET,
    MTP_PROJECTION,
    OUTPUT,
    TOKEN_EMBD,
    base_tensors,
    diffusion_tensors,
    is_diffusion_tensor,
    twin_of,
)
from orthrus_gguf.runtime.protocol import View

_Type = gguf.GGMLQuantizationType

#: Bits per weight as the kernels hold them (`orthrus_kernels/packing/quant_tensor.py`): codes, one
#: 32-bit word of scales per 64 weights, and for K-quants one of (d, dmin) per 256.
PACKED_BITS = {_Type.Q4_K: 4.625, _Type.Q6_K: 6.625, _Type.Q8_0: 8.5}

#: File type → usual type of its matrices. These have predictions.
FILE_TYPES = {"q4_k_m": _Type.Q4_K, "q6_k": _Type.Q6_K, "q8_0": _Type.Q8_0}

#: Beside products and attention, a layer of attention launches two residuals with their norms, what
#: makes q and the cache's rows of QKV, and what combines attention's lanes;
SMALL_IN_ATTENTION = 4
#: a DeltaNet, beside products and recurrence, a norm behind the attention's place, convolution and
#: gated norm; and a norm before each product with its inputs.
SMALL_IN_DELTA_NET = 3
#: Angles of the rows, embedding, last norm, choice of tokens.
AROUND = 4
#: In an MTP block, norms of embedding and hidden state besides.
SMALL_BEFORE_BLOCK = 2

CACHE_BYTES = 2  # per element: f16


@dataclass(frozen=True)
class Product:
    """A product of a pass. matrices: type and columns of each, neighbours of one type being one.
    k: of all. view: whose rows it multiplies; None: all rows. int8: what the rows are then."""

    matrices: tuple[tuple[Kind, int], ...]
    k: int
    view: View | None
    int8: bool

    @property
    def columns(self) -> int:
        return sum(columns for _, columns in self.matrices)

    @property
    def launches(self) -> int:
        """One for two matrices."""
        return -(-len(self.matrices) // 2)

    @property
    def weights(self) -> list[tuple[Kind, int]]:
        """How many of each type."""
        return [(kind, columns * self.k) for kind, columns in self.matrices]


@dataclass(frozen=True)
class PassShape:
    """A pass. products: how often each runs. attention, recurrences: layers that have one. small:
    kernels in layers that do next to nothing; around: others outside of layers."""

    products: Mapping[Product, int]
    attention: int
    recurrences: int
    small: int
    around: int = AROUND

    def of(self, views: Collection[View]) -> dict[Product, int]:
        """The products of a pass with rows of these views."""
        return {p: n for p, n in self.products.items() if p.view is None or p.view in views}

    def launches(self, views: Collection[View]) -> int:
        """Kernels of a pass with rows of these views."""
        products = sum(count * product.launches for product, count in self.of(views).items())
        return products + self.attention + self.recurrences + self.small + self.around


def pass_shape(config: ModelConfig, file_type: str, int8: Collection[Kind]) -> PassShape:
    """A pass through all layers of a model, with the twins that heads have or would have.
    file_type: of FILE_TYPES. int8: types whose rows are int8 on the card.

    Raises OrthrusError for what has no prediction.
    """
    if config.hybrid is not None and config.has_heads:
        raise OrthrusError(f"{config.name}: no prediction for heads of hybrids")
    table = _Table(config, file_type, int8)
    products: Counter[Product] = Counter()
    small = 0
    for index, kind in enumerate(config.layer_kinds):
        if kind is LayerKind.ATTENTION:
            products.update(table.attention(index))
            small += SMALL_IN_ATTENTION
        else:
            inputs, output = table.delta_net(index)
            products.update([*inputs, output])
            small += SMALL_IN_DELTA_NET + len(inputs)
        products.update(table.mlp(index))
    products[table.head] += 1
    kinds = Counter(config.layer_kinds)
    attention, recurrences = kinds[LayerKind.ATTENTION], kinds[LayerKind.DELTA_NET]
    return PassShape(products, attention, recurrences, small)


def chain_shape(config: ModelConfig, file_type: str, int8: Collection[Kind]) -> PassShape:
    """A token that a hybrid's MTP block drafts: block and head. Arguments, errors: as above."""
    table = _Table(config, file_type, int8)
    index = config.n_layers
    products = Counter([table.projection, *table.attention(index), *table.mlp(index), table.head])
    return PassShape(products, 1, 0, SMALL_IN_ATTENTION + SMALL_BEFORE_BLOCK)


def following_shape(config: ModelConfig, file_type: str, int8: Collection[Kind]) -> PassShape:
    """What an MTP block learns of rows that are committed: their keys and values."""
    table = _Table(config, file_type, int8)
    products = Counter([table.projection, table.keys_values])
    # Behind the two norms of the projection, one; what makes the cache's rows. Then the angles and
    # the embedding.
    return PassShape(products, 0, 0, SMALL_BEFORE_BLOCK + 2, 2)


class _Table:
    """The products of a model by layers, as the runtime forms them (`cuda/weight_plan.py`)."""

    def __init__(self, config: ModelConfig, file_type: str, int8: Collection[Kind]) -> None:
        self._config, self._int8 = config, int8
        self._shapes = all_tensors(config)
        self._types = tensor_types(config, file_type)
        for name in self._types:
            self._check(name, file_type)

    def _check(self, name: str, file_type: str) -> None:
        kind, columns = self._types[name], self._shapes[name][-1]
        looked_up = name == TOKEN_EMBD and not self._config.tied  # a row of it is next to nothing
        if kind not in PACKED_BITS and not looked_up:
            raise OrthrusError(
                f"{self._config.name}, {file_type}: no prediction for {kind.name}, which rows of "
                f"{columns} get; choose another type"
            )

    def attention(self, index: int) -> list[Product]:
        """QKV and output, of each view."""
        return [
            *self._by_view(index, ("attn_q", "attn_k", "attn_v")),
            *self._by_view(index, ("attn_output",)),
        ]

    def delta_net(self, index: int) -> tuple[list[Product], Product]:
        """Products with the inputs, one or two; and with the output."""
        many, few = (
            [f"blk.{index}.{DELTA_NET[part]}" for part in parts]
            for parts in (("qkv", "gate"), ("alpha", "beta"))
        )
        alike = self._is_int8(many) is self._is_int8(few)
        inputs = [self._product([*many, *few])] if alike else list(map(self._product, (many, few)))
        return inputs, self._product([f"blk.{index}.{DELTA_NET['out']}"])

    def mlp(self, index: int) -> list[Product]:
        """Gate and up, which are one product; down."""
        gate_up, down = (("ffn_gate", "ffn_up"), ("ffn_down",))
        return [self._product(_names(index, parts)) for parts in (gate_up, down)]

    @property
    def head(self) -> Product:
        return self._product([TOKEN_EMBD if self._config.tied else OUTPUT])

    @property
    def projection(self) -> Product:
        """What an MTP block makes one vector of two with."""
        return self._product([f"blk.{self._config.n_layers}.{MTP_PROJECTION}"])

    @property
    def keys_values(self) -> Product:
        """Of an MTP block."""
        return self._product(_names(self._config.n_layers, ("attn_k", "attn_v")))

    def _by_view(self, index: int, parts: Iterable[str]) -> list[Product]:
        """Both views read the same rows, and want them in the same form."""
        names = {View.AR: _names(index, parts)}
        twins = [twin_of(name) for name in names[View.AR]]
        if all(twin in self._types for twin in twins):
            names[View.DIFFUSION] = twins
        int8 = self._is_int8([name for some in names.values() for name in some])
        return [self._product(some, view, int8) for view, some in names.items()]

    def _is_int8(self, names: Iterable[str]) -> bool:
        """One matrix whose rows are fp16 takes the others with it."""
        return all(self._types[name] in self._int8 for name in names)

    def _product(
        self, names: Iterable[str], view: View | None = None, int8: bool | None = None
    ) -> Product:
        names = list(names)
        matrices = tuple(
            (kind, sum(self._shapes[name][0] for name in group))
            for kind, group in groupby(names, key=self._types.__getitem__)
        )
        own = self._is_int8(names) if int8 is None else int8
        return Product(matrices, self._shapes[names[0]][1], view, own)


def _names(index: int, parts: Iterable[str]) -> list[str]:
    return [f"blk.{index}.{part}.weight" for part in parts]


def all_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all tensors of a model, with the heads that it has or would have; hybrids
    without."""
    twins = {} if config.hybrid is not None else diffusion_tensors(config)
    return base_tensors(config) | twins


def tensor_types(config: ModelConfig, file_type: str) -> dict[str, Kind]:
    """llama-quantize's type of every matrix. Raises OrthrusError for a type not of FILE_TYPES."""
    if file_type not in FILE_TYPES:
        raise OrthrusError(f"{file_type}: no prediction; choose from {', '.join(FILE_TYPES)}")
    kind = FILE_TYPES[file_type]
    mix = Mix.of(config, file_type, kind, has_imatrix=False)
    counts: Counter[str] = Counter()
    types = {}
    for name, shape in all_tensors(config).items():
        if len(shape) < 2 or name.endswith(DELTA_NET["conv"]):
            continue
        types[name] = fitting(_type_of(name, shape[-1], mix, counts), shape[-1])
    return types


def _type_of(name: str, columns: int, mix: Mix, counts: Counter[str]) -> Kind:
    """counts: of the parts of layers that came before."""
    if name == OUTPUT:
        return mix.output(columns)
    if name == TOKEN_EMBD:
        return mix.embedding(columns)
    if is_diffusion_tensor(name):
        return mix.default
    part = name.split(".")[2]
    index = counts[counted(part)]
    counts[counted(part)] += 1
    return mix.matrix(part, index)


def weights_of(products: Mapping[Product, int]) -> Counter[Kind]:
    """Weights by type that products multiply."""
    total: Counter[Kind] = Counter()
    for product, count in products.items():
        for kind, weights in product.weights:
            total[kind] += count * weights
    return total


def packed_bytes(weights: Mapping[Kind, int]) -> float:
    """Bytes of these weights on the device."""
    return sum(count * PACKED_BITS[kind] / 8 for kind, count in weights.items())


def cache_bytes_per_layer(config: ModelConfig) -> int:
    """Bytes of keys and values that a position of the context adds to a layer, in f16."""
    return 2 * config.n_head_kv * config.head_dim * CACHE_BYTES


def state_bytes_per_layer(config: ModelConfig) -> int:
    """Bytes of a DeltaNet's matrices."""
    return 0 if config.hybrid is None else 4 * config.hybrid.inner * config.hybrid.head_dim


def record_bytes(config: ModelConfig) -> int:
    """Bytes that a DeltaNet keeps of a row until it is committed: the convolution's inputs, and
    how the row changes the state (`recurrence/states.py`)."""
    h = config.hybrid
    return 0 if h is None else 4 * (h.channels + (h.n_key_heads + h.n_value_heads) * h.head_dim)


def split_for(columns: int) -> int:
    """Parts of k that a product sums apart (`orthrus_kernels.products.dispatch.split_for`, for
    matrices that are not tiny)."""
    tiles = -(-columns // 64)
    return 1 if tiles >= 192 else 2 if tiles >= 96 else 4 if tiles >= 48 else 8
