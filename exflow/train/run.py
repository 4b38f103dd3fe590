"""Folder of a training run: its checkpoints, and the state from which a stopped run continues."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from exflow.errors import InputError
from exflow.files import atomic_path, read_json, write_json
from exflow.train.config import TrainConfig

REMEDY = "leave out --resume to start from the beginning"


@dataclass(frozen=True)
class Run:
    """Paths of a run: checkpoints in `step-000500/`, state to resume from in `state/`."""

    folder: Path

    def checkpoint(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    @property
    def latest(self) -> Path:
        """File with the step of the state, its file's name, and the configuration of the run."""
        return self.folder / "state" / "latest.json"

    def save_state(self, step: int, config: TrainConfig, state: dict[str, Tensor]) -> None:
        """Write the optimizer's state; `latest` is written last, so a half-written state is never resumed."""
        name = f"optimiser-{step:06d}.safetensors"
        with atomic_path(self.latest.with_name(name)) as temporary:
            temporary.write_bytes(save({key: value.cpu().contiguous() for key, value in state.items()}))
        write_json(self.latest, {"step": step, "optimiser": name, "config": config.model_dump(mode="json")})
        for old in self.latest.parent.glob("optimiser-*.safetensors"):
            if old.name != name:
                old.unlink()

    def load_state(self, config: TrainConfig) -> tuple[int, dict[str, Tensor]]:
        """The step and state to continue from. Raises InputError if there is none, or another run's."""
        latest = read_json(self.latest, "run to resume", REMEDY)
        try:
            # keys that are newer than the run had their defaults
            self._check_same_run(TrainConfig.model_validate(latest["config"]), config)
            return latest["step"], load_file(self.latest.with_name(latest["optimiser"]))
        except (KeyError, TypeError, OSError, SafetensorError, ValidationError) as error:
            raise InputError(f"{self.latest}: the state cannot be read ({error!r}); {REMEDY}") from error

    def _check_same_run(self, earlier: TrainConfig, config: TrainConfig) -> None:
        before = earlier.model_dump(mode="json")
        for part, values in config.model_dump(mode="json", exclude={"checkpoint_steps"}).items():
            for key, value in values.items():
                began = before[part][key]
                if began != value:
                    raise InputError(
                        f"{self.latest}: the run began with {part}.{key} = {began!r}, now it is {value!r}; "
                        f"set it back, or {REMEDY}"
                    )
