"""Compare FIRE with other methods on images: a first phase on a part of the data, a reset, a second phase on all.

    apt-get install dataset-fashion-mnist        # 70,000 real images, nothing else is downloaded
    python scripts/reproduce_vision.py --output runs/vision --seeds 1 2 3 --workers 2
    python scripts/reproduce_vision.py --output runs/cifar --data cifar-10-batches-bin --size paper --networks resnet
    python scripts/reproduce_vision.py --output runs/smoke --quick

Settings: warm-start (a tenth of the images, then all of them), noisy-start (half of them with random labels, then all
with their own; it is not in the paper, and harsher than its settings), continual (images arrive in parts, old ones
stay) and class-incremental (classes arrive, old ones stay). Arms that reset act between phases. Arms that act while
training act from the second phase on in the two starts, and from the first in the others, as in the authors' code.
The tables are printed and written to vision.json and vision.md, the figures of each unit to units/. The same command
goes on after an interruption: a finished unit is not trained again, an unfinished one goes on after its last finished
phase. `--study FILE` writes the JSON of a study for docs/results/.

Source: FIRE, arXiv 2602.08040, section 5.1, and its authors' public code, whose settings `--size paper` takes.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from vision_data import PACKAGED, Images, load
from vision_networks import NETWORKS, build
from write_results_page import OfTables, lines

from fire_llm import Penalties, Recycling, UserError, apply_reset, diagnose_module, inject_plasticity_
from fire_llm.core.atomic import read_json, write_json
from fire_llm.reporting.comparison import paired_interval

SETTINGS = ("warm-start", "noisy-start", "continual", "class-incremental")
STARTS = ("warm-start", "noisy-start")
"""Settings of two phases, the first on a part of the images, as many steps each."""


@dataclass(frozen=True)
class Arm:
    """What one arm does between phases and while training."""

    resets: Any = None
    """Resets between phases, as `apply_reset` takes them; a mapping by network if they differ."""
    penalty: str = ""
    recycling: str = ""
    muon: bool = False
    inject: bool = False

    @property
    def trains_otherwise(self) -> bool:
        return bool(self.penalty or self.recycling or self.muon)


FIRE = {"method": "fire", "iterations": 10}
QUERIES_KEYS = {"query_key": r"\.to_(q|k)\."}
ARMS = {
    "base": Arm(),
    "fresh": Arm("full_reset"),
    "s-and-p": Arm({"method": "shrink_perturb", "shrink": 0.8}),
    "dash": Arm({"method": "dash"}),
    "fire": Arm({**dict.fromkeys(NETWORKS, FIRE), "vit": "paper-vit"}),
    "fire-all": Arm({"vit": FIRE}),
    "rescale": Arm({**dict.fromkeys(NETWORKS, FIRE | {"method": "rescale"}),
                    "vit": FIRE | {"method": "rescale", "roles": QUERIES_KEYS}}),
    "injection": Arm(inject=True),
    "l2-init": Arm(penalty="l2_init"),
    "parseval": Arm(penalty="parseval"),
    "redo": Arm(recycling="redo"),
    "cbp": Arm(recycling="continual_backprop"),
    "snr": Arm(recycling="snr"),
    "muon": Arm(muon=True),
}  # fmt: skip


@dataclass(frozen=True)
class Tuned:
    """The options that the authors chose for one network in one setting; shrink-and-perturb has 0.8 everywhere."""

    alpha: float
    """DASH's share of a new gradient in its moving average."""
    floor: float
    """DASH's least factor."""
    parseval: float
    cbp_rate: float
    """Share of units that continual backprop replaces in a step."""
    cbp_maturity: int
    """Age in steps from which on it may replace a unit."""
    redo: float
    """ReDo's threshold; it acts once an epoch."""
    l2_init: float
    """Coefficient of half the squared distance."""
    snr: float


