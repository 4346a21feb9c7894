"""tools/convert_checkpoint.py: from a teacher's files to a file that a student begins with, and
from GSPN's original code to our encoder."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmengine.registry import DefaultScope
from mmengine.runner import CheckpointLoader
from mmseg.registry import MODELS
from torch import nn

from cgspn_seg.checkpoints import CheckpointError, pretrained
from cgspn_seg.checkpoints.export import read_backbone
from cgspn_seg.checkpoints.loading import _FORCE_WEIGHTS_ONLY
from cgspn_seg.models import GSPN_ARCHITECTURES
from cgspn_seg.models.distillation import TransformersTeacher
from tests.test_checkpoints import gspn_v1_files
from tests.test_checkpoints.gspn_v1_files import DEEP
from tests.test_models import transcription
from tests.test_models.test_distillation.teachers import (
    ENCODER,
    TIMM,
    TIMM_OPTIONS,
    library,
    make_teacher,
    random_weights,
    save_transformers,
)

CONFIG = """
custom_imports = dict(imports=["cgspn_seg.models"])
encoder = dict(
    type="CGSPN", patch_size=8, mixer=["cgspn", "attention", "cgspn"], out_indices=(0, 2),
    img_size=32, gelu="none",
    arch=dict(embed_dims=32, num_layers=3, num_heads=2, feedforward_channels=64, latent_dims=8),
)
model = dict(type="EncoderDecoder", backbone=encoder)
"""
Convert = Callable[..., Path]


@pytest.fixture
def convert(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Convert:
    """Runs the tool; the result is OUT."""
    monkeypatch.setattr(CheckpointLoader, "_schemes", dict(CheckpointLoader._schemes))
    monkeypatch.setenv(_FORCE_WEIGHTS_ONLY, "0")
    path = repository / "tools" / "convert_checkpoint.py"
    spec = importlib.util.spec_from_file_location("convert_checkpoint", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def call(teacher: object, name: str, *options: object) -> Path:
        arguments = [teacher, tmp_path / name, *options]
        monkeypatch.setattr("sys.argv", ["convert_checkpoint.py", *map(str, arguments)])
        tool.main()
        return tmp_path / name

    return call


@pytest.fixture
def dino(tmp_path: Path) -> Path:
    """A folder with a DINOv2."""
    save_transformers("dinov2", tmp_path / "dino")
    return tmp_path / "dino"


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A backbone file of an attention encoder, which needs no optional package."""
    from cgspn_seg.checkpoints.export import encode_backbone, take_backbone

    model = random_weights(MODELS.build(ENCODER))
    tensors = take_backbone(model.state_dict(), "", "encoder")
    path = tmp_path / "encoder.safetensors"
    path.write_bytes(encode_backbone(tensors, {"config": json.dumps(ENCODER)}, ".safetensors"))
    return path


def begun(path: Path, monkeypatch: pytest.MonkeyPatch, **changes: object) -> tuple[nn.Module, str]:
    """A backbone of the config inside, begun from the file, and what was said of it."""
    said: list[str] = []
    monkeypatch.setattr(pretrained, "print_log", lambda message, **_: said.append(message))
    config = json.loads(read_backbone(path).facts["config"]) | changes
    with DefaultScope.overwrite_default_scope("mmseg"):
        backbone = MODELS.build(
            config | {"init_cfg": dict(type="Pretrained", checkpoint=str(path))}
        )
        backbone.init_weights()
    return backbone, said[0]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_student_begins_with_the_file_every_key_accounted_for(
    dino: Path, convert: Convert, suffix: str, monkeypatch, capsys
):
    out = convert(dino, f"student{suffix}")
    said = capsys.readouterr().out
    assert "26 of 26 tensors from Dinov2Model (transformers 5" in said
    assert "matched" in said and "blocks.*.mlp.fc1.weight" in said and "unused" in said
    assert "embeddings.cls_token" in said and "normalization of images" not in said
    file = read_backbone(out)
    assert file.is_intact and file.facts["source"] == "dino"
    config = json.loads(file.facts["config"])
    assert config["mixer"] == "cgspn" and config["gelu"] == "none" and config["norm_eps"] == 1e-6
    assert config["arch"] == dict(
        embed_dims=32, num_layers=3, num_heads=2, feedforward_channels=64, latent_dims=32
    )
    assert json.loads(file.facts["tensors_of_source"])["blocks.*.norm1.weight"] == 3
    student, message = begun(out, monkeypatch, img_size=64)
    count = len(student.state_dict())
    assert f"loaded {count} of {count} tensors of CGSPN" in message and "rest" not in message
    teacher = TransformersTeacher(dino)
    for index, block in enumerate(student.blocks):
        assert torch.equal(block.norm2.weight, teacher.find("norm2.weight", index))
        scale = teacher.find("layer_scale2.lambda1", index)
        expected = teacher.find("mlp.fc2.weight", index) * scale[:, None]
        torch.testing.assert_close(block.mlp.fc2.weight, expected)
        assert block.mixer.coefficients.weight.std() > 0.01
    assert student(torch.zeros(1, 3, 8, 12))[0].shape == (1, 32, 2, 3)


