"""What the hook makes of a resumed run; what it makes of weights is in test_fit.py."""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cgspn_seg.checkpoints import CheckpointCheckHook, CheckpointError, RunComplete


class Scheduler:
    """The face of MMEngine's parameter schedulers that the hook looks at."""

    by_epoch = False

    def __init__(self, end: int) -> None:
        self.end = end

    def get_last_value(self) -> list[float]:
        return [0.0]


def resumed_run(iteration: int, max_iters: int, configured: int, restored: int) -> SimpleNamespace:
    """A runner as it is before training, and the hook's memory of its configured schedule."""
    hook = CheckpointCheckHook()
    runner = SimpleNamespace(
        _resume=True,
        iter=iteration,
        epoch=0,
        max_iters=max_iters,
        param_schedulers=[Scheduler(10), Scheduler(configured)],
        logger=logging.getLogger("test"),
    )
    hook.before_run(runner)
    runner.param_schedulers = [Scheduler(10), Scheduler(restored)]
    runner.before_train = lambda: hook.before_train(runner)
    return runner


def test_an_interrupted_run_goes_on_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    resumed_run(40, max_iters=80, configured=80, restored=80).before_train()
    assert not caplog.records


def test_a_finished_run_with_more_iterations_is_refused() -> None:
    """It would train at a learning rate of 0."""
    with pytest.raises(
        CheckpointError, match=r"ends at iteration 80, that of the config at 160.*0"
    ):
        resumed_run(80, max_iters=160, configured=160, restored=80).before_train()


def test_an_interrupted_run_with_more_iterations_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    resumed_run(40, max_iters=160, configured=160, restored=80).before_train()
    assert "ends at iteration 80, that of the config at 160" in caplog.text
    assert "load_from=CHECKPOINT" in caplog.text


def test_a_complete_run_has_nothing_to_do() -> None:
    with pytest.raises(RunComplete, match=r"80 of 80 iterations"):
        resumed_run(80, max_iters=80, configured=80, restored=80).before_train()


@pytest.mark.parametrize("lacking", ["adapters.bias", "student.bias"])
def test_adapters_start_as_the_identity_and_nothing_is_random(
    lacking: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.ModuleDict({"student": nn.Linear(1, 1), "adapters": nn.Linear(1, 1)})
    weights = {"student.weight": torch.ones(1, 1), "student.bias": torch.ones(1)}
    weights |= {"adapters.weight": torch.ones(1, 1), "adapters.bias": torch.ones(1)}
    del weights[lacking]
    logger = logging.getLogger("test")
    runner = SimpleNamespace(model=model, _load_from="one.pth", _resume=False, logger=logger)
    with caplog.at_level(logging.INFO, "test"):
        CheckpointCheckHook().after_load_checkpoint(runner, {"state_dict": weights})
    (record,) = caplog.records
    if lacking.startswith("adapters"):
        assert record.levelno == logging.INFO
        assert "one.pth fills the model but for its 1 tensors of adapters" in record.message
    else:
        assert record.levelno == logging.WARNING and "starts at random" in record.message
