"""tools/export_backbone.py: what it takes, what it writes, and what it refuses."""

import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.registry import DefaultScope
from mmengine.runner import CheckpointLoader
from mmseg.registry import MODELS
from safetensors import safe_open
from torch import nn

from cgspn_seg.checkpoints import CheckpointError, pretrained
from cgspn_seg.checkpoints.export import file_sha256, read_backbone, tensors_sha256
from cgspn_seg.checkpoints.loading import _FORCE_WEIGHTS_ONLY
from cgspn_seg.version import __version__

SUFFIXES = (".safetensors", ".pth")
CONFIG = """
custom_imports = dict(imports=["cgspn_seg.models"])
encoder = dict(
    type="CGSPN", patch_size=4, img_size=32, mixer=["cgspn", "attention"], out_indices=(0, 1),
    init_cfg=dict(type="Pretrained", checkpoint="/nowhere/start.pth"),
    arch=dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32, latent_dims=8),
)
head = dict(
    type="FCNHead", in_channels=16, in_index=0, channels=8, num_convs=1, num_classes=3,
    norm_cfg=dict(type="BN"),
)
model = dict(type="EncoderDecoder", backbone=encoder, decode_head=head)
{student}
train_dataloader = dict(dataset=dict(type="BaseSegDataset"))
"""


@dataclass(frozen=True)
class Bench:
    """A config, a checkpoint of its model, and the tool."""

    folder: Path
    config: Path
    checkpoint: Path
    call: Callable[..., None]

    def export(self, name: str, *options: object) -> Path:
        self.call(self.config, self.checkpoint, self.folder / name, *options)
        return self.folder / name

    def refuses(self, match: str, name: str, *options: object, kind: type = CheckpointError):
        """Check that an export is refused and leaves nothing behind."""
        before = {path: path.read_bytes() for path in self.folder.iterdir()}
        with pytest.raises(kind, match=match):
            self.export(name, *options)
        assert {path: path.read_bytes() for path in self.folder.iterdir()} == before


