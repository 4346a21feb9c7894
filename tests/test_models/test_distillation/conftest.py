"""Teachers are made once: what is tested leaves them as they are."""

from pathlib import Path

import pytest

from cgspn_seg.models.distillation import Teacher

from .teachers import MakeTeacher, make_teacher


@pytest.fixture(scope="package")
def teacher_of(tmp_path_factory: pytest.TempPathFactory) -> MakeTeacher:
    """Gives the teacher of a family, in float64, so that what differs is no rounding."""
    made: dict[str, Teacher] = {}

    def give(family: str) -> Teacher:
        if family not in made:
            folder: Path = tmp_path_factory.mktemp(family)
            made[family] = make_teacher(family, folder).double()
        return made[family]

    return give
