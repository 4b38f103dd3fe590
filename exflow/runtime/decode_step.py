"""A decode step of static shape: no size depends on what tokens do, so that a GPU can replay it as one graph.

Every rank has a row for each sequence that it may own, and a mask of those it owns now. Tokens move by being
written into their row on another rank (mail.py); kernels skip rows that are not owned. It computes what the
eager step computes (moe.py, kv_cache.py), which stays the way to debug it and its oracle.

Shapes: B sequences of the batch, M rows of this rank, D hidden, K choices, S slots of this rank.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import triton
from torch import Tensor
from torch.nn import RMSNorm
from torch.nn.functional import grouped_mm

from exflow.comm.buffers import Far, Mail, Mailbox, StepShape, words_of
from exflow.kernels.advance import advance
from exflow.kernels.decode_attention import decode_attention, merge_splits
from exflow.kernels.gate import gate_and_put
from exflow.kernels.grouped_mlp import expert_down, expert_up
from exflow.kernels.heads import prepare_heads
from exflow.kernels.lined_up import activate, line_up, put_back
from exflow.kernels.receive import receive
from exflow.kernels.relay import pass_on, send_sums
from exflow.kernels.settle import put_partials, settle
from exflow.model.config import ModelConfig
from exflow.model.decoder import Attention, Block, Decoder, MoE, Norm
from exflow.model.replay import ReplayedRouting
from exflow.model.rotary import Rotary
from exflow.model.sampling import Sampling, scores_of
from exflow.runtime.expert_parallel import PlanTables

MANY_ROWS = 96  # of a slot, in the mean: torch's grouped products are faster than ours from there on
NOT_FINITE = -2  # noted instead of a token whose logits are not
PATIENCE = 20_000_000  # looks at another rank's flag before it is given up: 10 s and more


@dataclass(frozen=True)
class Tiles:
    """How the expert products are cut: `rows` of a slot at once, `wide` outputs, `deep` along the sum,
    `splits` of it."""

    rows: int
    wide: int
    deep: int
    splits: int
    stages: int
    warps: int = 4


def tiles_for(rows_per_slot: float, slots: int, width: int, depth: int, itemsize: int, gated: bool) -> Tiles:
    """Tiles for a product of [rows, depth] with [width, depth] weights in each of `slots` slots.

    Weights are read again for every `rows` of a slot, so that the fullest slot should fit; more rows than are
    there cost arithmetic. Measured on an H200 (docs/log.md).
    """
    rows = triton.next_power_of_2(int(rows_per_slot + 4 * rows_per_slot**0.5) or 1)
    rows = min(128, max(16, rows))
    few, many = rows == 16, rows == 128
    wide = min(128 if many and not gated else 64, triton.next_power_of_2(width))
    deep = min(256 // itemsize, triton.next_power_of_2(depth))
    programs = slots * triton.cdiv(width, wide)
    splits = 1
    while programs * splits < (128 if few else 256) and splits < 8 and depth // (splits * 2) >= 4 * deep:
        splits *= 2
    stages = 4 if few or (gated and not many) else 3
    return Tiles(rows, wide, max(16, deep), splits, stages, warps=8 if many else 4)


def _has_grouped_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's grouped products run without reading sizes on the host."""
    return device.type == "cpu" or (dtype == torch.bfloat16 and _is_sm90(device))


