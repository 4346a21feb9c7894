"""What is said of schedules that do not fit the training, new or resumed."""

import logging
import re
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.optim.scheduler import ConstantLR, CosineAnnealingLR, LinearLR
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop

from cgspn_seg.checkpoints import CheckpointError
from cgspn_seg.engine.hooks import CheckScheduleHook, RunComplete


class Scheduler:
    """The face of MMEngine's parameter schedulers that the hook looks at."""

    by_epoch = False

    def __init__(self, end: int) -> None:
        self.begin, self.end = 0, end

    def get_last_value(self) -> list[float]:
        return [0.0]


def resumed_run(
    iteration: int, max_iters: int, configured: int, restored: int, flexible: bool = False
) -> SimpleNamespace:
    """A runner as it is before training, and the hook's memory of its configured schedule.

    MMEngine's FlexibleRunner loads the checkpoint before it calls `before_run`.
    """
    hook = CheckScheduleHook()
    runner = SimpleNamespace(
        _resume=True,
        iter=iteration,
        epoch=0,
        max_iters=max_iters,
        train_loop=object.__new__(IterBasedTrainLoop),
        param_schedulers=[Scheduler(10), Scheduler(configured)],
        logger=logging.getLogger("test"),
    )
    if flexible:
        hook.after_load_checkpoint(runner, {})
    else:
        hook.before_run(runner)
    runner.param_schedulers = [Scheduler(10), Scheduler(restored)]
    if flexible:
        hook.before_run(runner)
    runner.before_train = lambda: hook.before_train(runner)
    return runner


def test_an_interrupted_run_goes_on_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    resumed_run(40, max_iters=80, configured=80, restored=80).before_train()
    assert not caplog.records


@pytest.mark.parametrize("flexible", [False, True])
def test_a_finished_run_with_more_iterations_is_refused(flexible: bool) -> None:
    """It would train at a learning rate of 0."""
    run = resumed_run(80, max_iters=160, configured=160, restored=80, flexible=flexible)
    with pytest.raises(
        CheckpointError, match=r"ends at iteration 80, that of the config at 160.*0"
    ):
        run.before_train()


def test_an_interrupted_run_with_more_iterations_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    resumed_run(40, max_iters=160, configured=160, restored=80).before_train()
    assert "ends at iteration 80, that of the config at 160" in caplog.text
    assert "load_from=CHECKPOINT" in caplog.text


def test_a_complete_run_has_nothing_to_do() -> None:
    with pytest.raises(RunComplete, match=r"80 of 80 iterations"):
        resumed_run(80, max_iters=80, configured=80, restored=80).before_train()


@pytest.mark.parametrize(("max_iters", "advice"), [(160, True), (60, False)])
def test_a_resumed_run_keeps_a_schedule_that_ends_elsewhere_and_is_warned_of(
    caplog: pytest.LogCaptureFixture, max_iters: int, advice: bool
) -> None:
    resumed_run(40, max_iters=max_iters, configured=80, restored=80).before_train()
    (record,) = caplog.records
    expected = (
        f"schedule ends at iteration 80, training at {max_iters}; resuming keeps the schedule"
    )
    assert expected in record.message
    assert ("load_from=CHECKPOINT" in record.message) == advice


KINDS = dict(LinearLR=LinearLR, CosineAnnealingLR=CosineAnnealingLR, ConstantLR=ConstantLR)
WARM_UP = dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=1000)
DECAY = dict(type="CosineAnnealingLR", by_epoch=False, begin=1000, end=40000)


def start(
    schedule: list[dict] | dict, max_iters: int, loop: type = IterBasedTrainLoop
) -> SimpleNamespace:
    """Begins a new run, as far as the hook sees it."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    cfg = Config(dict(param_scheduler=schedule))
    phases = [schedule] if isinstance(schedule, dict) else schedule
    runner = SimpleNamespace(
        _resume=False,
        iter=0,
        max_iters=max_iters,
        cfg=cfg,
        train_loop=object.__new__(loop),
        param_schedulers=[
            KINDS[phase["type"]](optimizer, **{k: v for k, v in phase.items() if k != "type"})
            for phase in phases
        ],
        logger=logging.getLogger("test"),
    )
    hook = CheckScheduleHook()
    hook.before_run(runner)
    hook.before_train(runner)
    return runner


@pytest.mark.parametrize(
    ("schedule", "max_iters", "advice"),
    [
        ([WARM_UP, DECAY], 4000, "param_scheduler.1.end=4000"),
        ([WARM_UP, DECAY], 80000, "param_scheduler.1.end=80000"),
        # The last phase would begin after the training's end.
        (
            [WARM_UP, DECAY],
            400,
            "param_scheduler.0.end=10, param_scheduler.1.begin=10, param_scheduler.1.end=400",
        ),
        (
            [WARM_UP, DECAY],
            8,
            "param_scheduler.0.end=1, param_scheduler.1.begin=1, param_scheduler.1.end=8",
        ),
        (DECAY, 4000, "param_scheduler.end=4000"),
    ],
)
def test_a_schedule_that_ends_elsewhere_is_warned_of_with_what_mends_it(
    caplog: pytest.LogCaptureFixture, schedule: list[dict] | dict, max_iters: int, advice: str
) -> None:
    runner = start(schedule, max_iters)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message == (
        f"The learning rate's schedule ends at iteration 40000, training at {max_iters}: set "
        f"{advice}"
    )
    caplog.clear()
    runner.cfg.merge_from_dict(
        {key: int(value) for key, value in re.findall(r"([\w.]+)=(\d+)", advice)}
    )
    start(runner.cfg.to_dict()["param_scheduler"], max_iters)
    assert not caplog.records


@pytest.mark.parametrize(
    ("schedule", "loop"),
    [
        ([WARM_UP, dict(type="ConstantLR", factor=1.0, by_epoch=False)], IterBasedTrainLoop),
        ([dict(DECAY, by_epoch=True)], IterBasedTrainLoop),
        ([WARM_UP, DECAY], EpochBasedTrainLoop),
        ([], IterBasedTrainLoop),
    ],
    ids=["without an end", "by epoch", "training by epoch", "none"],
)
def test_other_schedules_are_left_alone(
    caplog: pytest.LogCaptureFixture, schedule: list[dict], loop: type
) -> None:
    start(schedule, 4000, loop)
    assert not caplog.records
