"""Triton kernels of the quantised products, for CUDA cards.

They compute what the torch expressions in `quantize.py` compute, each in one pass over memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flux2_ds.ops.formats import FP8_MAX, INT8_MAX, NF4_BLOCK

_DTYPES = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "bf16": torch.bfloat16}

# Found by timing on an H100.
_NF4_ROWS = 128
_TRANSPOSE_TILE = 128
_ADD_TILE, _ADD_WARPS = (64, 128), 4
_GRADIENT_PROGRAMS, _GRADIENT_WARPS, _GRADIENT_STAGES = 216, 4, 3


def _gradient_tile(rank: int) -> tuple[int, int]:
    """(rows, columns) that a program of `_low_rank_gradients` reads at once.

    Wide stripes leave few partial sums; a stripe's own, [columns, rank] fp32, stays in registers.
    """
    return 32, min(512, 16384 // rank)


def _row_tile(columns: int, scaled: bool) -> tuple[int, int, int]:
    """(rows, columns at once, warps) of a program of `_quantize_rows`.

    Rows that are worked on at the same time must stay in the L2 cache between their two readings.
    """
    if scaled:  # the fp32 scales are twice the row's own bytes
        return (
            (1, 2048, 8)
            if columns <= 8192
            else (2, 4096, 32)
            if columns <= 32768
            else (1, 8192, 32)
        )
    if columns <= 8192:
        return 1, triton.next_power_of_2(columns), 8
    return (1, 8192, 16) if columns <= 24576 else (1, 16384, 16)


# A product and a sum are rounded one by one, as torch rounds them: fused, they would send values
# halfway between two integers to another one than on the CPU.
_EXACT = {"enable_fp_fusion": False}


@triton.jit
def _round(x):
    """To the nearest integer, ties to even, for |x| < 2²²: the sum leaves no bits for a fraction."""
    magic = 12582912.0  # 1.5 · 2²³
    return (x + magic) - magic


@triton.jit
def _read_rows(x, column_scale, row, rows, column, columns, SCALED: tl.constexpr):
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    part = tl.load(x + row[:, None] * columns + column[None, :], mask=inside, other=0.0)
    part = part.to(tl.float32)
    if SCALED:
        scale = tl.load(column_scale + column, mask=column < columns, other=0.0)
        part = part * scale[None, :]
    return part


@triton.jit
def _quantize_rows(
    x, column_scale, values, scales, rows, columns, largest,
    INT8: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Some rows: their largest values, then, while the cache still holds them, the quantised ones."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    peak = tl.zeros([ROWS, CHUNK], dtype=tl.float32)
    for start in range(0, columns, CHUNK):
        column = start + tl.arange(0, CHUNK)
        part = _read_rows(x, column_scale, row, rows, column, columns, SCALED)
        # A maximum passes NaN over; an infinite scale spoils the row as NaN does.
        peak = tl.maximum(peak, tl.where(part == part, tl.abs(part), float("inf")))
    # Plain division is approximate. One exact reciprocal a row costs nothing.
    scale = tl.div_rn(tl.maximum(tl.max(peak, 1), 1e-12), largest)
    inverse = tl.div_rn(1.0, scale)
    for start in range(0, columns, CHUNK):
        column = start + tl.arange(0, CHUNK)
        part = _read_rows(x, column_scale, row, rows, column, columns, SCALED)
        part = part * inverse[:, None]
        if INT8:
            part = _round(part)
        else:
            part = tl.minimum(tl.maximum(part, -largest), largest)
        tl.store(
            values + row[:, None] * columns + column[None, :],
            part.to(values.dtype.element_ty),
            mask=(row < rows)[:, None] & (column < columns)[None, :],
        )
    tl.store(scales + row, scale, mask=row < rows)


def quantize_rows(
    x: torch.Tensor, column_scale: torch.Tensor | None, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `quantize.quantize_rows`."""
    x = x.contiguous()
    rows, columns = x.shape
    values = torch.empty(x.shape, device=x.device, dtype=_DTYPES[kind])
    scales = torch.empty(rows, 1, device=x.device, dtype=torch.float32)
    together, chunk, warps = _row_tile(columns, column_scale is not None)
    _quantize_rows[(triton.cdiv(rows, together),)](
        x,
        x if column_scale is None else column_scale.contiguous(),
        values,
        scales,
        rows,
        columns,
        INT8_MAX if kind == "int8" else FP8_MAX,
        INT8=kind == "int8",
        SCALED=column_scale is not None,
        ROWS=together,
        CHUNK=chunk,
        num_warps=warps,
        **_EXACT,
    )
    return values, scales


