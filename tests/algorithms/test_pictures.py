"""How algorithms want their metrics shown: every picture is of something that exists, and says what is seen."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from localrl.algorithms import ALGORITHMS
from localrl.algorithms.gdpo import GDPO

SOURCES = "\n".join(path.read_text("utf-8") for path in (Path(__file__).parent.parent.parent / "localrl").rglob("*.py"))
STEERED = set(GDPO(weighting="directed").steer(torch.eye(3, dtype=torch.float64), (1.0, 1.0, 1.0), []).stats)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_pictures_are_of_metrics_that_exist(name: str) -> None:
    kind = ALGORITHMS[name]
    for picture in kind.pictures:
        assert picture.title and picture.caption.endswith(".") and picture.metrics
        for pattern in picture.metrics:
            like = re.compile("[^/]+".join(map(re.escape, pattern.split("*"))))
            elsewhere = f'"{pattern}"' in re.sub(r"pictures: ClassVar[\s\S]*?\n    \)\n", "", SOURCES)          # the engine's, the buffer's
            assert elsewhere or any(map(like.fullmatch, {*kind.reports, *STEERED})), f"{name}: nobody tells {pattern}"
        for limit in picture.limits:
            assert limit in kind.model_fields, f"{name} has no setting {limit}"
        assert picture.form == "lines" or all("*-*" in pattern or "*" in pattern for pattern in picture.metrics)
