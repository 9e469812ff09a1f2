"""Reset a checkpoint on the disk into a new one, a few rows at a time.

    copy every shard ─▶ read rows of the copy ─ reset ─ write them at the same bytes ─▶ hash, describe, rename

Headers, index, dtypes and every tensor that is not reset stay as they are, to the byte.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fire_llm.architectures.matrices import ParameterSlice
from fire_llm.checkpoint.card import PROVENANCE, write_card, write_provenance
from fire_llm.checkpoint.drawn import draw_initial
from fire_llm.checkpoint.perplexities import Texts
from fire_llm.checkpoint.recast import SHORT, cast_bytes, cast_tensors, check_dtype, settle, torch_dtype, write_casts
from fire_llm.checkpoint.refusals import refuse_destination
from fire_llm.checkpoint.stored import Slices, Stored
from fire_llm.core.atomic import free_bytes, writing
from fire_llm.core.errors import UserError
from fire_llm.core.files import Reader, SourceFile
from fire_llm.core.progress import progress_bar
from fire_llm.core.staging import clear_leftovers, staged
from fire_llm.distributed import Block, active, gather_objects, is_first, together
from fire_llm.distributed.balance import BUCKET_BYTES, assign, buckets
from fire_llm.models import find_device
from fire_llm.resets import ResetReport, ResetsLike, ResetSpec, parse_resets
from fire_llm.resets.execute import ResetExecutor
from fire_llm.resets.plan import Plan, not_finite
from fire_llm.resets.spec import refuse_kinds

_CHUNK = 1 << 22  # in each of a few threads
_MOST_OPEN = 16  # shards open at once
_PATIENCE = 86400.0  # seconds that a rank waits for the others, while one of them copies, say


@torch.no_grad()
def reset_checkpoint(
    src: str | Path,
    dst: str | Path,
    method: ResetsLike = "fire",
    *,
    init: str | Path | None = None,
    seed: int | None = None,
    revision: str | None = None,
    native: bool = False,
    device: str = "cpu",
    progress: bool = False,
    dry_run: bool = False,
    measures: bool = True,
    dtype: str = "keep",
    measure_on: Sequence[str] = (),
    max_tokens: int | None = None,
    context: int | None = None,
    **options: Any,
) -> ResetReport:
    """Apply a reset to a checkpoint and write the result, tokenizer and all, as a new one.

    The model is never loaded: memory holds one block of rows (a matrix, or what is fused with it) and the work space
    of its reset. Under torch.distributed this is collective, and the ranks of one machine share the blocks.

    Args:
        src: A checkpoint folder or a Hub id; never written to.
        dst: The folder to make; must not exist. It appears whole or not at all.
        method: A reset's name or spec, or a list of specs.
        init: Checkpoint with the run's initial weights, for `full_reset`, `shrink_perturb` and `initial_norm`.
        seed: Draw the initial weights again from the config and this seed instead, a parameter at a time (a few
            architectures draw some weights from others: a whole model at once, in fp32).
        revision: Branch, tag or commit, where `src` is a Hub id.
        native: Take transformers' own class where a checkpoint brings code (auto_map); that code is never run.
        device: Where the resets are computed: `cpu`, `cuda`, `cuda:1`, or `auto`, as in `find_device`. The weights of
            two devices are equal to rounding.
        progress: Show progress bars.
        dry_run: Only report what would be done; no weight is read, nothing is written.
        measures: Measure every tensor before and after: SFE, DfI, norm, the largest and the smallest singular value.
        dtype: Of all floating-point weights that are written: `fp32`, `bf16`, `fp16`, or `keep` for each tensor's own.
            The reset itself is computed in fp32 or finer from the source's numbers, and rounded once.
        measure_on: Corpora or files on which the loss is measured, before the reset and of the result. The whole model
            is loaded for it, in fp32.
        max_tokens: Of each of these texts the first documents alone, that many tokens at most.
        context: Tokens that are read at once on them; the longest that the model reads by default.
        **options: Options of `method` where it is a name.

    Returns:
        What was touched, measured before and after, and what was left and why, unmeasured.

    Raises:
        UserError: For bad options, a checkpoint that is unreadable, quantised or unknown, a tensor that is not finite,
            an existing `dst` or one inside `src`, or no room.
        RuntimeError: Where a result is not finite.
    """
    specs = parse_resets(method, options)
    refuse_kinds(specs)
    _check_initial(specs, init, seed)
    dtype = SHORT.get(dtype, dtype)
    check_dtype(dtype)
    where = find_device(device)
    texts = Texts(measure_on, max_tokens, context, device)
    call = _Call(src, Path(dst), specs, init, seed, revision, native, where, progress, measures, dtype, texts)
    job = together(None, lambda: _Rewrite.prepare(call, dry_run), lambda job: job.plan.request(), _PATIENCE)
    return job.describe() if dry_run else job.run()


@dataclass(frozen=True)
class _Call:
    """The arguments of `reset_checkpoint`, each checked by itself."""

    src: str | Path
    dst: Path
    specs: list[ResetSpec]
    init: str | Path | None
    seed: int | None
    revision: str | None
    native: bool
    device: torch.device
    progress: bool
    measures: bool
    dtype: str
    texts: Texts


@dataclass
class _Rewrite:
    """What is to be done to a checkpoint, everything checked that can be without reading weights."""

    call: _Call
    stored: Stored
    plan: Plan
    copies: Mapping[str, Reader] = field(default_factory=dict)
    """The copied shards by name; the source is not read again once it is copied, and may change."""

    @classmethod
    def prepare(cls, call: _Call, dry_run: bool) -> _Rewrite:
        """Open the checkpoint and plan its reset; refuse what cannot be done."""
        for given in (call.src, call.init):
            if given is not None and os.path.isdir(given):
                refuse_destination(call.dst, Path(given), 0, 0)
        if not dry_run and is_first():
            clear_leftovers(call.dst)
        stored = Stored.open(call.src, call.revision, native=call.native)
        source = stored.source
        needed = source.n_bytes + (cast_bytes(source.tensors.values(), call.dtype) if call.dtype != "keep" else 0)
        refuse_destination(call.dst, source.folder, needed, free_bytes(call.dst.parent))
        if call.texts.names and stored.kind is not None:
            raise UserError(
                f"--measure-on measures the perplexity of causal language models, and '{call.src}' is a "
                f"{stored.kind.__name__}: leave it out, and evaluate the result as you evaluate the source"
            )
        call.texts.check(source.folder)
        start = _open_initial(call, stored)
        initial, drawn = (start.model if start is not None else None), None
        if call.seed is not None and dry_run:
            initial = stored.model  # the same names and shapes, and nothing is drawn
        elif call.seed is not None:
            initial, drawn = draw_initial(source.config, call.seed, call.progress, stored.kind)
        plan = Plan.of(stored.model, call.specs, initial)
        # transformers draws a buffer that is not stored: there is nothing to reset.
        plan.keep(lambda weight: not weight.buffer or weight.parameter in stored.places.of)
        if not plan.wanted:
            another = "--role conv" if plan.convolutions else "a role with --role"
            raise UserError(f"{plan.idle(str(call.src))} Add {another}, or take back an --exclude")
        for weight in plan.wanted:
            stored.check_readable(weight)
        if start is not None:
            for weight in plan.reading_initial:
                start.check_readable(plan.initial[weight.name])
            plan.initial = Slices(start.model, start.loaded)
        elif drawn is not None:
            plan.initial = drawn
        return cls(call, stored, plan)

    @property
    def decisive(self) -> dict[str, Any]:
        """Return the arguments that the bytes depend on, beside the resets, as `write_card` takes them."""
        call = self.call
        return {
            "src": str(call.src), "init": str(call.init) if call.init is not None else None, "seed": call.seed,
            "revision": self.stored.source.revision, "native": call.native, "device": call.device.type,
            "dtype": call.dtype,
        }  # fmt: skip

    def describe(self) -> ResetReport:
        """Return the report of what would be done: which slices are touched, which are not and why."""
        return self._report(ResetExecutor(self.plan, False), 0.0, 1)

    def run(self) -> ResetReport:
        """Copy, reset, hash and describe; rank 0 makes the folder, all share the resets."""
        texts, progress = self.call.texts, self.call.progress and is_first()
        source = self.stored.source.folder
        nll = texts.nll(source, progress, source)

        def on_first(work: Callable[[], Any], done: str) -> Any:
            """Do work on rank 0; every rank goes on once it is done, or raises what it raised."""
            return together(None, work if is_first() else lambda: None, done, _PATIENCE)

        with ExitStack() as stack, _Hasher() as hasher:
            folders = gather_objects(None, on_first(lambda: stack.enter_context(staged(self.call.dst)), "staged"))
            folder = Path(folders[0])
            began = time.perf_counter()
            hashes = on_first(lambda: self._copy(folder, hasher), "copied")
            copying = time.perf_counter() - began
            executor, seconds, shared = together(None, lambda: self._reset(folder), "reset", _PATIENCE)
            if shared > 1:
                executor.join(None)
            report = self._report(executor, seconds, shared)
            on_first(lambda: self._settle(folder), "settled")
            after = texts.nll(folder, progress, self.call.dst)
            report.nll = {text: [before, after[text]] for text, before in nll.items()}
            report.copying_seconds = copying
            on_first(lambda: self._finish(folder, report, hasher, hashes), "described")
            together(None, stack.close, "renamed", _PATIENCE)
        return report

    def _bar(self, what: str, total: int, unit: str = "B") -> Any:
        return progress_bar(what, total, unit, shown=self.call.progress and is_first())

    # ---- copying

    def _copy(self, folder: Path, hasher: _Hasher) -> dict[str, str]:
        """Copy the shards and the files beside them; return the shards' hashes."""
        source = self.stored.source
        with writing(folder), self._bar("copying", source.n_bytes) as bar:
            hashes = {}
            for name, file in source.copied.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                hashes[name] = hasher.begin(file, folder / name, bar.update)
            before = {name: hashes[name].result() for name in hashes}
            if self.call.dtype != "keep":
                write_casts(folder, source.shards, self.call.dtype)
            return before

    # ---- resetting

    def _reset(self, folder: Path) -> tuple[ResetExecutor, float, int]:
        """Reset this rank's blocks; return the work, its seconds and the number of ranks."""
        target, rounded_to, device = self.stored, None, self.call.device
        if self.call.dtype != "keep":
            rounded_to = torch_dtype(self.call.dtype)
            casts = cast_tensors(folder, self.stored.source.shards)
            target = replace(self.stored, places=self.stored.places.over(casts))
        executor = ResetExecutor(self.plan, "range", self.call.measures, rounded_to)
        blocks = self.plan.blocks
        ranks, rank = (dist.get_world_size(), dist.get_rank()) if active() else (1, 0)
        owners = assign([max(1, block.cost) for block in blocks], ranks)
        own = [block for block, owner in zip(blocks, owners, strict=True) if owner == rank]
        total = sum(len(block.members) for block in own)
        began = time.perf_counter()
        with _Copies(folder) as self.copies, self._bar("resetting", total, "tensor") as bar:
            # Worked on together: a bounded bucket; on a CPU a single block.
            limit = 0 if device.type == "cpu" else BUCKET_BYTES
            for jobs in buckets([block.n_bytes for block in own], [0] * len(own), 1, limit):
                batch = [own[job] for job in jobs]
                loaded = [(block, self._read(block)) for block in batch]
                executor.transform(loaded)
                if executor.error is not None:
                    raise executor.error
                if executor.failed:  # the report raises, for all ranks
                    break
                with writing(folder):
                    for block, rows in loaded:
                        target.write(self._any(block), rows.cpu(), self.copies)
                bar.update(sum(len(block.members) for block in batch))
        return executor, time.perf_counter() - began - executor.measuring, ranks

    def _read(self, block: Block) -> Tensor:
        """Read a block's rows and refuse them where a slice to be reset is not finite."""
        rows = self.stored.rows(self._any(block), self.copies).to(self.call.device)
        if self.call.dtype != "keep" and rows.is_floating_point():
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        for index in block.members:
            weight = self.plan.slices[index]
            if self.plan.actions[index] and not torch.isfinite(weight.within(rows).read()).all():
                raise UserError(not_finite(weight.name))
        return rows

    def _any(self, block: Block) -> ParameterSlice:
        """Return one of the slices of a block: all of them lie in the same rows."""
        return self.plan.slices[block.members[0]]

    # ---- describing

    def _report(self, executor: ResetExecutor, seconds: float, shared: int) -> ResetReport:
        report = executor.report(seconds, shared)
        report.kept_unread, report.not_copied = self.stored.places.ignored, self.stored.source.left_behind
        return report

    def _settle(self, folder: Path) -> None:
        """Put what was written in another dtype in its place."""
        if self.call.dtype != "keep":
            with writing(folder):
                settle(folder, self.stored.source.shards, self.stored.source.index, self.call.dtype)

    def _finish(self, folder: Path, report: ResetReport, hasher: _Hasher, before: Mapping[str, str]) -> None:
        """Hash the result and write down what was done."""
        source = self.stored.source
        began = time.perf_counter()
        with self._bar("hashing", source.shard_bytes) as bar:
            after = {name: hasher.begin(SourceFile.of(folder / name), None, bar.update) for name in source.shards}
            hashes = {name: {"source": before[name], "result": after[name].result()} for name in source.shards}
        report.copying_seconds = (report.copying_seconds or 0) + time.perf_counter() - began
        with writing(folder):
            write_provenance(folder / PROVENANCE, self.stored, report, hashes, self.decisive)
            write_card(folder / "README.md", self.stored, report, self.decisive)


