"""The example of docs/new_mixer.md, registered, configured and trained as the page says."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmseg.registry import MODELS

from cgspn_seg.models import CGSPN, MIXERS

NAME = "static-scan"


@pytest.fixture
def config(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mmseg_scope: None
) -> Iterator[Config]:
    """The page's config, which imports the page's mixer from a file of its own."""
    page = (repository / "docs/new_mixer.md").read_text(encoding="utf-8")
    mixer, lines = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (imports,) = re.findall(r"^ +(custom_imports = .*)$", page, re.MULTILINE)
    (tmp_path / "my_mixers.py").write_text(mixer, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    base = f'"{repository}/configs/cgspn/cgspn'
    (tmp_path / "config.py").write_text(lines.replace('"./cgspn', base) + imports, encoding="utf-8")
    yield Config.fromfile(tmp_path / "config.py")
    MIXERS.module_dict.pop(NAME)
    sys.modules.pop("my_mixers")


def test_one_line_in_the_package_is_enough_for_the_linter(repository, tmp_path):
    ruff = shutil.which(
        "ruff", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    )
    if ruff is None:
        pytest.skip("ruff is not installed")
    page = (repository / "docs/new_mixer.md").read_text(encoding="utf-8")
    (line,) = re.findall(
        r"^ +(from cgspn_seg\.models\.mixers\.static_scan .*)$", page, re.MULTILINE
    )
    mixers = shutil.copytree(
        repository / "cgspn_seg/models/mixers", tmp_path / "cgspn_seg/models/mixers"
    )
    shutil.copy(repository / "pyproject.toml", tmp_path)
    start = mixers / "__init__.py"
    last = "from cgspn_seg.models.mixers.registry import MIXERS, build_mixer, mixer_configs\n"
    text = start.read_text(encoding="utf-8")
    assert last in text
    start.write_text(text.replace(last, f"{last}{line}\n"), encoding="utf-8")
    (mixers / "static_scan.py").write_text(
        re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], encoding="utf-8"
    )
    done = subprocess.run([ruff, "check", "."], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_config_builds_an_encoder_of_its_mixers(config):
    with torch.device("meta"):
        encoder = MODELS.build(config.model.backbone)
    assert {type(block.mixer).__name__ for block in encoder.blocks} == {"StaticScanMixer"}
    assert all(block.mixer_lpu is not None for block in encoder.blocks)


def test_the_mixer_learns_and_takes_its_option(config):
    arch = dict(embed_dims=8, num_layers=2, num_heads=1, feedforward_channels=16, latent_dims=4)
    model = CGSPN(arch, patch_size=4, mixer=[NAME, dict(type=NAME, segment_length=2)])
    assert [block.mixer.segment_length for block in model.blocks] == [None, 2]
    with torch.autocast("cpu", torch.bfloat16):
        (features,) = model(torch.randn(2, 3, 21, 30))
    features.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(TypeError, match="no option 'segments'"):
        CGSPN(arch, mixer=dict(type=NAME, segments=2))
