"""Reproduce the paper's claim for control: reset a DQN and a SAC agent of stable-baselines3 in the middle of training.

    pip install 'fire-llm[control]'
    python scripts/reproduce_control.py --out runs/control --seeds 1 2 3 4 5 --processes 2
    python scripts/reproduce_control.py --out /tmp/control --quick            half a minute: does everything work

Each seed trains one agent to the middle. From there every arm goes on with the same weights and replay buffer: `base`
as it is, the others with a reset at their first step, after which the target network follows.

    full-reset      all weights back to their initial values
    s-and-p         80 % of the way back: all weights of SAC; convolutions of DQN, whose linear layers are set back
    fire            the paper's: every linear layer of SAC; convolutions of DQN, whose linear layers are set back
    fire-keep-norm  a control that the paper lacks: the same projection, each matrix at the norm that it had
    linear-reset    another, for DQN: linear layers are set back, convolutions stay

Every finished unit is a file under --out. The same command goes on where it was stopped, and with more seeds it trains
only those. It prints a table, and writes `study.json` (for docs/results/) and `curves.svg` beside the units.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shlex
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import gymnasium
import numpy as np
import stable_baselines3
import torch
from results_plots import Line, Panel, spanned, svg
from stable_baselines3 import DQN, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import Tensor, nn
from write_results_page import Figure, OfTables, lines

from fire_llm import __version__, apply_reset
from fire_llm.core.atomic import write_json
from fire_llm.core.errors import UserError
from fire_llm.linalg.activations import dormant_scores, dormant_share, feature_srank
from fire_llm.reporting.comparison import paired_interval
from fire_llm.reporting.plots.base import palette

ARMS = ("base", "full-reset", "s-and-p", "fire", "fire-keep-norm", "linear-reset")


@dataclass(frozen=True)
class Task:
    """One environment, the agent that learns in it, and for how long."""

    name: str
    algorithm: str
    environment: str
    steps: int
    """Steps of the environment; the reset is in the middle."""
    evaluate_every: int
    episodes: int
    """Episodes of each evaluation."""
    replay_ratio: int
    """Gradient steps for each step of the environment."""
    learning_rate: float
    width: int
    batch: int
    envs: int
    learning_starts: int = 200


TASKS = {
    task.name: task
    for task in (
        Task("catch", "dqn", "Catch", 4_800, 240, 32, 1, 1e-3, width=128, batch=32, envs=4),
        Task("pendulum", "sac", "InvertedPendulum-v5", 2_000, 100, 4, 2, 1e-3, width=64, batch=64, envs=1),
        Task("space-invaders", "dqn", "MinAtar/SpaceInvaders-v1", 3_600, 180, 16, 2, 1e-3, width=128, batch=32, envs=4),
    )
}


# ---- agents


class Catch(gymnasium.Env[np.ndarray, int]):
    """A ball falls down a board of 10 x 10, and a paddle is to be below it: +1 caught, -1 missed (Osband et al. 2020).

    An observation has two planes, the ball and the paddle; an episode has nine steps: left, stay or right.
    """

    size = 10
    observation_space = gymnasium.spaces.Box(0, 1, (2, size, size), np.uint8)
    action_space = gymnasium.spaces.Discrete(3)

    def __init__(self) -> None:
        self.row, self.ball, self.paddle = 0, 0, 0

    def board(self) -> np.ndarray:
        planes = np.zeros((2, self.size, self.size), np.uint8)
        planes[0, self.row, self.ball] = planes[1, -1, self.paddle] = 1
        return planes

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.row, (self.ball, self.paddle) = 0, (int(n) for n in self.np_random.integers(0, self.size, 2))
        return self.board(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.row, self.paddle = self.row + 1, int(np.clip(self.paddle + action - 1, 0, self.size - 1))
        over = self.row == self.size - 1
        return self.board(), (1.0 if self.ball == self.paddle else -1.0) if over else 0.0, over, False, {}


class MinAtarView(gymnasium.ObservationWrapper[np.ndarray, int, np.ndarray]):
    """Channels first, as convolutions want them."""

    def __init__(self, env: gymnasium.Env[np.ndarray, int]) -> None:
        super().__init__(env)
        high, wide, channels = env.observation_space.shape or ()
        self.observation_space = gymnasium.spaces.Box(0, 1, (channels, high, wide), np.uint8)

    def observation(self, observation: np.ndarray) -> np.ndarray:
        return np.moveaxis(observation, -1, 0).astype(np.uint8)


class Features(BaseFeaturesExtractor):
    """Two convolutions and a linear layer, for pictures of 10 x 10."""

    def __init__(self, observation_space: gymnasium.spaces.Box, features_dim: int) -> None:
        super().__init__(observation_space, features_dim)
        channels = observation_space.shape[0]
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten()
        )
        size = self.convolutions(torch.zeros(1, *observation_space.shape)).shape[1]
        self.linear = nn.Sequential(nn.Linear(size, features_dim), nn.ReLU())

    def forward(self, observations: Tensor) -> Tensor:
        features: Tensor = self.linear(self.convolutions(observations))
        return features


def environment(name: str) -> gymnasium.Env[Any, Any]:
    """Make one environment; a game of MinAtar ends after 1,000 steps if not before."""
    if name == "Catch":
        return Catch()
    if not name.startswith("MinAtar/"):
        return gymnasium.make(name)
    from minatar.gym import register_envs

    if name not in gymnasium.registry:
        register_envs()
    return MinAtarView(gymnasium.make(name, max_episode_steps=1000))


def environments(task: Task, number: int) -> DummyVecEnv:
    return DummyVecEnv([lambda: environment(task.environment)] * number)


FUSED = {"optimizer_kwargs": {"fused": True}}
"""Adam in one call, for small networks on a CPU."""


def agent(task: Task, seed: int) -> BaseAlgorithm:
    """Return an untrained agent; its weights depend on the seed alone."""
    common: dict[str, Any] = {
        "env": environments(task, task.envs),
        "learning_rate": task.learning_rate,
        "batch_size": task.batch,
        "buffer_size": task.steps,
        "learning_starts": task.learning_starts,
        "train_freq": 1,
        "gradient_steps": task.replay_ratio * task.envs,
        "gamma": 0.99,
        "seed": seed,
        "device": "cpu",
    }
    if task.algorithm == "dqn":
        look = {"features_extractor_class": Features, "features_extractor_kwargs": {"features_dim": task.width}}
        # Exploration falls during a tenth of all steps. `learn` is called for half of them, so it is a fifth of those.
        ends = {"exploration_fraction": 0.2, "exploration_final_eps": 0.01, "target_update_interval": 200}
        policy = {**look, "net_arch": [], "normalize_images": False, **FUSED}
        model = DQN("CnnPolicy", policy_kwargs=policy, **ends, **common)
        for module in model.q_net.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):  # as the paper's code begins
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        model.q_net_target.load_state_dict(model.q_net.state_dict())
        return model
    policy = {"net_arch": [task.width, task.width], **FUSED}
    return SAC("MlpPolicy", policy_kwargs=policy, ent_coef="auto_0.1", **common)


# ---- the reset

PROJECTED = {"method": "fire", "iterations": 10, "scale": "keep-norm"}
LINEAR = {"method": "full_reset", "roles": ["linear", "linear_bias"]}
RESETS: dict[str, dict[str, Any]] = {
    "dqn": {
        "base": None,
        "full-reset": "full_reset",
        "s-and-p": "paper-dqn-shrink-perturb",
        "fire": "paper-dqn",
        "fire-keep-norm": [{**PROJECTED, "roles": ["conv"]}, LINEAR],
        "linear-reset": LINEAR,
    },
    "sac": {
        "base": None,
        "full-reset": "full_reset",
        "s-and-p": {"method": "shrink_perturb", "shrink": 0.8},
        "fire": "paper-simba",
        "fire-keep-norm": {**PROJECTED, "roles": ["linear"]},
    },
}
"""By algorithm and arm, the resets for `apply_reset`."""
NETWORKS = {"dqn": {"q_net": "q_net_target"}, "sac": {"actor": None, "critic": "critic_target"}}
"""By algorithm, the networks that are reset, each with the target network that follows it."""


class FireCallback(BaseCallback):
    """Reset an agent when training goes on: its networks, their targets and, for SAC, what the paper's code resets.

    For SAC, the moments of every optimizer are cleared, also in the arm base, and arms that reset set the temperature
    back. For DQN the moments stay. The replay buffer stays in both.

    Args:
        algorithm: `dqn` or `sac`.
        arm: One of ARMS.
        initial: The policy with the run's initial weights.
        log_temperature: SAC's initial log temperature.
    """

    def __init__(self, algorithm: str, arm: str, initial: nn.Module, log_temperature: float = 0.0) -> None:
        super().__init__()
        self.algorithm, self.resets, self.initial = algorithm, RESETS[algorithm][arm], initial
        self.log_temperature = log_temperature
        self.diagnosis: dict[str, float] = {}

    def _on_training_start(self) -> None:
        policy = self.model.policy
        for name, target in NETWORKS[self.algorithm].items() if self.resets else ():
            network = getattr(policy, name)
            apply_reset(network, self.resets, layout="modules", initial=getattr(self.initial, name))
            if target:
                getattr(policy, target).load_state_dict(network.state_dict())
        if self.algorithm == "sac":
            for optimizer in (policy.actor.optimizer, policy.critic.optimizer, self.model.ent_coef_optimizer):
                optimizer.state.clear()
            if self.resets:
                self.model.log_ent_coef.data.fill_(self.log_temperature)
        self.diagnosis = diagnosed(self.model)

    def _on_step(self) -> bool:
        return True


# ---- what is measured


class Evaluations(BaseCallback):
    """Evaluate the greedy policy every so many steps, always on the same episodes' beginnings."""

    def __init__(self, task: Task, seed: int, label: str) -> None:
        super().__init__()
        self.task, self.seed, self.label = task, seed, label
        self.envs = environments(task, min(task.episodes, 8))
        self.curve: list[tuple[int, float]] = []

    def _on_step(self) -> bool:
        if self.num_timesteps % self.task.evaluate_every == 0:
            self.envs.seed(10_000 + self.seed)
            mean = float(evaluate_policy(self.model, self.envs, self.task.episodes, warn=False)[0])
            self.curve.append((self.num_timesteps, mean))
            said(f"{self.label}: {self.num_timesteps:,} of {self.task.steps:,} steps: return {mean:.1f}")
        return True


