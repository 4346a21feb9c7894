"""Every shipped config parses, builds, and is what its name says."""

import logging
import re
import warnings
from pathlib import Path

import mmseg
import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.optim import build_optim_wrapper
from mmengine.runner import Runner
from mmseg.apis import MMSegInferencer
from mmseg.registry import MODELS

from cgspn_seg import compat
from cgspn_seg.datasets import check_data_paths
from cgspn_seg.models.backbones.base import Encoder
from cgspn_seg.models.checks import check_channels, check_sizes

CONFIGS = Path(__file__).parent.parent / "configs"
COMPLETE = sorted(p for p in CONFIGS.rglob("*.py") if "_base_" not in p.parts)
NAME = re.compile(
    r"(?P<family>cgspn|vit|gspn|gspn2)-(?P<arch>[a-z0-9]+)(-p(?P<patch>\d+))?(?P<distilled>-distilled)?"
    r"_upernet_(?P<gpus>\d+)xb(?P<batch>\d+)"
    r"-(?P<thousands>[\d.]+)k_(?P<data>ade20k|camvid)-(?P<height>\d+)x(?P<width>\d+)"
)
FAMILIES = dict(
    cgspn=dict(type="CGSPN", mixer="cgspn"),
    vit=dict(type="CGSPN", mixer="attention"),
    gspn=dict(type="GSPN"),
    gspn2=dict(type="GSPN2"),
)
DATASETS = dict(ade20k="ADE20KDataset", camvid="CamVidDataset")

pytestmark = pytest.mark.usefixtures("mmseg_scope")

DISTILLATION = [path for path in COMPLETE if path.parent.name == "distillation"]
SEGMENTORS = [path for path in COMPLETE if path not in DISTILLATION]

each_config = pytest.mark.parametrize("path", COMPLETE, ids=lambda path: path.stem)
each_segmentor = pytest.mark.parametrize("path", SEGMENTORS, ids=lambda path: path.stem)
each_distillation = pytest.mark.parametrize("path", DISTILLATION, ids=lambda path: path.stem)
each_named_config = pytest.mark.parametrize(
    "path", [p for p in SEGMENTORS if p.parent.name != "demo"], ids=lambda path: path.stem
)


def crop_of(cfg: Config) -> tuple[int, int]:
    (crop,) = (t.crop_size for t in cfg.train_dataloader.dataset.pipeline if t.type == "RandomCrop")
    return tuple(crop)


@each_segmentor
def test_the_model_builds_and_its_parts_and_sizes_fit(path, caplog):
    cfg = Config.fromfile(path)
    with torch.device("meta"):
        model = MODELS.build(cfg.model).eval()
        size = cfg.model.data_preprocessor.size
        logits = model(torch.empty(2, 3, *size), mode="tensor")
    assert isinstance(model.backbone, Encoder)
    check_channels(model)
    check_sizes(model, logging.getLogger("test"))
    assert not caplog.records
    assert logits.shape[:2] == (2, model.decode_head.num_classes)
    assert model.auxiliary_head.num_classes == model.decode_head.num_classes


@each_config
def test_the_schedule_ends_with_the_training_and_scores_the_last_weights(path):
    cfg = Config.fromfile(path)
    iterations = cfg.train_cfg.max_iters
    phases = cfg.param_scheduler
    assert phases[0].begin == 0
    assert [phase.end for phase in phases[:-1]] == [phase.begin for phase in phases[1:]]
    assert phases[-1].end == iterations
    assert iterations % cfg.train_cfg.val_interval == 0
    best = cfg.default_hooks.checkpoint
    if path in DISTILLATION:
        assert best.save_best in ("mixer/error_mean", "block/error_mean") and best.rule == "less"
    else:
        assert best.save_best == "mIoU"


@each_distillation
def test_a_distillation_builds_and_the_names_of_its_errors_exist(path):
    cfg = Config.fromfile(path)
    # Weights are not shipped; and what is as large as SO400M is built smaller.
    arch = cfg.model.student.arch
    tiny = dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=48, latent_dims=8)
    if cfg.model.teacher.type == "EncoderTeacher":
        assert cfg.model.teacher.encoder.arch == arch
        cfg.model.teacher.update(checkpoint=None)
        cfg.model.teacher.encoder.arch = tiny
    else:
        pytest.importorskip("transformers")
        vision = dict(
            model_type="siglip_vision_model", hidden_size=32, num_hidden_layers=2,
            num_attention_heads=2, intermediate_size=48, patch_size=14, image_size=56,
        )  # fmt: skip
        cfg.model.teacher = dict(type="TransformersTeacher", config=vision)
    cfg.model.student.arch = tiny
    model = MODELS.build(cfg.model).eval()
    model.init_weights()
    side = 4 * model.student.patch_size
    with torch.no_grad():
        (found,) = model(torch.rand(1, 3, side, side), mode="predict")
    assert cfg.default_hooks.checkpoint.save_best.split("/")[0] in found
    assert all(len(values["cosine"]) == 2 for values in found.values())
    (crop,) = (t for t in cfg.train_dataloader.dataset.pipeline if t.type == "RandomCrop")
    padded = cfg.model.data_preprocessor.size
    assert all(0 <= p - c < 32 for p, c in zip(padded, crop.crop_size, strict=True))


