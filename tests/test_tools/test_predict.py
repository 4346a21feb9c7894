"""tools/predict.py: what it writes for which images."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image

from cgspn_seg.engine.inference import Predictor
from tests.test_tools.conftest import CLASSES


@pytest.fixture(scope="module")
def predict(repository: Path) -> ModuleType:
    """The tool as a module."""
    spec = importlib.util.spec_from_file_location("predict", repository / "tools" / "predict.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


class TestNames:
    def names(self, predict: ModuleType, *inputs: Path) -> list[str]:
        return sorted(str(job.name) for job in predict.find_images(list(map(str, inputs))))

    def test_keep_the_structure_of_a_folder(self, predict, tmp_path):
        touch(tmp_path / "a.jpg", tmp_path / "b/a.PNG", tmp_path / "b/c/a.tif", tmp_path / "x.txt")
        assert self.names(predict, tmp_path) == ["a", "b/a", "b/c/a"]

    def test_tell_suffixes_apart(self, predict, tmp_path):
        touch(tmp_path / "a.jpg", tmp_path / "a.png", tmp_path / "b.png")
        assert self.names(predict, tmp_path) == ["a_jpg", "a_png", "b"]

    def test_tell_folders_apart(self, predict, tmp_path):
        touch(tmp_path / "one/a.jpg", tmp_path / "two/a.jpg", tmp_path / "two/b.jpg")
        assert self.names(predict, tmp_path / "one", tmp_path / "two") == ["b", "one/a", "two/a"]

    def test_count_where_nothing_else_differs(self, predict, tmp_path):
        touch(tmp_path / "x/val/a.jpg", tmp_path / "y/val/a.jpg", tmp_path / "y/val/a_2.jpg")
        folders = (tmp_path / "x/val", tmp_path / "y/val")
        assert self.names(predict, *folders) == ["a_2", "val/a", "val/a_2"]

    def test_name_an_image_given_twice_once(self, predict, tmp_path):
        touch(tmp_path / "a.jpg")
        assert self.names(predict, tmp_path, tmp_path / "a.jpg") == ["a"]

    def test_single_files_may_have_any_suffix(self, predict, tmp_path):
        touch(tmp_path / "a.gif")
        assert self.names(predict, tmp_path / "a.gif") == ["a"]

    def test_no_images_are_an_error(self, predict, tmp_path):
        touch(tmp_path / "x.txt")
        with pytest.raises(
            FileNotFoundError, match=r"no image in this folder or below it; .*\.jpg"
        ):
            predict.find_images([str(tmp_path)])
        with pytest.raises(FileNotFoundError, match=r"gone does not exist"):
            predict.find_images([str(tmp_path / "gone")])


def test_unknown_classes_propose_the_closest(predict: ModuleType) -> None:
    assert predict.chosen_ids(CLASSES, None) == [0, 1, 2]
    assert predict.chosen_ids(CLASSES, ["ball", "floor"]) == [2, 0]
    with pytest.raises(ValueError, match=r"has no class 'bal'; did you mean 'ball'\?"):
        predict.chosen_ids(CLASSES, ["bal"])
    with pytest.raises(ValueError, match=r"has no class 'xyz'; it has floor, box, ball"):
        predict.chosen_ids(CLASSES, ["xyz"])


def test_a_distillation_has_no_segmentor_to_predict_with(repository: Path) -> None:
    configs = repository / "configs" / "distillation"
    cfg = Config.fromfile(configs / "cgspn-small_stage2_vit-small_1xb16-2.5k_camvid-384x480.py")
    with pytest.raises(
        ValueError,
        match=r"config: model\.type='EndToEndDistiller' is no segmentor.*fine-tune .* first "
        r"\(docs/distillation\.md\)",
    ):
        Predictor(cfg, "never_read.pth", "cpu")


@pytest.mark.slow
class TestRuns:
    def test_labels_are_those_of_the_test_and_overlays_show_them(self, trained, tmp_path):
        predicted = tmp_path / "predicted"
        said = trained.run(
            "predict.py", trained.config, trained.checkpoint, trained.images, "--out-dir",
            predicted, "--classes", "box", "ball", "--opacity", "1", cwd=tmp_path,
        )  # fmt: skip
        assert "Wrote 3 label maps and overlays" in said
        trained.run(
            "test.py", trained.config, trained.checkpoint, "--out", tmp_path / "tested",
            "--work-dir", tmp_path / "run",
        )  # fmt: skip
        for name in ("0.png", "1.png", "2.png"):
            labels = Image.open(predicted / "labels" / name)
            tested = Image.open(tmp_path / "tested" / name)
            assert labels.mode == "L"
            assert (np.asarray(labels) == np.asarray(tested)).all()
            overlay = np.asarray(Image.open(predicted / "overlays" / name))
            # 48x40 pixels are enlarged 8 times; the floor, not asked for, keeps the image.
            assert overlay.shape[0] == 320 and overlay.shape[1] > 384
            original = np.asarray(Image.open(trained.images / name))
            shown, floor = overlay[::8, :384:8], np.asarray(labels) == 0
            assert (shown[floor] == original[floor]).all()
            assert (shown[~floor] != original[~floor]).any(-1).all()

    def test_a_2k_image_is_predicted_in_one_pass_and_its_memory_shown(self, trained, tmp_path):
        pixels = np.random.default_rng(0).integers(0, 256, (1536, 2048, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "large.png")
        said = trained.run(
            "predict.py", trained.config, trained.checkpoint, tmp_path / "large.png", "--out-dir",
            tmp_path / "out", "--device", "cpu",
        )  # fmt: skip
        labels = Image.open(tmp_path / "out" / "labels" / "large.png")
        assert labels.size == (2048, 1536)
        found = re.search(
            r"Predicted in \d+\.\d\d s per image, peak memory of the process ([\d.]+) GiB\n", said
        )
        assert found and 0.1 < float(found[1]) < 16, said[-500:]

    def test_an_unreadable_image_is_named_and_the_others_go_on(self, trained, tmp_path):
        (tmp_path / "broken.jpg").write_text("no image")
        said = trained.run(
            "predict.py", trained.config, trained.checkpoint, tmp_path / "broken.jpg",
            trained.images / "0.png", "--out-dir", tmp_path / "out", code=1,
        )  # fmt: skip
        assert "broken.jpg: not readable as an image; skipped" in said.replace("\n", "")
        assert "1 of 2 images could not be segmented" in said
        written = {str(path.relative_to(tmp_path / "out")) for path in tmp_path.rglob("*.png")}
        assert written == {"labels/0.png", "overlays/0.png"}

    def test_an_image_that_the_model_refuses_is_named_and_the_others_go_on(self, trained, tmp_path):
        Image.new("RGB", (40, 3)).save(tmp_path / "[thin].png")
        said = trained.run(
            "predict.py", trained.config, trained.checkpoint, tmp_path / "[thin].png",
            trained.images / "0.png", "--out-dir", tmp_path / "out", code=1,
        )  # fmt: skip
        assert "/[thin].png: images must be at least one patch" in said
        assert "Wrote 1 label maps" in said and "Traceback" not in said
        written = {path.name for path in (tmp_path / "out").rglob("*.png")}
        assert written == {"0.png"}

    def test_images_are_predicted_as_they_are_scored(self, trained, tmp_path):
        """With the test data's pipeline; `test_pipeline` would make them too small here."""
        config = tmp_path / "other.py"
        config.write_text(
            f"_base_ = [{str(trained.config)!r}]\n"
            "test_pipeline = [dict(type='LoadImageFromFile'), dict(type='Resize', scale=(3, 3)), "
            "dict(type='PackSegInputs')]\n"
        )
        for name, path in (("a", trained.config), ("b", config)):
            trained.run(
                "predict.py", path, trained.checkpoint, trained.images, "--out-dir",
                tmp_path / name,
            )  # fmt: skip
        for index in range(3):
            a, b = (np.asarray(Image.open(tmp_path / k / f"labels/{index}.png")) for k in "ab")
            assert (a == b).all()

    def test_a_device_that_is_not_there_is_named(self, trained, tmp_path):
        said = trained.run(
            "predict.py", trained.config, trained.checkpoint, trained.images, "--out-dir",
            tmp_path / "out", "--device", "cuda:99", code=2,
        )  # fmt: skip
        assert "predict.py: error: device: 'cuda:99' cannot be used here" in said

    def test_a_checkpoint_of_another_model_is_refused(self, trained, tmp_path):
        said = trained.run(
            "predict.py", trained.config, trained.checkpoint, trained.images, "--out-dir",
            tmp_path / "out", "--cfg-options", "model.decode_head.num_classes=5", code=2,
        )  # fmt: skip
        assert "number of classes: 5 in the config, 3 in the file" in said
        assert "Traceback" not in said and not (tmp_path / "out").exists()
