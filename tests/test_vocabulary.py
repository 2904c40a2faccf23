"""SentencePiece models and dictionaries that are cut to what a text needs."""

import json
import random
import shutil
import struct
from pathlib import Path
from typing import Any, Dict, List, NamedTuple

import pytest
import sentencepiece
from fairseq.data import Dictionary
from subwords import SPECIAL, encode, piece, train, varint, written
from support import in_process, tree

from kd_plugin import vocabulary
from kd_plugin.checkpoints.dictionaries import index_map
from kd_plugin.decoding import open_sentencepiece
from kd_plugin.files import FileError
from kd_plugin.vocabulary import SubwordModel

MODEL_TYPES = ("unigram", "bpe")


def sentences(count: int, seed: int = 1) -> List[str]:
    """Of words that share their parts, as real ones do."""
    rng = random.Random(seed)
    parts = ["ge", "ver", "haus", "tür", "en", "lauf", "t", "s", "bau", "um", "ig", "keit"]
    words = ["".join(rng.choice(parts) for _ in range(rng.randint(1, 4))) for _ in range(60)]
    return [" ".join(rng.choice(words) for _ in range(rng.randint(1, 9))) for _ in range(count)]


@pytest.fixture(scope="module", params=MODEL_TYPES)
def content(request) -> bytes:
    return train(sentences(300), request.param, 120)


def test_text_of_kept_pieces_is_cut_as_before(content):
    """For any text: other pieces than its own are never needed, whatever else they could do."""
    whole = SubwordModel(content, "m")
    for seed in range(20):
        lines = sentences(seed + 1, seed=100 + seed)
        before = encode(content, lines)
        used = {symbol for line in before for symbol in line}
        cut = whole.cut(used)
        assert encode(cut, lines) == before
        assert len(cut) < len(content) and written(cut) == used & written(content)


def test_scores_and_all_other_settings_stay(content):
    """Compared as the classes of SentencePiece itself read them."""
    pytest.importorskip("google.protobuf")
    model_pb2 = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    before, after = model_pb2.ModelProto(), model_pb2.ModelProto()
    before.ParseFromString(content)
    keep = {"▁", "t", "haus", "▁ver", "keit", "e", "n", "a"} & written(content)
    after.ParseFromString(SubwordModel(content, "m").cut(keep))
    known = {one.piece: one for one in before.pieces}
    kept = [one.piece for one in after.pieces if one.type == 1]
    assert set(kept) == keep and kept == [one.piece for one in before.pieces if one.piece in keep]
    assert all(one.score == known[one.piece].score for one in after.pieces)
    assert after.trainer_spec.vocab_size == len(after.pieces)
    after.trainer_spec.vocab_size = before.trainer_spec.vocab_size
    assert after.trainer_spec == before.trainer_spec
    assert after.normalizer_spec == before.normalizer_spec


def test_bpe_reaches_a_piece_through_pieces_that_it_does_not_write():
    """abcd is made of ab and cd; of these cd is not kept, nor is bc, which would go wrong."""
    pieces = [piece("ab", -1), piece("cd", -2), piece("abcd", -3), piece("bc", -4)]
    letters = [piece(letter, -10) for letter in "abcd"]
    whole = b"".join([*SPECIAL, *pieces, *letters]) + model_settings(2) + without_prefix()
    assert encode(whole, ["abcd", "cd", "bcd", "bc"]) == [["abcd"], ["cd"], ["b", "cd"], ["bc"]]
    cut = SubwordModel(whole, "m").cut({"ab", "abcd", "a", "b", "c", "d"})
    assert written(cut) == {"ab", "abcd", "a", "b", "c", "d"}
    # merged to cd on the way, which is then split again
    assert encode(cut, ["abcd", "cd", "bcd", "bc"]) == [
        ["abcd"],
        ["c", "d"],
        ["b", "c", "d"],
        ["b", "c"],
    ]
    assert sentencepiece.SentencePieceProcessor(model_proto=cut).is_unused(4)


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_what_is_no_ordinary_piece_stays(kind):
    content = train(
        sentences(200),
        kind,
        400,
        byte_fallback=True,
        control_symbols=["<2de>"],
        user_defined_symbols=["<sep>"],
        add_dummy_prefix=False,
        pad_id=3,
        unk_surface=" ? ",
        self_test_sample_size=20,
    )
    cut = SubwordModel(content, "m").cut({"t", "▁", "<sep>"})
    line = "ﬁt t<sep>zeug"  # a ligature, which the normaliser takes apart
    model = sentencepiece.SentencePieceProcessor(model_proto=cut)
    spelled = [f"<0x{byte:02X}>" for byte in b"zeug"]
    assert model.encode(line, out_type=str) == [
        *("<0x66>", "<0x69>", "t", "▁", "t", "<sep>"),
        *spelled,
    ]
    assert model.decode(model.encode(line)) == "fit t<sep>zeug"
    before = sentencepiece.SentencePieceProcessor(model_proto=content)
    for name in ("unk_id", "bos_id", "eos_id", "pad_id"):
        assert getattr(model, name)() == getattr(before, name)()
    assert model.is_control(model.piece_to_id("<2de>"))
    assert model.decode([model.unk_id()]) == before.decode([before.unk_id()])


