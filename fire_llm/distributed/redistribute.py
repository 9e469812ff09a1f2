"""Send the blocks of one placement to their owners, a bounded bucket at a time, and the results back.

    shards ─ all_to_all ─▶ owner ─ compute ─▶ owner ─ all_to_all ─▶ shards ─ all_gather ─▶ replicas

Shapes: everything travels as bytes, each segment on a boundary of 16, so that dtypes mix and no bit changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fire_llm.distributed.agree import wire_device
from fire_llm.distributed.balance import BUCKET_BYTES, assign, buckets
from fire_llm.distributed.placement import Block, Placement, local_part

_ALIGN = 16
_Segment = tuple[Block, range, int]
"""Rows of a parameter that lie in a block, or columns of a block, and the axis: 0 or 1."""
# torch 2.13 renamed it; the old name warns there.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass
class _Transfer:
    """A collective under way, and where its segments go when it has arrived."""

    work: Any
    buffer: Tensor
    sent: Tensor
    segments: list[_Segment]


class Redistribution:
    """Buckets to iterate over: each is [(block, tensor)] of the blocks that this rank owns in it, to be written into.

    A tensor has the block's shape and dtype. Where this rank holds the whole parameter it is the parameter's own
    memory, else a copy. What stands in it when the next bucket is asked for goes back to every rank that holds it.
    While a bucket is computed, the next is fetched and the one before returned. Every rank of the placement must
    iterate to the end.

    Args:
        placement: Where the blocks live.
        blocks: The same on every rank, in the same order.
        limit: Bytes that an owner takes on in a bucket.
    """

    def __init__(self, placement: Placement, blocks: Sequence[Block], limit: int = BUCKET_BYTES) -> None:
        self.placement, self.blocks = placement, blocks
        ranks = placement.n_replicas * placement.n_shards
        # The costliest first, so that the buckets of all owners weigh alike.
        order = sorted(range(len(blocks)), key=lambda i: (-blocks[i].cost, -blocks[i].n_bytes, i))
        owners = assign([blocks[i].cost or blocks[i].n_bytes for i in order], ranks)
        parted = buckets([blocks[i].n_bytes for i in order], owners, ranks, limit)
        self.buckets = [[(blocks[order[job]], owners[job]) for job in jobs] for jobs in parted]
        self.replica, self.shard = placement.replica, placement.shard

    @property
    def mine(self) -> list[Block]:
        """Return every block that this rank owns."""
        return [block for this in self.buckets for block in self._owned(this, self.replica, self.shard)]

    def __iter__(self) -> Iterator[list[tuple[Block, Tensor]]]:
        arriving = self._fetch(self.buckets[0]) if self.buckets else None
        leaving: Callable[[], None] | None = None
        for number, this in enumerate(self.buckets):
            ahead = self._fetch(self.buckets[number + 1]) if number + 1 < len(self.buckets) else None
            mine = self._assemble(this, arriving)
            yield mine
            if leaving is not None:
                leaving()
            leaving = self._give_back(this, mine)
            arriving = ahead
        if leaving is not None:
            leaving()

    # ---- which segments go where

    def _owned(self, this: list[tuple[Block, int]], replica: int, shard: int) -> list[Block]:
        return [block for block, owner in this if owner == replica * self.placement.n_shards + shard]

    def _held(self, block: Block, shard: int) -> _Segment:
        """Return the part of a block that a shard holds."""
        axis = self.placement.axis
        held = self.placement.held(shard, block.tensor.shape[axis] if block.tensor.ndim else 1)
        if axis:
            return block, held, axis
        first = max(held.start, block.rows.start)
        return block, range(first, max(first, min(held.stop, block.rows.stop))), axis

    def _outward(self, this: list[tuple[Block, int]]) -> list[list[_Segment]]:
        """Return what this rank holds of each owner's blocks."""
        return [
            [self._held(block, self.shard) for block in self._owned(this, self.replica, owner)]
            for owner in range(self.placement.n_shards)
        ]

    def _inward(self, this: list[tuple[Block, int]]) -> list[list[_Segment]]:
        """Return what each shard holds of this rank's blocks."""
        mine = self._owned(this, self.replica, self.shard)
        return [[self._held(block, shard) for block in mine] for shard in range(self.placement.n_shards)]

    def _slab(self, segment: _Segment) -> Tensor:
        """Return a segment in this rank's own memory."""
        block, span, axis = segment
        tensor = block.tensor.detach()
        local = local_part(tensor)
        if not local.ndim:
            return local
        first = self.placement.held(self.shard, tensor.shape[axis]).start
        rows = local[block.rows.start : block.rows.stop] if axis else local
        return _cut(rows, axis, span.start - first, len(span))

    # ---- shards to owners and back

    def _fetch(self, this: list[tuple[Block, int]]) -> _Transfer | None:
        if self.placement.shards is None:
            return None
        send, receive = self._outward(this), self._inward(this)
        return self._all_to_all(send, receive, self._slab)

    def _assemble(self, this: list[tuple[Block, int]], arriving: _Transfer | None) -> list[tuple[Block, Tensor]]:
        mine = self._owned(this, self.replica, self.shard)
        if arriving is None:
            return [(block, self._slab((block, block.rows, 0))) for block in mine]
        whole = {id(b): torch.empty(b.shape, dtype=b.tensor.dtype, device=b.tensor.device) for b in mine}
        arriving.work.wait()
        _unpack(arriving.segments, arriving.buffer, lambda segment: _part(whole[id(segment[0])], segment))
        return [(block, whole[id(block)]) for block in mine]

    def _give_back(self, this: list[tuple[Block, int]], mine: list[tuple[Block, Tensor]]) -> Callable[[], None]:
        """Send results on their way; the returned function waits for them and puts them in place."""
        if self.placement.shards is None:
            gathering = self._gather(this)
            return lambda: self._spread(gathering)
        whole = {id(block): tensor for block, tensor in mine}
        back = self._all_to_all(
            self._inward(this), self._outward(this), lambda segment: _part(whole[id(segment[0])], segment)
        )

        def finish() -> None:
            back.work.wait()
            _unpack(back.segments, back.buffer, self._slab)
            self._spread(self._gather(this))

        return finish

    def _all_to_all(
        self, send: list[list[_Segment]], receive: list[list[_Segment]], source: Callable[[_Segment], Tensor]
    ) -> _Transfer:
        device = wire_device(self.placement.shards, _device([*send, *receive], self.blocks))
        segments = [s for shard in receive for s in shard]
        sent = _pack([s for shard in send for s in shard], source, device)
        buffer = torch.empty(sum(map(_size, receive)), dtype=torch.uint8, device=device)
        work = dist.all_to_all_single(
            buffer, sent, [*map(_size, receive)], [*map(_size, send)], group=self.placement.shards, async_op=True
        )
        return _Transfer(work, buffer, sent, segments)

    # ---- replicas

    def _gather(self, this: list[tuple[Block, int]]) -> tuple[_Transfer, list[list[_Segment]]] | None:
        """Start giving every replica what the others computed, each replica's part padded to the largest."""
        if self.placement.replicas is None:
            return None
        parts = [
            [
                self._held(block, self.shard)
                for shard in range(self.placement.n_shards)
                for block in self._owned(this, replica, shard)
            ]
            for replica in range(self.placement.n_replicas)
        ]
        largest = max(map(_size, parts))
        device = wire_device(self.placement.replicas, _device(parts, self.blocks))
        sent = _pack(parts[self.replica], self._slab, device, largest)
        buffer = torch.empty(largest * self.placement.n_replicas, dtype=torch.uint8, device=device)
        work = _all_gather(buffer, sent, group=self.placement.replicas, async_op=True)
        return _Transfer(work, buffer, sent, []), parts

    def _spread(self, gathering: tuple[_Transfer, list[list[_Segment]]] | None) -> None:
        if gathering is None:
            return
        transfer, parts = gathering
        transfer.work.wait()
        for replica, (segments, part) in enumerate(zip(parts, transfer.buffer.chunk(len(parts)), strict=True)):
            if replica != self.replica:
                _unpack(segments, part, self._slab)


