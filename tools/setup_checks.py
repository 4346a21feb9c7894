"""What tools/setup_env.py must find on the machine, and setup.py for the CUDA kernels; one sentence
for each lack names the way out.

This and setup_env.py use the standard library only, in the syntax of Python 3.6 (hence the quoted
annotations), so that an old interpreter gets as far as saying that it is too old.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

OLDEST, NEWEST = (3, 11), (3, 12)
CANDIDATES = ("python3", "python3.12", "python3.11")
OLDEST_CUDA = (12, 0)

PROBE = """
import json, sys, sysconfig
try:
    import ensurepip, venv
    has_venv = True
except ImportError:
    has_venv = False
include = sysconfig.get_path("include")
print(json.dumps([sys.executable, list(sys.version_info[:3]), has_venv, include]))
"""


class SetupError(Exception):
    """What stands in the way, and the way out, in one sentence."""


class Interpreter(NamedTuple):
    """A Python that could carry the environment, and what it says about itself."""

    name: str
    path: str
    version: "tuple[int, ...]"
    has_venv: bool
    include: str

    @property
    def dotted(self) -> str:
        """The version as people write it."""
        return ".".join(map(str, self.version))

    @property
    def supported(self) -> bool:
        """Whether the stack is tested on this version."""
        return OLDEST <= self.version[:2] <= NEWEST


def probe(name: str) -> "Interpreter | None":
    """Asks an interpreter about itself; None where no interpreter of that name starts."""
    command = [name, "-c", PROBE]
    try:
        answer = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, timeout=60
        )
        path, version, has_venv, include = json.loads(answer.stdout.decode())
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return Interpreter(name, path, tuple(version), has_venv, include)


def python_problem(found: Interpreter, make_venv: bool = True) -> "str | None":
    """Why an interpreter will not do, as one sentence; None where it will.

    Args:
        found: The interpreter.
        make_venv: Whether a virtual environment is to be made with it, or it is in one already.
    """
    short = ".".join(map(str, found.version[:2]))
    if not found.supported:
        return (
            f"`{found.name}` is Python {found.dotted}, and cgspn_seg needs 3.11 or 3.12: install "
            "one (Debian 12: apt install python3.11 python3.11-venv python3.11-dev; Ubuntu 24.04: "
            "the same with 3.12; elsewhere: pyenv or uv), and where it is not on the PATH name it, "
            "as in `make demo PYTHON=/path/to/python3.12`."
        )
    if make_venv and not found.has_venv:
        return (
            f"Python {found.dotted} ({found.path}) lacks its `venv` module: install it "
            f"(Debian, Ubuntu: apt install python{short}-venv)."
        )
    if not (Path(found.include) / "Python.h").exists():
        return (
            f"Python {found.dotted} ({found.path}) lacks the C headers that the op is compiled "
            f"against ({found.include}/Python.h): install them (Debian, Ubuntu: apt install "
            f"python{short}-dev)."
        )
    return None


def choose_python(environ: dict, ask=probe) -> Interpreter:
    """The interpreter to make the environment with.

    The default `python3` goes first, for its headers and `venv` are the likeliest to be there.

    Args:
        environ: Environment variables; `PYTHON`, where set, is the only candidate.
        ask: Stands in for `probe` in the tests.

    Raises:
        SetupError: None will do; says why of the one that comes closest.
    """
    named = environ.get("PYTHON")
    found = [ask(name) for name in ([named] if named else CANDIDATES)]
    present = [candidate for candidate in found if candidate is not None]
    for candidate in present:
        if python_problem(candidate) is None:
            return candidate
    if named and not present:
        raise SetupError(
            f"PYTHON={named} does not start: name an interpreter of Python 3.11 or 3.12."
        )
    if not present:
        raise SetupError(
            "No Python starts here: install 3.11 or 3.12 "
            "(Debian, Ubuntu: apt install python3 python3-venv python3-dev)."
        )
    closest = next((it for it in present if it.supported), present[0])
    raise SetupError(python_problem(closest))


def check_compiler(environ: dict, include: str) -> None:
    """Compiles a few lines, to say at once what the build would say after gigabytes of download.

    Args:
        environ: Environment variables; `CXX` names the compiler, as it does for setup.py.
        include: The folder of the C headers of Python.

    Raises:
        SetupError: There is no C++ compiler, or it cannot compile what the op needs.
    """
    linux = sys.platform == "linux"
    compiler = shlex.split(environ.get("CXX", "")) or ["g++" if linux else "c++"]
    if shutil.which(compiler[0], path=environ.get("PATH")) is None:
        raise SetupError(
            f"The op is compiled here, and there is no C++ compiler (`{compiler[0]}` was not "
            "found): install one (Debian, Ubuntu: apt install g++), or name yours in the "
            "environment variable CXX."
        )
    source = "#include <Python.h>\n#include <concepts>\n"
    flags = ["-std=c++20", "-fsyntax-only", "-I", include, "-x", "c++", "-"]
    if linux:
        source, flags = source + "#include <omp.h>\n", ["-fopenmp", *flags]
    tried = subprocess.run(
        compiler + flags,
        input=source.encode(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environ,
    )
    if tried.returncode:
        lines = tried.stdout.decode(errors="replace").splitlines()
        said = next((line.strip() for line in lines if "error" in line), "it gave no reason")
        raise SetupError(
            f"`{' '.join(compiler)}` cannot compile C++20 with OpenMP ({said}): install GCC 11 or "
            "newer (Debian, Ubuntu: apt install g++), or name another compiler in the environment "
            "variable CXX."
        )


def has_gpu(environ: dict) -> bool:
    """Whether NVIDIA's driver lists a GPU."""
    tool = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if tool is None:
        return False
    try:
        listed = subprocess.run(
            [tool, "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return listed.returncode == 0 and listed.stdout.startswith(b"GPU")


def find_nvcc(environ: dict) -> "str | None":
    """CUDA's compiler, from the place where PyTorch's build looks for it; None if it is not there.

    Args:
        environ: Environment variables; `CUDA_HOME` or `CUDA_PATH` name the toolkit's folder.
    """
    home = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    on_path = shutil.which("nvcc", path=environ.get("PATH"))
    if not home and on_path:
        return on_path
    nvcc = Path(home or "/usr/local/cuda", "bin", "nvcc")
    return str(nvcc) if nvcc.exists() else None


def nvcc_release(nvcc: str) -> "tuple[int, ...] | None":
    """The CUDA release of a compiler, as in (13, 0); None where it does not say."""
    command = [nvcc, "--version"]
    try:
        said = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=60
        ).stdout.decode(errors="replace")
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"release (\d+)\.(\d+)", said)
    return tuple(map(int, found.groups())) if found else None


