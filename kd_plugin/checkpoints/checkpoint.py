"""A fairseq checkpoint: opened without running what is inside, and understood once for all.

A checkpoint is a pickle, and a teacher is often somebody else's file. ``torchfile`` opens it
without running what is inside; ``untrusted`` refuses a configuration that building the model would
run. What is left of it is a ``Checkpoint``: nobody else takes such a file apart.
"""

import contextlib
import copy
import dataclasses
import logging
import math
import os
import re
import zipfile
from argparse import Namespace
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Set, Tuple

import torch
from fairseq import utils
from fairseq.data import Dictionary
from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.models.fconv import FConvModel
from fairseq.models.lstm import LSTMModel
from fairseq.models.lstm_lm import LSTMLanguageModel
from fairseq.models.multilingual_transformer import MultilingualTransformerModel
from omegaconf import OmegaConf, open_dict
from torch import Tensor

from ..errors import UserError
from . import build, dictionaries, tags, tasks, torchfile, untrusted
from .dictionaries import Dictionaries, VocabularyError
from .kinds import SPEECH, TRANSLATION, Kind, kind_of
from .roles import Role
from .tags import Tags

logger = logging.getLogger(__name__)
_warned: Set[str] = set()  # data folders whose place was guessed

# fairseq 0.12.2's encoder layers hold these weights twice and fill them in when they are loaded;
# later versions refuse them
SECOND_COPIES = re.compile(r"layers\.\d+\.(in_proj|out_proj|fc[12])_(weight|bias)$")

_MOST_NAMES = 8  # of a weight that is tied
_LONGEST_LIST = 1 << 16  # bytes of a list of languages
_LANGUAGES = ("source_lang", "target_lang")
_DICTIONARIES = ("source_dict", "target_dict")
_POSITIONS = ("max_source_positions", "max_target_positions")
_OUTPUTS = "output_dictionary_size"  # of a language model: the first symbols, all if negative
_DIRECTION = re.compile(r"^models\.[^.]+\.")
_NO_PARAMETERS = re.compile(r"_float_tensor$|coder\.version$")
_TABLES = re.compile(
    r"\.(embed_tokens|embed_positions|output_projection)\.|decoder\.(fc_out|fc3)\."
)


