"""Changes to structure: a tree of JSON or YAML with something in it that its reader does not expect."""

import base64
import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

Change = Callable[[random.Random, bytes], bytes]

DEEP, DIGITS = "@deep@", "@digits@"  # replaced in the text: the writer itself would refuse them
NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 255, 256, 65535, 65536, 2**31, 2**63, 2**64, 10**12, 10**30, 10**400),
    *(-(2**63), 0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"), -float("inf"), DEEP, DIGITS),
    *("", "x", "\n", "a\nb", "\x00", "\ud800", "é" * 300, "../x", "/etc/passwd", "12", "1e9", "x" * 5000),
    *([], {}, [[]], [None], {"": None}, [0] * 1000, list(range(300)), {"a": {"b": [1, "c"]}}),
)


def changed_tree(rng: random.Random, value: Any, change: Change) -> Any:
    """The tree with one place replaced, taken out, doubled, swapped or buried.

    `change` is for what base64 holds.
    """
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places:
        return rng.choice(NASTY)
    holder, key = rng.choice(places)
    match rng.randrange(8):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[rng.choice(("x", "", "../x", "\n", f"{key}x"))] = holder[key]
        case 1:
            holder.extend([holder[key]] * rng.choice((1, 2, 100)))
        case 2:
            other, place = rng.choice(places)
            holder[key] = copy.deepcopy(other[place])
        case 3:
            holder[key] = rng.choice(([holder[key]], {"x": holder[key]}, [[holder[key]]]))
        case 4 if isinstance(holder[key], str) and len(holder[key]) > 60:
            holder[key] = _changed_base64(rng, holder[key], change)
        case 5 if isinstance(holder[key], int | float):
            holder[key] = holder[key] * rng.choice((-1, 0, 2, 10**6)) + rng.choice((-1, 0, 1))
        case 6:
            holder[key] = drawn(rng, 2)
        case _:
            holder[key] = rng.choice(NASTY)
    return value


def _changed_base64(rng: random.Random, text: str, change: Change) -> str:
    try:
        content = base64.b64decode(text, validate=True)
    except ValueError:
        return text[:-1]
    return base64.b64encode(change(rng, content)).decode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each holder and key of a tree."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def drawn(rng: random.Random, depth: int) -> Any:
    """A structure of no format."""
    size = rng.randrange(4)
    match rng.randrange(4) if depth else 0:
        case 1:
            return [drawn(rng, depth - 1) for _ in range(size)]
        case 2:
            return {str(rng.choice(NASTY)): drawn(rng, depth - 1) for _ in range(size)}
    return rng.choice(NASTY)


def text_of(rng: random.Random, value: Any) -> bytes:
    """JSON, which is YAML as well; where the tree says so with depth, and numbers, that no writer writes."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.8, default=str, skipkeys=True)
    depth = rng.choice((50, 900, 20_000))
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
    text = text.replace(f'"{DEEP}"', opening * depth + "1" + closing * depth)
    return text.replace(f'"{DIGITS}"', "9" * 5000).encode("utf-8", "surrogatepass")