def test_special_symbols_that_stand_behind_pieces():
    """Their ids are among the trainer's settings, where other software looks for them."""
    pieces = [piece("▁", -1), piece("a", -2), piece("<unk>", 0, 2), piece("b", -3)]
    pieces += [piece("<pad>", 0, 3)]
    ids = varint(40 << 3) + varint(2) + varint(43 << 3) + varint(4)
    settings = b"\x12" + varint(2 + len(ids)) + b"\x18\x01" + ids
    cut = SubwordModel(b"".join(pieces) + settings, "m").cut({"▁", "b"})
    assert cut.endswith(varint(40 << 3) + varint(1) + varint(43 << 3) + varint(3))
    assert sentencepiece.SentencePieceProcessor(model_proto=cut).pad_id() == 3


def model_settings(kind: int) -> bytes:
    return b"\x12\x02\x18" + varint(kind)


def without_prefix() -> bytes:
    return b"\x1a\x02\x18\x00"


# the command


class Files(NamedTuple):
    spm: Path
    dictionary: Path
    text: Path
    valid: Path

    @property
    def arguments(self) -> List[Any]:
        return ["--spm", self.spm, "--dict", self.dictionary, "--text", self.text]


@pytest.fixture(params=MODEL_TYPES)
def files(request, tmp_path) -> Files:
    return make_files(tmp_path, train(sentences(300), request.param, 120))


def make_files(folder: Path, content: bytes, lacks: Any = (), extra: Any = ("__de__",)) -> Files:
    files = Files(*(folder / name for name in ("spm.model", "dict.txt", "train.txt", "valid.txt")))
    files.spm.write_bytes(content)
    symbols = [*sorted(written(content) - set(lacks)), *extra, "madeupword0000"]
    files.dictionary.write_text("".join(f"{symbol} 1\n" for symbol in symbols))
    files.text.write_text("\n".join(sentences(30, seed=2)) + "\n")
    files.valid.write_text("\n".join(sentences(20, seed=3)) + "\n")
    return files


def asked(files: Files, output: Path, **more: Any) -> vocabulary.Asked:
    return vocabulary.Asked(
        str(files.spm), str(files.dictionary), [str(files.text)], str(output), **more
    )


def counts_of(path: Path) -> Dict[str, int]:
    return {line.rsplit(" ", 1)[0]: int(line.split()[-1]) for line in path.open()}


def test_all_that_a_text_needs(files, tmp_path):
    output = tmp_path / "cut"
    run = in_process(
        "fairseq-kd-vocabulary", *files.arguments, "--valid", files.valid, "--output", output
    )
    run.ok()
    lines = files.text.read_text().splitlines()
    whole, cut = files.spm.read_bytes(), (output / "spm.model").read_bytes()
    before = encode(whole, lines)
    assert encode(cut, lines) == before
    used = [symbol for line in before for symbol in line]
    letters = set("".join(used)) & written(whole)
    counted = counts_of(output / "dict.txt")
    assert counted == {symbol: used.count(symbol) for symbol in {*used, *letters}}
    assert list(counted.values()) == sorted(counted.values(), reverse=True)
    student, teacher = (Dictionary.load(str(f)) for f in (output / "dict.txt", files.dictionary))
    assert index_map(student.symbols, teacher.symbols) is not None
    # of other text, what is lost, counted by hand
    lines = files.valid.read_text().splitlines()
    before, after = encode(whole, lines), encode(cut, lines)
    measured = json.loads((output / "record.json").read_text())["measured"]
    assert measured["text"]["differently"] == 0
    assert measured["valid"]["tokens"] == sum(map(len, before))
    assert measured["valid"]["tokens_after"] == sum(map(len, after))
    lost = sum(not (set(line) <= set(counted)) for line in before)
    assert lost and measured["valid"]["differently"] >= lost
    assert measured["valid"]["unknown"] == sum(s not in counted for line in after for s in line)
    assert f"{len(student)} of the teacher's {len(teacher)} symbols" in run.text