def toolkit_problem(torch_cuda: "str | None", home: "str | None") -> "str | None":
    """Why the CUDA kernels cannot be built, and the way out; None where they can be.

    Args:
        torch_cuda: The CUDA release that PyTorch was built with; None for a CPU build.
        home: The toolkit's folder, as PyTorch's build found it.
    """
    if torch_cuda is None:
        return "the installed PyTorch is a CPU build; install a CUDA build of it"
    way_out = f"install the CUDA toolkit {torch_cuda} and set CUDA_HOME to it"
    nvcc = Path(home or "", "bin", "nvcc")
    if home is None or not nvcc.exists():
        where = f" in {nvcc.parent}" if home else ""
        return f"no nvcc was found{where}; {way_out}"
    release = nvcc_release(str(nvcc))
    if release is None:
        return f"{nvcc} does not tell its version; {way_out}"
    dotted = ".".join(map(str, release))
    if release < OLDEST_CUDA:
        oldest = ".".join(map(str, OLDEST_CUDA))
        return f"{nvcc} is of CUDA {dotted}, older than {oldest}; {way_out}"
    if release[0] != int(torch_cuda.split(".")[0]):
        return f"{nvcc} is of CUDA {dotted}, and PyTorch of CUDA {torch_cuda}; {way_out}"
    # Debian's and conda's toolkits have it elsewhere than NVIDIA's; a lone wrapper has it nowhere.
    headers = ("include", "targets/*/include")
    if not any(True for it in headers for _ in Path(home).glob(f"{it}/cuda_runtime_api.h")):
        return f"{home} holds nvcc but not include/cuda_runtime_api.h; {way_out}"
    return None


def gpu_generations(release: "tuple[int, ...] | None") -> str:
    """What to build for where no GPU is there to tell, in the form of TORCH_CUDA_ARCH_LIST.

    Machine code runs on all later GPUs of the same major version; PTX, which the driver compiles,
    on all later ones. The kernels serve 8.0 and newer.

    Args:
        release: The CUDA release of the compiler, which must know what it is to build for.
    """
    return "8.0;9.0;10.0;12.0+PTX" if release and release >= (12, 8) else "8.0;9.0+PTX"


def cpu_features() -> str:
    """The instruction sets of this CPU as Linux lists them, for the op is compiled for them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
