"""Teachers of several languages: what they say to a student of two is what stock fairseq says."""

import copy
import re
from argparse import Namespace

import pytest
import torch
from fairseq import tasks
from fairseq.data import Dictionary
from letters import changed, configuration, task_of, write_letters, write_model

from kd_plugin.cache import CachedSubset
from kd_plugin.checkpoints import (
    AskedTags,
    Checkpoint,
    CheckpointError,
    Tags,
    VocabularyError,
    family_tags,
    parse_symbols,
)
from kd_plugin.errors import UserError
from kd_plugin.teachers import TRAINING, Student, Teacher, TeacherError, TeacherSettings
from kd_plugin.teachers.source import RunningTeacher

LINES = ("a b c", "b", "c d e f g", "d e", "e f g a b c d")
SIMPLE = ("--task", "translation_multi_simple_epoch", "--lang-pairs", "aa-bb,bb-aa")
EACH = ("--task", "multilingual_translation", "--lang-pairs", "aa-bb,bb-aa")
BOTH = ("--encoder-langtok", "src", "--decoder-langtok")
SOURCE_ALONE = ("--encoder-langtok", "tgt")
MINED = ("--langtoks", "{'main': ('src.mined', 'tgt')}", "--langtoks-specs", "main,mined")
TAGGED = {
    "no tags": SIMPLE,
    "the source's language": (*SIMPLE, "--encoder-langtok", "src"),
    "the target's language": (*SIMPLE, *SOURCE_ALONE),
    "the target alone": (*SIMPLE, "--decoder-langtok"),
    "both": (*SIMPLE, *BOTH),
    "both, of more languages in another order": (*SIMPLE, *BOTH, "--langs", "cc,bb,aa"),
    "both, in brackets": (*SIMPLE, *BOTH, "--lang-tok-style", "mbart"),
    "in the place of ends": (*SIMPLE, *BOTH, "--lang-tok-replacing-bos-eos"),
    "of data that were mined": (*SIMPLE, *BOTH, *MINED),
    "a model for each direction": EACH,
    "for each, the source's": (*EACH, *SOURCE_ALONE),
    "for each, both": (*EACH, *BOTH),
}
LONGER = {"no tags": (0, 0), "the target's language": (1, 0), "the target alone": (0, 1)}


@pytest.fixture
def data(tmp_path):
    """Sentences of different lengths: there is padding."""
    return write_letters(tmp_path / "data", lines=LINES)


def student(data):
    return Student(data.source, data.target, "aa", "bb")


def architecture(flags):
    return "multilingual_transformer" if "multilingual_translation" in flags else "transformer"


def by_stock(data, model, flags):
    """What a model says of the student's symbols at each target token, by its own task's data."""
    cfg = configuration(data, *flags)
    task = tasks.setup_task(cfg.task)
    task.load_dataset("valid")
    dataset = task.dataset("valid")
    dataset.ordered_indices()
    sample = dataset.collater([dataset[i] for i in range(len(dataset))])
    model = getattr(model, "models", {"aa-bb": model})["aa-bb"]
    lp = torch.log_softmax(model(**sample["net_input"])[0][..., : len(data.target)], -1)
    pad, found = data.target.pad(), {}
    for i, rows, target in zip(sample["id"].tolist(), lp, sample["target"]):
        target = target[target.ne(pad)]
        tags = int((target >= len(data.target)).sum())  # before the sentence
        assert target[tags:].ge(4).sum() == len(LINES[i].split())
        found[i] = rows[tags : len(target)]
    return found


def by_us(bin, path, **settings):
    settings.setdefault("data", [str(bin.folder)])
    opened = Teacher.open(TeacherSettings([str(path)], **settings), student(bin))
    return says(opened, bin), opened


