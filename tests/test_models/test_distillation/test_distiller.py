"""Both stages of distillation: what is compared, what learns, what is kept."""

import gc
import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from mmengine.optim import OptimWrapper
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from cgspn_seg.models.distillation import Distiller, distiller
from cgspn_seg.models.distillation.losses import unexplained_variance

pytestmark = pytest.mark.usefixtures("mmseg_scope")

ARCH = dict(embed_dims=32, num_layers=3, num_heads=2, feedforward_channels=48, latent_dims=8)
ATTENTION = dict(type="CGSPN", arch=ARCH, patch_size=4, img_size=16, mixer="attention")
STUDENT = dict(type="CGSPN", arch=ARCH, patch_size=4)
PREPROCESSOR = dict(
    type="SegDataPreProcessor", mean=[120.0, 110.0, 100.0], std=[60.0, 55.0, 50.0], size=(16, 24)
)
STAGES = ("ModulewiseDistiller", "EndToEndDistiller")


def build(stage: str, student: dict = STUDENT, teacher: dict | None = None, **options) -> Distiller:
    torch.manual_seed(0)
    model = MODELS.build(
        dict(
            type=stage,
            teacher=dict(type="EncoderTeacher", encoder=ATTENTION) | (teacher or {}),
            student=student,
            data_preprocessor=PREPROCESSOR,
            **options,
        )
    )
    enliven(model.teacher)
    model.init_weights()
    return model


