"""What setup.py decides to build, with another PyTorch and another toolkit than are installed."""

import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import setuptools

ROOT = Path(__file__).resolve().parent.parent.parent

Build = Callable[..., setuptools.Extension]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Build:
    """Runs setup.py up to `setup()` and returns the extension it was called with."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    # Set and removed again, so that what setup.py sets is undone too.
    for name in ("FORCE_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def run(torch_cuda: str | None, nvcc: str | None, gpu: bool = False, **environ: str):
        home = tmp_path / "cuda"
        if nvcc is not None:
            for path in ("include/cuda_runtime_api.h", "bin/nvcc"):
                (home / path).parent.mkdir(parents=True)
                (home / path).touch()
            (home / "bin/nvcc").write_text(f"#!/bin/sh\necho 'release {nvcc}, V{nvcc}.1'\n")
            (home / "bin/nvcc").chmod(0o755)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)

        def extension(kind: str) -> Callable[..., setuptools.Extension]:
            def make(*arguments, **options) -> setuptools.Extension:
                made = setuptools.Extension(*arguments, **options)
                made.kind = kind
                return made

            return make

        torch = ModuleType("torch")
        torch.version = ModuleType("torch.version")
        torch.version.cuda = torch_cuda
        torch.cuda = ModuleType("torch.cuda")
        torch.cuda.is_available = lambda: gpu
        builder = ModuleType("torch.utils.cpp_extension")
        # As PyTorch has it: a CPU build looks for no toolkit.
        builder.CUDA_HOME = str(home) if torch_cuda and nvcc else None
        builder.BuildExtension = object
        builder.CppExtension, builder.CUDAExtension = extension("CPU"), extension("CUDA")
        for module in (torch, builder):
            monkeypatch.setitem(sys.modules, module.__name__, module)
        called: list[dict] = []
        monkeypatch.setattr(setuptools, "setup", lambda **options: called.append(options))
        runpy.run_path("setup.py", run_name="__main__")
        return called[0]["ext_modules"][0]

    return run


def test_cuda_is_built_where_nvcc_is_found_even_without_a_gpu(
    build: Build, capsys: pytest.CaptureFixture[str]
) -> None:
    built = build("13.0", "13.0")
    assert built.kind == "CUDA"
    assert {Path(source).suffix for source in built.sources} == {".cpp", ".cu"}
    assert ("CGSPN_WITH_CUDA", None) in built.define_macros
    assert "csrc/line_scan.h" in built.depends
    assert {Path(name).suffix for name in built.depends} <= {".h", ".cuh"}
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "8.0;9.0;10.0;12.0+PTX"
    said = capsys.readouterr().err
    assert said.startswith("no GPU is visible, so the CUDA kernels are built for 8.0;9.0;10.0;12")


@pytest.mark.parametrize(("gpu", "environ"), [(True, {}), (False, {"TORCH_CUDA_ARCH_LIST": "8.6"})])
def test_gpus_and_the_user_say_what_to_build_for(
    build: Build, capsys: pytest.CaptureFixture[str], gpu: bool, environ: dict[str, str]
) -> None:
    assert build("12.8", "12.8", gpu, **environ).kind == "CUDA"
    assert os.environ.get("TORCH_CUDA_ARCH_LIST") == environ.get("TORCH_CUDA_ARCH_LIST")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("torch_cuda", "nvcc", "gpu", "environ"),
    [
        (None, "13.0", False, {}),
        ("13.0", None, False, {}),
        ("13.0", "13.0", True, {"FORCE_CUDA": "0"}),
        (None, None, False, {"FORCE_CUDA": ""}),
    ],
)
def test_the_cpu_op_alone_is_built_in_silence(
    build: Build,
    capsys: pytest.CaptureFixture[str],
    torch_cuda: str | None,
    nvcc: str | None,
    gpu: bool,
    environ: dict[str, str],
) -> None:
    built = build(torch_cuda, nvcc, gpu, **environ)
    assert built.kind == "CPU"
    assert not any("cuda" in source for source in built.sources)
    assert built.define_macros == []
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("torch_cuda", "nvcc", "gpu", "said"),
    [
        ("13.0", None, True, "a GPU is visible, but only the CPU op is built: no nvcc was found;"),
        ("13.0", "12.4", False, "only the CPU op is built: "),
        ("12.6", "11.8", True, "a GPU is visible, but only the CPU op is built: "),
    ],
)
def test_a_toolkit_that_cannot_be_used_is_said_and_the_cpu_op_is_built(
    build: Build,
    capsys: pytest.CaptureFixture[str],
    torch_cuda: str,
    nvcc: str | None,
    gpu: bool,
    said: str,
) -> None:
    assert build(torch_cuda, nvcc, gpu).kind == "CPU"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {said}")
    assert f"install the CUDA toolkit {torch_cuda}" in line


@pytest.mark.parametrize(
    ("torch_cuda", "nvcc"), [(None, "13.0"), ("13.0", None), ("13.0", "12.4"), ("12.6", "11.8")]
)
def test_cuda_that_is_asked_for_and_cannot_be_built_is_refused(
    build: Build, torch_cuda: str | None, nvcc: str | None
) -> None:
    with pytest.raises(SystemExit, match=r"^FORCE_CUDA=1, but .*install .*\.$"):
        build(torch_cuda, nvcc, FORCE_CUDA="1")
