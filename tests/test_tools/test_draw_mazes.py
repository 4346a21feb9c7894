"""tools/draw_mazes.py: labels that follow from the images, but only from afar."""

import importlib.util
import json
from collections import deque
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmseg.registry import DATASETS

SIZE = 64
SPLITS = (("training", 3), ("validation", 2))
DEMO = "demo/cgspn-demo_upernet_1xb8-0.5k_maze-64x64.py"


@pytest.fixture(scope="module")
def mazes(repository: Path) -> ModuleType:
    """The tool as a module."""
    spec = importlib.util.spec_from_file_location("mazes", repository / "tools/draw_mazes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def drawn(mazes: ModuleType) -> list[tuple[np.ndarray, np.ndarray]]:
    """A hundred images and labels."""
    maze_set = mazes.MazeSet(seed=5)
    return [mazes.draw_pair(maze_set, "training", index) for index in range(100)]


def files_of(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def doors_of(image: np.ndarray, palette: tuple) -> np.ndarray:
    """For each pixel i + 1 where it has the i-th color of the palette, nearly; 0 elsewhere."""
    distance = np.abs(image[..., None, :].astype(int) - np.array(palette)).max(axis=-1)
    return np.where(distance.min(axis=-1) < 12, distance.argmin(axis=-1) + 1, 0)


def flood(walkable: np.ndarray, starts: list[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """Steps, up, down, left or right, from the nearest start to all pixels it is connected to."""
    steps, queue = dict.fromkeys(starts, 0), deque(starts)
    while queue:
        y, x = queue.popleft()
        for place in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
            inside = 0 <= place[0] < SIZE and 0 <= place[1] < SIZE
            if inside and walkable[place] and place not in steps:
                steps[place] = steps[(y, x)] + 1
                queue.append(place)
    return steps


def test_every_corridor_has_the_color_of_the_one_door_it_leads_to(mazes, drawn):
    corridors = 0
    for image, label in drawn:
        doors = doors_of(image, mazes.PALETTE)
        left = {tuple(map(int, place)) for place in np.argwhere(label)}
        while left:
            corridor = flood(label > 0, [min(left)])
            left -= corridor.keys()
            (color,) = {int(label[place]) for place in corridor}
            (door,) = {int(doors[place]) for place in corridor} - {0}
            assert color == door
            corridors += 1
    assert corridors > 6 * len(drawn)


def test_most_of_a_corridor_is_far_from_its_door(mazes, drawn):
    distances = []
    for image, label in drawn:
        doors = np.argwhere((label > 0) & (doors_of(image, mazes.PALETTE) > 0))
        steps = flood(label > 0, [tuple(map(int, place)) for place in doors])
        assert len(steps) == np.count_nonzero(label), "each corridor has a door"
        distances += steps.values()
    assert np.median(distances) > 20, "in pixels"
    assert np.percentile(distances, 90) > 55


def test_away_from_the_doors_an_image_shows_no_color(mazes, drawn):
    for image, label in drawn:
        corridor = image[(label > 0) & (doors_of(image, mazes.PALETTE) == 0)].astype(int)
        # Nothing but floor, wall and, at the edge of a door, a mixture of it with wall.
        gray = corridor.max(axis=1) - corridor.min(axis=1) < 30
        assert gray.mean() > 0.9


def test_neighboring_corridors_differ(drawn):
    """Else a color could be taken from the other side of a wall."""
    same = other = 0
    for _, label in drawn:
        count, pieces = cv2.connectedComponents((label > 0).astype(np.uint8), connectivity=4)
        for piece in range(1, count):
            near = cv2.dilate((pieces == piece).astype(np.uint8), np.ones((9, 9), np.uint8)) > 0
            for neighbor in set(pieces[near].tolist()) - {0, piece}:
                if label[pieces == neighbor][0] == label[pieces == piece][0]:
                    same += 1
                else:
                    other += 1
    assert other > 1000
    # Two parts of one corridor, of which the middle lies outside the image.
    assert same < 0.05 * other


def test_colors_are_balanced_and_walls_a_minority(mazes, drawn):
    counts = sum(np.bincount(label.ravel(), minlength=5) for _, label in drawn)
    assert len(counts) == len(mazes.PALETTE) + 1
    assert counts[0] / counts.sum() < 0.4
    np.testing.assert_allclose(counts[1:] / counts[1:].sum(), 0.25, atol=0.04)


def test_the_files_have_ade20ks_layout(mazes, tmp_path):
    root = tmp_path / "data" / "mazes"
    assert mazes.draw_set(mazes.MazeSet(training=3, validation=2, size=48), root)
    assert sorted(files_of(root)) == sorted(
        [mazes.RECORD]
        + [f"images/{s}/maze_0000{i}.jpg" for s, n in SPLITS for i in range(n)]
        + [f"annotations/{s}/maze_0000{i}.png" for s, n in SPLITS for i in range(n)]
    )
    assert [p.name for p in root.parent.iterdir()] == ["mazes"]


def test_mmsegmentation_reads_walls_as_ignored_and_colors_as_classes(
    mazes, tmp_path, repository, mmseg_scope
):
    mazes.draw_set(mazes.MazeSet(training=1, validation=1), tmp_path / "mazes")
    cfg = Config.fromfile(repository / "configs" / DEMO)
    assert tuple(cfg.mazes.metainfo.classes) == mazes.CLASSES
    assert np.array_equal(cfg.mazes.metainfo.palette, mazes.PALETTE)
    dataset = DATASETS.build(
        dict(cfg.val_dataloader.dataset, data_root=str(tmp_path / "mazes"), test_mode=False)
    )
    seen = dataset[0]["data_samples"].gt_sem_seg.data.squeeze().numpy()
    image, label = mazes.draw_pair(mazes.MazeSet(training=1, validation=1), "validation", 0)
    assert np.array_equal(seen, np.where(label == 0, 255, label.astype(int) - 1))
    # As near as JPEG comes.
    shown = dataset[0]["inputs"].numpy().transpose(1, 2, 0)[..., ::-1].astype(int)
    assert np.abs(shown - image).max() < 12


def test_equal_seeds_draw_equal_files(mazes, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        mazes.draw_set(mazes.MazeSet(training=3, validation=2, seed=seed), tmp_path / name)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    first = "images/training/maze_00000.jpg"
    assert files_of(tmp_path / "a")[first] != files_of(tmp_path / "c")[first]


def test_no_maze_is_in_both_splits(mazes):
    maze_set = mazes.MazeSet()
    pairs = [mazes.draw_pair(maze_set, s, i) for s in ("training", "validation") for i in range(50)]
    assert len({image.tobytes() for image, _ in pairs}) == 100


def test_a_set_that_is_there_is_not_drawn_again(mazes, tmp_path, monkeypatch):
    wanted = mazes.MazeSet(training=3, validation=2)
    assert mazes.draw_set(wanted, tmp_path / "mazes")
    before = files_of(tmp_path / "mazes")
    monkeypatch.setattr(mazes, "_write_pair", None)  # would raise
    assert not mazes.draw_set(wanted, tmp_path / "mazes")
    assert files_of(tmp_path / "mazes") == before


def test_a_set_of_other_parameters_or_another_drawing_is_replaced(mazes, tmp_path, monkeypatch):
    root = tmp_path / "mazes"
    mazes.draw_set(mazes.MazeSet(training=3, validation=2), root)
    assert mazes.draw_set(mazes.MazeSet(training=2, validation=2), root)
    assert len(files_of(root)) == 2 * 4 + 1
    assert json.loads((root / mazes.RECORD).read_text())["training"] == 2
    monkeypatch.setattr(mazes, "WALL_WIDTH", 3.0)
    assert mazes.draw_set(mazes.MazeSet(training=2, validation=2), root)


def test_a_folder_of_something_else_is_left_alone(mazes, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match=r"was not drawn by this tool .* another folder"):
        mazes.draw_set(mazes.MazeSet(training=1, validation=1), tmp_path)
    assert list(files_of(tmp_path)) == ["thesis.tex"]


def test_an_interrupted_drawing_leaves_nothing(mazes, tmp_path, monkeypatch):
    write, written = mazes._write_pair, []

    def interrupted(*arguments):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(write(*arguments))

    monkeypatch.setattr(mazes, "_write_pair", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mazes.draw_set(mazes.MazeSet(training=3, validation=2), tmp_path / "mazes")
    assert not list(tmp_path.iterdir())