def enliven(module: nn.Module) -> None:
    """Weights of some size, so that what attention adds is not next to nothing."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.add_(noise, alpha=0.1)


def images(count: int = 2, size: tuple[int, int] = (16, 24)) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("size", [(16, 24), (18, 25)], ids=str)
@pytest.mark.parametrize("stage", STAGES)
def test_a_copy_of_the_teacher_has_nothing_to_learn(stage: str, size: tuple[int, int]) -> None:
    model = build(stage, student=ATTENTION)
    for name, loss in model(images(size=size), mode="loss").items():
        assert loss.item() == pytest.approx(0, abs=1e-4), name


@pytest.mark.parametrize("stage", STAGES)
def test_it_learns(stage: str) -> None:
    model = build(stage).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    wrapper = OptimWrapper(torch.optim.Adam(parameters, lr=3e-3))
    data = dict(inputs=list(40 * images(4) + 110), data_samples=[SegDataSample() for _ in range(4)])
    losses = [model.train_step(deepcopy(data), wrapper)["loss"].item() for _ in range(60)]
    assert losses[-1] < 0.5 * losses[0]


def test_stage_1_trains_the_first_halves_alone() -> None:
    model = build("ModulewiseDistiller")
    sum(model(images(), mode="loss").values()).backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained == {
        n
        for n, _ in model.named_parameters()
        if any(part in n for part in (".mixer.", ".mixer_lpu.", ".norm1."))
    }
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}


def test_stage_1_compares_on_the_teachers_stream() -> None:
    model = build("ModulewiseDistiller")
    image = images()
    losses = model(image, mode="loss")
    taps = model.teacher(image * model.image_scale + model.image_offset)
    for i, tap in enumerate(taps):
        block = model.student.blocks[i]
        z = tap.input + block.mixer_lpu.conv(tap.input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        added = z + block.mixer(block.norm1(z)) - tap.input
        expected = unexplained_variance(added, tap.mixer)
        torch.testing.assert_close(losses[f"loss_{i:02}"], expected, rtol=1e-4, atol=1e-6)


def test_layers_of_stage_1_are_independent() -> None:
    everything, some = build("ModulewiseDistiller"), build("ModulewiseDistiller", layers=[-2])
    torch.testing.assert_close(
        some(images(), mode="loss"),
        {"loss_01": everything(images(), mode="loss")["loss_01"]},
    )
    assert not any(p.requires_grad for p in some.student.blocks[0].parameters())


def test_stage_2_follows_the_students_own_stream() -> None:
    model = build("EndToEndDistiller", kl_weight=0.0, adapter_ratio=None, mixer_weight=0.0)
    losses = model(images(), mode="loss")
    x, errors = model.student.embed(images()), []
    for block, (tap,) in zip(model.student.blocks, model.teach(images(), "output"), strict=True):
        x = block(x)
        errors.append(unexplained_variance(x, tap))
    torch.testing.assert_close(losses, {"loss_block_mse": torch.stack(errors).mean()})


def test_stage_2_trains_everything_a_tap_depends_on() -> None:
    model = build("EndToEndDistiller")
    sum(model(images(), mode="loss").values()).backward()
    idle = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert not idle
    early = build("EndToEndDistiller", layers=[0, 1])
    sum(early(images(), mode="loss").values()).backward()
    assert not any(p.requires_grad for p in early.student.blocks[2].parameters())
    assert not {n for n, p in early.named_parameters() if p.requires_grad and p.grad is None}


def test_weights_of_the_taps_scale_their_losses() -> None:
    once = build("EndToEndDistiller")(images(), mode="loss")
    options = dict(mixer_weight=2.0, block_weight=3.0, kl_weight=5.0)
    scaled = build("EndToEndDistiller", **options)(images(), mode="loss")
    factors = dict(loss_mixer_mse=2, loss_mixer_kl=10, loss_block_mse=3, loss_block_kl=15)
    assert scaled.keys() == once.keys() == factors.keys()
    for name, factor in factors.items():
        torch.testing.assert_close(scaled[name], factor * once[name])


def test_adapters_begin_as_the_identity_and_are_not_the_students() -> None:
    bare, adapted = (build("EndToEndDistiller", adapter_ratio=r) for r in (None, 4))
    torch.testing.assert_close(adapted(images(), mode="loss"), bare(images(), mode="loss"))
    keys = {key.split(".")[0] for key in adapted.state_dict()}
    assert keys == {"student", "adapters"}


def test_what_is_exported_is_judged_without_adapters() -> None:
    model = build("EndToEndDistiller").eval()
    before = model(images(), mode="loss"), model(images(), mode="predict")
    enliven(model.adapters)
    after = model(images(), mode="loss"), model(images(), mode="predict")
    torch.testing.assert_close(after[1], before[1])
    assert all(after[0][name] != before[0][name] for name in before[0])


def test_a_resolution_step_starts_where_the_stage_before_ended(tmp_path: Path) -> None:
    student = MODELS.build(STUDENT)
    enliven(student)
    torch.save(student.state_dict(), tmp_path / "student.pth")
    teacher = dict(encoder=STUDENT, checkpoint=str(tmp_path / "student.pth"))
    config = dict(type="EncoderTeacher", **teacher)
    model = MODELS.build(
        dict(
            type="EndToEndDistiller",
            teacher=config,
            student=STUDENT,
            data_preprocessor=PREPROCESSOR,
        )
    )
    model.init_weights()
    for result in model.eval()(images(), mode="predict"):
        for tap in result.values():
            assert tap["squared_error"].max() < 1e-6 * tap["squared_norm"].max()


@pytest.mark.parametrize(
    ("size", "shape", "message"),
    [
        ((16, 24), (16, 24), None),
        ((18, 24), (18, 24), r"4 pixels, of which \(18, 24\) is no multiple"),
        ((16, 24), (12, 24), r"an image of \(12, 24\) was padded to \(16, 24\)"),
    ],
)
def test_padding_is_warned_of_once(size, shape, message, monkeypatch) -> None:
    model, said = build("ModulewiseDistiller"), []
    monkeypatch.setattr(distiller, "print_log", lambda text, *_: said.append(text))
    samples = [SegDataSample(metainfo=dict(img_shape=shape))] * 2
    for _ in range(2):
        model(images(size=size), samples, mode="loss")
    assert len(said) == (message is not None)
    assert message is None or re.search(message, said[0])


@pytest.mark.parametrize("stage", STAGES)
def test_the_teacher_is_neither_trained_saved_nor_copied(stage: str) -> None:
    model = build(stage).train()
    assert not model.teacher.training
    assert not any(p.requires_grad for p in model.teacher.parameters())
    assert not any("teacher" in key for key in model.state_dict())
    own = {id(p) for p in model.parameters()}
    assert not own & {id(p) for p in model.teacher.parameters()}
    assert deepcopy(model).teacher is model.teacher


def test_the_teacher_sees_the_same_picture() -> None:
    teacher = dict(mean=[10.0, 20.0, 30.0], std=[1.0, 2.0, 3.0])
    model = build("ModulewiseDistiller", teacher=teacher)
    seen = []
    model.teacher.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    pixels = torch.rand(1, 3, 16, 24) * 255
    mean, std = (torch.tensor(PREPROCESSOR[key]).view(-1, 1, 1) for key in ("mean", "std"))
    model.teach((pixels - mean) / std, "input")
    mean, std = (torch.tensor(teacher[key]).view(-1, 1, 1) for key in ("mean", "std"))
    torch.testing.assert_close(seen[0], (pixels - mean) / std, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("scale", "patch", "size"), [(0.5, 4, (8, 12)), (1.0, 8, (32, 48))])
def test_taps_come_to_the_students_grid(scale: float, patch: int, size: tuple) -> None:
    teacher = dict(encoder={**ATTENTION, "patch_size": patch})
    model = build("ModulewiseDistiller", teacher=teacher, teacher_scale=scale)
    seen = []
    model.teacher.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    taps = model.teach(images(), "output")
    image, raw = seen[0]
    assert tuple(image.shape[-2:]) == size
    for (got,), own in zip(taps, raw, strict=True):
        assert got.shape == (2, 4, 6, 32)
        channels_first = own.output.permute(0, 3, 1, 2)
        expected = F.interpolate(channels_first, size=(4, 6), mode="bilinear")
        torch.testing.assert_close(got, expected.permute(0, 2, 3, 1))


def test_activation_checkpointing_changes_nothing() -> None:
    for stage in STAGES:
        grads = []
        for with_cp in (False, True):
            model = build(stage, student={**STUDENT, "with_cp": with_cp})
            sum(model(images(), mode="loss").values()).backward()
            grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("stage", STAGES)
def test_predicts_how_far_each_image_is(stage: str) -> None:
    model = build(stage).eval()
    with torch.no_grad():
        found = model(images(3), mode="predict")
        pairs = model.compare(images(3))
    assert len(found) == 3
    for tap, compared in pairs.items():
        student, teacher = compared[1]
        expected = (student[2] - teacher[2]).square().sum()
        torch.testing.assert_close(found[2][tap]["squared_error"][1], expected)
        assert found[2][tap]["cosine"].shape == (3,)


def test_init_random_copies_nothing() -> None:
    copied, random = (build("ModulewiseDistiller", init=init) for init in ("teacher", "random"))
    own = model_mlp(copied.teacher.model)
    assert torch.equal(model_mlp(copied.student), own)
    assert not torch.equal(model_mlp(random.student), own)


def model_mlp(encoder: nn.Module) -> Tensor:
    return encoder.blocks[1].mlp.fc1.weight


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(student=dict(type="GSPN")), r"student.type must be 'CGSPN', .*got 'GSPN'"),
        (dict(init="copy"), r"init must be one of .*got 'copy'"),
        (dict(teacher_scale=1.5), r"teacher_scale must be above 0 and up to 1; got 1.5"),
        (dict(layers=[3]), r"layers must be different blocks between -3 and 2; got \(3,\)"),
        (dict(layers=[0, -3]), r"layers must be different blocks"),
        (dict(layers=[]), r"layers must be different blocks"),
        (dict(kl_over="pixels"), r"kl_over must be one of"),
        (dict(kl_weight=-1.0), r"kl_weight must not be negative"),
        (dict(mixer_weight=0, block_weight=0), r"nothing to learn"),
        (
            dict(student={**STUDENT, "arch": {**ARCH, "num_layers": 2}}),
            r"same channels and layers; got \(32, 2\) and \(32, 3\)",
        ),
    ],
)
def test_mistakes_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("EndToEndDistiller", **options)


def test_what_stage_1_freezes_is_not_the_users_to_say() -> None:
    with pytest.raises(ValueError, match=r"student.frozen_stages must be left out"):
        build("ModulewiseDistiller", student={**STUDENT, "frozen_stages": 1})


def test_a_tap_without_weight_is_still_compared() -> None:
    model = build("EndToEndDistiller", block_weight=0, layers=[0, 2]).eval()
    with torch.no_grad():
        (found,) = model(images(1), mode="predict")
    assert found.keys() == {"mixer", "block"}
    assert found["block"]["layers"].tolist() == [0, 2]


def test_images_must_be_normalized() -> None:
    with pytest.raises(ValueError, match=r"data_preprocessor must normalize"):
        MODELS.build(
            dict(
                type="ModulewiseDistiller",
                teacher=dict(type="EncoderTeacher", encoder=ATTENTION),
                student=STUDENT,
            )
        )


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("ModulewiseDistiller", {}),
        ("EndToEndDistiller", {}),
        ("EndToEndDistiller", dict(block_weight=0)),
        ("EndToEndDistiller", dict(mixer_weight=0, layers=[0])),
    ],
)
def test_ddp_waits_for_no_parameter(stage: str, options: dict, tmp_path: Path) -> None:
    """In the second step, DDP would refuse parameters that had no gradient in the first."""

    def two_steps() -> None:
        wrapped = DistributedDataParallel(build(stage, **options).train())
        for _ in range(2):
            sum(wrapped(images(), mode="loss").values()).backward()

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
    try:
        two_steps()  # whose model is gone before the group: the last to hold that may wait for ever
    finally:
        gc.collect()
        distributed.destroy_process_group()
