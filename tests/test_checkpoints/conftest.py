"""What the tests of checkpoints share."""

import pytest
from mmengine.runner import CheckpointLoader

from cgspn_seg.checkpoints.loading import _FORCE_WEIGHTS_ONLY


@pytest.fixture(autouse=True)
def own_loading_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every test MMEngine's loaders as they were, and take back how it protects them."""
    monkeypatch.setattr(CheckpointLoader, "_schemes", dict(CheckpointLoader._schemes))
    monkeypatch.setenv(_FORCE_WEIGHTS_ONLY, "0")