def says(teacher, data):
    task = task_of(data)
    task.load_dataset("valid")
    dataset = task.dataset("valid")
    batch = dataset.collater([dataset[i] for i in range(len(dataset))])
    answer, width, found = teacher(batch), batch["target"].size(1), {}
    for at, (i, target) in enumerate(zip(batch["id"].tolist(), batch["target"])):
        rows = target.ne(data.target.pad()).nonzero().squeeze(1) + at * width
        found[i] = torch.log_softmax(answer.logits(rows), -1)
    return found


def assert_same(found, expected):
    assert sorted(found) == sorted(expected) == list(range(len(LINES)))
    for i in found:
        torch.testing.assert_close(found[i], expected[i], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TAGGED)
def test_it_says_what_stock_makes_of_the_same_sentences(name, data, tmp_path):
    path, flags = tmp_path / "teacher.pt", TAGGED[name]
    model = write_model(path, data, architecture(flags), flags)
    found, opened = by_us(data, path)
    assert_same(found, by_stock(data, model, flags))
    replacing = "--lang-tok-replacing-bos-eos" in flags or EACH[1] in flags
    longer = LONGER.get(name, (1, "--decoder-langtok" in flags))
    assert opened.longer == ((0, 0) if replacing else longer)


def test_tags_matter(data, tmp_path):
    """The same model says something else without them, and of another direction."""
    path = tmp_path / "teacher.pt"
    write_model(path, data, "transformer", TAGGED["both"])
    found, _ = by_us(data, path)
    for asked in (
        AskedTags(before_source=()),
        AskedTags(before_target=("</s>",)),
        AskedTags(languages=("bb", "aa")),
    ):
        other, _ = by_us(data, path, tags=asked)
        assert not torch.allclose(found[0], other[0], atol=1e-4)


def dictionaries_with(data, folder, *tags):
    """A folder with the data's dictionaries and these symbols behind."""
    folder.mkdir()
    for lang in ("aa", "bb"):
        dictionary = copy.deepcopy(data.source)
        for tag in tags:
            dictionary.add_symbol(tag)
        dictionary.save(str(folder / f"dict.{lang}.txt"))
    return folder


def test_flags_stand_for_a_task_that_says_nothing(data, tmp_path):
    """The same weights as a model of ``translation``, whose dictionaries' files have the tags."""
    path = tmp_path / "teacher.pt"
    model = write_model(path, data, "transformer", TAGGED["both"])
    expected = by_stock(data, model, TAGGED["both"])
    changed(path, task="translation")
    own = dictionaries_with(data, tmp_path / "own", "__aa__", "__bb__")
    listed = AskedTags(before_source=("__aa__",), before_target=("</s>", "__bb__"))
    for asked in (listed, AskedTags(family="m2m")):
        assert_same(by_us(data, path, data=[str(own)], tags=asked)[0], expected)
    suffixed = AskedTags(after_source=("__aa__", "</s>", "__bb__"))
    _, opened = by_us(data, path, data=[str(own)], tags=suffixed)
    assert opened.longer == (2, 0)
    tokens = torch.tensor([[1, 4, 5, 2], [6, 7, 4, 2]])  # padded on the left
    inputs = {"src_tokens": tokens, "src_lengths": torch.tensor([3, 4])}
    inputs["prev_output_tokens"] = torch.tensor([[2, 4]] * 2)
    read = opened.members[0].inputs({"net_input": inputs})
    aa, bb = 12, 13
    assert read["src_tokens"].tolist() == [[1, 4, 5, aa, 2, bb], [6, 7, 4, aa, 2, bb]]
    assert read["src_lengths"].tolist() == [5, 6]
    assert read["prev_output_tokens"].tolist() == [[2, 4]] * 2


def test_a_family_has_its_own_names_of_languages(data, tmp_path):
    """Beside those that the checkpoint of ``translation`` and the data have."""
    path = tmp_path / "teacher.pt"
    write_model(path, data, "transformer", TAGGED["both"])
    expected, _ = by_us(data, path)
    changed(path, task="translation", source_lang="aa", target_lang="bb")
    own = dictionaries_with(data, tmp_path / "own", "[aa_XX]", "[bb_BB]")
    for languages in (("aa_XX", "bb_BB"), None):
        asked = AskedTags(family="mbart50", languages=languages)
        teacher = TeacherSettings([str(path)], data=[str(own)], tags=asked)
        assert_same(says(Teacher.open(teacher, student(data)), data), expected)


