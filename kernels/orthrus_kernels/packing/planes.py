"""Words of some rows (words.py) -> the planes that the kernels read; see quant_tensor.py.

The second half of packing: rows go into panels, and for A16 the bytes of h = 0 and h = 1 into
16-bit elements, 2- and 1-bit codes first into the bytes that several c share. Permutations move 4
to 16 bytes at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from orthrus_kernels.packing.quant_tensor import PANEL_ROWS, STEP, Layout, TypeTraits
from orthrus_kernels.packing.words import WIDE, Words, merged


def new_planes(
    traits: TypeTraits, panels: int, steps: int, layout: Layout, device: torch.device
) -> dict[str, Tensor]:
    """Uninitialised planes of a matrix."""
    planes = {"main": _new_codes(traits.main_bits, panels, steps, layout, device)}
    if traits.high_bits:
        planes["high"] = _new_codes(traits.high_bits, panels, steps, layout, device)
    order = (PANEL_ROWS, 4) if layout is Layout.A16 else (4, PANEL_ROWS)
    planes["scales"] = torch.empty(panels, steps, *order, dtype=torch.uint32, device=device)
    if traits.has_super:
        shape = (panels, steps, PANEL_ROWS)
        planes["super"] = torch.empty(shape, dtype=torch.uint32, device=device)
    return planes


def _new_codes(bits: int, panels: int, steps: int, layout: Layout, device: torch.device) -> Tensor:
    halves = (2,) if bits == 8 else ()
    size = STEP * min(bits, 4) // 8
    if layout is Layout.A16:
        shape: tuple[int, ...] = (panels, steps, *halves, PANEL_ROWS, size // 2)
        return torch.empty(shape, dtype=torch.uint16, device=device)
    inner = (32,) if bits == 1 else (size // 32, 32)
    shape = (panels, steps, *halves, PANEL_ROWS, *inner)
    return torch.empty(shape, dtype=torch.uint8, device=device)


def fill_planes(
    planes: dict[str, Tensor], first_panel: int, words: Words, traits: TypeTraits, layout: Layout
) -> None:
    """Write the rows of `words` (whole panels) from a panel on."""
    panels = words.scales.shape[0] // PANEL_ROWS
    here = {name: plane[first_panel : first_panel + panels] for name, plane in planes.items()}
    fill = _fill_a16 if layout is Layout.A16 else _fill_a8
    fill(here["main"], _panels(words.main), traits.main_bits)
    if words.high is not None:
        fill(here["high"], _panels(words.high), traits.high_bits)
    scales = _panels(words.scales)
    target = here["scales"].view(torch.int32)
    if layout is Layout.A16:
        target.view(WIDE).copy_(scales.contiguous().view(WIDE).transpose(1, 2))
    elif traits.main_bits == 2:
        target.copy_(_by_half(scales).permute(0, 2, 3, 1, 4).flatten(2).unflatten(2, (4, -1)))
    else:
        target.copy_(scales.permute(0, 2, 3, 1))
    if words.super is not None:
        here["super"].view(torch.int32).copy_(_panels(words.super).transpose(1, 2))


def _panels(part: Tensor) -> Tensor:
    """[n, ...] -> [P, 64, ...]."""
    panels: Tensor = part.unflatten(0, (-1, PANEL_ROWS))
    return panels


def _by_half(words: Tensor) -> Tensor:
    """Scale words [P, 64, B, 4(r)] of bytes (j, h) -> [P, 64, B, 2(r // 2), 2(h)] of (r % 2, j)."""
    even, odd = words[..., 0::2], words[..., 1::2]
    first = (
        (even & 0xFF) | ((even >> 8) & 0xFF00) | ((odd & 0xFF) << 16) | ((odd << 8) & -(1 << 24))
    )
    second = (
        ((even >> 8) & 0xFF)
        | ((even >> 16) & 0xFF00)
        | ((odd << 8) & 0xFF0000)
        | (odd & -(1 << 24))
    )
    return torch.stack([first, second], dim=-1)


def _fill_a8(plane: Tensor, codes: Tensor, bits: int) -> None:
    """The natural order: only the rows move."""
    rows_at = 3 if bits == 8 else 2
    wide = plane.view(WIDE)
    target = wide.flatten(rows_at + 1).unflatten(rows_at + 1, codes.shape[rows_at + 1 :])
    order = list(range(codes.ndim))
    order.insert(rows_at, order.pop(1))
    target.copy_(codes.permute(order))


def _fill_a16(plane: Tensor, codes: Tensor, bits: int) -> None:
    """[P, 64, B, ..., h] WIDE -> u16 [P, B, (j,) 64, elements in the order (c, r, e)]."""
    if bits == 8:
        for j in range(2):
            _fill_a16(plane[:, :, j], codes[:, :, :, j], 4)
        return
    if bits == 4:
        by_half = codes.permute(5, 0, 1, 2, 3, 4).contiguous().view(torch.uint8)
        by_half = by_half.reshape(2, *codes.shape[:3], 4, 16)
    elif bits == 2:
        by_half = _shared_bytes(_inner_first(codes, torch.int64), 2)
    else:
        by_half = _shared_bytes(_inner_first(codes, torch.int32), 1)
    elements = by_half[1].to(torch.int16)
    elements <<= 8
    elements |= by_half[0]
    pairs = elements.view(torch.int32)  # [P, 64, B, r, c]
    target = plane.view(torch.int32).unflatten(3, (-1, 4))
    target.copy_(pairs.permute(0, 2, 1, 4, 3))


def _inner_first(codes: Tensor, word: torch.dtype) -> Tensor:
    """[P, 64, B, (r // 2,) h] WIDE -> words [c's outer part, h, P, 64, B, (r // 2)]."""
    split: Tensor = codes.contiguous().view(word).unflatten(-1, (2, -1))
    return split.permute(-1, -2, *range(split.ndim - 2)).contiguous()


def _shared_bytes(words: Tensor, bits: int) -> Tensor:
    """The bytes [h, P, 64, B, r, (inner c, e)] in which the outer c lie at different bits.

    words: [outer c, h, P, 64, B, r // 2] of 4 bits per r % 2, or [outer c, h, P, 64, B] of 2 per r.
    """
    width, low = 2 * bits, (1 << 2 * bits) - 1
    runs = [
        merged([(words[c], width * (c - r), low << width * c) for c in range(words.shape[0])])
        for r in range(8 // width)
    ]
    stacked = torch.stack(runs, dim=-1).flatten(4)  # r // 2 and r % 2, or r: [h, P, 64, B, 4]
    return stacked.unsqueeze(-1).view(torch.uint8)
