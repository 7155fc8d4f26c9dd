# SPDX-License-Identifier: Apache-2.0
"""Parsers that say in one line what is wrong with a command, with what was probably meant. Nothing is guessed.

argparse prints the whole usage, takes the last of two contradicting values and lets flags be abbreviated, so that a
new flag changes what an old command means. Here the words of a command are looked at first, and argparse parses them.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ..environment import check_platform, versions_line
from ..errors import RequestError
from .shown import is_spokesman, prepare_streams, show, show_error

_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212"  # what text processors make of - and --
_OUTPUT = {"-o", "--out", "--output", "--output-dir", "--outdir", "--output-path", "--save-dir", "--target"}
_SYNONYMS = {
    "--batch": "--batch-size",
    "--calibration-data": "--calibration",
    "--calibration-dataset": "--calibration",
    "--compression-ratio": "--sparsity",
    "--data": "--calibration",
    "--dataset": "--calibration",
    "--datasets": "--calibration",
    "--experts": "--num-experts",
    "--force": "--overwrite",
    "--gpu": "--device",
    "--keep": "--num-experts",
    "--precision": "--dtype",
    "--prune-ratio": "--sparsity",
    "--pruning-ratio": "--sparsity",
    "--ratio": "--sparsity",
    "--recipe": "--config",
    "--repo": "--push-to-hub",
    "--seq-len": "--max-length",
    "--seqlen": "--max-length",
    "--torch-dtype": "--dtype",
    "--upload": "--push-to-hub",
    "--verbose": "--debug",
}
"""What other tools call a flag."""
_COMMAND_SYNONYMS = {
    "calibrate": "score",
    "compress": "run",
    "eval": "evaluate",
    "export-plan": "export",
    "measure": "sensitivity",
    "methods": "list methods",
    "models": "list models",
    "plot": "report",
    "prune": "run",
    "select": "plan",
    "stats": "score",
    "test": "evaluate",
}


class Parser(argparse.ArgumentParser):
    """A command's parser.

    Attributes:
        siblings: The parsers of the other commands, by name.
    """

    siblings: Mapping[str, argparse.ArgumentParser] = {}

    def __init__(self, **settings: Any) -> None:
        # `--help` stands with the general flags, at the end.
        super().__init__(**{**settings, "add_help": False})
        self.register("type", int, whole_number)
        in_our_way(self)

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        """As argparse does it, but that nothing is left over, and a mistake ends the process with one line."""
        words = list(sys.argv[1:] if args is None else args)
        try:
            return super().parse_known_args(self.checked(words), namespace)
        except RequestError as error:
            if is_spokesman():
                show_error(str(error))
            sys.exit(2)

    def checked(self, words: list[str]) -> list[str]:
        """The words as argparse may have them.

        Raises:
            RequestError: If one of them is wrong by itself.
        """
        check_words(self, words)
        return words

    def error(self, message: str) -> NoReturn:
        """Refuse what argparse does not take."""
        missing = re.fullmatch(r"the following arguments are required: (.*)", message)
        if missing is None:
            raise RequestError(re.sub(r"^argument (?:[^:]*/)?(?:(-[^:/]+: )|[^:]+: )", r"\1", message))
        names = missing[1].split(", ")
        shown = [spelled(self, name) for name in names]
        example = f" For example: {self.epilog.splitlines()[1].strip()}" if self.epilog else ""
        raise RequestError(
            f"{listed(shown)} {'is' if len(shown) == 1 else 'are'} missing.{example % {'prog': self.prog}}"
        )

    def print_help(self, file: Any = None) -> None:
        if file is None:
            show(self.format_help().rstrip("\n"))
        else:
            super().print_help(file)


class CommandsParser(Parser):
    """The parser whose first word is a command; ``--debug`` and ``--json`` may stand before it."""

    def add_subparsers(self, **settings: Any) -> Any:
        """The commands' parsers, all in our way and known to each other."""
        added = super().add_subparsers(
            **{"title": "commands", "metavar": "COMMAND", "parser_class": Parser, **settings}
        )
        self.siblings = added.choices
        return added

    def checked(self, words: list[str]) -> list[str]:
        prepare_streams()
        leading = words[: next((i for i, word in enumerate(words) if not word.startswith("-")), len(words))]
        if {"-h", "--help", "--version"} & set(leading):
            return words
        check_platform()
        commands = list(self.siblings)
        rest = words[len(leading) :]
        for flag in leading:
            if flag not in ("--debug", "--json"):
                command = next((word for word in rest if word in commands), None)
                place = f"flags come after the command: {command} {flag}" if command else "name a command first"
                raise RequestError(f"{flag} is not known here; {place} ({', '.join(commands)}).")
        if not rest:
            raise RequestError(f"a command is missing: {listed(commands, 'or')}. Begin with: {self.prog} --help")
        if rest[0] not in commands:
            raise RequestError(_unknown_command(rest[0], commands))
        return [rest[0], *leading, *rest[1:]]


