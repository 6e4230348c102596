"""Triton kernels of quantized linears and their LoRA updates, for CUDA cards.

They compute what the torch expressions in `quantized_linear.py` and `lora_ops.py` compute, each in one
pass over memory. Shapes: x [M, K], W [N, K], A [r, K], B [N, r], x_a = x Aᵀ [M, r].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_FORMATS = {torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8", torch.int8: "int8"}

# Found by timing on an H100, those of `_column_peaks` on an H200.
_NF4_ROWS = 128
_TRANSPOSE_TILE = 128
_ADD_TILE, _ADD_WARPS = (64, 128), 4
_GRADS_PROGRAMS, _GRADS_WARPS, _GRADS_STAGES = 216, 4, 3
_PEAKS_TILE, _PEAKS_PROGRAMS, _PEAKS_WARPS = (16, 512), 1056, 4


def _grads_tile(rank: int) -> tuple[int, int]:
    """(rows, columns) that a program of `_lora_grads` reads at once.

    Wide stripes leave few partial sums; a stripe's own, [columns, rank] fp32, stays in registers.
    """
    return 32, min(512, 16384 // rank)


def _rows_each(rows: int, stripes: int, tile_rows: int, programs: int) -> int:
    """Rows that a program reads, if those of all stripes of columns are to be about `programs`; full tiles."""
    groups = max(1, round(programs / stripes))
    return triton.cdiv(triton.cdiv(rows, groups), tile_rows) * tile_rows


def _row_tile(columns: int, scaled: bool) -> tuple[int, int, int]:
    """(rows, columns at once, warps) of a program of `_quantize_rows`.

    A row of up to 16,384 stays in registers. Longer ones are read twice, and must stay in the L2 cache between.
    """
    if columns <= 16384:
        whole = triton.next_power_of_2(columns)
        return 1, whole, 4 if whole <= 4096 else 8
    if scaled:  # the fp32 scales are twice the row's own bytes
        return (2, 4096, 32) if columns <= 32768 else (1, 8192, 32)
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
def _peak(part):
    """Magnitudes. A maximum passes NaN over; an infinite scale spoils the row as NaN does."""
    return tl.where(part == part, tl.abs(part), float("inf"))


@triton.jit
def _scale(peak, largest):
    # Plain division is approximate. One exact reciprocal a row costs nothing.
    return tl.div_rn(tl.maximum(peak, 1e-12), largest)


@triton.jit
def _store_scaled(values, part, row, rows, column, columns, inverse, largest, INT8: tl.constexpr):
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


@triton.jit
def _quantize_rows(
    x, column_scale, values, scales, rows, columns, largest,
    INT8: tl.constexpr, SCALED: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Some rows: their largest values, then the quantized ones. `WHOLE`: a chunk is a row."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if WHOLE:
        column = tl.arange(0, CHUNK)
        part = _read_rows(x, column_scale, row, rows, column, columns, SCALED)
        scale = _scale(tl.max(_peak(part), 1), largest)
        inverse = tl.div_rn(1.0, scale)
        _store_scaled(values, part, row, rows, column, columns, inverse, largest, INT8)
    else:
        peak = tl.zeros([ROWS, CHUNK], dtype=tl.float32)
        for start in range(0, columns, CHUNK):
            column = start + tl.arange(0, CHUNK)
            part = _read_rows(x, column_scale, row, rows, column, columns, SCALED)
            peak = tl.maximum(peak, _peak(part))
        scale = _scale(tl.max(peak, 1), largest)
        inverse = tl.div_rn(1.0, scale)
        for start in range(0, columns, CHUNK):
            column = start + tl.arange(0, CHUNK)
            part = _read_rows(x, column_scale, row, rows, column, columns, SCALED)
            _store_scaled(values, part, row, rows, column, columns, inverse, largest, INT8)
    tl.store(scales + row, scale, mask=row < rows)


def quantize_rows(
    x: torch.Tensor, column_scale: torch.Tensor | None, dtype: torch.dtype, largest: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `quantized_linear.quantize_rows`; `largest`: the largest magnitude of `dtype`."""
    x = x.contiguous()
    rows, columns = x.shape
    values = torch.empty_like(x, dtype=dtype)
    scales = x.new_empty(rows, 1, dtype=torch.float32)
    scaled = column_scale is not None
    together, chunk, warps = _row_tile(columns, scaled)
    factors = x if column_scale is None else column_scale.contiguous()
    _quantize_rows[(triton.cdiv(rows, together),)](
        x, factors, values, scales, rows, columns, largest, INT8=dtype == torch.int8, SCALED=scaled,
        WHOLE=chunk >= columns, ROWS=together, CHUNK=chunk, num_warps=warps, **_EXACT,
    )  # fmt: skip
    return values, scales


