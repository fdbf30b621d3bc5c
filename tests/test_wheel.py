"""A plain wheel works like the checkout: presets and the embedded model travel in it, `ui` never as a top-level name."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_what_the_wheel_holds(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"localrl", "localrl_ui"}
    for path in [*(ROOT / "presets").rglob("*.*"), *(ROOT / "localrl" / "demo").rglob("*.json*"), ROOT / "localrl/demo/model/model.safetensors"]:
        inside = f"localrl/{path.relative_to(ROOT)}" if path.is_relative_to(ROOT / "presets") else str(path.relative_to(ROOT))
        assert inside in names
    # What is installed finds its presets without the checkout.
    code = "from localrl.config import presets, load_run; from localrl import config; assert 'site' in config.__file__; print(load_run('demo').name)"
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(target), "PATH": ""}, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "demo", done.stderr