def test_what_is_random_is_so_by_its_seed(encoder: Path, convert: Convert):
    files = [read_backbone(convert(encoder, f"{n}.pth", "--seed", n)) for n in (3, 4)]
    again = read_backbone(convert(encoder, "again.pth", "--seed", 3))
    assert again.sha256 == files[0].sha256 != files[1].sha256
    mixers = {key for key, value in again.tensors.items() if ".mixer" in key and value.std() > 0}
    for key, value in files[1].tensors.items():
        differs = not torch.equal(value, again.tensors[key])
        assert not differs or key in mixers


def test_the_teachers_normalization_can_be_kept(dino: Path, convert: Convert, capsys):
    half = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    (dino / "preprocessor_config.json").write_text(json.dumps(half))
    folded = read_backbone(convert(dino, "folded.pth"))
    assert "normalization of images: the teacher's is folded" in capsys.readouterr().out
    kept = read_backbone(convert(dino, "kept.pth", "--keep-normalization"))
    assert "data_preprocessor: mean=[127.5, 127.5, 127.5]" in capsys.readouterr().out
    assert json.loads(kept.facts["image_std"]) == [127.5] * 3
    assert json.loads(folded.facts["image_std"]) == [58.395, 57.12, 57.375]
    own = TransformersTeacher(dino).patch_kernel()
    key = "patch_embed.projection.weight"
    torch.testing.assert_close(kept.tensors[key], own[0])
    assert not torch.allclose(folded.tensors[key], own[0])
    # As a teacher of its own, such a file says what its images are.
    chained = read_backbone(convert(convert(dino, "a.pth", "--keep-normalization"), "b.pth"))
    torch.testing.assert_close(chained.tensors[key], folded.tensors[key])


def test_a_students_config_decides(dino: Path, convert: Convert, tmp_path: Path, capsys):
    config = tmp_path / "student.py"
    config.write_text(CONFIG)
    file = read_backbone(convert(dino, "student.pth", config))
    said = capsys.readouterr().out
    assert "4 to 8 pixels a side (pseudo-inverse)" in said
    assert json.loads(file.facts["config"])["patch_size"] == 8
    assert file.tensors["pos_embed"].shape == (1, 4, 4, 32)
    teacher = TransformersTeacher(dino)
    scale = teacher.find("layer_scale1.lambda1", 1)
    expected = teacher.find("attention.o_proj.weight", 1) * scale[:, None]
    torch.testing.assert_close(file.tensors["blocks.1.mixer.proj.weight"], expected)
    with pytest.raises(ValueError, match=r"GELU is gelu='none', the student's gelu='tanh'; set"):
        convert(dino, "x.pth", config, "--cfg-options", "model.backbone.gelu=tanh")
    with pytest.raises(ValueError, match=r"the config's model has no 'student' with a type"):
        convert(dino, "x.pth", config, "--prefix", "student")
    assert not (tmp_path / "x.pth").exists()


def test_weights_of_timm_are_named(convert: Convert, tmp_path: Path):
    library("timm")
    make_teacher("timm-vit", tmp_path)
    options = [f"{key}={value}" for key, value in TIMM_OPTIONS.items()]
    weights = tmp_path / "model.safetensors"
    out = convert(weights, "student.pth", "--timm", TIMM["timm-vit"], "--timm-options", *options)
    assert read_backbone(out).facts["source_model"].startswith(f"{TIMM['timm-vit']} (timm 1.")


def test_a_size_by_name_and_mixers(encoder: Path, convert: Convert, tmp_path: Path):
    file = read_backbone(convert(encoder, "lean.pth", "--mixer", "cgspn-lean", "--patch-size", 6))
    config = json.loads(file.facts["config"])
    assert (config["mixer"], config["patch_size"], config["img_size"]) == (
        "cgspn-lean",
        6,
        [24, 24],
    )
    with pytest.raises(ValueError, match=r"the student has 192 channels .*, the teacher 32"):
        convert(encoder, "x.pth", "--arch", "tiny")