def test_an_ensemble_of_one_with_tags_and_one_without(data, tmp_path):
    paths = [str(tmp_path / name) for name in ("tagged.pt", "plain.pt")]
    for path, flags in zip(paths, (TAGGED["both"], ())):
        write_model(path, data, "transformer", flags)
    alone = [by_us(data, path)[0] for path in paths]
    together = Teacher.open(TeacherSettings(paths, data=[str(data.folder)]), student(data))
    assert together.longer == (1, 1)
    mean = {i: (alone[0][i].exp() / 2 + alone[1][i].exp() / 2).log() for i in alone[0]}
    assert_same(says(together, data), mean)


def test_what_it_calls_the_languages(data, tmp_path):
    path = tmp_path / "teacher.pt"
    flags = ("--lang-pairs", "aa-bb", "--langs", "aa,bb,cc")
    model = write_model(path, data, "transformer", (*SIMPLE[:2], *flags, *BOTH))
    expected = by_stock(data, model, (*SIMPLE[:2], *flags, *BOTH))
    changed(path, langs=["aa_AA", "bb_XX", "bb_YY"], lang_pairs=["aa_AA-bb_XX"])
    with pytest.raises(CheckpointError) as error:
        by_us(data, path)
    assert "bb may be bb_XX or bb_YY of the languages of teacher" in str(error.value)
    assert "--teacher-langs SOURCE,TARGET says" in str(error.value)
    found, _ = by_us(data, path, tags=AskedTags(languages=("aa", "bb_XX")))
    assert_same(found, expected)
    changed(path, langs=["xx", "yy"])
    with pytest.raises(CheckpointError, match=r"aa is none of the languages of .* \(xx, yy\)"):
        by_us(data, path)


def test_a_list_of_languages_and_a_dictionary_in_files(data, tmp_path):
    """The checkpoint only names them, somewhere; here they lie where dictionaries do."""
    listing, single = tmp_path / "langs.txt", tmp_path / "shared.txt"
    listing.write_text("cc\naa\n\nbb\n")
    data.source.save(str(single))
    flags = (*SIMPLE, *BOTH, "--lang-dict", str(listing), "--fixed-dictionary", str(single))
    path = tmp_path / "models" / "teacher.pt"
    path.parent.mkdir()
    model = write_model(path, data, "transformer", flags)
    expected = by_stock(data, model, flags)
    changed(path, lang_dict="/far/langs.txt", fixed_dictionary="/far/shared.txt")
    with pytest.raises(CheckpointError, match="listed in a file langs.txt: put it beside .*data"):
        by_us(data, path)
    for name in (listing, single):
        name.rename(path.parent / name.name)
    found, _ = by_us(data, path, data=[])
    assert_same(found, expected)
    with pytest.raises(VocabularyError, match="expected shared.txt or dict.aa.txt and dict.bb.txt"):
        by_us(data, path, data=[str(tmp_path)])


def test_directions_that_it_was_not_trained_for(data, tmp_path, caplog):
    path = tmp_path / "teacher.pt"
    write_model(path, data, "multilingual_transformer", EACH)
    with pytest.raises(CheckpointError, match="translates aa-bb, bb-aa, each .* not bb-bb"):
        by_us(data, path, tags=AskedTags(languages=("bb", "bb")))
    write_model(path, data, "transformer", TAGGED["both"])
    by_us(data, path, tags=AskedTags(languages=("bb", "bb")))
    assert "WAS TRAINED FOR aa-bb, bb-aa, not for bb-bb" in caplog.text


