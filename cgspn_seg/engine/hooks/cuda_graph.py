"""The hook that replays a model's training step from CUDA graphs."""

import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmseg.models import EncoderDecoder
from mmseg.registry import HOOKS
from torch import Tensor, nn

from cgspn_seg.models.distillation import Distiller


@HOOKS.register_module()
class CUDAGraphHook(Hook):
    """Record a model's forward and backward pass once, and replay them from then on.

    A small model has some thousand short kernels in a training step, and the GPU waits for Python
    to launch them. Of a segmentor, encoder, neck and heads are recorded; of a distiller, student,
    teacher and losses. Everything else, the optimizer and validation too, runs as before. The first
    iteration is an ordinary one; its images' shape is what is recorded, and batches of another
    shape are computed without the recording, with a warning. Random numbers, as of dropout, differ
    in every iteration.

    Raises:
        ValueError: from the first method called, if there is no GPU, the training is distributed or
            accumulates gradients (the recording writes each iteration's to the same place), or the
            model is neither an EncoderDecoder nor a Distiller.
        RuntimeError: before the second iteration, if the model cannot be recorded, because a layer
            waits for the GPU.
    """

    def before_train(self, runner: Runner) -> None:
        """Check that a recording is possible, and look out for the first images."""
        model, reason = runner.model, None
        if not torch.cuda.is_available():
            reason = "there is no GPU"
        elif is_model_wrapper(model):
            reason = "the training is distributed"
        elif not isinstance(model, EncoderDecoder | Distiller):
            reason = (
                "it records an EncoderDecoder or a Distiller, and the model is a "
                f"{type(model).__name__}"
            )
        elif runner.optim_wrapper._accumulative_counts > 1:
            reason = "optim_wrapper.accumulative_counts is above 1"
        if reason is not None:
            raise ValueError(f"CUDAGraphHook: {reason}; train without it (--cuda-graph)")
        self._image: Tensor | None = None
        self._handle = model.register_forward_pre_hook(self._remember, with_kwargs=True)

    def _remember(self, model: nn.Module, args: Sequence, kwargs: Mapping) -> None:
        if model.training:
            self._image = args[0] if args else kwargs["inputs"]

    def before_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        """Record after the first iteration, in which libraries have made their choices."""
        if self._image is None:
            return
        gc.collect()  # what is left of that iteration's graph would tie the recording to its stream
        self._handle.remove()
        image, self._image = self._image, None
        try:
            with runner.optim_wrapper.optim_context(runner.model):
                record(runner.model, image)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise RuntimeError(
                f"CUDAGraphHook: the model cannot be recorded ({reason}); train without it "
                "(--cuda-graph)"
            ) from error
        runner.logger.info(f"Replayed from CUDA graphs, for images of {tuple(image.shape)}")


def record(model: EncoderDecoder | Distiller, image: Tensor) -> None:
    """Record a model in training mode, and have it replay the recordings from now on.

    Weights, buffers and the state of the random numbers are afterwards what they were.

    Args:
        model: the model; called as autocast is where it is recorded.
        image: (B, C, H, W), as the model gets it; only its shape, dtype and layout matter.
    """
    buffers = [buffer.clone() for buffer in model.buffers()]
    random_state = torch.cuda.get_rng_state()
    image = torch.empty_like(image).normal_()
    autocast = torch.autocast(
        "cuda",
        dtype=torch.get_autocast_dtype("cuda"),
        enabled=torch.is_autocast_enabled("cuda"),
        cache_enabled=False,  # else weights that were converted before would not be again
    )
    with autocast, _thread_local_capture():
        (_record_distiller if isinstance(model, Distiller) else _record_segmentor)(model, image)
    with torch.no_grad():
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)
    torch.cuda.set_rng_state(random_state)
    # Gradients come from another stream, that of the recording; autograd waits for it, and warns.
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)


@contextmanager
def _thread_local_capture() -> Iterator[None]:
    """Let other threads use the GPU: a loader's may pin a batch, which would break a recording."""
    graph = torch.cuda.graph
    # make_graphed_callables has no such option.
    torch.cuda.graph = partial(graph, capture_error_mode="thread_local")
    try:
        yield
    finally:
        torch.cuda.graph = graph


def _record_distiller(model: Distiller, image: Tensor) -> None:
    losses = _Losses(model)
    replay = torch.cuda.make_graphed_callables(losses, (image,), allow_unused_input=True)

    def named(image: Tensor) -> dict[str, Tensor]:
        return dict(zip(losses.names, replay(image), strict=True))

    model.loss = _replaying(model, model.loss, named, image.shape)


def _record_segmentor(model: EncoderDecoder, image: Tensor) -> None:
    heads = [model.decode_head]
    if model.with_auxiliary_head:
        auxiliary = model.auxiliary_head
        heads += auxiliary if isinstance(auxiliary, nn.ModuleList) else [auxiliary]
    encoder = _Encoder(model)
    with torch.no_grad():
        features = encoder(image)
    features = [torch.empty_like(part).requires_grad_() for part in features]
    encode, *decode = torch.cuda.make_graphed_callables(
        (encoder, *(_Head(head) for head in heads)),
        ((image,), *(tuple(features) for _ in heads)),
        allow_unused_input=True,
    )
    model.extract_feat = _replaying(model, model.extract_feat, encode, image.shape)
    for head, replay in zip(heads, decode, strict=True):
        unpacked = partial(_unpack, replay)
        head.forward = _replaying(model, head.forward, unpacked, features[0].shape)


class _Losses(nn.Module):
    """A distiller's losses without their names."""

    def __init__(self, model: Distiller) -> None:
        super().__init__()
        self.model, self.names = model, ()

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        losses = self.model.loss(image)
        self.names = tuple(losses)
        return tuple(losses.values())


class _Encoder(nn.Module):
    """Backbone and neck in one."""

    def __init__(self, model: EncoderDecoder) -> None:
        super().__init__()
        self.backbone, self.neck = model.backbone, model.neck if model.with_neck else None

    def forward(self, image: Tensor) -> Sequence[Tensor]:
        features = self.backbone(image)
        return features if self.neck is None else self.neck(features)


class _Head(nn.Module):
    """A head that takes its features one by one."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, *features: Tensor) -> Tensor:
        return self.head(list(features))


def _unpack(replay: Callable, features: Sequence[Tensor]) -> Tensor:
    return replay(*features)


def _replaying(
    model: nn.Module, eager: Callable, replay: Callable, shape: torch.Size
) -> Callable[[Any], Any]:
    """A function that replays where training has the recorded shape."""
    warned = False

    def forward(inputs: Tensor | Sequence[Tensor]) -> Any:
        nonlocal warned
        first = inputs if isinstance(inputs, Tensor) else inputs[0]
        if not model.training or not torch.is_grad_enabled():
            return eager(inputs)
        if first.shape != shape:
            if not warned:
                warned = True
                print_log(
                    f"A batch is {tuple(first.shape)} where {tuple(shape)} is recorded: computed "
                    "without the CUDA graphs, as will be others",
                    "current",
                    logging.WARNING,
                )
            return eager(inputs)
        return replay(inputs)

    return forward