TUNED = {
    ("start", "resnet"): Tuned(0.3, 0.05, 1e-3, 1e-4, 1000, 0.5, 1e-3, 0.01),
    ("start", "vgg"): Tuned(0.1, 0.05, 1e-3, 1e-4, 1000, 0.5, 1e-3, 0.08),
    ("start", "vit"): Tuned(0.1, 0.05, 1e-5, 1e-4, 100, 0.5, 1e-3, 0.01),
    ("continual", "resnet"): Tuned(0.3, 0.05, 1e-3, 1e-5, 1000, 0.05, 1e-5, 0.08),
    ("continual", "vgg"): Tuned(0.1, 0.1, 1e-4, 1e-5, 1000, 0.01, 1e-5, 0.01),
    ("continual", "vit"): Tuned(0.1, 0.05, 1e-5, 1e-5, 1000, 0.01, 1e-4, 0.04),
    ("class-incremental", "vgg"): Tuned(0.3, 0.1, 1e-3, 1e-4, 1000, 0.05, 1e-4, 0.02),
    ("class-incremental", "vit"): Tuned(0.3, 0.3, 1e-5, 1e-5, 1000, 0.01, 1e-5, 0.08),
}
PAPER_STEPS = {"resnet": 19_600, "vit": 19_600, "vgg": 39_100}
"""Steps of the paper's phase on all images; the rate and the maturity of continual backprop are scaled by them."""


def tuned(setting: str, network: str) -> Tuned:
    """Return the authors' options, or the nearest ones for the MLP and for settings that they did not run."""
    kind = "start" if setting in STARTS else setting
    network = "resnet" if network == "mlp" else network
    return TUNED.get((kind, network)) or TUNED[kind, "vgg"]


@dataclass(frozen=True)
class Size:
    """How much is trained."""

    name: str
    images: dict[str, int | None]
    """Number of images by network; None for all."""
    epochs: dict[str, int]
    """Epochs of a phase on all images, by network."""
    batch: int
    parts: int
    """Phases of the continual and the class-incremental setting."""
    test_images: int | None = None
    halve: tuple[str, ...] = ()
    """Networks that see images of half the side."""
    lr: float = 1e-3
    clip: float = 0.5
    first: dict[str, float] = field(default_factory=lambda: {"warm-start": 0.1, "noisy-start": 0.5})
    """Share of the images in the first phase of a start."""
    scopes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Networks of each setting."""


EVERY = dict.fromkeys(SETTINGS, NETWORKS)
SIZES = {
    "small": Size(
        "small",
        {"mlp": 4000, "vgg": 2000, "resnet": 2000, "vit": 2000},
        {"mlp": 30, "vgg": 30, "resnet": 15, "vit": 15},
        128,
        5,
        None,
        ("mlp", "vgg", "resnet"),
        scopes=EVERY | {"noisy-start": ("mlp", "vgg"), "continual": ("mlp",), "class-incremental": ("mlp",)},
    ),
    "paper": Size("paper", dict.fromkeys(NETWORKS), dict.fromkeys(NETWORKS, 100), 256, 10, scopes=EVERY),
    "quick": Size(
        "small", dict.fromkeys(NETWORKS, 128), dict.fromkeys(NETWORKS, 1), 64, 2, 100, ("mlp", "vgg", "resnet"),
        scopes=EVERY,
    ),
}  # fmt: skip
"""A quarter of an hour on a CPU for three seeds, the paper's size, and a smoke test."""


@dataclass(frozen=True)
class Unit:
    """One arm of one network in one setting, from one seed."""

    setting: str
    network: str
    seed: int
    arm: str

    @property
    def name(self) -> str:
        return f"{self.setting}.{self.network}.{self.seed}.{self.arm}"


# ---- data


def prepared(images: Images, network: str, size: Size, seed: int) -> Images:
    """Return the images that a network trains on and is tested on, chosen by the seed."""
    generator = torch.Generator().manual_seed(seed)
    most = size.images[network]
    chosen = torch.randperm(len(images.x), generator=generator)[:most]
    test_chosen = torch.randperm(len(images.test_x), generator=generator)[: size.test_images]
    x, test_x = images.x[chosen], images.test_x[test_chosen]
    if network in size.halve and x.shape[-1] >= 28:
        x, test_x = F.avg_pool2d(x, 2), F.avg_pool2d(test_x, 2)
    return Images(images.name, x, images.y[chosen], test_x, images.test_y[test_chosen])


