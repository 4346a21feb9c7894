"""What a student's features are compared by with its teacher's.

Features are (..., C), any number of tokens. All is computed in float32, whatever autocast says.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

KL_AXES = ("channels", "tokens")


def unexplained_variance(student: Tensor, teacher: Tensor) -> Tensor:
    """The squared error as a fraction of the teacher's variance, a scalar.

    That is the papers' MSE (C-GSPN, distillation) in units that are the same for all layers: 1 for
    who predicts each channel's mean, 0 for who predicts everything. Without it the layers with the
    largest features, the last, would be all that counts.

    Args:
        student: (..., C).
        teacher: the same shape; no gradient flows into it.
    """
    student, teacher = student.float(), teacher.detach().float()
    mean = teacher.flatten(0, -2).mean(dim=0)
    return (student - teacher).square().mean() / (teacher - mean).square().mean().clamp_min(1e-12)


def distribution_divergence(student: Tensor, teacher: Tensor, over: str = "channels") -> Tensor:
    """KL(P(student) || P(teacher)), a scalar (C-GSPN, distillation, which does not say what P is).

    Both are standardized by the teacher's mean and deviation of each channel, so that no channel's
    scale decides; channels that vary less than half as much as most stay small. P is then a
    softmax: "channels" makes each token a distribution over its channels, "tokens" each image's
    channel a distribution over the image, as channel-wise distillation for dense prediction has it.

    Args:
        student: (B, H, W, C).
        teacher: the same shape; no gradient flows into it.
        over: "channels" or "tokens".

    Raises:
        ValueError: ``over`` is something else.
    """
    if over not in KL_AXES:
        raise ValueError(f"over must be one of {KL_AXES}; got {over!r}")
    student, teacher = student.float(), teacher.detach().float()
    deviation, mean = torch.std_mean(teacher.flatten(0, -2), dim=0, correction=0)
    scale = torch.maximum(deviation, deviation.median() / 2).clamp_min(1e-6)
    student = ((student - mean) / scale).flatten(1, -2)
    teacher = ((teacher - mean) / scale).flatten(1, -2)
    dim = -1 if over == "channels" else 1
    log_p, log_q = F.log_softmax(student, dim), F.log_softmax(teacher, dim)
    return (log_p.exp() * (log_p - log_q)).sum(dim).mean()


def squared_errors(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Of each image, |student - teacher|² and |teacher|², (B,) each.

    The relative error of a layer is the root of the ratio of their sums over all images.
    """
    student, teacher = student.float(), teacher.float()
    error = (student - teacher).square().flatten(1).sum(dim=1)
    return error, teacher.square().flatten(1).sum(dim=1)


def mean_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Of each image, the mean over its tokens of the cosine of both features, (B,)."""
    cosine = F.cosine_similarity(student.float(), teacher.float(), dim=-1)
    return cosine.flatten(1).mean(dim=1)
