"""Models of published families as transformers saves them, and their logits."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exflow.model.attention import CausalAttention, rows_of_batch
from exflow.model.decoder import Decoder, Rows
from exflow.model.single_process import AllExpertsHere
from exflow.runtime.deploy import load_model
from exflow.runtime.request import Request

CPU = torch.device("cpu")
PROMPTS = [[65, 66, 67], [72, 69, 76, 76, 79, 32, 87, 79, 82, 76, 68], [42]]
NEW = 12


def logits_of(decoder: Decoder, token_NS: Tensor) -> Tensor:
    rows = rows_of_batch(*token_NS.shape, CPU)
    hidden_TD, _ = decoder(token_NS.flatten(), rows, CausalAttention(len(token_NS)), AllExpertsHere())
    return decoder.logits(hidden_TD).unflatten(0, token_NS.shape)


def assert_as_transformers(model: Any, folder: Path) -> None:
    """The logits of prefill and of every decode step, and so the greedy tokens; then of whole sequences."""
    chosen_by: dict[tuple[int, int], Tensor] = {}

    def observe(rows: Rows, logits_TV: Tensor) -> None:
        places = zip(rows.sequence_T.tolist(), rows.position_T.tolist(), strict=True)
        chosen_by.update(zip(places, logits_TV, strict=True))

    engine = load_model(folder)
    tokens = engine.generate(Request(PROMPTS, NEW), observe).tokens
    for number, (prompt, new) in enumerate(zip(PROMPTS, tokens, strict=True)):
        expected_SV = model(torch.tensor([prompt + new])).logits[0]
        for position in range(len(prompt) - 1, len(prompt) + NEW - 1):
            found_V = chosen_by[number, position]
            torch.testing.assert_close(found_V, expected_SV[position], atol=1e-4, rtol=0)
        assert new == expected_SV[len(prompt) - 1 : -1].argmax(dim=-1).tolist()
    token_NS = torch.randint(257, (2, 24), generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(logits_of(engine.decoder, token_NS), model(token_NS).logits, atol=1e-4, rtol=0)


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config