def test_places_of_tokens_are_compared(tmp_path):
    """Of "▁ab c d" only d stays where it is, though c is among the pieces of both."""
    pieces = [piece("▁a", -2), piece("▁ab", -1), piece("bc", -4.5), piece("cc", -9)]
    letters = [piece(letter, -5) for letter in "▁abcde"]
    content = b"".join([*SPECIAL, *pieces, *letters]) + model_settings(1)
    files = make_files(tmp_path, content)
    files.text.write_text("abcd\na e\nbc\n" * 2 + "bc bc\n" * 9)
    record = vocabulary.make(asked(files, tmp_path / "cut", size=4 + 6 + 2))
    # kept: letters, and of bc (20), ▁a (2), ▁ab (2) the most frequent and the shorter
    assert {"bc", "▁a"} < set(counts_of(tmp_path / "cut" / "dict.txt"))
    assert encode(content, ["abcd"]) == [["▁ab", "c", "d"]]
    assert encode((tmp_path / "cut" / "spm.model").read_bytes(), ["abcd"]) == [["▁a", "bc", "d"]]
    assert record["measured"]["text"]["differently"] == 2 * 2
    assert record["measured"]["text"]["tokens"] == 2 * (3 + 3 + 2) + 9 * 4


def test_a_size(files, tmp_path):
    all_of_it = vocabulary.make(asked(files, tmp_path / "all"))
    size = all_of_it["symbols"] - 7
    record = vocabulary.make(asked(files, tmp_path / "cut", size=size))
    assert record["symbols"] == size == len(Dictionary.load(str(tmp_path / "cut" / "dict.txt")))
    every, kept = (counts_of(tmp_path / name / "dict.txt") for name in ("all", "cut"))
    left_out = [every[symbol] for symbol in every if symbol not in kept]
    assert len(left_out) == 7 and all(len(s) > 1 for s in set(every) - set(kept))
    assert max(left_out) <= min(every[symbol] for symbol in kept if len(symbol) > 1)
    values = record["measured"]["text"]
    assert values["unknown"] == 0 and sum(left_out) <= values["differently"] < values["tokens"]
    # no smaller than its characters
    with pytest.raises(FileError, match="--size 9: .* are (?P<needed>[0-9]+) symbols") as error:
        vocabulary.make(asked(files, tmp_path / "small", size=9))
    needed = int(str(error.value).split(" are ")[1].split()[0])
    record = vocabulary.make(asked(files, tmp_path / "small", size=needed))
    assert all(len(symbol) == 1 for symbol in counts_of(tmp_path / "small" / "dict.txt"))
    assert record["symbols"] == needed and record["measured"]["text"]["unknown"] == 0


def test_a_least_count(files, tmp_path):
    every = vocabulary.make(asked(files, tmp_path / "all"))
    record = vocabulary.make(asked(files, tmp_path / "cut", min_count=5))
    counted = counts_of(tmp_path / "all" / "dict.txt")
    expected = {symbol for symbol, n in counted.items() if n >= 5 or len(symbol) == 1}
    assert set(counts_of(tmp_path / "cut" / "dict.txt")) == expected
    assert 8 < record["symbols"] < every["symbols"]


