"""A decode step of static shape: no size depends on the routing, so a GPU can replay it as one graph.

Every rank has a row for each sequence that it may own, and a mask of the rows that it owns now. A token moves
when it is written into its row on another rank (comm/buffers.py). Kernels skip rows that are not owned. All
kernels of a rank run in one stream; docs/decode.md shows that no row is then overwritten before it is read.
The eager step (expert_parallel.py, kv_cache.py) computes equal results: it is the reference for tests.
"""

from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor

from exflow.comm.buffers import LayerBuffers, StepShape
from exflow.kernels.advance import advance
from exflow.kernels.combine import combine, send_partials
from exflow.kernels.decode_attention import decode_attention
from exflow.kernels.gate import gate_and_dispatch
from exflow.kernels.grouped_mlp import grouped_mlp
from exflow.kernels.heads import prepare_heads
from exflow.kernels.permute import permuted_mlp
from exflow.kernels.receive import receive
from exflow.kernels.relay import relay_sums, relay_tokens
from exflow.model.decoder import Attention, Block, Decoder, MoE, Norm
from exflow.model.replay import ReplayedRouting
from exflow.model.sampling import Sampling, scores_of
from exflow.runtime.expert_parallel import PlanTables
from exflow.runtime.step_buffers import Outputs, State, Tables, Tuning, Workspace, geometry_of, weights_of

FLAG_TIMEOUT_POLLS = 20_000_000  # polls of a flag before its rank counts as lost: 10 s or more