class CheckpointError(UserError):
    """A file that cannot be used as a fairseq checkpoint; the message says why and what to do."""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Checkpoint:
    """A model as fairseq-train saved it. Make one with ``Checkpoint.open``.

    Attributes:
        path: the file.
        role: what it is to the command at hand.
        weights: by parameter name, on the CPU.
        options: the model's configuration.
        task_options: the task's configuration.
        symbols: the source and target symbols that a student of ours saved in it; None in others.
        updates: how many updates its training had done.
        foreign: the name of its architecture, where that is nobody's here and its options are a
            transformer's, which is built then; None mostly.
    """

    path: str
    role: Role
    weights: Dict[str, Tensor]
    options: Dict[str, Any]
    task_options: Dict[str, Any]
    symbols: Optional[Tuple[List[str], List[str]]]
    updates: int
    _is_namespace: bool  # how fairseq keeps the options of architectures without a dataclass
    foreign: Optional[str] = None

    @classmethod
    def open(cls, path: str, role: Role, trust: bool = False) -> "Checkpoint":
        """Read a fairseq checkpoint (zip or legacy format), without its optimizer's state.

        Args:
            path: the file.
            role: what it is, for messages.
            trust: open it with the full pickle machinery, which runs whatever the file asks for.

        Raises:
            CheckpointError: no such file, not a fairseq checkpoint, damaged, weights that are not
                finite, or (unless trusted) a pickle that asks for anything beyond what fairseq
                checkpoints hold. Nothing in the file has been executed then.
        """
        named = f"{role.name} {path}"
        if not os.path.isfile(path):
            raise CheckpointError(f"{named}: no such checkpoint file")
        advice = ""
        if role.trust:
            advice = (
                " If you know where this file comes from and trust it, "
                f"{role.trust} opens it anyway."
            )
        try:
            opened = cls._of(path, role, _load(path, trust))
            if not trust:
                untrusted.refuse_code(opened.architecture, opened.options, opened.weights)
            return opened
        except CheckpointError:
            raise
        except torchfile.ForbiddenGlobal as error:
            raise CheckpointError(
                f"{named}: refused, because its pickle asks for {error}, which no fairseq "
                f"checkpoint needs. Nothing was executed.{advice}"
            ) from None
        except untrusted.Refused as error:
            raise CheckpointError(
                f"{named}: refused, because {error}{advice if error.trustable else ''}"
            ) from None
        except Exception as error:  # nearly any, on a file that is something else
            reason = str(error).split("\n")[0][:300]
            raise CheckpointError(
                f"{named}: cannot be read as a fairseq checkpoint; it is {_kind(path)} "
                f"({type(error).__name__}: {reason})"
            ) from error

    @classmethod
    def _of(cls, path: str, role: Role, state: Any) -> "Checkpoint":
        """Take a saved state apart; what is used anywhere must be of the type that it should be."""
        named = f"{role.name} {path}"
        if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
            raise CheckpointError(
                f"{named}: not a fairseq checkpoint: expected a dictionary with the model's "
                f"weights under 'model', found {_contents(state)}"
            )
        model, task = _configurations(named, state)
        is_namespace = isinstance(model, Namespace)
        options = dict(vars(model)) if is_namespace else build.flat_options(model)
        name, foreign = options.get("_name") or options.get("arch"), None
        if isinstance(name, str) and not build.is_known(name):
            transformer = build.as_transformer(options, is_namespace)
            options, foreign = (transformer, name) if transformer else (options, None)
        opened = cls(
            path=path,
            role=role,
            weights=_checked_weights(named, path, state["model"]),
            options=options,
            foreign=foreign,
            task_options=dict(vars(task)) if isinstance(task, Namespace) else task,
            symbols=_checked_symbols(state.get("task_state") or {}),
            updates=_checked_updates(state.get("optimizer_history") or []),
            _is_namespace=is_namespace,
        )
        opened._check_options()
        return opened

    def _check_options(self) -> None:
        for language in self.languages:
            if language is not None and not re.fullmatch(r"[\w(\[][\w@.+*?|()\[\]-]*", language):
                raise ValueError(f"{language!r} is not the name of a language"[:200])
        kinds = dict.fromkeys((*_POSITIONS, _OUTPUTS), int)
        for part in (self.options, self.task_options):
            for name, kind in {**kinds, "data": str, "_name": str, "arch": str}.items():
                if not isinstance(part.get(name), (kind, type(None))):
                    raise TypeError(f"its option {name} is a {type(part[name]).__name__}")

    def __str__(self) -> str:
        return f"{self.role.name} {self.path}"

    @property
    def architecture(self) -> Optional[str]:
        """What fairseq builds; None in a trusted file that names nothing."""
        return self.options.get("_name") or self.options.get("arch")

    @property
    def task(self) -> Optional[str]:
        """The task that it was trained for; of our multilingual one, fairseq's that it adds to."""
        name = self.task_options.get("_name") or self.task_options.get("task")
        return tags.SIMPLE_EPOCH if name == "kd_" + tags.SIMPLE_EPOCH else name

    @property
    def is_translation(self) -> bool:
        """Whether it was trained for fairseq's ``translation``, by that name or another."""
        return tasks.is_translation(self.task)

    @property
    def kind(self) -> Optional[Kind]:
        """What kind of model it is; None where it is none that word-level distillation knows."""
        return kind_of(self.task, self.architecture)

    def as_task(self, name: Optional[str]) -> "Checkpoint":
        """The same as one that was trained for another task; None changes nothing."""
        if name is None:
            return self
        return dataclasses.replace(self, task_options={**self.task_options, "_name": name})

    def advise_task(self) -> str:
        """What to do about a task that this fairseq does not know."""
        if tasks.is_registered(self.task):
            return ""
        advice = " This fairseq has no such task: --user-dir imports what registers it"
        if self.role.task:
            advice += (
                f", and if it is fairseq's translation by another name, {self.role.task} "
                "translation says so"
            )
        return advice + "."

    @property
    def languages(self) -> Tuple[Optional[str], Optional[str]]:
        """Source and target language; None where it names none."""
        return self.languages_with({})

    def languages_with(self, overrides: Mapping[str, Any]) -> Tuple[Any, Any]:
        """What the data call them, where ``overrides`` say that they call them otherwise.

        Its dictionaries' files have its own names for them all the same.
        """
        source, target = [overrides.get(key, self.task_options.get(key)) for key in _LANGUAGES]
        return source, target

    def languages_or(self, others: Sequence[str]) -> Tuple[str, str]:
        """Its source and target language, which name its dictionaries' files; where it names none,
        those of the data."""
        source, target = [own or other for own, other in zip(self.languages, others)]
        return source, target

    @property
    def data(self) -> Optional[str]:
        """The (first) data folder that it was trained on, as it was named then."""
        named = self.task_options.get("data")
        return utils.split_paths(named)[0] if named else None

    @property
    def max_positions(self) -> Tuple[int, int]:
        """Tokens of the longest source and target that its model takes."""
        source, target = [
            self.options.get(name) or self.task_options.get(name) or 1024 for name in _POSITIONS
        ]
        return source, target

    @property
    def dtype(self) -> torch.dtype:
        return next(w.dtype for w in self.weights.values() if w.is_floating_point())

    def parameters(self) -> Tuple[int, int]:
        """How many parameters it holds; see ``count_parameters``."""
        return count_parameters(self.weights)

    def without_content(self) -> "Checkpoint":
        """The same with weights that have a size and no content, nor memory."""
        return self.with_weights({name: own.to("meta") for name, own in self.weights.items()})

    def with_weights(self, weights: Dict[str, Tensor]) -> "Checkpoint":
        """The same with other weights."""
        return dataclasses.replace(self, weights=weights)

    def dictionaries(
        self,
        languages: Sequence[str],
        data: Optional[str] = None,
        otherwise: Optional[Tuple[str, Dictionary, Dictionary]] = None,
    ) -> Optional[Dictionaries]:
        """The source and target dictionaries that the model was trained with.

        From ``data``, or else from the checkpoint (of a student of ours), from beside it, or from
        the data folder that it names. Its own names of the languages name the files. Only in
        ``data``, which somebody says has its dictionaries, may the files have the names that the
        data at hand go by: elsewhere those may be the dictionaries of the data.

        Args:
            languages: of the data at hand.
            data: folder that the role's flag names.
            otherwise: whose dictionaries ("student", "data") to take, with a warning, if none are
                found.

        Returns:
            None if none are found and there are none to take.

        Raises:
            VocabularyError: there are none in ``data``, one cannot be read, or those that are
                found have other names.
        """
        found = self._dictionaries(languages, data, otherwise)
        return found and self._with_added_symbols(found)

    def _dictionaries(
        self,
        languages: Sequence[str],
        data: Optional[str],
        otherwise: Optional[Tuple[str, Dictionary, Dictionary]],
    ) -> Optional[Dictionaries]:
        langs = self.languages_or(languages)
        files = allowed = " or ".join(
            [*sorted(set(self._named_dictionaries())), dictionaries.files(langs)]
        )
        if self.kind is SPEECH:
            files = allowed = f"{files} or {self._speech_configuration} that names another"
        if langs != tuple(languages):
            allowed += " or " + dictionaries.files(languages)
        if data is not None:
            found = self._read_folder(data, langs, languages)
            if found is None:
                raise VocabularyError(f"{self.role.data or self} {data}: expected {allowed} there")
            return Dictionaries(*found, "from " + data)
        if self.symbols is not None:
            try:
                source, target = map(dictionaries.of_symbols, self.symbols)
            except VocabularyError as error:
                raise VocabularyError(
                    f"{self}: its own list of symbols cannot be used: {error}."
                    f"{self._advise_data()}"
                ) from None
            return Dictionaries(source, target, "from its checkpoint")
        beside = os.path.dirname(os.path.abspath(self.path))
        found = self._read_folder(beside, langs)
        if found is not None:
            return Dictionaries(*found, "from beside it")
        found = self._read_folder(self.data, langs) if self.data else None
        if found is not None and self.data:
            if not os.path.isabs(self.data):
                sure = f"; {self.role.data} says for sure" if self.role.data else ""
                _warn_of_folder(
                    os.path.abspath(self.data),
                    f"{self}: its checkpoint names the data folder {self.data}, which was found "
                    f"relative to {os.getcwd()}. If it was trained in another place, that may be "
                    f"other data{sure}",
                )
            return Dictionaries(*found, "from " + os.path.abspath(self.data))
        if otherwise is None:
            return None
        owner, source, target = otherwise
        missing = f"{self}: no {files} found beside it or in the data folder that it names"
        advice = self._advise_data(f", as {allowed if self.role.data else files}")
        if langs == ("", "") and self.kind is not SPEECH and self.role.languages:
            advice += f" {self.role.languages} says which two languages it translates between."
        for folder in filter(None, (beside, self.data)):
            others = dictionaries.named(folder)
            if others:
                raise VocabularyError(
                    f"{missing}, though {', '.join(others[:8])} in {folder}.{advice}"
                )
        logger.warning(
            f"{missing}, so its vocabulary is TAKEN TO BE THE {owner.upper()}'S and nothing could "
            f"be verified.{advice}"
        )
        return Dictionaries(source, target, f"taken from the {owner}")

    def _named_dictionaries(self) -> List[str]:
        """The source and target dictionary's files that its task names instead of those of the
        languages: names without folders. None otherwise."""
        if self.task != tags.SIMPLE_EPOCH:
            return []
        given = self.task_options
        both = [given.get(key) or given.get("fixed_dictionary") for key in _DICTIONARIES]
        return [os.path.basename(str(name)) for name in both] if all(both) else []

    @property
    def _speech_configuration(self) -> str:
        """The YAML file of its data folder, of a speech task."""
        return os.path.basename(str(self.task_options.get("config_yaml") or "config.yaml"))

    def _read_folder(
        self, folder: str, *names: Sequence[Optional[str]]
    ) -> Optional[Tuple[Dictionary, Dictionary]]:
        if self.kind is SPEECH:
            own = dictionaries.read_speech_folder(folder, self._speech_configuration)
            return own and (own, own)
        files = [os.path.join(folder, name) for name in self._named_dictionaries()]
        if files and all(map(os.path.isfile, files)):
            source, target = map(dictionaries.read, files)
            return source, target
        return dictionaries.read_folder(folder, *names)

    def _with_added_symbols(self, found: Dictionaries) -> Dictionaries:
        """Dictionaries with what its task adds to those of the files, or leaves out of them."""
        with self._understanding_tags():
            added = tags.added_symbols(self.task, self.task_options)
        outputs = self.task_options.get(_OUTPUTS)
        if outputs is not None and 0 <= outputs < len(found.target):
            return found._replace(target=dictionaries.first(found.target, outputs))
        if not added:
            return found
        sides = copy.deepcopy((found.source, found.target))  # which may be the data's own
        for side in sides:
            for symbol in added:
                side.add_symbol(symbol)
        return Dictionaries(*sides, found.origin)

    def for_direction(self, languages: Sequence[str], data: Optional[str] = None) -> "Checkpoint":
        """The same, to translate from one language to another of those that its task knows: with
        its names of them; of a model for each direction, that one alone.

        Args:
            languages: what the data at hand, or it, calls them.
            data: folder that the role's flag names, where a list of its languages may lie.

        Raises:
            CheckpointError: nothing says which of its languages they are, or it holds no model for
                them.
        """
        if self.task not in tags.MULTILINGUAL:
            return self
        options = dict(self.task_options)
        with self._understanding_tags():
            if options.get("lang_dict") and not options.get("langs"):
                options["langs"] = self._language_list(os.path.basename(options["lang_dict"]), data)
            known = tags.languages(self.task, options)
            whose = f"the languages of {self}"
            for key, own, other in zip(_LANGUAGES, self.languages, languages):
                options[key] = own or tags.name_of(other, known, whose)
            trained = tags.listed(options.get("lang_pairs"))
        found = dataclasses.replace(self, task_options=options)
        direction = "-".join(map(str, found.languages))
        if self.task == tags.EACH_DIRECTION:
            return found._model_of(direction, trained)
        if trained and direction not in trained:
            logger.warning(f"{self} WAS TRAINED FOR {', '.join(trained[:8])}, not for {direction}")
        return found

    def _model_of(self, direction: str, trained: Sequence[str]) -> "Checkpoint":
        start = f"models.{direction}."
        weights = {
            name[len(start) :]: weight
            for name, weight in self.weights.items()
            if name.startswith(start)
        }
        if not weights:
            raise CheckpointError(
                f"{self} translates {', '.join(trained)}, each with a model of its own, and not "
                f"{direction}"
            )
        if ARCH_MODEL_REGISTRY.get(self.architecture) is not MultilingualTransformerModel:
            raise CheckpointError(
                f"{self} holds a {self.architecture}, of which no model of one direction can be "
                "taken; expected a multilingual_transformer"
            )
        options = {**self.options, "_name": build.TRANSFORMER, "arch": build.TRANSFORMER}
        return dataclasses.replace(self, weights=weights, options=options)

    def _language_list(self, name: str, data: Optional[str]) -> List[str]:
        """The languages in a file that its task names; it may lie where dictionaries do."""
        folders = [data, os.path.dirname(os.path.abspath(self.path)), self.data]
        for folder in filter(None, folders):
            path = os.path.join(folder, name)
            if os.path.isfile(path):
                with open(path, encoding="utf-8") as file:
                    return [line.strip() for line in file.read(_LONGEST_LIST).splitlines() if line]
        advice = f", or into the folder of {self.role.data}" if self.role.data else ""
        raise CheckpointError(
            f"{self}: its languages are listed in a file {name}: put it beside the "
            f"checkpoint{advice}"
        )

    @contextlib.contextmanager
    def _understanding_tags(self) -> Iterator[None]:
        """While its task's options are read: they may hold anything."""
        try:
            yield
        except CheckpointError:
            raise
        except VocabularyError as error:
            flag = self.role.languages
            advice = f" ({flag} SOURCE,TARGET says what it calls them)" if flag else ""
            raise CheckpointError(f"{error}{advice}") from None
        except Exception as error:
            raise CheckpointError(
                f"{self}: its task's options for tags of languages cannot be understood "
                f"({type(error).__name__}: {error})"
            ) from error

    def tags(self, languages: Sequence[str]) -> Tags:
        """What it reads beside the sentences of the data, as its task says.

        Args:
            languages: of the data at hand.

        Raises:
            CheckpointError: what its task says of it cannot be understood.
        """
        with self._understanding_tags():
            return tags.tags_of(self.task, self.task_options, self.languages_or(languages))

    def _advise_data(self, names: str = "") -> str:
        several = (self.kind or TRANSLATION).vocabularies[0]
        own = f"the {'dict.*.txt' if several else 'dictionary'} it was trained with"
        if self.role.data:
            return f" {self.role.data} names the folder with {own}{names}."
        return f" Put {own} beside it{names}."

    def check_sizes(self, found: Dictionaries, kind: Kind = TRANSLATION) -> None:
        """Its dictionaries must have as many symbols as it has embeddings, or outputs.

        Raises:
            VocabularyError: they have not.
        """
        for (what, name), symbols in zip(kind.tables, (found.source, found.target)):
            weight = self.weights.get(name)
            if weight is not None and weight.size(0) != len(symbols):
                raise VocabularyError(
                    f"{self} has {weight.size(0)} {what}, but the dictionary "
                    f"{found.origin} has {len(symbols)} symbols.{self._advise_data()}"
                )

    def build(
        self,
        task: Any,
        overrides: Optional[Mapping[str, Any]] = None,
        kind: Kind = TRANSLATION,
    ) -> Any:
        """Build its model and load its weights; in eval mode.

        Args:
            task: one with its dictionaries, as ``kind.new_task`` makes. Not the student's.
            overrides: options of the model to change; ``source_lang`` and ``target_lang`` may be
                among them.

        Raises:
            CheckpointError: it cannot be built, or is not of this kind.
        """
        overrides = overrides or {}
        self._check_architecture()
        unknown = set(overrides) - set(self.options) - set(_LANGUAGES)
        if unknown:
            flag = f"{self.role.overrides}: " if self.role.overrides else ""
            raise CheckpointError(
                f"{flag}the model of {self} has no option {', '.join(sorted(map(repr, unknown)))}"
            )
        if self.foreign:
            logger.info(
                f"{self}: this fairseq has no architecture {self.foreign!r}; its options are a "
                "transformer's, so it is built as one"
            )
        changed = {key: value for key, value in overrides.items() if key in self.options}
        try:
            options: Any
            if self._is_namespace:
                options = Namespace(**{**self.options, **changed})
            else:
                options = OmegaConf.create(self.options)
                with open_dict(options):
                    options.update(changed)
            model = build.build_model(options, self.weights, task)
        except Exception as error:
            advice = ""
            if self.role.overrides:
                advice = (
                    " Options that changed since it was trained can be set with "
                    f"{self.role.overrides}."
                )
            if self.foreign:
                advice += (
                    f" Its architecture {self.foreign} was taken for a transformer; --user-dir, or "
                    "for a teacher --teacher-user-dir, imports what registers it."
                )
            raise CheckpointError(
                f"{self}: its model cannot be rebuilt with this fairseq "
                f"({type(error).__name__}: {str(error)[:500]}).{advice}"
            ) from error
        if not isinstance(model, kind.classes):
            raise CheckpointError(f"{self} is a {type(model).__name__}; expected {kind.model}")
        layer: Any
        for layer in model.modules() if kind.reads_frames else ():
            # fairseq 0.12.2's fast path of post-norm layers wants B x T x C, and encoders of speech
            # give it T x B x C
            if hasattr(layer, "can_use_fastpath"):
                layer.can_use_fastpath = False
        return model.eval()

    def hidden_width(self, side: str) -> Optional[int]:
        """How wide the hidden states of its encoder or decoder are; None if it does not say."""
        model, options = ARCH_MODEL_REGISTRY.get(self.architecture or ""), self.options
        name, factor = f"{side}_embed_dim", 1
        if model in (LSTMModel, LSTMLanguageModel):
            name = f"{side}_hidden_size"
            factor = 2 if side == "encoder" and options.get("encoder_bidirectional") else 1
        elif model is FConvModel and side == "decoder":
            name = "decoder_out_embed_dim"
        size = options.get(name)
        return size * factor if isinstance(size, int) else None

    def complete_options(self) -> Namespace:
        """What building its model reads of its options, with defaults filled in.

        Raises:
            CheckpointError: this fairseq has no such architecture, or it has other options.
        """
        self._check_architecture()
        try:
            return build.complete_options(str(self.architecture), self.options, self.max_positions)
        except Exception as error:  # an option of another type than the architecture's
            raise CheckpointError(
                f"{self}: its options are not those of {self.architecture} "
                f"({type(error).__name__}: {error})"
            ) from error

    def _check_architecture(self) -> None:
        if not build.is_known(self.architecture):
            raise CheckpointError(
                f"{self}: this fairseq has no architecture {self.architecture!r}, and its options "
                "are not a transformer's; if it is one of your own, --user-dir (for a teacher "
                "also --teacher-user-dir) must import it"
            )


