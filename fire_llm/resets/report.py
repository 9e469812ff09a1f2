"""What became of every tensor: the measures before and after a reset."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

from fire_llm.architectures.matrices import ParameterSlice
from fire_llm.linalg.measures import dfi_of_gram, gram
from fire_llm.linalg.singular_values import extent, norm_and_dfi, singular_values
from fire_llm.resets.spec import ResetSpec

SIGMA_QUANTILES = 64
"""Number of singular values kept of each matrix's spectrum in a report, evenly spread over the ranks."""


@dataclass
class TensorReport:
    """What became of one logical matrix or parameter."""

    name: str
    parameter: str
    part: str
    role: str
    shape: list[int]
    """(out, in), of a convolution's kernel (out, in, k, …), or the stored shape of what is kept whole."""
    reason: str | None = None
    """Why it was left alone; None where it was touched."""
    sfe: float | None = 0.0
    """Squared Frobenius distance between before and after; None where it was not measured."""
    dfi_before: float | None = None
    dfi_after: float | None = None
    norm_before: float | None = None
    norm_after: float | None = None
    sigma_before: list[float | None] | None = None
    """Singular values, descending: `SIGMA_QUANTILES` of them, or the largest and the smallest alone.

    The smallest of a matrix in shards is None where it is lost in the rounding of its Gram matrix.
    """
    sigma_after: list[float | None] | None = None

    @classmethod
    def of(cls, weight: ParameterSlice) -> TensorReport:
        """Return a report that names a slice, and holds no measure yet."""
        shape = [*weight.shape[1:], *weight.kernel] if weight.kernel else list(weight.shape)
        return cls(weight.name, weight.parameter, weight.part, weight.role, shape)

    def set_norm(self, norm: float) -> None:
        """Note a norm, before and after alike."""
        self.norm_before = self.norm_after = norm

    def set_measures(self, norm: float, dfi: float) -> None:
        """Note a norm and a DfI, before and after alike."""
        self.set_norm(norm)
        self.dfi_before = self.dfi_after = dfi

    @property
    def residual(self) -> float | None:
        """Return ‖X Xᵀ − I‖_F / √n of the result scaled to ‖X‖_F = √n: 0 for a multiple of an orthogonal matrix.

        Of the n squared singular values it is the standard deviation over the mean, so no scale enters. Those of a
        kernel are the ones at all of its positions.
        """
        if self.dfi_after is None or not self.norm_after:
            return None
        n, squared = min(self.shape[:2]) * math.prod(self.shape[2:]), self.norm_after**2
        gram = self.dfi_after + 2 * squared - n  # ‖X Xᵀ‖²_F
        return math.sqrt(max(0.0, n * gram / squared**2 - 1))


@dataclass
class ResetReport:
    """What a reset touched, what it left and why."""

    resets: list[ResetSpec]
    touched: list[TensorReport]
    untouched: list[TensorReport]
    seconds: float
    """Time of the reset itself, without the measuring before and after."""
    measuring_seconds: float = 0.0
    """Time of measuring before and after."""
    copying_seconds: float | None = None
    """Of a checkpoint on disk: time of copying its files, and of hashing them before and after."""
    optimizer_states_cleared: int = 0
    shared_by: int = 1
    """Ranks among which the work was shared."""
    gathered_whole: int = 0
    """Parameters that were gathered whole on every rank: placed neither whole nor in shards along one axis."""
    kept_unread: list[str] = field(default_factory=list)
    """Of a checkpoint on disk: stored tensors that the model's class does not load."""
    not_copied: list[str] = field(default_factory=list)
    """Of a checkpoint on disk: files that are neither weights nor go with them."""
    nll: dict[str, list[float]] = field(default_factory=dict)
    """Of a checkpoint on disk, by text that it was to be measured on: NLL before and after, nats a token."""
    training: list[ResetSpec] = field(default_factory=list)
    """Of an arm: what acts during the phase that follows."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data (see docs/results-schema.md)."""
        data = asdict(self)
        for reset in [*data["resets"], *data["training"]]:
            if not reset["patterns"]:
                del reset["patterns"]
        for key, rows in (("touched", self.touched), ("untouched", self.untouched)):
            for entry, row in zip(data[key], rows, strict=True):
                entry["residual"] = row.residual
        return data

    def __str__(self) -> str:
        """Return in two lines what was done."""
        matrices = [t for t in self.touched if t.dfi_after is not None]
        moved = [t.sfe for t in self.touched if t.sfe is not None]
        measured = len(moved) == len(self.touched)
        among = f" on {self.shared_by} ranks" if self.shared_by > 1 else ""
        left = ", ".join(sorted({t.role for t in self.untouched})) or "nothing"
        return (
            f"{'; '.join(r.label() for r in self.resets)}: "
            f"{len(self.touched)} tensors touched{f' ({len(matrices)} matrices)' if measured else ''} in "
            f"{self.seconds:.2f} s{among}; "
            f"{f'SFE {sum(moved):.4g}, measured in {self.measuring_seconds:.2f} s' if measured else 'not measured'}; "
            f"{len(self.untouched)} left alone ({left}); {self.optimizer_states_cleared} optimizer states cleared"
        )


