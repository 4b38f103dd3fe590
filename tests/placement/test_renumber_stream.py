"""A renumbered checkpoint, byte by byte; and what is refused: in one line, with nothing left behind."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from exflow.errors import InputError
from exflow.placement.formats.renumber.shards import Shard
from exflow.placement.formats.renumber.stream import INDEX, PLACEMENT, WEIGHTS, Renumbered, renumber
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.topology import Topology
from tests.placement.drawn_plans import plan_of_slots

ORDER = [[2, 0, 3, 1], [1, 3, 0, 2]]
TWO = Topology(num_nodes=1, gpus_per_node=2)
PLAN = plan_of_slots(ORDER, TWO, num_hidden_layers=3, moe_layer_ids=(1, 2))
FILES = (
    "model-00001-of-00003.safetensors",
    "model-00002-of-00003.safetensors",
    "model-00003-of-00003.safetensors",
)


def layer_tensors(layer: int, stacked: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(layer)
    block = f"model.layers.{layer}.mlp"
    tensors: dict[str, np.ndarray] = {
        f"{block}.gate.weight": rng.random((4, 6), dtype=np.float32),
        f"{block}.gate.e_score_correction_bias": rng.random(4, dtype=np.float32),
        f"{block}.shared_experts.up_proj.weight": rng.random((4, 6), dtype=np.float32),
    }
    if stacked:
        tensors[f"{block}.experts.gate_up_proj_blocks"] = rng.integers(0, 255, (4, 5, 3), dtype=np.uint8)
        tensors[f"{block}.experts.gate_up_proj_scale"] = rng.random(1, dtype=np.float32)  # of all experts
        return tensors
    for expert in range(4):
        for suffix in ("weight", "weight_scale_inv"):
            tensors[f"{block}.experts.{expert}.up_proj.{suffix}"] = rng.random((5, 3), dtype=np.float32)
    return tensors


def tensors_of_files() -> dict[str, dict[str, np.ndarray]]:
    first = {"model.embed_tokens.weight": np.ones((7, 6), np.float16)}
    draft = {
        "model.layers.3.mlp.gate.weight": np.arange(24, dtype=np.float32).reshape(4, 6),
        "model.layers.3.mlp.experts.1.up_proj.weight": np.ones((5, 3), np.float32),
    }
    return dict(
        zip(
            FILES,
            (first, layer_tensors(1, stacked=False), layer_tensors(2, stacked=True) | draft),
            strict=True,
        )
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Three shards: embeddings; layer 1 with experts of their own; layer 2 stacked, and a draft layer."""
    folder = tmp_path / "model"
    (folder / "code").mkdir(parents=True)
    files = tensors_of_files()
    for file, tensors in files.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    write(folder / INDEX, {"metadata": {"total_size": 1}, "weight_map": weight_map})
    write(folder / "config.json", {"num_hidden_layers": 3, "n_group": 1})
    (folder / "code" / "modeling.py").write_text("pass\n")
    (folder / "consolidated.00.pth").write_text("old numbers")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "lock").touch()
    return folder


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def change_json(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    write(path, content)


@pytest.mark.parametrize("link", [False, True])
def test_every_tensor_is_where_the_plan_wants_it(model: Path, tmp_path: Path, link: bool) -> None:
    seen: list[tuple[int, int]] = []
    new = tmp_path / "new"

    done = renumber(model, PLAN, new, link=link, progress=lambda *bytes_: seen.append(bytes_))

    read = {file: load_file(new / file) for file in FILES}
    index = json.loads((new / INDEX).read_text())
    assert index["metadata"] == {"total_size": 1}
    assert index["weight_map"] == {name: file for file in FILES for name in read[file]}
    old, found = (
        {k: v for each in files.values() for k, v in each.items()} for files in (tensors_of_files(), read)
    )
    assert old.keys() == found.keys()
    for name, value in old.items():
        wanted = value
        for layer, order in zip((1, 2), ORDER, strict=True):
            block = f"model.layers.{layer}.mlp"
            if name.startswith((f"{block}.gate", f"{block}.experts.gate_up_proj_blocks")):
                wanted = value[order]
            for expert, was in enumerate(order):
                if name.startswith(f"{block}.experts.{expert}."):
                    wanted = old[name.replace(f".experts.{expert}.", f".experts.{was}.")]
        assert np.array_equal(found[name], wanted), name
    assert Shard.read(new / FILES[1]).metadata == {"format": "pt"}
    assert done == Renumbered(
        num_tensors=len(old),
        num_renamed=8,
        num_permuted=5,
        draft=("model.layers.3.mlp.experts.1.up_proj.weight", "model.layers.3.mlp.gate.weight"),
        left_out=("consolidated.00.pth",),
    )
    assert seen[-1][0] == seen[-1][1] and seen == sorted(seen)
    assert sorted(path.name for path in new.iterdir()) == sorted(
        [*FILES, INDEX, PLACEMENT, "config.json", "code"]
    )
    assert (new / FILES[0]).samefile(model / FILES[0]) == link
    assert (new / "code" / "modeling.py").read_text() == "pass\n"
    placement = json.loads((new / PLACEMENT).read_text())
    assert placement["old_ids"] == {"1": ORDER[0], "2": ORDER[1]}
    plan_file = tmp_path / "plan.json"
    write(plan_file, placement["plan"])
    assert np.array_equal(Plan.load(plan_file).physical_to_logical_map, ORDER)


def test_a_single_file_needs_no_index(model: Path, tmp_path: Path) -> None:
    tensors = {name: value for each in tensors_of_files().values() for name, value in each.items()}
    for file in (*FILES, INDEX):
        (model / file).unlink()
    save_file(tensors, model / WEIGHTS)
    renumber(model, PLAN, tmp_path / "new")
    renumber(model, PLAN, tmp_path / "new")  # an earlier copy is replaced
    found = load_file(tmp_path / "new" / WEIGHTS)
    gate = "model.layers.1.mlp.gate.weight"
    assert np.array_equal(found[gate], tensors[gate][ORDER[0]])
    assert not (tmp_path / "new" / INDEX).exists()


def test_names_of_modules_in_the_settings_follow(model: Path, tmp_path: Path) -> None:
    ignored = [
        "lm_head",
        "model.layers.1.mlp.experts.2.up_proj",
        "model.layers.3.mlp.experts.2.up_proj",
        "re:.*gate",
    ]
    change_json(model / "config.json", lambda config: config.update(quantization_config={"ignore": ignored}))
    renumber(model, PLAN, tmp_path / "new", link=True)
    new = json.loads((tmp_path / "new" / "config.json").read_text())["quantization_config"]["ignore"]
    assert new == [ignored[0], "model.layers.1.mlp.experts.0.up_proj", *ignored[2:]]
    assert json.loads((model / "config.json").read_text())["quantization_config"]["ignore"] == ignored


def _truncate(folder: Path) -> None:
    with (folder / FILES[2]).open("r+b") as file:
        file.truncate((folder / FILES[2]).stat().st_size - 1)


def _cut_the_header(folder: Path) -> None:
    with (folder / FILES[2]).open("r+b") as file:
        file.truncate(20)


def _name_twice(folder: Path) -> None:
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(
        text.replace('"weight_map": {', f'"weight_map": {{"model.embed_tokens.weight": "{FILES[1]}", ')
    )


def _store_twice(folder: Path) -> None:
    tensors = load_file(folder / FILES[1])
    save_file(tensors | load_file(folder / FILES[0]), folder / FILES[1])


def _in_weights(folder: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = load_file(folder / FILES[1])
    change(tensors)
    save_file(tensors, folder / FILES[1])
    change_json(folder / INDEX, lambda index: _set_names(index["weight_map"], tensors))


def _set_names(weight_map: dict[str, str], tensors: dict[str, np.ndarray]) -> None:
    for name in [name for name, file in weight_map.items() if file == FILES[1]]:
        del weight_map[name]
    weight_map.update(dict.fromkeys(tensors, FILES[1]))


GATE = "model.layers.1.mlp.gate.weight"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a shard is missing": (
        lambda folder: (folder / FILES[1]).unlink(),
        rf"{FILES[1]}: no such weights; copy",
    ),
    "a shard is truncated": (
        _truncate,
        rf"{FILES[2]}: has \d+ bytes of data, the header says \d+, truncated",
    ),
    "a header is truncated": (
        _cut_the_header,
        rf"{FILES[2]}: is truncated \(\d+ bytes end inside the header\); copy",
    ),
    "the index is missing": (lambda folder: (folder / INDEX).unlink(), rf"{INDEX}: no such weights; give"),
    "the index is no JSON": (lambda folder: (folder / INDEX).write_text("{"), "the index is damaged"),
    "the index leads elsewhere": (
        lambda folder: change_json(folder / INDEX, lambda index: index["weight_map"].update(x="../x")),
        "does not name a file for each tensor",
    ),
    "the index names a tensor that is not there": (
        lambda folder: change_json(folder / INDEX, lambda index: index["weight_map"].update(x=FILES[0])),
        rf"names 'x' in {FILES[0]}, which lacks it; copy",
    ),
    "the index names a tensor twice": (_name_twice, "'model.embed_tokens.weight' is given twice"),
    "two shards have a tensor": (_store_twice, rf"'model.embed_tokens.weight' is in {FILES[0]} too"),
    "an unknown expert tensor": (
        lambda folder: _in_weights(
            folder, lambda found: found.update({f"{GATE[:-12]}.experts.x": found[GATE]})
        ),
        r"'model\.layers\.1\.mlp\.experts\.x' speaks of experts in no known way",
    ),
    "an expert is missing": (
        lambda folder: _in_weights(
            folder,
            lambda found: [found.pop(name) for name in list(found) if ".experts.3." in name],
        ),
        "layer 1 has the experts 0 to 2, 3 in number, the plan has 4; use a plan",
    ),
    "a router is missing": (
        lambda folder: _in_weights(
            folder, lambda found: [found.pop(name) for name in list(found) if ".gate." in name]
        ),
        "layer 1 has experts, and lacks a router with a known name",
    ),
    "a router with other rows": (
        lambda folder: _in_weights(folder, lambda found: found.update({GATE: np.ones((5, 6), np.float32)})),
        rf"'{GATE}' has the shape \[5, 6\], not a row for each of 4 experts",
    ),
    "two models": (
        lambda folder: _in_weights(folder, lambda found: found.update({f"talker.{GATE}": found[GATE]})),
        "'model.layers' and 'talker.model.layers' both have experts",
    ),
    "config.json is missing": (
        lambda folder: (folder / "config.json").unlink(),
        r"config\.json: no such model configuration; give the folder",
    ),
    "another number of layers": (
        lambda folder: write(folder / "config.json", {"text_config": {"num_hidden_layers": 4}}),
        r"config\.json: num_hidden_layers is 4, in the plan 3; use a plan",
    ),
    "routing groups": (
        lambda folder: write(folder / "config.json", {"text_config": {"n_group": 2}}),
        "n_group is 2, and the plan splits routing group 0 in layer 1; place again",
    ),
    "a pattern of an expert": (
        lambda folder: write(folder / "config.json", {"dynamic": {r"+:.*\.experts\.3\..*": {}}}),
        "is a pattern that names single experts",
    ),
    "renumbered already": (
        lambda folder: (folder / PLACEMENT).touch(),
        "is renumbered already; give the orig",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused(damage: str, model: Path, tmp_path: Path) -> None:
    harm, message = DAMAGES[damage]
    harm(model)
    _refused(model, PLAN, tmp_path / "new", message)


PLANS = {
    "replicas": (
        plan_of_slots([[0, 1, 2, 3, 0, 1]] * 2, TWO),
        "holds 6 slots for 4 experts.* without replicas",
    ),
    "unequal layers": (
        plan_of_slots([[0, 1, 2, 3], [0, 1, 2, 0]], TWO, num_experts=4, experts_per_layer=(4, 3)),
        r"experts_per_layer: is \[4, 3\].*; export",
    ),
    "other layers": (
        plan_of_slots(ORDER, TWO, num_hidden_layers=3, moe_layer_ids=(0, 2)),
        r"the layers with experts are \[1, 2\], those of the plan are \[0, 2\]; use a plan",
    ),
    "other experts": (
        plan_of_slots([[0, 1]] * 2, TWO, num_hidden_layers=3, moe_layer_ids=(1, 2)),
        "layer 1 has the experts 0 to 3, 4 in number, the plan has 2; use a plan",
    ),
}


@pytest.mark.parametrize("kind", PLANS)
def test_a_plan_that_does_not_fit_is_refused(kind: str, model: Path, tmp_path: Path) -> None:
    _refused(model, PLANS[kind][0], tmp_path / "new", PLANS[kind][1])


def _refused(model: Path, plan: Plan, output: Path, message: str) -> None:
    before = sorted(output.parent.iterdir())
    with pytest.raises(InputError, match=message) as caught:
        renumber(model, plan, output)
    assert "\n" not in str(caught.value) and ";" in str(caught.value)
    assert sorted(output.parent.iterdir()) == before


@pytest.mark.parametrize("place", ["", "code", "inside/new"])
def test_the_checkpoint_is_never_overwritten(place: str, model: Path) -> None:
    with pytest.raises(InputError, match="is the checkpoint itself, or one is inside the other; choose"):
        renumber(model, PLAN, model / place)


def test_another_folder_is_not_replaced(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(model, other)
    with pytest.raises(InputError, match="is something other than a renumbered checkpoint; choose"):
        renumber(model, PLAN, other)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, os.strerror(28))])
def test_a_stop_leaves_nothing_behind(error: BaseException, model: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise error

    before = sorted(tmp_path.iterdir())
    kind = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else InputError
    with pytest.raises(kind):
        renumber(model, PLAN, tmp_path / "new", progress=stop)
    assert sorted(tmp_path.iterdir()) == before


def test_a_link_to_another_file_system_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", link)
    with pytest.raises(InputError, match=r"no hard link to it can be made .*; copy the files instead"):
        renumber(model, PLAN, tmp_path / "new", link=True)
    assert not (tmp_path / "new").exists()
