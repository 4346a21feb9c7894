"""Plans of the CUDA kernels: they fit the GPU, cover the problem, and a kernel for each exists."""

import ctypes
import itertools
import math
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest


class Gpu(NamedTuple):
    multiprocessors: int
    shared_bytes: int  # a block may have
    has_clusters: bool


GPUS = {
    "H200": Gpu(132, 232448, True),
    "A100": Gpu(108, 166912, False),
    "RTX 4090": Gpu(128, 101376, False),
}
ALL, ROWS, RIGHT = (0, 1, 2, 3), (0, 1), (2,)
MAX_THREADS = {"forward": 640, "backward": 512}


class Plan(NamedTuple):
    """The fields of csrc/cuda/plan.h, in their order."""

    channels: int
    lanes: int
    strips: int
    period: int
    teams: int
    items: int
    columns: int
    threads: int
    reduced_channels: int
    blocks: int
    shared_bytes: int


MakePlan = Callable[..., Plan | None]


@pytest.fixture(scope="module")
def make_plan(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> MakePlan:
    """The planner, compiled alone."""
    library = tmp_path_factory.mktemp("plan") / "plan.so"
    sources = [repository / "csrc/cuda/plan.cpp", repository / "tests/test_ops/plan_for_tests.cpp"]
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-O1", "-Wall", "-Werror", "-shared"]
    subprocess.run([*command, "-fPIC", "-o", library, *sources], check=True)
    function = ctypes.CDLL(str(library)).plan_for_tests

    def make(pass_name, grid, groups, gpu, directions=ALL, element_bytes=2, aligned=None):
        fields = (ctypes.c_int64 * len(Plan._fields))()
        made = function(
            ctypes.c_int(pass_name == "backward"),
            (ctypes.c_int64 * 4)(*grid),
            ctypes.c_int64(groups),
            (ctypes.c_int64 * len(directions))(*directions),
            ctypes.c_int64(len(directions)),
            ctypes.c_int(element_bytes),
            ctypes.c_int(16 // element_bytes if aligned is None else aligned),
            ctypes.c_int(gpu.multiprocessors),
            ctypes.c_int64(gpu.shared_bytes),
            ctypes.c_int(gpu.has_clusters),
            fields,
        )
        return Plan(*fields) if made else None

    return make


@pytest.mark.parametrize("pass_name", MAX_THREADS)
@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)
@pytest.mark.parametrize("element_bytes", [2, 4, 8])
def test_plans_fit_cover_and_have_a_kernel(make_plan, pass_name, gpu, element_bytes):
    sizes = (1, 2, 5, 16, 33, 74, 147, 300, 512, 2000)
    for channels, batch, directions in itertools.product(
        (1, 3, 6, 8, 24, 64, 72, 384), (1, 8, 64), (ALL, ROWS, RIGHT)
    ):
        for group_size, aligned in itertools.product((1, 2, 8, 64), (1, 16 // element_bytes)):
            if channels % group_size:
                continue
            groups = channels // group_size
            for height, width in itertools.product(sizes, (1, 3, 40, 147, 1024)):
                grid = (batch, height, width, channels)
                plan = make_plan(pass_name, grid, groups, gpu, directions, element_bytes, aligned)
                if plan is not None:
                    check(
                        plan, pass_name, grid, group_size, gpu, directions, element_bytes, aligned
                    )


def check(plan, pass_name, grid, group_size, gpu, directions, element_bytes, aligned) -> None:
    batch, height, width, channels = grid
    positions = [width if d < 2 else height for d in directions]
    vector_bytes = plan.channels * element_bytes
    slice_channels = plan.channels * plan.lanes
    assert plan.channels <= aligned
    assert channels % slice_channels == 0
    assert group_size == 1 or group_size % plan.channels == 0
    assert plan.blocks == plan.strips * channels // slice_channels * len(directions) * batch
    assert plan.threads % 32 == 0
    assert plan.threads * plan.teams <= MAX_THREADS[pass_name]
    assert plan.shared_bytes <= gpu.shared_bytes
    assert plan.strips <= (8 if gpu.has_clusters else 1)
    # Every position of a strip, with what is read of its neighbours, has a thread.
    halo = (plan.period - 1 if pass_name == "forward" else 1) if plan.strips > 1 else 0
    assert math.ceil(max(positions) / plan.strips) + 2 * halo <= plan.columns
    assert plan.columns * plan.lanes <= plan.threads * plan.items
    assert plan.strips == 1 or math.ceil(min(positions) / plan.strips) >= plan.period
    # What line_scan_forward.cu and line_scan_backward.cu instantiate.
    variant = (plan.items, plan.period, plan.teams)
    assert vector_bytes in (16, 8) or plan.channels == 1
    assert variant in {(1, 1, 1), (4, 1, 1), (1, 2, 1), (1, 2, 4)}
    assert variant != (4, 1, 1) or plan.channels == 1
    assert variant != (1, 2, 1) or (vector_bytes == 16 and group_size > 1)
    assert variant != (1, 2, 4) or vector_bytes == 8
    assert pass_name == "forward" or plan.period == plan.teams == 1
    # What a block adds up: neighbouring threads of one group, a power of two.
    added = plan.reduced_channels // plan.channels if group_size > 1 else 1
    assert group_size == 1 or group_size % plan.reduced_channels == 0
    assert plan.lanes % added == 0
    assert 32 % added == 0


@pytest.mark.parametrize(
    ("gpu", "element_bytes", "limit"),
    [
        ("H200", 2, 16368),
        ("H200", 8, 9200),
        ("A100", 2, 1664),
        ("A100", 8, 768),
        ("RTX 4090", 2, 957),
        ("RTX 4090", 8, 480),
    ],
)
def test_the_longest_lines_are_those_that_the_docs_name(make_plan, gpu, element_bytes, limit):
    def plan(pass_name: str, length: int) -> Plan | None:
        grid = (1, length, length, 64)
        return make_plan(pass_name, grid, 64, GPUS[gpu], element_bytes=element_bytes)

    assert plan("backward", limit) is not None
    assert plan("backward", limit + 1) is None
    assert plan("forward", limit) is not None


def test_what_was_measured_is_planned_as_it_was_measured(make_plan):
    def shape(pass_name: str, *args, **options) -> tuple[int, ...]:
        return make_plan(pass_name, *args, GPUS["H200"], **options)[:6]

    assert shape("forward", (32, 147, 147, 64), 64) == (8, 8, 2, 1, 1, 1)
    assert shape("backward", (32, 147, 147, 64), 64) == (8, 8, 5, 1, 1, 1)
    assert shape("forward", (32, 74, 74, 64), 64) == (8, 8, 1, 1, 1, 1)
    assert shape("forward", (1, 128, 128, 64), 64) == (4, 4, 6, 2, 4, 1)
    pixels = (16, 1024, 1024, 8)
    options = dict(directions=ROWS[:1], element_bytes=4)
    assert shape("forward", pixels, 8, **options) == (4, 2, 6, 1, 1, 1)
    assert shape("forward", pixels, 1, **options) == (4, 2, 6, 2, 1, 1)
