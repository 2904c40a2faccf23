"""Writes docs/reference/flags.md from the dataclasses and the commands' parsers.

    python docs/generate.py            # writes the page
    python docs/generate.py --check    # fails if the page on disk is another one

The page holds our own flags only: fairseq's differ between its versions, and its manual has them.
"""

import argparse
import enum
import re
import sys
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Set

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reference" / "flags.md"

INTRODUCTION = """\
# Flags

<!-- Made by docs/generate.py from the code: change the code, and run it again. -->

These are the flags that kd_plugin adds. The task, the criterion and the commands
`fairseq-kd-cache`, `fairseq-kd-sequences` and `fairseq-kd-report` also take fairseq's own flags;
[its manual](https://fairseq.readthedocs.io/en/latest/command_line_tools.html) describes them.
With `fairseq-hydra-train` a flag is a field of the same name with underscores: `--kd-weight` is
`criterion.kd_weight`, and `--teacher-cache` is `task.teacher_cache`.

`fairseq-train --help` stops before fairseq loads the task and the criterion, so it cannot show
their flags. `fairseq-kd-benchmark --help` shows them all.
"""


class Flag(NamedTuple):
    """One row of a table."""

    names: str
    values: str
    default: str
    help: str


def page() -> str:
    """The whole page, as it must be on disk."""
    parts = [INTRODUCTION]
    for title, text, groups in _sections():
        parts.append(f"## {title}\n\n{text}\n")
        for group, flags in groups.items():
            caption = f"**{group[0].upper()}{group[1:]}**\n\n" if group else ""
            parts.append(caption + _table(flags))
    return "\n".join(parts)


def _sections() -> Iterator[Any]:
    from kd_plugin.commands import benchmark, cache, export, init, report, sequences, vocabulary
    from kd_plugin.criterion import KDLabelSmoothedCrossEntropyCriterionConfig
    from kd_plugin.tasks.speech_to_text import KDSpeechToTextConfig
    from kd_plugin.tasks.translation import KDTranslationConfig

    common = dataclass_flags(KDTranslationConfig)
    speech = [flag for flag in dataclass_flags(KDSpeechToTextConfig) if flag not in common]
    yield (
        "Tasks `kd_translation`, `kd_translation_multi_simple_epoch`, `kd_language_modeling` and "
        "`kd_speech_to_text`",
        "Beside the flags of fairseq's `translation`, `translation_multi_simple_epoch`, "
        "`language_modeling` and `speech_to_text`.",
        {"": common, "of `kd_speech_to_text` alone": speech},
    )
    yield (
        "Criterion `kd_label_smoothed_cross_entropy`",
        "Beside the flags of fairseq's `label_smoothed_cross_entropy`. [The loss](loss.md) has the "
        "formulas.",
        {"": dataclass_flags(KDLabelSmoothedCrossEntropyCriterionConfig)},
    )
    for command in (cache, sequences, vocabulary, init, report, export, benchmark):
        parser = command.make_parser()
        usage = (parser.usage or _usage(parser)).replace("%(prog)s", parser.prog)
        text = f"    {usage}"
        changed = sorted(_changed_defaults(parser).items())
        if changed:
            defaults = ", ".join(f"`{flag} {value}`" for flag, value in changed)
            text += f"\n\nDefaults that differ from fairseq's: {defaults}."
        yield f"`{command.PROG}`", text, parser_flags(parser)


def dataclass_flags(config: Any) -> List[Flag]:
    """The fields that a configuration adds to fairseq's and that are documented."""
    inherited = {
        field.name
        for base in config.__mro__[1:]
        if is_dataclass(base) and base.__module__.startswith("fairseq.")
        for field in fields(base)
    }
    return [
        _dataclass_flag(field)
        for field in fields(config)
        if field.name not in inherited and field.metadata.get("help")
    ]


def _dataclass_flag(field: Any) -> Flag:
    text, stated = _split_default(field.metadata["help"])
    types = [t for t in getattr(field.type, "__args__", ()) or (field.type,) if t is not type(None)]
    kind = types[0]
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        values = ", ".join(f"`{choice.value}`" for choice in kind)
    elif kind is bool:
        values = "switch"
    else:
        values = {"str": "text", "int": "integer", "float": "number"}[kind.__name__]
    default = field.default if field.default is not MISSING else field.default_factory()
    default = getattr(default, "value", default)
    name = "--" + field.name.replace("_", "-")
    shown = "off" if default is False else stated or ("" if default is None else f"`{default}`")
    return Flag(f"`{name}`", values, shown, text)