def _is_sm90(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _programmatic_launch(device: torch.device) -> dict[str, Any]:
    """What a kernel is launched with, so that it is set up while the one before it still runs (wire.py)."""
    if _is_sm90(device):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


def _or_else(value: Tensor | None, instead: Tensor) -> Tensor:
    """For a kernel, which does not read what it is given `instead` of a value that a model has not."""
    return instead if value is None else value


def _weight_and_bias(norm: Norm) -> tuple[Tensor, Tensor]:
    """RMSNorm has no bias."""
    return norm.weight, norm.weight if isinstance(norm, RMSNorm) else norm.bias


class DecodeStep:
    """The buffers of one rank's step, and the step: `start` a request, then `run` for each of its tokens.

    caches: addresses of the K/V caches [layers, 2, M, kv heads, positions, width] that new keys and values go
    to; one_sided: the mail arrives by itself, and is waited for; share: gives the step's new keys and values
    to ranks whose caches cannot be written to.
    """

    def __init__(
        self,
        decoder: Decoder,
        shape: StepShape,
        tables: PlanTables,
        mail: Mail,
        caches: list[int],
        sampling: Sampling,
        end_tokens: tuple[int, ...],
        replay: ReplayedRouting | None = None,
        one_sided: bool = True,
        share: "Callable[[DecodeStep], None] | None" = None,
    ) -> None:
        config = decoder.config
        self.decoder, self.shape, self.mail, self.share = decoder, shape, mail, share
        self.patience = PATIENCE
        self.sampling, self.end_tokens, self.replay, self.one_sided = sampling, end_tokens, replay, one_sided
        weight = decoder.embedding.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.layers = len(config.moe_layer_ids)
        self.top_k = config.top_k
        self.slots = tables.slots_per_rank

        def zeros(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=self.device)

        rows, sequences, hidden = shape.rows, shape.sequences, config.hidden_size
        pairs = sequences * self.top_k
        self.serving = tables.serving_slot.transpose(0, 1).contiguous().to(torch.int32)  # [L, G, E]
        self.next_owner = tables.next_owner.to(torch.int32).contiguous()  # [L, E, G]
        self.caches = torch.tensor(caches, device=self.device)
        self.overlap = _programmatic_launch(self.device)
        self.rms = config.norm == "rmsnorm"
        self.shapes: dict[str, Any] = {
            **self.overlap,
            "D": hidden,
            "TOP_K": self.top_k,
            "RANK": shape.rank,
            "RANKS": shape.num_ranks,
            "GROUP": shape.group_size,
            "RANKS_PER_NODE": shape.ranks_per_node,
            "BLOCK_D": triton.next_power_of_2(hidden),
            "BLOCK_G": triton.next_power_of_2(shape.num_ranks),
        }
        # the state that a step takes over from the one before
        self.step = zeros(1, dtype=torch.int64)
        self.sequence, self.number = zeros(rows, dtype=torch.int64), zeros(rows, dtype=torch.int64)
        self.token, self.position = zeros(rows, dtype=torch.int64), zeros(rows, dtype=torch.int64)
        self.owned = zeros(rows)
        self.seed = zeros(dtype=torch.int64)
        self.end_of = torch.tensor([*end_tokens, -1], device=self.device)  # [end tokens and one more]
        self.failed = zeros(1)
        # what a layer works in
        self.hidden, self.normed = zeros(2, rows, hidden, dtype=self.dtype)
        self.received = zeros(sequences, hidden, dtype=self.dtype)
        self.residual_at = zeros(sequences, dtype=torch.int64)
        self.owner_of, self.relay_of = zeros(2, sequences)
        self.weights = zeros(sequences, self.top_k, dtype=torch.float32)
        self.pairs, self.counts = zeros(self.slots, pairs), zeros(self.slots)
        gated = config.activation != "gelu"
        self.activation = {
            "KIND": config.activation,
            "ALPHA": config.swiglu_alpha,
            "LIMIT": config.swiglu_limit,
            "BIASED": config.expert_bias,
        }
        inner = config.intermediate_size
        per_slot = pairs / config.num_experts
        itemsize = self.dtype.itemsize
        self.up = tiles_for(per_slot, self.slots, inner, hidden, itemsize, gated)
        self.down = tiles_for(per_slot, self.slots, hidden, inner, itemsize, False)
        self.lined_up = per_slot >= MANY_ROWS and _has_grouped_products(self.device, self.dtype)
        if self.lined_up:
            self.down = replace(self.down, splits=1)
            self.in_order = zeros(pairs, hidden, dtype=self.dtype)
            self.order, self.ends = zeros(pairs), zeros(self.slots)
        self.inner = zeros(pairs, inner, dtype=self.dtype)
        self.partials = zeros(self.down.splits, pairs, hidden, dtype=torch.float32)
        heads, width = config.num_attention_heads, config.head_dim
        self.attention_splits = self._attention_splits(config)
        self.attended_out = zeros(rows, heads, width, dtype=self.dtype)
        parts = (rows, heads, self.attention_splits)
        self.sums = zeros(*parts, width, dtype=torch.float32)
        self.peaks = zeros(*parts, 2, dtype=torch.float32)
        self.turns = None
        if config.rope is not None:
            positions = torch.arange(shape.positions, device=self.device)
            self.turns = Rotary(config.rope, config.head_dim).turns(positions)
        of_layers = config.num_hidden_layers if share else 0
        self.born = zeros(of_layers, rows, config.kv_width, dtype=self.dtype)
        self.born_owned = zeros(of_layers, rows)
        # what is told about a step: the routing, the copies that left, the tokens chosen
        self.routing = zeros(self.layers, rows, self.top_k)
        self.routing_weight = zeros(self.layers, rows, self.top_k, dtype=torch.float32)
        self.dispatched, self.returned, self.attended = zeros(rows, 2), zeros(sequences, 2), zeros(rows)
        self.passed = zeros(sequences)
        self.done = zeros(1, dtype=torch.int64)
        self.chosen = zeros(shape.positions, rows, dtype=torch.int64)
        self.dictated_row = zeros(rows, dtype=torch.int64)

    def _attention_splits(self, config: ModelConfig) -> int:
        """In how many parts to read the past, so that few sequences with a long one fill the GPU."""
        shape = self.shape
        owned = shape.rows if shape.replicated else triton.cdiv(shape.sequences, shape.num_ranks)
        wanted = triton.cdiv(132, owned * config.num_kv_heads)  # an H100 has 132 multiprocessors
        sensible = triton.cdiv(shape.positions, 128)
        return min(16, int(triton.next_power_of_2(wanted)), int(triton.next_power_of_2(sensible)))

    def start(
        self, first_sequence: int, token_M: Tensor, position_M: Tensor, owned_M: Tensor, seed: int
    ) -> None:
        """Begin a request: its first sequence's id, each row's newest token, position, and whether it is
        owned here, and the seed of its samples.

        Prompt n of the request is sequence first_sequence + n, and as a row of the batch the one whose home
        is that sequence's: first_sequence % num_ranks + n.
        """
        self.sequence.copy_(self.shape.sequence_ids(first_sequence))
        self.number.copy_(self.sequence - first_sequence)
        self.token.copy_(token_M)
        self.position.copy_(position_M)
        self.owned.copy_(owned_M)
        self.seed.fill_(seed)
        self.done.zero_()
        self.chosen.fill_(-1)
        for counter in (self.dispatched, self.passed, self.returned, self.attended):
            counter.zero_()

    def run(self) -> Iterator[None]:
        """One step; control is given up where other ranks must catch up (on a GPU, whose kernels wait, nobody
        must)."""
        decoder = self.decoder
        if self.replay is not None:
            self.dictated_row.copy_(self.replay.row_of(self.sequence, self.position))
        self.hidden.copy_(decoder.embed(self.token, self.position))
        blocks = cast(list[Block], list(decoder.blocks))
        norms = [*(block.attention.norm for block in blocks), decoder.norm]
        self.normed.copy_(norms[0](self.hidden))
        for layer, block in enumerate(blocks):
            self._attend(layer, block)
            if isinstance(block.mlp, MoE):
                yield from self._moe(block.mlp, norms[layer + 1])
            else:
                self.hidden.copy_(block.mlp(self.hidden))
                self.normed.copy_(norms[layer + 1](self.hidden))
        if self.share is not None:
            self.share(self)
        self.logits = decoder.logits(self.normed)
        scores_MV = self.logits
        if self.sampling.temperature > 0:  # else the positions after these are not needed
            scores_MV = scores_of(self.logits, self.sampling, self.number, self.position + 1, self.seed)
        self._advance(scores_MV)

    def _attend(self, layer: int, block: Block) -> None:
        """Attention of the owned rows, added to the residual stream."""
        shape, config = self.shape, self.decoder.config
        qkv, attention = block.attention.qkv(self.normed), block.attention
        self._prepare(qkv, attention)
        heads, width, splits = config.num_attention_heads, config.head_dim, self.attention_splits
        block_c = max(16, triton.next_power_of_2(width))
        decode_attention[(shape.rows, config.num_kv_heads, splits)](
            qkv,
            self.owned,
            self.position,
            self.caches,
            self.attended_out,
            self.sums,
            self.peaks,
            self.attended,
            self.born,
            self.born_owned,
            _or_else(attention.sinks, self.peaks),
            layer,
            shape.rows,
            shape.positions,
            attention.window or shape.positions,
            width**-0.5,
            HEADS=heads,
            KV_HEADS=config.num_kv_heads,
            WIDTH=width,
            MEMBER=shape.rank % shape.group_size if len(self.caches) > 1 else 0,
            MEMBERS=len(self.caches),
            SPLITS=splits,
            BORN=self.share is not None,
            SINKS=attention.sinks is not None,
            BLOCK_P=min(64, 8192 // block_c),
            BLOCK_Q=max(16, triton.next_power_of_2(heads // config.num_kv_heads)),
            BLOCK_C=block_c,
            num_warps=2,
            **self.overlap,
        )
        if splits > 1:
            merge_splits[(shape.rows, heads)](
                self.owned,
                self.sums,
                self.peaks,
                self.attended_out,
                HEADS=heads,
                WIDTH=width,
                SPLITS=splits,
                BLOCK_C=block_c,
                **self.overlap,
            )
        torch.addmm(self.hidden, self.attended_out.flatten(1), attention.out.weight.T, out=self.hidden)
        if attention.out.bias is not None:
            self.hidden.add_(attention.out.bias)

    def _prepare(self, qkv: Tensor, attention: Attention) -> None:
        """What attention does to queries, keys and values first, if anything."""
        config = self.decoder.config
        normed = attention.q_norm is not None and attention.k_norm is not None
        if not (normed or attention.clip is not None or self.turns is not None):
            return
        nothing = (qkv, qkv)  # is not read
        q_norm, k_norm = (
            nothing if norm is None else _weight_and_bias(norm)
            for norm in (attention.q_norm, attention.k_norm)
        )
        prepare_heads[(self.shape.rows, 2 if attention.clip is None else 3)](
            qkv,
            self.owned,
            self.position,
            *q_norm,
            *k_norm,
            *(self.turns or nothing),
            attention.clip or 0.0,
            HEADS=config.num_attention_heads,
            KV_HEADS=config.num_kv_heads,
            WIDTH=config.head_dim,
            NORM=config.qk_norm or "none",
            RMS=self.rms,
            EPS=config.norm_eps,
            CLIP=attention.clip is not None,
            ROTARY=self.turns is not None,
            BLOCK_H=triton.next_power_of_2(config.num_attention_heads),
            BLOCK_P=triton.next_power_of_2(-(-config.head_dim // 2)),
            **self.overlap,
        )

    def _moe(self, layer: MoE, following: Norm) -> Iterator[None]:
        """One MoE layer; `following` norms its result for what comes next."""
        yield from self._dispatch(layer)
        if self.lined_up:
            self._experts_in_order(layer)
        else:
            self._experts(layer)
        yield from self._combine(layer.index, following)

    def _dispatch(self, layer: MoE) -> Iterator[None]:
        """Gate the owned rows, put each where it is served, and take in what came here."""
        shape, mail, replay = self.shape, self.mail.dispatch, self.replay
        index, wide = layer.index, self.shapes["BLOCK_D"]
        gate, config = layer.router.gate, self.decoder.config
        block_e = triton.next_power_of_2(config.num_experts)
        words = {"WORDS": words_of(self.top_k), "HIDDEN_AT": mail.payload_at, "BY_SEQUENCE": mail.shared}
        words |= {"RELAYED": shape.relayed, "SLOTS_PER_RANK": self.slots}
        gate_and_put[(shape.rows,)](
            self.hidden,
            self.owned,
            *_weight_and_bias(layer.norm),
            gate.weight,
            _or_else(gate.bias, gate.weight),
            self.serving[index],
            self.next_owner[index],
            self.pairs if replay is None else replay.expert,
            self.dictated_row,
            self.routing[index],
            self.routing_weight[index],
            mail.to,
            self.step,
            self.dispatched,
            index,
            self.layers,
            EXPERTS=config.num_experts,
            FAR_HIDDEN_AT=mail.far.payload_at if mail.far else 0,
            REPLICATED=shape.replicated,
            REPLAY=replay is not None,
            GATE_BIAS=gate.bias is not None,
            AMONG_ALL=config.gate_among_all,
            EPS=layer.norm.eps,
            RMS=self.rms,
            BLOCK_E=block_e,
            STRIP=min(wide, 1024 if block_e <= 16 else 256),
            num_warps=4 if block_e <= 16 else 8,
            **self.shapes,
            **words,
        )
        if not shape.replicated:
            yield
            mail.move()
        if mail.far is not None:
            self._pass_on(index, mail, mail.far)
            yield
        receive[(shape.sequences + self.slots,)](
            mail.at,
            mail.flags,
            mail.flag_addresses,
            self.failed,
            self.patience,
            self.step,
            *_weight_and_bias(layer.norm),
            self.received,
            self.residual_at,
            self.owner_of,
            self.relay_of,
            self.weights,
            self.pairs,
            self.counts,
            index,
            self.layers,
            shape.sequences,
            CHUNK=mail.chunk,
            WAIT=self.one_sided and not shape.replicated,
            EPS=layer.norm.eps,
            RMS=self.rms,
            BLOCK_B=triton.next_power_of_2(shape.sequences),
            **self.shapes,
            **words,
        )

    def _pass_on(self, index: int, mail: Mailbox, far: Far) -> None:
        """Give what other nodes sent to the ranks of this one that serve it."""
        shape = self.shape
        pass_on[(shape.rows, shape.num_ranks // shape.ranks_per_node)](
            far.at,
            mail.to,
            self.hidden,
            self.step,
            self.passed,
            index,
            self.layers,
            SLOTS_PER_RANK=self.slots,
            WORDS=words_of(self.top_k),
            HIDDEN_AT=mail.payload_at,
            FAR_HIDDEN_AT=far.payload_at,
            **self.shapes,
        )

    def _combine(self, index: int, following: Norm) -> Iterator[None]:
        """Bring the experts' sums to the tokens' next owners, who add them to the residual stream."""
        shape, returns = self.shape, self.mail.returns
        if returns is not None:
            put_partials[(shape.sequences,)](
                self.partials,
                self.weights,
                self.owner_of,
                self.relay_of,
                self.hidden,
                returns.to,
                self.step,
                self.returned,
                index,
                self.layers,
                shape.sequences,
                SUMS_AT=returns.payload_at,
                RELAYED=shape.relayed,
                REPLICATED=shape.replicated,
                SPLITS=self.down.splits,
                **self.shapes,
            )
            yield
            returns.move()
        sums = self.mail.sums
        if returns is not None and sums is not None and sums.far is not None:
            self._send_sums(index, returns, sums, sums.far)
            yield
            sums.move()
        mail = sums or returns or self.mail.dispatch
        settle[(shape.rows,)](
            self.partials,
            self.weights,
            self.residual_at,
            self.owner_of,
            self.relay_of,
            mail.at,
            mail.far.at if mail.far else mail.at,
            mail.flags,
            mail.flag_addresses,
            self.failed,
            self.patience,
            self.step,
            *_weight_and_bias(following),
            self.hidden,
            self.normed,
            self.owned,
            index,
            self.layers,
            shape.sequences,
            CHUNK=mail.chunk,
            SUMS_AT=mail.payload_at,
            FAR_SUMS_AT=mail.far.payload_at if mail.far else 0,
            RELAYED=shape.relayed,
            RETURNS=returns is not None,
            # a token that comes home has been its owner's to relay: its sums have been waited for
            WAIT=self.one_sided and not (shape.relayed and shape.group_size == 1),
            EPS=following.eps,
            RMS=self.rms,
            SPLITS=self.down.splits,
            **self.shapes,
        )

    def _send_sums(self, index: int, returns: Mailbox, sums: Mailbox, far: Far) -> None:
        """Sum what this node's ranks made of the tokens relayed here, for their next owners."""
        send_sums[(self.shape.sequences,)](
            self.partials,
            self.weights,
            self.owner_of,
            self.relay_of,
            self.hidden,
            returns.at,
            returns.flags,
            returns.flag_addresses,
            self.failed,
            self.patience,
            sums.to,
            self.step,
            self.returned,
            index,
            self.layers,
            self.shape.sequences,
            CHUNK=returns.chunk,
            SUMS_AT=returns.payload_at,
            FAR_SUMS_AT=far.payload_at,
            SPLITS=self.down.splits,
            **self.shapes,
        )

    def _experts(self, layer: MoE) -> None:
        """The slots' rows through their experts, weighted, into `partials`."""
        inner, hidden = self.inner.shape[1], self.hidden.shape[1]
        pairs = len(self.inner)
        up, down, experts = self.up, self.down, layer.experts
        expert_up[(triton.cdiv(inner, up.wide), self.slots)](
            self.received,
            self.pairs,
            self.counts,
            experts.w_in,
            _or_else(experts.b_in, experts.w_in),
            self.inner,
            pairs,
            D=hidden,
            F=inner,
            TOP_K=self.top_k,
            **self.activation,
            BLOCK_F=up.wide,
            BLOCK_K=up.deep,
            BLOCK_R=up.rows,
            num_warps=up.warps,
            num_stages=up.stages,
            **self.overlap,
        )
        expert_down[(triton.cdiv(hidden, down.wide), self.slots, down.splits)](
            self.inner,
            self.pairs,
            self.counts,
            self.weights,
            experts.w_out,
            _or_else(experts.b_out, experts.w_out),
            self.partials,
            pairs,
            D=hidden,
            F=inner,
            SPLITS=down.splits,
            BIASED=experts.b_out is not None,
            BLOCK_D=down.wide,
            BLOCK_K=down.deep,
            BLOCK_R=down.rows,
            num_warps=down.warps,
            num_stages=down.stages,
            **self.overlap,
        )

    def _experts_in_order(self, layer: MoE) -> None:
        """The same by torch's grouped products, for many rows a slot."""
        inner, hidden = self.inner.shape[1], self.hidden.shape[1]
        pairs = len(self.inner)
        line_up[(pairs,)](
            self.received,
            self.pairs,
            self.counts,
            self.in_order,
            self.order,
            self.ends,
            pairs,
            D=hidden,
            TOP_K=self.top_k,
            SLOTS=self.slots,
            BLOCK_S=triton.next_power_of_2(self.slots),
            BLOCK_D=self.shapes["BLOCK_D"],
            **self.overlap,
        )
        experts = layer.experts
        activate[(pairs, triton.cdiv(inner, 1024))](
            grouped_mm(self.in_order, experts.w_in.mT, offs=self.ends),
            _or_else(experts.b_in, experts.w_in),
            self.inner,
            self.ends,
            F=inner,
            **self.activation,
            SLOTS=self.slots,
            BLOCK_S=triton.next_power_of_2(self.slots),
            BLOCK_F=1024,
            **self.overlap,
        )
        put_back[(pairs,)](
            grouped_mm(self.inner, experts.w_out.mT, offs=self.ends),
            self.order,
            self.ends,
            self.weights,
            _or_else(experts.b_out, experts.w_out),
            self.partials,
            D=hidden,
            BIASED=experts.b_out is not None,
            SLOTS=self.slots,
            BLOCK_S=triton.next_power_of_2(self.slots),
            BLOCK_D=self.shapes["BLOCK_D"],
            **self.overlap,
        )

    def _advance(self, scores_MV: Tensor) -> None:
        """Choose and note the tokens of the owned rows, which are the next step's."""
        score_M, best_M = scores_MV.max(dim=-1)
        rows = len(best_M)
        advance[(1,)](
            best_M,
            score_M,
            self.end_of,
            self.chosen,
            self.token,
            self.position,
            self.owned,
            self.done,
            self.step,
            rows,
            ENDS=len(self.end_tokens),
            NOT_FINITE=NOT_FINITE,
            BLOCK=triton.next_power_of_2(rows),
            num_warps=1,
            **self.overlap,
        )
