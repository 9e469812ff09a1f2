"""The gradient of the loss over the batches to come, for resets that read it."""

from __future__ import annotations

from typing import Any

from fire_llm.core.errors import UserError
from fire_llm.evaluation.precision import evaluating
from fire_llm.resets import ResetSpec


def gather_gradient(trainer: Any, specs: list[ResetSpec]) -> None:
    """Compute G into the parameters' `.grad`: from zero, G ← (1−α)·G + α·g over the whole batches of the next steps.

    The weights do not change. In evaluation mode dropout draws nothing, and batches are read by their number, so that
    the order of the data, its hash and all generators stay as they are. Ranks average, and hold the same G. A batch
    costs as much as in training, without the update.

    Args:
        trainer: A `ContinualTrainer` that has begun to train.
        specs: Resets, some of which read the gradient. Their options `batches` and `alpha` are 1 and 1.0 where they are
            not given: the next step's gradient alone.

    Raises:
        UserError: Two of them ask for different `batches` or `alpha`, the model is sharded (FSDP2), or samples have no
            numbers.
    """
    settings = {(s.options.get("batches", 1), s.options.get("alpha", 1.0)) for s in specs if s.needs_gradient}
    if len(settings) > 1:
        raise UserError(f"resets of one arm share a gradient: give them the same batches and alpha, not {settings}")
    if trainer.is_fsdp_enabled:
        raise UserError("a reset that reads gradients needs them whole, and FSDP2 shards them: train replicas")
    if trainer.order != "numbered":
        raise UserError(
            "a reset that reads gradients needs the batches to come by their number: give a train_dataset that returns "
            "sample i for any i, without a length, or call backward() on data of your choice and then apply_reset"
        )
    [(batches, alpha)] = settings
    args, model = trainer.args, trainer.model
    model.zero_grad()
    micro, accumulation = args.train_batch_size, args.gradient_accumulation_steps
    with evaluating(model):
        for step in range(trainer.state.global_step, trainer.state.global_step + batches):
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(1 - alpha)
            inputs = []
            for number in range(accumulation):
                first = trainer.first_sample(step) + (number * args.world_size + args.process_index) * micro
                samples = [trainer.train_dataset[i] for i in range(first, first + micro)]
                inputs.append(trainer._prepare_inputs(trainer.data_collator(samples)))
            items = trainer.count_items(inputs)
            for batch in inputs:
                with trainer.compute_loss_context_manager():
                    loss = trainer.compute_loss(trainer.model_wrapped, batch, num_items_in_batch=items)
                trainer.accelerator.backward(alpha * loss)
