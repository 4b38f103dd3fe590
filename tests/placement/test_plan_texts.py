"""Placement files as other programs write them: with a byte-order mark, in UTF-16, with defaults left out."""

import codecs
from pathlib import Path

import pytest

from exflow.encodings import utf8_text, wide_encoding
from exflow.errors import InputError
from exflow.files import read_json, read_yaml
from exflow.placement.formats.importers.registry import read_plan
from exflow.placement.plan.topology import Topology
from exflow.profiling.trace import RoutingTrace

GOLDEN = Path(__file__).parent / "golden"
TEXTS = ["sglang.json", "vllm.json", "vllm-ascend.json", "trtllm.yaml", "exflow.csv"]
TWO = Topology(gpus_per_node=2)
YAML = (GOLDEN / "trtllm.yaml").read_text()


def slots(path: Path, golden_trace: RoutingTrace, format: str | None = None) -> list[list[int]]:
    rows: list[list[int]] = read_plan(
        path, format, trace=golden_trace, topology=TWO
    ).physical_to_logical_map.tolist()
    return rows


@pytest.mark.parametrize("name", TEXTS)
def test_a_mark_of_utf8_changes_nothing(name: str, golden_trace: RoutingTrace, tmp_path: Path) -> None:
    content = (GOLDEN / name).read_bytes()
    (tmp_path / name).write_bytes(codecs.BOM_UTF8 + content)
    for format in (None, name.split(".")[0]):
        assert slots(tmp_path / name, golden_trace, format) == slots(GOLDEN / name, golden_trace)


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_wide_encodings_are_named(
    name: str, encoding: str, golden_trace: RoutingTrace, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes((GOLDEN / name).read_text().encode(encoding))
    wide = encoding[:6].upper()
    for format in (None, name.split(".")[0]):
        with pytest.raises(InputError) as caught:
            read_plan(tmp_path / name, format, trace=golden_trace, topology=TWO)
        assert str(caught.value) == (
            f"{tmp_path / name}: is not UTF-8 text: it is {wide} text; save it as UTF-8"
        )


@pytest.mark.parametrize(
    ("start", "wide"),
    [
        (codecs.BOM_UTF16_LE, "UTF-16"),
        (codecs.BOM_UTF16_BE, "UTF-16"),
        (codecs.BOM_UTF32_LE, "UTF-32"),
        (codecs.BOM_UTF32_BE, "UTF-32"),
        (b"{\0\n\0", "UTF-16"),
        (b"\0{\0\n", "UTF-16"),
        (b"{\0\0\0", "UTF-32"),
        (b"\0\0\0{", "UTF-32"),
        (codecs.BOM_UTF8, None),
        (b"{}", None),
        (b"", None),
        (b"\0\0\0\0", None),
        ("é".encode(), None),
        (b"a\0", None),
    ],
)
def test_wide_encoding(start: bytes, wide: str | None) -> None:
    assert wide_encoding(start) == wide
    assert wide_encoding(start + b"" if len(start) < 4 else start + b"abc") == wide


def test_texts_and_settings(tmp_path: Path) -> None:
    assert utf8_text(codecs.BOM_UTF8 + "é\ufeff".encode()) == "é\ufeff"
    path = tmp_path / "a"
    for read, what in ((read_json, "is not valid JSON"), (read_yaml, "is not YAML")):
        path.write_bytes(codecs.BOM_UTF8 + b'{"a": 1}')
        assert read(path, "file", "mend it") == {"a": 1}
        path.write_bytes('{"a": 1}'.encode("utf-16"))
        with pytest.raises(InputError) as caught:
            read(path, "file", "mend it")
        assert str(caught.value) == (
            f"{path}: the file {what} (it is UTF-16 text; save it as UTF-8); mend it"
        )


@pytest.mark.parametrize("updates", ["layer_updates_per_iter: 0\n", "", "# none\n"])
def test_updates_that_tensorrt_llm_leaves_out_are_none(
    updates: str, golden_trace: RoutingTrace, tmp_path: Path
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(YAML.replace("layer_updates_per_iter: 0\n", updates))
    for format in (None, "trtllm"):
        assert slots(path, golden_trace, format) == slots(GOLDEN / "trtllm.yaml", golden_trace)


@pytest.mark.parametrize("value", ["1", "null", "false", "''", ""])
def test_other_updates_are_refused(value: str, golden_trace: RoutingTrace, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(YAML.replace("per_iter: 0", f"per_iter: {value}"))
    with pytest.raises(
        InputError, match=r"layer_updates_per_iter: is .* instead of 0, with which nothing mov"
    ):
        read_plan(path, trace=golden_trace, topology=TWO)


def test_settings_that_have_no_default_are_asked_for(golden_trace: RoutingTrace, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(YAML.split("num_slots")[0])
    with pytest.raises(InputError, match=r"the file: has no key 'num_slots'; add it"):
        read_plan(path, trace=golden_trace, topology=TWO)
