"""Where the UI may look: one folder, and nothing outside of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from localrl.settings import UserError

OWN = ".localrl"
"""The UI's own corner of a workspace: the commands it started, drafts, votes."""


@dataclass(frozen=True)
class Place:
    """The folder that `localrl ui` was started in. Runs, data, reward files and models are picked within it."""

    root: Path

    @classmethod
    def at(cls, root: Path) -> Place:
        """UserError if there is no such folder."""
        root = root.expanduser().resolve()
        if not root.is_dir():
            raise UserError(f"{root} is no folder: name the one that holds your runs and data, as in `localrl ui ~/rl`")
        return cls(root)

    @property
    def runs(self) -> Path:
        """Where new runs go."""
        return self.root / "runs"

    def own(self, *names: str) -> Path:
        """A folder in the UI's own corner, made if it is not there."""
        path = self.root.joinpath(OWN, *names)
        path.mkdir(parents=True, exist_ok=True)
        return path

    def inside(self, name: str | Path) -> Path:
        """A path as a person wrote it, from the workspace on. UserError if it leads out, also by a link."""
        path = (self.root / Path(name).expanduser()).resolve()
        if not path.is_relative_to(self.root):
            raise UserError(f"{name} lies outside of {self.root}: move it in there, or start `localrl ui` in a folder that holds both")
        return path

    def shown(self, path: Path) -> str:
        """A path for people: from the workspace on where it lies in there."""
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)
