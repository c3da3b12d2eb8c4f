"""From the trainer of a unified network to that of its stages, in the middle of a run."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from multistage_diffusion.config import TrainingConfig
from multistage_diffusion.denoiser import Denoiser
from multistage_diffusion.inherit import Inheritance, inheritance
from multistage_diffusion.training.distributed import put, whole_tensor
from multistage_diffusion.training.trainer import Trainer


def branch_trainer(trunk: Trainer, denoiser: Denoiser, training: TrainingConfig) -> Trainer:
    """A trainer that goes on where that of a trunk stands, with a decoder for each stage.

    Args:
        trunk: Trained a unified network; not to be used afterwards. All processes must call.
        denoiser: The staged denoiser, whose weights are replaced by the trunk's.
        training: Its options; `branch_moments` says what becomes of the optimiser's moments.

    Returns:
        The trainer, at the trunk's step, with its averages.

    Raises:
        ConfigError: The networks do not fit together.
    """
    whole = trunk.whole()
    plan = inheritance(denoiser, whole, "the trunk")
    denoiser.network.load_state_dict(plan.weights(whole.network.state_dict()))
    trainer = Trainer(
        denoiser,
        trunk.data,
        training,
        trunk.engine,
        flip=trunk.flip,
        augment_probability=trunk.augment_probability,
        augment_signs=trunk.augment_signs,
        feed=trunk.batches.feed,
        optimizer=trunk.user_optimizer,
        device=trunk.device,
        processes=trunk.processes,
        callbacks=trunk.callbacks,
    )
    denoiser.trained_classes, trainer.uncertainty = trunk.denoiser.trained_classes, trunk.uncertainty
    trainer.step, trainer.scale, trainer.trunk_images = trunk.step, trunk.scale, sum(trunk.stage_images)
    averages = zip((trainer.ema, *trainer.powers.values()), (trunk.ema, *trunk.powers.values()), strict=True)
    for average, before in averages:
        weights = plan.weights({name: whole_tensor(tensor).cpu() for name, tensor in before.average.items()})
        average.load({name: weights[name] for name in average.average})
    if training.branch_moments == "carry":
        _carry_moments(trunk, trainer, plan)
    return trainer


@torch.no_grad()
def _carry_moments(trunk: Trainer, trainer: Trainer, plan: Inheritance) -> None:
    """Give the optimiser the trunk's moments.

    A decoder's gradient is now a sum over the rows of its stage alone: n_k of B rows, of weight p_k B / n_k. For
    gradients alike on all rows its mean is p_k times the trunk's, and its variance p_k^2 B / n_k times.
    """
    before: dict[str, Mapping[str, Tensor]] = {}
    for name, parameter in trunk.denoiser.network.named_parameters():
        values = trunk.optimizer.state.get(parameter, {})
        if values:
            before[name] = {key: whole_tensor(value).cpu() for key, value in values.items()}
    keys = {key for state in before.values() for key, value in state.items() if value.dim() > 0}
    moments = {
        key: plan.moments({name: state[key] for name, state in before.items() if key in state}) for key in sorted(keys)
    }
    steps = next((state["step"] for state in before.values() if "step" in state), None)
    shares, size = trainer.denoiser.stages.shares(trainer.denoiser.process), trainer.training.batch_size
    counts = trainer.batches.counts
    for name, parameter in trainer.denoiser.network.named_parameters():
        part, stage, _ = name.split(".", 2)
        staged = part == "decoders" or len(trainer.denoiser.network.encoders) > 1
        mean, variance = 1.0, 1.0
        if staged:
            share = shares[int(stage)]
            mean, variance = share, share**2 * size / counts[int(stage)]
        own = [key for key in moments if name in moments[key]]
        if not own:
            continue  # the trunk did not train it
        state = {} if steps is None else {"step": steps.clone()}
        for key in own:
            placed = torch.zeros_like(parameter, dtype=moments[key][name].dtype)
            put(placed, moments[key][name] * (variance if key.endswith("_sq") else mean))
            state[key] = placed
        trainer.optimizer.state[parameter] = state