@triton.jit
def _column_peaks(
    x, row_scale, peaks, rows, columns, rows_each, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The largest values of a stripe of columns, through `rows_each` rows. A maximum depends on no order."""
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    peak = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    first = tl.program_id(1) * rows_each
    for start in range(first, min(first + rows_each, rows), ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        part = _read_rows(x, x, row, rows, column, columns, False)
        scale = tl.load(row_scale + row, mask=row < rows, other=0.0)
        peak = tl.maximum(peak, _peak(part * scale[:, None]))
    # The bits of floats that are not negative are in the order of the floats.
    bits = tl.max(peak, 0).to(tl.int32, bitcast=True)
    tl.atomic_max(peaks + column, bits, mask=column < columns, sem="relaxed")


@triton.jit
def _quantize_turned(
    x, row_scale, peaks, values, scales, rows, columns, padded, largest,
    BY_COLUMNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A tile of x, turned: x ∘ row_scale quantized by its columns' largest values, or x by the scales of its rows."""
    row = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = column < columns
    part = _read_rows(x, x, row, rows, column, columns, False)
    factor = tl.load(row_scale + row, mask=row < rows, other=1.0)
    if BY_COLUMNS:
        scale = _scale(tl.load(peaks + column, mask=inside, other=0.0), largest)
        tl.store(scales + column, scale, mask=inside & (tl.program_id(1) == 0))
        part = part * factor[:, None] * tl.div_rn(1.0, scale)[None, :]
    else:
        part = part * tl.div_rn(1.0, factor)[:, None]
    part = tl.minimum(tl.maximum(part, -largest), largest)
    tl.store(
        values + column[:, None] * padded + row[None, :],
        tl.trans(part.to(values.dtype.element_ty)),
        mask=inside[:, None] & (row < padded)[None, :],
    )


def _turned(
    x: torch.Tensor, row_scale: torch.Tensor, peaks: torch.Tensor | None, dtype: torch.dtype, largest: float
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    rows, columns = x.shape
    tile, padded = _TRANSPOSE_TILE, -(-rows // 16) * 16
    values = x.new_empty(columns, padded, dtype=dtype)
    scales = row_scale if peaks is None else torch.empty_like(peaks)
    _quantize_turned[(triton.cdiv(columns, tile), triton.cdiv(padded, tile))](
        x, row_scale, x if peaks is None else peaks, values, scales, rows, columns, padded, largest,
        BY_COLUMNS=peaks is not None, TILE=tile, num_warps=4, **_EXACT,
    )  # fmt: skip
    return values, scales


def quantize_columns(
    x: torch.Tensor, row_scale: torch.Tensor, dtype: torch.dtype, largest: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `quantized_linear.quantize_columns`; `largest`: the largest magnitude of `dtype`."""
    x = x.contiguous()
    rows, columns = x.shape
    peaks = x.new_zeros(columns, 1, dtype=torch.float32)
    tile_rows, tile_columns = _PEAKS_TILE
    stripes = triton.cdiv(columns, tile_columns)
    rows_each = _rows_each(rows, stripes, tile_rows, _PEAKS_PROGRAMS)
    _column_peaks[(stripes, triton.cdiv(rows, rows_each))](
        x, row_scale, peaks.view(torch.int32), rows, columns, rows_each,
        ROWS=tile_rows, COLUMNS=tile_columns, num_warps=_PEAKS_WARPS, **_EXACT,
    )  # fmt: skip
    return _turned(x, row_scale, peaks, dtype, largest)


def turn_rows(
    x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, largest: float
) -> torch.Tensor:
    """See `quantized_linear.turn_rows`; `largest`: the largest magnitude of `dtype`."""
    return _turned(x.contiguous(), scale, None, dtype, largest)[0]


@triton.jit
def _positive_e4m3(bits):
    """Its value in fp32, which Triton's own conversion gives from Ada on alone."""
    exponent, fraction = bits >> 3, bits & 7
    normal = ((exponent + 120) << 23 | fraction << 20).to(tl.float32, bitcast=True)
    value = tl.where(exponent > 0, normal, fraction.to(tl.float32) * 0.001953125)  # 2⁻⁹
    return tl.where(bits == 127, float("nan"), value)


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
    bits = tl.load(block_scale + row * (columns // BLOCK) + block, mask=inside, other=0)
    weight = tl.interleave(high, low) * _positive_e4m3(bits.to(tl.int32))[:, None]
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
    dtype: torch.dtype,
    factor: float,
    *,
    transposed: bool,
) -> torch.Tensor:
    """See `quantized_linear.operand`. `table`: the 16 levels, fp32; `factor`: int8 units of one in e4m3."""
    rows, columns = values.shape[0], values.shape[1] * 2
    blocks = block_scale.shape[1]
    out = values.new_empty((columns, rows) if transposed else (rows, columns), dtype=dtype)
    _expand_nf4[(blocks, triton.cdiv(rows, _NF4_ROWS))](
        values, block_scale, scale, table, out, rows, columns, factor,
        FORMAT=_FORMATS[dtype], TRANSPOSED=transposed, BLOCK=columns // blocks, ROWS=_NF4_ROWS,
        num_warps=4, **_EXACT,
    )  # fmt: skip
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
def _lora_add(
    base, x_a, lora_b, out, rows, columns, rank,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, RANK)
    left = tl.load(
        x_a + row[:, None] * rank + depth[None, :],
        mask=(row < rows)[:, None] & (depth < rank)[None, :],
        other=0.0,
    )
    right = tl.load(
        lora_b + column[None, :] * rank + depth[:, None],
        mask=(column < columns)[None, :] & (depth < rank)[:, None],
        other=0.0,
    )
    place = row[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    total = tl.load(base + place, mask=inside, other=0.0).to(tl.float32) + tl.dot(left, right)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


def lora_add(base: torch.Tensor, x_a: torch.Tensor, lora_b: torch.Tensor) -> torch.Tensor:
    """See `lora_ops.lora_add`; all in bf16."""
    base, x_a, lora_b = base.contiguous(), x_a.contiguous(), lora_b.contiguous()
    (rows, columns), rank = base.shape, x_a.shape[1]
    out = torch.empty_like(base)
    tile_rows, tile_columns = _ADD_TILE
    _lora_add[(triton.cdiv(columns, tile_columns), triton.cdiv(rows, tile_rows))](
        base, x_a, lora_b, out, rows, columns, rank, RANK=max(16, triton.next_power_of_2(rank)),
        ROWS=tile_rows, COLUMNS=tile_columns, num_warps=_ADD_WARPS,
    )  # fmt: skip
    return out


@triton.jit
def _lora_grads(
    grad, x_a, lora_b, grad_x_a_parts, grad_b_parts, rows, columns, rank, rows_each,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A stripe of columns of grad, through `rows_each` rows: read once for both products."""
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, RANK)
    factor = (column < columns)[:, None] & (depth < rank)[None, :]
    b_tile = tl.load(lora_b + column[:, None] * rank + depth[None, :], mask=factor, other=0.0)
    grad_b = tl.zeros([COLUMNS, RANK], dtype=tl.float32)
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
        part = tl.load(x_a + place, mask=inside, other=0.0)
        grad_b = tl.dot(tl.trans(tile), part, grad_b)
        parts = grad_x_a_parts + tl.program_id(0).to(tl.int64) * rows * rank
        tl.store(parts + place, tl.dot(tile, b_tile), mask=inside)
    parts = grad_b_parts + tl.program_id(1).to(tl.int64) * columns * rank
    tl.store(parts + column[:, None] * rank + depth[None, :], grad_b, mask=factor)


def lora_grads(
    grad: torch.Tensor, x_a: torch.Tensor, lora_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `lora_ops.lora_grads`; all in bf16. Sums in a fixed order, so that runs repeat."""
    grad, x_a, lora_b = grad.contiguous(), x_a.contiguous(), lora_b.contiguous()
    (rows, columns), rank = grad.shape, x_a.shape[1]
    padded = max(16, triton.next_power_of_2(rank))
    tile_rows, tile_columns = _grads_tile(padded)
    stripes = triton.cdiv(columns, tile_columns)
    rows_each = _rows_each(rows, stripes, tile_rows, _GRADS_PROGRAMS)
    groups = triton.cdiv(rows, rows_each)
    grad_x_a_parts = grad.new_empty(stripes, rows, rank, dtype=torch.float32)
    grad_b_parts = grad.new_empty(groups, columns, rank, dtype=torch.float32)
    _lora_grads[(stripes, groups)](
        grad, x_a, lora_b, grad_x_a_parts, grad_b_parts, rows, columns, rank, rows_each, RANK=padded,
        ROWS=tile_rows, COLUMNS=tile_columns, num_warps=_GRADS_WARPS, num_stages=_GRADS_STAGES,
    )  # fmt: skip
    return grad_x_a_parts.sum(0).to(grad.dtype), grad_b_parts.sum(0).to(grad.dtype)
