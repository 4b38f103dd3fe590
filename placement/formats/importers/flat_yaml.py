"""Parses YAML that holds only mappings, lists and numbers, as the file of a load balancer does.

The text is taken as a stream of events, from which plain values are built here. No tag is ever looked up, no
alias followed, and nesting is bounded, so that no file can run code, blow up or exhaust the stack (composing
a deeply nested file with the C parser ends in a segmentation fault).
"""

import itertools
import re
from collections.abc import Iterator
from typing import Any

import yaml

from exflow.errors import InputError

_DEPTH = 3  # a mapping of mappings of lists
_PARSER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C one is fifteen times as fast
_FRAME = (yaml.StreamStartEvent, yaml.StreamEndEvent, yaml.DocumentStartEvent, yaml.DocumentEndEvent)
_INTEGER = re.compile(r"0|[1-9][0-9]{0,8}")


def parsed_yaml(text: str) -> Any:
    """Dicts, lists, ints (decimal, of up to nine digits) and strings.

    Raises InputError for what is not YAML or more than this, and for a key that is given twice.
    """
    events = (event for event in yaml.parse(text, Loader=_PARSER) if not isinstance(event, _FRAME))
    try:
        first = next(events, None)
        if first is None:
            raise InputError("is empty; give the file whole")
        value = _value(first, events, _DEPTH)
        if next(events, None) is not None:
            raise InputError("holds more than one YAML document; keep the first")
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f"line {error.problem_mark.line + 1}: "
        raise InputError(f"is not YAML ({line}{error.problem}); give the file whole") from error
    except yaml.YAMLError as error:
        raise InputError(f"is not YAML ({' '.join(str(error).split())}); give the file whole") from error
    return value


def _value(event: Any, events: Iterator[Any], depth: int) -> Any:
    """The value that begins with `event`; its further events are taken from `events`."""
    line = event.start_mark.line + 1
    if isinstance(event, yaml.AliasEvent) or event.anchor is not None or event.tag is not None:
        raise InputError(f"line {line}: has an anchor, an alias or a tag; write the values out")
    if isinstance(event, yaml.ScalarEvent):
        is_number = event.implicit[0] and _INTEGER.fullmatch(event.value)  # not in quotes
        return int(event.value) if is_number else event.value
    if depth == 0:
        raise InputError(f"line {line}: is nested too deeply for a placement; give the engine's file")
    if isinstance(event, yaml.SequenceStartEvent):
        return [_value(inner, events, depth - 1) for inner in _until(yaml.SequenceEndEvent, events)]
    result: dict[Any, Any] = {}
    for key_event in _until(yaml.MappingEndEvent, events):
        key = _value(key_event, events, 0)
        if key in result:
            raise InputError(
                f"line {key_event.start_mark.line + 1}: the key {key!r} is given twice; keep one"
            )
        result[key] = _value(next(events), events, depth - 1)
    return result


def _until(end: type, events: Iterator[Any]) -> Iterator[Any]:
    """Events up to one of type `end`, which is taken too."""
    return itertools.takewhile(lambda event: not isinstance(event, end), events)
