"""The hook that keeps with a run which part of a data set it used."""

from pathlib import Path

from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmseg.registry import HOOKS

from cgspn_seg.datasets.checks import leaf_datasets


@HOOKS.register_module()
class SaveSubsetHook(Hook):
    """Write the list of images of each data set that has a ``fraction``.

    It goes into the folder of the run's log, as ``train_subset.txt`` (``val_``, ``test_``), where
    several data sets are joined as ``train_subset_0.txt`` and so on, beside the figures in a JSON
    file of the same name.
    """

    def before_train(self, runner: Runner) -> None:
        """Write the list of the training data."""
        _save(runner, "train", runner.train_dataloader.dataset)

    def before_val(self, runner: Runner) -> None:
        """Write the list of the validation data."""
        _save(runner, "val", runner.val_dataloader.dataset)

    def before_test(self, runner: Runner) -> None:
        """Write the list of the test data."""
        _save(runner, "test", runner.test_dataloader.dataset)


@master_only
def _save(runner: Runner, name: str, dataset: object) -> None:
    leaves = list(leaf_datasets(dataset))
    for index, leaf in enumerate(leaves):
        if (subset := getattr(leaf, "subset", None)) is not None:
            number = f"_{index}" if len(leaves) > 1 else ""
            subset.save(Path(runner.log_dir, f"{name}_subset{number}.txt"))
