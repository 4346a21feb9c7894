"""The hook that compares the learning rate's schedule with the training."""

from mmengine.hooks import Hook
from mmengine.optim.scheduler.param_scheduler import INF
from mmengine.runner import IterBasedTrainLoop, Runner
from mmseg.registry import HOOKS

from cgspn_seg.checkpoints import CheckpointError

_TRAIN_LONGER = (
    "To train longer, start a new run from these weights: leave out --resume and pass "
    "--cfg-options load_from=CHECKPOINT, with a new --work-dir."
)


class RunComplete(Exception):
    """A run that was resumed has no iteration left."""


@HOOKS.register_module()
class CheckScheduleHook(Hook):
    """Warn of a schedule that does not end with the training, and refuse one that has run out.

    Resuming also restores the learning rate schedule, so a finished run whose `max_iters` was
    raised would go on at the schedule's last rate, usually 0. Where training by iterations and its
    schedule end at different ones, it is warned of, once, before it starts.

    Raises:
        RunComplete: From `before_train`, if a resumed run has no iteration left.
        CheckpointError: From `before_train`, if only its schedule has none left.
    """

    priority = "LOWEST"  # whatever else is wrong with a run comes first

    def __init__(self) -> None:
        self._configured_ends: list[int] = []

    def before_run(self, runner: Runner) -> None:
        """Remember where the configured schedules end; resuming overwrites it."""
        self._configured_ends = self._configured_ends or [s.end for s in _schedulers(runner)]

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """As `before_run`, which FlexibleRunner calls after it has resumed."""
        self.before_run(runner)

    def before_train(self, runner: Runner) -> None:
        """Compare the schedule with the training, and a restored one with the configured one."""
        if not runner._resume or runner.iter == 0:
            _compare_ends(runner, resumed=False)
            return
        if runner.iter >= runner.max_iters:
            # MMEngine would read the data of all iterations once more, then stop.
            raise RunComplete(
                f"Nothing to resume: the run is complete, {runner.iter} of {runner.max_iters} "
                "iterations are done."
            )
        schedulers = _schedulers(runner)
        restored = [scheduler.end for scheduler in schedulers]
        if restored == self._configured_ends or not schedulers:
            _compare_ends(runner, resumed=True)
            return
        last = max(schedulers, key=lambda scheduler: scheduler.end)
        unit = "epoch" if last.by_epoch else "iteration"
        done = runner.epoch if last.by_epoch else runner.iter
        message = (
            f"The learning rate schedule of the resumed run ends at {unit} {last.end}, that of the "
            f"config at {max(self._configured_ends)}; resuming keeps the former, so training would "
            f"go on at the last learning rate ({last.get_last_value()[0]:g} now)"
        )
        if done >= last.end:
            raise CheckpointError(f"{message}. {_TRAIN_LONGER}")
        runner.logger.warning(f"{message} from there on. {_TRAIN_LONGER}")


def _compare_ends(runner: Runner, *, resumed: bool) -> None:
    """Warn where the schedule of the learning rate does not end with the training.

    Training by epochs, and with several optimizers, is left alone.
    """
    phases = [] if isinstance(runner.param_schedulers, dict) else _schedulers(runner)
    by_iteration = [phase for phase in phases if not phase.by_epoch]
    if not by_iteration or not isinstance(runner.train_loop, IterBasedTrainLoop):
        return
    last = max(by_iteration, key=lambda phase: phase.end)
    if last.end in (runner.max_iters, INF):
        return
    message = (
        f"The learning rate's schedule ends at iteration {last.end}, training at {runner.max_iters}"
    )
    if resumed:
        message += "; resuming keeps the schedule."
        longer = f" {_TRAIN_LONGER}" if runner.max_iters > last.end else ""
        runner.logger.warning(f"{message}{longer}")
        return
    new = _rescaled(by_iteration, last, runner.max_iters)
    one = isinstance(runner.cfg.param_scheduler, dict)
    wanted = []
    for index, phase in enumerate(phases):
        key = "param_scheduler" if one else f"param_scheduler.{index}"
        for edge in ("begin", "end"):
            old = getattr(phase, edge)
            if not phase.by_epoch and new.get(old, old) != old:
                wanted.append(f"{key}.{edge}={new[old]}")
    runner.logger.warning(f"{message}: set {', '.join(wanted)}")


def _rescaled(phases: list, last: object, max_iters: int) -> dict[int, int]:
    """New iterations for those where phases begin and end, so that the last ends at `max_iters`.

    That one's end alone is changed where it begins early enough, otherwise all in proportion.
    """
    if last.begin < max_iters:
        return {last.end: max_iters}
    new, previous = {}, 0
    for edge in sorted({edge for phase in phases for edge in (phase.begin, phase.end)} - {0, INF}):
        previous = new[edge] = max(previous + 1, round(edge * max_iters / last.end))
    return new


def _schedulers(runner: Runner) -> list:
    """The runner's parameter schedulers once they are built, whatever the container."""
    schedulers = runner.param_schedulers or []
    if isinstance(schedulers, dict):
        schedulers = [item for group in schedulers.values() for item in group]
    return [item for item in schedulers if hasattr(item, "get_last_value")]
