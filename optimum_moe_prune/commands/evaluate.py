# SPDX-License-Identifier: Apache-2.0
"""``evaluate``: losses by domain, tasks and speed, of models or against a reference."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from optimum.commands.base import CommandInfo

from ..errors import RequestError
from . import flags
from .base import Command, Result, terminal


class EvaluateCommand(Command):
    COMMAND = CommandInfo("evaluate", "perplexity by domain, tasks and speed, of models or against a reference")
    shares = True
    examples = (
        "--model ./mixtral-4 --reference ./mixtral --data held-out.jsonl",
        "--model ./mixtral-4 --reference ./mixtral --tasks arc_easy,piqa --output results.json",
    )

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        flags.add_model(parser, several=True)
        flags.add_compute(parser, "the models", stream=False)
        parser.add_argument(
            "--reference", metavar="DIR|ID", help="the model to compare with, usually the unpruned one"
        )
        parser.add_argument("--data", action="append", metavar="FILE", help=f"{flags.DATA}; may be repeated")
        flags.add_settings(parser, ["batch_size", "max_length", *flags.READING])
        group = parser.add_argument_group("speed")
        group.add_argument(
            "--speed",
            action="store_true",
            help="measure generation and peak memory, each model in a process of its own, in turn with the reference",
        )
        group.add_argument("--new-tokens", type=int, metavar="N", help="tokens to generate (default 64)")
        group = parser.add_argument_group("as a draft")
        group.add_argument(
            "--draft",
            action="store_true",
            help="measure the models as drafts of the reference in assisted generation, on prompts from --data",
        )
        group.add_argument(
            "--draft-tokens",
            type=int,
            metavar="N",
            help="tokens that a draft proposes at once (default: as transformers does)",
        )
        _add_tasks(parser)
        group = parser.add_argument_group("results")
        group.add_argument("--output", metavar="FILE.json", help="write the results")
        group.add_argument("--overwrite", action="store_true", help="replace earlier results")
        group.add_argument("--markdown", action="store_true", help="print tables in Markdown")
        group.add_argument(
            "--update-card", action="store_true", help="put the results into the pruned checkpoint and its model card"
        )
        flags.add_common(parser)

    @staticmethod
    def check(args: argparse.Namespace) -> None:
        _check(args)

    @staticmethod
    def work(args: argparse.Namespace) -> Result:
        from ..evaluation.compare import compare
        from ..evaluation.comparison import Comparison
        from ..names import EVALUATION_NAME
        from ..publishing.card import write_card
        from ..storage.files import check_file
        from .inputs import held_out_samples

        compute = flags.compute_of(args)
        if args.output is not None:
            check_file(args.output, ".json", args.overwrite, Comparison.load)
        reference = None if args.reference is None else replace(flags.source_of(args, args.reference), revision=None)
        models = [flags.source_of(args, path) for path in args.model]
        max_length = 2048 if args.max_length is None else args.max_length
        comparison = compare(
            models,
            held_out_samples(args, models[0], args.data, "--data", max_length) if args.data else None,
            reference=reference,
            tasks=[name for names in args.tasks or [] for name in names.split(",")],
            speed=args.speed,
            batch_size=8 if args.batch_size is None else args.batch_size,
            max_length=max_length,
            new_tokens=64 if args.new_tokens is None else args.new_tokens,
            draft=args.draft,
            draft_tokens=args.draft_tokens,
            compute=compute,
            include=args.task_include or (),
            limit=args.task_limit,
            num_fewshot=args.num_fewshot,
            allow_code=args.allow_code,
            apply_chat_template=args.apply_chat_template,
            system_instruction=args.system_instruction,
            fewshot_as_multiturn=args.fewshot_as_multiturn,
            gen_kwargs=args.gen_kwargs,
        )

        def write() -> None:
            if args.output is not None:
                comparison.save(args.output)
            if args.update_card:
                folder = Path(args.model[0])
                earlier = folder / EVALUATION_NAME
                whole = Comparison.load(earlier).updated(comparison) if earlier.is_file() else comparison
                whole.save(earlier)
                write_card(folder, folder.resolve().name)

        compute.together.once(write)
        text = comparison.markdown() if args.markdown else comparison.summary(*terminal())
        return text, {**comparison.to_dict(), "verdict": comparison.verdict()}


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tasks of lm-evaluation-harness")
    group.add_argument(
        "--tasks", action="append", metavar="T,T", help="names, papers (the two papers' table), or .yaml files"
    )
    group.add_argument("--task-include", action="append", metavar="DIR", help="folder of further tasks")
    group.add_argument("--task-limit", type=int, metavar="N", help="documents of each task at most")
    group.add_argument("--num-fewshot", type=int, metavar="N", help="examples in a prompt (default: the task's own)")
    group.add_argument("--allow-code", action="store_true", help="let tasks run programs that the model writes")
    group.add_argument(
        "--apply-chat-template",
        nargs="?",
        const=True,
        default=False,
        metavar="NAME",
        help="prompts as chats, by the tokenizer's template, or by one of its templates",
    )
    group.add_argument("--system-instruction", metavar="TEXT", help="text before every prompt; in a chat the system's")
    group.add_argument(
        "--fewshot-as-multiturn",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="in a chat, examples as turns of their own (the default) or all in the user's turn",
    )
    group.add_argument(
        "--gen-kwargs", metavar="K=V,K=V", help="settings of generation over the tasks' own, as temperature=0.6"
    )


def _check(args: argparse.Namespace) -> None:
    """Refuse flags that exclude one another."""
    from ..names import PLAN_NAME

    if not args.data and not args.tasks and not args.speed:
        raise RequestError("there is nothing to evaluate on; name texts (--data FILE), --tasks or --speed.")
    given = {
        "--task-include": args.task_include,
        "--task-limit": args.task_limit is not None,
        "--num-fewshot": args.num_fewshot is not None,
        "--allow-code": args.allow_code,
        "--apply-chat-template": args.apply_chat_template,
        "--system-instruction": args.system_instruction,
        "--no-fewshot-as-multiturn": not args.fewshot_as_multiturn,
        "--gen-kwargs": args.gen_kwargs,
    }
    if not args.data and (idle := flags.given_reading(args)):
        raise RequestError(f"{idle[0]} is for --data, and none is named.")
    if not args.tasks and (idle := [flag for flag, value in given.items() if value]):
        raise RequestError(f"{idle[0]} is for --tasks, and none are named.")
    for flag, value, least in (
        ("--batch-size", args.batch_size, 1),
        ("--new-tokens", args.new_tokens, 2),
        ("--draft-tokens", args.draft_tokens, 1),
    ):
        if value is not None and value < least:
            raise RequestError(f"{flag} is {value}; it must be at least {least}.")
    if not args.speed and not args.draft and args.new_tokens is not None:
        raise RequestError("--new-tokens is for --speed and --draft, and neither is asked for.")
    if not args.draft and args.draft_tokens is not None:
        raise RequestError("--draft-tokens is for --draft, which is not asked for.")
    if args.draft and (not args.data or args.reference is None):
        raise RequestError("--draft needs the model it drafts for (--reference) and prompts (--data FILE).")
    if args.overwrite and args.output is None:
        raise RequestError("--overwrite is for --output, and none is named.")
    named = [Path(name) for name in (*args.model, *([args.reference] if args.reference else []))]
    if twice := [name for name in named if named.count(name) > 1]:
        raise RequestError(f"{twice[0]} is named twice.")
    if args.revision is not None and len(args.model) > 1:
        raise RequestError("--revision is for one model, and several are named.")
    if args.json and args.markdown:
        raise RequestError("--json and --markdown exclude each other.")
    if args.update_card:
        for folder in args.model:
            if not (Path(folder) / PLAN_NAME).is_file():
                raise RequestError(f"--update-card: {folder} is no folder of a checkpoint that this package pruned.")
        if len(args.model) > 1 or args.reference is None:
            raise RequestError("--update-card takes one pruned model, and --reference, the original.")
