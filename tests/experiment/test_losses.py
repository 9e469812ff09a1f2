"""What trains today gives the losses of tests/references/losses.json: no change alters training unnoticed."""

from __future__ import annotations

import json
import shutil

from support.losses import FILE, apart, losses, wider_recipe

from fire_llm import load_recipe, run_recipe


def test_losses_and_held_out_nlls_are_those_of_the_reference(finished, texts, tmp_path):
    """If a change of numerics is wanted, `python scripts/write_losses.py --write` takes it in."""
    reference = json.loads(FILE.read_text())
    folder = shutil.copytree(finished[0], tmp_path / "wider")  # whose arms are not trained again
    found = losses(run_recipe(load_recipe(wider_recipe(texts)), folder, progress=False))
    far = {
        name: (was, now)
        for name, (was, now, difference) in apart(found, reference["stages"]).items()
        if difference > reference["tolerance"]
    }
    assert not far, f"{len(far)} numbers are not those of {FILE.name}, reference and found: {far}"
