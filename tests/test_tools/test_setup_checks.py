"""What the machine must have for the set-up, and what is said where it has not."""

import os
import shutil
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parent.parent.parent / "tools"


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/setup_checks.py, which is in no package."""
    monkeypatch.syspath_prepend(str(TOOLS))
    import setup_checks

    return setup_checks


@pytest.mark.parametrize("version", [(3, 8, 18), (3, 10, 13), (3, 13, 0)])
def test_another_python_is_refused_in_one_sentence(
    checks: ModuleType, tmp_path: Path, version: tuple[int, ...]
) -> None:
    (tmp_path / "Python.h").touch()
    found = checks.Interpreter("python3", "/usr/bin/python3", version, True, str(tmp_path))
    with pytest.raises(checks.SetupError) as caught:
        checks.choose_python({}, lambda name: found if name == "python3" else None)
    said = str(caught.value)
    assert f"Python {found.dotted}, and cgspn_seg needs 3.11 or 3.12" in said
    assert "apt install python3.11" in said
    assert "\n" not in said


def test_the_first_python_that_will_do_is_taken(checks: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "Python.h").touch()
    machine = {
        "python3": checks.Interpreter("python3", "/a", (3, 10, 1), True, str(tmp_path)),
        "python3.12": checks.Interpreter("python3.12", "/b", (3, 12, 1), False, str(tmp_path)),
        "python3.11": checks.Interpreter("python3.11", "/c", (3, 11, 1), True, str(tmp_path)),
    }
    assert checks.choose_python({}, machine.get).path == "/c"
    with pytest.raises(checks.SetupError, match=r"`python3` is Python 3\.10\.1"):
        checks.choose_python({"PYTHON": "python3"}, machine.get)
    del machine["python3.11"]  # of the wrong version and of the lacking venv, the latter is closer
    with pytest.raises(checks.SetupError, match=r"apt install python3\.12-venv"):
        checks.choose_python({}, machine.get)


def test_missing_python_headers_are_named(checks: ModuleType, tmp_path: Path) -> None:
    found = checks.Interpreter("python3", "/a", (3, 12, 1), True, str(tmp_path))
    with pytest.raises(checks.SetupError, match=r"Python\.h.*apt install python3\.12-dev"):
        checks.choose_python({}, lambda name: found)


def test_no_python_at_all_is_said(checks: ModuleType) -> None:
    with pytest.raises(checks.SetupError, match="apt install python3 python3-venv python3-dev"):
        checks.choose_python({}, lambda name: None)
    with pytest.raises(checks.SetupError, match="PYTHON=/gone does not start"):
        checks.choose_python({"PYTHON": "/gone"}, checks.probe)


def test_the_probe_describes_this_python(checks: ModuleType) -> None:
    found = checks.probe(sys.executable)
    assert found.version == sys.version_info[:3]
    assert found.include == sysconfig.get_path("include")


def test_a_compiler_that_is_too_old_is_quoted(checks: ModuleType, tmp_path: Path) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho \"g++: error: unrecognized '-std=c++20'\"\nexit 1\n")
    compiler.chmod(0o755)
    with pytest.raises(checks.SetupError, match=r"unrecognized '-std=c\+\+20'.*GCC 11 or newer"):
        checks.check_compiler({"CXX": str(compiler), "PATH": os.defpath}, str(tmp_path))


def test_the_compiler_of_this_machine_will_do(checks: ModuleType) -> None:
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ here")
    checks.check_compiler({"PATH": os.environ["PATH"]}, sysconfig.get_path("include"))


# The CUDA toolkit


def toolkit(home: Path, says: str | None, headers: str = "include") -> Path:
    """A folder like a CUDA toolkit's, whose nvcc says this; without an nvcc for None."""
    (home / headers).mkdir(parents=True)
    (home / headers / "cuda_runtime_api.h").touch()
    if says is not None:
        (home / "bin").mkdir()
        (home / "bin" / "nvcc").write_text(f"#!/bin/sh\necho '{says}'\n")
        (home / "bin" / "nvcc").chmod(0o755)
    return home


def release(number: str) -> str:
    """What nvcc says of its version."""
    return f"Cuda compilation tools, release {number}, V{number}.88"


@pytest.mark.parametrize(
    ("torch_cuda", "says", "said"),
    [
        (None, release("13.0"), "is a CPU build; install a CUDA build of it"),
        ("13.0", None, "no nvcc was found in HOME/bin; install the CUDA toolkit 13.0 and set"),
        ("13.0", "", "HOME/bin/nvcc does not tell its version; install the CUDA toolkit 13.0"),
        ("12.6", release("11.8"), "nvcc is of CUDA 11.8, older than 12.0; install the CUDA"),
        ("13.0", release("12.9"), "nvcc is of CUDA 12.9, and PyTorch of CUDA 13.0; install the"),
        ("12.6", release("13.0"), "nvcc is of CUDA 13.0, and PyTorch of CUDA 12.6; install the"),
        ("13.0", release("13.0"), None),
        ("12.8", release("12.4"), None),
    ],
)
def test_a_toolkit_that_will_not_do_is_described_in_one_sentence(
    checks: ModuleType, tmp_path: Path, torch_cuda: str | None, says: str | None, said: str | None
) -> None:
    problem = checks.toolkit_problem(torch_cuda, str(toolkit(tmp_path, says)))
    if said is None:
        assert problem is None
    else:
        assert said.replace("HOME", str(tmp_path)) in problem
        assert "\n" not in problem


def test_a_toolkit_that_is_not_there_or_lacks_its_headers_is_said(
    checks: ModuleType, tmp_path: Path
) -> None:
    assert checks.toolkit_problem("13.0", None).startswith("no nvcc was found; install")
    conda = toolkit(tmp_path / "conda", release("13.0"), "targets/x86_64-linux/include")
    assert checks.toolkit_problem("13.0", str(conda)) is None
    wrapper = toolkit(tmp_path / "usr", release("13.0"), "elsewhere")
    assert "not include/cuda_runtime_api.h" in checks.toolkit_problem("13.0", str(wrapper))


def test_nvcc_is_looked_for_where_pytorch_looks(checks: ModuleType, tmp_path: Path) -> None:
    named, on_path = (toolkit(tmp_path / name, "") / "bin" / "nvcc" for name in ("a", "b"))
    environ = {"PATH": str(on_path.parent), "CUDA_HOME": str(named.parent.parent)}
    assert checks.find_nvcc(environ) == str(named)
    assert checks.find_nvcc({**environ, "CUDA_HOME": str(tmp_path)}) is None
    assert checks.find_nvcc({"PATH": environ["PATH"]}) == str(on_path)


def test_gpu_generations_are_those_that_nvcc_knows(checks: ModuleType) -> None:
    assert checks.gpu_generations((12, 4)) == checks.gpu_generations(None) == "8.0;9.0+PTX"
    assert checks.gpu_generations((13, 0)) == "8.0;9.0;10.0;12.0+PTX"