def _warn_of_folder(folder: str, message: str) -> None:
    """Once for all models that are opened, and however often each one is."""
    if folder not in _warned:
        _warned.add(folder)
        logger.warning(message)


def count_parameters(weights: Mapping[str, Tensor]) -> Tuple[int, int]:
    """How many parameters a model has; shared ones are counted once.

    Returns:
        all; and those outside the tables of the vocabulary and of positions: token and position
        embeddings and the projection to the vocabulary, tied or not.
    """
    total = rest = 0
    tables: List[Tensor] = []
    directions: Dict[str, List[Tensor]] = {}
    for name, tensor in weights.items():
        if _NO_PARAMETERS.search(name):
            continue
        # multilingual models have a copy of what is shared for each direction
        others = directions.setdefault(_DIRECTION.sub("", name), [])
        if any(tensor.shape == other.shape and tensor.equal(other) for other in others):
            continue
        others.append(tensor)
        if _TABLES.search(name):
            # what shares storage in the model may be a copy in the file
            if any(tensor.shape == other.shape and tensor.equal(other) for other in tables):
                continue
            tables.append(tensor)
        else:
            rest += tensor.numel()
        total += tensor.numel()
    return total, rest


def _load(path: str, trust: bool) -> Any:
    if not trust:
        return torchfile.read(path)
    more = {"weights_only": False} if torchfile.TORCH_CHECKS_GLOBALS else {}
    return torch.load(path, map_location="cpu", **more)


