"""How a tool ends."""

import sys
from collections.abc import Callable

import pytest
from torch.utils.data import DataLoader, Dataset

import cgspn_seg.engine  # noqa: F401  (before mmseg)

# isort: split
from mmengine.registry import OPTIMIZERS, Registry, build_from_cfg
from mmseg.registry import DATASETS, HOOKS, MODELS, WEIGHT_INITIALIZERS

from cgspn_seg.checkpoints import CheckpointError
from cgspn_seg.datasets.errors import check_label_shape
from cgspn_seg.engine.cli import run
from cgspn_seg.models import CGSPN  # noqa: F401  (registers it)
from cgspn_seg.visualization import distinct_palette


class Ended:
    """Runs a main function as a tool would, and keeps how it ended and what it said."""

    def __init__(self, main: Callable[[], int | None], capsys: pytest.CaptureFixture) -> None:
        with pytest.raises(SystemExit) as ended:
            run(main)
        self.code = ended.value.code
        self.said = capsys.readouterr().err


@pytest.fixture(autouse=True)
def as_tool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/tools/train.py"])
    monkeypatch.delenv("CGSPN_DEBUG", raising=False)


def raising(error: BaseException) -> Callable[[], None]:
    def main() -> None:
        raise error

    return main


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1)])
def test_what_main_returns_is_the_exit_code(
    returned: int | None, code: int, capsys: pytest.CaptureFixture
) -> None:
    ended = Ended(lambda: returned, capsys)
    assert (ended.code, ended.said) == (code, "")


def test_an_error_raised_by_the_package_is_one_message(capsys: pytest.CaptureFixture) -> None:
    ended = Ended(lambda: distinct_palette(0), capsys)
    assert ended.code == 2
    assert ended.said == "\ntrain.py: error: num_colors: expected 1 to 1024, got 0\n"


def test_a_refused_checkpoint_is_one_message(capsys: pytest.CaptureFixture) -> None:
    ended = Ended(raising(CheckpointError("x.pth: refused")), capsys)
    assert (ended.code, ended.said) == (2, "\ntrain.py: error: x.pth: refused\n")


class Unreadable(Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> None:
        check_label_shape("labels/7.png", (4, 4, 3), None)


def test_an_error_in_a_data_loader_worker_is_one_message(capsys: pytest.CaptureFixture) -> None:
    ended = Ended(lambda: list(DataLoader(Unreadable(), num_workers=1)), capsys)
    assert ended.code == 2
    assert ended.said.startswith("\ntrain.py: error: The label labels/7.png has shape (4, 4, 3)")
    assert "Traceback" not in ended.said


class Broken(Unreadable):
    def __getitem__(self, index: int) -> None:
        raise ValueError("not ours")


@pytest.mark.parametrize(
    "main",
    [
        raising(ValueError("from elsewhere")),
        raising(AssertionError("a bug")),
        lambda: list(DataLoader(Broken(), num_workers=1)),
    ],
)
def test_other_errors_keep_their_traceback(main: Callable[[], None]) -> None:
    with pytest.raises((ValueError, AssertionError)):
        run(main)


@pytest.mark.usefixtures("mmseg_scope")
@pytest.mark.parametrize(
    ("registry", "config", "said"),
    [
        (
            HOOKS,
            dict(type="CheckDataHook", max_second=3),
            "CheckDataHook has no key 'max_second'; it takes max_seconds, num_threads; did you "
            "mean 'max_seconds'?",
        ),
        (
            WEIGHT_INITIALIZERS,
            dict(type="Pretrained", checkpoints="x.pth"),
            "CheckedPretrainedInit has no key 'checkpoints'; it takes checkpoint, prefix, "
            "map_location, allow_partial; did you mean 'checkpoint'?",
        ),
        (DATASETS, dict(type="CamVidDataset", img_sufix=".png"), "; did you mean 'img_suffix'?"),
        # Taken by a class above it alone.
        (DATASETS, dict(type="CamVidDataset", lazy_inits=True), "; did you mean 'lazy_init'?"),
        (
            OPTIMIZERS,
            dict(type="SGD", params=[], lrr=1),
            "SGD has no key 'lrr'; it takes params, lr",
        ),
    ],
)
def test_an_unknown_key_in_a_config_is_one_message(
    registry: Registry, config: dict, said: str, capsys: pytest.CaptureFixture
) -> None:
    ended = Ended(lambda: registry.build(config), capsys)
    assert ended.code == 2
    name = said.split(" ")[0] if not said.startswith(";") else config["type"]
    assert f"train.py: error: config: {name} has no key " in ended.said
    assert said in ended.said


@pytest.mark.usefixtures("mmseg_scope")
def test_keys_that_a_data_set_takes_beside_its_own_are_known(capsys: pytest.CaptureFixture) -> None:
    ended = Ended(lambda: DATASETS.build(dict(type="CamVidDataset", fractoin=0.1)), capsys)
    assert ended.code == 2
    assert "CamVidDataset has no key 'fractoin'; it takes " in ended.said
    assert ", fraction, seed; did you mean 'fraction'?" in ended.said


@pytest.mark.usefixtures("mmseg_scope")
@pytest.mark.parametrize(
    ("registry", "kind", "said"),
    [
        (MODELS, "EncoderDecodr", "there is no such model; did you mean 'EncoderDecoder'?"),
        (HOOKS, "CheckpointHok", "there is no such hook; did you mean 'CheckpointHook'?"),
        (MODELS, "Qqq", "there is no such model; one of your own has to be imported, by custom_im"),
    ],
)
def test_an_unknown_type_in_a_config_is_one_message(
    registry: Registry, kind: str, said: str, capsys: pytest.CaptureFixture
) -> None:
    ended = Ended(lambda: registry.build(dict(type=kind)), capsys)
    assert ended.code == 2
    assert f"train.py: error: config: type={kind!r}: {said}" in ended.said


def test_an_unknown_type_inside_another_part_is_one_message(capsys: pytest.CaptureFixture) -> None:
    def outer(inner: dict) -> object:
        return MODELS.build(inner)

    cfg = dict(type=outer, inner=dict(type="CGSPM"))
    ended = Ended(lambda: build_from_cfg(cfg, HOOKS), capsys)
    assert "type='CGSPM': there is no such model; did you mean 'CGSPN'?" in ended.said


def test_another_missing_key_keeps_its_traceback() -> None:
    def broken() -> None:
        {}["gone"]

    with pytest.raises(KeyError):
        run(lambda: build_from_cfg(dict(type=broken), HOOKS))


def test_an_unknown_key_that_is_not_the_configs_keeps_its_traceback() -> None:
    """It is a slip in the class, not in the config."""

    def broken(good: int) -> None:
        (lambda: None)(bad=good)

    with pytest.raises(TypeError):
        run(lambda: build_from_cfg(dict(type=broken, good=1), HOOKS))


def test_debugging_shows_every_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CGSPN_DEBUG", "1")
    with pytest.raises(ValueError, match=r"num_colors"):
        run(lambda: distinct_palette(0))


def test_ctrl_c_ends_with_130(capsys: pytest.CaptureFixture) -> None:
    ended = Ended(raising(KeyboardInterrupt()), capsys)
    assert (ended.code, ended.said) == (130, "\ntrain.py: interrupted\n")


def test_ctrl_c_that_became_another_error_ends_with_130_too(capsys: pytest.CaptureFixture) -> None:
    def main() -> None:
        try:
            raise KeyboardInterrupt
        except BaseException:
            raise SyntaxError("failed to format the config") from None

    assert Ended(main, capsys).code == 130