@triton.jit
def _expand_nf4(
    codes, block_scale, row_scale, table, out, rows, columns, factor,
    FORMAT: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One block of 64 weights in each of `ROWS` rows."""
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(0).to(tl.int64)
    inside = row < rows
    byte = block * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
    pairs = tl.load(
        codes + row[:, None] * (columns // 2) + byte[None, :], mask=inside[:, None], other=0
    ).to(tl.int32)
    high = tl.load(table + (pairs >> 4))
    low = tl.load(table + (pairs & 15))
    scale = tl.load(block_scale + row * (columns // BLOCK) + block, mask=inside, other=0.0)
    weight = tl.interleave(high, low) * scale.to(tl.float32)[:, None]
    if FORMAT == "bf16":
        weight = weight * tl.load(row_scale + row, mask=inside, other=0.0)[:, None]
    if FORMAT == "int8":
        weight = _round(weight * factor)
    weight = weight.to(out.dtype.element_ty)
    column = block * BLOCK + tl.arange(0, BLOCK)
    if TRANSPOSED:
        tl.store(
            out + column[:, None] * rows + row[None, :], tl.trans(weight), mask=inside[None, :]
        )
    else:
        tl.store(out + row[:, None] * columns + column[None, :], weight, mask=inside[:, None])


def expand_nf4(
    values: torch.Tensor,
    block_scale: torch.Tensor,
    scale: torch.Tensor,
    table: torch.Tensor,
    kind: str,
    *,
    transposed: bool,
) -> torch.Tensor:
    """See `quantize.expand_nf4`; `table`: the sixteen levels, fp32."""
    rows, columns = values.shape[0], values.shape[1] * 2
    shape = (columns, rows) if transposed else (rows, columns)
    out = torch.empty(shape, device=values.device, dtype=_DTYPES[kind])
    _expand_nf4[(columns // NF4_BLOCK, triton.cdiv(rows, _NF4_ROWS))](
        values,
        block_scale.view(torch.float8_e4m3fn),
        scale,
        table,
        out,
        rows,
        columns,
        INT8_MAX / FP8_MAX,
        FORMAT=kind,
        TRANSPOSED=transposed,
        BLOCK=NF4_BLOCK,
        ROWS=_NF4_ROWS,
        num_warps=4,
        **_EXACT,
    )
    return out


@triton.jit
def _transpose(x, out, rows, columns, TILE: tl.constexpr):  # fmt: skip
    row = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    tile = tl.load(
        x + row[:, None] * columns + column[None, :],
        mask=(row < rows)[:, None] & (column < columns)[None, :],
        other=0,
    )
    tl.store(
        out + column[:, None] * rows + row[None, :],
        tl.trans(tile),
        mask=(column < columns)[:, None] & (row < rows)[None, :],
    )


def transpose(x: torch.Tensor) -> torch.Tensor:
    """xᵀ, contiguous, of x [M, N] uint8."""
    rows, columns = x.shape
    out = torch.empty(columns, rows, device=x.device, dtype=x.dtype)
    tile = _TRANSPOSE_TILE
    _transpose[(triton.cdiv(columns, tile), triton.cdiv(rows, tile))](
        x, out, rows, columns, TILE=tile, num_warps=8
    )
    return out


@triton.jit
def _scale_product(product, row_scale, column_scale, out, columns, CHUNK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    inside = column < columns
    part = tl.load(product + row * columns + column, mask=inside, other=0).to(tl.float32)
    part = part * tl.load(row_scale + row) * tl.load(column_scale + column, mask=inside, other=0.0)
    tl.store(out + row * columns + column, part.to(out.dtype.element_ty), mask=inside)


def scale_product(
    product: torch.Tensor, row_scale: torch.Tensor, column_scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """product ∘ row_scale ∘ column_scale: [M, N] int32, [M, 1] and [1, N] fp32 -> [M, N] in `dtype`."""
    rows, columns = product.shape
    out = torch.empty(product.shape, device=product.device, dtype=dtype)
    _scale_product[(rows, triton.cdiv(columns, 2048))](
        product, row_scale, column_scale.contiguous(), out, columns, CHUNK=2048, num_warps=4
    )
    return out


@triton.jit
def _add_low_rank(
    base, narrow, up, out, rows, columns, rank,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, RANK)
    left = tl.load(
        narrow + row[:, None] * rank + depth[None, :],
        mask=(row < rows)[:, None] & (depth < rank)[None, :],
        other=0.0,
    )
    right = tl.load(
        up + column[None, :] * rank + depth[:, None],
        mask=(column < columns)[None, :] & (depth < rank)[:, None],
        other=0.0,
    )
    place = row[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    total = tl.load(base + place, mask=inside, other=0.0).to(tl.float32) + tl.dot(left, right)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


def add_low_rank(base: torch.Tensor, narrow: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """See `low_rank.add_low_rank`; all in bf16."""
    base, narrow, up = base.contiguous(), narrow.contiguous(), up.contiguous()
    (rows, columns), rank = base.shape, narrow.shape[1]
    out = torch.empty_like(base)
    tile = _ADD_TILE
    _add_low_rank[(triton.cdiv(columns, tile[1]), triton.cdiv(rows, tile[0]))](
        base,
        narrow,
        up,
        out,
        rows,
        columns,
        rank,
        RANK=max(16, triton.next_power_of_2(rank)),
        ROWS=tile[0],
        COLUMNS=tile[1],
        num_warps=_ADD_WARPS,
    )
    return out


@triton.jit
def _low_rank_gradients(
    grad, narrow, up, narrow_parts, up_parts, rows, columns, rank, rows_each,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A stripe of columns of grad, through `rows_each` rows: read once for both products."""
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, RANK)
    factor = (column < columns)[:, None] & (depth < rank)[None, :]
    up_tile = tl.load(up + column[:, None] * rank + depth[None, :], mask=factor, other=0.0)
    up_sum = tl.zeros([COLUMNS, RANK], dtype=tl.float32)
    first = tl.program_id(1) * rows_each
    for start in range(first, min(first + rows_each, rows), ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & (depth < rank)[None, :]
        tile = tl.load(
            grad + row[:, None] * columns + column[None, :],
            mask=(row < rows)[:, None] & (column < columns)[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        place = row[:, None] * rank + depth[None, :]
        part = tl.load(narrow + place, mask=inside, other=0.0)
        up_sum = tl.dot(tl.trans(tile), part, up_sum)
        parts = narrow_parts + tl.program_id(0).to(tl.int64) * rows * rank
        tl.store(parts + place, tl.dot(tile, up_tile), mask=inside)
    parts = up_parts + tl.program_id(1).to(tl.int64) * columns * rank
    tl.store(parts + column[:, None] * rank + depth[None, :], up_sum, mask=factor)


def low_rank_gradients(
    grad: torch.Tensor, narrow: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `low_rank.low_rank_gradients`; all in bf16. Sums in a fixed order, so that runs can be repeated."""
    grad, narrow, up = grad.contiguous(), narrow.contiguous(), up.contiguous()
    (rows, columns), rank = grad.shape, narrow.shape[1]
    padded = max(16, triton.next_power_of_2(rank))
    tile_rows, tile_columns = _gradient_tile(padded)
    stripes = triton.cdiv(columns, tile_columns)
    wanted = max(1, round(_GRADIENT_PROGRAMS / stripes))
    rows_each = triton.cdiv(triton.cdiv(rows, wanted), tile_rows) * tile_rows
    groups = triton.cdiv(rows, rows_each)
    narrow_parts = grad.new_empty(stripes, rows, rank, dtype=torch.float32)
    up_parts = grad.new_empty(groups, columns, rank, dtype=torch.float32)
    _low_rank_gradients[(stripes, groups)](
        grad,
        narrow,
        up,
        narrow_parts,
        up_parts,
        rows,
        columns,
        rank,
        rows_each,
        RANK=padded,
        ROWS=tile_rows,
        COLUMNS=tile_columns,
        num_warps=_GRADIENT_WARPS,
        num_stages=_GRADIENT_STAGES,
    )
    return narrow_parts.sum(0).to(grad.dtype), up_parts.sum(0).to(grad.dtype)
