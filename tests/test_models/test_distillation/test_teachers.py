"""Teachers: what their taps are, in every family, and what is refused."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.model import BaseModule
from mmseg.registry import MODELS
from torch import nn

from cgspn_seg.checkpoints import CheckpointError, protect_checkpoint_loading
from cgspn_seg.checkpoints.export import encode_backbone
from cgspn_seg.checkpoints.loading import _FORCE_WEIGHTS_ONLY
from cgspn_seg.models.distillation import EncoderTeacher, Teacher, TimmTeacher, TransformersTeacher

from .teachers import (
    ENCODER,
    FAMILIES,
    SIZES,
    TIMM,
    TIMM_OPTIONS,
    TRANSFORMERS,
    WIDTHS,
    library,
    normalized,
    picture,
    random_weights,
    save_transformers,
)

IMAGENET = (123.675, 116.28, 103.53)


def own_outputs(teacher: Teacher, image: torch.Tensor) -> list[torch.Tensor]:
    """What the library itself gives as the stream after the embedding and after each block."""
    model, count = teacher.model, teacher.num_prefix_tokens
    if isinstance(teacher, TimmTeacher):
        tokens = model.forward_intermediates(image, intermediates_only=True, output_fmt="NLC")
        return [None, *tokens]  # nothing of the embedding, and without prefix tokens
    if isinstance(teacher, EncoderTeacher):
        encoder = MODELS.build(ENCODER | {"out_indices": (0, 1, 2)}).double()
        encoder.load_state_dict(model.state_dict())
        return [None, *(f.permute(0, 2, 3, 1).flatten(1, 2) for f in encoder(image))]
    if "Siglip2" in type(model).__name__:
        from transformers.models.siglip2.image_processing_pil_siglip2 import (
            convert_image_to_patches,
        )

        patches = [torch.tensor(convert_image_to_patches(one.numpy(), 4)) for one in image]
        grid = torch.tensor([[n // 4 for n in image.shape[2:]]] * len(image))
        inputs = dict(pixel_values=torch.stack(patches), spatial_shapes=grid)
        inputs["pixel_attention_mask"] = torch.ones(inputs["pixel_values"].shape[:2])
    else:
        inputs = dict(pixel_values=image)
        if "Dino" not in type(model).__name__ and "DINO" not in type(model).__name__:
            inputs["interpolate_pos_encoding"] = True
    states = model(**inputs, output_hidden_states=True).hidden_states
    return [state[:, count:] for state in states]


def number_of_hooks(model: nn.Module) -> int:
    """transformers adds hooks of its own at the first call, once."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_taps_are_the_librarys_own_stream(teacher_of, family, size):
    teacher = teacher_of(family)
    image = normalized(picture(size), teacher.mean, teacher.std)
    with torch.no_grad():
        states = own_outputs(teacher, image)
    taps = teacher(image)
    grid = tuple(n // teacher.patch_size for n in size)
    assert len(taps) == teacher.num_layers == 3
    close = dict(rtol=1e-9, atol=1e-9)
    for index, tap in enumerate(taps):
        assert tap.input.shape == tap.mixer.shape == tap.output.shape == (2, *grid, 32)
        before, after = states[index : index + 2]
        if before is not None:
            torch.testing.assert_close(tap.input.flatten(1, 2), before, **close)
        torch.testing.assert_close(tap.output.flatten(1, 2), after, **close)
        # What enters the MLP is the input and what attention adds, nothing else.
        part = {n: getattr(teacher.family, n) for n in ("norm2", "fc1", "activation", "fc2")}
        part = {name: teacher.find(path, index) for name, path in part.items()}
        stream = tap.input + tap.mixer
        added = part["fc2"](part["activation"](part["fc1"](part["norm2"](stream))))
        scale = teacher.find(teacher.family.mlp_scale, index)
        torch.testing.assert_close(stream + added * (1 if scale is None else scale), tap.output)
        assert not tap.output.requires_grad and not tap.output.is_inference()


@pytest.mark.parametrize("family", ["dinov2", "timm-vit", "encoder"])
def test_indices_choose_the_taps_and_nothing_later_is_computed(teacher_of, family):
    teacher = teacher_of(family)
    image = normalized(picture(SIZES[1]), teacher.mean, teacher.std)
    everything, ran, hooks = teacher(image), [], number_of_hooks(teacher)
    last = teacher.find(teacher.family.blocks)[2]
    handle = last.register_forward_hook(lambda *_: ran.append(True))
    for indices in ([1, 0], [-2]):
        for index, tap in zip(indices, teacher(image, indices), strict=True):
            assert all(
                torch.equal(getattr(tap, n), getattr(everything[index], n)) for n in vars(tap)
            )
    handle.remove()
    assert not ran and len(teacher.find(teacher.family.blocks)) == 3
    assert number_of_hooks(teacher) == hooks
    for wrong in ([3], [-4], []):
        with pytest.raises(ValueError, match=r"indices: expected blocks between -3 and 2"):
            teacher(image, wrong)


def test_a_teacher_stays_as_it_is_inside_a_model_that_trains(teacher_of):
    teacher = teacher_of("encoder")
    before = {key: value.clone() for key, value in teacher.state_dict().items()}

    class Parent(BaseModule):
        def __init__(self) -> None:
            super().__init__()
            self.teacher, self.head = teacher, nn.Linear(32, 1).double()

    parent = Parent()
    parent.init_weights()
    parent.train()
    assert not any(m.training for m in teacher.modules()) and parent.head.training
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    # Its taps can be saved for a backward pass, and none reaches it.
    parent.head(teacher(picture(SIZES[0]), [0])[0].output).sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_what_a_local_perception_unit_adds_counts_as_the_mixers():
    teacher = EncoderTeacher(ENCODER | dict(mixer="cgspn")).double()
    random_weights(teacher.model)
    for index, tap in enumerate(teacher(picture(SIZES[1]) / 255)):
        block = teacher.model.blocks[index]
        stream = tap.input + tap.mixer
        torch.testing.assert_close(stream + block.mlp(block.norm2(stream)), tap.output)
        perceived = block.mixer_lpu.conv(tap.input.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        assert perceived.abs().mean() > 0.01


def test_images_are_converted_to_the_dtype_of_the_weights():
    teacher = EncoderTeacher(ENCODER).bfloat16()
    assert teacher(torch.rand(1, 3, 16, 16))[0].output.dtype == torch.bfloat16


def test_images_that_do_not_fit_are_refused(teacher_of):
    teacher = teacher_of("encoder")
    with pytest.raises(ValueError, match=r"patch size, 4; got 18 x 16. Resize or crop to 16 x 16"):
        teacher(torch.zeros(1, 3, 18, 16))
    with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\) for .*, got \(1, 4, 16, 16\)"):
        teacher(torch.zeros(1, 4, 16, 16))


def test_configs_of_a_distillation_name_them():
    assert type(MODELS.build(dict(type="EncoderTeacher", encoder=ENCODER))) is EncoderTeacher
    library("transformers")
    config = dict(model_type="vit", intermediate_size=48, image_size=16, **WIDTHS)
    teacher = MODELS.build(dict(type="TransformersTeacher", config=config))
    assert teacher.embed_dims == 32 and teacher.mean == (127.5,) * 3
    library("timm")
    teacher = MODELS.build(dict(type="TimmTeacher", name=TIMM["timm-dinov3"], **TIMM_OPTIONS))
    assert teacher.num_prefix_tokens == 5 and teacher.mean == pytest.approx(IMAGENET)


def test_normalization_is_what_the_folder_says(tmp_path: Path):
    save_transformers("siglip", tmp_path)
    assert TransformersTeacher(tmp_path).mean == (127.5,) * 3
    assert TransformersTeacher(tmp_path, mean=[1, 2, 3], std=[4, 5, 6]).std == (4.0, 5.0, 6.0)
    half = dict(image_mean=[0.5] * 3, image_std=[0.25] * 3)
    for said, mean, std in (
        (half, 127.5, 63.75),
        (half | dict(rescale_factor=1 / 127.5), 63.75, 31.875),
        (half | dict(do_rescale=False), 0.5, 0.25),
        (half | dict(do_normalize=False), 0.0, 255.0),
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
        teacher = TransformersTeacher(tmp_path)
        assert teacher.mean == pytest.approx((mean,) * 3), said
        assert teacher.std == pytest.approx((std,) * 3), said
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps(dict(image_processor=half)))
    assert TransformersTeacher(tmp_path).std == (63.75,) * 3


def test_image_and_text_models_give_their_vision_part(tmp_path: Path):
    transformers = library("transformers")
    text = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    text |= dict(vocab_size=20, max_position_embeddings=8, bos_token_id=0, eos_token_id=1)
    vision = WIDTHS | dict(intermediate_size=48, image_size=16)
    model = transformers.SiglipModel(
        transformers.SiglipConfig(vision_config=vision, text_config=text)
    )
    random_weights(model).save_pretrained(tmp_path)
    teacher = TransformersTeacher(tmp_path)
    expected = model.vision_model(torch.ones(1, 3, 16, 16), output_hidden_states=True)
    taps = teacher(torch.ones(1, 3, 16, 16))
    torch.testing.assert_close(taps[-1].output.flatten(1, 2), expected.hidden_states[3])


def test_weights_may_be_in_several_files(tmp_path: Path):
    model = save_transformers("dinov2", tmp_path / "one")
    model.save_pretrained(tmp_path / "several", max_shard_size="20KB")
    assert len(list((tmp_path / "several").glob("model-*.safetensors"))) > 2
    one, several = (TransformersTeacher(tmp_path / n).state_dict() for n in ("one", "several"))
    assert one.keys() == several.keys() and all(torch.equal(one[k], several[k]) for k in one)


def test_a_bin_file_is_read_as_data_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from mmengine.runner import CheckpointLoader

    monkeypatch.setattr(CheckpointLoader, "_schemes", dict(CheckpointLoader._schemes))
    monkeypatch.setenv(_FORCE_WEIGHTS_ONLY, "0")
    model = save_transformers("dinov2", tmp_path)
    from safetensors.torch import load_file

    (tmp_path / "model.safetensors").rename(tmp_path / "kept")
    torch.save(load_file(tmp_path / "kept"), tmp_path / "pytorch_model.bin")
    teacher = TransformersTeacher(tmp_path)
    assert torch.equal(teacher.find("norm1", 1).weight, model.encoder.layer[1].norm1.weight)
    torch.save({"weight": nn.Linear(1, 1)}, tmp_path / "pytorch_model.bin")
    protect_checkpoint_loading()
    with pytest.raises(CheckpointError, match=r"refused: loading it would run code.*Linear"):
        TransformersTeacher(tmp_path)


def test_incomplete_folders_are_named(tmp_path: Path):
    library("transformers")
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist, so there is no config"):
        TransformersTeacher(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no config.json; expected a folder with"):
        TransformersTeacher(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json: not readable as JSON"):
        TransformersTeacher(tmp_path)
    save_transformers("vit", tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        TransformersTeacher(tmp_path / "model.safetensors")
    assert "model.safetensors is a file; give its folder, with config" in str(caught.value)
    assert str(caught.value).endswith(f"path={str(tmp_path)!r}")
    other = tmp_path / "other"
    save_transformers("vit", other, intermediate_size=40)
    shutil.copy(other / "model.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match=r"9 tensors of ViTModel are missing .* or of"):
        TransformersTeacher(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"damaged" * 9)
    with pytest.raises(CheckpointError, match=r"weights are not readable"):
        TransformersTeacher(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model.safetensors, in one file or"):
        TransformersTeacher(tmp_path)
    with pytest.raises(ValueError, match=r"pass either path, .*, or config; got path=None"):
        TransformersTeacher()
    with pytest.raises(ValueError, match=r"got 'dinov4'; did you mean 'dinov2'"):
        TransformersTeacher(config=dict(model_type="dinov4"))


def test_missing_packages_say_what_to_install(monkeypatch: pytest.MonkeyPatch):
    for name in ("transformers", "timm"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'transformers>=5.18', or 'cgspn_seg\[dis"):
        TransformersTeacher("anywhere")
    with pytest.raises(ImportError, match=r"pip install 'timm>=1.0' torchvision, or 'cgspn_seg\["):
        TimmTeacher("vit_tiny_patch16_224")
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(__version__="4.57.6"))
    with pytest.raises(ImportError, match=r"needs transformers>=5.18, and 4.57.6 is installed"):
        TransformersTeacher("anywhere")


def test_what_timm_cannot_give_is_refused(tmp_path: Path):
    timm = library("timm")
    for name, options, match in (
        ("vit_tiny_patch16_225", {}, r"no model 'vit_tiny_patch16_225'; did you mean 'vit_tiny_pa"),
        ("resnet18", {}, r"cannot build resnet18 for any image size"),
        ("vit_relpos_small_patch16_224", {}, r"cannot build|expected VisionTransformer of Block"),
        ("vit_tiny_patch16_224", dict(pretrained=True), r"pretrained is set by the teacher"),
    ):
        with pytest.raises(ValueError, match=match):
            TimmTeacher(name, **options)
    file = tmp_path / "vit.pth"
    shallow = timm.create_model(TIMM["timm-vit"], **(TIMM_OPTIONS | {"depth": 2}))
    torch.save(shallow.state_dict(), file)
    with pytest.raises(CheckpointError, match=r"does not fit timm's vit_tiny.*\n.*12 missing in"):
        TimmTeacher(TIMM["timm-vit"], file, **TIMM_OPTIONS)
    with pytest.raises(FileNotFoundError, match=r"nowhere.pth"):
        TimmTeacher(TIMM["timm-vit"], tmp_path / "nowhere.pth", **TIMM_OPTIONS)


def test_our_encoder_is_loaded_whole_or_not_at_all(tmp_path: Path):
    weights = random_weights(MODELS.build(ENCODER)).state_dict()
    file = tmp_path / "iter_8.pth"
    torch.save({"state_dict": {f"backbone.{k}": v for k, v in weights.items()}}, file)
    teacher = EncoderTeacher(ENCODER, file, prefix="backbone")
    assert torch.equal(teacher.model.pos_embed, weights["pos_embed"])
    for prefix, said in (("", r"without a prefix"), ("student.", r"under the prefix 'student\.'")):
        way_out = (
            rf"{len(weights)} of {len(weights)} are under 'backbone\.'. Set it: .*teacher.prefix"
        )
        with pytest.raises(
            CheckpointError, match=rf"no tensor of \S+ is .* {said}; {way_out}=back"
        ):
            EncoderTeacher(ENCODER, file, prefix=prefix)
    shallow = {**ENCODER, "arch": {**ENCODER["arch"], "num_layers": 4}}
    with pytest.raises(CheckpointError, match=r"does not fit the model: .*\n.*missing in the file"):
        EncoderTeacher(shallow, file, prefix="backbone.")
    torch.save({"fc.weight": torch.ones(1)}, file)
    with pytest.raises(CheckpointError, match=r"no key begins with 'student.'; it begins with fc."):
        EncoderTeacher(ENCODER, file, prefix="student.")
    with pytest.raises(ValueError, match=r"expected dict\(type='CGSPN', ...\), got .*'ResNet'"):
        EncoderTeacher(dict(type="ResNet"))
    with pytest.raises(ValueError, match=r"mean: expected a value for each of 4 channels"):
        EncoderTeacher(ENCODER | dict(in_channels=4))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_our_encoder_is_built_from_the_config_in_its_file(tmp_path: Path, suffix: str):
    config = ENCODER | dict(gelu="none", norm_eps=1e-3)
    model = random_weights(MODELS.build(config))
    file, facts = tmp_path / f"encoder{suffix}", {"config": json.dumps(config)}
    file.write_bytes(encode_backbone(model.state_dict(), facts, suffix))
    image = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = model(image)[0].permute(0, 2, 3, 1)
    for encoder in (None, config):
        torch.testing.assert_close(EncoderTeacher(encoder, file)(image)[-1].output, expected)
    with pytest.raises(ValueError) as caught:
        EncoderTeacher(ENCODER, file)
    said = str(caught.value)
    assert f"{file} was made with other options" in said
    assert "gelu is 'none' in the file and 'tanh' in EncoderTeacher's encoder" in said
    assert "Set gelu='none', norm_eps=0.001 in EncoderTeacher's encoder" in said
    other = facts | {"config": json.dumps(dict(type="GSPN"))}
    file.write_bytes(encode_backbone(model.state_dict(), other, suffix))
    with pytest.raises(ValueError, match=r"the config inside \S+: expected dict\(type='CGSPN'"):
        EncoderTeacher(checkpoint=file)


def test_our_encoder_needs_a_config_from_somewhere(tmp_path: Path):
    file = tmp_path / "iter_8.pth"
    torch.save({"meta": {"iter": 8}, "state_dict": MODELS.build(ENCODER).state_dict()}, file)
    with pytest.raises(CheckpointError, match=r"iter_8.pth has no encoder's config inside; expec"):
        EncoderTeacher(checkpoint=file)
    with pytest.raises(ValueError, match=r"pass encoder, .* or checkpoint, .*; got neither"):
        EncoderTeacher()
    with pytest.raises(FileNotFoundError, match=r"nowhere.pth does not exist"):
        EncoderTeacher(checkpoint=tmp_path / "nowhere.pth")


def test_every_family_is_of_a_registered_model_type():
    """The names in the tests' table are those that config.json files have."""
    transformers = library("transformers")
    kinds = {getattr(transformers, config).model_type for _, config, _ in TRANSFORMERS.values()}
    from cgspn_seg.models.distillation.teachers.huggingface import _MODELS

    assert kinds <= set(_MODELS) and set(_MODELS) - kinds == {"siglip", "siglip2"}