def test_characters(tmp_path):
    files = make_files(
        tmp_path, train([*sentences(200), "xyz"], "unigram", 100, character_coverage=1.0)
    )
    few = vocabulary.make(asked(files, tmp_path / "few"))
    vocabulary.make(asked(files, tmp_path / "all", all_characters=True))
    few_symbols, symbols = (set(counts_of(tmp_path / n / "dict.txt")) for n in ("few", "all"))
    assert symbols - few_symbols == set("xyz") and few["characters_left_out"] == 3
    lines = vocabulary.summary_lines(few, tmp_path)
    assert "3 characters" in lines[-1] and "--all-characters" in lines[-1]


def test_a_piece_that_the_teacher_lacks_is_not_written(files, tmp_path):
    """The dictionary was made from text that never needed it."""
    content = files.spm.read_bytes()
    used = {s for line in encode(content, files.text.read_text().splitlines()) for s in line}
    lacks = sorted(symbol for symbol in used if len(symbol) > 1)[::2]
    files = make_files(tmp_path, content, lacks)
    values = vocabulary.make(asked(files, tmp_path / "cut"))["measured"]["text"]
    assert not set(lacks) & set(counts_of(tmp_path / "cut" / "dict.txt"))
    assert not set(lacks) & written((tmp_path / "cut" / "spm.model").read_bytes())
    assert values["unknown"] == 0 < values["unknown_before"] <= values["differently"]


def test_a_character_that_the_teacher_knows_within_pieces_alone(tmp_path):
    """As in a dictionary whose text had no other word with it: those pieces are never left out."""
    pieces = [piece("▁ö", -3), piece("öl", -2), piece("ab", -1)]
    letters = [piece(letter, -5) for letter in "▁öabl"]
    files = make_files(tmp_path, b"".join([*SPECIAL, *pieces, *letters]), lacks="ö")
    files.text.write_text("ab " * 9 + "öl\naöl\n")
    record = vocabulary.make(asked(files, tmp_path / "cut", size=4 + 4 + 1))
    symbols = set(counts_of(tmp_path / "cut" / "dict.txt"))
    assert symbols == {*"▁abl", "öl"} and record["measured"]["text"]["unknown"] == 0


def test_what_is_unknown_is_told(tmp_path):
    files = make_files(tmp_path, train(sentences(200), "unigram", 80), lacks="k")
    files.text.write_text("haus k\nbaum ☃☃\n")
    record = vocabulary.make(asked(files, tmp_path / "cut"))
    values = record["measured"]["text"]
    assert values["unknown"] == values["unknown_before"] == 2
    assert set(values["examples"]) == {"k", "☃☃"}
    assert (
        "2 unknown to the dictionary, 2 before: " in vocabulary.summary_lines(record, tmp_path)[1]
    )


def test_bytes_stay_whether_or_not_the_teacher_knows_them(tmp_path):
    content = train(sentences(200), "bpe", 400, byte_fallback=True)
    files = make_files(tmp_path, content, extra=[f"<0x{b:02X}>" for b in "☃".encode()])
    files.text.write_text("haus ☃\n")
    files.valid.write_text("haus €\n")
    record = vocabulary.make(asked(files, tmp_path / "cut", valid=[str(files.valid)]))
    assert record["bytes_unknown"] == 256 - 3
    assert record["measured"]["text"]["unknown"] == 0
    valid = record["measured"]["valid"]
    # of three bytes the second is the snowman's, too
    assert (valid["unknown"], valid["examples"]) == (2, ["<0x82>", "<0xAC>"])
    assert {"<0xE2>", "<0x98>", "<0x83>"} < set(counts_of(tmp_path / "cut" / "dict.txt"))


# what is there already


