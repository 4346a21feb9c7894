"""CUDAGraphHook: the same training, replayed."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from threading import Event
from types import SimpleNamespace

import pytest
import torch
from mmengine import DefaultScope
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.structures import PixelData
from mmseg.models import FCNHead
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import nn

from cgspn_seg import models  # noqa: F401
from cgspn_seg.engine import CUDAGraphHook

pytestmark = pytest.mark.usefixtures("mmseg_scope")

MODEL = dict(
    type="mmseg.EncoderDecoder",
    data_preprocessor=dict(
        type="mmseg.SegDataPreProcessor", mean=[0.0] * 3, std=[255.0] * 3, size=(32, 48)
    ),
    backbone=dict(type="CGSPN", arch="tiny", patch_size=8, out_indices=(2, 5, 8, 11)),
    neck=dict(type="mmseg.Feature2Pyramid", embed_dim=192, norm_cfg=dict(type="BN")),
    decode_head=dict(
        type="mmseg.UPerHead",
        in_channels=[192] * 4,
        in_index=[0, 1, 2, 3],
        channels=16,
        dropout_ratio=0.0,
        num_classes=3,
        norm_cfg=dict(type="BN"),
    ),
    auxiliary_head=dict(
        type="mmseg.FCNHead",
        in_channels=192,
        in_index=2,
        channels=16,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.0,
        num_classes=3,
        norm_cfg=dict(type="BN"),
    ),
    test_cfg=dict(mode="whole"),
)


def batch(seed: int, height: int = 32) -> dict:
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(4):
        sample = SegDataSample()
        sample.gt_sem_seg = PixelData(
            data=torch.randint(0, 3, (1, height, 48), generator=generator)
        )
        sample.set_metainfo(dict(img_shape=(height, 48), ori_shape=(height, 48)))
        samples.append(sample)
    size = (3, height, 48)
    inputs = [torch.randint(0, 256, size, generator=generator).byte() for _ in samples]
    return dict(inputs=inputs, data_samples=samples)


DISTILLER = dict(
    backbone=None,
    neck=None,
    decode_head=None,
    auxiliary_head=None,
    test_cfg=None,
    teacher=dict(
        type="EncoderTeacher",
        encoder=dict(type="CGSPN", arch="tiny", patch_size=8, img_size=(32, 48), mixer="attention"),
    ),
    student=dict(type="CGSPN", arch="tiny", patch_size=8),
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def train(hook: CUDAGraphHook | None, amp: bool, **changes: object) -> tuple[list, nn.Module]:
    torch.manual_seed(0)
    config = {key: value for key, value in {**MODEL, **changes}.items() if value is not None}
    model = MODELS.build(config).to(DEVICE).train()
    model.init_weights()
    # A student's first losses are large.
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5 if "type" in changes else 0.01)
    wrapper = (
        AmpOptimWrapper(dtype="bfloat16", optimizer=optimizer) if amp else OptimWrapper(optimizer)
    )
    runner = SimpleNamespace(model=model, optim_wrapper=wrapper, logger=SimpleNamespace(info=print))
    if hook is not None:
        hook.before_train(runner)
    losses = []
    for i in range(6):
        if hook is not None:
            hook.before_train_iter(runner, i)
        losses.append(model.train_step(batch(i), wrapper)["loss"].item())
    return losses, model


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("amp", [False, True])
def test_trains_as_without(amp: bool) -> None:
    expected, plain = train(None, amp)
    got, replayed = train(CUDAGraphHook(), amp)
    assert replayed.extract_feat.__name__ == "forward"  # the method was replaced
    torch.testing.assert_close(got, expected, rtol=2e-2 if amp else 1e-4, atol=0)
    states = plain.state_dict(), replayed.state_dict()
    assert list(states[0]) == list(states[1])
    tolerance = 0.1 if amp else 0.02  # of products in TF32 and atomic sums, six steps on
    for name, expected in states[0].items():
        error = (states[1][name].float() - expected.float()).abs().max()
        assert error <= tolerance * expected.float().abs().max() + 1e-3, name
    # Validation, and images of another shape, are computed as before.
    image = torch.rand(2, 3, 64, 40, device="cuda")
    with torch.no_grad():
        logits = [m.decode_head(m.extract_feat(image)) for m in (plain.eval(), replayed.eval())]
    torch.testing.assert_close(*logits, atol=0.1, rtol=0.1)
    replayed.train()
    assert replayed.extract_feat(image)[0].shape == (2, 192, 32, 20)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_random_numbers_differ_in_every_iteration() -> None:
    head = {**MODEL["decode_head"], "dropout_ratio": 0.5}
    _, model = train(CUDAGraphHook(), True, decode_head=head)
    image = torch.rand(4, 3, 32, 48, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        features = model.extract_feat(image)
        first = model.decode_head(features).clone()
        assert not torch.equal(first, model.decode_head(features))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("stage", ["ModulewiseDistiller", "EndToEndDistiller"])
def test_distillation_trains_as_without(stage: str) -> None:
    expected, plain = train(None, True, type=stage, **DISTILLER)
    got, replayed = train(CUDAGraphHook(), True, type=stage, **DISTILLER)
    assert replayed.loss.__name__ == "forward"  # the method was replaced
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=0)
    replayed.eval(), plain.eval()
    image = torch.rand(2, 3, 64, 48, device="cuda")
    with torch.no_grad():
        found = [model(image, mode="predict")[0]["mixer"]["cosine"] for model in (replayed, plain)]
    torch.testing.assert_close(*found, rtol=0, atol=0.02)


@MODELS.register_module()
class WaitingHead(FCNHead):
    """Waits for the GPU, which cannot be recorded."""

    def forward(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        logits = super().forward(inputs)
        return logits * (1 if logits.sum().item() > 0 else 2)


def train_what_waits() -> None:
    with DefaultScope.overwrite_default_scope("mmseg"):
        head = {**MODEL["auxiliary_head"], "type": "WaitingHead"}
        with pytest.raises(
            RuntimeError, match=r"cannot be recorded \(.+\); train without it \(--cuda-graph\)"
        ):
            train(CUDAGraphHook(), False, auxiliary_head=head)


def train_while_pinning() -> None:
    done = Event()

    def pin() -> int:
        # What is freed would be used again, without a call that a recording could not stand.
        kept = []
        while not done.is_set():
            kept.append(torch.empty(1024).pin_memory())
        return len(kept)

    with DefaultScope.overwrite_default_scope("mmseg"), ThreadPoolExecutor(1) as loader:
        pinned = loader.submit(pin)
        try:
            _, model = train(CUDAGraphHook(), True)
        finally:
            done.set()
        assert model.extract_feat.__name__ == "forward"
        assert pinned.result() > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("trained", [train_what_waits, train_while_pinning])
def test_in_a_process_of_its_own(trained: Callable) -> None:
    """What cannot be recorded is said, and what another thread pins is no reason for that."""
    # PyTorch's random numbers do not survive a recording that fails.
    # As in conftest.py, the stub of mmcv's operators has to be there before mmseg.
    stub = dict(initializer=import_module, initargs=("cgspn_seg.compat",))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), **stub) as pool:
        pool.submit(trained).result()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(ValueError, match=r"CUDAGraphHook: there is no GPU"):
        CUDAGraphHook().before_train(SimpleNamespace(model=nn.Identity()))


def test_accumulation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODELS.build(MODEL)
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1), accumulative_counts=2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"accumulative_counts is above 1"):
        CUDAGraphHook().before_train(SimpleNamespace(model=model, optim_wrapper=wrapper))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
@pytest.mark.parametrize(
    "changes",
    [{}, dict(auxiliary_head=None), {"type": "EndToEndDistiller", **DISTILLER}],
    ids=["segmentor", "one head", "distiller"],
)
def test_what_is_replayed_is_put_together_as_it_was(
    changes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same, with the recorded parts called instead of replayed."""

    def called(parts: nn.Module | tuple, args: tuple, **_: object) -> object:
        several = isinstance(parts, tuple)
        for part, own in zip(parts, args, strict=True) if several else [(parts, args)]:
            part(*own)  # as a warm-up
            # A recording does not call the model's methods, which are replaced by it.
            if hasattr(part, "head"):
                forward = part.head.forward
                recorded.append(lambda *inputs, forward=forward: forward(list(inputs)))
            elif hasattr(part, "model"):
                loss = part.model.loss
                recorded.append(lambda image, loss=loss: tuple(loss(image).values()))
            else:
                recorded.append(part)
        return tuple(recorded) if several else recorded[0]

    expected, plain = train(None, False, **changes)
    recorded: list = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", torch.get_rng_state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", torch.set_rng_state)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", called)
    got, replayed = train(CUDAGraphHook(), False, **changes)
    assert len(recorded) == (1 if "type" in changes else 3 if not changes else 2)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0)
    for (name, p), q in zip(
        plain.state_dict().items(), replayed.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(q, p, rtol=1e-3, atol=1e-4, msg=name)
