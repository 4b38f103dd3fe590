"""record(): each token in its sequence and at its position, whatever a model keeps of the past.

The oracle: the same text, run by itself in one pass without a cache, is routed alike. Hybrid models, whose
first layers have no attention and so no length in the cache, beside ordinary ones; every way to run them.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch

from exflow.errors import InputError
from exflow.profiling.record import record
from exflow.profiling.trace import DECODE, PREFILL, RoutingTrace
from tests.profiling.ways_to_generate import (
    ALL_LINEAR,
    COMMON,
    FAMILIES,
    LINEAR_FIRST,
    NEW,
    PROMPTS,
    WAYS,
    batch,
    cache_name,
    generate,
    model_of,
    right_padded,
    texts,
    tiny,
    with_random_weights,
    without_cache,
)

transformers = pytest.importorskip("transformers", reason="needs transformers")
torch.set_num_threads(1)  # for tensors this small more threads only wait for each other


Places = dict[int, dict[int, Any]]  # sequence -> position -> the experts of each layer


def places(trace: RoutingTrace) -> Places:
    found: Places = defaultdict(dict)
    rows = zip(trace.sequence.tolist(), trace.position.tolist(), trace.experts.tolist(), strict=True)
    for sequence, position, experts in rows:
        assert position not in found[sequence]
        found[sequence][position] = [sorted(of_layer) for of_layer in experts]
    return found


def by_itself(model: Any, text: list[int]) -> dict[int, Any]:
    with record(model) as recorder, torch.no_grad():
        model(input_ids=torch.tensor([text]), use_cache=False)
    found = places(recorder.trace)
    assert list(found) == [0]
    return found[0]


def check(model: Any, run: Callable[[Any], list[list[int]]], routing: bool = True) -> RoutingTrace:
    torch.manual_seed(0)  # what is sampled does not depend on the tests before
    with record(model) as recorder:
        expected = run(model)
    found = list(places(recorder.trace).values())
    assert [sorted(each) for each in found] == [list(range(len(text))) for text in expected]
    for each, text in zip(found, expected, strict=True):
        assert not routing or each == by_itself(model, text)
    return recorder.trace


# of every family and of every way one half in `make test`
PAIRS = [
    pytest.param(name, way, marks=[pytest.mark.all] if (family + number) % 2 else [])
    for family, name in enumerate(FAMILIES)
    for number, way in enumerate(WAYS)
]


@pytest.mark.parametrize(("name", "way"), PAIRS)
def test_every_token_is_in_its_place(name: str, way: str) -> None:
    family = FAMILIES[name]
    if way in family.lacks:
        pytest.skip(f"transformers cannot run {name} in this way")
    check(model_of(name), WAYS[way], routing=way not in family.drifts)


@pytest.mark.parametrize("name", FAMILIES)
def test_beams(name: str) -> None:
    with record(model_of(name)) as recorder:
        generate(model_of(name), batch(), num_beams=2)
    found = [sorted(each) for each in places(recorder.trace).values()]
    assert found == [list(range(len(prompt) + NEW - 1)) for prompt in PROMPTS for _ in range(2)]


# ---- a model whose cache does not tell the model itself what it holds, so that transformers runs it wrongly

ONE_LENGTH = [[11, 42, 7, 33], [25, 3, 61, 14]]
LINEAR_FIRST_WAYS: dict[str, Callable[[Any], list[list[int]]]] = {
    "greedy": lambda model: texts(generate(model, batch(prompts=ONE_LENGTH)), ONE_LENGTH),
    "sampled": lambda model: texts(generate(model, batch(prompts=ONE_LENGTH), do_sample=True), ONE_LENGTH),
    "right_padded": right_padded,
    "without_cache": without_cache,
    "steps_placed": WAYS["steps_placed"],
}


@pytest.mark.parametrize("way", LINEAR_FIRST_WAYS)
def test_linear_attention_first(way: str) -> None:
    trace = check(tiny(LINEAR_FIRST), LINEAR_FIRST_WAYS[way])
    if way == "greedy":
        assert trace.phase.tolist() == [PREFILL] * 8 + [DECODE] * 4


@pytest.mark.parametrize("way", ["greedy", "sampled", "static", "chat", "steps", "steps_masked", "chunks"])
def test_what_transformers_runs_wrongly_is_refused(way: str) -> None:
    """Its logits are others than in one pass: of padded batches, of chunks, and without told positions."""
    message = (
        r"record: MiniMaxModel runs this pass wrongly: its first layer has no attention, so its cache does "
        r"not tell it of the \d tokens before; generate\(\) from texts of one length.*or give use_cache=False"
    )
    model = tiny(LINEAR_FIRST)
    with pytest.raises(InputError, match=message), record(model):
        WAYS[way](model)


@pytest.mark.parametrize("way", ["greedy", "two_calls", "right_padded", "steps", "chunks"])
def test_tokens_are_counted_where_no_layer_has_attention(way: str) -> None:
    check(tiny(ALL_LINEAR), WAYS[way])


def test_a_past_that_nobody_knows_is_refused() -> None:
    model = tiny(ALL_LINEAR)
    name = cache_name(model)
    with torch.no_grad():
        past = model(input_ids=torch.tensor([[3, 4, 5]]), use_cache=True)[name]
    message = "a MiniMaxCache without layers of attention does not say how many tokens went in before"
    with pytest.raises(InputError, match=message), record(model):
        model(input_ids=torch.tensor([[6]]), **{name: past})


def test_positions_that_images_have_beside_text() -> None:
    """A hybrid with vision is told four rows of positions; of a static cache they count, not the mask."""
    if not hasattr(transformers, "Qwen3_5MoeConfig"):
        pytest.skip(f"transformers {transformers.__version__} has no Qwen3.5")
    default = transformers.Qwen3_5MoeTextConfig()
    text = {name: value for name, value in COMMON.items() if hasattr(default, name)}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen3_5MoeConfig(text_config=text, vision_config=vision)
    model = with_random_weights(lambda: transformers.Qwen3_5MoeForConditionalGeneration(config))
    for way in ("greedy", "static", "right_padded"):
        check(model, WAYS[way])
