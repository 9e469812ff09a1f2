"""Send the blocks of one placement to their owners, a bounded bucket at a time, and the results back.

    shards ─ all_to_all ─▶ owner ─ compute ─▶ owner ─ all_to_all ─▶ shards ─ all_gather ─▶ replicas

Everything is sent as bytes, each segment aligned to 16, so that dtypes mix and no bit changes.
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
"""A block, its parameter's rows or the block's columns that one rank holds, and the axis: 0 or 1."""
# torch 2.13 renamed it, and warns of the old name.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass
class _Transfer:
    """A collective that is under way, and the segments that it brings."""

    work: Any
    buffer: Tensor
    sent: Tensor
    segments: list[_Segment]


class Redistribution:
    """Iterate over buckets: lists of (block, tensor) for this rank's own blocks, whose tensors are to be overwritten.

    A tensor has the block's shape and dtype. It is the parameter's own memory where this rank holds the whole
    parameter, else a copy. When the next bucket is asked for, its content is sent to every rank that holds the block.
    While a bucket is computed, the next one is fetched and the one before is sent back. Every rank of the placement
    must iterate to the end.

    Args:
        placement: Where the blocks live.
        blocks: The same on every rank, in the same order.
        limit: Bytes of an owner's blocks in a bucket.
    """

    def __init__(self, placement: Placement, blocks: Sequence[Block], limit: int = BUCKET_BYTES) -> None:
        self.placement, self.blocks = placement, blocks
        ranks = placement.n_replicas * placement.n_shards
        # The costliest first, so that all owners have about the same work in a bucket.
        order = sorted(range(len(blocks)), key=lambda i: (-blocks[i].cost, -blocks[i].n_bytes, i))
        owners = assign([blocks[i].cost or blocks[i].n_bytes for i in order], ranks)
        divided = buckets([blocks[i].n_bytes for i in order], owners, ranks, limit)
        self.buckets = [[(blocks[order[job]], owners[job]) for job in jobs] for jobs in divided]
        self.replica, self.shard = placement.replica, placement.shard

    @property
    def mine(self) -> list[Block]:
        """Return every block that this rank owns."""
        return [block for bucket in self.buckets for block in self._owned(bucket, self.replica, self.shard)]

    def __iter__(self) -> Iterator[list[tuple[Block, Tensor]]]:
        arriving = self._fetch(self.buckets[0]) if self.buckets else None
        finish: Callable[[], None] | None = None
        for number, bucket in enumerate(self.buckets):
            ahead = self._fetch(self.buckets[number + 1]) if number + 1 < len(self.buckets) else None
            mine = self._assemble(bucket, arriving)
            yield mine
            if finish is not None:
                finish()
            finish = self._give_back(bucket, mine)
            arriving = ahead
        if finish is not None:
            finish()

    # ---- which segments go where

    def _owned(self, bucket: list[tuple[Block, int]], replica: int, shard: int) -> list[Block]:
        """Return the blocks of one rank in a bucket."""
        return [block for block, owner in bucket if owner == replica * self.placement.n_shards + shard]

    def _held(self, block: Block, shard: int) -> _Segment:
        """Return the part of a block that a shard holds."""
        axis = self.placement.axis
        held = self.placement.held(shard, block.tensor.shape[axis] if block.tensor.ndim else 1)
        if axis:
            return block, held, axis
        first = max(held.start, block.rows.start)
        return block, range(first, max(first, min(held.stop, block.rows.stop))), axis

    def _outward(self, bucket: list[tuple[Block, int]]) -> list[list[_Segment]]:
        """Return what this rank holds of each owner's blocks."""
        return [
            [self._held(block, self.shard) for block in self._owned(bucket, self.replica, owner)]
            for owner in range(self.placement.n_shards)
        ]

    def _inward(self, bucket: list[tuple[Block, int]]) -> list[list[_Segment]]:
        """Return what each shard holds of this rank's blocks."""
        mine = self._owned(bucket, self.replica, self.shard)
        return [[self._held(block, shard) for block in mine] for shard in range(self.placement.n_shards)]

    def _own_part(self, segment: _Segment) -> Tensor:
        """Return a segment in the memory of this rank's parameter."""
        block, span, axis = segment
        tensor = block.tensor.detach()
        local = local_part(tensor)
        if not local.ndim:
            return local
        first = self.placement.held(self.shard, tensor.shape[axis]).start
        rows = local[block.rows.start : block.rows.stop] if axis else local
        return _cut(rows, axis, span.start - first, len(span))

    # ---- shards to owners and back

    def _fetch(self, bucket: list[tuple[Block, int]]) -> _Transfer | None:
        """Start sending shards to the owners of a bucket's blocks; None where there are no shards."""
        if self.placement.shards is None:
            return None
        return self._all_to_all(self._outward(bucket), self._inward(bucket), self._own_part)

    def _assemble(self, bucket: list[tuple[Block, int]], arriving: _Transfer | None) -> list[tuple[Block, Tensor]]:
        """Return this rank's blocks of a bucket, whole."""
        mine = self._owned(bucket, self.replica, self.shard)
        if arriving is None:
            return [(block, self._own_part((block, block.rows, 0))) for block in mine]
        whole = {id(b): torch.empty(b.shape, dtype=b.tensor.dtype, device=b.tensor.device) for b in mine}
        arriving.work.wait()
        _unpack(arriving.segments, arriving.buffer, lambda segment: _part(whole[id(segment[0])], segment))
        return [(block, whole[id(block)]) for block in mine]

    def _give_back(self, bucket: list[tuple[Block, int]], mine: list[tuple[Block, Tensor]]) -> Callable[[], None]:
        """Start sending results back; the returned function waits for them and writes them to the parameters."""
        if self.placement.shards is None:
            gathering = self._gather(bucket)
            return lambda: self._spread(gathering)
        whole = {id(block): tensor for block, tensor in mine}
        back = self._all_to_all(
            self._inward(bucket), self._outward(bucket), lambda segment: _part(whole[id(segment[0])], segment)
        )

        def finish() -> None:
            back.work.wait()
            _unpack(back.segments, back.buffer, self._own_part)
            self._spread(self._gather(bucket))

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

    def _gather(self, bucket: list[tuple[Block, int]]) -> tuple[_Transfer, list[list[_Segment]]] | None:
        """Start sending every replica the results of the others, each part padded to the largest."""
        if self.placement.replicas is None:
            return None
        parts = [
            [
                self._held(block, self.shard)
                for shard in range(self.placement.n_shards)
                for block in self._owned(bucket, replica, shard)
            ]
            for replica in range(self.placement.n_replicas)
        ]
        largest = max(map(_size, parts))
        device = wire_device(self.placement.replicas, _device(parts, self.blocks))
        sent = _pack(parts[self.replica], self._own_part, device, largest)
        buffer = torch.empty(largest * self.placement.n_replicas, dtype=torch.uint8, device=device)
        work = _all_gather(buffer, sent, group=self.placement.replicas, async_op=True)
        return _Transfer(work, buffer, sent, []), parts

    def _spread(self, gathering: tuple[_Transfer, list[list[_Segment]]] | None) -> None:
        """Wait for the results of the other replicas, and write them to the parameters."""
        if gathering is None:
            return
        transfer, parts = gathering
        transfer.work.wait()
        for replica, (segments, part) in enumerate(zip(parts, transfer.buffer.chunk(len(parts)), strict=True)):
            if replica != self.replica:
                _unpack(segments, part, self._own_part)


