"""Results of generate and bench decode: texts with the figures of a run, and a table of timings."""

from typing import Any

from exflow.cli.tables import print_json, print_table, readable


def print_generation(prompts: list[str], result: dict[str, Any], as_json: bool) -> None:
    """Print the texts, then the figures of the run."""
    if as_json:
        print_json(result)
        return
    for prompt, text in zip(prompts, result["text"], strict=True):
        print(f"{prompt}{text}\n")
    print(
        f"{result['strategy']} in {result['dtype']} on {result['ranks']} rank(s): "
        f"TTFT {result['ttft_s']:.2f} s, TPOT {result['tpot_ms']:.1f} ms, "
        f"{result['tokens_per_s']:.1f} tokens/s"
    )
    if verified := result.get("verified"):
        print(
            f"verified: {verified['choices']} choices are those of one process, with logits within "
            f"{verified['largest_difference']:.1e} of the largest ({verified['tolerance']:.0e} is allowed), "
            f"{verified['ties']} of {verified['routings']} routings were near-ties that rounding decided, "
            "and the counters are what the routing comes to"
        )


def print_decode_bench(result: dict[str, Any], as_json: bool) -> None:
    """Print the table, the reasons for empty rows, and the strategy that `auto` would take."""
    if as_json:
        print_json(result)
        return
    print(
        f"{result['model']} in {result['dtype']} ({result['weights']} weights) on {result['ranks']} rank(s), "
        f"{result['hardware']}; {result['context']} positions, {result['steps']} steps"
    )
    rows = [
        {name: "-" if value is None else value for name, value in row.items()} | {"batch": str(row["batch"])}
        for row in result["rows"]
    ]
    measured = {"x floor": "times_floor"} if any(row["times_floor"] for row in result["rows"]) else {}
    print_table(["strategy", "transport", "placement", "batch"], _DECODE_BENCH_COLUMNS | measured, rows)
    print(_DECODE_BENCH_LEGEND)
    for row in result["rows"]:
        if row["stopped"]:
            print(f"{_case(row)}: {row['stopped']}")
    for case in result["auto"]:
        clock = "not measured" if case["tpot_ms"] is None else f"{readable(case['tpot_ms'])} ms measured"
        print(f"auto: {_case(case)}, {readable(case['predicted_ms'])} ms predicted, {clock}")


def _case(row: dict[str, Any]) -> str:
    return f"{row['strategy']}, {row['transport']}, {row['placement']}, batch {row['batch']}"


_DECODE_BENCH_COLUMNS = {
    "TPOT ms": "tpot_ms",
    "p99 ms": "p99_ms",
    "tokens/s": "tokens_per_s",
    "critical B": "critical_bytes_per_step",
    "backgr. B": "background_bytes_per_step",
    "x first": "speedup",
}


_DECODE_BENCH_LEGEND = """\
critical B, backgr. B  bytes that a rank sends in a step: hidden states; keys and values
x first                times as fast as the first row of the same batch"""
