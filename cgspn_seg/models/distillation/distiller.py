"""Distillation of an encoder from a frozen teacher (C-GSPN, distillation): both of its stages."""

import logging
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModel
from mmseg.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F

from cgspn_seg.models.backbones import CGSPN
from cgspn_seg.models.distillation.adapter import Adapter
from cgspn_seg.models.distillation.losses import (
    KL_AXES,
    distribution_divergence,
    mean_cosine,
    squared_errors,
    unexplained_variance,
)
from cgspn_seg.models.distillation.warm_start import warm_start

INITS = ("teacher", "random")


class Distiller(BaseModel):
    """What both stages share: a student, a frozen teacher beside it, and images for each.

    The teacher is no part of this module's parameters or state: optimizers, DDP, FSDP, EMA and
    checkpoints do not see it, and no copy of it is made. Padding of a batch is compared like
    everything else, so images should fill it.

    Args:
        teacher: config of a :class:`cgspn_seg.models.distillation.teachers.Teacher`.
        student: config of a :class:`cgspn_seg.models.CGSPN` of the teacher's width and depth.
        init: "teacher" copies the teacher's patch embedding, norms and MLPs into the student,
            "random" nothing. The student's own ``init_cfg`` comes after, and wins.
        layers: blocks that are compared, counted from 0, negative ones from the end; None for all.
        teacher_scale: resolution of the teacher's tokens as a fraction of the student's. Below 1
            the teacher sees smaller images, and its taps are interpolated bilinearly to the
            student's grid: the resolution steps, in which the teacher is the student of the step
            before.
        data_preprocessor: MMEngine's; its ``mean`` and ``std`` are the student's, and images are
            converted to the teacher's.
        init_cfg: MMEngine's initialization.

    Raises:
        ValueError: an argument is out of range, or student and teacher differ in width or depth.
    """

    def __init__(
        self,
        teacher: Mapping,
        student: Mapping,
        init: str = "teacher",
        layers: Sequence[int] | None = None,
        teacher_scale: float = 1.0,
        data_preprocessor: Mapping | nn.Module | None = None,
        init_cfg: Mapping | Sequence[Mapping] | None = None,
    ) -> None:
        super().__init__(data_preprocessor, init_cfg)
        if init not in INITS:
            raise ValueError(f"init must be one of {INITS}; got {init!r}")
        if not 0 < teacher_scale <= 1:
            raise ValueError(f"teacher_scale must be above 0 and up to 1; got {teacher_scale}")
        self.init, self.teacher_scale = init, teacher_scale
        self.student: CGSPN = MODELS.build(student)
        if not isinstance(self.student, CGSPN):
            raise ValueError(
                f"student.type must be 'CGSPN', whose blocks are compared; got {student['type']!r}"
            )
        self._teacher = _Unlisted(MODELS.build(teacher))
        own = (self.student.arch.embed_dims, len(self.student.blocks))
        theirs = (self.teacher.embed_dims, self.teacher.num_layers)
        if own != theirs:
            raise ValueError(
                f"student and teacher must have the same channels and layers; got {own} and "
                f"{theirs}. Set student.arch accordingly"
            )
        self.layers = _resolve_layers(layers, len(self.student.blocks))
        self._warned = False
        mean, std = _image_statistics(self.data_preprocessor)
        scale = std / torch.tensor(self.teacher.std)
        offset = (mean - torch.tensor(self.teacher.mean)) / torch.tensor(self.teacher.std)
        self.register_buffer("image_scale", scale.view(-1, 1, 1), persistent=False)
        self.register_buffer("image_offset", offset.view(-1, 1, 1), persistent=False)

    @property
    def teacher(self) -> nn.Module:
        """The frozen teacher, on the device it was last used on."""
        return self._teacher.module

    def init_weights(self) -> None:
        """Copies from the teacher what ``init`` says, then does as MMEngine: reads checkpoints."""
        if not self.is_init and self.init == "teacher":
            mean, std = (part.tolist() for part in _image_statistics(self.data_preprocessor))
            report = warm_start(self.student, self.teacher, mean=mean, std=std)
            print_log(f"Student from teacher: {report.describe()}", logger="current")
        super().init_weights()

    def forward(
        self, inputs: Tensor, data_samples: Sequence | None = None, mode: str = "tensor"
    ) -> Any:
        """Runs the student beside its teacher.

        Args:
            inputs: (B, 3, H, W) images, as the data preprocessor gives them.
            data_samples: not needed.
            mode: "loss" or "predict".

        Returns:
            "loss": a dict of scalar losses, to be summed. "predict": for each image a dict from
            the name of a tap to a dict of (layers,) tensors, ``squared_error``, ``squared_norm``
            and ``cosine``, and the number of each layer, ``layers``, for
            :class:`cgspn_seg.engine.DistillationMetric`.

        Raises:
            ValueError: another mode.
        """
        if mode == "loss":
            self._warn_of_padding(inputs, data_samples)
            return self.loss(inputs)
        if mode == "predict":
            return self.predict(inputs)
        raise ValueError(f"mode must be 'loss' or 'predict'; got {mode!r}")

    def _warn_of_padding(self, inputs: Tensor, data_samples: Sequence | None) -> None:
        """Says once that padding is learned like content."""
        if self._warned:
            return
        size, patch = tuple(inputs.shape[-2:]), self.student.patch_size
        shapes = [getattr(sample, "img_shape", None) for sample in data_samples or ()]
        smaller = [shape for shape in shapes if shape and tuple(shape[:2]) != size]
        reason = ""
        if any(side % patch for side in size):
            reason = f"its patches have {patch} pixels, of which {size} is no multiple"
        elif smaller:
            reason = f"an image of {tuple(smaller[0][:2])} was padded to {size}"
        if reason:
            self._warned = True
            print_log(
                f"The student learns padding as if it were an image: {reason}. Choose crops, and "
                "data_preprocessor.size, of whole patches that every resized image fills",
                "current",
                logging.WARNING,
            )

    @abstractmethod
    def loss(self, image: Tensor) -> dict[str, Tensor]:
        """The losses of a batch."""

    @abstractmethod
    def compare(self, image: Tensor) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """For each kind of tap, (student, teacher) features of the compared layers."""

    def predict(self, image: Tensor) -> list[dict[str, dict[str, Tensor]]]:
        """How far the student's taps are from the teacher's, for each image."""
        found: list[dict] = [{} for _ in image]
        for name, pairs in self.compare(image).items():
            errors, norms = zip(*(squared_errors(*pair) for pair in pairs), strict=True)
            cosines = [mean_cosine(*pair) for pair in pairs]
            for i, result in enumerate(found):
                result[name] = {
                    "layers": torch.tensor(self.layers),
                    "squared_error": torch.stack([e[i] for e in errors]).cpu(),
                    "squared_norm": torch.stack([n[i] for n in norms]).cpu(),
                    "cosine": torch.stack([c[i] for c in cosines]).cpu(),
                }
        return found

    def teach(self, image: Tensor, *taps: str) -> list[list[Tensor]]:
        """Taps of the teacher's compared layers, on the student's grid.

        Args:
            image: (B, 3, H, W), normalized for the student.
            *taps: which, names of :class:`BlockTaps`'s fields.

        Returns:
            For each layer these taps, (B, H, W, C) each.
        """
        patch = self.student.patch_size
        grid = [-(-side // patch) for side in image.shape[-2:]]
        # As the student's patch embedding pads what is no multiple of its patches.
        height, width = (n * patch - side for n, side in zip(grid, image.shape[-2:], strict=True))
        image = F.pad(image, (0, width, 0, height)) * self.image_scale + self.image_offset
        size = [max(round(n * self.teacher_scale), 1) * self.teacher.patch_size for n in grid]
        if list(image.shape[-2:]) != size:
            image = F.interpolate(image, size=size, mode="bilinear", antialias=True)
        teacher = self.teacher
        if next(teacher.parameters()).device != image.device:
            teacher.to(image.device)
        return [
            [_resize(getattr(found, tap), grid) for tap in taps]
            for found in teacher(image, self.layers)
        ]


@MODELS.register_module()
class ModulewiseDistiller(Distiller):
    """Stage 1: every mixer of the student learns its teacher's attention, by itself.

    The first half of each student block (local perception unit, norm, mixer) gets the teacher's
    stream at that place and is to add to it what the teacher's attention adds. No gradient passes
    from layer to layer, so layers are independent: ``layers`` trains a few at a time where memory
    is short, and gives the same, unless gradients are clipped by the norm of all. The rest of the
    student is frozen.

    The loss of a layer is :func:`~.losses.unexplained_variance`.

    Args: see :class:`Distiller`.

    Raises:
        ValueError: the student has ``frozen_stages``; what is frozen here is settled.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.student.frozen_stages >= 0:
            raise ValueError(
                "student.frozen_stages must be left out: stage 1 trains the first halves of the "
                "blocks in `layers`, and freezes the rest"
            )
        self.student.requires_grad_(False)
        for layer in self.layers:
            block = self.student.blocks[layer]
            for part in (block.mixer_lpu, block.norm1, block.mixer):
                if part is not None:
                    part.requires_grad_(True)

    def loss(self, image: Tensor) -> dict[str, Tensor]:
        """One loss for each layer, ``loss_00`` and so on."""
        pairs = self.compare(image)["mixer"]
        return {
            f"loss_{layer:02}": unexplained_variance(*pair)
            for layer, pair in zip(self.layers, pairs, strict=True)
        }

    def compare(self, image: Tensor) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """What the mixers add, each to the teacher's own stream."""
        taught = self.teach(image, "input", "mixer")
        return {
            "mixer": [
                (self.student.run_block(layer, x, taps="mixer"), added)
                for layer, (x, added) in zip(self.layers, taught, strict=True)
            ]
        }


@MODELS.register_module()
class EndToEndDistiller(Distiller):
    """Stage 2: the whole student, from the image, taps in every block.

    Taps are what the mixer adds (PP) and the stream after the block (PB); each is compared, after
    an adapter, by MSE + ``kl_weight`` KL, and the sums of both kinds are weighted::

        loss = mixer_weight · mean_i tap(PP_i) + block_weight · mean_i tap(PB_i)

    Args:
        *args: see :class:`Distiller`.
        mixer_weight: α; 0 leaves these taps out.
        block_weight: β; likewise.
        kl_weight: λ.
        kl_over: what P is, see :func:`~.losses.distribution_divergence`.
        adapter_ratio: C over the adapters' hidden channels; None for no adapters.
        **kwargs: see :class:`Distiller`.

    Raises:
        ValueError: both weights are 0, one is negative, or ``kl_over`` is unknown.
    """

    def __init__(
        self,
        *args: Any,
        mixer_weight: float = 1.0,
        block_weight: float = 1.0,
        kl_weight: float = 1.0,
        kl_over: str = "channels",
        adapter_ratio: int | None = 4,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        weights = dict(mixer_weight=mixer_weight, block_weight=block_weight, kl_weight=kl_weight)
        for name, weight in weights.items():
            if weight < 0:
                raise ValueError(f"{name} must not be negative; got {weight}")
        if kl_over not in KL_AXES:
            raise ValueError(f"kl_over must be one of {KL_AXES}; got {kl_over!r}")
        self.tap_weights = {
            name: weight
            for name, weight in (("mixer", mixer_weight), ("block", block_weight))
            if weight
        }
        if not self.tap_weights:
            raise ValueError("mixer_weight and block_weight are both 0: there is nothing to learn")
        self.kl_weight, self.kl_over = kl_weight, kl_over
        # What no tap depends on gets no gradient, which DDP would wait for.
        last = max(self.layers)
        idle = [self.student.out_norms, *self.student.blocks[last + 1 :]]
        if "block" not in self.tap_weights:
            block = self.student.blocks[last]
            idle += [block.mlp_lpu, block.norm2, block.mlp]
        for part in idle:
            if part is not None:
                part.requires_grad_(False)
        dims = self.student.arch.embed_dims
        self.adapters = nn.ModuleDict()
        if adapter_ratio is not None:
            hidden = max(dims // adapter_ratio, 1)
            for name in self.tap_weights:
                self.adapters[name] = nn.ModuleList(Adapter(dims, hidden) for _ in self.layers)

    def loss(self, image: Tensor) -> dict[str, Tensor]:
        """``loss_mixer_mse``, ``loss_mixer_kl``, the same of the block, after adapters; means over
        layers."""
        losses, compared = {}, self.compare(image)
        for name, weight in self.tap_weights.items():
            pairs = compared[name]
            if name in self.adapters:
                pairs = [
                    (adapter(own), theirs)
                    for adapter, (own, theirs) in zip(self.adapters[name], pairs, strict=True)
                ]
            errors = [unexplained_variance(*pair) for pair in pairs]
            losses[f"loss_{name}_mse"] = weight * torch.stack(errors).mean()
            if self.kl_weight:
                divergences = [distribution_divergence(*pair, self.kl_over) for pair in pairs]
                kl = torch.stack(divergences).mean()
                losses[f"loss_{name}_kl"] = weight * self.kl_weight * kl
        return losses

    def compare(self, image: Tensor) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """Both kinds of taps, without the adapters, which are no part of what is exported."""
        taught = dict(zip(self.layers, self.teach(image, "mixer", "output"), strict=True))
        pairs: dict[str, list] = {"mixer": [], "block": []}
        x = self.student.embed(image)
        for i in range(max(self.layers) + 1):
            added, x = self.student.run_block(i, x, taps="both")
            if i in taught:
                for name, own, theirs in zip(pairs, (added, x), taught[i], strict=True):
                    pairs[name].append((own, theirs))
        return pairs


class _Unlisted:
    """Holds a module that its owner neither trains, saves nor copies."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __deepcopy__(self, memo: dict) -> "_Unlisted":
        return self


def _resolve_layers(layers: Iterable[int] | None, depth: int) -> tuple[int, ...]:
    if layers is None:
        return tuple(range(depth))
    given = tuple(layers)
    resolved = sorted({layer % depth for layer in given if -depth <= layer < depth})
    if not given or len(resolved) != len(given):
        raise ValueError(
            f"layers must be different blocks between {-depth} and {depth - 1}; got {given}"
        )
    return tuple(resolved)


def _image_statistics(preprocessor: nn.Module) -> tuple[Tensor, Tensor]:
    """Mean and deviation that a data preprocessor normalizes by, (3,) each."""
    if getattr(preprocessor, "_enable_normalize", False):
        return preprocessor.mean.flatten().cpu(), preprocessor.std.flatten().cpu()
    raise ValueError(
        "data_preprocessor must normalize images, which the teacher's images are computed from; "
        "set its mean and std, as in configs/_base_/models/upernet_cgspn.py"
    )


def _resize(tap: Tensor, grid: Sequence[int]) -> Tensor:
    """A teacher's (B, h, w, C) tap on the student's grid, (B, H, W, C)."""
    if list(tap.shape[1:3]) == list(grid):
        return tap
    resized = F.interpolate(tap.permute(0, 3, 1, 2), size=tuple(grid), mode="bilinear")
    return resized.permute(0, 2, 3, 1)