def _kind(path: str) -> str:
    """What is taken for a checkpoint: often a page of a server, or a pointer to a large file."""
    start = b"\0"
    with contextlib.suppress(OSError), open(path, "rb") as file:
        start = file.read(60)
    if not start:
        return "empty"
    first_line = start.decode("ascii", "replace").split("\n")[0].strip()
    if len(first_line) > 8 and first_line.isprintable() and first_line.isascii():
        return f"text that begins with {first_line!r}"
    return "damaged, incomplete or something else"


def _contents(state: Any) -> str:
    if isinstance(state, dict):
        return f"the keys {sorted(map(str, state))[:8]}"
    return type(state).__name__


def _configurations(named: str, state: Dict[str, Any]) -> Tuple[Any, Any]:
    """Those of model and task, as a dictionary or ``Namespace`` of plain types each.

    Old checkpoints hold one flat ``Namespace``, 'args', for both.
    """
    args: Any = state.get("args")
    cfg: Any = state.get("cfg")
    if args is None and cfg is None:
        raise CheckpointError(
            f"{named}: holds weights but neither 'cfg' nor 'args', so the model cannot be rebuilt; "
            "use a checkpoint that fairseq-train wrote"
        )
    if args is not None:
        if not isinstance(args, Namespace):
            raise TypeError(f"its 'args' are a {type(args).__name__}")
        args = untrusted.Plain().of(args)
        _modernise(args)
        return args, args
    if OmegaConf.is_config(cfg):
        cfg = OmegaConf.create(untrusted.Plain().of(OmegaConf.to_container(cfg)))
        cfg = OmegaConf.to_container(cfg, resolve=True)
    model, task = [untrusted.Plain().of(cfg[name]) for name in ("model", "task")]
    for name, part in (("model", model), ("task", task)):
        if not isinstance(part, (dict, Namespace)):
            raise TypeError(f"its configuration of the {name} is a {type(part).__name__}")
    return model, task


