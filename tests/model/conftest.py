"""Models of published families, each made once."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest


@pytest.fixture(scope="module")
def made(hugging_face_model: Callable[..., Any]) -> Callable[[str], Any]:
    """The model of each family, made once; its folder is not to be changed."""
    return cache(hugging_face_model)
