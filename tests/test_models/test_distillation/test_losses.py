"""The distillation losses, against what they are defined by."""

import pytest
import torch
from torch.nn import functional as F

from cgspn_seg.models.distillation.losses import (
    distribution_divergence,
    mean_cosine,
    squared_errors,
    unexplained_variance,
)


def features(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Channels of very different means and scales, as streams of pre-norm encoders have them.
    x = torch.randn(2, 3, 4, 6, generator=generator)
    return (x * torch.logspace(-1, 1, 6) + torch.arange(6) * 5).to(dtype)


def test_unexplained_variance_is_one_for_the_mean_and_zero_for_the_teacher() -> None:
    teacher = features(0)
    mean = teacher.flatten(0, -2).mean(0).expand_as(teacher)
    assert unexplained_variance(mean, teacher).item() == pytest.approx(1, rel=1e-5)
    assert unexplained_variance(teacher, teacher).item() == 0


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_unexplained_variance_has_no_units(scale: float) -> None:
    student, teacher = features(1), features(0)
    once = unexplained_variance(student, teacher)
    torch.testing.assert_close(unexplained_variance(scale * student, scale * teacher), once)


def test_a_constant_teacher_gives_a_finite_loss() -> None:
    teacher = torch.ones(1, 2, 2, 3)
    assert torch.isfinite(unexplained_variance(teacher + 1e-3, teacher))
    assert torch.isfinite(distribution_divergence(teacher + 1e-3, teacher))


@pytest.mark.parametrize("over", ["channels", "tokens"])
def test_divergence_is_the_kl_of_the_softmaxes(over: str) -> None:
    student, teacher = features(1), features(0)
    got = distribution_divergence(student, teacher, over)
    tokens = teacher.reshape(-1, 6)
    mean, std = tokens.mean(0), tokens.std(0, correction=0)
    std = std.clamp_min(std.median().item() / 2)
    rows = []
    for x in (student, teacher):
        x = ((x - mean) / std).reshape(2, 12, 6)
        rows.append(x.flatten(0, 1) if over == "channels" else x.transpose(1, 2).flatten(0, 1))
    p, q = (F.softmax(x, -1) for x in rows)
    torch.testing.assert_close(got, F.kl_div(q.log(), p, reduction="batchmean"))  # KL(p || q)
    assert distribution_divergence(teacher, teacher, over).item() == pytest.approx(0, abs=1e-6)
    assert got > 0


@pytest.mark.parametrize("over", ["channels", "tokens"])
def test_a_quiet_channel_does_not_decide(over: str) -> None:
    torch.manual_seed(0)
    teacher = torch.randn(2, 4, 4, 32)
    error = 0.1 * torch.randn(2, 4, 4, 32)
    loud = distribution_divergence(teacher + error, teacher, over)
    teacher[..., 5] *= 1e-4
    assert distribution_divergence(teacher + error, teacher, over) < 2 * loud


def test_only_the_student_gets_gradients() -> None:
    for loss in (unexplained_variance, distribution_divergence):
        student, teacher = (features(i).requires_grad_() for i in (1, 0))
        loss(student, teacher).backward()
        assert student.grad.abs().sum() > 0
        assert teacher.grad is None


def test_half_types_are_compared_in_float32() -> None:
    student, teacher = features(1, torch.bfloat16), features(0, torch.bfloat16)
    for loss in (unexplained_variance, distribution_divergence):
        got = loss(student, teacher)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, loss(student.float(), teacher.float()))


def test_an_unknown_axis_is_refused() -> None:
    with pytest.raises(ValueError, match=r"over must be one of .*'channels'.*got 'pixels'"):
        distribution_divergence(features(0), features(0), "pixels")


def test_errors_and_cosines_are_of_each_image() -> None:
    student, teacher = features(1), features(0)
    student[1] = 2 * teacher[1]
    error, norm = squared_errors(student, teacher)
    assert error.shape == norm.shape == (2,)
    assert (error[1] / norm[1]).item() == pytest.approx(1)
    assert mean_cosine(student, teacher)[1].item() == pytest.approx(1)
    assert mean_cosine(student, teacher)[0].item() < 1
