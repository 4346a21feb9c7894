"""MMSegmentation imports and runs quietly on mmcv-lite."""

import importlib.util
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from cgspn_seg import compat

on_lite = pytest.mark.skipif(
    importlib.util.find_spec("mmcv._ext") is not None, reason="full mmcv is installed"
)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


@on_lite
def test_mmseg_imports_after_compat_and_says_nothing():
    code = (
        "import cgspn_seg.compat, mmseg.models, mmseg.utils, mmseg.apis\n"
        "from mmengine.utils.dl_utils import mmcv_full_available\n"
        "assert not mmcv_full_available()\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr


def test_the_package_itself_imports_neither_torch_nor_mmseg():
    done = run_python("import cgspn_seg, sys; print({'torch', 'mmseg', 'cv2'} & set(sys.modules))")
    assert done.stdout.strip() == "set()", done.stderr


@on_lite
def test_point_sample_is_mmcvs_own_pure_python_function():
    from mmcv.ops import point_sample

    features = torch.arange(12.0).view(1, 1, 3, 4)
    points = torch.tensor([[[0.25, 0.5], [0.9, 0.1]]])
    expected = F.grid_sample(features, points[:, :, None] * 2 - 1, align_corners=False)[..., 0]
    torch.testing.assert_close(point_sample(features, points), expected)


@on_lite
def test_another_operator_says_what_to_install_when_it_is_used_and_only_then():
    from mmcv.ops import DeformConv2d, sigmoid_focal_loss

    assert not isinstance(torch.nn.Identity(), DeformConv2d)
    for use in (DeformConv2d, sigmoid_focal_loss):
        with pytest.raises(
            ModuleNotFoundError, match=f"{use.__name__} needs .*`pip install mmcv=="
        ):
            use(3, 3, 3)


@on_lite
def test_a_name_that_mmcv_never_had_is_an_import_error():
    with pytest.raises(ImportError, match="deform_convolution"):
        from mmcv.ops import deform_convolution  # noqa: F401


def test_full_mmcv_is_left_alone(monkeypatch):
    monkeypatch.delitem(sys.modules, "mmcv.ops", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: types.SimpleNamespace(name=name))
    assert compat.install_mmcv_ops_stub() is False
    assert "mmcv.ops" not in sys.modules


@on_lite
def test_installing_twice_keeps_the_first_stand_in():
    first = sys.modules["mmcv.ops"]
    assert compat.install_mmcv_ops_stub() is True
    assert sys.modules["mmcv.ops"] is first


def test_opencv_without_libgl_says_what_to_install(tmp_path: Path):
    (tmp_path / "cv2.py").write_text(
        "raise ImportError('libGL.so.1: cannot open shared object file: No such file or directory')"
    )
    done = run_python("import cgspn_seg.compat", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    last_line = done.stderr.strip().splitlines()[-1]
    assert "libGL.so.1" in last_line
    assert "apt install libgl1" in last_line
    assert "opencv-python-headless" in last_line


def test_other_import_errors_of_opencv_pass_through(tmp_path: Path):
    (tmp_path / "cv2.py").write_text("raise ImportError('no numpy')")
    done = run_python("import cgspn_seg.compat", PYTHONPATH=str(tmp_path))
    assert done.stderr.strip().splitlines()[-1] == "ImportError: no numpy"


def test_heads_and_mixed_precision_of_upstream_are_quiet():
    from mmseg.models import FCNHead
    from mmseg.models.losses import CrossEntropyLoss

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.silence_upstream_warnings()
        FCNHead(in_channels=4, channels=4, num_classes=3, loss_decode=dict(type="CrossEntropyLoss"))
        CrossEntropyLoss()
        torch.cuda.amp.GradScaler(enabled=False)


def test_warnings_about_a_users_own_config_are_heard():
    from mmseg.datasets.transforms import LoadAnnotations

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.silence_upstream_warnings()
        with pytest.raises(UserWarning, match="reduce_zero_label"):
            LoadAnnotations(reduce_zero_label=True)
