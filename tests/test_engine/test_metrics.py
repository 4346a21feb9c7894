"""DistillationMetric, against the definitions over all images at once."""

import logging

import pytest
import torch

from cgspn_seg.engine import DistillationMetric
from cgspn_seg.models.distillation.losses import mean_cosine, squared_errors


def sample(pairs: list, image: int) -> dict[str, torch.Tensor]:
    errors, norms = zip(*(squared_errors(*pair) for pair in pairs), strict=True)
    return {
        "layers": torch.tensor([3, 7]),
        "squared_error": torch.stack([e[image] for e in errors]),
        "squared_norm": torch.stack([n[image] for n in norms]),
        "cosine": torch.stack([mean_cosine(*pair)[image] for pair in pairs]),
    }


def test_errors_are_of_all_images_together(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    pairs = [(torch.randn(3, 2, 2, 4), torch.randn(3, 2, 2, 4) * (i + 1)) for i in range(2)]
    metric = DistillationMetric()
    for image in range(3):
        metric.process(None, [{"mixer": sample(pairs, image)}])
    with caplog.at_level(logging.INFO):
        found = metric.evaluate(3)
    for layer, (student, teacher) in zip((3, 7), pairs, strict=True):
        error = (student - teacher).norm() / teacher.norm()
        assert found[f"mixer/error_{layer:02}"] == pytest.approx(error.item(), rel=1e-5)
        cosine = torch.cosine_similarity(student, teacher, dim=-1).mean()
        assert found[f"mixer/cosine_{layer:02}"] == pytest.approx(cosine.item(), abs=1e-6)
    errors = [found["mixer/error_03"], found["mixer/error_07"]]
    assert found["mixer/error_max"] == max(errors)
    assert found["mixer/error_mean"] == pytest.approx(sum(errors) / 2)
