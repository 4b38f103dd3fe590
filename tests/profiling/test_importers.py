"""Routing recorded by other programs becomes a RoutingTrace."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exflow.errors import InputError
from exflow.profiling.importers.foreign import Hints
from exflow.profiling.importers.registry import read_trace
from exflow.profiling.trace import DECODE, RoutingTrace

IDS = np.array([[[0, 3], [2, 1]], [[1, 0], [3, 2]], [[2, 3], [0, 1]], [[0, 1], [1, 2]]])
"""Four tokens, two layers, two choices; IDS[t, 0, 0] tells most tokens apart."""


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def npy(path: Path, array: Any) -> Path:
    np.save(path, array)
    return path


def test_npz_with_everything(tmp_path: Path) -> None:
    path = npz(
        tmp_path / "a.npz",
        experts=IDS.astype(np.uint8),
        seq=[7, 7, 9, 9],
        pos=[4, 5, 0, 1],
        weights=IDS / 4,
        num_experts=16,
        group=[0, 0, 0, 0],
    )
    trace = read_trace([path])
    np.testing.assert_array_equal(trace.experts, IDS)
    assert (trace.num_experts, trace.num_hidden_layers, trace.moe_layer_ids) == (16, 2, (0, 1))
    assert trace.sequence.tolist() == [0, 0, 1, 1]
    assert trace.position.tolist() == [4, 5, 0, 1]
    assert trace.phase.tolist() == [DECODE] * 4
    np.testing.assert_array_equal(trace.weights, IDS / 4)


def test_npz_with_ids_alone_is_one_sequence(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trace = read_trace([npz(tmp_path / "a.npz", experts=IDS[:, :, 0])])
    assert trace.experts.shape == (4, 2, 1)
    assert trace.sequence.tolist() == [0, 0, 0, 0]
    assert trace.position.tolist() == [0, 1, 2, 3]
    assert trace.num_experts == 4
    assert "the files do not say num_experts: taken as 4, the largest id plus 1" in caplog.text


def test_npy_of_the_original_exflow(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trace = read_trace([npy(tmp_path / "a.npy", IDS[:, :, 0])], hints=Hints(num_experts=8))
    np.testing.assert_array_equal(trace.experts[:, :, 0], IDS[:, :, 0])
    assert trace.num_experts == 8
    assert caplog.text == ""


def test_the_content_decides_not_the_name(tmp_path: Path) -> None:
    npz(tmp_path / "a.npz", experts=IDS).rename(tmp_path / "a.npy")
    assert read_trace([tmp_path / "a.npy"]).top_k == 2


def test_num_experts_is_argument_then_file_then_largest_id(tmp_path: Path) -> None:
    said = npz(tmp_path / "said.npz", experts=IDS, num_experts=16)
    unsaid = npz(tmp_path / "unsaid.npz", experts=IDS)
    assert read_trace([said], hints=Hints(num_experts=32)).num_experts == 32
    assert read_trace([unsaid, said]).num_experts == 16
    assert read_trace([unsaid, npz(tmp_path / "more.npz", experts=IDS + 5)]).num_experts == 9


def test_npz_whose_layers_have_different_numbers_of_experts(tmp_path: Path) -> None:
    ids = IDS % [[4], [2]]
    said = npz(tmp_path / "said.npz", experts=ids, experts_per_layer=np.array([4, 2], np.uint16))
    unsaid = npz(tmp_path / "unsaid.npz", experts=ids)
    for paths in ([said], [said, unsaid], [unsaid, said]):
        trace = read_trace(paths)
        assert (trace.num_experts, trace.experts_per_layer) == (4, (4, 2))
    more = npz(tmp_path / "more.npz", experts=ids, experts_per_layer=[8, 2], num_experts=8)
    assert read_trace([more]).experts_per_layer == (8, 2)
    other = npz(tmp_path / "other.npz", experts=ids, experts_per_layer=[4, 3])
    message = (
        r"experts_per_layer: the files disagree \(\(4, 2\) in .*said\.npz, \(4, 3\) in .*other\.npz\); import"
    )
    with pytest.raises(InputError, match=message):
        read_trace([said, other])
    with pytest.raises(InputError, match=r"said\.npz: num_experts: is 8, but no layer has more than 4 in"):
        read_trace([said], hints=Hints(num_experts=8))


def test_files_are_joined_and_their_sequences_kept_apart(tmp_path: Path) -> None:
    first = npz(tmp_path / "1.npz", experts=IDS, seq=[5, 2, 5, 2], weights=IDS * 0.5)
    second = npz(tmp_path / "2.npz", experts=IDS[:2], seq=[2, 2])
    trace = read_trace([first, second])
    assert trace.sequence.tolist() == [1, 0, 1, 0, 2, 2]
    assert trace.position.tolist() == [0, 0, 1, 1, 0, 1]
    np.testing.assert_array_equal(trace.experts, np.concatenate([IDS, IDS[:2]]))
    assert trace.weights is None, "one file has none"
    assert read_trace([first]).weights is not None


def test_rows_out_of_order_are_sorted_by_sequence_and_position(tmp_path: Path) -> None:
    path = npz(tmp_path / "a.npz", experts=IDS, seq=[1, 0, 1, 0], pos=[1, 0, 0, 1], weights=IDS * 0.5)
    trace = read_trace([path])
    np.testing.assert_array_equal(trace.experts, IDS[[1, 3, 2, 0]])
    np.testing.assert_array_equal(trace.weights, IDS[[1, 3, 2, 0]] * 0.5)
    assert trace.sequence.tolist() == [0, 0, 1, 1]
    assert trace.position.tolist() == [0, 1, 0, 1]


def test_rows_in_order_keep_their_interleaving(tmp_path: Path) -> None:
    trace = read_trace([npz(tmp_path / "a.npz", experts=IDS, seq=[1, 0, 1, 0], pos=[0, 0, 1, 1])])
    assert trace.sequence.tolist() == [1, 0, 1, 0]


def test_without_ids_a_position_that_does_not_advance_begins_a_sequence(tmp_path: Path) -> None:
    trace = read_trace([npz(tmp_path / "a.npz", experts=IDS, pos=[0, 1, 0, 0])])
    assert trace.sequence.tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"ids": IDS}, "has no array experts (it holds ids); give an .npz of plain numeric arrays"),
        ({"experts": IDS - 2}, "experts: holds -2; ids start at 0"),
        (
            {"experts": IDS - 1},
            "left out 4 tokens whose routing was captured in part, and no routing is left",
        ),
        ({"experts": IDS, "num_experts": 3}, "experts: holds 3; values must be from 0 to 2"),
        ({"experts": IDS, "num_experts": 0}, "num_experts: is 0; give a number from 1 to 65536"),
        ({"experts": IDS, "num_experts": 2.5}, "num_experts: is float64 (); give one integer"),
        ({"experts": IDS, "num_experts": [4, 4]}, "num_experts: is int64 (2,); give one integer"),
        (
            {"experts": IDS, "experts_per_layer": [4, 3]},
            "experts: holds 3 in MoE layer 1; values there must be from 0 to 2",
        ),
        ({"experts": IDS, "experts_per_layer": [4]}, "experts_per_layer: has 1 entries for 2 MoE layers"),
        (
            {"experts": IDS, "experts_per_layer": [[4, 4]]},
            "experts_per_layer: is int64 (1, 2); give one integer for each layer",
        ),
        ({"experts": IDS, "experts_per_layer": [4.0, 4.0]}, "experts_per_layer: is float64 (2,); give one"),
        ({"experts": IDS, "experts_per_layer": []}, "experts_per_layer: is float64 (0,); give one integer"),
        ({"experts": IDS, "experts_per_layer": [4, -4]}, "experts_per_layer: holds -4; give 1 or more"),
        (
            {"experts": IDS, "num_experts": 4, "experts_per_layer": [4, 5]},
            "experts_per_layer: is 5 in MoE layer 1; give a number from 1 to num_experts, which is 4",
        ),
        ({"experts": IDS + 70_000}, "num_experts: is 70004; give a number from 1 to 65536"),
        ({"experts": IDS * 1.0}, "experts: dtype is float64; give integers"),
        ({"experts": IDS[0, 0]}, "experts: shape is (2,); give [tokens, layers, top_k]"),
        (
            {"experts": IDS[:0]},
            "experts: shape is (0, 2, 2); left out 1 files without tokens, and no routing is",
        ),
        ({"experts": IDS[:, :0]}, "experts: shape is (4, 0, 2); give [tokens, layers, top_k]"),
        ({"experts": IDS, "seq": [0, 0]}, "seq: shape is (2,); (4,) is needed to match experts"),
        ({"experts": IDS, "seq": [0.5] * 4}, "seq: dtype is float64; give integers"),
        ({"experts": IDS, "pos": [0, 1, 2, -3]}, "pos: holds -3; values must be from 0"),
        ({"experts": IDS, "weights": IDS}, "weights: dtype is int64; give floating-point numbers"),
        (
            {"experts": IDS, "weights": IDS[:2] * 0.5, "pos": [3, 2, 1, 0], "seq": [0] * 4},
            "weights: shape is (2, 2, 2), experts has (4, 2, 2); give a weight for each id",
        ),
        (
            {"experts": np.array([[["a"]]], object)},
            "cannot be read (the array holds Python objects, which are never loaded); give an .npz of plain",
        ),
    ],
)
def test_a_malformed_npz_is_refused_in_one_line(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    path = npz(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError) as caught:
        read_trace([path])
    assert str(caught.value).startswith((f"{path}: {message}", f"{path}; {message}"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (IDS[None], "experts: shape is (1, 4, 2, 2); give an .npy of integers [tokens, layers], or"),
        (IDS[0, 0], "experts: shape is (2,); give an .npy of integers [tokens, layers]"),
        (IDS[:0], "experts: shape is (0, 2, 2); left out 1 files without tokens"),
        (IDS[:, :0], "experts: shape is (4, 0, 2); give an .npy"),
        (IDS[:, :, 0] * 1.0, "experts: dtype is float64; give integers"),
        (IDS[:, :, 0] - 2, "experts: holds -2; ids start at 0"),
        (IDS - 2, "experts: holds -2; ids start at 0"),
        (np.array([["a"]], object), "cannot be read (the array holds Python objects, which are never loaded"),
    ],
)
def test_a_malformed_npy_is_refused(tmp_path: Path, array: Any, message: str) -> None:
    path = npy(tmp_path / "a.npy", array)
    with pytest.raises(InputError) as caught:
        read_trace([path])
    assert str(caught.value).startswith(f"{path}: {message}")


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was executed",))


@pytest.mark.parametrize("format", [None, "npy", "npz"])
def test_a_pickle_is_never_executed(tmp_path: Path, format: str | None) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(
        InputError, match=r"a\.npy: (is in no format known here \(sglang, npz, npy, |cannot be read)"
    ):
        read_trace([path], format=format)
    for name, array in (("b.npy", [[Bomb()]]), ("b.npz", [[Bomb()]])):
        save = npy if name.endswith("npy") else lambda path, array: npz(path, experts=array)
        with pytest.raises(InputError, match="cannot be read"):
            read_trace([save(tmp_path / name, np.array(array, object))])


@pytest.mark.parametrize("name", ["a.npz", "a.npy"])
def test_a_truncated_file_is_named(tmp_path: Path, name: str) -> None:
    whole = npz(tmp_path / name, experts=IDS) if name == "a.npz" else npy(tmp_path / name, IDS[:, :, 0])
    content = whole.read_bytes()
    for size in (20, len(content) // 2, len(content) - 1):
        whole.write_bytes(content[:size])
        with pytest.raises(InputError, match=f"{name}: cannot be read"):
            read_trace([whole])


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_bytes_give_a_trace_or_an_input_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    if data.draw(st.booleans()):
        path = npz(folder / "a.npz", experts=IDS, seq=[0, 0, 1, 1], pos=[0, 1, 0, 1], num_experts=4)
    else:
        path = npy(folder / "a.npy", IDS[:, :, 0])
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        trace = read_trace([path], format=path.suffix[1:])
    except InputError as error:
        assert str(error).startswith(f"{path}: ")
        assert "\n" not in str(error)
    else:
        assert isinstance(trace, RoutingTrace)


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    good = npz(tmp_path / "a.npz", experts=IDS, num_experts=4)
    with pytest.raises(InputError, match="format: csv is not known; choose one of sglang, npz, npy"):
        read_trace([good], format="csv")
    with pytest.raises(InputError, match=r"a\.npz: cannot be read .*; give an \.npy of integers"):
        read_trace([good], format="npy")
    with pytest.raises(InputError, match=r"nowhere: cannot be read \(No such file or directory\)"):
        read_trace([tmp_path / "nowhere"])
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\); give a file to import"):
        read_trace([tmp_path])
    with pytest.raises(InputError, match="import: no files given; name at least one"):
        read_trace([])
    with pytest.raises(InputError, match="experts: holds 3; values must be from 0 to 1"):
        read_trace([good], hints=Hints(num_experts=2))


def test_files_of_different_models_are_not_joined(tmp_path: Path) -> None:
    first = npz(tmp_path / "a.npz", experts=IDS, num_experts=4)
    other = npz(tmp_path / "b.npz", experts=IDS[:, :1], num_experts=4)
    with pytest.raises(InputError) as caught:
        read_trace([first, other])
    assert str(caught.value) == (
        f"{other}: has 1 layers and top 2, {first} has 2 and 2; join files of one model"
    )
    third = npz(tmp_path / "c.npz", experts=IDS, num_experts=8)
    with pytest.raises(InputError, match=r"num_experts: the files disagree \(4 in .*a\.npz, 8 in .*c\.npz\)"):
        read_trace([first, third])


SHARED = Path(__file__).resolve().parents[3] / "shared" / "traces"


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "shape", "num_experts", "num_sequences", "digest"),
    [
        ("esft_dsv2lite_intent", (8222, 26, 6), 64, 127, "d58ffd715fdf"),
        ("esft_dsv2lite_law", (8327, 26, 6), 64, 33, "f15bd13ce7ca"),
        ("gptoss20b_gpqa_main", (12186, 24, 4), 32, 29, "36a5b98adcf1"),
        ("gptoss20b_mmlu_pro_validation", (7061, 24, 4), 32, 26, "0c69a3faaad2"),
        ("gptoss20b_mmlu_validation", (40122, 24, 4), 32, 145, "4dfbe664dcf3"),
        ("mixtral8x7b_coding", (12138, 32, 2), 8, 10, "9262c3a1f30a"),
        ("mixtral8x7b_humanities", (12414, 32, 2), 8, 10, "8311e6008ab6"),
        ("mixtral8x7b_math", (10307, 32, 2), 8, 10, "29e04f47753a"),
        ("mixtral8x7b_roleplay", (10511, 32, 2), 8, 10, "bed5fbfaa495"),
    ],
)
def test_real_traces(
    tmp_path: Path, name: str, shape: tuple[int, ...], num_experts: int, num_sequences: int, digest: str
) -> None:
    path = SHARED / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"{path} is not here (real traces are not part of the repository)")
    trace = read_trace([path])
    assert trace.experts.shape == shape
    assert trace.num_experts == num_experts
    assert len(np.unique(trace.sequence)) == trace.sequence.max() + 1 == num_sequences
    assert trace.digest().startswith(digest)
    trace.save(tmp_path / "t")
    assert RoutingTrace.load(tmp_path / "t").digest() == trace.digest()
