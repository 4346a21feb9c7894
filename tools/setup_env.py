"""Makes what `make demo` and `make test` run in: a virtual environment, the pinned stack, the op.

    python3 tools/setup_env.py [--rebuild]

What is there already is left alone: each step leaves a stamp, keyed on what it was made from (the
requirement files, the op's sources, what its build reads), and is repeated only where that changed.
Where the machine lacks something, one sentence says what to install, and nothing half-made stays.

Environment:
    PYTHON      the interpreter to use (default: the first of python3, python3.12, python3.11 that
                will do)
    CGSPN_VENV  the virtual environment to make or to use (default: .venv in the repository)
The op's build reads more variables (see setup.py); pip's own (PIP_INDEX_URL, PIP_FIND_LINKS, ...)
apply as everywhere.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from setup_checks import (
    SetupError,
    check_compiler,
    choose_python,
    cpu_features,
    find_nvcc,
    has_gpu,
    probe,
    python_problem,
)

ROOT = Path(__file__).resolve().parent.parent
STACK, DEV = "requirements/stack.txt", "requirements/dev.txt"
# What changes the outcome of setup.py, and so asks for another build.
BUILD_VARIABLES = (
    "CXX",
    "CGSPN_CPU_ARCH",
    "FORCE_CUDA",
    "TORCH_CUDA_ARCH_LIST",
    "CUDA_HOME",
    "CUDA_PATH",
)
# What setup.py says that is worth passing on.
BUILD_REMARKS = ("only the CPU op is built", "the CUDA kernels are built for")


def progress_of(line: str) -> "tuple[str, float] | None":
    """How far pip or the compiler is, from a line of its output.

    Returns:
        What to show and the share done (0 where unknown); None for a line that says nothing.
    """
    counted = re.match(r"\s*Progress (\d+) of (\d+)|\s*\[(\d+)/(\d+)\] ", line)
    if counted:
        done, total, file, files = (int(group or 0) for group in counted.groups())
        if files:
            return f"file {file} of {files}", file / files
        return f"{done / 1e6:.0f} of {total / 1e6:.0f} MB", done / max(total, 1)
    package = re.match(r"\s*(Collecting|Downloading|Processing) (\S+)", line)
    if package:
        return f"{package.group(1).lower()} {package.group(2).rsplit('/', 1)[-1]}", 0.0
    if "Installing collected packages:" in line:
        return f"unpacking {line.count(',') + 1} package(s)", 0.0
    return None


def clock(seconds: float) -> str:
    """A duration as m:ss."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def run_step(title: str, command: list, environ: dict) -> "tuple[int, str]":
    """Runs a command, showing in one line what is done, since when, how far it is and what is left.

    Args:
        title: What the step does.
        command: The command, run in the repository.
        environ: Its environment variables.

    Returns:
        Its exit status and what it wrote.
    """
    live = sys.stdout.isatty()
    start = shown = counting = time.monotonic()
    written, detail, share = [], "", 0.0
    lines = queue.Queue()  # type: queue.Queue[str | None]
    print(f"{title} ...", end="" if live else "\n", flush=True)
    child = subprocess.Popen(
        command,
        cwd=str(ROOT),
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )

    def read() -> None:
        for line in child.stdout:
            lines.put(line.decode(errors="replace"))
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        line = ""
        while line is not None:
            with contextlib.suppress(queue.Empty):
                line = lines.get(timeout=0.5)
                written.append(line or "")
                before = share
                detail, share = progress_of(line or "") or (detail, share)
                if share < before:
                    counting = time.monotonic()
            now = time.monotonic()
            if now - shown >= (0.2 if live else 15):
                shown = now
                text = f"{clock(now - start)}  {detail}"
                if 0 < share < 1:
                    text += f", {clock((now - counting) * (1 / share - 1))} left"
                if live:
                    width = shutil.get_terminal_size().columns - 1
                    print(f"\r\033[K{f'{title} ... {text}'[:width]}", end="", flush=True)
                else:
                    print(f"    {text}", flush=True)
        status = child.wait()
    finally:
        if child.poll() is None:
            child.terminate()
            child.wait()
    outcome = f"{'done' if status == 0 else 'failed'} in {clock(time.monotonic() - start)}"
    print(f"\r\033[K{title} ... {outcome}" if live else f"    {outcome}", flush=True)
    return status, "".join(written)


def last_line(output: str) -> str:
    """The last line of a program's output, where most say what went wrong."""
    return (output.strip() or "it gave no reason").splitlines()[-1].strip()


def pip_failure(what: str, output: str) -> SetupError:
    """One sentence in place of what pip wrote."""
    if re.search(r"NewConnectionError|NameResolutionError|Timeout|ProxyError|SSLError", output):
        return SetupError(
            f"{what} could not be downloaded, for the package index was not reached: check the "
            "network and its proxy (HTTPS_PROXY), or point pip at a mirror or a folder of wheels "
            "(PIP_INDEX_URL, PIP_FIND_LINKS)."
        )
    if "No space left on device" in output:
        return SetupError(
            f"{what} did not fit on the disk: free some space, or have the environment and the "
            "temporary files elsewhere (CGSPN_VENV, TMPDIR)."
        )
    errors = [line for line in output.splitlines() if line.startswith("ERROR:")]
    said = last_line("\n".join(errors) or output)
    return SetupError(f"{what} could not be installed; pip says: {said}")


