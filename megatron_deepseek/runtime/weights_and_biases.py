"""--wandb-project: the numbers of a run for Weights & Biases, by its own package; WANDB_MODE=offline writes files."""

import io
from typing import Any

from megatron_deepseek.packages import how_to_install
from megatron_deepseek.runtime.expert_load import ExpertLoad
from megatron_deepseek.runtime.megatron_curves import Curves
from megatron_deepseek.runtime.metrics import StepMetrics
from megatron_deepseek.runtime.scalars import scalars
from megatron_deepseek.settings import RunSettings


class WeightsAndBiases:
    """A listener that logs scalars to a new run of the project; a start that resumes is a run of its own, as in
    Megatron-LM, and its curves go on where the iteration is.
    """

    def __init__(self, run: RunSettings):
        try:
            import wandb
        except ImportError as error:
            raise ValueError(f"--wandb-project {run.wandb_project} needs the package wandb ({error}): "
                             f"{how_to_install('wandb')}") from error
        self._package = wandb
        folder = run.wandb_save_dir or (run.save / "wandb" if run.save is not None else None)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(project=run.wandb_project, name=run.wandb_exp_name, entity=run.wandb_entity,
                                   dir=None if folder is None else str(folder))
        except Exception as error:  # wandb's own errors: no key, no network
            raise ValueError(f"--wandb-project {run.wandb_project}: {' '.join(str(error).split())}; WANDB_MODE=offline "
                             "writes files alone") from error

    def step(self, metrics: StepMetrics) -> None:
        self._log("train", metrics.iteration, metrics.record())

    def validation(self, iteration: int, lm_loss: float, mtp_loss: tuple[float, ...],
                   source_loss: dict[str, float] | None, mtp_acceptance: tuple[float, ...]) -> None:
        self._log("validation", iteration, {"lm_loss": lm_loss, "mtp_loss": mtp_loss, "source_loss": source_loss,
                                            "mtp_acceptance": mtp_acceptance})

    def held_out(self, iteration: int, name: str, results: dict[str, Any]) -> None:
        self._log(f"held out/{name}", iteration, results)

    def curves(self, iteration: int, curves: Curves) -> None:
        samples = {} if curves.consumed_samples is None else {"samples vs steps": curves.consumed_samples}
        self._run.log(curves.by_samples | curves.others | samples, step=iteration)

    def expert_load(self, load: ExpertLoad) -> None:
        self._log("experts", load.iteration, {"max_violation": load.max_violation})

    def picture(self, iteration: int, tag: str, png: bytes) -> None:
        from PIL import Image  # matplotlib, which drew it, depends on it

        self._run.log({tag: self._package.Image(Image.open(io.BytesIO(png)))}, step=iteration)

    def _log(self, group: str, iteration: int, values: dict[str, Any]) -> None:
        self._run.log(dict(scalars(group, values)), step=iteration)

    def message(self, text: str) -> None:
        pass

    def close(self) -> None:
        self._run.finish()
