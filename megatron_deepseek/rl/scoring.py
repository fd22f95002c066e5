"""Log-probabilities of samples under the weights that the trainer has, in its layout, on every rank."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_deepseek.rl.rows import RowShape, pack_samples
from megatron_deepseek.rl.samples import KEPT_IDS, Sample
from megatron_deepseek.training.scoring import Distribution
from megatron_deepseek.training.trainer import Trainer


def scores(trainer: Trainer, samples: Sequence[Sample], shape: RowShape, temperature: float
           ) -> tuple[torch.Tensor, ...]:
    """Return the log-probabilities of each sample's tokens, float64 on the host, under the distribution that they were
    drawn from: at `temperature`, among the kept ids, with the kept routing, where samples have these.

    Every rank calls it with the same samples, and gets all of them.
    """
    packed = pack_samples(samples, torch.zeros(len(samples)), shape)
    kept = KEPT_IDS if KEPT_IDS in packed.batch.per_token else None
    found = trainer.score(packed.batch.to(trainer.meshes.device), distribution=Distribution(temperature, kept))
    own = packed.of_samples(found.log_probabilities_BS.double().cpu())
    everyone: list = [None] * trainer.meshes.layout.dp
    dist.all_gather_object(everyone, {number: each.clone() for number, each in own.items()},
                           group=trainer.meshes.group("dp"))
    of_all = {number: each for of_rank in everyone for number, each in of_rank.items()}
    return tuple(of_all[number] for number in range(len(samples)))
