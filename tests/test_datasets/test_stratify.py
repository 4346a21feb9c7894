"""A choice of images is fixed, nested, and has each class in about its share."""

import random
from itertools import pairwise

import pytest

from cgspn_seg.datasets.stratify import choose_images, halve

NUM_CLASSES = 30
RARE = range(20, 30)  # in 1, 2, ... 10 images


def draw(num_images: int = 600) -> tuple[list[str], list[list[int]]]:
    """Names and labels, of classes from common to rare that occur in 30 kinds of scenes."""
    rng = random.Random(0)
    classes = []
    for _ in range(num_images):
        scene = rng.randrange(30)
        chances = [0.9 / (1 + c) * (3 if (c + scene) % 3 == 0 else 0.3) for c in range(20)]
        classes.append({c for c, chance in enumerate(chances) if rng.random() < chance})
    for c in RARE:
        for image in rng.sample(range(num_images), c - RARE[0] + 1):
            classes[image].add(c)
    return [f"city/{i:04d}" for i in range(num_images)], [sorted(c) for c in classes]


def shares(images: list[int], labels: list[list[int]]) -> list[float]:
    return [sum(c in labels[i] for i in images) / len(images) for c in range(NUM_CLASSES)]


def mean_error(images: list[int], labels: list[list[int]]) -> float:
    everything = shares(list(range(len(labels))), labels)
    pairs = zip(shares(images, labels), everything, strict=True)
    return sum(abs(a - b) for a, b in pairs) / NUM_CLASSES


@pytest.mark.parametrize("size", [1, 7, 60, 299, 300, 599, 600])
def test_as_many_as_asked_for_are_chosen_in_order(size):
    chosen = choose_images(*draw(), size)
    assert len(set(chosen)) == size
    assert chosen == sorted(chosen)
    assert set(chosen) <= set(range(600))


def test_a_smaller_choice_lies_in_a_larger_one():
    names, labels = draw()
    chosen = [set(choose_images(names, labels, size)) for size in (6, 30, 60, 61, 150, 400)]
    assert all(small < large for small, large in pairwise(chosen))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [30, 60, 150])
def test_every_class_occurs_even_if_one_image_alone_has_it(size, seed):
    names, labels = draw()
    assert min(shares(choose_images(names, labels, size, seed), labels)) > 0
    by_chance = random.Random(seed).sample(range(600), size)
    assert min(shares(by_chance, labels)) == 0, "these data are too easy"


@pytest.mark.parametrize("size", [60, 150, 300])
def test_shares_are_nearer_to_those_of_the_whole_than_by_chance(size):
    names, labels = draw()
    errors = [mean_error(choose_images(names, labels, size, s), labels) for s in range(10)]
    by_chance = [mean_error(random.Random(s).sample(range(600), size), labels) for s in range(10)]
    assert sum(errors) < 0.6 * sum(by_chance)
    assert max(errors) < 1 / size  # one image


def test_the_choice_does_not_depend_on_the_order_of_the_images():
    names, labels = draw()
    mixed = random.Random(1).sample(range(600), 600)
    chosen = choose_images([names[i] for i in mixed], [labels[i] for i in mixed], 60)
    assert {mixed[i] for i in chosen} == set(choose_images(names, labels, 60))


def test_another_seed_chooses_others():
    first, second = (set(choose_images(*draw(), 60, seed)) for seed in (0, 1))
    assert len(first & second) < 30


def test_the_choice_is_the_same_for_ever():
    """A change here is a change of the data that published fractions were trained on."""
    labels = [[i % 2, 2 + i % 3] for i in range(24)]
    names = [f"{i:02d}" for i in range(24)]
    assert choose_images(names, labels, 6) == [3, 4, 11, 14, 21, 22]
    assert choose_images(names, labels, 6, seed=1) == [7, 8, 9, 14, 16, 21]


def test_halves_share_even_labels_evenly_and_the_first_has_the_odd_ones():
    labels = [[0, 1]] * 4 + [[0]] * 4 + [[0, 2]] + [[]] * 4
    first, second = halve(range(13), labels)
    assert (len(first), len(second)) == (7, 6)
    assert sum(1 in labels[i] for i in first) == 2
    assert 8 in first
    assert sum(not labels[i] for i in first) == 2


def test_images_without_any_class_and_the_same_name_twice_are_no_problem():
    assert len(choose_images(["a", "a", "b", "c"], [[], [], [], []], 3)) == 3