class _Version(argparse.Action):
    """Show versions and end."""

    def __call__(self, *_: object, **__: object) -> None:
        show(versions_line())
        sys.exit(0)


def whole_number(text: str) -> int:
    """What ``type=int`` stands for here.

    Raises:
        argparse.ArgumentTypeError: If it is none.
    """
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a whole number, and is {text!r}.") from error


def in_our_way(parser: argparse.ArgumentParser) -> None:
    """How every parser here reads and shows itself."""
    parser.allow_abbrev = False
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


def add_general(parser: argparse.ArgumentParser, group: Any) -> None:
    """``--help``, where it is not there already, and ``--version``."""
    if "--help" not in flags_of(parser):
        group.add_argument("-h", "--help", action="help", help="show this and end")
    group.add_argument("--version", nargs=0, action=_Version, help="show versions and end")


def describe(parser: argparse.ArgumentParser, description: str, examples: Sequence[str]) -> None:
    """What help shows around the flags: a short usage, what the command does, and examples that work.

    Args:
        parser: The parser, with all its flags.
        description: What the command does.
        examples: What follows the program's name and the command; the first is shown where something is missing.
    """
    needed = [
        f"{action.option_strings[0]} {action.metavar}" if action.option_strings else str(action.metavar or action.dest)
        for action in sorted(actions_of(parser), key=lambda action: not action.option_strings)
        if action.required
    ]
    commands = ["COMMAND"] if isinstance(parser, CommandsParser) else []
    parser.usage = " ".join(["%(prog)s", *needed[:-1], "[flags]", *needed[-1:], *commands])
    parser.description = f"{description[:1].upper()}{description[1:].rstrip('.')}."
    lines = [f"  %(prog)s {example}" for example in examples]
    parser.epilog = "\n".join(["example:" if len(lines) == 1 else "examples:", *lines]) if lines else None


def actions_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The flags and positional arguments of a parser; argparse has no other way of asking."""
    return list(parser._actions)


def flags_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The flags of a parser by each of their names."""
    return {name: action for action in actions_of(parser) for name in action.option_strings}


def spelled(parser: argparse.ArgumentParser, name: str) -> str:
    """A flag with the placeholder of its value, as in help."""
    action = flags_of(parser).get(name)
    return name if action is None or action.metavar is None else f"{name} {action.metavar}"


def listed(words: Iterable[str], last: str = "and") -> str:
    """Words as a sentence lists them."""
    *before, end = words
    return f"{', '.join(before)} {last} {end}" if before else end


def nearest(word: str, known: Iterable[str], count: int = 1) -> list[str]:
    """The known words that were probably meant, if any: those that begin like it, or are spelled nearly so."""
    plain = {name.lower().strip("-").replace("-", ""): name for name in known}
    bare = word.lower().strip("-").replace("_", "").replace("-", "")
    if bare in plain:
        return [plain[bare]]
    begun = [name for name in plain if bare and name.startswith(bare)]
    close = difflib.get_close_matches(bare, plain, n=count, cutoff=0.6)
    return [plain[name] for name in (sorted(begun, key=len)[:3] or close)]


# ------------------------------------------------------------------------------------------- the words of a command


@dataclass
class _Words:
    """What was seen of a command so far: flags with their values, and words that stand alone."""

    given: dict[str, tuple[str, str]] = field(default_factory=dict)
    alone: list[tuple[str, str]] = field(default_factory=list)  # with the flag whose value stands before it


def check_words(parser: Parser, words: Sequence[str]) -> None:
    """Refuse words that a command cannot have.

    Raises:
        RequestError: If a flag is unknown, lacks its value or has none to take, a value is empty, two contradict each
            other, or a word is too much.
    """
    flags, seen = flags_of(parser), _Words()
    position, before = 0, ""
    while position < len(words):
        word = words[position]
        position += 1
        if word == "--":
            seen.alone += [(rest, "") for rest in words[position:]]
            break
        if not _is_flag(word):
            _check_alone(parser, word, flags)
            seen.alone.append((word, before))
            before = ""
            continue
        name, equals, value = word.partition("=")
        action = flags.get(name)
        if action is None:
            raise RequestError(_unknown_flag(parser, name))
        if isinstance(action, (argparse._HelpAction, _Version)):
            return  # whatever else is wrong
        before = ""
        if action.nargs == 0:
            if equals:
                raise RequestError(f"{name} takes no value, and is given {value!r}.")
            value = name
        elif not equals:
            following = words[position] if position < len(words) else None
            if following is None or following == "--" or _is_flag(following):
                if action.nargs != "?":
                    raise RequestError(_without_value(parser, name, following))
            else:
                value, before = following, name
                position += 1
        if action.nargs != 0 and not value.strip() and not (action.nargs == "?" and not equals and not before):
            raise RequestError(f"{name} is empty; is a variable unset?")
        _check_once(action, name, value, seen)
    _check_number(parser, seen, flags)


