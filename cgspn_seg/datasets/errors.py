"""The error of a bad data set, and what more than one check says about a file."""

from collections.abc import Iterable


class DataError(ValueError):
    """A data set cannot be used as it is; the message names the file or key and the way out."""


def unreadable(what: str, path: str, error: Exception) -> DataError:
    """The error that says that an image or a label cannot be read."""
    if isinstance(error, FileNotFoundError):
        return DataError(f"The {what} {path} does not exist.")
    reason = " ".join(str(error).replace(path, "").split()).rstrip(" :") or type(error).__name__
    return DataError(
        f"The {what} {path} cannot be read ({reason}): replace the file, or remove it and its pair."
    )


def check_label_shape(
    path: str, shape: tuple[int, ...], image_shape: tuple[int, int] | None
) -> None:
    """Check the shape of a label.

    Args:
        path: Its file, for the message.
        shape: Its shape; (H, W) is right.
        image_shape: (H, W) of its image, `None` where that is unknown.

    Raises:
        DataError: It is no map of class ids, or not of the size of its image.
    """
    if len(shape) != 2:
        raise DataError(
            f"The label {path} has shape {shape}: expected (height, width), one channel of class "
            "ids. Translate its colors into class ids."
        )
    if image_shape is not None and tuple(shape) != tuple(image_shape):
        raise DataError(
            f"The label {path} has {shape[1]}x{shape[0]} pixels, its image "
            f"{image_shape[1]}x{image_shape[0]}: expected the same size. Is it another image's?"
        )


def listing(names: Iterable[str], limit: int = 8) -> str:
    """The first few of some names, for a message."""
    names = list(names)
    return (", ".join(names[:limit]) + (", ..." if len(names) > limit else "")) or "nothing"
