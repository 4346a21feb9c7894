"""The hook that checks the data, and the model by them, before a run spends time on them."""

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmseg.datasets import BaseSegDataset
from mmseg.registry import HOOKS

from cgspn_seg.datasets.checks import (
    check_labels,
    check_num_classes,
    check_pairs,
    leaf_datasets,
    unwrap,
)
from cgspn_seg.datasets.errors import DataError
from cgspn_seg.models.checks import check_channels, check_sizes


@HOOKS.register_module()
class CheckDataHook(Hook):
    """Check the datasets of a run once, before its first iteration.

    Each image must have its label, each label must be readable, of the size of its image and hold
    the ids of the dataset's classes only, each image must be readable, and the heads of the model
    must predict these classes. Training checks what it validates on as well. In distributed runs
    the first process reads the files, and all stop where it finds an error. The parts of a model
    with one of this package's encoders must fit one another, too, and it is warned of sizes of
    images that do not fit them.

    Args:
        max_seconds: When to stop reading labels and then images, for each dataset; `None` reads
            all, 0 none.
        num_threads: How many files to read at a time; `None` means one for each core, up to 16.

    Raises:
        DataError: From the first method called; the message names the file or the config key.
        ValueError: Likewise, where neck or heads take other channels than the encoder gives.
    """

    priority = "VERY_HIGH"

    def __init__(self, max_seconds: float | None = 60.0, num_threads: int | None = None) -> None:
        self.max_seconds = max_seconds
        self.num_threads = num_threads
        self._checked: set[str] = set()

    def before_train(self, runner: Runner) -> None:
        """Check the training data, and the validation data where there are."""
        self._check(runner, "train", runner.train_dataloader.dataset)
        if runner.val_loop is not None:
            self._check(runner, "val", runner.val_dataloader.dataset)

    def before_val(self, runner: Runner) -> None:
        """Check the validation data, unless training has."""
        self._check(runner, "val", runner.val_dataloader.dataset)

    def before_test(self, runner: Runner) -> None:
        """Check the test data."""
        self._check(runner, "test", runner.test_dataloader.dataset)

    def _check(self, runner: Runner, name: str, dataset: object) -> None:
        if name in self._checked:
            return
        if not self._checked:
            model = unwrap(runner.model)
            check_channels(model)
            check_sizes(model, runner.logger)
        self._checked.add(name)
        error = None
        if is_main_process():
            try:
                for leaf in leaf_datasets(dataset):
                    if not isinstance(leaf, BaseSegDataset):
                        continue  # has no labels
                    check_num_classes(leaf, name, runner.model)
                    check_pairs(leaf, name, runner.logger)
                    if self.max_seconds != 0:
                        check_labels(
                            leaf,
                            name,
                            runner.logger,
                            max_seconds=self.max_seconds,
                            num_threads=self.num_threads,
                        )
            except DataError as caught:
                error = caught
        messages = [error and str(error)]
        broadcast_object_list(messages)  # so that no process waits for one that has stopped
        if messages[0] is not None:
            raise error or DataError(messages[0])
