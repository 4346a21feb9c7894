"""The hook that shows how much memory a test took."""

from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmseg.registry import HOOKS

from cgspn_seg.engine.memory import PeakMemory


@HOOKS.register_module()
class PeakMemoryHook(Hook):
    """Log the peak memory of a test at its end.

    MMEngine's LoggerHook shows that of the images since its last line, on a GPU, where there are
    as many images as its interval; its last line, the scores, has none.
    """

    # Before LoggerHook, which resets the count whenever it shows it.
    priority = "NORMAL"

    def before_test(self, runner: Runner) -> None:
        """Start to count, on the device of the model."""
        self._memory = PeakMemory(next(runner.model.parameters()).device)

    def after_test_iter(self, *_: object, **__: object) -> None:
        """Take note of the peak."""
        self._memory.update()

    def after_test(self, runner: Runner) -> None:
        """Log the peak."""
        text = str(self._memory)
        runner.logger.info(text[0].upper() + text[1:])
