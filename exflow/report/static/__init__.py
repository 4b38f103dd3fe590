"""Style sheets and the script of the page, as files."""

from importlib.resources import files


def content(name: str) -> str:
    """Text of the file of this name."""
    return files(__name__).joinpath(name).read_text(encoding="utf-8")
