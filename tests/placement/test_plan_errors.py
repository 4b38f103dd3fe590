"""Plan files that are malformed, truncated or missing are refused in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exflow.errors import InputError
from exflow.placement.plan.plan import Plan

DOCS = Path(__file__).parents[2] / "docs" / "plan-format.md"
AGAIN = "make the plan again with exflow place"


@pytest.fixture(scope="module")
def example() -> str:
    """The file in the docs."""
    return DOCS.read_text(encoding="utf-8").split("```json\n")[1].split("```")[0]


def put(*place: Any) -> Callable[[dict[str, Any]], None]:
    """An edit of the document: `put("topology", "num_nodes", 0)` sets document["topology"]["num_nodes"]."""
    *path, key, value = place

    def edit(document: Any) -> None:
        for step in path:
            document = document[step]
        document[key] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (put("format", "exflow-trace"), f'is not a plan (no "format": "exflow-plan"); {AGAIN}'),
        (put("version", 1), f"version is 1, this exflow reads versions 2 and 3; {AGAIN}"),
        (
            lambda document: document.pop("version"),
            f"version is None, this exflow reads versions 2 and 3; {AGAIN}",
        ),
        (lambda document: document.pop("method"), f"the key 'method' is missing; {AGAIN}"),
        (
            lambda document: document["topology"].pop("link_cost"),
            f"the key 'topology.link_cost' is missing; {AGAIN}",
        ),
        (put("colour", "red"), f"unknown key 'colour'; {AGAIN}"),
        (put("topology", "racks", 2), f"unknown key 'topology.racks'; {AGAIN}"),
        (
            put("topology", "gpus_per_node", 0),
            f"topology.gpus_per_node = 0: Input should be greater than or equal to 1; {AGAIN}",
        ),
        (put("num_experts", 4.0), f"num_experts = 4.0: Input should be a valid integer; {AGAIN}"),
        (put("optimal", 1), f"optimal = 1: Input should be a valid boolean; {AGAIN}"),
        (put("objective", float("nan")), f"objective = nan: Input should be a finite number; {AGAIN}"),
        (
            put("strategy", "replicated"),
            "strategy = 'replicated': Input should be 'coherent', 'node-coherent' or 'dispatch-combine'; "
            f"{AGAIN}",
        ),
        (
            put("topology", "link_cost", [[0, "1"], [1, 0]]),
            f"topology.link_cost[0][1] = '1': Input should be a valid number; {AGAIN}",
        ),
        (
            put("topology", "link_cost", [[0, 1, 1]] * 2),
            "topology: link_cost is not 2 rows of 2; give one for each rank",
        ),
        (
            put("topology", "link_cost", [[0, 2], [1, 0]]),
            "topology: link_cost[0][1] is 2.0, but 1.0 the other way; give both ways the same cost",
        ),
        (put("experts_per_layer", [4]), f"experts_per_layer: has 1 entries instead of 2; {AGAIN}"),
        (put("experts_per_layer", []), f"experts_per_layer: has 0 entries instead of 2; {AGAIN}"),
        (
            put("experts_per_layer", 1, 0),
            f"experts_per_layer[1] = 0: Input should be greater than or equal to 1; {AGAIN}",
        ),
        (
            put("experts_per_layer", 1, 1 << 64),
            "experts_per_layer[1] = 18446744073709551616: Input should be less than 9223372036854775808; "
            f"{AGAIN}",
        ),
        (
            put("experts_per_layer", [4, 5]),
            "experts_per_layer: is [4, 5]; "
            "give a number for each of the 2 MoE layers, 4 at most and at least once",
        ),
        (
            put("experts_per_layer", [3, 3]),
            "experts_per_layer: is [3, 3]; "
            "give a number for each of the 2 MoE layers, 4 at most and at least once",
        ),
        (
            put("experts_per_layer", [3, 4]),
            "physical_to_logical_map[0]: holds expert 3, but the layer has 3; place 0..2",
        ),
        (put("model", None), f"model = None: Input should be a valid string; {AGAIN}"),
        (
            put("moe_layer_ids", 1, "2"),
            f"moe_layer_ids[1] = '2': Input should be a valid integer; {AGAIN}",
        ),
        (put("topology", "num_nodes", 2), f"next_owner[0][0]: has 2 entries instead of 4; {AGAIN}"),
        (
            put("moe_layer_ids", [2, 1]),
            "moe_layer_ids: are [2, 1] in a model of 3 hidden layers; "
            "give ascending indices of hidden layers, at least one",
        ),
        (
            put("num_hidden_layers", 2),
            "moe_layer_ids: are [1, 2] in a model of 2 hidden layers; "
            "give ascending indices of hidden layers, at least one",
        ),
        (put("moe_layer_ids", [0, 1, 2]), f"experts_per_layer: has 2 entries instead of 3; {AGAIN}"),
        (
            lambda document: document["physical_to_logical_map"].pop(),
            f"physical_to_logical_map: has 1 entries instead of 2; {AGAIN}",
        ),
        (
            put("physical_to_logical_map", 1, [0, 1, 2, 3, 2]),
            f"physical_to_logical_map[1]: has 5 entries instead of 6; {AGAIN}",
        ),
        (
            put("physical_to_logical_map", [[0, 1, 2, 3, 3]] * 2),
            "physical_to_logical_map: 5 slots cannot be shared equally by 2 ranks (1 node of 2); "
            "choose a number of ranks that divides it",
        ),
        (
            put("physical_to_logical_map", [[], []]),
            "physical_to_logical_map: has the shape (2, 0) instead of (2, 1); place again on this trace",
        ),
        (
            put("physical_to_logical_map", 1, [2, 3, 3, 1, 1, 2]),
            "physical_to_logical_map[1]: does not hold expert 0; place each of 0..3",
        ),
        (
            put("physical_to_logical_map", 0, 3, 9),
            "physical_to_logical_map[0]: holds expert 9, but the layer has 4; place 0..3",
        ),
        (put("next_owner", 0, 1, [1000]), f"next_owner[0][1]: has 1 entries instead of 2; {AGAIN}"),
        (
            put("next_owner", 0, 1, 1, 1001),
            f"next_owner[0][1][1] = 1001: Input should be less than or equal to 1000; {AGAIN}",
        ),
    ],
)
def test_a_bad_file_is_refused_in_one_line(
    example: str, tmp_path: Path, edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    document = json.loads(example)
    edit(document)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(InputError) as error:
        Plan.load(path)
    assert str(error.value) == f"{path}: {message}"


def test_a_missing_or_truncated_file_is_refused(example: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(InputError, match=f"plan.json: no such plan; {AGAIN}"):
        Plan.load(path)
    path.write_text(example[:100], encoding="utf-8")
    with pytest.raises(InputError, match=f"plan.json: the plan is not valid JSON .*; {AGAIN}"):
        Plan.load(path)
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(InputError, match=r'is not a plan \(no "format": "exflow-plan"\);'):
        Plan.load(path)
