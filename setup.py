"""Builds the propagation op, ``cgspn_seg._C``; everything else about the package stands in
pyproject.toml.

The CUDA kernels are built where PyTorch is a CUDA build and a toolkit that fits it is found.

Environment:
    FORCE_CUDA=1         build the CUDA kernels, or fail saying why not
    FORCE_CUDA=0         build the CPU op alone
    CUDA_HOME            the CUDA toolkit (default: that of the nvcc on PATH, then /usr/local/cuda)
    TORCH_CUDA_ARCH_LIST the GPU generations to build for (default: those of the visible GPUs, and
                         where there is none, 8.0, 9.0 and the newer ones that nvcc knows)
    CGSPN_CPU_ARCH       GCC's -march for the CPU kernel: native (default), x86-64-v3, ...
"""

import os
import platform
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))
from setup_checks import gpu_generations, nvcc_release, toolkit_problem

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ModuleNotFoundError:
    sys.exit(
        "cgspn_seg's op is compiled against the installed PyTorch, and none is installed here: "
        "install torch 2.11-2.13 first, then `pip install -e . --no-build-isolation`."
    )

CSRC = Path("csrc")
NVCC_FLAGS = [
    "-O3",
    "--expt-relaxed-constexpr",
    "-lineinfo",
    # PyTorch's build flags hide CUDA's own conversions of its half types.
    "-U__CUDA_NO_HALF_CONVERSIONS__",
    "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
]


def want_cuda() -> bool:
    """Whether to build the CUDA kernels; exits where they were asked for and cannot be built."""
    force = os.environ.get("FORCE_CUDA")
    if force == "0":
        return False
    problem = toolkit_problem(torch.version.cuda, CUDA_HOME)
    if problem is None:
        return True
    if force:
        sys.exit(f"FORCE_CUDA={force}, but {problem}.")
    gpu = torch.cuda.is_available()
    # With a CPU build of PyTorch, or with neither GPU nor toolkit, nobody expects anything else.
    if torch.version.cuda and (gpu or CUDA_HOME):
        seen = "a GPU is visible, but " if gpu else ""
        print(f"warning: {seen}only the CPU op is built: {problem}.", file=sys.stderr)
    return False


def name_gpu_generations() -> None:
    """Names what to compile for where no GPU is there to ask; PyTorch's build would fail."""
    if torch.cuda.is_available() or os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return
    names = gpu_generations(nvcc_release(str(Path(CUDA_HOME, "bin", "nvcc"))))
    os.environ["TORCH_CUDA_ARCH_LIST"] = names
    print(
        f"no GPU is visible, so the CUDA kernels are built for {names}; TORCH_CUDA_ARCH_LIST "
        "names others.",
        file=sys.stderr,
    )


def compile_flags() -> list[str]:
    """Flags of the host compiler."""
    flags = [
        "-O3",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-Wall",
        "-Wno-unknown-pragmas",
    ]
    if sys.platform == "linux":
        flags.append("-fopenmp")
    if platform.machine() in {"x86_64", "aarch64"}:
        flags.append(f"-march={os.environ.get('CGSPN_CPU_ARCH', 'native')}")
    return flags


def extension() -> Extension:
    """The extension module with the sources this machine can build."""
    compiler = os.environ.get("CXX", "g++" if sys.platform == "linux" else "c++").split()[0]
    if shutil.which(compiler) is None:
        sys.exit(
            f"No C++ compiler: `{compiler}` was not found. Install one (Debian, Ubuntu: apt "
            "install g++), or name yours in the environment variable CXX."
        )
    cuda = want_cuda()
    sources = [CSRC / "line_scan.cpp", *sorted(CSRC.glob("cpu/*.cpp"))]
    arguments: dict = {"cxx": compile_flags()}
    macros = []
    if cuda:
        name_gpu_generations()
        sources += [*sorted(CSRC.glob("cuda/*.cpp")), *sorted(CSRC.glob("cuda/*.cu"))]
        arguments["nvcc"] = NVCC_FLAGS
        macros.append(("CGSPN_WITH_CUDA", None))
    build = CUDAExtension if cuda else CppExtension
    return build(
        "cgspn_seg._C",
        [str(source) for source in sources],
        define_macros=macros,
        depends=[str(path) for path in sorted([*CSRC.rglob("*.h"), *CSRC.rglob("*.cuh")])],
        extra_compile_args=arguments,
        extra_link_args=["-fopenmp"] if sys.platform == "linux" else [],
    )


setup(ext_modules=[extension()], cmdclass={"build_ext": BuildExtension})
