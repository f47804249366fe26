"""A `Trainer`'s checkpoints: where they hold adapters, which of them are whole, and what a step of their run was."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState
from typing_extensions import Self

from softkv.io import checkpoint
from softkv.io.soft_model import SoftModel

_STATE = "trainer_state.json"


def save(model: SoftModel, folder: Path, *, writes: bool) -> None:
    """Saves all adapters as they are trained, in all processes together: sharded values are gathered."""
    for name, place in _folders(model, folder).items():
        model.save_pretrained(place, adapter_name=name, folded=False, is_main_process=writes)


def restore(model: SoftModel, folder: Path) -> None:
    """Puts back what `save` wrote."""
    for name, place in _folders(model, folder).items():
        with model.using(name):
            checkpoint.restore(model, place)


def _folders(model: SoftModel, folder: Path) -> dict[str, Path]:
    """Where a checkpoint holds each adapter: the active one in itself, the others below."""
    others = {name: folder / "adapters" / name for name in model.adapters}
    return others | {model.active_adapter: folder}


def last_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """The checkpoint of the most steps in a `Trainer`'s output directory that is whole: a run that was killed while it
    saved leaves one that is not."""
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    for folder in sorted(folders, key=lambda path: int(path.name.split("-")[-1]), reverse=True):
        if _is_whole(folder):
            return folder
    return None


def _is_whole(folder: Path) -> bool:
    try:
        checkpoint.read(folder)
        json.loads((folder / _STATE).read_text(encoding="utf-8"))  # written last
    except (OSError, ValueError):
        return False
    return (folder / "optimizer.pt").is_file() and (folder / "scheduler.pt").is_file()


@dataclass
class RowsOfAStep(TrainerCallback, ExportableState):
    """What a step of a run reads, kept in its checkpoints: a run of other processes goes on with the same rows only
    where its steps read as many."""

    processes: int
    rows: int
    max_tokens: int | None

    @classmethod
    def of(cls, args: TrainingArguments, max_tokens: int | None) -> Self:
        rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return cls(args.world_size, rows, max_tokens)

    def state(self) -> dict[str, Any]:
        return {"args": asdict(self), "attributes": {}}

    def check(self, folder: str | os.PathLike[str]) -> None:
        """Raise where the run of a checkpoint had other processes and other rows in a step."""
        try:
            state = json.loads((Path(folder) / _STATE).read_text(encoding="utf-8"))
            before = RowsOfAStep(**state["stateful_callbacks"][type(self).__name__]["args"])
        except (OSError, ValueError, LookupError, TypeError):
            return  # of another trainer
        if before.processes == self.processes:
            return
        if before.max_tokens is not None or self.max_tokens is not None:
            raise ValueError(
                f"{folder} is of {before.processes} processes, and batches of max_tokens differ with their number: "
                f"expected {before.processes} processes to resume it, got {self.processes}"
            )
        if before.rows != self.rows:
            raise ValueError(
                f"{folder} is of {before.processes} processes that read {before.rows} rows a step, together: expected "
                f"as many of {self.processes} (per_device_train_batch_size, gradient_accumulation_steps), got "
                f"{self.rows}"
            )