def test_what_does_not_match_is_refused_and_nothing_written(
    encoder: Path, convert: Convert, tmp_path: Path
):
    config = tmp_path / "slim.py"
    config.write_text(CONFIG.replace("channels=64", "channels=40"))
    gelu = ("--cfg-options", "model.backbone.gelu=tanh")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=r"would fill 22 of the 31 .*\(71%, at least 90%"):
        convert(encoder, "x.pth", config, *gelu)
    (tmp_path / "plain.pth").write_bytes(b"")
    for teacher, name, match, kind in (
        ("nowhere", "x.pth", r"nowhere does not exist", FileNotFoundError),
        (tmp_path, "x.pth", r"has no config.json|transformers", (FileNotFoundError, ImportError)),
        (encoder, "x.bin", r"OUT: expected a file that ends in .safetensors or .pth", ValueError),
        (encoder, "encoder.safetensors", r"OUT: .* is TEACHER itself", ValueError),
        (encoder, "plain.pth", r"plain.pth exists; pass --force", ValueError),
        (config, "x.pth", r"slim.py", CheckpointError),
    ):
        with pytest.raises(kind, match=match):
            convert(teacher, name)
    (tmp_path / "plain.pth").unlink()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    out = convert(encoder, "x.pth", config, *gelu, "--min-match", 0.6)
    assert read_backbone(out).tensors["blocks.0.mlp.fc1.weight"].shape == (40, 32)


def test_a_file_of_unknown_kind_is_explained(convert: Convert, tmp_path: Path):
    torch.save({"weight": torch.ones(1)}, tmp_path / "vit.pth")
    with pytest.raises(CheckpointError, match=r"not a backbone file, (.|\n)*need --timm NAME"):
        convert(tmp_path / "vit.pth", "x.pth")


def test_options_that_would_be_ignored_are_refused(convert: Convert, capsys):
    for options in (
        ("--cfg-options", "model.backbone.gelu=tanh"),
        ("config.py", "--mixer", "attention"),
        ("--timm-options", "img_size=32"),
    ):
        with pytest.raises(SystemExit):
            convert("teacher", "x.pth", *options)
        assert "error: --" in capsys.readouterr().err


@pytest.fixture
def original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What training in GSPN's original code saves; its tiny size has few channels here."""
    monkeypatch.setitem(GSPN_ARCHITECTURES, "tiny", DEEP)
    averages = gspn_v1_files.random_weights(DEEP, torch.float32)
    trained = {key: value + 1 for key, value in averages.items()}
    gspn_v1_files.save(tmp_path / "ckpt_epoch_3.pth", trained, averages)
    return tmp_path / "ckpt_epoch_3.pth"


def test_an_original_gspn_becomes_an_encoder(
    original: Path, convert: Convert, monkeypatch: pytest.MonkeyPatch, capsys
):
    out = convert(original, "gspn.safetensors", "--compat", "gspn-v1")
    said = capsys.readouterr().out
    assert "346 of 352 tensors of GSPN tiny from ckpt_epoch_3.pth: model_ema (EMA)" in said
    for text in ("stages.*.*.mixer.grn.weight", "18", "layers.*.blocks.*.op.grn.gamma", "unused"):
        assert text in said
    file = read_backbone(out)
    assert file.is_intact and file.facts["source_model"] == "GSPN tiny (original code)"
    assert json.loads(file.facts["config"]) == dict(
        type="GSPN", arch="tiny", mixer_options=dict(compat="gspn-v1")
    )
    encoder, message = begun(out, monkeypatch)
    assert "loaded 352 of 352 tensors of GSPN" in message and "rest" not in message
    image = torch.randn(1, 3, 64, 64)
    weights = gspn_v1_files.random_weights(DEEP, torch.float32)
    with torch.no_grad():
        expected = transcription.gspn_v1(weights, image, DEEP.depths, DEEP.global_stages)
        torch.testing.assert_close(encoder(image)[3], expected[3], rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="needs square feature maps"):
        encoder(torch.zeros(1, 3, 64, 96))
    trained = read_backbone(convert(original, "b.pth", "--compat", "gspn-v1", "--no-ema"))
    assert trained.facts["weights"] == "model (as trained)"
    key = "downsamplings.0.second.norm.bias"
    torch.testing.assert_close(trained.tensors[key], file.tensors[key] + 1)


def test_an_original_that_does_not_fit_is_refused(
    original: Path, convert: Convert, encoder: Path, tmp_path: Path, capsys
):
    compat = ("--compat", "gspn-v1")
    for source, options, match in (
        (
            original,
            ("--arch", "small"),
            r"does not fit .* from 108 on(.|\n)*expected \(54, 3, 3, 3\)",
        ),
        (encoder, (), "encoder.safetensors: not a checkpoint of GSPN's original"),
    ):
        with pytest.raises(CheckpointError, match=match):
            convert(source, "x.pth", *compat, *options)
    with pytest.raises(ValueError, match=r"CHECKPOINT itself"):
        convert(original, original.name, *compat, "--force")
    for options, said in (
        ((*compat, "--mixer", "attention"), "mixer has no effect"),
        (("config.py", *compat), "config has no effect"),
        ((*compat, "--min-match", "0.5"), "min-match has no effect"),
        (("--no-ema",), "--no-ema is for checkpoints with --compat"),
    ):
        with pytest.raises(SystemExit):
            convert(original, "x.pth", *options)
        assert said in capsys.readouterr().err
    assert not (tmp_path / "x.pth").exists()