@pytest.mark.parametrize(
    "values",
    [
        {"langtoks": "main"},
        {"langtoks": {"main": 3}},
        {"langs": 7},
        {"lang_tok_style": "strange"},
        {"lang_dict": 5},
        {"lang_pairs": [None]},
    ],
)
def test_options_that_are_none(values, data, tmp_path):
    path = tmp_path / "teacher.pt"
    write_model(path, data, "transformer", TAGGED["both"])
    changed(path, **values)
    with pytest.raises(UserError):
        by_us(data, path)


def test_tags_that_its_dictionary_lacks(data, tmp_path):
    path = tmp_path / "teacher.pt"
    write_model(path, data, "transformer", TAGGED["both"])
    with pytest.raises(VocabularyError) as error:
        by_us(data, path, tags=AskedTags(before_target=("</s>", "__b__")))
    assert "its target dictionary (14 symbols) lacks the tag '__b__'; nearest are" in str(
        error.value
    )
    assert "'__bb__'" in str(error.value)
    with pytest.raises(TeacherError, match="no tags of nllb: expected symbols as deu_Latn or"):
        by_us(data, path, tags=AskedTags(family="nllb"))


def test_the_longest_sentence_with_its_tags(data, tmp_path):
    """Seven letters and the end of sentence: eight tokens."""
    path = tmp_path / "teacher.pt"
    write_model(path, data, "transformer", (*TAGGED["both"], "--max-source-positions", "8"))
    source = RunningTeacher(TeacherSettings([str(path)], data=[str(data.folder)]), student(data))
    source.teacher = Teacher.open(source.settings, source.student)
    assert source.teacher.max_positions()[0] == 7
    lengths = torch.tensor([[8, 8]]).numpy()
    source.look_over(None, lengths, lengths[:, 0] > 0)
    with pytest.raises(TeacherError) as error:
        source.begin_training(None, None, None, "train")
    for words in (
        "up to 8 source and 8 target tokens",
        "at most 7 source and 1023 target tokens beside its tags, which take 1 and 1",
        "--max-source-positions 7",
    ):
        assert words in str(error.value)


def test_what_is_noted_of_a_teacher_with_tags(data, tmp_path):
    path = tmp_path / "teacher.pt"
    write_model(path, data, "transformer", TAGGED["both"])
    notes = [
        by_us(data, path, tags=asked)[1].describe()["teachers"][0]
        for asked in (AskedTags(), AskedTags(before_source=()))
    ]
    assert notes[0].pop("tags") == {
        "before_source": ["__aa__"],
        "after_source": ["</s>"],
        "before_target": ["</s>", "__bb__"],
    }
    assert notes[1].pop("tags")["before_source"] == []
    assert notes[0] == notes[1]
    write_model(path, data, "transformer", ())
    assert "tags" not in by_us(data, path)[1].describe()["teachers"][0]  # as it always was

    def cache(**more):
        opened = object.__new__(CachedSubset)
        opened.k, opened.temperatures, opened.samples = 8, [], 0
        opened.manifest = {"teachers": [{"sha256": "x", **more}]}
        return opened

    assert not cache().compatible_with(cache(tags={"before_source": ["__aa__"]}))
    assert cache().compatible_with(cache())


# families


NLLB = ["<s>", "deu_Latn", "eng_Latn", "est_Latn", "zho_Hans", "zho_Hant", "a", "deu_latn"]


@pytest.mark.parametrize(
    "family, symbols, languages, expected",
    [
        ("m2m", ["__de__", "__en__", "de"], ("de", "en"), ("__de__", "__en__")),
        ("nllb", NLLB, ("deu_Latn", "eng_Latn"), ("deu_Latn", "eng_Latn")),
        ("nllb", NLLB, ("deu", "zho_Hant"), ("deu_Latn", "zho_Hant")),
        (
            "nllb",
            ["__deu_Latn__", "__eng_Latn__"],
            ("deu", "eng"),
            ("__deu_Latn__", "__eng_Latn__"),
        ),
        ("mbart50", ["de_DE", "en_XX"], ("de", "en"), ("de_DE", "en_XX")),
        ("mbart50", ["[de_DE]", "[en_XX]"], ("de_DE", "en"), ("[de_DE]", "[en_XX]")),
    ],
)
def test_the_tags_of_families(family, symbols, languages, expected):
    """Transformers' documentation has the orders: M2M-100 and mBART-50 ``[lang] X </s>``, NLLB so
    since April 2023, and all decode from ``</s>`` with the target's tag forced."""
    found = family_tags(family, languages, symbols, symbols)
    assert found == Tags((expected[0],), ("</s>",), ("</s>", expected[1]))
    assert found.longer == (1, 1)


