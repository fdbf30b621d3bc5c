"""What kernels allocate and free inside one operator, by device and operator: (arguments, result) -> bytes.

A simulation sees what operators return, not what they need while they work. Those of "cpu" are measured (torch.profiler's memory events,
`bench/memory/truth.py`). Those of "cuda" are read from the kernels' sources and NOT MEASURED: simulated attention is the CPU's operator, whose
results are the CUDA kernel's too (the output, and a float32 log-sum-exp for each row), so what that kernel needs hangs on the same name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Scratch = Callable[[Any, Any], int]
FUSED_ROWS = 32
"""Rows up to which bitsandbytes multiplies 4-bit weights on a GPU without unpacking them (4060 Ti, query and output projection; others differ)."""


def _update_8bit(args: Any, out: Any) -> int:
    """Both moments in fp32, and three more of the gradient's size (the second argument) on the way to the step."""
    return 20 * int(args[1].numel())


def tiles(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies by matrix tiles."""
    return dtype == torch.bfloat16 and getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


def _laid_out(rows: int, wide: int, out: int, dtype: torch.dtype) -> int:
    """A weight (out, wide), as oneDNN lays it out for matrix tiles: the whole of it for about as many rows as it has outputs, measured with one thread
    for weights up to 1 MiB. Of larger ones it lays out a part (1 to 14 MiB for weights 2,048 wide), which no rule foretells and which is little beside
    them: left out. The limits are the same for every number of rows that is simulated, so that sizes stay sums."""
    size = wide * out * dtype.itemsize
    return size if tiles(dtype) and rows >= 256 and out <= 1024 and size <= 2**20 else 0


def _product(args: Any, out: Any) -> int:
    """Arguments: input (rows, in) and weight (in, out), after what is added to their product if anything is."""
    one, other = args[-2:]
    rows, wide = one.shape
    return _laid_out(rows, wide, other.shape[1], one.dtype)


def _unpacked(args: Any, out: Any) -> int:
    """The weight in the input's type, and a float32 scale for every 64 of its numbers. Arguments: input, packed weight, shape of the weight, ..."""
    count = int(args[2][0] * args[2][1])
    return count * int(args[0].dtype.itemsize) + count // 16


def _unpacked_and_laid_out(args: Any, out: Any) -> int:
    wide = args[0].shape[-1]
    return _unpacked(args, out) + _laid_out(args[0].numel() // wide, wide, int(args[2][0]), args[0].dtype)


def _unpacked_where_many(args: Any, out: Any) -> int:
    return _unpacked(args, out) if args[0].numel() // args[0].shape[-1] > FUSED_ROWS else 0


def _flash_backward(args: Any, out: Any) -> int:
    """Arguments: gradient, query (B, Hq, S, D), key (B, Hkv, S, D), ...: the query's gradient in fp32 and a number a row, both of 128 rows at a time;
    with shared keys, gradients of keys and values for every query head, summed afterwards."""
    batch, heads, length, width = args[1].shape
    rows = batch * heads * (-(-length // 128) * 128)
    shared = 2 * batch * heads * args[2].shape[2] * width * args[2].dtype.itemsize if args[2].shape[1] != heads else 0
    return int(4 * rows * (-(-width // 32) * 32) + 4 * rows + shared)


def _repacked(args: Any, out: Any) -> int:
    """Keys and values in bfloat16, laid out for matrix tiles where the processor has them and rows are 64 tokens or longer. Arguments: query (B, Hq, S, D),
    key, value. What each thread holds beside that, 0.6 MiB at most for heads 64 wide, is left out: it does not grow with the work."""
    query, key, value = args[:3]
    return int(key.nbytes + value.nbytes) if tiles(key.dtype) and min(query.shape[2], key.shape[2]) >= 64 else 0


def _converted(args: Any, out: Any) -> int:
    """Operands of another type than the one that is computed in, and the result where it is of another again: a CPU makes copies of them."""
    operands = [arg for arg in args[:2] if isinstance(arg, Tensor)]
    if len(operands) < 2:
        return 0
    common = torch.result_type(*operands)
    return sum(tensor.numel() * common.itemsize for tensor in (*operands, out) if tensor.dim() and tensor.dtype != common)


SCRATCH: Mapping[str, Scratch] = {
    "cpu:bitsandbytes::optimizer_update_8bit_blockwise": _update_8bit,
    "cpu:bitsandbytes::gemm_4bit": _unpacked_and_laid_out,
    **{f"cpu:aten::{name}": _product for name in ("mm", "addmm", "addmm_")},
    "cpu:aten::_scaled_dot_product_flash_attention_for_cpu": _repacked,
    "cuda:bitsandbytes::gemm_4bit": _unpacked_where_many,
    **{f"cpu:aten::{name}": _converted for name in ("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_")},
    "cuda:aten::_scaled_dot_product_flash_attention_for_cpu_backward": _flash_backward,
}