@torch.no_grad()
def diagnosed(model: BaseAlgorithm, rows: int = 2048) -> dict[str, float]:
    """Return, on observations of the buffer, the srank of the value network's last features and its dormant share."""
    buffer = model.replay_buffer
    size = buffer.size()
    picked = np.random.default_rng(0).integers(0, size, rows)
    observations = torch.as_tensor(buffer.observations[picked, 0]).float()
    actions = torch.as_tensor(buffer.actions[picked, 0]).float()
    hidden: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        """Keep the activations of hidden units; the units of a convolution are its channels."""
        hidden.append(output.movedim(1, -1).flatten(0, -2))

    network = model.q_net if isinstance(model, DQN) else model.critic.qf0
    inputs = observations if isinstance(model, DQN) else torch.cat([observations, actions], 1)
    hooks = [module.register_forward_hook(keep) for module in network.modules() if isinstance(module, nn.ReLU)]
    network(inputs)
    for hook in hooks:
        hook.remove()
    scores = torch.cat([dormant_scores(units) for units in hidden])
    return {"srank": feature_srank(hidden[-1]), "dormant": dormant_share(scores)}


# ---- units


def said(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


def finished(path: Path, task: Task) -> dict[str, Any] | None:
    """Return a unit that was finished with these settings; None if there is none.

    Raises:
        UserError: It was made with other settings.
    """
    if not path.exists():
        return None
    unit: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if unit["task"] != asdict(task):
        raise UserError(f"{path} was made with other settings of {task.name}: give another folder with --out")
    return unit


def train(task: Task, seed: int, arms: Sequence[str], out: Path) -> None:
    """Train one seed of a task to the middle, and each arm from there to the end; finished units are skipped."""
    arms = [arm for arm in arms if arm in RESETS[task.algorithm]]
    place = out / task.name / f"seed-{seed}"
    if all(finished(place / f"{name}.json", task) for name in ("middle", *arms)):
        return
    torch.set_num_threads(1)
    place.mkdir(parents=True, exist_ok=True)
    middle, buffer = place / "middle.zip", place / "middle-buffer.pkl"
    model = agent(task, seed)
    initial = deepcopy(model.policy)
    temperature = model.log_ent_coef.item() if isinstance(model, SAC) else 0.0
    if finished(place / "middle.json", task) is None:
        began, curve = time.process_time(), Evaluations(task, seed, f"{task.name}, seed {seed}")
        model.learn(task.steps // 2, callback=curve)
        model.save(middle)
        model.save_replay_buffer(buffer)
        diagnosis = diagnosed(model)
        model.policy.load_state_dict(initial.state_dict())
        unit = {"curve": curve.curve, "end": diagnosis, "untrained": diagnosed(model)}
        write_json(place / "middle.json", {"task": asdict(task), "seconds": time.process_time() - began, **unit})
    for arm in arms:
        if finished(place / f"{arm}.json", task) is not None:
            continue
        began, curve = time.process_time(), Evaluations(task, seed, f"{task.name}, seed {seed}, {arm}")
        model = type(model).load(middle, environments(task, task.envs), device="cpu")
        model.load_replay_buffer(buffer)
        model.set_random_seed(1000 + seed)
        reset = FireCallback(task.algorithm, arm, initial, temperature)
        model.learn(task.steps // 2, callback=[reset, curve], reset_num_timesteps=False)
        unit = {"curve": curve.curve, "begin": reset.diagnosis, "end": diagnosed(model)}
        write_json(place / f"{arm}.json", {"task": asdict(task), "seconds": time.process_time() - began, **unit})


# ---- tables


def last(curve: Sequence[tuple[int, float]]) -> float:
    """Return the mean return of the last three evaluations."""
    return fmean(value for _, value in curve[-3:])


def area(curve: Sequence[tuple[int, float]]) -> float:
    """Return the area under a curve of evenly spaced evaluations, over its length: their mean."""
    return fmean(value for _, value in curve)


MEASURES = {"last three": last, "area": area}


def number(value: float, digits: int) -> str:
    """Return a number as text, from which `as_json` makes a number with the same digits, also trailing zeros."""
    return f"#{round(value, digits) + 0.0:.{digits}f}"


def as_json(study: dict[str, Any]) -> str:
    """Return a study as JSON, numbers with the digits that `number` gave them."""
    return re.sub(r'"#(-?[\d.]+)"', r"\1", lines(study))


def spread(values: Sequence[float], digits: int) -> dict[str, str] | str:
    """Return a cell of a table: mean and standard deviation, or the one value."""
    mean = number(fmean(values), digits)
    return {"mean": mean, "sd": number(stdev(values), digits)} if len(values) > 1 else mean


def paired(mine: Sequence[float], theirs: Sequence[float], digits: int) -> dict[str, str] | None:
    """Return a cell of a table: the mean difference by seed, and half its 95 % interval; None for fewer than two."""
    differences = [a - b for a, b in zip(mine, theirs, strict=True)]
    interval = paired_interval(differences)
    if interval is None:
        return None
    return {"mean": number(fmean(differences), digits), "half": number((interval[1] - interval[0]) / 2, digits)}


Units = dict[str, list[dict[str, Any]]]
"""By arm, and for `middle`, the units of all seeds."""


def returns(task: str, units: Units) -> dict[str, Any]:
    """Return the table of returns after the reset, each against base, and FIRE against each."""
    digits = 2 if max(abs(value) for of in units.values() for unit in of for _, value in unit["curve"]) <= 10 else 1
    arms = [arm for arm in units if arm != "middle"]
    columns = ["arm"]
    rows: list[list[Any]] = [[arm] for arm in arms]
    for name, measure in MEASURES.items():
        values = {arm: [measure(unit["curve"]) for unit in units[arm]] for arm in arms}
        column = f"{task} {name}"
        columns += [column, f"{column}: vs base", f"{column}: fire less it"]
        for row in rows:
            mine = values[row[0]]
            row.append(spread(mine, digits))
            row.append(paired(mine, values["base"], digits) if row[0] != "base" and "base" in values else None)
            row.append(paired(values["fire"], mine, digits) if row[0] != "fire" and "fire" in values else None)
    before = [last(unit["curve"]) for unit in units["middle"]]
    return {"columns": columns, "rows": [["before the reset", spread(before, digits)], *rows]}


def networks(task: str, units: Units) -> dict[str, Any]:
    """Return the table of the diagnostics: untrained, before the reset, after it, at the end."""

    def row(name: str, arm: str, when: str) -> list[Any]:
        found = [unit[when] for unit in units[arm]]
        return [name, spread([f["srank"] for f in found], 1), spread([100 * f["dormant"] for f in found], 1)]

    rows = [row("untrained", "middle", "untrained"), row("before the reset", "middle", "end")]
    arms = [arm for arm in units if arm != "middle"]
    rows += [row(f"{arm}, behind it", arm, "begin") for arm in arms if arm != "base"]
    rows += [row(f"{arm}, at the end", arm, "end") for arm in arms]
    return {"columns": ["network", f"{task} srank", f"{task} dormant units, %"], "rows": rows}


def panel(task: Task, units: Units) -> Panel:
    """Return the mean curve of every arm."""

    def mean(of: str) -> list[tuple[float, float]]:
        curves = [unit["curve"] for unit in units[of]]
        return [(float(points[0][0]), fmean(value for _, value in points)) for points in zip(*curves, strict=True)]

    before = mean("middle")
    lines = [Line(arm, [*(before if arm == "base" else before[-1:]), *mean(arm)]) for arm in units if arm != "middle"]
    within = (0.0, task.steps * 1.02, *spanned([y for line in lines for _, y in line.points], 1e-3))
    return Panel(f"{task.algorithm.upper()}, {task.environment}", "steps of the environment", "return", lines, within)


def markdown(table: dict[str, Any]) -> str:
    """Return a table as the page of results has it."""
    return OfTables({"tables": {"": json.loads(as_json(table), parse_float=Figure)}}).tables()[""]


def gathered(tasks: Sequence[Task], seeds: Sequence[int], arms: Sequence[str], out: Path) -> dict[str, Any]:
    """Return the study of the seeds that are finished, and write its plot.

    Raises:
        UserError: None is.
    """
    tables, values, panels, seconds = {}, {}, [], 0.0
    for task in tasks:
        names = ("middle", *(arm for arm in arms if arm in RESETS[task.algorithm]))
        found = {
            seed: [finished(out / task.name / f"seed-{seed}" / f"{name}.json", task) for name in names]
            for seed in seeds
        }
        whole = {seed: [unit for unit in of if unit] for seed, of in found.items() if all(of)}
        if not whole:
            continue
        units: Units = {name: [of[i] for of in whole.values()] for i, name in enumerate(names)}
        tables[task.name] = returns(task.name, units)
        tables[f"{task.name}, networks"] = networks(task.name, units)
        values[task.name] = {
            arm: {name: [round(measure(unit["curve"]), 3) for unit in units[arm]] for name, measure in MEASURES.items()}
            for arm in units
        } | {"seeds": [*whole]}
        panels.append(panel(task, units))
        seconds += sum(unit["seconds"] for of in units.values() for unit in of)
    if not tables:
        raise UserError(f"{out}: no seed of {', '.join(task.name for task in tasks)} is finished in every arm")
    (out / "curves.svg").write_text(svg([panels], palette(arms, {"base"})), encoding="utf-8")
    return {
        "date": date.today().isoformat(),
        "command": f"python scripts/{shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}",
        "machine": platform.processor() or platform.machine(),
        "fire_llm": __version__,
        "torch": torch.__version__.partition("+")[0],
        "gymnasium": gymnasium.__version__,
        "stable_baselines3": stable_baselines3.__version__,
        "minutes": round(seconds / 60),
        "settings": {task.name: asdict(task) for task in tasks},
        "values": values,
        "tables": tables,
    }


def quick(task: Task) -> Task:
    """Return a task so small that it shows only whether everything works."""
    return replace(task, steps=160, evaluate_every=40, episodes=2, replay_ratio=1, learning_starts=40, width=16)


def main(argv: Sequence[str] | None = None) -> None:
    """Train the units that are not finished, gather the study, and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="of the units and what is gathered")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="N", help="of every task (1 2 3)")
    for name, known in (("tasks", [*TASKS]), ("arms", [*ARMS])):
        words = f"of {', '.join(known)}"
        parser.add_argument(f"--{name}", nargs="+", choices=known, default=known, metavar="NAME", help=words)
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="one thread each (1)")
    parser.add_argument("--table", action="store_true", help="train nothing: gather the seeds that are finished")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything; the figures mean nothing")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    tasks = [quick(TASKS[name]) if args.quick else TASKS[name] for name in args.tasks]
    jobs = [] if args.table else [(task, seed, args.arms, args.out) for task in tasks for seed in args.seeds]
    try:
        if args.processes > 1:
            with ProcessPoolExecutor(args.processes, get_context("spawn")) as pool:
                for job in [pool.submit(train, *job) for job in jobs]:
                    job.result()
        else:
            for job in jobs:
                train(*job)
        study = gathered(tasks, args.seeds, args.arms, args.out)
    except UserError as fault:
        sys.exit(str(fault))
    (args.out / "study.json").write_text(as_json(study) + "\n", encoding="utf-8")
    for name, table in study["tables"].items():
        print(f"**{name}**\n\n{markdown(table)}\n")


if __name__ == "__main__":
    main()