def _modernise(args: Namespace) -> None:
    """What fairseq renamed in ``args`` over the years, as far as it tells what the model is."""
    if hasattr(args, "max_positions") and not hasattr(args, "max_source_positions"):
        args.max_source_positions = args.max_target_positions = args.max_positions
    if not hasattr(args, "task"):
        args.task = "translation"
    if isinstance(getattr(args, "data", None), list) and args.data:
        args.data = args.data[0]


def _checked_weights(named: str, path: str, weights: Dict[Any, Any]) -> Dict[str, Tensor]:
    """The weights, without what only some versions of fairseq write."""
    if not all(type(k) is str and isinstance(w, Tensor) for k, w in weights.items()):
        raise TypeError("not all of its weights are tensors")
    if not any(weight.is_floating_point() for weight in weights.values()):
        raise ValueError("it has no weights")
    # tied ones are there under several names
    claimed = sum(weight.numel() * weight.element_size() for weight in weights.values())
    if claimed > _MOST_NAMES * os.path.getsize(path):
        raise ValueError(f"its weights claim {claimed:,} bytes")
    kept = {name: w for name, w in weights.items() if not SECOND_COPIES.search(name)}
    broken = [name for name, weight in kept.items() if not _is_finite(name, weight)]
    if broken:
        raise CheckpointError(
            f"{named}: {len(broken)} of its weights hold NaN or inf ({', '.join(broken[:3])}): the "
            "training that wrote it diverged, or the file is damaged. Take an earlier checkpoint."
        )
    return kept


