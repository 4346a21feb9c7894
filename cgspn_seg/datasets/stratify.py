"""A part of a data set in which each class has about the share that it has in the whole."""

import hashlib
from collections.abc import Collection, Sequence


def choose_images(
    names: Sequence[str], labels: Sequence[Collection[int]], size: int, seed: int = 0
) -> list[int]:
    """Choose images so that each label keeps its share, as far as their number allows.

    The images are put in one order, of which the first ``size`` are taken, so that for the same
    seed a smaller choice lies inside a larger one. The order is that of repeated halving: the
    first half of the images before the second, and within each half again. Halves are made by
    iterative stratification (Sechidis et al., On the Stratification of Multi-Label Data, 2011).

    All is done in integers and the seed works through a hash of the names, so the choice is the
    same on every machine.

    Args:
        names: A name for each image that is the same everywhere, such as its path inside the
            data set.
        labels: The labels of each image: the classes in it.
        size: How many images to choose.
        seed: Another seed gives another choice.

    Returns:
        The indices of the chosen images, ascending.
    """
    images = sorted(range(len(names)), key=lambda i: (_hash(names[i], seed), i))
    chosen: list[int] = []
    while 0 < size < len(images):
        first, second = halve(images, labels)
        if size < len(first):
            images = first
        else:
            chosen += first
            size -= len(first)
            images = second
    return sorted(chosen + images[:size])


def halve(images: Sequence[int], labels: Sequence[Collection[int]]) -> tuple[list[int], list[int]]:
    """Split images in halves with the same share of each label.

    The label with the fewest images left is dealt out first, while there is a choice; each of its
    images goes where the label is rarer. Beyond that method, the first half gets every label
    that its size allows, also one of a single image.

    Args:
        images: Which images; of an odd number the first half has one more.
        labels: The labels of each image, of all images.

    Returns:
        The halves, both in the order of ``images``.
    """
    room = [len(images) - len(images) // 2, len(images) // 2]
    left: dict[int, list[int]] = {}
    for image in images:
        for label in labels[image]:
            left.setdefault(label, []).append(image)
    num_left = {label: len(holders) for label, holders in left.items()}
    dealt = {label: [0, 0] for label in left}  # to the first half, to the second
    half: dict[int, int] = {}

    def deal(image: int, label: int | None) -> None:
        last_chance = any(num_left[k] == 1 and dealt[k][0] == 0 for k in labels[image])
        ahead = 0 if label is None else dealt[label][0] - dealt[label][1]
        if last_chance:
            side = 0
        elif ahead:
            side = int(ahead > 0)
        else:
            side = int(room[1] > room[0])
        side = side if room[side] else 1 - side
        half[image] = side
        room[side] -= 1
        for k in labels[image]:
            num_left[k] -= 1
            dealt[k][side] += 1

    while any(num_left.values()):
        rarest = min((count, label) for label, count in num_left.items() if count)[1]
        for image in left[rarest]:
            if image not in half:
                deal(image, rarest)
    for image in images:
        if image not in half:  # all of it is ignored
            deal(image, None)
    return [i for i in images if half[i] == 0], [i for i in images if half[i] == 1]


def _hash(name: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed} {name}".encode()).digest()
