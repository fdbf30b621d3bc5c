"""What an exported file says about the run that it comes from: base, data, algorithm, rewards before and after, all of it checkable."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path

from gguf import Metadata

from localrl.batch import Prompt
from localrl.config import Run
from localrl.folder import MANIFEST, read_lines
from localrl.policy.place import model_path

Fact = int | float | bool | str | list[str]
ADAPTER_FILE = "adapter_model.safetensors"


def provenance(run: Run, folder: Path, checkpoint: Path, held_out: Sequence[Prompt]) -> dict[str, Fact]:
    """Facts by key: those of the model (`general.*`) and the run's own. Nothing of this machine is among them."""
    return model_facts(run) | run_facts(run, folder, checkpoint, held_out) | reward_facts(folder, step_of(checkpoint))


def model_facts(run: Run) -> dict[str, Fact]:
    """Name, origin, licence, and how it was sampled in training: the file's own defaults."""
    name = base_name(run)
    _, organization, basename, *_ = Metadata.get_model_id_components(name)
    card = model_card(model_path(run.model), run.model.revision)
    licence = re.search(r"^license:\s*[\"']?([\w.+-]+)", card, re.MULTILINE)
    labels = ", ".join(run.rewards.names) or "those of a log"
    found: dict[str, Fact] = {
        "general.name": run.name,
        "general.basename": basename or Path(name).name,
        "general.finetune": f"{run.name}-{run.algorithm.name}",
        "general.license": licence[1] if licence else "",
        "general.tags": ["localrl", "reinforcement-learning", run.algorithm.name, "text-generation"],
        "general.languages": languages(card),
        "general.description": f"{name}, trained on rewards ({labels}) by {run.algorithm.name.upper()} with a LoRA adapter on a base in "
                               f"{run.model.quantization}, seed {run.seed}.",
        "general.quantized_by": "localrl",
        "general.base_model.count": 1,
        "general.base_model.0.name": Path(name).name,
        "general.sampling.temp": float(run.rollout.temperature),
        "general.sampling.top_k": run.rollout.top_k,
        "general.sampling.top_p": float(run.rollout.top_p),
        "general.sampling.min_p": 0.0,
    }  # fmt: skip
    if name.count("/") == 1:
        found["general.base_model.0.organization"] = organization or name.split("/")[0]
        found["general.base_model.0.repo_url"] = f"https://huggingface.co/{name}"
    return found


def run_facts(run: Run, folder: Path, checkpoint: Path, held_out: Sequence[Prompt]) -> dict[str, Fact]:
    """The run's own: enough to make it again, and to see whether two files are of the same."""
    return {
        "run": folder.name, "checkpoint": checkpoint.name, "steps": step_of(checkpoint), "algorithm": run.algorithm.name, "seed": run.seed,
        "base": base_name(run), "base.sha256": base_hash(model_path(run.model), run.model.revision), "quantization": run.model.quantization,
        "adapter.sha256": adapter_hash(checkpoint), "eval.sha256": prompts_hash(held_out), "eval.prompts": len(held_out),
        "stop": list(run.rollout.stop), "exported": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def reward_facts(folder: Path, step: int) -> dict[str, Fact]:
    """Held-out rewards before training and after it, each with twice its standard error, as the run wrote them down."""
    rows = {int(row["step"]): row for row in read_lines(folder / "evaluations.jsonl")}
    found: dict[str, Fact] = {}
    for when, row in (("before", rows.get(0)), ("after", rows.get(step))):
        for key, value in (row or {}).items():
            if key == "eval/reward" or re.fullmatch(r"eval/rewards/[^/]+/mean", key):
                name = key.removesuffix("/mean").removeprefix("eval/").replace("rewards/", "reward.")
                error = (row or {}).get(f"{key.removesuffix('/mean')}/stderr")
                if isinstance(value, float):
                    found[f"{name}.{when}"] = value
                if isinstance(value, float) and isinstance(error, float):
                    found[f"{name}.{when}.error"] = 2 * error
    return found


def base_name(run: Run) -> str:
    """The base as others know it: a hub id, or a folder's name."""
    path = run.model.path
    return path if path == "demo" or not Path(path).expanduser().exists() else Path(path).expanduser().resolve().name


def step_of(checkpoint: Path) -> int:
    """
    >>> step_of(Path("runs/x/checkpoint-40"))
    40
    """
    return int(checkpoint.name.rsplit("-", 1)[1])


def adapter_hash(checkpoint: Path) -> str:
    """sha256 of the adapter, which the checkpoint's manifest holds (and which was verified)."""
    return str(json.loads((checkpoint / MANIFEST).read_text())[ADAPTER_FILE])


def base_hash(origin: str, revision: str | None) -> str:
    """One sha256 over the base's weight files, or empty where they do not lie in a folder or in the hub's cache.

    The cache names a file by its sha256, so nothing large is read there.
    """
    digest = hashlib.sha256()
    files = weight_files(origin, revision)
    for file in files:
        blob = file.resolve().name
        known = blob if re.fullmatch(r"[0-9a-f]{64}", blob) else sha256(file)
        digest.update(f"{file.name} {known}\n".encode())
    return digest.hexdigest() if files else ""


def weight_files(origin: str, revision: str | None) -> list[Path]:
    """The safetensors files of a folder or a cached hub id, in the order of their names."""
    return sorted(folder.glob("*.safetensors")) if (folder := local_folder(origin, revision)) is not None else []


def local_folder(origin: str, revision: str | None = None) -> Path | None:
    """Where a base lies on this machine; None if only the hub has it."""
    if Path(origin).is_dir():
        return Path(origin)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(origin, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def model_card(origin: str, revision: str | None) -> str:
    """The front matter of the base's README, as far as it is on this machine; empty otherwise."""
    folder = local_folder(origin, revision)
    readme = folder / "README.md" if folder is not None else None
    if readme is None or not readme.exists():
        return ""
    found = re.match(r"---\n(.*?)\n---", readme.read_text("utf-8", errors="replace"), re.DOTALL)
    return found[1] if found else ""


def languages(card: str) -> list[str]:
    """Language codes of a front matter, in either of YAML's two forms.

    >>> languages("license: mit\\nlanguage:\\n- en\\n- de\\ntags: x"), languages("language: [en, fr]"), languages("language: en")
    (['en', 'de'], ['en', 'fr'], ['en'])
    """
    found = re.search(r"^languages?:[ \t]*(.*(?:\n\s*-.*)*)", card, re.MULTILINE)
    return re.findall(r"\b[a-z]{2,3}\b", found[1]) if found else []


def prompts_hash(prompts: Sequence[Prompt]) -> str:
    """One sha256 over prompts and their columns; empty for none."""
    rows = [json.dumps([p.content, dict(p.columns)], ensure_ascii=False, sort_keys=True, default=str) for p in prompts]
    return hashlib.sha256("\n".join(rows).encode()).hexdigest() if rows else ""


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