def _is_finite(name: str, weight: Tensor) -> bool:
    """Whether a weight has no NaN, inf or -inf; in a bias, -inf may rule a symbol out."""
    if name.endswith("_float_tensor"):  # kept for its dtype alone: memory nobody wrote to
        return True
    if not weight.is_floating_point() or not weight.numel():
        return True
    rules_out = weight.dim() == 1 and name.endswith("bias")
    try:
        return bool(weight.max() < math.inf) and (rules_out or bool(weight.min() > -math.inf))
    except RuntimeError:  # of a kind that no model has, which building it will say
        return True


def _checked_symbols(task_state: Any) -> Optional[Tuple[List[str], List[str]]]:
    source, target = task_state.get("source_symbols"), task_state.get("target_symbols")
    if not (source and target):
        return None
    for side in (source, target):
        if not all(type(symbol) is str for symbol in side):
            raise TypeError("a symbol of its vocabulary is not a string")
        # no dictionary's file could hold it
        if any("\n" in symbol or "\r" in symbol for symbol in side):
            raise ValueError("a symbol of its vocabulary contains a line break")
        "\n".join(side).encode("utf-8")
    return list(source), list(target)


def _checked_updates(history: Any) -> int:
    updates = [one.get("num_updates", 0) for one in history]
    if not all(isinstance(number, int) for number in updates):
        raise TypeError("its number of updates is not an integer")
    return int(updates[-1]) if updates else 0