def sigma_quantiles(sigma: Tensor) -> list[float | None]:
    """Return at most `SIGMA_QUANTILES` of a spectrum, evenly spread over the ranks, the ends included."""
    ranks = torch.linspace(0, len(sigma) - 1, min(SIGMA_QUANTILES, len(sigma))).round().long()
    return sigma[ranks.to(sigma.device)].tolist()


Spectra = bool | Literal["range"]
"""Whether a report holds quantiles of the singular values (True), the largest and the smallest, or none of them."""


def fetch(scalars: Sequence[Tensor]) -> list[Any]:
    """Return the values of scalars of one dtype, in order; each device that holds some is waited for once."""
    values: dict[int, Any] = {}
    for device in {scalar.device for scalar in scalars}:
        indices = [i for i, scalar in enumerate(scalars) if scalar.device == device]
        values |= zip(indices, torch.stack([scalars[i] for i in indices]).tolist(), strict=True)
    return [values[i] for i in range(len(scalars))]


class _Sums:
    """Add up what is measured at each position of a kernel, in the place of a report."""

    def __init__(self, report: TensorReport, positions: int) -> None:
        self.report, self.positions_left = report, positions
        self.squared_norm = self.dfi = 0.0

    def set_measures(self, norm: float, dfi: float) -> None:
        """Add the measures of one position, and note the sums once all are there."""
        self.positions_left -= 1
        self.squared_norm += norm**2
        self.dfi += dfi
        if not self.positions_left:
            self.report.set_measures(math.sqrt(self.squared_norm), self.dfi)


class Measures:
    """Gather numbers on a device and fetch them together: one wait for as many slices as are measured."""

    def __init__(self) -> None:
        self._numbers: list[Tensor] = []
        self._uses: list[tuple[Callable[..., None], int]] = []

    def add(self, use: Callable[..., None], *numbers: Tensor) -> None:
        """Call a function with scalars once they are fetched."""
        self._numbers += numbers
        self._uses.append((use, len(numbers)))

    def fetch(self) -> None:
        """Wait for the numbers and hand them over, in order."""
        values = iter(fetch([number.double() for number in self._numbers]))
        for use, count in self._uses:
            use(*islice(values, count))


def on_host(tensor: Tensor) -> bool:
    """Return whether numbers of a tensor are read without waiting for a device."""
    return tensor.device.type == "cpu"


def describe(
    weight: ParameterSlice,
    tensor: Tensor,
    spectra: Spectra,
    measures: Measures | None = None,
    known: Tensor | None = None,
) -> TensorReport:
    """Measure a slice as it is now; before and after are the same until something touches it.

    Args:
        weight: What is reported on.
        tensor: Its values.
        spectra: Whether the report holds singular values.
        measures: Gathers the report's numbers, which are in it once they are fetched; default: at once.
        known: Its smaller Gram matrix of float32 products, where the reset has formed that.
    """
    report, pending = TensorReport.of(weight), measures or Measures()
    if weight.matrix:
        _describe_matrices(report, weight, tensor, spectra, pending, known)
    else:
        numbers = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        numbers = numbers if numbers.is_floating_point() else numbers.double()
        pending.add(report.set_norm, torch.linalg.vector_norm(numbers, dtype=torch.float64))
    if measures is None:
        pending.fetch()
    return report


def _describe_matrices(
    report: TensorReport,
    weight: ParameterSlice,
    tensor: Tensor,
    spectra: Spectra,
    pending: Measures,
    known: Tensor | None,
) -> None:
    """Measure a matrix, or all matrices of a kernel, into a report; further arguments as in `describe`."""
    matrices = tensor if weight.kernel else (tensor,)
    target = _Sums(report, len(matrices)) if weight.kernel else report
    ends: list[float] = []
    for matrix in matrices:
        if spectra == "range":
            measured = extent(matrix, known)
            target.set_measures(measured.norm, measured.dfi)
            ends += [measured.largest, measured.smallest]
        elif on_host(matrix):
            target.set_measures(*norm_and_dfi(matrix, known))
        else:
            g = gram(matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT)
            pending.add(target.set_measures, g.trace().sqrt(), dfi_of_gram(g))
    if spectra == "range":
        report.sigma_before = report.sigma_after = [max(ends), min(ends)]
    elif spectra:
        sigma = singular_values(tensor)
        sigma = sigma.flatten().sort(descending=True).values if weight.kernel else sigma
        report.sigma_before = report.sigma_after = sigma_quantiles(sigma)
