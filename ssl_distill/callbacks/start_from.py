"""Runs that begin where others ended."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from ssl_distill.callbacks.ema_teacher import EMATeacher
from ssl_distill.reading.tensors import load_tensors
from ssl_distill.sharding import divided_like

_STUDENT = ("student.", "mask_token")


class StartFrom(Callback):
    """Takes the first weights from checkpoints of the same method; a resumed run takes nothing.

    The student and the teacher may come from different runs: then the one is distilled by the other, until the moving
    average has carried the teacher over to its own student. With the teacher come centers and queues, which describe
    it. Teachers that live by another law (stages, frozen ones) stay what they are. Weights of another shape stay as
    they were drawn; optimiser and schedules begin anew.

    Args:
        student: Checkpoint with the student.
        teacher: Checkpoint with the teacher; None leaves the one that was made with the run's own student.
    """

    def __init__(self, student: str, teacher: str | None = None) -> None:
        for name, path in {"student": student, "teacher": teacher}.items():
            if path is not None and not Path(path).is_file():
                raise ValueError(f"`{name}` {path} does not exist; give a .ckpt file of `ssl-distill fit`.")
        self.student = student
        self.teacher = teacher

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load, before the first evaluation."""
        if trainer.ckpt_path:
            return
        state = _read(self.student, student=True)
        follows = any(isinstance(callback, EMATeacher) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if self.teacher is not None and follows:
            state |= _read(self.teacher, student=False)
        ours = pl_module.state_dict()
        fitting = {
            name: divided_like(ours[name], value)
            for name, value in state.items()
            if isinstance(ours.get(name), Tensor) and ours[name].shape == value.shape
        }
        pl_module.load_state_dict(fitting, strict=False)
        whose = f"student of {self.student}" + (f", teacher of {self.teacher}" if self.teacher and follows else "")
        rank_zero_info(f"started from {len(fitting)} of {len(state)} tensors: {whose}")


def _read(path: str, student: bool) -> dict[str, Any]:
    """What of a checkpoint belongs to the student, or all the rest; not how far a run had come."""
    state = load_tensors(path, "student" if student else "teacher", mmap=True)["state_dict"]
    return {
        name: value
        for name, value in state.items()
        if name.startswith(_STUDENT) == student and not name.endswith("_extra_state")
    }