def _device(parts: list[list[_Segment]], blocks: Sequence[Block]) -> torch.device:
    """Return the device of what is sent, of any block where nothing is."""
    return next((block.tensor.device for part in parts for block, *_ in part), blocks[0].tensor.device)


def _room(segment: _Segment) -> int:
    block, span, axis = segment
    across = block.shape[axis] if block.shape else 1
    return -(-len(span) * (block.n_bytes // max(1, across)) // _ALIGN) * _ALIGN


def _size(segments: list[_Segment]) -> int:
    return sum(map(_room, segments))


def _part(whole: Tensor, segment: _Segment) -> Tensor:
    block, span, axis = segment
    return _cut(whole, axis, span.start - (0 if axis else block.rows.start), len(span)) if whole.ndim else whole


def _cut(tensor: Tensor, axis: int, start: int, length: int) -> Tensor:
    return tensor.narrow(axis, start if length else 0, length)  # what a rank holds nothing of begins anywhere


def _spot(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    """Return the place of a segment in a buffer of bytes, as a tensor like it."""
    return buffer[start : start + like.numel() * like.element_size()].view(like.dtype).view(like.shape)


def _pack(
    segments: list[_Segment], source: Callable[[_Segment], Tensor], device: torch.device, size: int = 0
) -> Tensor:
    buffer = torch.zeros(max(size, _size(segments)), dtype=torch.uint8, device=device)
    at = 0
    for segment in segments:
        tensor = source(segment)
        _spot(buffer, at, tensor).copy_(tensor)
        at += _room(segment)
    return buffer


def _unpack(segments: list[_Segment], buffer: Tensor, target: Callable[[_Segment], Tensor]) -> None:
    at = 0
    for segment in segments:
        tensor = target(segment)
        tensor.copy_(_spot(buffer, at, tensor))
        at += _room(segment)
