"""The CUDA sources compile without a warning, with nvcc alone: neither a GPU nor a CUDA build of
PyTorch has to be there."""

import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

CSRC = Path(__file__).resolve().parents[2] / "csrc"
KERNELS = sorted(CSRC.glob("cuda/*.cu"))
HOST_SIDE = sorted(CSRC.glob("cuda/*.cpp"))
# The oldest generation that the kernels serve, and the one with paths of its own.
ARCHITECTURES = ("sm_80", "sm_90")
FLAGS = ("-std=c++17", "--expt-relaxed-constexpr", "-Werror", "all-warnings")

Compilation = tuple[Path, str]
Compilations = dict[Compilation, "Future[subprocess.CompletedProcess]"]


def nvcc() -> str | None:
    """CUDA's compiler, on the PATH or where its installer puts it."""
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(nvcc() is None, reason="CUDA's compiler, nvcc, is not there"),
]


def run(command: list[str]) -> subprocess.CompletedProcess:
    """Runs a compiler; its messages are in `stdout`."""
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )


@pytest.fixture(scope="module")
def compilations(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compilations]:
    """Every kernel source for every architecture, being compiled two at a time."""
    objects = tmp_path_factory.mktemp("objects")
    with ThreadPoolExecutor(max_workers=2) as pool:

        def begin(source: Path, architecture: str) -> Future:
            target = objects / f"{source.stem}_{architecture}.o"
            flags = [*FLAGS, f"-arch={architecture}"]
            return pool.submit(run, [nvcc(), *flags, "-c", str(source), "-o", str(target)])

        yield {
            (source, architecture): begin(source, architecture)
            for source in KERNELS
            for architecture in ARCHITECTURES
        }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", KERNELS, ids=lambda source: source.name)
def test_kernels_compile(source, architecture, compilations):
    ended = compilations[source, architecture].result()
    assert ended.returncode == 0, ended.stdout


@pytest.mark.parametrize("source", HOST_SIDE, ids=lambda source: source.name)
def test_what_launches_the_kernels_compiles(source, tmp_path):
    # The CPU build of PyTorch has all headers of the CUDA build but this one, which is configured.
    macros = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    macros.parent.mkdir(parents=True)
    macros.write_text("#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n")
    headers = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    if torch.version.cuda is None:
        headers.append(str(tmp_path))
    command = [nvcc(), "-std=c++20", "-Xcompiler", "-fsyntax-only,-Wall,-Werror"]
    command += [word for folder in headers for word in ("-isystem", folder)]
    ended = run([*command, "-c", str(source), "-o", str(tmp_path / "unused.o")])
    missing = re.search(r"fatal error: (cu\w+\.h): No such file", ended.stdout)
    if missing:
        pytest.skip(f"this CUDA toolkit lacks {missing.group(1)}, which PyTorch's headers include")
    assert ended.returncode == 0, ended.stdout