def _usage(parser: argparse.ArgumentParser) -> str:
    required = [action for action in parser._actions if action.required]
    flags = [f"{action.option_strings[0]} {action.metavar}" for action in required]
    return " ".join(["%(prog)s", *flags, "[options]"])


def parser_flags(parser: argparse.ArgumentParser) -> Dict[str, List[Flag]]:
    """The flags that a command adds to fairseq's, by group, in the order of its --help."""
    known = _stock(parser)
    found: Dict[str, List[Flag]] = {}
    for group in parser._action_groups:
        flags = [
            _parser_flag(action, parser.prog)
            for action in group._group_actions
            if action.help != argparse.SUPPRESS
            and action.option_strings
            and not known.intersection(action.option_strings)
            and "--help" not in action.option_strings
        ]
        # argparse's own group has another title in each version of Python
        title = "" if group is parser._optionals else str(group.title)
        if flags:
            found[title] = flags
    return {"": next(iter(found.values()))} if len(found) == 1 else found


def _parser_flag(action: Any, prog: str) -> Flag:
    text, stated = _split_default(action.help or "")
    if "%" in text:
        text = text % {**vars(action), "prog": prog}
    if action.nargs == 0:
        values = "switch"
    elif action.choices:
        values = ", ".join(f"`{choice}`" for choice in action.choices)
    else:
        values = action.metavar or {int: "integer", float: "number"}.get(action.type, "text")
        if action.nargs == "+":
            values += " ..."
    default = action.default
    if action.required:
        shown = "required"
    elif action.nargs == 0:
        shown = "off"
    else:
        shown = stated or ("" if default in (None, "", []) else f"`{default}`")
    return Flag(", ".join(f"`{name}`" for name in action.option_strings), values, shown, text)


def _split_default(text: str) -> Any:
    """A help text without the default that it states, and that default."""
    found = re.search(r"\s*\(default: (.*)\)$", text, re.DOTALL)
    return (text[: found.start()], found.group(1)) if found else (text, "")


def _fairseq_parser(parser: argparse.ArgumentParser) -> Any:
    """fairseq's parser that a command's own was made from; None for those of our own making."""
    from fairseq import options

    ours = {name for action in parser._actions for name in action.option_strings}
    if "--cpu" not in ours:
        return None
    make = options.get_generation_parser if "--beam" in ours else options.get_validation_parser
    return make()


def _stock(parser: argparse.ArgumentParser) -> Set[str]:
    stock = _fairseq_parser(parser)
    return {name for action in stock._actions for name in action.option_strings} if stock else set()


def _changed_defaults(parser: argparse.ArgumentParser) -> Dict[str, Any]:
    stock = _fairseq_parser(parser)
    if stock is None:
        return {}
    theirs = {action.dest: action.default for action in stock._actions}
    return {
        action.option_strings[0]: action.default
        for action in parser._actions
        if action.option_strings
        and action.dest in theirs
        and action.default not in (None, theirs[action.dest])  # None: what is usual, or nothing
        and action.dest != "task"
    }


def _table(flags: List[Flag]) -> str:
    rows = ["| flag | values | default | meaning |", "|---|---|---|---|"]
    rows += [
        f"| {flag.names} | {_cell(flag.values)} | {_cell(flag.default)} | {_cell(flag.help)} |"
        for flag in flags
    ]
    return "\n".join(rows) + "\n"


def _cell(text: str) -> str:
    """Text as Markdown shows it literally within a table."""
    text = " ".join(text.split()).replace("|", "\\|")
    code = "`" in text
    return text if code else re.sub(r"([*_<])", r"\\\1", text)


def main() -> int:
    sys.path.insert(0, str(ROOT))
    made = page()
    if "--check" in sys.argv[1:]:
        if PAGE.read_text(encoding="utf-8") == made:
            return 0
        print(f"{PAGE} is not what the code says: run python docs/generate.py", file=sys.stderr)
        return 1
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
