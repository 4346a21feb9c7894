"""The hook that judges what a run loads or resumes."""

from __future__ import annotations

from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmseg.registry import HOOKS

from cgspn_seg.checkpoints.fit import (
    load_weights,
    require_complete,
    require_usable,
    state_dict_of,
)

__all__ = ["CheckpointCheckHook"]


@HOOKS.register_module()
class CheckpointCheckHook(Hook):
    """Refuse a checkpoint that does not fit.

    MMEngine loads what fits and warns of the rest. Here a test and a resumed training need every
    tensor; a training that starts from `load_from` may replace its heads, not its backbone.

    Args:
        for_prediction: Whether the run tests (or validates) only.
    """

    # After hooks that put other weights in the checkpoint's place, such as EMAHook.
    priority = "LOWEST"

    def __init__(self, for_prediction: bool = False) -> None:
        self.for_prediction = for_prediction

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Judge the checkpoint before MMEngine loads it."""
        filename = str(runner._load_from or "the checkpoint to resume")
        fit = load_weights(runner.model, state_dict_of(checkpoint))
        if self.for_prediction or runner._resume:
            trained_as = checkpoint.get("meta", {}).get("experiment_name")
            require_complete(
                fit,
                filename,
                trained_as,
                for_prediction=self.for_prediction,
                resuming=not self.for_prediction,
            )
            return
        require_usable(fit, filename)
        if fit.is_complete_but_for_adapters:
            runner.logger.info(
                f"{filename} fills the model but for its {len(fit.missing)} tensors of adapters, "
                "which start as the identity"
            )
        elif not fit.is_perfect:
            runner.logger.warning(
                f"{filename} fits in part, the rest starts at random: {fit.describe()}"
            )
