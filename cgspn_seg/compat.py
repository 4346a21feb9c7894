"""Lets MMSegmentation run on what is installed; has to be imported before ``mmseg``.

Importing this module
    * says what to install where OpenCV misses a system library,
    * fills in ``mmcv.ops`` where mmcv comes without compiled operators (mmcv-lite), and
    * silences the warnings that MMSegmentation and MMEngine raise about their own code.
"""

import ast
import importlib
import importlib.machinery
import importlib.util
import sys
import types
import warnings
from pathlib import Path

_FULL_MMCV_HINT = (
    "needs mmcv's compiled operators, and the installed mmcv has none (mmcv-lite): "
    "install the full package, `pip install mmcv==2.1.0` (built from source), in its place. "
    "Nothing in cgspn_seg needs them."
)

# What opencv-python loads from the system at import, and who provides it on Debian and Ubuntu.
_OPENCV_SYSTEM_LIBRARIES = {
    "libGL.so": "libgl1",
    "libgthread": "libglib2.0-0",
    "libglib": "libglib2.0-0",
}

# All are raised by these projects about their own code: who trains a model can do nothing about it.
_FILTERS = (
    # mmcv-lite says that it lacks an operator; here it raises when it is used.
    {"message": "Fail to import ``MultiScaleDeformableAttention``", "category": UserWarning},
    # mmseg's decode heads build their losses through mmseg's own deprecated function.
    {"message": "``build_loss`` would be deprecated", "category": UserWarning},
    # mmseg's CrossEntropyLoss explains its default, which the configs choose, as all of mmseg's do.
    {"message": "Default ``avg_non_ignore`` is False", "category": UserWarning},
    # mmseg's visualization hook reports that it draws nothing, which `--show-dir` changes.
    {"message": "The draw is False", "category": UserWarning},
    # MMEngine's AmpOptimWrapper creates torch.cuda.amp.GradScaler, whatever the dtype.
    {"message": r"`torch\.cuda\.amp\.GradScaler", "category": FutureWarning},
)


def check_opencv() -> None:
    """Import OpenCV.

    Raises:
        ImportError: A system library is missing; the message says which and how to install it.
    """
    try:
        import cv2  # noqa: F401
    except ImportError as error:
        for library, package in _OPENCV_SYSTEM_LIBRARIES.items():
            if library in str(error):
                raise ImportError(
                    f"OpenCV cannot be imported ({error}): install the system library with "
                    f"`apt install {package}` (Debian, Ubuntu), or replace opencv-python by "
                    "opencv-python-headless, which needs no display libraries."
                ) from error
        raise


class _MissingOp:
    """Stands for a compiled mmcv operator: may be imported and subclassed, not used."""

    def __new__(cls, *args: object, **kwargs: object) -> "_MissingOp":
        raise ModuleNotFoundError(f"mmcv.ops.{cls.__name__} {_FULL_MMCV_HINT}", name="mmcv._ext")


def install_mmcv_ops_stub() -> bool:
    """Put a module in the place of ``mmcv.ops`` where mmcv has no compiled operators.

    mmseg imports ``mmcv.ops`` in places that each use of it passes. The stand-in has mmcv's pure
    PyTorch ``point_sample`` functions; every other operator can be imported, and raises
    :class:`ModuleNotFoundError` when it is used. Full mmcv is left alone.

    Returns:
        Whether the stand-in is in place after the call.
    """
    if "mmcv.ops" in sys.modules:
        return isinstance(sys.modules["mmcv.ops"], _OpsStub)
    if importlib.util.find_spec("mmcv._ext") is not None:
        return False
    import mmcv

    stub = _OpsStub(Path(mmcv.__file__).parent / "ops")
    sys.modules["mmcv.ops"] = mmcv.ops = stub
    # The import binds the submodule's name in the stub; as in mmcv, the function of that name wins.
    pure = importlib.import_module("mmcv.ops.point_sample")
    for name in set(vars(pure)).intersection(stub.__all__):
        setattr(stub, name, getattr(pure, name))
    return True


class _OpsStub(types.ModuleType):
    """``mmcv.ops`` without its compiled part; ``folder`` is where the package's files are."""

    def __init__(self, folder: Path) -> None:
        super().__init__("mmcv.ops", "mmcv.ops without compiled operators, see cgspn_seg.compat.")
        self.__spec__ = importlib.machinery.ModuleSpec("mmcv.ops", None, is_package=True)
        self.__path__ = [str(folder)]
        self.__file__ = str(folder / "__init__.py")
        self.__all__ = _exported_names(folder / "__init__.py")

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") or name not in self.__all__:
            raise AttributeError(f"module 'mmcv.ops' has no attribute {name!r}")
        missing = type(name, (_MissingOp,), {"__module__": "mmcv.ops"})
        setattr(self, name, missing)
        return missing


def _exported_names(init_file: Path) -> list[str]:
    """Read ``__all__`` out of a module that cannot be imported."""
    for node in ast.parse(init_file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
            return ast.literal_eval(node.value)
    raise ImportError(f"{init_file} defines no __all__: this mmcv is not one that cgspn_seg knows.")


def silence_upstream_warnings() -> None:
    """Ignore the warnings listed in this module; each has its reason there."""
    for options in _FILTERS:
        warnings.filterwarnings("ignore", **options)


check_opencv()
install_mmcv_ops_stub()
silence_upstream_warnings()