def _device(parts: list[list[_Segment]], blocks: Sequence[Block]) -> torch.device:
    """Return the device of the segments, or of any block where there are none."""
    return next((block.tensor.device for part in parts for block, *_ in part), blocks[0].tensor.device)


def _aligned_size(segment: _Segment) -> int:
    """Return the bytes that a segment takes in a buffer."""
    block, span, axis = segment
    across = block.shape[axis] if block.shape else 1
    return -(-len(span) * (block.n_bytes // max(1, across)) // _ALIGN) * _ALIGN


def _size(segments: list[_Segment]) -> int:
    return sum(map(_aligned_size, segments))


def _part(whole: Tensor, segment: _Segment) -> Tensor:
    """Return a segment in the memory of its whole block."""
    block, span, axis = segment
    return _cut(whole, axis, span.start - (0 if axis else block.rows.start), len(span)) if whole.ndim else whole


def _cut(tensor: Tensor, axis: int, start: int, length: int) -> Tensor:
    return tensor.narrow(axis, start if length else 0, length)  # the start of an empty segment may lie outside


def _view(buffer: Tensor, start: int, like: Tensor) -> Tensor:
    """Return a view of a buffer of bytes, from `start` on, with the dtype and shape of another tensor."""
    return buffer[start : start + like.numel() * like.element_size()].view(like.dtype).view(like.shape)


def _pack(
    segments: list[_Segment], source: Callable[[_Segment], Tensor], device: torch.device, size: int = 0
) -> Tensor:
    buffer = torch.zeros(max(size, _size(segments)), dtype=torch.uint8, device=device)
    start = 0
    for segment in segments:
        tensor = source(segment)
        _view(buffer, start, tensor).copy_(tensor)
        start += _aligned_size(segment)
    return buffer


def _unpack(segments: list[_Segment], buffer: Tensor, target: Callable[[_Segment], Tensor]) -> None:
    start = 0
    for segment in segments:
        tensor = target(segment)
        tensor.copy_(_view(buffer, start, tensor))
        start += _aligned_size(segment)
