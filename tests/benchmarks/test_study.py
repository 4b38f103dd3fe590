"""The study's measures on routing whose answer is known, and its page."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.study import data as study_data
from benchmarks.study import run as study
from benchmarks.study import tokens as study_tokens
from benchmarks.study import training as study_training
from benchmarks.study import transfer as study_transfer
from benchmarks.study.information import information
from exflow.errors import InputError
from exflow.placement.counts.information import entropy, mutual_information
from exflow.placement.make_plan import Solving
from exflow.placement.plan.topology import Topology
from exflow.profiling.merge import of_sequences
from exflow.profiling.trace import RoutingTrace

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "study"


def planted(
    stay: float, tokens: int = 20_000, layers: int = 5, experts: int = 4, sequences: int = 40, seed: int = 0
) -> RoutingTrace:
    """Each layer's expert is the layer before's, by names of its own, with probability `stay`; else any."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, experts, (tokens, layers))
    for layer in range(1, layers):
        ids[:, layer] = np.where(random.random(tokens) < stay, ids[:, layer - 1], ids[:, layer])
    names = np.stack([random.permutation(experts) for _ in range(layers)])
    return RoutingTrace.from_arrays(
        names[np.arange(layers), ids], num_experts=experts, sequence=np.arange(tokens) * sequences // tokens
    )


def true_information(stay: float, experts: int = 4) -> float:
    """Bits between a uniform expert and the next: log2 E less the entropy of a row."""
    other = (1 - stay) / experts
    row = np.array([stay + other, *[other] * (experts - 1)])
    return math.log2(experts) + float((row * np.log2(row)).sum())


def test_entropy_and_mutual_information_by_hand() -> None:
    np.testing.assert_allclose(entropy(np.array([[1, 1, 1, 1], [7, 0, 0, 0], [2, 1, 1, 0]])), [2, 0, 1.5])
    same, independent = np.diag([5, 5]), np.array([[1, 3], [2, 6]])
    np.testing.assert_allclose(mutual_information(np.stack([same, independent])), [1, 0], atol=1e-12)


@pytest.mark.parametrize("distance", [1, 2, 4])
def test_the_planted_information_is_found_at_every_distance(distance: int) -> None:
    """A token that stays with probability p between neighbours does so with p ** d over d layers."""
    found = information(planted(stay=0.8), distance)
    expected = true_information(0.8**distance)
    assert len(found.plug_in) == 5 - distance
    assert found.net == pytest.approx(expected, abs=5 * found.error)
    assert found.error < 0.05 * expected
    assert found.share == pytest.approx(expected / 2, rel=0.1)


def test_the_shuffled_control_is_the_bias_of_the_estimate() -> None:
    independent = information(planted(stay=0.0, tokens=1000, experts=16, layers=40))
    bias = 15**2 / (2 * 1000 * math.log(2))
    assert np.mean(independent.chance) == pytest.approx(bias, rel=0.1)
    assert np.mean(independent.plug_in) == pytest.approx(bias, rel=0.1)
    assert abs(independent.net) < 0.03 * bias + 4 * independent.error


def test_what_the_sequence_says_is_told_apart_from_what_the_token_says() -> None:
    """Half of the sequences use the lower experts alone: one bit, and nothing else to be known."""
    random = np.random.default_rng(0)
    sequence = np.arange(8000) // 100
    by_topic = random.integers(0, 2, (8000, 3)) + 2 * (sequence % 2)[:, None]
    topical = information(RoutingTrace.from_arrays(by_topic, num_experts=4, sequence=sequence))
    assert topical.net == pytest.approx(1, abs=0.01)
    assert topical.of_topic == pytest.approx(1, abs=0.01)
    assert information(planted(stay=0.8)).of_topic == pytest.approx(0, abs=0.01)


def test_the_standard_error_is_that_of_the_estimate() -> None:
    found = [information(planted(stay=0.6, tokens=2000, layers=2, seed=seed)) for seed in range(60)]
    spread = np.std([each.net for each in found])
    assert np.mean([each.error for each in found]) == pytest.approx(spread, rel=0.35)


def test_information_that_cannot_be_counted_is_refused() -> None:
    with pytest.raises(InputError, match="distance is 5, of a trace with 5 MoE layers; choose 1 to 4"):
        information(planted(stay=0.5), 5)
    with pytest.raises(InputError, match="one sequence"):
        information(planted(stay=0.5, sequences=1))


def domain(seed: int) -> RoutingTrace:
    return planted(stay=0.9, tokens=800, experts=8, layers=4, sequences=8, seed=seed)