@pytest.fixture
def tool(repository: Path) -> ModuleType:
    """The tool as a module."""
    path = repository / "tools" / "export_backbone.py"
    spec = importlib.util.spec_from_file_location("export_backbone", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bench(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A segmentor as MMEngine saves it, with an optimizer's state beside it."""
    monkeypatch.setattr(CheckpointLoader, "_schemes", dict(CheckpointLoader._schemes))
    monkeypatch.setenv(_FORCE_WEIGHTS_ONLY, "0")

    def call(*arguments: object) -> None:
        monkeypatch.setattr("sys.argv", ["export_backbone.py", *map(str, arguments)])
        tool.main()

    config, checkpoint = tmp_path / "tiny.py", tmp_path / "iter_8.pth"
    config.write_text(CONFIG.format(student=""))
    content = {
        "meta": {"iter": 8, "epoch": 0, "experiment_name": "tiny_run"},
        "state_dict": segmentor(config).state_dict(),
        "optimizer": {"state": {0: {"step": torch.tensor(8.0)}}},
    }
    torch.save(content, checkpoint)
    return Bench(tmp_path, config, checkpoint, call)


def segmentor(config: Path) -> nn.Module:
    with DefaultScope.overwrite_default_scope("mmseg"):
        return MODELS.build(Config.fromfile(config).model)


def backbone_of(state_dict: dict, prefix: str = "backbone.") -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}


def pretrained_backbone(
    path: Path, monkeypatch: pytest.MonkeyPatch, **changes: object
) -> tuple[nn.Module, str]:
    """A backbone of the config inside the file, begun from the file, and what was said of it."""
    said: list[str] = []
    monkeypatch.setattr(pretrained, "print_log", lambda message, **_: said.append(message))
    config = json.loads(read_backbone(path).facts["config"]) | changes
    with DefaultScope.overwrite_default_scope("mmseg"):
        backbone = MODELS.build(
            config | {"init_cfg": dict(type="Pretrained", checkpoint=str(path))}
        )
        backbone.init_weights()
    return backbone, said[0]


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_export_is_what_init_cfg_loads_whole(bench: Bench, suffix: str, monkeypatch):
    out = bench.export(f"encoder{suffix}")
    backbone, said = pretrained_backbone(out, monkeypatch)
    stored = backbone_of(torch.load(bench.checkpoint)["state_dict"])
    number = len(stored)
    assert f"loaded {number} of {number} tensors of CGSPN" in said and "rest" not in said
    assert same(backbone.state_dict(), stored)
    assert out.stat().st_size < bench.checkpoint.stat().st_size


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_an_export_loads_at_another_size(bench: Bench, suffix: str, dtype: str, monkeypatch):
    out = bench.export(f"encoder{suffix}", "--dtype", dtype)
    stored = read_backbone(out).tensors
    assert {t.dtype for t in stored.values()} == {getattr(torch, dtype)}
    backbone, said = pretrained_backbone(out, monkeypatch, img_size=[48, 64])
    assert f"loaded {len(stored)} of {len(stored)}" in said and "rest" not in said
    own = backbone.state_dict()
    assert stored["pos_embed"].shape == (1, 8, 8, 16) and own["pos_embed"].shape == (1, 12, 16, 16)
    assert own["pos_embed"].std() > 0.5 * stored["pos_embed"].float().std()
    del own["pos_embed"]
    assert all(torch.equal(own[key], stored[key].float()) for key in own)
    assert backbone(torch.zeros(1, 3, 48, 64))[0].shape == (1, 16, 12, 16)


def test_both_containers_say_the_same(bench: Bench, capsys):
    files = [read_backbone(bench.export(f"encoder{suffix}")) for suffix in SUFFIXES]
    facts = [dict(file.facts) for file in files]
    assert facts[0].pop("format") == "pt"
    assert facts[0] == facts[1] and same(files[0].tensors, files[1].tensors)
    assert all(file.is_intact and file.facts["tensors_sha256"] == file.sha256 for file in files)
    config = json.loads(facts[0].pop("config"))
    assert "init_cfg" not in config and config["mixer"] == ["cgspn", "attention"]
    assert facts[0] == {
        "file_format": "cgspn_seg.backbone",
        "file_format_version": "1",
        "cgspn_seg_version": __version__,
        "torch_version": torch.__version__,
        "tensors_sha256": files[0].sha256,
        "config_file": "tiny.py",
        "source": "iter_8.pth",
        "source_sha256": file_sha256(bench.checkpoint),
        "source_prefix": "backbone.",
        "weights": "state_dict (the checkpoint has no second, EMA or not)",
        "iteration": "8",
        "epoch": "0",
        "trained_as": "tiny_run",
        "dataset": "BaseSegDataset",
    }
    said = capsys.readouterr().out
    assert said.count(f"{files[0].sha256} (verified)") == 2
    with safe_open(bench.folder / "encoder.safetensors", "pt") as file:
        assert "pos_embed" in file.keys()  # noqa: SIM118 (it has no other way)
    assert set(torch.load(bench.folder / "encoder.pth", weights_only=True)) == {
        "meta",
        "state_dict",
    }


def test_the_hash_tells_names_dtypes_shapes_and_values_apart():
    one = torch.arange(4.0)
    sets = [
        {"a": one},
        {"b": one},
        {"a": one.half()},
        {"a": one.reshape(2, 2)},
        {"a": one + 1},
        {"a": one[:2], "b": one[2:]},
        {"a": one.view(torch.int32)},
    ]
    assert len({tensors_sha256(tensors) for tensors in sets}) == len(sets)
    matrix = torch.arange(6.0).reshape(2, 3)
    assert tensors_sha256({"a": matrix.T, "b": one[0]}) == tensors_sha256(
        {"b": one[0].clone(), "a": matrix.T.contiguous()}
    )


def test_views_and_memory_formats_are_stored_plain(bench: Bench):
    content = torch.load(bench.checkpoint)
    weights = content["state_dict"]
    key = "backbone.patch_embed.projection.weight"
    weights[key] = weights[key].to(memory_format=torch.channels_last)
    weights["backbone.pos_embed"] = torch.cat([weights["backbone.pos_embed"]] * 50)[7:8]
    torch.save(content, bench.checkpoint)
    for suffix in SUFFIXES:
        file = read_backbone(bench.export(f"encoder{suffix}"))
        assert all(t.is_contiguous() for t in file.tensors.values())
        assert same(file.tensors, backbone_of(weights))
        size = sum(t.nbytes for t in file.tensors.values())
        assert (bench.folder / f"encoder{suffix}").stat().st_size < size + 30_000


def test_averaged_weights_are_preferred_as_mmengines_hook_saves_them(bench: Bench, capsys):
    """The hook swaps the two as it saves: the averages are in `state_dict`."""
    model = segmentor(bench.config)
    started = {key: value.clone() for key, value in model.state_dict().items()}
    hook, runner = EMAHook(momentum=0.5), SimpleNamespace(model=model, iter=0, epoch=0)
    hook.before_run(runner)
    hook.after_train_iter(runner, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    hook.after_train_iter(runner, 1)
    content = {"meta": {}, "state_dict": dict(model.state_dict())}
    trained = backbone_of({key: value.clone() for key, value in model.state_dict().items()})
    hook.before_save_checkpoint(runner, content)
    torch.save(content, bench.checkpoint)

    averaged = read_backbone(bench.export("averaged.pth"))
    assert "EMA (state_dict, where EMAHook puts the averages)" in capsys.readouterr().out
    assert torch.allclose(averaged.tensors["pos_embed"], started["backbone.pos_embed"] + 0.5)
    plain = read_backbone(bench.export("plain.pth", "--no-ema"))
    assert "as trained, not EMA" in capsys.readouterr().out
    assert same(plain.tensors, trained) and averaged.sha256 != plain.sha256
    assert "epoch" not in plain.facts, "what is not known is not there"

    content["ema_state_dict"] = dict(model.state_dict())
    torch.save(content, bench.checkpoint)
    bench.refuses(r"not by MMEngine's EMAHook", "other.pth")


def test_a_student_is_taken_by_its_prefix(bench: Bench):
    content = torch.load(bench.checkpoint)
    weights = content["state_dict"]
    content["state_dict"] = {f"student.{key}": value for key, value in weights.items()}
    content["state_dict"]["teacher.weight"] = torch.ones(3)
    torch.save(content, bench.checkpoint)
    student = "model = dict(type='Distiller', student=model, teacher=dict(type='Other'))"
    bench.config.write_text(CONFIG.format(student=student))
    file = read_backbone(bench.export("student.pth", "--prefix", "student.backbone"))
    assert same(file.tensors, backbone_of(weights))
    assert file.facts["source_prefix"] == "student.backbone."
    proposed = r"no 'backbone' .* it has student, teacher; pass --prefix student\.backbone\."
    bench.refuses(proposed, "x.pth", kind=ValueError)
    whole = ("x.pth", "--prefix", "student.")
    bench.refuses(r"pass --prefix student\.backbone\.", *whole, kind=ValueError)


def test_an_encoder_that_is_the_student_itself_is_proposed(bench: Bench):
    content = torch.load(bench.checkpoint)
    weights = backbone_of(content["state_dict"])
    content["state_dict"] = {f"student.{key}": value for key, value in weights.items()}
    torch.save(content, bench.checkpoint)
    bench.refuses(
        r"the file has.* student .*It is of a distillation: .* --prefix student\.", "x.pth"
    )
    student = "model = dict(type='Distiller', student=encoder, teacher=dict(type='Other'))"
    bench.config.write_text(CONFIG.format(student=student))
    bench.refuses(r"it has student, teacher; pass --prefix student\.$", "x.pth", kind=ValueError)
    wrong = ("x.pth", "--prefix", "student.backbone")
    bench.refuses(r"has no parts; pass --prefix student\.$", *wrong, kind=ValueError)
    assert same(read_backbone(bench.export("x.pth", "--prefix", "student.")).tensors, weights)


def test_what_does_not_fit_the_config_is_refused(bench: Bench):
    arch = "model.backbone.arch.latent_dims=4"
    bench.refuses(r"iter_8.pth does not fit .*\n.*of another shape", "x.pth", "--cfg-options", arch)
    size = "model.backbone.img_size=64"
    bench.refuses(r"pos_embed is .*another img_size", "x.pth", "--cfg-options", size)
    content = torch.load(bench.checkpoint)
    complete = content["state_dict"]
    for changed, match in (
        ({k: v for k, v in complete.items() if k != "backbone.pos_embed"}, r"1 missing in the"),
        (complete | {"backbone.cls_token": torch.ones(1)}, r"1 unexpected in .*: cls_token"),
        (backbone_of(complete), r"no key begins with 'backbone\.'; the file has.* blocks \(\d+\)"),
        (complete | {"backbone.pos_embed": [1.0]}, r"pos_embed: expected a dense tensor"),
        (
            complete | {"backbone.pos_embed": complete["backbone.pos_embed"] / 0},
            r"pos_embed has numbers that are not finite: the training diverged",
        ),
    ):
        torch.save(content | {"state_dict": changed}, bench.checkpoint)
        bench.refuses(match, "x.pth")
    large = complete | {"backbone.pos_embed": complete["backbone.pos_embed"] * 1e9}
    torch.save(content | {"state_dict": large}, bench.checkpoint)
    bench.refuses(r"does not fit into float16", "x.pth", "--dtype", "float16")


def test_files_are_replaced_only_by_force_and_never_the_checkpoint(bench: Bench):
    bench.export("encoder.pth")
    first = (bench.folder / "encoder.pth").read_bytes()
    bench.refuses(r"encoder.pth exists; pass --force", "encoder.pth", kind=ValueError)
    bench.export("encoder.pth", "--force", "--dtype", "float16")
    assert (bench.folder / "encoder.pth").read_bytes() != first
    bench.refuses(r"is CHECKPOINT itself", "iter_8.pth", "--force", kind=ValueError)
    bench.refuses(r"ends in \.safetensors or \.pth, got .*x\.pt$", "x.pt", kind=ValueError)


def test_a_checkpoint_that_would_run_code_is_refused(bench: Bench):
    torch.save({"state_dict": {"backbone.weight": nn.Linear(1, 1)}}, bench.checkpoint)
    bench.refuses(r"iter_8.pth: refused: loading it would run code.*Linear", "x.pth")
    with pytest.raises(CheckpointError, match=r"refused: loading it would run code"):
        bench.call("--info", bench.checkpoint)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_info_finds_a_flipped_bit(bench: Bench, suffix: str, capsys):
    out = bench.export(f"encoder{suffix}")
    capsys.readouterr()
    bench.call(out)  # a file alone means --info
    assert "(verified)" in capsys.readouterr().out
    weight = read_backbone(out).tensors["patch_embed.projection.weight"].numpy().tobytes()
    content = bytearray(out.read_bytes())
    content[content.index(weight) + 5] ^= 1
    out.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged"):
        bench.call("--info", out)
    assert "(NOT what is in the file)" in capsys.readouterr().out


def test_info_shows_a_hash_that_was_changed_with_the_tensors_left(bench: Bench):
    out = bench.export("encoder.pth")
    content = torch.load(out)
    content["state_dict"]["pos_embed"][0, 0, 0, 0] += 1
    torch.save(content, out)
    with pytest.raises(CheckpointError, match=r"its tensors hash to [0-9a-f]{64}, and [0-9a-f]"):
        bench.call("--info", out)


def test_info_takes_backbone_files_of_a_known_version_only(bench: Bench):
    with pytest.raises(CheckpointError, match=r"iter_8.pth: not a backbone file"):
        bench.call("--info", bench.checkpoint)
    out = bench.export("encoder.pth")
    content = torch.load(out)
    content["meta"]["file_format_version"] = "2"
    torch.save(content, out)
    with pytest.raises(CheckpointError, match=r"version 2, .*reads cgspn_seg.backbone, version 1"):
        bench.call("--info", out)


def test_the_command_line_is_one_or_the_other(bench: Bench, capsys):
    for arguments in ((), (bench.config,), (bench.config, bench.checkpoint, "--info", "x.pth")):
        with pytest.raises(SystemExit):
            bench.call(*arguments)
        assert re.search(r"expected CONFIG CHECKPOINT OUT, or --info", capsys.readouterr().err)
