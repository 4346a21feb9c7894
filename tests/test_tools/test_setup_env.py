"""The set-up's own logic, on an invented machine: nothing is downloaded, installed or compiled."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
TOOLS = ROOT / "tools"
NO_NETWORK = "WARNING: Retrying after NewConnectionError\nERROR: No matching distribution found"
NO_LIBGL = "ImportError: libGL.so.1: cannot open shared object file: No such file or directory"


@pytest.fixture
def setup_env(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/setup_env.py, which is a script beside its helper and in no package."""
    monkeypatch.syspath_prepend(str(TOOLS))
    import setup_env

    return setup_env


class Machine:
    """A repository in a folder, and a machine that acts on it in the place of venv, pip and g++."""

    def __init__(self, setup_env: ModuleType, root: Path) -> None:
        self.setup_env, self.root, self.venv = setup_env, root, root / ".venv"
        self.environ = {"PATH": os.defpath}
        self.steps: list[str] = []
        self.commands: list[list[str]] = []
        self.answers: dict[str, tuple[int, str]] = {}  # by step: what goes otherwise than well
        self.version = (3, 11, 7)
        for folder in ("requirements", "csrc/cpu", "cgspn_seg", "include", "tools"):
            (root / folder).mkdir(parents=True)
        (root / "include" / "Python.h").touch()
        (root / "setup.py").write_text("setup()")
        (root / "tools" / "setup_checks.py").write_text("problem = None")
        (root / "csrc" / "cpu" / "scan.cpp").write_text("int one;")
        (root / "requirements" / "stack.txt").write_text("torch==2.13.0\nopencv-python==5.0.0\n")
        (root / "requirements" / "dev.txt").write_text("pytest==9.2.0\n")

    def ask(self, name: str) -> object:
        if name.startswith(str(self.root)) and not Path(name).exists():
            return None
        include = str(self.root / "include")
        return sys.modules["setup_checks"].Interpreter(name, name, self.version, True, include)

    def run(self, title: str, command: list[str], environ: dict[str, str]) -> tuple[int, str]:
        self.steps.append(title)
        self.commands.append(command)
        if command[1:3] == ["-m", "venv"]:
            (self.venv / "bin").mkdir(parents=True)
            (self.venv / "bin" / "python").touch()
        if title in self.answers:
            return self.answers[title]
        if "--editable" in command:
            (self.root / "cgspn_seg" / "_C.so").write_text("compiled")
        return 0, "12.0\n" if title == "Loading the op" else ""

    def ensure(self, rebuild: bool = False) -> list[str]:
        """Runs the set-up; returns the titles of its steps."""
        self.steps = []
        environment = self.setup_env.Environment(self.root, self.environ, self.run, self.ask)
        environment.ensure(rebuild)
        return self.steps

    def refused(self) -> str:
        """Runs a set-up that must fail; returns what it says."""
        with pytest.raises(self.setup_env.SetupError) as caught:
            self.ensure()
        return str(caught.value)


