"""Sizes of the encoders that tools/benchmark.py compares, and docs/models.md, which shows them."""

import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from torch import nn

PAPERS = {  # millions of parameters, billions of multiply-accumulates at 224, and C of the last map
    "swin-tiny": (28, 4.5, 768),
    "swin-small": (50, 8.7, 768),
    "swin-base": (88, 15.4, 1024),
    "convnext-tiny": (29, 4.5, 768),
    "convnext-small": (50, 8.7, 768),
    "convnext-base": (89, 15.4, 1024),
}
"""Swin's Table 1 and ConvNeXt's Table 1, with a classifier of 1,000 classes."""


@pytest.fixture
def find(benchmark_tool):
    """Finds encoders by their names."""
    from benchmark_named import find_encoders

    return find_encoders


@pytest.fixture
def count(benchmark_tool):
    """Counts an encoder's parameters and multiply-accumulates."""
    from benchmark_encoders import count

    return count


def built_on_meta(encoder) -> nn.Module:
    with torch.device("meta"):
        return encoder.build(64)


def needs_library(name: str) -> None:
    """Skips a test of an encoder whose library is not installed."""
    from benchmark_named import find_encoders
    from benchmark_rows import NotAvailable

    try:
        find_encoders([name])[0].library()
    except NotAvailable as error:
        pytest.skip(f"{name} {error}")


@pytest.mark.parametrize("name", PAPERS)
def test_the_others_have_the_size_of_their_papers(find, count, name):
    needs_library(name)
    parameters, macs, dims = PAPERS[name]
    counted = count(*find([name]), 224)
    classifier = 1000 * (dims + 1)
    assert (counted["parameters"] + classifier) / 1e6 == pytest.approx(parameters, rel=0.015)
    assert counted["macs_per_image"] / 1e9 == pytest.approx(macs, rel=0.03)


@pytest.mark.parametrize("arch", ["tiny", "small", "base"])
def test_swin_is_that_of_mmsegmentations_configs(find, arch):
    import mmseg

    folder = Path(mmseg.__file__).parent / ".mim/configs/swin"
    name = f"swin-{arch}-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py"
    if not (folder / name).is_file():
        pytest.skip(f"this MMSegmentation comes without its configs: {folder / name}")
    from mmseg.registry import MODELS

    cfg = Config.fromfile(folder / name).model.backbone
    cfg.update(init_cfg=None)
    theirs, ours = MODELS.build(cfg), built_on_meta(*find([f"swin-{arch}"]))
    assert [(k, v.shape) for k, v in theirs.state_dict().items()] == [
        (k, v.shape) for k, v in ours.state_dict().items()
    ]
    heads = [[b.attn.w_msa.num_heads for b in s.blocks] for s in theirs.stages]
    assert [[b.attn.w_msa.num_heads for b in s.blocks] for s in ours.stages] == heads


@pytest.mark.parametrize("arch", ["tiny", "small", "base", "large", "so400m"])
def test_ours_are_those_of_the_upernet_configs(repository, find, arch):
    name = f"cgspn-{arch}_upernet_8xb2-80k_ade20k-512x512.py"
    backbone = Config.fromfile(repository / "configs/cgspn" / name).model.backbone
    encoder = built_on_meta(*find([f"cgspn-{arch}"]))
    assert encoder.patch_size == backbone.patch_size
    assert encoder.out_indices == tuple(backbone.out_indices)


def documented(repository: Path) -> dict[str, list[str]]:
    """The cells of the table in docs/models.md, by encoder."""
    text = (repository / "docs/models.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z0-9-]+)` \|(.*)\|$", text, flags=re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}


def test_the_documented_figures_are_what_is_counted(repository, find, count):
    from benchmark_table import three_digits

    table, encoders = documented(repository), find(None)
    assert [*table] == [encoder.label for encoder in encoders]
    for encoder in encoders:
        parameters, *macs = table[encoder.label][:4]
        if encoder.family == "convnext":
            continue  # below, where a library is there
        of_512 = count(encoder, 512)
        assert parameters == three_digits(of_512["parameters"] / 1e6) + "M", encoder.label
        sizes = (224, 512, 1024) if encoder.arch == "tiny" else (512,)
        for size in sizes:
            shown = three_digits(count(encoder, size)["macs_per_image"] / 1e9) + "G"
            assert macs[(224, 512, 1024).index(size)] == shown, (encoder.label, size)


@pytest.mark.parametrize("arch", ["tiny", "small", "base"])
def test_the_documented_figures_of_convnext_are_what_is_counted(repository, find, count, arch):
    from benchmark_table import three_digits

    needs_library(f"convnext-{arch}")
    (encoder,) = find([f"convnext-{arch}"])
    counted = [count(encoder, size) for size in (224, 512, 1024)]
    shown = [three_digits(counted[0]["parameters"] / 1e6) + "M"]
    shown += [three_digits(c["macs_per_image"] / 1e9) + "G" for c in counted]
    assert documented(repository)[encoder.label][:4] == shown
