"""The flags of ``fairseq-train`` that build a model."""

import re
from argparse import ArgumentParser, Namespace
from typing import Any, Dict, List, Mapping, NamedTuple, NoReturn, Optional

from fairseq import options as fairseq_options
from fairseq.models import ARCH_MODEL_REGISTRY

from ..checkpoints import TRANSFORMER, is_computed
from ..errors import Faults, UserError

# What fairseq's own pruning reads: it would prune again on every resume
_PRUNES = re.compile(r"layers_to_keep$")


class Flags(NamedTuple):
    """A model's flags.

    Attributes:
        words: as ``fairseq-train`` takes them, ``--arch`` first.
        expected: by option, what they must come to.
        task: with which they are parsed.
    """

    words: List[str]
    expected: Dict[str, Any]
    task: str

    @classmethod
    def of(
        cls,
        architecture: str,
        task: str,
        options: Mapping[str, Any],
        always: Mapping[str, int],
    ) -> "Flags":
        """The fewest flags that build a model, found by asking fairseq's own parser.

        Args:
            architecture: under whose name, unless that has something on that no flag turns off.
            options: of the model, complete.
            always: more of them, to be told although the architecture may have them so.

        Raises:
            UserError: no flags build it.
        """
        faults: List[str] = []
        for name in dict.fromkeys((architecture, TRANSFORMER)):
            if ARCH_MODEL_REGISTRY[name] is ARCH_MODEL_REGISTRY[architecture]:
                found = cls(["--arch", name], {**_computed(name, options), **always}, task)
                for option in always:
                    found.words.extend(found._words(option) or [])
                fault = found._complete()
                if fault is None:
                    return found
                faults.append(fault)
        raise UserError(
            f"no flags of fairseq-train build a {architecture} with "
            f"{' or '.join(dict.fromkeys(faults))}, as the teacher is"
        )

    def _complete(self) -> Optional[str]:
        """Add flags until they come to what is expected; else the option of which they do not."""
        while True:
            # one that is right may make others right: each side's width is also its output's
            different = self._different(vars(self.parsed()))
            if not different:
                return None
            option = different[0]
            words = self._words(option)
            if words is None or words[0] in self.words:
                return f"{_flag(option)} {self.expected[option]}"
            self.words.extend(words)

    def _words(self, option: str) -> Optional[List[str]]:
        """None of an option that no flag sets so."""
        value = self.expected[option]
        if value is None or value is False:
            return None
        return [_flag(option), *([] if value is True else [str(value)])]

    def _different(self, parsed: Mapping[str, Any]) -> List[str]:
        """Options that did not come to what is expected."""
        # some architectures leave options out that are off
        return [n for n, v in self.expected.items() if (parsed.get(n) or None) != (v or None)]

    def refuse(self, task: Optional[str], *more: str) -> None:
        """Refuse further flags that build another model.

        Args:
            task: that they are for, unless it is that of the others.

        Raises:
            UserError: all options that they change.
        """
        faults, parsed = Faults(), vars(self._replace(task=task or self.task).parsed(*more))
        for option in self._different(parsed):
            faults.add(
                f"{_flag(option)}: expected {self.expected[option]}, as this student has it, "
                f"got {parsed.get(option)}"
            )
        faults.raise_if_any(prefix="these flags of fairseq-train do not fit the student: ")

    def parsed(self, *more: str) -> Namespace:
        """What fairseq makes of the flags with ``more`` behind them.

        Raises:
            UserError: it refuses them.
        """

        def fail(message: str) -> NoReturn:
            raise UserError(
                f"fairseq-train refuses these flags: {message}. They are read as those of --task "
                f"{self.task}"
            )

        parser: Any = fairseq_options.get_training_parser(self.task)
        parser.error = fail
        words = ["data", "--task", self.task, *self.words, *more]
        try:
            return fairseq_options.parse_args_and_arch(parser, words)
        except ValueError as error:
            return fail(str(error))


def _computed(architecture: str, options: Mapping[str, Any]) -> Dict[str, Any]:
    """The options of a model that change what it computes, those that have flags."""
    parser = ArgumentParser()
    ARCH_MODEL_REGISTRY[architecture].add_args(parser)
    names = [action.dest for action in parser._actions if action.dest in options]
    if options.get("share_all_embeddings"):  # which implies the other
        names = [name for name in names if name != "share_decoder_input_output_embed"]
    return {n: options[n] for n in names if is_computed(n) and not _PRUNES.search(n)}


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")