@pytest.mark.parametrize(
    "family, language, words",
    [
        ("nllb", "es", "es is none of .* (est_Latn, ...)"),  # Estonian is no Spanish
        ("nllb", "de", "de is none of .* (deu_Latn, ...): name the one"),
        ("nllb", "zho", "zho may be zho_Hans or zho_Hant"),
        ("m2m", "deu", "expected symbols as __de__"),
    ],
)
def test_languages_of_families_that_are_not_clear(family, language, words):
    with pytest.raises(VocabularyError, match=re.escape(words).replace(r"\.\*", ".*")):
        family_tags(family, (language, language), NLLB, NLLB)


def test_lists_of_symbols():
    assert parse_symbols(None) is None
    assert parse_symbols(" </s>  __en__ ") == parse_symbols("</s>,__en__") == ("</s>", "__en__")
    assert parse_symbols("") == ()


# architectures that nobody here registers


def test_a_transformer_by_another_name(data, tmp_path, caplog):
    path = tmp_path / "teacher.pt"
    write_model(path, data, "transformer", TAGGED["both"])
    expected, _ = by_us(data, path)
    changed(path, arch="transformer_18_18")
    caplog.set_level("INFO")
    assert_same(by_us(data, path)[0], expected)
    assert "no architecture 'transformer_18_18'; its options are a transformer's" in caplog.text
    checkpoint = Checkpoint.open(str(path), TRAINING)
    assert (checkpoint.architecture, checkpoint.foreign) == ("transformer", "transformer_18_18")


def test_it_is_none_if_its_weights_are_others(data, tmp_path):
    path = tmp_path / "teacher.pt"
    write_model(path, data, "transformer", ())
    changed(path, arch="mine", layernorm_embedding=True)
    with pytest.raises(CheckpointError) as error:
        by_us(data, path)
    for words in ("layernorm_embedding", "mine was taken for a transformer", "--teacher-user-dir"):
        assert words in str(error.value)


def test_it_runs_nothing_either(data, tmp_path):
    """Its options are looked over as a transformer's are."""
    path = tmp_path / "teacher.pt"
    write_model(path, data, "transformer", ())
    changed(path, arch="mine", adaptive_softmax_cutoff="[print('evaluated')]")
    with pytest.raises(CheckpointError, match="adaptive_softmax_cutoff is .* would execute"):
        by_us(data, path)
    state = torch.load(str(path), **({} if torch.__version__ < "2" else {"weights_only": False}))
    options = {**vars(state["args"]), "_name": "mine", "adaptive_softmax_cutoff": None}
    task = {"_name": "translation", "source_lang": "aa", "target_lang": "bb"}
    torch.save({"cfg": {"model": Namespace(**options), "task": task}, **state, "args": None}, path)
    assert by_us(data, path)[1].members[0].model.args.arch == "transformer"


def test_dictionaries_stay_the_datas(data, tmp_path):
    """Adding a teacher's tags must not change the student's."""
    path = tmp_path / "alone" / "teacher.pt"
    path.parent.mkdir()
    write_model(path, data, "transformer", TAGGED["both"])
    ours = student(data)
    before = list(ours.source.symbols)
    Teacher.open(TeacherSettings([str(path)]), ours)
    assert ours.source.symbols == before
    assert isinstance(ours.source, Dictionary)
