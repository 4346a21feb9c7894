"""What the hook says of weights that fit in part; what fits is in test_fit.py."""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cgspn_seg.checkpoints import CheckpointCheckHook


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