class _Hasher:
    """Take files' SHA-256, and copy them meanwhile, in threads; what is not done when it is left is dropped."""

    def __enter__(self) -> _Hasher:
        self._pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1))
        self._stop = False
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        self._pool.shutdown(wait=True, cancel_futures=True)

    def begin(self, file: SourceFile, copy: Path | None, advance: Callable[[int], object]) -> Future[str]:
        """Begin with a file, and return what will be its hash."""
        return self._pool.submit(self._hash, file, copy, advance)

    def _hash(self, file: SourceFile, copy: Path | None, advance: Callable[[int], object]) -> str:
        digest = hashlib.sha256()
        with file.opened() as reader, copy.open("xb") if copy is not None else nullcontext() as out:
            while not self._stop and (chunk := reader.read(_CHUNK)):
                digest.update(chunk)
                if out is not None:
                    out.write(chunk)
                advance(len(chunk))
        return digest.hexdigest()


class _Copies(dict[str, Reader]):
    """Files of a folder by name, open for reading and writing once they are asked for; a few of them at a time."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __missing__(self, name: str) -> Reader:
        if len(self) >= _MOST_OPEN:
            os.close(self.pop(next(iter(self))).descriptor)
        self[name] = Reader(self._folder / name, os.open(self._folder / name, os.O_RDWR))
        return self[name]

    def __enter__(self) -> _Copies:
        return self

    def __exit__(self, *_: object) -> None:
        while self:
            os.close(self.popitem()[1].descriptor)


def _open_initial(call: _Call, stored: Stored) -> Stored | None:
    """Open the checkpoint with the initial weights; None where none is given."""
    if call.init is None:
        return None
    start = Stored.open(call.init, native=call.native)
    if start.source.folder.samefile(stored.source.folder):
        raise UserError(
            f"--init: '{call.init}' is the checkpoint that is reset, and no initial weights of it: give one from "
            "before training, or --seed N"
        )
    return start


def _check_initial(specs: Sequence[ResetSpec], init: str | Path | None, seed: int | None) -> None:
    """Refuse initial weights that are missing, given twice, or not wanted by any reset."""
    wanting = [s.method for s in specs if s.needs_initial]
    if wanting and (init is None) == (seed is None):
        raise UserError(f"'{wanting[0]}' needs initial weights: give one of --init CHECKPOINT and --seed N")
    if not wanting and not (init is None and seed is None):
        given = "--init" if init is not None else "--seed"
        raise UserError(f"{given}: '{specs[0].method if specs else 'none'}' uses no initial weights: leave it out")
    if seed is not None and not 0 <= seed < 2**63:
        raise UserError(f"--seed {seed}: a whole number from 0 to 2**63 - 1 is needed")