class DecodeStep:
    """The buffers and kernels of one rank's step: `start` a request, then `run` once for each token.

    caches: addresses of the K/V caches [layers, 2, rows, kv heads, positions, width] to which new keys and
    values are written. one_sided: peers write rows into this rank's memory, and kernels wait for their flags.
    share: gives the step's new keys and values to ranks whose caches this rank cannot write to.
    """

    def __init__(
        self,
        decoder: Decoder,
        shape: StepShape,
        tables: PlanTables,
        buffers: LayerBuffers,
        caches: list[int],
        sampling: Sampling,
        end_tokens: tuple[int, ...],
        replay: ReplayedRouting | None = None,
        one_sided: bool = True,
        share: "Callable[[DecodeStep], None] | None" = None,
    ) -> None:
        self.decoder, self.shape, self.buffers, self.share = decoder, shape, buffers, share
        self.sampling, self.end_tokens, self.replay = sampling, end_tokens, replay
        self.flag_timeout_polls = FLAG_TIMEOUT_POLLS
        config, weight = decoder.config, decoder.embedding.weight
        device, dtype, slots = weight.device, weight.dtype, tables.slots_per_rank
        self.geometry = geometry_of(config, shape, slots, one_sided, device)
        self.launch = self.geometry.launch
        self.tuning = Tuning.of(config, shape, slots, device, dtype)
        self.tables = Tables.of(config, shape.positions, tables, caches, end_tokens, device)
        self.state = State.zeros(shape.rows, device)
        self.work = Workspace.zeros(config, self.geometry, self.tuning, share is not None, device, dtype)
        self.outputs = Outputs.zeros(self.geometry, shape.positions, device)

    def start(
        self, first_sequence: int, token_M: Tensor, position_M: Tensor, owned_M: Tensor, seed: int
    ) -> None:
        """Begin a request. first_sequence: id of its first sequence. seed: seed of its samples.

        token_M, position_M, owned_M: each row's newest token, its position, and 1 if this rank owns the row.
        Prompt n of the request is sequence first_sequence + n; in the batch it is sequence
        first_sequence % num_ranks + n, which has the same home.
        """
        state = self.state
        state.sequence.copy_(self.shape.sequence_ids(first_sequence))
        state.number.copy_(state.sequence - first_sequence)
        state.token.copy_(token_M)
        state.position.copy_(position_M)
        state.owned.copy_(owned_M)
        state.seed.fill_(seed)
        self.outputs.clear()

    def run(self) -> Iterator[None]:
        """Run one step. Yields where other ranks must catch up if they share this thread, as in tests.

        On a GPU nobody needs to act on a yield: kernels wait for other ranks themselves.
        """
        decoder, state, work = self.decoder, self.state, self.work
        if self.replay is not None:
            state.dictated_row.copy_(self.replay.row_of(state.sequence, state.position))
        work.hidden.copy_(decoder.embed(state.token, state.position))
        blocks = cast(list[Block], list(decoder.blocks))
        norms = [*(block.attention.norm for block in blocks), decoder.norm]
        work.normed.copy_(norms[0](work.hidden))
        for layer, block in enumerate(blocks):
            self._attend(layer, block.attention)
            if isinstance(block.mlp, MoE):
                yield from self._dispatch(block.mlp)
                self._experts(block.mlp)
                yield from self._combine(block.mlp.index, norms[layer + 1])
            else:
                work.hidden.copy_(block.mlp(work.hidden))
                work.normed.copy_(norms[layer + 1](work.hidden))
        if self.share is not None:
            self.share(self)
        self.logits = decoder.logits(work.normed)
        self._advance()

    def _attend(self, layer: int, attention: Attention) -> None:
        """Add attention of the owned rows to the residual stream."""
        config, state, work = self.decoder.config, self.state, self.work
        qkv = attention.qkv(work.normed)
        prepare_heads(
            qkv,
            owned=state.owned,
            position=state.position,
            heads=config.num_attention_heads,
            kv_heads=config.num_kv_heads,
            width=config.head_dim,
            q_norm=attention.q_norm,
            k_norm=attention.k_norm,
            norm_over=config.qk_norm,
            clip=attention.clip,
            cos_sin=self.tables.cos_sin,
            launch=self.launch,
        )
        in_group = len(self.tables.caches) > 1
        decode_attention(
            layer,
            qkv=qkv,
            owned=state.owned,
            position=state.position,
            caches=self.tables.caches,
            member=self.shape.rank % self.shape.group_size if in_group else 0,
            positions=self.shape.positions,
            window=attention.window,
            sinks=attention.sinks,
            out=work.attended,
            sums=work.sums,
            peaks=work.peaks,
            attended=self.outputs.attended,
            new_kv=work.new_kv,
            new_kv_owned=work.new_kv_owned,
            launch=self.launch,
        )
        torch.addmm(work.hidden, work.attended.flatten(1), attention.out.weight.T, out=work.hidden)
        if attention.out.bias is not None:
            work.hidden.add_(attention.out.bias)

    def _dispatch(self, layer: MoE) -> Iterator[None]:
        """Gate the owned rows, send each to the ranks that serve it, and receive the rows sent here."""
        buffer, index, state, outputs = self.buffers.dispatch, layer.index, self.state, self.outputs
        gate_and_dispatch(
            self.geometry,
            index,
            hidden=self.work.hidden,
            owned=state.owned,
            norm=layer.norm,
            gate=layer.router.gate,
            among_all=self.decoder.config.gate_among_all,
            serving=self.tables.serving[index],
            next_owner=self.tables.next_owner[index],
            dictated=None if self.replay is None else self.replay.expert,
            dictated_row=state.dictated_row,
            routing=outputs.routing[index],
            routing_weight=outputs.routing_weight[index],
            buffer=buffer,
            step=state.progress.step,
            sent=outputs.dispatched,
        )
        if not self.shape.replicated:
            yield
            buffer.move()
        if buffer.off_node is not None:
            relay_tokens(
                self.geometry,
                index,
                buffer=buffer,
                off_node=buffer.off_node,
                like=self.work.hidden,
                step=state.progress.step,
                passed=outputs.passed,
            )
            yield
        receive(
            self.geometry,
            index,
            buffer=buffer,
            norm=layer.norm,
            received=self.work.received,
            progress=state.progress,
            most_polls=self.flag_timeout_polls,
        )

    def _experts(self, layer: MoE) -> None:
        """Compute the weighted expert outputs of the received rows into `partials`."""
        work, tuning, weights = self.work, self.tuning, weights_of(layer.experts, self.decoder.config)
        if work.permuted is not None:
            permuted_mlp(
                work.received,
                weights,
                permuted=work.permuted,
                inner=work.inner,
                partials=work.partials,
                launch=self.launch,
            )
        else:
            grouped_mlp(
                work.received,
                weights,
                up=tuning.up,
                down=tuning.down,
                inner=work.inner,
                partials=work.partials,
                launch=self.launch,
            )

    def _combine(self, index: int, following: Norm) -> Iterator[None]:
        """Send partial sums to the tokens' next owners, which add them to the residual stream.

        following: the norm of the next layer, applied to the result.
        """
        work, state, returns, sums = self.work, self.state, self.buffers.returns, self.buffers.sums
        if returns is not None:
            send_partials(
                self.geometry,
                index,
                partials=work.partials,
                received=work.received,
                like=work.hidden,
                buffer=returns,
                step=state.progress.step,
                sent=self.outputs.returned,
            )
            yield
            returns.move()
        if returns is not None and sums is not None and sums.off_node is not None:
            relay_sums(
                self.geometry,
                index,
                partials=work.partials,
                received=work.received,
                like=work.hidden,
                returns=returns,
                sums=sums,
                off_node=sums.off_node,
                progress=state.progress,
                most_polls=self.flag_timeout_polls,
                sent=self.outputs.returned,
            )
            yield
            sums.move()
        combine(
            self.geometry,
            index,
            partials=work.partials,
            received=work.received,
            buffer=sums or returns or self.buffers.dispatch,
            returns=returns is not None,
            norm=following,
            hidden=work.hidden,
            normed=work.normed,
            owned=state.owned,
            progress=state.progress,
            most_polls=self.flag_timeout_polls,
        )

    def _advance(self) -> None:
        """Choose the next tokens of the owned rows, and record them."""
        state, scores_MV = self.state, self.logits
        if self.sampling.temperature > 0:  # greedy decoding needs no next positions
            scores_MV = scores_of(self.logits, self.sampling, state.number, state.position + 1, state.seed)
        score_M, best_M = scores_MV.max(dim=-1)
        advance(
            best=best_M,
            score=score_M,
            ends=self.tables.end_tokens,
            chosen=self.outputs.chosen,
            token=state.token,
            position=state.position,
            owned=state.owned,
            done=self.outputs.done,
            step=state.progress.step,
            launch=self.launch,
        )
