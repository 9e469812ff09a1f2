"""A training run of twelve steps, and the same by hand."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from fire_llm import ContinualTrainer
from fire_llm.training import ContinualArguments

CONTEXT, MICRO, ACCUMULATION, STEPS = 16, 2, 3, 12


class Samples(torch.utils.data.Dataset):
    """Give sample i of 17 tokens as a function of i."""

    def __getitem__(self, i):
        tokens = torch.randint(0, 97, (CONTEXT + 1,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": tokens[:-1], "labels": tokens[1:]}


def arguments(folder, **changes):
    settings = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": MICRO,
        "gradient_accumulation_steps": ACCUMULATION, "learning_rate": 1e-2, "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 1e-3}, "warmup_steps": 3, "weight_decay": 0.1, "adam_beta2": 0.95,
        "max_grad_norm": 1.0, "optim": "adamw_torch", "logging_steps": 1, "save_steps": 4, "save_strategy": "steps",
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    return ContinualArguments(**{**settings, **changes})


def train(model, folder, resume=None, callbacks=(), sets=None, data=None, given=None, **changes):
    """Train a model; `given` is what else the trainer is given, `changes` are its arguments."""
    trainer = ContinualTrainer(model, arguments(folder, **changes), data or Samples(), sets, callbacks, **given or {})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def by_hand(model):
    """Train as the trainer should, in plain PyTorch; return the mean NLL over each step's tokens."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    means, i = [], 0
    model.train()
    for step in range(STEPS):
        if step < 3:
            lr = 1e-2 * step / 3
        else:
            lr = 1e-3 + (1e-2 - 1e-3) * 0.5 * (1 + math.cos(math.pi * (step - 3) / (STEPS - 3)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = [Samples()[i + j] for j in range(MICRO * ACCUMULATION)]
        i += len(batch)
        ids, labels = (torch.stack([b[k] for b in batch]) for k in ("input_ids", "labels"))
        loss = F.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        means.append(float(loss.detach()))
    return means


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}  # fmt: skip

HSDP = {
    **FSDP2, "ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
}  # fmt: skip


def optimizer_state(checkpoint):
    """Return the optimizer's state in a checkpoint, whole, as `torch.optim` gives it."""
    from fire_llm.distributed.shards import whole_tensors

    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    shards = checkpoint / "optimizer"
    for name, tensor in whole_tensors(shards).items() if shards.is_dir() else ():
        number, _, key = name.partition(".")
        state["state"].setdefault(int(number), {})[key] = tensor
    return state