def phases(unit: Unit, images: Images, size: Size) -> list[tuple[Tensor, Tensor, int, Tensor]]:
    """Return for each phase (indices of its images, their labels, epochs, indices of its test images)."""
    count, epochs = len(images.x), size.epochs[unit.network]
    everything, tests = torch.arange(count), torch.arange(len(images.test_x))
    if unit.setting in STARTS:
        share = size.first[unit.setting]
        part = everything[: round(count * share)]
        generator = torch.Generator().manual_seed(unit.seed)
        noise = torch.randint(images.classes, (len(part),), generator=generator)
        labels = noise if unit.setting == "noisy-start" else images.y[part]
        return [
            (part, labels, round(epochs / share), tests),
            (everything, images.y, epochs, tests),
        ]
    found = []
    order = torch.randperm(images.classes, generator=torch.Generator().manual_seed(unit.seed))
    for number in range(1, size.parts + 1):
        if unit.setting == "continual":
            part, test_part = everything[: count * number // size.parts], tests
        else:
            known = order[: images.classes * number // size.parts]
            part = everything[torch.isin(images.y, known)]
            test_part = tests[torch.isin(images.test_y, known)]
        found.append((part, images.y[part], epochs, test_part))
    return found


# ---- training


class Muon(torch.optim.Optimizer):
    """Muon in fp32 with flattened kernels of convolutions; torch's takes minutes a phase in bf16 on a CPU.

    Source: Jordan et al., Muon, 2024, as in `torch.optim.Muon` without weight decay.
    """

    def __init__(self, params: Any, lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(mean, group["momentum"]).flatten(1)
                tall = len(x) > x.shape[1]
                x = (x.T if tall else x) / x.norm().clamp(min=1e-7)
                for _ in range(5):
                    gram = x @ x.T
                    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
                x = x.T if tall else x
                p.sub_(x.reshape(p.shape), alpha=group["lr"] * math.sqrt(max(1, len(x) / x.shape[1])))


def optimizers(model: nn.Module, muon: bool, lr: float) -> list[torch.optim.Optimizer]:
    """Return Adam; or Muon for all linear layers and convolutions but the last, and Adam for the rest."""
    if not muon:
        return [torch.optim.Adam(model.parameters(), lr)]
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    own = [m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and m is not last]
    rest = [p for p in model.parameters() if all(p is not w for w in own)]
    return [Muon(own, 10 * lr), torch.optim.Adam(rest, lr, betas=(0.9, 0.95))]


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the accuracy in percent, in evaluation mode."""
    model.eval()
    right = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(500), y.split(500), strict=True))
    return 100 * right / len(y)


def recycled_by(unit: Unit, model: Any, epoch_steps: int, whole: int, seed: int) -> Recycling | None:
    """Return the recycling of hidden units, None if the arm has none.

    Args:
        unit: The arm, network and setting.
        model: A network that lists its hidden layers.
        epoch_steps: Steps an epoch.
        whole: Steps of a phase on all images.
        seed: Seed of new weights.
    """
    method, chosen = ARMS[unit.arm].recycling, tuned(unit.setting, unit.network)
    shorter = PAPER_STEPS.get(unit.network, PAPER_STEPS["resnet"]) / whole
    options: dict[str, dict[str, Any]] = {
        "redo": {"every": epoch_steps, "threshold": chosen.redo},
        "continual_backprop": {
            "rate": min(1.0, chosen.cbp_rate * shorter),
            "maturity": round(chosen.cbp_maturity / shorter),
        },
        "snr": {"eta": chosen.snr},
    }
    return Recycling(model, method, hidden=model.hidden(), seed=seed, **options[method]) if method else None


def train(
    model: nn.Module,
    unit: Unit,
    acts: bool,
    initial: nn.Module,
    x: Tensor,
    y: Tensor,
    epochs: int,
    whole: int,
    seed: int,
    size: Size,
) -> int:
    """Train a phase; the order of the images is the same for every arm.

    Args:
        model: The network.
        unit: The arm, network and setting.
        acts: Whether the arm's methods that act while training act in this phase.
        initial: The network with its initial weights.
        x: Images.
        y: Their labels.
        epochs: Epochs of this phase.
        whole: Steps of a phase on all images.
        seed: Seed of the order of the images.
        size: Holds batch size, learning rate and the largest gradient norm.

    Returns:
        How many units were recycled.
    """
    arm, chosen, epoch_steps = ARMS[unit.arm], tuned(unit.setting, unit.network), -(-len(x) // size.batch)
    steps, step = epochs * epoch_steps, 0
    given = optimizers(model, arm.muon and acts, size.lr)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in given]
    recycling = recycled_by(unit, model, epoch_steps, whole, seed) if acts else None
    penalties = None
    if acts and arm.penalty:
        options = {"l2_init": {"strength": chosen.l2_init / 2}, "parseval": {"strength": chosen.parseval, "scale": 1.0}}
        penalties = Penalties(model, arm.penalty, initial=initial, layout="modules", **options[arm.penalty])
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(size.batch):
            step += 1
            for optimizer, peaks in zip(given, rates, strict=True):
                for group, rate in zip(optimizer.param_groups, peaks, strict=True):
                    group["lr"] = rate * min(1.0, 10 * step / steps)  # a tenth of the phase warms up
            model.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            if penalties is not None:
                penalties.add_()
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], size.clip)
            for optimizer in given:
                optimizer.step()
            if recycling is not None:
                recycling.step(given[0])
    if recycling is not None:
        recycling.remove()
    return recycling.recycled if recycling is not None else 0


def gather_gradients(model: nn.Module, x: Tensor, y: Tensor, alpha: float, seed: int, size: Size) -> None:
    """Set `.grad` to what DASH reads: a moving average of the gradients over one epoch of the new data."""
    means = {p: torch.zeros_like(p) for p in model.parameters()}
    frozen = copy.deepcopy({k: b for k, b in model.named_buffers()})
    model.train()
    for batch in torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).split(size.batch):
        model.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        for p, mean in means.items():
            mean.lerp_(p.grad, alpha)
    for p, mean in means.items():
        p.grad = mean
    for key, buffer in model.named_buffers():
        buffer.copy_(frozen[key])


def transition(unit: Unit, model: nn.Module, initial: nn.Module, x: Tensor, y: Tensor, number: int, size: Size) -> None:
    """Apply the arm's resets between two phases."""
    arm, resets = ARMS[unit.arm], ARMS[unit.arm].resets
    if isinstance(resets, dict) and unit.network in resets:
        resets = resets[unit.network]
    if unit.arm == "dash":
        chosen = tuned(unit.setting, unit.network)
        gather_gradients(model, x, y, chosen.alpha, 1000 * unit.seed + number, size)
        resets = resets | {"floor": chosen.floor}
    if resets is not None:
        apply_reset(model, resets, layout="modules", initial=initial)
        model.zero_grad()
    if arm.inject and number == 1:  # once, as in its paper
        inject_plasticity_(model, "head", seed=1000 * unit.seed + number)


def diagnosed(model: Any, unit: Unit, x: Tensor, y: Tensor, before: nn.Module) -> dict[str, Any]:
    """Return measures of a network's plasticity before its second phase, on images that it has not seen."""
    readers = [names[-1] for names in model.hidden()]
    head = readers[-1] if unit.network != "vit" else "head"
    found = diagnose_module(
        model,
        lambda network, batch: F.cross_entropy(network(x[batch]), y[batch]),
        torch.arange(len(x))[-512:].split(64),
        features=head, units=readers, reference=before, iterations=10, tolerance=0.05,
    )  # fmt: skip
    return found.measures()


# ---- units


class Work:
    """Train the units of one run, one by one."""

    def __init__(self, output: Path, data: Path | None, size: Size, diagnose: bool, device: str) -> None:
        self.output, self.size, self.diagnose, self.device = output, size, diagnose, device
        self.images = load(data)

    def file(self, unit: Unit) -> Path:
        return self.output / "units" / f"{unit.name}.json"

    def run(self, unit: Unit) -> dict[str, Any]:
        """Train one unit from its last finished phase on, and write and return its results."""
        if self.file(unit).exists():
            return read_json(self.file(unit), "delete it to train the unit again")
        images, arm = prepared(self.images, unit.network, self.size, unit.seed), ARMS[unit.arm]
        shape = (images.x.shape[1], images.x.shape[2])
        initial = build(unit.network, shape, self.images.classes, self.size.name, unit.seed).to(self.device)
        model = copy.deepcopy(initial)
        unfinished = Path(f"{self.file(unit)}.begun.safetensors")
        entries: list[dict[str, Any]] = []
        diagnostics = None
        if unfinished.exists():
            state = load_file(unfinished)
            entries = json.loads(bytes(state.pop("@found").tolist()))
            diagnostics = entries.pop() if entries and "srank" in entries[-1] else None
            if arm.inject and len(entries) > 1:
                transition(unit, model, initial, images.x, images.y, 1, self.size)
            model.load_state_dict(state)
        whole = self.size.epochs[unit.network] * -(-len(images.x) // self.size.batch)
        for number, (part, labels, epochs, held) in enumerate(phases(unit, images, self.size)):
            if number < len(entries):
                continue
            x, y, clock = images.x[part].to(self.device), labels.to(self.device), time.process_time()
            test_x, test_y = images.test_x[held].to(self.device), images.test_y[held].to(self.device)
            entry: dict[str, Any] = {"images": len(x), "steps": epochs * -(-len(x) // self.size.batch)}
            first = self.output / "units" / f"first.{unit.setting}.{unit.network}.{unit.seed}.safetensors"
            acts = number > 0 or unit.setting not in STARTS
            shared = number == 0 and not (acts and arm.trains_otherwise)
            if shared and first.exists():
                model.load_state_dict(load_file(first))
            else:
                before = copy.deepcopy(model)
                if number:
                    transition(unit, model, initial, x, y, number, self.size)
                    entry["after_reset"] = accuracy(model, test_x, test_y)
                    if number == 1 and unit.setting in STARTS and self.diagnose and not arm.trains_otherwise:
                        diagnostics = None if arm.inject else diagnosed(model, unit, x, y, before)
                seed = 1000 * unit.seed + 100 + number
                entry["recycled"] = train(model, unit, acts, initial, x, y, epochs, whole, seed, self.size)
                if shared:
                    keep(model.state_dict(), first)
            entry["train"] = accuracy(model, x, y)
            entry["test"] = accuracy(model, test_x, test_y)
            entry["cpu_seconds"] = round(time.process_time() - clock, 2)
            entries.append(entry)
            progress = json.dumps([*entries, *([diagnostics] if diagnostics else [])]).encode()
            keep({**model.state_dict(), "@found": torch.tensor(list(progress), dtype=torch.uint8)}, unfinished)
        result = {**asdict(unit), "phases": entries, "diagnostics": diagnostics}
        write_json(self.file(unit), result)
        unfinished.unlink()
        return result


def keep(state: dict[str, Tensor], file: Path) -> None:
    """Write tensors to a file that appears as a whole."""
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    save_file({key: t.contiguous().clone() for key, t in state.items()}, partial)
    partial.replace(file)


_WORK: Work


def _start(*given: Any) -> None:
    global _WORK
    torch.set_num_threads(1)
    _WORK = Work(*given)


def _run(unit: Unit) -> dict[str, Any]:
    return _WORK.run(unit)


def done(units: list[Unit], workers: int, given: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
    """Yield the results of units as they finish, one setting and network after another.

    A unit that trains a first phase that others share comes before those.
    """
    waves: list[list[Unit]] = []
    for key in dict.fromkeys((u.setting, u.network) for u in units):
        together = [u for u in units if (u.setting, u.network) == key]
        first = {u.seed: u for u in reversed(together) if not ARMS[u.arm].trains_otherwise}
        waves += [[*first.values()], [u for u in together if u not in first.values()]]
    if workers == 1:
        _start(*given)
        yield from (_run(unit) for wave in waves for unit in wave)
        return
    with multiprocessing.get_context("spawn").Pool(workers, _start, given) as pool:
        for wave in waves:
            yield from pool.imap_unordered(_run, wave)


def whole_arms(units: list[Unit], output: Path) -> list[dict[str, Any]]:
    """Return the results of the arms of which every seed is finished."""
    files = {unit: output / "units" / f"{unit.name}.json" for unit in units}
    lacking = {(u.setting, u.network, u.arm) for u, file in files.items() if not file.exists()}
    complete = [file for u, file in files.items() if (u.setting, u.network, u.arm) not in lacking]
    return [read_json(file, "delete it to train the unit again") for file in complete]


# ---- results


def last(result: dict[str, Any]) -> float:
    return float(result["phases"][-1]["test"])


def mean_of_later(result: dict[str, Any]) -> float:
    """Return the mean test accuracy over all phases but the first, in which all arms are alike."""
    return fmean(phase["test"] for phase in result["phases"][1:])


def tables(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return a table for each setting and network: accuracy in percent, and differences paired by seed."""
    found: dict[str, dict[str, Any]] = {}
    for setting in SETTINGS:
        for network in NETWORKS:
            own = [r for r in results if (r["setting"], r["network"]) == (setting, network)]
            if own:
                found[f"{setting}, {network}"] = table(f"{setting} {network}", own, setting in STARTS)
    return found


def table(name: str, results: list[dict[str, Any]], start: bool) -> dict[str, Any]:
    measure = last if start else mean_of_later
    arms = {arm: {r["seed"]: r for r in results if r["arm"] == arm} for arm in ARMS}
    arms = {arm: by_seed for arm, by_seed in arms.items() if by_seed}
    rows = []
    for arm, by_seed in arms.items():
        row: list[Any] = [arm, level([measure(r) for r in by_seed.values()])]
        for other in ("base", "fresh"):
            theirs = arms.get(other, {})
            shared = [seed for seed in by_seed if seed in theirs]
            pairs = [measure(by_seed[s]) - measure(theirs[s]) for s in shared]
            row.append(None if arm == other or not pairs else difference(pairs))
        ends = [r["phases"][-1] for r in by_seed.values()]
        row += [tenth(fmean(e["train"] for e in ends)), tenth(fmean(e["after_reset"] for e in ends))]
        if any(r["diagnostics"] for r in results):
            known = [r["diagnostics"] for r in by_seed.values() if r["diagnostics"]]
            for key in ("srank_share", "dormant_share", "hessian_eigenvalue", "dfi_mean"):
                row.append(float(f"{fmean(d[key] for d in known):.3g}") if known else None)
        rows.append(row)
    accuracy_of = "test" if start else "mean test"
    columns = ["arm", f"{name}: {accuracy_of}", f"{name}: vs base", f"{name}: vs fresh", f"{name}: training"]
    columns.append(f"{name}: after the reset")
    if any(r["diagnostics"] for r in results):
        columns += [f"{name}: {what}" for what in ("srank share", "dormant", "curvature", "DfI")]
    return {"columns": columns, "rows": rows}


def tenth(value: float) -> float:
    return round(value, 1) + 0.0  # no minus before a zero


def level(values: list[float]) -> Any:
    return {"mean": tenth(fmean(values)), "sd": tenth(stdev(values))} if len(values) > 1 else tenth(values[0])


def difference(pairs: list[float]) -> Any:
    interval = paired_interval(pairs)
    half = (interval[1] - interval[0]) / 2 if interval else math.nan
    return {"mean": tenth(fmean(pairs)), "half": tenth(half)} if interval else tenth(fmean(pairs))


def markdown(found: dict[str, dict[str, Any]]) -> str:
    """Return the tables as a page."""
    head = "Accuracy in percent, mean ± standard deviation over seeds; differences paired by seed ± half their 95 %"
    head += " interval. Diagnostics right after the reset, before the second phase."
    written = OfTables({"tables": found}).tables()
    return "\n\n".join([head, *(f"**{name}**\n\n{table}" for name, table in written.items())]) + "\n"


# ---- the command


def settled(output: Path, about: dict[str, Any]) -> None:
    """Begin a folder of units, or check that its units have the same settings.

    Raises:
        UserError: They have others.
    """
    (output / "units").mkdir(parents=True, exist_ok=True)
    file = output / "settings.json"
    if not file.exists():
        write_json(file, about)
    elif (before := read_json(file, "choose another --output")) != json.loads(json.dumps(about)):
        others = [key for key in about if before.get(key) != json.loads(json.dumps(about))[key]]
        raise UserError(f"--output {output}: its units are of another {', '.join(others)}. Choose another folder")


def usual(args: argparse.Namespace, images: Images) -> str:
    """Return the options that train the same again on any machine."""
    data = "" if images.name in (PACKAGED.name, "digits") else " --data FOLDER"
    small = " --size paper" if args.size == "paper" else ""
    return f"--output runs/vision{data}{small} --seeds {' '.join(map(str, args.seeds))} --workers {args.workers}"


def main(argv: list[str] | None = None) -> int:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where units and tables go")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="MNIST family, CIFAR (binary) or Tiny-ImageNet")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="N", help="1 2 3")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=[*SETTINGS], metavar="SETTING")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=[*NETWORKS], metavar="NETWORK")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[*ARMS], metavar="ARM", help=f"of {', '.join(ARMS)}")
    parser.add_argument(
        "--size", choices=("small", "paper"), default="small", help="an eighth of the paper's width, or it"
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes of one thread each (1)")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda: for the paper's size")
    parser.add_argument("--no-diagnostics", action="store_true", help="leave srank, curvature and the like out")
    parser.add_argument("--report", action="store_true", help="train nothing; tables of what is finished for all seeds")
    parser.add_argument("--quick", action="store_true", help="a smoke test: one seed, 128 images, one epoch")
    parser.add_argument("--study", type=Path, metavar="FILE", help="also write what docs/results/ takes")
    args = parser.parse_args(argv)
    size = SIZES["quick" if args.quick else args.size]
    seeds = args.seeds[:1] if args.quick else args.seeds
    try:
        images = load(args.data)
        about = {
            "size": {key: value for key, value in asdict(size).items() if key != "scopes"},
            "data": images.name,
            "images": images.digest,
            "diagnostics": not args.no_diagnostics,
        }
        settled(args.output, about)
    except UserError as fault:
        parser.error(str(fault))
    units = [
        Unit(setting, network, seed, arm)
        for seed in seeds
        for setting in args.settings
        for network in args.networks
        if network in size.scopes[setting]
        for arm in args.arms
        if not isinstance(ARMS[arm].resets, dict) or "method" in ARMS[arm].resets or network in ARMS[arm].resets
    ]
    results: list[dict[str, Any]] = []
    clock, fresh = time.monotonic(), 0
    finished = {f.name for f in (args.output / "units").glob("*.json")}
    trained = done(units, args.workers, (args.output, args.data, size, not args.no_diagnostics, args.device))
    for result in whole_arms(units, args.output) if args.report else trained:
        results.append(result)
        name = Unit(*(result[key] for key in ("setting", "network", "seed", "arm"))).name
        if f"{name}.json" in finished:
            continue
        fresh += 1
        minutes_left = (time.monotonic() - clock) / fresh * (len(units) - len(results)) / 60
        print(
            f"[{len(results)}/{len(units)}] {name}: {last(result):.1f} %, {minutes_left:.0f} min left",
            file=sys.stderr,
            flush=True,
        )
    study_tables = tables(results)
    study = {
        "date": date.today().isoformat(),
        "command": f"python scripts/reproduce_vision.py {usual(args, images)}",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "seeds": ", ".join(map(str, seeds)),
        "data": images.name,
        "unfinished": len(units) - len(results),
        "torch": torch.__version__.partition("+")[0],
        "tables": study_tables,
    }
    write_json(args.output / "vision.json", {**study, "units": results})
    (args.output / "vision.md").write_text(markdown(study_tables), encoding="utf-8")
    if args.study:
        args.study.write_text(lines(study) + "\n", encoding="utf-8")
    print(markdown(study_tables))
    return 0


if __name__ == "__main__":
    sys.exit(main())