def test_planted_domains_are_served_best_by_their_own_plan() -> None:
    """Each domain has partners of its own."""
    domains = {"one": domain(1), "two": domain(2), "three": domain(3)}
    subject = study_data.Subject("planted", domains, Topology(gpus_per_node=2))
    rows = study_transfer.measure(subject, Solving("sweep"), lambda what: None)
    to_own = {(row.plan_from, row.judged_on): row.to_own for row in rows}
    assert len(to_own) == (3 + 2) * 3
    for (source, judged), found in to_own.items():
        if source == judged:
            assert found == {"value": 1.0, "low": 1.0, "high": 1.0}
        else:
            assert found["low"] > 1.2, (source, judged)
    assert {row.tokens for row in rows} == {800}


def test_plans_that_are_compared_are_made_from_equally_many_tokens() -> None:
    long, short = domain(1), of_sequences(domain(2), np.arange(3))
    plans = study_transfer.plans_from(
        {"long": long, "short": short}, Topology(gpus_per_node=2), Solving("sweep")
    )
    assert {name: plan.expected["tokens"] for name, plan in plans.items()} == dict.fromkeys(plans, 300)


def test_more_tokens_make_better_plans_of_planted_routing() -> None:
    trace = planted(stay=0.9, tokens=1280, experts=16, layers=4, sequences=128)
    subject = study_data.Subject("planted", {"all": trace}, Topology(gpus_per_node=4))
    rows = study_tokens.measure(subject, Solving("sweep"), lambda what: None)
    assert [row.tokens for row in rows] == [10, 30, 60, 120, 240, 480, 960]
    assert rows[0].saved < rows[-1].saved
    assert rows[-1].held_out < 0.5 * rows[-1].contiguous


def test_loads_alone_are_told_apart_from_affinity() -> None:
    checkpoint = study_data.Checkpoint(
        "100", planted(stay=0.9, tokens=2000, experts=8, layers=4, sequences=8)
    )
    (found,) = study_training.measure([checkpoint], lambda what: None)
    assert found.local["value"] == pytest.approx(0.9 + 0.1 / 4, abs=0.05)
    assert found.by_load["value"] == pytest.approx(0.25, abs=0.05)
    assert found.entropy == pytest.approx(3, abs=0.01)
    assert found.imbalance < 1.2


def test_what_is_not_given_is_left_out_and_what_is_missing_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study.main(["--only", "adjacent", "-o", str(tmp_path / "out")]) == 0
    assert "skipped: gpt-moe-demo needs texts; give --texts DIR; Mixtral" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    for given, said in {
        "--traces": "mixtral8x7b_coding.npz",
        "--texts": "gutenberg_middlemarch.txt",
        "--training": "holds no traces step-000000",
    }.items():
        assert study.main([given, str(tmp_path), "-o", str(tmp_path / "out")]) == 2
        assert said in capsys.readouterr().err
    assert study.main(["--draw", "-o", str(tmp_path)]) == 2
    assert "training.json: no such answer; run the study without --draw" in capsys.readouterr().err


def test_an_answer_is_data_a_drawing_and_a_table_in_the_page(tmp_path: Path) -> None:
    traces = tmp_path / "traces"
    for step in ("step-000000", "step-002200"):
        domain(int(step[-1])).save(traces / step)
    page = tmp_path / "out" / study.PAGE
    page.parent.mkdir()
    page.write_text("Before\n<!-- training -->\nold\n<!-- end of training -->\nafter\n")
    chosen = ["--only", "training", "--training", str(traces), "-o", str(tmp_path / "out")]
    assert study.main(chosen) == 0
    document = json.loads((tmp_path / "out" / "training.json").read_text())
    assert [row["step"] for row in document["rows"]] == ["0", "2200"]
    text = page.read_text()
    assert (
        text
        == f"Before\n<!-- training -->\n{study.block('training', document)}<!-- end of training -->\nafter\n"
    )
    assert (tmp_path / "out" / "training.svg").read_text().startswith("<svg")
    page.write_text("")
    assert study.main([*chosen, "--draw"]) == 0
    assert study.block("training", document) in page.read_text()


def without_images(svg: str) -> str:
    """Compressed pixels are not the same on every machine."""
    return re.sub(r"base64,[^\"]+", "", svg)


@pytest.mark.parametrize("name", study.QUESTIONS)
def test_the_page_says_what_the_data_say(name: str) -> None:
    document = json.loads((PAGE / f"{name}.json").read_text())
    page = (PAGE / study.PAGE).read_text()
    assert study.with_block(page, name, study.block(name, document)) == page
    drawn = study.QUESTIONS[name].figure(study.rows_of(name, document))
    assert without_images((PAGE / f"{name}.svg").read_text()) == without_images(drawn)
    assert f"({name}.svg)" in page