def test_again(files, tmp_path):
    output = tmp_path / "cut"
    command = ["fairseq-kd-vocabulary", *files.arguments, "--output", output]
    output.mkdir()  # an empty folder is as good as none
    first = in_process(*command).ok()
    before = tree(output)
    again = in_process(*command).ok()
    assert "nothing is left to do" in again.text and tree(output) == before
    assert first.text.splitlines()[-1] in again.text
    message = in_process(*command, "--min-count", 3).refusal
    assert "min_count is 3 here, 1 there" in message and "--overwrite" in message
    assert tree(output) == before
    in_process(*command, "--min-count", 3, "--overwrite").ok()
    assert tree(output) != before
    (output / "dict.txt").write_text("a 1\n")
    message = in_process(*command, "--min-count", 3).refusal
    assert "dict.txt is no longer what this command wrote" in message
    (output / "train.bin").write_text("")
    message = in_process(*command, "--overwrite").refusal
    assert "files that this command did not write (train.bin)" in message
    assert (output / "dict.txt").read_text() == "a 1\n"
    assert sorted(path.name for path in tmp_path.iterdir() if "new" in path.name) == []


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: f.spm.write_bytes(b""), "whole and undamaged (it has no pieces)"),
        (lambda f: f.spm.write_bytes(b"no model at all"), "expected a SentencePiece model, whole"),
        (lambda f: f.spm.write_bytes(f.spm.read_bytes()[:-9]), "undamaged (it ends within"),
        (lambda f: f.spm.write_bytes(train(sentences(99), "word", 40)), "its type is word, and"),
        (lambda f: f.spm.write_bytes(train(sentences(99), "char", 20)), "its type is char, and"),
        (lambda f: f.spm.unlink(), "spm.model: no such file"),
        (lambda f: f.dictionary.write_text("haus 5\nbaum 3\nlauf 2\n▁t 1\n"), "does not belong to"),
        (lambda f: f.dictionary.write_text("haus\n"), "cannot be read as a dictionary"),
        (lambda f: f.text.write_bytes(b"haus\nba\xffum\n"), "line 2 is not UTF-8 (byte 3 of it)"),
        (lambda f: f.text.write_text("\n \n"), "expected text, found none"),
        (lambda f: f.valid.write_text(""), "valid.txt: expected text, found none"),
        (lambda f: f.valid.unlink(), "--valid"),
    ],
)
def test_bad_input(tmp_path, spoil, message):
    files = make_files(tmp_path, train(sentences(300), "unigram", 80))
    spoil(files)
    command = [*files.arguments, "--valid", files.valid, "--output", tmp_path / "cut"]
    run = in_process("fairseq-kd-vocabulary", *command)
    assert message in run.refusal
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("cut")]


def test_all_that_is_wrong_with_the_flags_is_told_at_once(tmp_path):
    files = make_files(tmp_path, b"")
    files.text.unlink()
    output = tmp_path / "no" / "folder"
    run = in_process("fairseq-kd-vocabulary", *files.arguments, "--output", output, "--size", 0)
    for part in ("train.txt: no such file", "--size must be 1", "there is no folder"):
        assert part in run.refusal


def test_a_normaliser_that_leads_beyond_its_end(tmp_path):
    """Older SentencePiece follows it there, whichever flag names the model."""
    table = struct.pack("<I", 1024) + struct.pack("<I", 1 << 10) * 256 + b"\0"
    content = b"".join(SPECIAL) + piece("a", -1)

    def model(table: bytes) -> bytes:
        return content + b"\x1a" + varint(3 + len(table)) + b"\x12" + varint(len(table)) + table

    def opened(content: bytes) -> Any:
        (tmp_path / "m").write_bytes(content)
        return open_sentencepiece(str(tmp_path / "m"), "--flag")

    SubwordModel(model(table), "m")
    assert opened(model(table)).get_piece_size() == len(SPECIAL) + 1
    for broken in (
        table.replace(struct.pack("<I", 1 << 10), struct.pack("<I", 1 << 20)),
        table.replace(struct.pack("<I", 1 << 10), struct.pack("<I", 1 << 8 | 1 << 10)),
        table[:-1],
        table[:300],
    ):
        with pytest.raises(FileError, match="normaliser"):
            SubwordModel(model(broken), "m")
        with pytest.raises(FileError, match="^--flag .*m: cannot be read .*normaliser"):
            opened(model(broken))
    with pytest.raises(FileError, match="it is empty"):
        opened(b"")


def test_an_interruption_leaves_nothing(files, tmp_path, monkeypatch):
    output = tmp_path / "cut"
    vocabulary.make(asked(files, output))
    before = tree(tmp_path)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kd_plugin.vocabulary.pipeline.write_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
        vocabulary.make(asked(files, output, min_count=2, overwrite=True))
    assert tree(tmp_path) == before
    shutil.rmtree(str(output))
    with pytest.raises(KeyboardInterrupt):
        vocabulary.make(asked(files, output))
    assert not output.exists()
