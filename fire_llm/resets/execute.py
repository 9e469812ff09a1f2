"""What a reset does to each slice of a model, done placement by placement."""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fire_llm.architectures.matrices import ParameterSlice
from fire_llm.core.compat import installed
from fire_llm.core.errors import UserError
from fire_llm.core.progress import progress_bar
from fire_llm.distributed import Block, Placement, Redistribution, gather_objects, placement_of, worthwhile
from fire_llm.linalg.measures import squared_error
from fire_llm.resets.methods import RESETS
from fire_llm.resets.plan import Plan, all_finite
from fire_llm.resets.report import Measures, ResetReport, Spectra, TensorReport, describe, on_host
from fire_llm.resets.rowwise import by_rows, reset_by_rows


@dataclass
class ResetExecutor:
    """Do what a plan says, placement by placement, and keep the report of every slice that this rank worked on."""

    plan: Plan
    spectra: Spectra
    measured: bool = True
    """Whether slices are measured before and after."""
    rounded_to: torch.dtype | None = None
    """What results are rounded to before they are measured and written; None for the dtype of the tensor."""
    reports: dict[int, TensorReport] = field(default_factory=dict)
    failed: set[str] = field(default_factory=set)
    """Names of slices whose result is not finite."""
    error: Exception | None = None
    """What stopped this rank; it takes part in the redistribution to the end, because the others wait for it."""
    measuring: float = 0.0
    """Seconds spent on measures rather than on the reset."""
    gathered_whole: int = 0
    """Parameters whose placement has no plan of its own."""
    bar: Any = None

    def run(self, process_group: Any, progress: bool) -> int:
        """Reset everything; return among how many ranks the work was shared at most."""
        plan, blocks = self.plan, self.plan.blocks
        by_placement: dict[Placement | None, list[Block]] = defaultdict(list)
        for block in blocks:
            by_placement[placement_of(block.tensor, process_group)].append(block)
        unplanned = by_placement.pop(None, [])
        total_cost = sum(block.cost for block in blocks)
        redistributions: list[Redistribution] = []
        row_wise: list[tuple[int, Placement]] = []
        for placement, placed in by_placement.items():
            assert placement is not None
            moved = []
            for block in placed:
                index = block.members[0]
                if by_rows(block, plan.slices[index], plan.actions[index], placement, total_cost):
                    row_wise.append((index, placement))
                else:
                    moved.append(block)
            redistributions.append(Redistribution(_worth_it(placement, placed), moved))
        if progress:
            own_blocks = [*unplanned, *(block for redistribution in redistributions for block in redistribution.mine)]
            total = sum(len(block.members) for block in own_blocks) + len(row_wise)
            self.bar = progress_bar("reset", total, "tensor", delay=0)
        self._gather_whole(unplanned)  # first, as torch may refuse it
        for redistribution in redistributions:
            for own in redistribution:
                self.transform(own)
        for index, placement in row_wise:
            report = reset_by_rows(plan.slices[index], plan.actions[index][0], placement, self.spectra)
            if report is None:
                self.failed.add(plan.slices[index].name)
            self._done(index, report or TensorReport.of(plan.slices[index]))
        if self.bar is not None:
            self.bar.close()
        return max((r.placement.n_replicas * r.placement.n_shards for r in redistributions), default=1)

    def join(self, process_group: Any) -> None:
        """Collect the reports and errors of all ranks, so that each has every one."""
        error = (isinstance(self.error, UserError), str(self.error)) if self.error else None
        gathered = gather_objects(process_group, (self.reports, self.failed, error))
        for rank, (reports, failed, error) in enumerate(gathered):
            self.reports = {**reports, **self.reports}
            self.failed |= failed
            if error and self.error is None:
                is_users, message = error
                self.error = (UserError if is_users else RuntimeError)(f"on rank {rank} of the reset: {message}")

    def report(self, seconds: float, shared: int) -> ResetReport:
        """Report on every slice, once the work is done and joined.

        Raises:
            UserError: What stopped a rank was the user's to mend.
            RuntimeError: A result is not finite, or a reset failed.
        """
        if self.error is not None:
            raise self.error
        if self.failed:
            raise RuntimeError(
                f"the reset of {', '.join(sorted(self.failed))} came out NaN or infinite and was not written; "
                "try compute_dtype float32"
            )
        plan = self.plan
        measures = Measures()
        rows = [self.reports.get(i) or plan.untouched(i, self.spectra, measures) for i in range(len(plan.slices))]
        measures.fetch()
        touched, untouched = [r for r in rows if r.reason is None], [r for r in rows if r.reason is not None]
        return ResetReport(
            plan.specs,
            touched,
            untouched,
            seconds,
            self.measuring,
            shared_by=shared,
            gathered_whole=self.gathered_whole,
        )

    def _gather_whole(self, blocks: list[Block]) -> None:
        """Reset parameters of placements without a plan of their own, each whole on every rank, one at a time."""
        by_parameter: dict[int, list[Block]] = defaultdict(list)
        for block in blocks:
            by_parameter[id(block.tensor)].append(block)
        for own in by_parameter.values():
            tensor: Any = own[0].tensor.detach()
            try:
                whole = tensor.full_tensor()
            except ValueError as error:  # torch 2.11, of strided shards
                name = self.plan.slices[own[0].members[0]].name
                raise UserError(
                    f"'{name}' lies in parts {tensor.placements} that torch {installed('torch')} cannot put together: "
                    "update torch, or reset the checkpoint on the disk (fire-llm apply)"
                ) from error
            self.transform([(block, whole[block.rows.start : block.rows.stop]) for block in own])
            _put_back(tensor, whole)
        self.gathered_whole = len(by_parameter)
        if by_parameter:
            warnings.warn(
                f"{len(by_parameter)} parameters are placed neither whole nor in shards along one axis: "
                "each was gathered whole on every rank, one at a time. FSDP2 or replicas share the work",
                stacklevel=4,
            )

    def transform(self, own: Sequence[tuple[Block, Tensor]]) -> None:
        """Reset the slices of some blocks, each block in the tensor that stands for it; after an error, none."""
        if self.error is None:
            try:
                for group in self._groups(own):
                    self._reset(group)
            except Exception as error:
                self.error = error

    def _groups(self, own: Sequence[tuple[Block, Tensor]]) -> Iterable[list[tuple[int, ParameterSlice]]]:
        """Return the slices to reset, grouped where that is faster; report on what is only fused with them."""
        groups: dict[Any, list[tuple[int, ParameterSlice]]] = defaultdict(list)
        for block, tensor in own:
            for index in block.members:
                weight, actions = self.plan.slices[index].within(tensor), self.plan.actions[index]
                if not actions:
                    self._report_fused(index, weight)
                    continue
                batched = together(tensor) and all(RESETS[spec.method].batched for spec in actions)
                key = (weight.shape, weight.kernel, tensor.dtype, *map(id, actions)) if batched else index
                groups[key].append((index, weight))
        return groups.values()

    def _report_fused(self, index: int, weight: ParameterSlice) -> None:
        """Report on a slice that is left alone, and lies in the same block as one that is reset."""
        own = self.plan.slices[index]
        with self._measuring():
            report = describe(own, weight.read(), self.spectra) if self.measured else TensorReport.of(own)
        report.reason = self.plan.reason(index)
        self.reports[index] = report

    def _reset(self, group: list[tuple[int, ParameterSlice]]) -> None:
        """Reset slices of one shape, dtype and list of resets together."""
        indices, weights = [index for index, _ in group], [weight for _, weight in group]
        before = _stack([weight.read() for weight in weights])
        wide = torch.promote_types(before.dtype, torch.float32) if before.is_floating_point() else before.dtype
        x, grams = self._act(before.to(wide), indices, weights[0].kernel)  # rounded once, when it is written
        rounded_to = self.rounded_to if before.is_floating_point() else None
        x = x.to(rounded_to or before.dtype).to(before.dtype)
        stacked = len(group) > 1
        done = [*zip(indices, before if stacked else (before,), x if stacked else (x,), strict=True)]
        finite = all_finite(new for *_, new in done)
        self.failed |= {self.plan.slices[i].name for i, good in zip(indices, finite, strict=True) if not good}
        with self._measuring():  # before anything is written, because `old` may be a view of what is written to
            self._report([row for row, good in zip(done, finite, strict=True) if good], grams[0][0] if grams else None)
        for weight, (*_, new), good in zip(weights, done, finite, strict=True):
            if good:
                weight.write_(new)

    def _act(self, x: Tensor, indices: list[int], kernel: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
        """Return what the resets of a group make of it, and the Gram matrix of a single matrix where one is formed."""
        grams: list[Tensor] = []
        for number, spec in enumerate(self.plan.actions[indices[0]]):
            method = RESETS[spec.method]
            inputs = [_stack([read(index).to(x) for index in indices]) for read in self.plan.inputs(spec)]
            measurable = method.gives_grams and number == 0 and self.measured and len(indices) == 1 and not kernel
            more = {"grams": grams} if measurable else {}
            x = method.act(x, *inputs, options=spec.options, kernel=kernel, **more)
        return x, grams

    def _report(self, done: list[tuple[int, Tensor, Tensor]], known: Tensor | None = None) -> None:
        """Report on slices before and after, and wait once for all that is measured but spectra.

        Args:
            done: Index, before and after of each.
            known: The Gram matrix from before, of a single one, where the reset has formed it.
        """
        if not self.measured:
            for index, *_ in done:
                self._done(index, replace(TensorReport.of(self.plan.slices[index]), sfe=None))
            return
        measures = Measures()
        reports = []
        for index, before, after in done:
            own = self.plan.slices[index]
            report = describe(own, before, self.spectra, measures, known)
            later = describe(own, after, self.spectra, measures)
            measures.add(partial(setattr, report, "sfe"), squared_error(before, after))
            reports.append((index, report, later))
        measures.fetch()
        for index, report, later in reports:
            report.dfi_after, report.norm_after = later.dfi_after, later.norm_after
            report.sigma_after = later.sigma_after
            self._done(index, report)

    def _done(self, index: int, report: TensorReport) -> None:
        self.reports[index] = report
        if self.bar is not None:
            self.bar.update()

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        """Count the time of what is inside as measuring."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        began = time.perf_counter()
        yield
        self.measuring += time.perf_counter() - began


def _stack(tensors: list[Tensor]) -> Tensor:
    """Return tensors of one shape as a stack, a single one as it is."""
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0]


def together(tensor: Tensor) -> bool:
    """Return whether matrices of one shape are best taken together: a loop is faster on a CPU."""
    return not on_host(tensor)


def _worth_it(placement: Placement, blocks: list[Block]) -> Placement:
    """Return the placement that shares the work: replicas do it each for itself where that takes less time."""
    costs, n_bytes = sum(b.cost for b in blocks), sum(b.n_bytes for b in blocks)
    device = blocks[0].tensor.device.type
    if placement.shards is None and not worthwhile(costs, n_bytes, placement.n_replicas, device):
        return Placement()
    return placement


def _put_back(tensor: Any, values: Tensor) -> None:
    """Write a whole parameter into the local part of a DTensor, without asking the other ranks."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = tensor.device_mesh
    replicated = DTensor.from_local(values, mesh, [Replicate()] * mesh.ndim, run_check=False)
    tensor.to_local().copy_(replicated.redistribute(mesh, tensor.placements).to_local())
