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
