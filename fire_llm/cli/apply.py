"""`fire-llm apply`: apply a reset to a checkpoint and save the result as a new one."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fire_llm.cli.launching import command_line, device_launch
from fire_llm.cli.parser import add_device, add_native, path
from fire_llm.core.launch import REPEAT, start
from fire_llm.core.ranks import first_rank, launched

if TYPE_CHECKING:
    from fire_llm.resets import ResetReport

EXAMPLES = (
    "fire-llm apply openai-community/gpt2 gpt2-fire --dry-run",
    "fire-llm apply trained trained-fire --layers 4-11 --exclude 'self_attn\\.[qk]_proj' --measure-on notes.txt",
    "fire-llm apply microsoft/resnet-18 resnet-fire --role conv --iterations 10",
    "fire-llm apply trained trained-shrunk --method shrink_perturb --shrink 0.5 --init step-0",
)


def add_options(verb: ArgumentParser) -> None:
    """Add the verb's arguments and options."""
    verb.add_argument("src", type=path, metavar="SRC", help="checkpoint folder or Hub id; never written to")
    verb.add_argument("dst", type=path, metavar="DST", help="folder to make")
    verb.add_argument("--method", default="fire", metavar="NAME", help="the reset (fire)")
    verb.add_argument("--iterations", type=int, metavar="N", help="Newton–Schulz steps (5)")
    verb.add_argument("--solver", metavar="NAME", help="newton-schulz (default) or polar, the true projection")
    verb.add_argument("--tolerance", type=float, metavar="T", help="relative distance polar may leave (1e-3)")
    verb.add_argument("--scale", metavar="NAME", help="sqrt (default), keep-norm or none")
    verb.add_argument("--strength", type=float, metavar="C", help="how far fire goes from the old weights, 0 to 1 (1)")
    verb.add_argument("--shrink", type=float, metavar="C", help="share of the initial weights in shrink_perturb (0.5)")
    verb.add_argument(
        "--role",
        action="append",
        metavar="ROLE",
        help="add a role to attention and mlp: conv, ssm, lm_head (repeatable)",
    )
    verb.add_argument(
        "--include", action="append", metavar="REGEX", help="only names in which it is found (repeatable)"
    )
    verb.add_argument(
        "--exclude", action="append", metavar="REGEX", help="leave names in which it is found (repeatable)"
    )
    verb.add_argument("--layers", metavar="N-M", help="only these layers, counted from 0: 4, 4-11 or 0-3,8")
    verb.add_argument(
        "--dtype", default="keep", metavar="NAME", help="of the result: fp32 (or float32), bf16, fp16, keep (keep)"
    )
    verb.add_argument(
        "--init", type=path, metavar="CKPT", help="initial weights, for shrink_perturb, full_reset, initial_norm"
    )
    verb.add_argument("--seed", type=int, metavar="N", help="draw the initial weights from the config and this seed")
    verb.add_argument("--revision", metavar="REV", help="branch, tag or commit, where SRC is a Hub id")
    add_native(verb)
    add_device(verb)
    verb.add_argument("--num-processes", type=int, metavar="N", help="processes that share the work (one)")
    verb.add_argument("--push-to-hub", metavar="REPO", help="also upload the result to owner/name")
    verb.add_argument(
        "--measure-on", nargs="+", default=[], type=path, metavar="TEXT",
        help="corpora or files: measure the loss on them, before and after; loads the whole model",
    )  # fmt: skip
    verb.add_argument(
        "--max-tokens", type=int, metavar="N", help="of each such text the first documents, N tokens at most"
    )
    verb.add_argument("--context", type=int, metavar="N", help="tokens read at once there (the model's longest)")
    verb.add_argument("--no-measures", action="store_true", help="do not measure the matrices before and after")
    verb.add_argument("--dry-run", action="store_true", help="print what would be done, read and write no weights")


def main(arguments: Namespace) -> int | None:
    """Reset a checkpoint on the disk: here, or on the ranks of a launch."""
    from fire_llm.checkpoint import check_repository, reset_checkpoint

    if arguments.push_to_hub is not None:
        check_repository(arguments.push_to_hub)
    if not arguments.dry_run and (launch := device_launch(arguments)) is not None:
        code = start(launch, command_line(arguments), "fp32", REPEAT)
        if code == 0:
            _push(arguments)
        return code
    if launched():
        from fire_llm.distributed import join

        join("gloo")
    report = reset_checkpoint(
        arguments.src,
        arguments.dst,
        arguments.method,
        init=arguments.init,
        seed=arguments.seed,
        revision=arguments.revision,
        native=arguments.native,
        device=arguments.device,
        progress=True,
        dry_run=arguments.dry_run,
        measures=not arguments.no_measures,
        dtype=arguments.dtype,
        measure_on=arguments.measure_on,
        max_tokens=arguments.max_tokens,
        context=arguments.context,
        **_reset_options(arguments),
    )
    if first_rank():
        if arguments.dry_run:
            _print_actions(report)
        _print_names(report)
        if arguments.dry_run:
            print(f"{len(report.touched)} to reset, {len(report.untouched)} to leave; nothing written (--dry-run)")
        else:
            _print_result(report, arguments)
            _push(arguments)
    return None


def _reset_options(arguments: Namespace) -> dict[str, Any]:
    """Return the options of the reset that were given."""
    from fire_llm.checkpoint.card import COMMAND_OPTIONS
    from fire_llm.resets import RESETS

    names = (*COMMAND_OPTIONS, "include", "exclude", "layers")
    options = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.role:
        method = RESETS.get(arguments.method)
        base = method.roles if method is not None and method.matrices_only else ()
        options["roles"] = list(dict.fromkeys([*base, *arguments.role]))
    return options


def _print_result(report: ResetReport, arguments: Namespace) -> None:
    """Print what was done, where the result lies, and its losses if they were measured."""
    from fire_llm.checkpoint.perplexities import loss_lines
    from fire_llm.models import find_device, pretrained_config
    from fire_llm.resets.norms import norm_warning

    copied = f"copied and hashed in {report.copying_seconds:.2f} s"
    print(f"{report}; {copied}; computed on {find_device(arguments.device).type}\nsaved: {arguments.dst}")
    if (warning := norm_warning(report.resets, report.touched)) is not None:
        print(f"warning: {warning}")
    if report.nll:
        vocabulary = pretrained_config(arguments.dst).get_text_config().vocab_size
        print("\n".join(loss_lines(report.nll, vocabulary)))


def _print_actions(report: ResetReport) -> None:
    """Print what would be done to each parameter, and why."""
    label = "; ".join(spec.label() for spec in report.resets)
    for tensor in [*report.touched, *report.untouched]:
        shape = "×".join(map(str, tensor.shape))
        action, why = ("leave", tensor.reason) if tensor.reason else ("reset", f"by {label}")
        print(f"{action}  {tensor.role:<10} {shape:>14}  {tensor.name}  {why}")


def _print_names(report: ResetReport) -> None:
    """Print the names of tensors that are kept unread, and of files that are not copied."""
    lists = {"kept as stored, not loaded by the class": report.kept_unread, "not copied": report.not_copied}
    for what, names in lists.items():
        if names:
            print(f"{what}: {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}")


def _push(arguments: Namespace) -> None:
    if arguments.push_to_hub is not None and not launched():
        from fire_llm.checkpoint import push

        print(f"pushed: {push(Path(arguments.dst), arguments.push_to_hub)}")
