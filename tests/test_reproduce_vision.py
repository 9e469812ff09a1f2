"""scripts/reproduce_vision.py: what it trains is what its settings say, and a run that was cut off goes on."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
import torch
from scipy import stats

SCRIPT = "reproduce_vision"


@pytest.fixture
def folder(tmp_path):
    """Write an MNIST-like folder of 200 training and 60 test images, whose class is where they are bright."""
    data = tmp_path / "data"
    data.mkdir()
    rng = np.random.default_rng(0)
    for stem, count, suffix in (("train", 200, ""), ("t10k", 60, ".gz")):
        labels = np.arange(count) % 10
        images = rng.integers(0, 200, (count, 8, 8))
        images[np.arange(count), labels // 2, labels % 2 * 4] = 255
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            raw = head + array.astype(np.uint8).tobytes()
            (data / f"{stem}-{kind}-ubyte{suffix}").write_bytes(gzip.compress(raw) if suffix else raw)
    return data


def units(output):
    return {f.name: f.read_bytes() for f in sorted((output / "units").glob("*.json"))}


def without_time(found):
    return {name: json.loads(text.replace(b"cpu_seconds", b"_")) for name, text in found.items()}


def stripped(found):
    plain = without_time(found)
    for result in plain.values():
        for phase in result["phases"]:
            phase.pop("_")
    return plain


def test_a_run_that_was_cut_off_goes_on_and_ends_as_one_that_was_not(script, folder, tmp_path, monkeypatch, capsys):
    arms = ["base", "fresh", "dash", "fire", "l2-init", "redo", "muon", "injection"]
    command = ["--data", str(folder), "--quick", "--networks", "mlp", "--seeds", "3", "--arms", *arms]
    command += ["--settings", "warm-start", "continual"]
    assert script.main([*command, "--output", str(tmp_path / "whole")]) == 0
    plain, calls = script.train, []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    monkeypatch.setattr(script, "train", dies)
    with pytest.raises(KeyboardInterrupt):
        script.main([*command, "--output", str(tmp_path / "cut")])
    some = units(tmp_path / "cut")
    assert 0 < len(some) < 16
    assert script.main([*command, "--output", str(tmp_path / "cut"), "--report"]) == 0 and len(calls) == 7
    told = json.loads((tmp_path / "cut" / "vision.json").read_text())
    assert told["unfinished"] == 16 - len(some) and len(told["units"]) == len(some)
    monkeypatch.setattr(script, "train", plain)
    assert script.main([*command, "--output", str(tmp_path / "cut")]) == 0
    found = units(tmp_path / "cut")
    assert len(found) == 16 and all(found[name] == text for name, text in some.items())
    assert stripped(found) == stripped(units(tmp_path / "whole"))
    assert not [*(tmp_path / "cut" / "units").glob("*.begun*")] and "**continual, mlp**" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        script.main(["--quick", "--output", str(tmp_path / "cut"), "--no-diagnostics", "--data", str(folder)])
    assert "its units are of another diagnostics" in capsys.readouterr().err


def test_phases_are_parts_of_the_data_and_old_data_stays(script):
    x = torch.randn(100, 1, 8, 8)
    images = script.Images("made", x, torch.arange(100) % 10, x[:50], torch.arange(50) % 10)
    size = script.SIZES["paper"]

    def of(setting):
        return script.phases(script.Unit(setting, "mlp", 1, "base"), images, size)

    (part, labels, epochs, _), (everything, all_labels, fewer, tests) = of("warm-start")
    assert (len(part), epochs, len(everything), fewer, len(tests)) == (10, 1000, 100, 100, 50)
    assert torch.equal(labels, images.y[part]) and torch.equal(all_labels, images.y)
    noisy, *_ = of("noisy-start")
    assert len(noisy[0]) == 50 and noisy[2] == 200 and float((noisy[1] != images.y[noisy[0]]).float().mean()) > 0.3
    assert [len(p[0]) for p in of("continual")] == [*range(10, 101, 10)]
    classes = of("class-incremental")
    for number, (part, labels, _, held) in enumerate(classes, 1):
        assert len(labels.unique()) == number and set(images.test_y[held].tolist()) == set(labels.tolist())
        assert number == 1 or set(classes[number - 2][0].tolist()) < set(part.tolist())


def test_differences_are_paired_by_seed_with_students_interval(script):
    def result(arm, seed, test):
        phase = {"train": 99.0, "test": test, "after_reset": 10.0}
        return {"setting": "warm-start", "network": "mlp", "seed": seed, "arm": arm, "diagnostics": None,
                "phases": [phase, phase]}  # fmt: skip

    values = {"base": [80.0, 82.0, 81.0], "fresh": [84.0, 85.0, 84.5], "fire": [85.0, 86.5, 85.0]}
    found = script.tables([result(arm, s, v) for arm, own in values.items() for s, v in enumerate(own)])
    rows = {row[0]: row for row in found["warm-start, mlp"]["rows"]}
    gaps = np.subtract(values["fire"], values["base"])
    half = stats.t.ppf(0.975, 2) * stats.sem(gaps)
    assert rows["fire"][2] == {"mean": round(float(gaps.mean()), 1), "half": round(float(half), 1)}
    assert rows["base"][1] == {"mean": 81.0, "sd": 1.0} and rows["base"][2] is None


def test_muon_takes_torchs_steps_in_finer_numbers_and_flattens_kernels(script):
    torch.manual_seed(0)
    tall, wide = (torch.nn.Parameter(torch.randn(shape)) for shape in ((24, 10), (6, 20)))
    kernel = torch.nn.Parameter(wide.detach().clone().view(6, 5, 2, 2))
    others = [torch.nn.Parameter(p.detach().clone()) for p in (tall, wide)]
    ours = script.Muon([tall, wide, kernel], 0.02)
    theirs = torch.optim.Muon(others, 0.02, weight_decay=0.0)
    for _ in range(3):
        for p, q in zip((tall, wide), others, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        kernel.grad = wide.grad.view_as(kernel)
        ours.step()
        theirs.step()
    for p, q in zip((tall, wide), others, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-3)  # 3 steps of up to 0.03, in bf16 there
    assert torch.equal(kernel.flatten(1), wide)


def test_cifar_is_read_in_its_binary_form_and_pickles_are_refused(script, tmp_path):
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (6, 10, 3073)).astype(np.uint8)
    rows[..., 0] %= 10
    for name, part in zip([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], rows, strict=True):
        (tmp_path / f"{name}.bin").write_bytes(part.tobytes())
    images = script.load(tmp_path)
    assert images.x.shape == (50, 3, 32, 32) and torch.equal(images.test_y, torch.from_numpy(rows[5, :, 0].astype(int)))
    pixels = rows[:5, :, 1:].reshape(50, 3, 32, 32).astype(float)
    np.testing.assert_allclose(images.x.numpy(), (pixels - pixels.mean()) / pixels.std(), atol=1e-4)
    for file in tmp_path.iterdir():
        file.rename(file.with_suffix(""))
    with pytest.raises(script.UserError, match="binary version"):
        script.load(tmp_path)