@each_named_config
def test_training_crops_fill_the_padded_batch_and_inference_takes_whole_images(path):
    cfg = Config.fromfile(path)
    crop = crop_of(cfg)
    padded = cfg.model.data_preprocessor.size
    assert all(0 <= p - c < 32 for p, c in zip(padded, crop, strict=True))
    assert cfg.model.test_cfg.mode == "whole"


@each_named_config
def test_no_pipeline_uses_what_upstream_has_deprecated(path):
    cfg = Config.fromfile(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.silence_upstream_warnings()
        for pipeline in (
            cfg.train_dataloader.dataset.pipeline,
            cfg.val_dataloader.dataset.pipeline,
            cfg.tta_pipeline,
        ):
            Compose(pipeline)


@each_named_config
def test_the_name_says_what_is_inside(path):
    name = NAME.fullmatch(path.stem)
    assert name, f"{path.name} does not follow the scheme {NAME.pattern}"
    cfg = Config.fromfile(path)
    backbone, family = cfg.model.backbone, FAMILIES[name["family"]]
    assert (backbone.type, backbone.arch) == (family["type"], name["arch"])
    assert backbone.get("mixer", "cgspn") == family.get("mixer", "cgspn")
    assert backbone.get("patch_size", 16) == int(name["patch"] or 16)
    assert ("init_cfg" in backbone) == bool(name["distilled"])
    assert cfg.model.decode_head.type == "UPerHead"
    assert cfg.train_dataloader.batch_size == int(name["batch"])
    assert cfg.train_cfg.max_iters == float(name["thousands"]) * 1000
    assert cfg.train_dataloader.dataset.type == DATASETS[name["data"]]
    assert crop_of(cfg) == (int(name["height"]), int(name["width"]))


@pytest.mark.parametrize("crop", ["512x512", "640x640"])
@pytest.mark.parametrize("arch", ["tiny", "small", "base", "large", "so400m"])
def test_each_size_has_its_ade20k_configs(arch, crop):
    assert (CONFIGS / f"cgspn/cgspn-{arch}_upernet_8xb2-80k_ade20k-{crop}.py").is_file()


@pytest.mark.parametrize("family", ["gspn", "gspn2"])
@pytest.mark.parametrize("arch", ["tiny", "small", "base"])
def test_each_size_of_the_hierarchical_encoders_has_its_ade20k_config(family, arch):
    name = f"{family}-{arch}_upernet_8xb2-160k_ade20k-512x512.py"
    assert (CONFIGS / family / name).is_file()


@each_named_config
def test_features_come_from_four_depths_that_end_with_the_last_layer(path):
    with torch.device("meta"):
        encoder = MODELS.build(Config.fromfile(path).model.backbone)
    assert len(encoder.out_indices) == 4
    assert list(encoder.out_indices) == sorted(encoder.out_indices)
    depth = len(encoder.stages if hasattr(encoder, "stages") else encoder.blocks)
    assert encoder.out_indices[-1] == depth - 1


def test_the_camvid_recipe_is_that_of_the_baselines():
    cfg = Config.fromfile(CONFIGS / "cgspn/cgspn-small_upernet_1xb16-2.5k_camvid-360x480.py")
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ("AdamW", 5e-4, 0.05)
    assert cfg.optim_wrapper.clip_grad.max_norm == 5
    assert cfg.optim_wrapper.paramwise_cfg == dict(layer_decay_rate=1.0)
    warmup, decay = cfg.param_scheduler
    assert warmup.end == 0.05 * cfg.train_cfg.max_iters
    assert decay.eta_min == 0
    assert cfg.train_cfg.val_interval == 500
    assert cfg.randomness.seed == 0
    augmentation = [t.type for t in cfg.train_dataloader.dataset.pipeline]
    assert augmentation == [
        "LoadImageFromFile",
        "LoadAnnotations",
        "RandomResize",
        "RandomCrop",
        "RandomFlip",
        "PhotoMetricDistortion",
        "PackSegInputs",
    ]
    resize = cfg.train_dataloader.dataset.pipeline[2]
    assert (resize.scale, resize.ratio_range) == ((480, 360), (0.5, 2.0))
    assert cfg.model.data_preprocessor.size == (384, 480)
    assert cfg.model.backbone.drop_path_rate == 0.1
    assert cfg.model.decode_head.channels == 256
    assert cfg.model.test_cfg.mode == "whole"


def test_the_isomorphic_vit_differs_in_its_mixer_alone():
    cgspn, vit = (
        Config.fromfile(CONFIGS / f"cgspn/{name}-small_upernet_1xb16-2.5k_camvid-360x480.py")
        for name in ("cgspn", "vit")
    )
    assert vit.model.backbone.pop("mixer") == "attention"
    assert vit.to_dict() == cgspn.to_dict()


def transforms(pipeline: list[dict]) -> list[dict]:
    """A pipeline as it works: ADE20K's data set reduces its zero label, whoever says so."""
    return [{k: v for k, v in t.items() if k != "reduce_zero_label"} for t in pipeline]


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
@pytest.mark.parametrize("family", ["gspn", "gspn2"])
def test_the_ade20k_recipe_of_the_hierarchical_encoders_is_that_of_swin(family, size):
    upstream = Path(mmseg.__file__).parent / ".mim/configs/swin"
    if not upstream.is_dir():
        pytest.skip("this mmsegmentation was installed without its configs")
    name = f"swin-{size}-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"
    theirs = Config.fromfile(upstream / name)
    ours = Config.fromfile(
        CONFIGS / f"{family}/{family}-{size}_upernet_8xb2-160k_ade20k-512x512.py"
    )
    encoder = MODELS.build(ours.model.backbone)
    dims = [encoder.arch.stage(i).embed_dims for i in range(4)]
    assert ours.model.backbone.drop_path_rate == dict(tiny=0.2, small=0.4, base=0.5)[size]
    for part, channels in (("decode_head", dims), ("auxiliary_head", dims[2])):
        assert ours.model[part] == dict(theirs.model[part], in_channels=channels)
    assert ours.model.test_cfg == theirs.model.test_cfg
    assert ours.model.data_preprocessor.size == theirs.model.data_preprocessor.size

    optimizer = theirs.optim_wrapper.optimizer
    assert set(ours.optim_wrapper) == {"type", "optimizer", "constructor", "paramwise_cfg"}
    assert ours.optim_wrapper.type == theirs.optim_wrapper.type
    assert ours.optim_wrapper.optimizer == optimizer
    groups = build_optim_wrapper(encoder, ours.optim_wrapper).optimizer.param_groups
    assert {group["lr"] for group in groups} == {optimizer.lr}
    for group in groups:
        decays = {parameter.ndim > 1 for parameter in group["params"]}
        assert decays == {group["weight_decay"] == optimizer.weight_decay}

    assert ours.param_scheduler == theirs.param_scheduler
    assert ours.train_cfg == theirs.train_cfg
    assert ours.train_dataloader.batch_size == theirs.train_dataloader.batch_size
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        pipelines = [cfg[loader].dataset.pipeline for cfg in (ours, theirs)]
        assert transforms(pipelines[0]) == transforms(pipelines[1])


def test_the_hierarchical_encoders_train_on_camvid_by_the_recipe_of_the_others():
    plain, *hierarchical = (
        Config.fromfile(CONFIGS / f"{name}_upernet_1xb16-2.5k_camvid-360x480.py")
        for name in ("cgspn/cgspn-small", "gspn/gspn-tiny", "gspn2/gspn2-tiny")
    )
    for cfg in hierarchical:
        cfg.model, model = plain.model, cfg.model
        assert cfg.to_dict() == plain.to_dict()
        assert model.data_preprocessor == plain.model.data_preprocessor
        assert model.backbone.drop_path_rate == plain.model.backbone.drop_path_rate
        assert model.decode_head.channels == plain.model.decode_head.channels


def test_the_guide_to_distillation_has_a_config_of_ones_own(repository, tmp_path):
    guide = (repository / "docs/distillation.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    path = tmp_path / "own.py"
    path.write_text(lines.replace('"./cgspn', f'"{CONFIGS}/distillation/cgspn'))
    cfg = Config.fromfile(path)
    assert cfg.param_scheduler[-1].end == cfg.train_cfg.max_iters
    assert cfg.model.teacher.type == "TransformersTeacher"
    with torch.device("meta"):
        student = MODELS.build(cfg.model.student)
    assert (student.arch.embed_dims, student.patch_size) == (384, 14)
    words = re.search(r"`arch` is a size by name, or `dict\((.*?)\)`", guide, re.DOTALL)[1]
    assert set(re.findall(r"(\w+)=", words)) == {"_delete_", *vars(student.arch)}


@pytest.mark.parametrize("family", ["cgspn", "gspn", "gspn2"])
def test_a_metafile_lists_the_configs_of_its_folder_and_the_readmes_results(family):
    content = yaml.safe_load((CONFIGS / family / "metafile.yml").read_text(encoding="utf-8"))
    paths = {str(p.relative_to(CONFIGS.parent)) for p in (CONFIGS / family).glob("*.py")}
    assert {model["Config"] for model in content["Models"]} == paths
    for model in content["Models"]:
        assert model["Name"] == Path(model["Config"]).stem
        assert "Weights" not in model
        cfg = Config.fromfile(CONFIGS.parent / model["Config"])
        gpus, batch = re.search(r"_(\d+)xb(\d+)-", model["Name"]).groups()
        assert model["Metadata"]["Batch Size"] == int(gpus) * cfg.train_dataloader.batch_size
        assert int(batch) == cfg.train_dataloader.batch_size
    readme = (CONFIGS / family / "README.md").read_text(encoding="utf-8")
    assert all(Path(p).name in readme for p in paths)
    for model in content["Models"]:
        # A row of results links to its "config"; its first seed is the metafile's figure.
        link = f"[config]({Path(model['Config']).name})"
        shown = [re.findall(r"\d\d\.\d+", row)[:1] for row in readme.splitlines() if link in row]
        results = [[str(model["Results"]["Metrics"]["mIoU"])]] if "Results" in model else []
        assert shown == results


def test_mmsegs_inference_api_takes_a_config(shrunken, tmp_path):
    cfg = shrunken(CONFIGS / "cgspn/cgspn-small_upernet_1xb16-2.5k_camvid-360x480.py")
    cfg.dump(tmp_path / "config.py")
    inferencer = MMSegInferencer(str(tmp_path / "config.py"), device="cpu")
    image = torch.zeros(360, 480, 3, dtype=torch.uint8).numpy()
    predicted = inferencer(image, return_datasamples=True, show=False)
    assert predicted.pred_sem_seg.shape == (360, 480)


def test_the_five_lines_of_the_guide_train_a_new_data_set(
    repository, shrunken, tiny_ade_root, tmp_path, monkeypatch
):
    guide = (repository / "docs/new_dataset.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    assert len(lines.splitlines()) == 5
    (tmp_path / "pets.py").write_text(lines.replace('"./cgspn', f'"{CONFIGS}/cgspn'))
    tiny_ade_root(num_val=1, ids=(0, 1, 2, 255), name="data/pets")
    monkeypatch.chdir(tmp_path)

    cfg = shrunken(tmp_path / "pets.py")
    check_data_paths(cfg)
    cfg.train_cfg.update(max_iters=1, val_interval=1)
    cfg.work_dir = str(tmp_path / "work")
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert 0 <= runner.message_hub.get_scalar("val/mIoU").current() <= 100
    assert len(runner.train_dataloader.dataset) == 4
    assert len(runner.visualizer.dataset_meta["palette"]) == 3


@pytest.mark.parametrize("tta", [False, True], ids=["plain", "tta"])
def test_padded_images_are_scored_at_their_own_size(shrunken, tiny_ade_root, tmp_path, tta):
    cfg = shrunken(CONFIGS / "cgspn/cgspn-small_upernet_1xb16-2.5k_camvid-360x480.py")
    cfg.test_dataloader.dataset.data_root = str(
        tiny_ade_root(num_val=1, size=(90, 120), ids=tuple(range(12)))
    )
    if tta:
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
        cfg.model = dict(**cfg.tta_model, module=cfg.model)
    cfg.work_dir = str(tmp_path)
    runner = Runner.from_cfg(cfg)
    assert 0 <= runner.test()["mIoU"] <= 100
    with torch.no_grad():
        (batch,) = runner.test_dataloader
        (result,) = runner.model.test_step(batch)
    assert result.pred_sem_seg.data.squeeze().shape == (90, 120)
    assert result.gt_sem_seg.data.squeeze().shape == (90, 120)