@pytest.fixture
def machine(setup_env: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(setup_env, "check_compiler", lambda environ, include: None)
    monkeypatch.setattr(setup_env, "has_gpu", lambda environ: False)
    return Machine(setup_env, tmp_path / "repository")


EVERYTHING = [
    "Creating .venv with Python 3.11.7",
    "Installing torch==2.13.0",
    "Installing the stack",
    "Checking OpenCV",
    "Compiling the op",
    "Loading the op",
]
COMPILING = EVERYTHING[-2:]


# What is done, and what is not done again


def test_the_first_call_does_everything_with_torch_before_the_rest(machine: Machine) -> None:
    assert machine.ensure() == EVERYTHING
    assert machine.commands[1][-1] == "torch==2.13.0"
    assert {"--no-build-isolation", "--no-deps", "--editable"} <= set(machine.commands[4])


def test_a_second_call_does_nothing(machine: Machine) -> None:
    machine.ensure()
    assert machine.ensure() == []


@pytest.mark.parametrize("name", ["stack.txt", "dev.txt"])
def test_other_requirements_are_installed_into_the_same_environment(
    machine: Machine, name: str
) -> None:
    machine.ensure()
    with (machine.root / "requirements" / name).open("a") as file:
        file.write("rich==15.0.0\n")
    assert machine.ensure() == EVERYTHING[1:4]
    assert machine.ensure() == []


CHANGES: dict[str, Callable[[Machine], object]] = {
    "source edited": lambda it: (it.root / "csrc/cpu/scan.cpp").write_text("int two;"),
    "source added": lambda it: (it.root / "csrc/scan.h").touch(),
    "setup.py edited": lambda it: (it.root / "setup.py").write_text("setup(1)"),
    "its checks edited": lambda it: (it.root / "tools/setup_checks.py").write_text("problem = 1"),
    "compiler named": lambda it: it.environ.update(CXX="clang++"),
    "torch replaced": lambda it: (
        it.venv / "lib/python3.11/site-packages/torch-2.12.0.dist-info"
    ).mkdir(parents=True),
    "op removed": lambda it: (it.root / "cgspn_seg/_C.so").unlink(),
    "op built by hand": lambda it: os.utime(it.root / "cgspn_seg/_C.so", ns=(1, 1)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_op_is_compiled_again_where_what_it_depends_on_changed(
    machine: Machine, change: Callable[[Machine], object]
) -> None:
    machine.ensure()
    change(machine)
    assert machine.ensure() == COMPILING
    assert machine.ensure() == []


def test_the_op_is_compiled_again_with_another_cuda_toolkit(machine: Machine) -> None:
    toolkits = []
    for name in ("cuda-12.8", "cuda-13.0"):
        nvcc = machine.root.parent / name / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.touch()
        toolkits.append(nvcc.parent.parent)
    link = machine.root.parent / "cuda"
    link.symlink_to(toolkits[0])
    machine.environ["CUDA_HOME"] = str(link)
    machine.ensure()
    assert machine.ensure() == []
    link.unlink()
    link.symlink_to(toolkits[1])
    assert machine.ensure() == COMPILING
    assert machine.ensure() == []


def test_rebuild_compiles_though_nothing_changed(machine: Machine) -> None:
    machine.ensure()
    assert machine.ensure(rebuild=True) == COMPILING


def test_the_environment_may_lie_elsewhere(machine: Machine, tmp_path: Path) -> None:
    machine.venv = tmp_path / "elsewhere"
    machine.environ["CGSPN_VENV"] = str(machine.venv)
    machine.ensure()
    assert not (machine.root / ".venv").exists()
    assert machine.ensure() == []


def test_packages_of_the_surrounding_environment_stay_out(setup_env: ModuleType) -> None:
    environ = {"PATH": "/bin", "PYTHONPATH": "/site", "PIP_USER": "1", "CXX": "g++"}
    seen = setup_env.Environment(ROOT, environ).environ
    assert "PYTHONPATH" not in seen
    assert (seen["PIP_USER"], seen["CXX"]) == ("0", "g++")


# What a failure leaves


@pytest.mark.parametrize("step", EVERYTHING[:4])
def test_a_new_environment_that_fails_is_removed(machine: Machine, step: str) -> None:
    machine.answers[step] = 1, "ERROR: broken"
    assert "broken" in machine.refused()
    assert not machine.venv.exists()
    machine.answers.clear()
    assert machine.ensure() == EVERYTHING


def test_an_interrupted_environment_is_removed(machine: Machine) -> None:
    def interrupt(*_: object) -> tuple[int, str]:
        assert machine.venv.exists()
        raise KeyboardInterrupt

    environment = machine.setup_env.Environment(
        machine.root, machine.environ, interrupt, machine.ask
    )
    environment.stamp("unfinished", "")
    with pytest.raises(KeyboardInterrupt):
        environment.ensure()
    assert not machine.venv.exists()


def test_an_environment_whose_set_up_was_killed_is_made_anew(machine: Machine) -> None:
    rest = machine.venv / "lib" / "half.py"
    rest.parent.mkdir(parents=True)
    rest.touch()
    machine.setup_env.Environment(machine.root, machine.environ).stamp("unfinished", "")
    assert machine.ensure() == EVERYTHING
    assert not rest.exists()


def test_an_update_that_fails_is_repeated_even_where_its_cause_is_taken_back(
    machine: Machine,
) -> None:
    machine.ensure()
    requirements = machine.root / "requirements" / "dev.txt"
    before = requirements.read_text()
    requirements.write_text("pytest==9.3.0\n")
    machine.answers["Installing the stack"] = 1, NO_NETWORK
    assert "network" in machine.refused()
    assert machine.venv.exists()
    machine.answers.clear()
    requirements.write_text(before)  # half the packages may be of the other list
    assert machine.ensure() == EVERYTHING[1:4]


def test_a_build_that_fails_is_repeated_even_where_nothing_changed(machine: Machine) -> None:
    machine.ensure()
    machine.answers["Compiling the op"] = 1, "ERROR: half the package is linked"
    with pytest.raises(machine.setup_env.SetupError, match="half the package"):
        machine.ensure(rebuild=True)
    machine.answers.clear()
    assert machine.ensure() == COMPILING


def test_an_environment_of_the_user_is_used_and_never_removed(machine: Machine) -> None:
    (machine.venv / "bin").mkdir(parents=True)
    (machine.venv / "bin" / "python").touch()
    machine.answers["Installing the stack"] = 1, NO_NETWORK
    machine.refused()
    assert machine.venv.exists()
    machine.answers.clear()
    assert machine.ensure() == EVERYTHING[1:]


def test_an_op_that_does_not_compile_is_tried_again_without_the_stack(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    log = (
        "building\ncsrc/cpu/scan.cpp:1:5: error: expected ';'\nerror: subprocess-exited-with-error"
    )
    machine.answers["Compiling the op"] = 1, log
    assert "did not compile" in machine.refused()
    assert capsys.readouterr().err == "csrc/cpu/scan.cpp:1:5: error: expected ';'\n"
    machine.answers.clear()
    assert machine.ensure() == COMPILING


def test_an_op_that_does_not_load_is_no_success(machine: Machine) -> None:
    machine.answers["Loading the op"] = 1, "ImportError: undefined symbol"
    assert "does not load: ImportError: undefined symbol" in machine.refused()
    machine.answers.clear()
    assert machine.ensure() == COMPILING


def test_what_setup_py_refuses_is_passed_on(machine: Machine) -> None:
    log = "x\n  FORCE_CUDA=1, but there is no nvcc.\n  error: subprocess-exited-with-error\n  noise"
    machine.answers["Compiling the op"] = 1, log
    assert machine.refused() == "The op did not compile: FORCE_CUDA=1, but there is no nvcc."


@pytest.mark.parametrize("version", [(3, 10, 1), (3, 13, 0)])
def test_an_environment_of_another_python_is_refused(
    machine: Machine, version: tuple[int, ...]
) -> None:
    (machine.venv / "bin").mkdir(parents=True)
    (machine.venv / "bin" / "python").touch()
    machine.version = version
    said = machine.refused()
    assert str(machine.venv) in said
    assert "needs 3.11 or 3.12" in said
    assert machine.steps == []


def test_a_folder_without_python_is_refused_and_kept(machine: Machine) -> None:
    machine.venv.mkdir()
    assert "has no bin/python that starts" in machine.refused()
    assert machine.venv.exists()


def test_a_moved_environment_is_refused(machine: Machine) -> None:
    machine.ensure()
    moved = machine.root.parent / "moved"
    machine.root.rename(moved)
    machine.root = moved
    assert f"it was made as {machine.venv}" in machine.refused()


# What it says


@pytest.mark.parametrize("environ", [{}, {"CXX": "no-such-compiler -O2"}])
def test_a_missing_compiler_is_said_before_anything_is_made(
    setup_env: ModuleType, tmp_path: Path, environ: dict[str, str]
) -> None:
    machine = Machine(setup_env, tmp_path / "repository")
    machine.environ = {"PATH": str(tmp_path), **environ}
    said = machine.refused()
    assert "no C++ compiler" in said
    assert "apt install g++" in said
    assert "\n" not in said
    assert machine.steps == []
    assert not machine.venv.exists()


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (NO_NETWORK, "the package index was not reached: check the network"),
        ("ERROR: [Errno 28] No space left on device", "did not fit on the disk"),
        ("x\nERROR: No matching distribution found for torch", "No matching distribution found"),
        ("/bin/python: No module named pip", "No module named pip"),
    ],
)
def test_what_stops_pip_is_said_in_one_sentence(machine: Machine, output: str, said: str) -> None:
    machine.answers["Installing torch==2.13.0"] = 1, output
    assert said in machine.refused()


def test_without_libgl_the_headless_opencv_is_taken_and_that_is_said(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    run = machine.run

    def lacking(title: str, command: list[str], environ: dict[str, str]) -> tuple[int, str]:
        swapped = "Removing opencv-python" in machine.steps
        machine.answers["Checking OpenCV"] = (0, "") if swapped else (1, NO_LIBGL)
        return run(title, command, environ)

    machine.run = lacking
    steps = machine.ensure()
    assert "Installing opencv-python-headless==5.0.0" in steps
    assert steps[-2:] == COMPILING
    said = capsys.readouterr().out
    assert "needs libGL.so.1" in said
    assert "apt install libgl1" in said
    assert machine.ensure() == []


def test_an_opencv_that_does_not_import_either_way_is_refused(machine: Machine) -> None:
    machine.answers["Checking OpenCV"] = 1, NO_LIBGL
    assert "apt install libgl1" in machine.refused()
    assert not machine.venv.exists()


def test_what_setup_py_remarks_and_a_gpu_that_goes_unused_are_said(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine.setup_env, "has_gpu", lambda environ: True)
    warning = "warning: a GPU is visible, but only the CPU op is built: no nvcc was found."
    machine.answers["Compiling the op"] = 0, f"pip\n  {warning}\npip"
    machine.ensure()
    assert capsys.readouterr().out == f"{warning}\n"
    remark = "no GPU is visible, so the CUDA kernels are built for 8.0;9.0+PTX; others are not."
    machine.answers["Compiling the op"] = 0, f"pip\n  {remark}\npip"
    machine.ensure(rebuild=True)
    assert capsys.readouterr().out == f"{remark}\n"
    machine.answers = {"Loading the op": (0, "None\n")}
    machine.ensure(rebuild=True)
    assert "the installed PyTorch is a CPU build" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("Progress 5000000 of 20000000", ("5 of 20 MB", 0.25)),
        ("  [1/4] c++ -c a.cpp", ("file 1 of 4", 0.25)),
        (
            "  Downloading https://host/a/torch-2.13.0.whl (9 MB)",
            ("downloading torch-2.13.0.whl", 0),
        ),
        ("Installing collected packages: a, b", ("unpacking 2 package(s)", 0)),
        ("Requirement already satisfied: a", None),
    ],
)
def test_progress_is_read_from_pip_and_the_compiler(
    setup_env: ModuleType, line: str, shown: object
) -> None:
    assert setup_env.progress_of(line) == shown


def test_a_step_hides_what_the_program_writes_and_returns_it(
    setup_env: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-c", "import sys; print('noise'); sys.exit('reason')"]
    status, output = setup_env.run_step("Trying", command, dict(os.environ))
    assert status == 1
    assert set(output.split()) == {"noise", "reason"}
    assert re.fullmatch(r"Trying \.\.\.\n    failed in \d+:\d\d\n", capfd.readouterr().out)


def test_make_ends_with_the_sentence_alone(tmp_path: Path) -> None:
    """No echo of the recipe, no traceback, no environment; make itself adds where it stopped."""
    venv = tmp_path / "venv"
    command = ["make", "setup", "PYTHON=/gone", f"CGSPN_VENV={venv}"]
    # Under `make test` this would be a sub-make, which reports the folders it enters.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    ended = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False
    )
    assert ended.returncode != 0
    assert ended.stdout == ""
    sentence, of_make = ended.stderr.splitlines()
    assert sentence.startswith("PYTHON=/gone does not start")
    assert of_make.startswith("make")
    assert not venv.exists()


@pytest.mark.parametrize("name", ["setup_env.py", "setup_checks.py"])
def test_an_old_python_can_read_the_scripts_far_enough_to_be_refused(name: str) -> None:
    ast.parse((TOOLS / name).read_text(encoding="utf-8"), feature_version=(3, 6))