def _is_flag(word: str) -> bool:
    """Whether argparse takes a word for a flag; negative numbers and sentences are values."""
    return len(word) > 1 and word[0] == "-" and " " not in word and not re.fullmatch(r"-\d+|-\d*\.\d+", word)


def _check_alone(parser: Parser, word: str, flags: Mapping[str, argparse.Action]) -> None:
    if not word.strip():
        raise RequestError(f"the {_positional(parser)} is empty; is a variable unset?")
    first = word.split()[0]
    if first in flags:
        raise RequestError(f"{word!r} is one word with spaces; give {first} and its value without quotes around both.")
    if word[0] in _DASHES:
        meant = nearest(word.strip(_DASHES), flags)
        raise RequestError(
            f"{word} begins with a typographic dash; " + (f"did you mean {meant[0]}?" if meant else "flags with --.")
        )


def _check_once(action: argparse.Action, name: str, value: str, seen: _Words) -> None:
    if isinstance(action, argparse._AppendAction):
        return
    earlier, other = seen.given.setdefault(action.dest, (name, value))
    if other == value:
        return
    if earlier != name:
        raise RequestError(f"{earlier} and {name} exclude each other.")
    raise RequestError(f"{name} is given twice, as {other} and as {value}; give it once.")


def _check_number(parser: Parser, seen: _Words, flags: Mapping[str, argparse.Action]) -> None:
    places = sum(not action.option_strings for action in actions_of(parser))
    if len(seen.alone) <= places:
        return
    alone = [word for word, _ in seen.alone]
    for word, flag in seen.alone:
        if flag and word == "%":
            raise RequestError(
                f"{flag} takes a percentage without a space: {flag} {seen.given[flags[flag].dest][1]}%."
            )
        if flag and len(alone) > places:
            how = (
                f"repeat it for more ({flag} A {flag} B)"
                if isinstance(flags[flag], argparse._AppendAction)
                else "several numbers have commas and no spaces between them"
            )
            raise RequestError(f"{flag} takes one value, and {word!r} follows it; {how}. {_taken(parser, alone)}")
    raise RequestError(_taken(parser, alone))


def _taken(parser: Parser, alone: Sequence[str]) -> str:
    name = _positional(parser)
    many = f"{len(alone)} words stand without a flag: {listed(map(repr, alone))}"
    return f"{many}; one is taken, the {name}." if name else f"{many}; none is taken."


def _positional(parser: Parser) -> str:
    return next((str(a.metavar or a.dest) for a in actions_of(parser) if not a.option_strings), "")


def _without_value(parser: Parser, name: str, following: str | None) -> str:
    after = "nothing follows" if following is None else f"{following} follows"
    dashed = (
        "" if following is None or following in flags_of(parser) else f" One that begins with a dash: {name}=VALUE."
    )
    return f"{name} needs a value ({spelled(parser, name)}), and {after}; is a variable unset?{dashed}"


def _unknown_flag(parser: Parser, name: str) -> str:
    flags = [flag for flag in flags_of(parser) if flag.startswith("--")]
    plain, place, command = name.lower().replace("_", "-"), _positional(parser), parser.prog.split()[-1]
    if plain in _OUTPUT and place:
        return f"{name} is not known; the output has no flag, it stands alone at the end: {place}."
    others = [other for other, sibling in parser.siblings.items() if name in flags_of(sibling)]
    is_no = f"is no flag of {command}, but of {listed(others)}" if others else "is not known"
    synonym = _SYNONYMS.get(plain)
    meant = [synonym] if synonym in flags else [] if others else nearest(name, flags)
    return f"{name} {is_no}; " + (f"did you mean {listed(meant, 'or')}?" if meant else f"see {command} --help.")


def _unknown_command(word: str, commands: Sequence[str]) -> str:
    known = f"Commands: {', '.join(commands)}."
    if word.lower() == "help":
        return f"'help' is not a command; for help: --help, or COMMAND --help. {known}"
    meant = [_COMMAND_SYNONYMS[word.lower()]] if word.lower() in _COMMAND_SYNONYMS else nearest(word, commands)
    return f"{word!r} is not a command" + (f"; did you mean {listed(meant, 'or')}?" if meant else ".") + f" {known}"
