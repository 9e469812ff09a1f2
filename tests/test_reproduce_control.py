"""scripts/reproduce_control.py: what it counts, what a reset does to an agent, and that it goes on where it stopped."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPT = "reproduce_control"

for package in ("stable_baselines3", "minatar", "mujoco"):
    pytest.importorskip(package)


def task(script, algorithm: str):
    return script.quick(next(task for task in script.TASKS.values() if task.algorithm == algorithm))


def test_a_curve_is_summed_up_by_its_end_and_its_area(script):
    curve = [(10, 1.0), (20, 2.0), (30, 6.0), (40, 7.0)]
    assert script.last(curve) == 5 and script.area(curve) == 4


def test_differences_are_paired_by_seed(script):
    # Differences 1, 2, 3: mean 2, and Student's interval is 4.303 * 1 / sqrt(3) to each side.
    cell = script.as_json({"cell": script.paired([11, 22, 33], [10, 20, 30], 4)})
    assert '{"mean": 2.0000, "half": 2.4841}' in cell
    assert script.paired([1], [2], 3) is None
    assert json.loads(script.as_json(script.spread([1, 2, 3], 1))) == {"mean": 2, "sd": 1}


@pytest.mark.parametrize(
    ("algorithm", "arm"),
    [(a, arm) for a in ("dqn", "sac") for arm in ("base", "full-reset", "s-and-p", "fire", "fire-keep-norm")]
    + [("dqn", "linear-reset")],
)
def test_an_arm_does_to_an_agent_what_it_says(script, algorithm, arm):
    agent = script.agent(task(script, algorithm), seed=1)
    initial = deepcopy(agent.policy)
    agent.learn(44)
    with torch.no_grad():
        for parameter in agent.policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    before, steps = deepcopy(agent.policy), agent.replay_buffer.size()
    callback = script.FireCallback(algorithm, arm, initial, log_temperature=-1.5)
    callback.init_callback(agent)
    callback.on_training_start({}, {})
    for name, target in script.NETWORKS[algorithm].items():
        now, old, start = (dict(getattr(p, name).named_parameters()) for p in (agent.policy, before, initial))
        for key, weight in now.items():
            convolution, wide = "convolutions" in key, min(weight.shape[:2]) if weight.ndim > 1 else 0
            if arm == "base":
                expected = old[key]
            elif arm == "full-reset" or (algorithm == "dqn" and not convolution):
                expected = start[key]
            elif arm == "s-and-p":
                expected = 0.2 * old[key] + 0.8 * start[key]
            elif arm == "linear-reset" or not wide:
                expected = old[key]
            else:  # the scalar map on the singular values of each matrix
                matrices = old[key].reshape(*old[key].shape[:2], -1).movedim(-1, 0).double()
                u, sigma, v = torch.linalg.svd(matrices, full_matrices=False)
                sigma = sigma / torch.linalg.vector_norm(sigma, dim=-1, keepdim=True)
                for _ in range(10):
                    sigma = 1.5 * sigma - 0.5 * sigma**3
                scale = (weight.shape[0] / weight.shape[1]) ** 0.5 / len(matrices)
                if arm == "fire-keep-norm":
                    scale = matrices.norm(dim=(1, 2)) / sigma.norm(dim=-1)
                    scale = scale[:, None, None]
                expected = (scale * (u * sigma[:, None]) @ v).movedim(0, -1).reshape(weight.shape)
            torch.testing.assert_close(
                weight, expected.to(weight), rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
            )
        if target and arm != "base":
            assert all(map(torch.equal, getattr(agent.policy, target).parameters(), now.values()))
    assert agent.replay_buffer.size() == steps
    cleared = algorithm == "sac"
    for optimizer in {"dqn": ["policy"], "sac": ["actor", "critic"]}[algorithm]:
        assert bool(getattr(agent, optimizer).optimizer.state) is not cleared
    if cleared:
        assert (agent.log_ent_coef.item() == -1.5) is (arm != "base")
    assert 0 <= callback.diagnosis["dormant"] <= 1 <= callback.diagnosis["srank"]


def test_it_goes_on_where_it_was_stopped(script, tmp_path, capsys):
    name = task(script, "dqn").name
    command = ["--out", str(tmp_path), "--quick", "--tasks", name, "--seeds", "1", "--arms", "base", "fire"]
    script.main(command)
    table = capsys.readouterr().out
    assert "| fire |" in table and "| before the reset |" in table and (tmp_path / "curves.svg").exists()
    study = json.loads((tmp_path / "study.json").read_text())
    lost = tmp_path / name / "seed-1" / "fire.json"
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*/*.json") if path != lost}
    lost.unlink()
    script.main(command)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert json.loads((tmp_path / "study.json").read_text())["values"] == study["values"]
    with pytest.raises(SystemExit, match="made with other settings"):
        script.main([part for part in command if part != "--quick"])


def test_the_pages_callback_resets_once(script):
    page = (ROOT / "docs" / "control.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1].replace("10_000", "110").replace("5_000", "105")
    found: dict = {}
    exec(code, found)
    agent, callback = found["agent"], found["FireCallback"](at=111)
    callback.init_callback(agent)
    for agent.num_timesteps, acts in ((110, False), (111, True), (112, False)):
        before = agent.critic.qf0[0].weight.clone()
        assert callback.on_step()
        assert torch.equal(before, agent.critic.qf0[0].weight) is not acts
        if acts:
            sigma = torch.linalg.svdvals(agent.critic.qf0[0].weight)
            assert sigma.max().item() == pytest.approx((256 / 4) ** 0.5, rel=1e-3)
            assert all(map(torch.equal, agent.critic.parameters(), agent.critic_target.parameters()))
