"""From a command line to a config that is ready to run."""

import argparse
import os
import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import CheckpointLoader
from torch.utils.data import DataLoader

from cgspn_seg.engine import launch


@pytest.fixture(autouse=True)
def own_process_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take back what loading a config changes in the process."""
    monkeypatch.setattr(CheckpointLoader, "_schemes", dict(CheckpointLoader._schemes))
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")


def parsed(*arguments: str, runs: bool = True) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    launch.add_config_arguments(parser, runs=runs)
    return parser.parse_args(arguments)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.py"
    path.write_text(
        "data_root = 'data/here'\n"
        "crop_size = (32, 32)\n"
        "num_classes = 3\n"
        "model = dict(type='A', size=crop_size, head=dict(num_classes=num_classes))\n"
        "optim_wrapper = dict(optimizer=dict(type='AdamW', lr=1.0))\n"
        "train_dataloader = dict(batch_size=3, dataset=dict(data_root=data_root))\n"
        "train_cfg = dict(max_iters=8)\n"
        "test_pipeline = [dict(type='Resize', scale=1)]\n"
        "test_dataloader = dict(dataset=dict(pipeline=test_pipeline))\n"
        "img_ratios = [0.5, 1.0]\n"
        "tta_pipeline = [dict(type='Resize', scale_factor=r) for r in img_ratios]\n"
    )
    return path


class TestLoadConfig:
    def test_settles_what_the_runner_needs(self, config, monkeypatch):
        monkeypatch.chdir(config.parent)
        cfg = launch.load_config(parsed("small.py", "--cfg-options", "train_cfg.max_iters=9"))
        assert cfg.train_cfg.max_iters == 9
        assert cfg.default_scope == "mmseg"
        assert cfg.work_dir == os.path.join("work_dirs", "small")
        assert cfg.launcher == "none"
        assert os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "1"

    def test_trust_leaves_loading_unrestricted(self, config):
        launch.load_config(parsed(str(config), "--trust-checkpoint"))
        assert os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "0"

    def test_work_dir_comes_from_the_command_line_then_the_config(self, config):
        config.write_text(config.read_text() + "work_dir = 'from_config'\n")
        assert launch.load_config(parsed(str(config))).work_dir == "from_config"
        assert launch.load_config(parsed(str(config), "--work-dir", "here")).work_dir == "here"

    def test_tools_without_a_runner_have_no_work_dir(self, config):
        assert "work_dir" not in launch.load_config(parsed(str(config), runs=False))

    def test_a_missing_config_proposes_its_neighbors(self, config):
        with pytest.raises(
            FileNotFoundError, match=r"smal.py does not exist; did you mean .*small.py\?"
        ):
            launch.load_config(parsed(str(config.with_name("smal.py"))))

    def test_a_missing_config_proposes_those_of_the_repository(self, tmp_path):
        name = "cgspn-smal_upernet_8xb2-80k_ade20k-512x512.py"
        with pytest.raises(FileNotFoundError, match=r"cgspn-small_upernet_8xb2-80k_ade20k-512x512"):
            launch.load_config(parsed(str(tmp_path / name)))

    def test_a_folder_is_no_config(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"is a folder"):
            launch.load_config(parsed(str(tmp_path)))

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("model = dict(", "SyntaxError"),
            ("_base_ = './gone.py'", r"FileNotFoundError.*gone\.py"),
            ("model = undefined", "NameError: name 'undefined'"),
            ("custom_imports = dict(imports=['no_such_module'])", "No module named 'no_such_mod"),
        ],
    )
    def test_a_config_that_cannot_be_read_is_named(self, tmp_path, text, said):
        (tmp_path / "bad.py").write_text(text)
        with pytest.raises(ValueError, match=rf"bad\.py cannot be read: .*{said}") as caught:
            launch.load_config(parsed(str(tmp_path / "bad.py")))
        assert len(str(caught.value)) < 400

    def test_another_kind_of_file_is_no_config(self, tmp_path):
        (tmp_path / "weights.pth").touch()
        with pytest.raises(ValueError, match=r"expected a file ending in .py, .*weights.pth"):
            launch.load_config(parsed(str(tmp_path / "weights.pth")))

    def test_distributed_runs_need_gpus(self, config, monkeypatch):
        monkeypatch.setattr(launch, "get_device", lambda: "cpu")
        with pytest.raises(ValueError, match=r"--launcher pytorch: distributed runs need GPUs"):
            launch.load_config(parsed(str(config), "--launcher", "pytorch"))


class TestOptions:
    @pytest.mark.parametrize(
        ("option", "said"),
        [
            ("trian_cfg.max_iters=9", "nothing reads it; did you mean 'train_cfg'"),
            ("data_root=x", r"copied already; override .*: train_dataloader\.dataset\.data_root"),
            ("crop_size=(8,8)", r"override the copies: model\.size"),
            ("num_classes=9", r"override the copies: model\.head\.num_classes"),
            ("test_pipeline.0.scale=2", r"the copies: test_dataloader\.dataset\.pipeline$"),
            ("img_ratios=[1.0]", "'img_ratios' is a variable of the config, which nothing reads"),
            ("chanels_last=True", "nothing reads it; did you mean 'channels_last'"),
            ("strategy.type=FSDPStrategy", "the config has no 'strategy' and nothing reads it"),
            ("channels_last=yes", "channels_last: expected True or False, got 'yes'"),
            ("model.head.num_classes.x=1", "--cfg-options model.head.num_classes.x=1: "),
        ],
    )
    def test_an_option_without_effect_is_an_error(self, config, option, said):
        with pytest.raises(ValueError, match=said):
            launch.load_config(parsed(str(config), "--cfg-options", option))

    @pytest.mark.parametrize(
        "option",
        [
            "channels_last=True",
            "compile=True",
            "randomness.seed=3",
            "train_dataloader.batch_size=1",
        ],
    )
    def test_what_is_read_may_be_set(self, config, option):
        cfg = launch.load_config(parsed(str(config), "--cfg-options", option))
        key, value = option.split("=")
        for part in key.split("."):
            cfg = cfg[part]
        assert str(cfg) == value

    def test_what_another_runner_reads_may_be_set(self, config):
        options = ("runner_type=FlexibleRunner", "strategy.type=FSDPStrategy")
        cfg = launch.load_config(parsed(str(config), "--cfg-options", *options))
        assert cfg.strategy.type == "FSDPStrategy"

    def test_a_runner_may_be_a_class(self, config):
        config.write_text(
            "from mmengine.runner import FlexibleRunner\nrunner_type = FlexibleRunner\n"
        )
        cfg = launch.load_config(parsed(str(config), "--cfg-options", "strategy.type=FSDPStrategy"))
        assert cfg.strategy.type == "FSDPStrategy"

    def test_a_test_pipeline_is_read_where_the_data_set_has_none(self, config):
        config.write_text("model = dict()\ntest_pipeline = [dict(type='Resize', scale=1)]\n")
        option = "test_pipeline.0.scale=2"
        cfg = launch.load_config(parsed(str(config), "--cfg-options", option))
        assert cfg.test_pipeline[0].scale == 2

    @pytest.mark.parametrize("option", ["model.x=dict(a=1,b='c')", "x=[1,2", "no_value"])
    def test_an_option_that_cannot_be_read_ends_with_the_usage(self, config, option, capsys):
        with pytest.raises(SystemExit) as ended:
            parsed(str(config), "--cfg-options", option)
        assert ended.value.code == 2
        assert f"{option.split('=')[0]}" in (said := capsys.readouterr().err)
        assert "expected KEY=VALUE pairs" in said

    def test_a_misspelled_key_of_ours_in_a_config_is_an_error(self, config):
        config.write_text(config.read_text() + "channel_last = True\n")
        with pytest.raises(ValueError, match=r"nothing reads the key 'channel_last'; did you mean"):
            launch.load_config(parsed(str(config)))

    @pytest.mark.parametrize(
        ("options", "missing"),
        [
            ((), "crop_size and stride are missing"),
            (("model.test_cfg.stride=(8,8)",), "crop_size is missing"),
        ],
    )
    def test_slides_without_their_size_are_an_error(self, config, options, missing):
        options = ("model.test_cfg.mode=slide", *options)
        with pytest.raises(
            ValueError, match=rf"mode='slide' needs model\.test_cfg\.crop.*{missing}"
        ):
            launch.load_config(parsed(str(config), "--cfg-options", *options))
        complete = (*options, "model.test_cfg.stride=(8,8)", "model.test_cfg.crop_size=(9,9)")
        launch.load_config(parsed(str(config), "--cfg-options", *complete))

    def test_no_shipped_config_has_a_key_that_nothing_reads(self, repository):
        for path in sorted((repository / "configs" / "cgspn").glob("*.py")):
            launch.load_config(parsed(str(path)))


class TestAmp:
    @staticmethod
    def wrapper(**kwargs: object) -> Config:
        return Config(dict(optim_wrapper=dict(optimizer=dict(type="AdamW"), **kwargs)))

    @pytest.fixture
    def on_gpu(self, monkeypatch):
        monkeypatch.setattr(launch, "get_device", lambda: "cuda")
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda emulated: True)

    @pytest.mark.usefixtures("on_gpu")
    def test_amp_means_bfloat16_without_loss_scaling(self):
        cfg = self.wrapper(type="OptimWrapper")
        launch.configure_amp(cfg, True)
        assert cfg.optim_wrapper.type == "AmpOptimWrapper"
        assert cfg.optim_wrapper.dtype == "bfloat16"
        assert cfg.optim_wrapper.loss_scale == dict(enabled=False)

    @pytest.mark.usefixtures("on_gpu")
    def test_float16_is_scaled(self, monkeypatch):
        cfg = self.wrapper(dtype="float16")
        launch.configure_amp(cfg, True)
        assert cfg.optim_wrapper.loss_scale == "dynamic"
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda emulated: False)
        launch.configure_amp(cfg := self.wrapper(), True)
        assert cfg.optim_wrapper.dtype == "float16"

    @pytest.mark.usefixtures("on_gpu")
    def test_what_the_config_has_of_amp_is_kept_or_taken_out(self):
        kinds = dict(type="AmpOptimWrapper", dtype="float16", loss_scale=512.0)
        for amp in (True, None):
            launch.configure_amp(cfg := self.wrapper(**kinds), amp)
            assert cfg.optim_wrapper.loss_scale == 512.0
        launch.configure_amp(cfg := self.wrapper(**kinds), False)
        assert cfg.optim_wrapper == dict(optimizer=dict(type="AdamW"), type="OptimWrapper")

    @pytest.mark.usefixtures("on_gpu")
    def test_other_wrappers_are_refused(self):
        with pytest.raises(ValueError, match=r"--amp: works with .* the config has 'ApexOptim"):
            launch.configure_amp(self.wrapper(type="ApexOptimWrapper"), True)

    def test_without_a_gpu_it_is_an_error_with_the_way_out(self, monkeypatch):
        monkeypatch.setattr(launch, "get_device", lambda: "cpu")
        with pytest.raises(
            ValueError, match=r"--amp: mixed precision needs a GPU.*leave --amp out"
        ):
            launch.configure_amp(self.wrapper(), True)
        with pytest.raises(ValueError, match=r"AmpOptimWrapper' in the config.*pass --no-amp"):
            launch.configure_amp(self.wrapper(type="AmpOptimWrapper"), None)
        launch.configure_amp(self.wrapper(), None)

    def test_a_config_that_cannot_train_is_named(self):
        with pytest.raises(ValueError, match=r"config: optim_wrapper is missing"):
            launch.configure_amp(Config({"model": {}}), None)


class TestResume:
    @pytest.fixture
    def cfg(self, tmp_path):
        return Config(dict(work_dir=str(tmp_path), load_from="pretrained.pth"))

    def test_the_latest_takes_the_place_of_load_from(self, cfg, tmp_path):
        (tmp_path / "iter_8.pth").touch()
        (tmp_path / "last_checkpoint").write_text(str(tmp_path / "iter_8.pth"))
        launch.configure_resume(cfg, "auto")
        assert cfg.resume and cfg.load_from == str(tmp_path / "iter_8.pth")

    def test_a_work_dir_may_be_moved(self, cfg, tmp_path):
        (tmp_path / "iter_8.pth").touch()
        (tmp_path / "last_checkpoint").write_text("/where/it/was/iter_8.pth")
        launch.configure_resume(cfg, "auto")
        assert cfg.load_from == str(tmp_path / "iter_8.pth")

    def test_a_checkpoint_may_be_named(self, cfg):
        launch.configure_resume(cfg, "other.pth")
        assert cfg.resume and cfg.load_from == "other.pth"

    def test_without_one_training_starts_and_says_so(self, cfg, capsys):
        launch.configure_resume(cfg, "auto")
        assert not cfg.resume and cfg.load_from == "pretrained.pth"
        assert "training starts from the beginning" in capsys.readouterr().out

    def test_one_that_is_gone_is_an_error(self, cfg, tmp_path):
        (tmp_path / "iter_4.pth").touch()
        (tmp_path / "last_checkpoint").write_text("/where/it/was/iter_8.pth")
        with pytest.raises(
            FileNotFoundError, match=r"iter_8.pth, which does not exist.*iter_4.pth"
        ):
            launch.configure_resume(cfg, "auto")

    def test_without_the_flag_the_config_decides(self, cfg):
        launch.configure_resume(cfg, None)
        assert "resume" not in cfg

    @pytest.mark.parametrize(
        ("before", "after"),
        [
            ("c.py --amp", "c.py --amp --resume"),
            ("c.py --resume", "c.py --resume"),
            ("c.py --resume iter_4.pth --amp", "c.py --resume --amp"),
            ("--resume=iter_4.pth c.py", "--resume c.py"),
            ("--resume c.py", "--resume c.py"),
            ("'my config.py'", "'my config.py' --resume"),
        ],
    )
    def test_the_command_that_resumes(self, monkeypatch, before, after):
        monkeypatch.setattr(sys, "argv", ["tools/train.py", *shlex.split(before)])
        assert launch._resume_command() == f"python tools/train.py {after}"

    def test_a_launcher_is_left_to_the_user(self):
        """Its own command, such as torchrun's, is not in this process's arguments."""
        assert launch._resume_command("pytorch") == "the same command with --resume"


class TestLoaders:
    @pytest.mark.parametrize("error", [None, ValueError])
    def test_no_loader_outlives_the_training(self, error):
        def train() -> None:
            next(iter(loader))
            if error:
                raise error

        loader = DataLoader([0, 1], num_workers=1, persistent_workers=True)
        loop = SimpleNamespace(dataloader=loader)
        runner = SimpleNamespace(train=train, _train_loop=loop, _val_loop=dict(type="ValLoop"))
        with pytest.raises(error) if error else nullcontext():
            launch.train(runner)
        (worker,) = loader._iterator._workers
        assert worker.exitcode == 0

    @pytest.mark.parametrize("gpu", [False, True])
    def test_batches_are_pinned_where_there_is_a_gpu(self, gpu, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        for before, after in (
            (dict(batch_size=1), dict(batch_size=1, **dict(pin_memory=True) if gpu else {})),
            (dict(pin_memory=False), dict(pin_memory=False)),
            (None, None),
        ):
            cfg = Config(dict(train_dataloader=before))
            launch.pin_batches(cfg)
            assert cfg.train_dataloader == after

    def test_a_loader_that_is_built_is_left_alone(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        cfg = Config(dict(train_dataloader=DataLoader([0, 1])))
        launch.pin_batches(cfg)
        assert not cfg.train_dataloader.pin_memory
