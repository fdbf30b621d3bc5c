"""BF16 files: every weight is torch's own rounding, whether made from an F32 parent or written straight; what that costs lies between F16 and Q8_0."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader

from localrl.export import Sample, export, export_all, parents
from localrl.export.weights import Source
from localrl.export.writer import DType, encode
from localrl.settings import UserError

Live = Callable[..., tuple[Any, Any]]
Samples = Callable[[Any], list[Sample]]


def bits(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Every tensor as it lies in the file."""
    return {t.name: np.array(t.data) for t in GGUFReader(path).tensors}


@pytest.mark.parametrize("form", ["none", "nf4"])
def test_from_an_f32_parent_every_weight_is_torchs_rounding(form: str, live: Live, samples: Samples, tmp_path: Path) -> None:
    model, tokenizer = live("llama", form)
    wanted: list[DType] = ["bf16", "f32", "f16", "q8_0"]
    done = {file.report.dtype: file for file in export_all(
        model, tokenizer, tmp_path, what="merged", dtypes=wanted, samples=samples(tokenizer), merge="dequantized")}  # fmt: skip
    exact, held = bits(done["f32"].path), bits(done["bf16"].path)
    for name, values in exact.items():
        if values.ndim == 1:
            assert np.array_equal(held[name], values), "norms stay F32"
        else:
            assert np.array_equal(held[name].view(np.int16), torch.from_numpy(values).bfloat16().view(torch.int16).numpy())
    rows = {row.name: row for row in done["bf16"].report.checks}
    assert done["bf16"].report.types == {"BF16": 16, "F32": 5}
    assert rows["weights"].passed and rows["mean KL"].passed and not rows["mean KL"].warns
    assert rows["greedy text"].passed and rows["first choice"].limit == "all"
    kl = {dtype: done[dtype].report.figures["kl_mean"] for dtype in wanted}
    assert kl["f32"] < kl["f16"] < kl["bf16"] < kl["q8_0"]
    assert GGUFReader(done["bf16"].path).fields["general.file_type"].contents() == 32
    assert not done["bf16"].report.fallbacks


def test_written_straight_it_is_the_same(live: Live, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model so large that no F32 file is made first."""
    model, tokenizer = live("llama", "none")
    told = samples(tokenizer)
    from_parent = export(model, tokenizer, tmp_path / "a", what="merged", dtype="bf16", samples=told)
    monkeypatch.setattr(parents, "LARGE", 1)
    seen: list[str] = []
    straight = export(
        model, tokenizer, tmp_path / "b", what="merged", dtype="bf16", samples=told, progress=lambda done, total, name: seen.append(name)
    )
    assert "quantising" not in seen
    first, second = bits(from_parent.path), bits(straight.path)
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert straight.report.source == from_parent.report.source
    assert next(row for row in straight.report.checks if row.name == "weights").limit == "all, bit for bit"


def flipped(path: Path) -> None:
    """The last bit of one weight."""
    tensor = next(t for t in GGUFReader(path, "r+").tensors if t.name == "blk.1.ffn_up.weight")
    tensor.data.reshape(-1)[0] ^= 1


def test_one_bit_that_is_rounded_otherwise_is_caught(live: Live, samples: Samples, tmp_path: Path) -> None:
    model, tokenizer = live("llama", "none")
    checks: list[str] = []

    def damage(done: int, total: int, name: str) -> None:
        checks.extend([name] if name == "self-check" else [])
        if len(checks) == 2 and name == "self-check":
            flipped(tmp_path / "model-merged-bf16.gguf.tmp")

    with pytest.raises(UserError, match=r"weights: .* first: blk\.1\.ffn_up\.weight"):
        export(model, tokenizer, tmp_path, what="merged", dtype="bf16", samples=samples(tokenizer), progress=damage)


def test_any_float_is_rounded_as_torch_does() -> None:
    """Halves to even, subnormal numbers kept; what would become infinite is refused."""
    words = np.random.default_rng(0).integers(0, 2**32, 2**18, dtype=np.uint32).view(np.float32)
    ties = (np.arange(2**16, dtype=np.uint32) << 16 | 0x8000).view(np.float32)
    values = np.concatenate([words, ties, np.float32([0, -0.0, 1e-45, 1.17e-38])])
    values = values[np.isfinite(values) & (np.abs(values) < 3.38e38)]
    values = values[: len(values) // 64 * 64].reshape(-1, 64)
    source = Source("x.weight", values.shape, lambda: lambda rows: torch.from_numpy(values)[rows])
    held = encode(source, GGMLQuantizationType.BF16)
    assert np.array_equal(held.view(np.int16), torch.from_numpy(values).bfloat16().view(torch.int16).numpy())
    large = np.full((1, 64), 3.3999e38, np.float32)
    with pytest.raises(UserError, match="beyond BF16's"):
        encode(Source("y.weight", large.shape, lambda: lambda rows: torch.from_numpy(large)[rows]), GGMLQuantizationType.BF16)