def digest(*parts: object) -> str:
    """A stamp's key: the hash of everything that a step's outcome depends on."""
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()


class Environment:
    """The virtual environment and the steps that make it.

    Args:
        root: The repository.
        environ: Environment variables.
        run: Runs a long command; stands in for `run_step` in the tests.
        ask: Asks an interpreter about itself; stands in for `probe` in the tests.
    """

    def __init__(self, root: Path, environ: dict, run=run_step, ask=probe) -> None:
        self.root, self.run, self.ask = root, run, ask
        self.path = (root / (environ.get("CGSPN_VENV") or ".venv")).resolve()
        self.python = str(self.path / "bin" / "python")
        self.stamps = self.path / ".cgspn_seg"
        self.gpu = has_gpu(environ)
        # PYTHONPATH and pip's --user would put other packages in the place of the pinned ones.
        self.environ = {
            **{name: environ[name] for name in environ if name not in ("PYTHONPATH", "PYTHONHOME")},
            "PATH": f"{self.path / 'bin'}{os.pathsep}{environ.get('PATH', os.defpath)}",
            "PIP_USER": "0",
            "PIP_NO_INPUT": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }

    def stamped(self, step: str) -> "str | None":
        """The key that a step was last completed with."""
        stamp = self.stamps / step
        return stamp.read_text() if stamp.exists() else None

    def stamp(self, step: str, key: "str | None") -> None:
        """Marks a step as completed with a key, or (None) as still to be done."""
        if key is None:
            with contextlib.suppress(FileNotFoundError):
                (self.stamps / step).unlink()
            return
        self.stamps.mkdir(parents=True, exist_ok=True)
        new = self.stamps / f"{step}.new"
        new.write_text(key)
        os.replace(str(new), str(self.stamps / step))

    def installed(self, package: str) -> str:
        """The name and version of an installed package, "" where there is none."""
        found = sorted(self.path.glob(f"lib/python*/site-packages/{package}-*.dist-info"))
        return found[0].stem if found else ""

    def stack_key(self) -> str:
        """What the installed packages depend on."""
        return digest(self.path, *((self.root / name).read_bytes() for name in (STACK, DEV)))

    def extension_key(self) -> str:
        """What the compiled op depends on, the machine included, and the op itself."""
        sources = sorted(path for path in (self.root / "csrc").rglob("*") if path.is_file())
        # It lies in the source tree, where another environment, or a build by hand, may replace it.
        built = [(path, path.stat().st_mtime_ns) for path in self.root.glob("cgspn_seg/_C*.so")]
        native = self.environ.get("CGSPN_CPU_ARCH", "native") == "native"
        nvcc = find_nvcc(self.environ)
        scripts = [self.root / name for name in ("setup.py", "tools/setup_checks.py")]
        return digest(
            self.root,
            sorted(built),
            self.installed("torch"),
            [self.environ.get(name) for name in BUILD_VARIABLES],
            cpu_features() if native else "",
            self.gpu,
            # Resolved, for /usr/local/cuda is a link that another toolkit may take over.
            nvcc and (os.path.realpath(nvcc), os.path.getmtime(nvcc)),
            *((path, path.read_bytes()) for path in [*sources, *scripts]),
        )

    def pip(self, title: str, what: str, *arguments: str) -> None:
        """Runs `pip install`, with a download's progress where this pip can tell it."""
        version = tuple(map(int, re.findall(r"\d+", self.installed("pip"))[:2]))
        bar = ["--progress-bar", "raw"] if version >= (24, 1) else []
        command = [self.python, "-m", "pip", "install", *bar, *arguments]
        status, output = self.run(title, command, self.environ)
        if status:
            raise pip_failure(what, output)

    def create(self) -> None:
        """Makes the bare environment, in place of one that an interrupted call began."""
        if self.stamped("unfinished") is not None:
            shutil.rmtree(str(self.path))
        if self.path.exists():
            found = self.ask(self.python)
            home = self.stamped("home") or str(self.path)
            if home != str(self.path):
                problem = f"it was made as {home}, and its programs do not work elsewhere"
            elif found is None:
                problem = "it has no bin/python that starts"
            else:
                problem = python_problem(found, make_venv=False)
            if problem:
                raise SetupError(
                    f"{self.path} cannot be used, for {problem.rstrip('.')}; remove it, or name "
                    "another folder in CGSPN_VENV."
                )
            check_compiler(self.environ, found.include)
            return
        base = choose_python(self.environ, self.ask)
        check_compiler(self.environ, base.include)
        self.stamp("unfinished", "")
        command = [base.path, "-m", "venv", str(self.path)]
        title = f"Creating {self.path.name} with Python {base.dotted}"
        status, output = self.run(title, command, self.environ)
        if status:
            raise SetupError(f"`{' '.join(command)}` failed: {last_line(output)}")

    def install_stack(self) -> None:
        """Installs the pinned packages, torch first: by far the largest, it should fail early."""
        pins = (self.root / STACK).read_text().split()
        torch = next(pin for pin in pins if pin.startswith("torch=="))
        self.pip(f"Installing {torch}", torch, torch)
        files = [word for name in (STACK, DEV) for word in ("-r", str(self.root / name))]
        self.pip("Installing the stack", "The packages of requirements/", *files)
        self.check_opencv(next(pin for pin in pins if pin.startswith("opencv-python==")))

    def check_opencv(self, pin: str) -> None:
        """Imports OpenCV, and where the display libraries it is linked to are missing, swaps it.

        Clusters and containers often lack them, with nobody around who may install them. The
        headless build is the same but for windows, of which this project opens none.

        Args:
            pin: The requirement that OpenCV was installed from.
        """
        lacks = re.compile(r"(lib\S+): cannot open shared object file")
        command = [self.python, "-c", "import cv2"]
        status, output = self.run("Checking OpenCV", command, self.environ)
        missing = lacks.search(output)
        if status and missing:
            headless = pin.replace("opencv-python", "opencv-python-headless")
            print(
                f"warning: {pin} needs {missing.group(1)}, which this machine lacks (Debian, "
                f"Ubuntu: apt install libgl1 libglib2.0-0), so {headless} takes its place.",
                flush=True,
            )
            uninstall = [self.python, "-m", "pip", "uninstall", "--yes", "opencv-python"]
            self.run("Removing opencv-python", uninstall, self.environ)
            arguments = ["--no-deps", "--force-reinstall", headless]
            self.pip(f"Installing {headless}", headless, *arguments)
            status, output = self.run("Checking OpenCV", command, self.environ)
        if status:
            raise SetupError(
                f"OpenCV does not import ({last_line(output)}): install what it lacks "
                "(Debian, Ubuntu: apt install libgl1 libglib2.0-0)."
            )

    def build_extension(self) -> None:
        """Compiles the op against the installed torch; links the package into the environment."""
        options = ["--verbose", "--no-build-isolation", "--no-deps", "--editable", str(self.root)]
        command = [self.python, "-m", "pip", "install", *options]
        status, output = self.run("Compiling the op", command, self.environ)
        if status:
            log = output.partition("error: subprocess-exited-with-error")[0]
            errors = [line for line in log.splitlines() if re.search(r": (fatal )?error: ", line)]
            if errors:
                print("\n".join(errors[:20]), file=sys.stderr)
            said = "see the compiler's errors above" if errors else last_line(log)
            raise SetupError(f"The op did not compile: {said}")
        for line in output.splitlines():
            if any(remark in line for remark in BUILD_REMARKS):
                print(line.strip(), flush=True)
        command = [self.python, "-c", "import torch, cgspn_seg.ops; print(torch.version.cuda)"]
        status, output = self.run("Loading the op", command, self.environ)
        if status:
            raise SetupError(f"The op was compiled but does not load: {last_line(output)}")
        if self.gpu and last_line(output) == "None":
            print(
                "warning: a GPU is there, but only the CPU op is built: the installed PyTorch is a "
                "CPU build; install a CUDA build of it into the environment and do this again.",
                flush=True,
            )

    def ensure(self, rebuild: bool = False) -> None:
        """Does what is still to be done.

        Args:
            rebuild: Compile the op even where nothing it depends on has changed.

        Raises:
            SetupError: Something is missing; an environment that was just begun is removed.
        """
        if self.stamped("stack") != self.stack_key():
            try:
                self.create()
                self.stamp("stack", None)
                self.install_stack()
            except BaseException:
                if self.stamped("unfinished") is not None:
                    shutil.rmtree(str(self.path), ignore_errors=True)
                raise
            self.stamp("home", str(self.path))
            self.stamp("stack", self.stack_key())
            self.stamp("unfinished", None)
        if rebuild or self.stamped("extension") != self.extension_key():
            check_compiler(self.environ, self.ask(self.python).include)
            self.stamp("extension", None)
            self.build_extension()
            self.stamp("extension", self.extension_key())


@contextlib.contextmanager
def alone(root: Path):
    """Lets one call at a time work on a repository; a second one waits."""
    folder = os.open(str(root), os.O_RDONLY)
    try:
        # Some network file systems have no locks: there, two calls at once are the user's business.
        with contextlib.suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rebuild", action="store_true", help="compile the op in any case")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Set-up was terminated."))
    try:
        with alone(ROOT):
            Environment(ROOT, dict(os.environ)).ensure(arguments.rebuild)
    except SetupError as problem:
        print(problem, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nSet-up was interrupted.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