# What fairseq-train names its checkpoints besides checkpoint_last.pt
_NAMED = re.compile(r"checkpoint(\d+|_\d+_\d+|_best|\.best_.+)\.pt")


def refuse_cut_short(path: str) -> None:
    """Refuse to train on from a checkpoint of which only the beginning was written.

    fairseq writes each checkpoint under another name first, but then copies it to
    ``checkpoint_last.pt``, where a kill or a full disk may come in between. What torch says of such
    a file ("Invalid argument", or advice on ``weights_only``) helps nobody.

    Raises:
        CheckpointError: it is such a file; the message names the newest one that is whole.
    """
    if not os.path.isfile(path) or not _cut_short(path):
        return
    folder = os.path.dirname(path)
    others = [os.path.join(folder, name) for name in os.listdir(folder) if _NAMED.fullmatch(name)]
    whole = [other for other in others if other != path and not _cut_short(other)]
    advice = "No whole checkpoint lies beside it: delete it to train from the beginning."
    if whole:
        advice = (
            f"Start with --restore-file {max(whole, key=os.path.getmtime)}, once: of those beside "
            "it that are whole, it is the newest, and training goes on from there."
        )
    raise CheckpointError(
        f"{path} is cut short: a kill or a full disk interrupted its writing. {advice}"
    )


def _cut_short(path: str) -> bool:
    """Whether a zip archive, torch's format since 1.6, has no end."""
    with open(path, "rb") as file:
        return b"PK".startswith(file.read(2)) and not zipfile.is_zipfile(path)
