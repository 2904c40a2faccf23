"""Training sets that are put together: how much of each, in which order, and what is refused."""

import hashlib
import json
import shutil
import struct

import numpy as np
import pytest
import torch
from letters import LINES, LISTS, LetterCorpus, write_letters
from support import tree

from kd_plugin.commands import sequences as command
from kd_plugin.decoding import databin
from kd_plugin.files import FileError
from kd_plugin.sequences import Choice, Filters, Output, Student, choose, mixing
from kd_plugin.sequences.mixing import ORIGINAL, SHUFFLED, Mix, Part, Wanted, open_mix, parse_mix


@pytest.fixture
def data(tmp_path) -> databin.DataBin:
    return write_letters(tmp_path / "data")


def write_pairs(folder, *pairs) -> str:
    """A data-bin with these pairs as its training set."""
    found = write_letters(folder)
    for side, lang in enumerate(("aa", "bb")):
        lines = [databin.encode(found.source, pair[side]) for pair in pairs]
        databin.write(folder / f"train.aa-bb.{lang}", found.source, lines)
    return str(folder)


def train(folder, kind=".subwords"):
    """Pairs of the training set, as text, which must be the binarised one, too."""
    texts = [(folder / "text" / f"train{kind}.{lang}").read_text() for lang in ("aa", "bb")]
    found = list(zip(*(text.splitlines() for text in texts)))
    data = databin.DataBin(str(folder), "aa", "bb")
    sides = [data.side("train", lang) for lang in data.langs]
    assert [len(side) for side in sides] == [len(found)] * 2
    for i, pair in enumerate(found):
        assert pair == tuple(databin.decode(data.source, side[i].tolist()) for side in sides)
    return found


def record(folder):
    return json.loads((folder / "record.json").read_text())


def run(*arguments) -> int:
    return command.main([str(argument) for argument in (*arguments, "--cpu")])


# what is asked


def test_what_is_mixed_and_how_much(tmp_path):
    (tmp_path / "a=2").mkdir()
    assert parse_mix("original=2:mono=0.5") == [Wanted(ORIGINAL, 2.0), Wanted("mono", 0.5)]
    assert parse_mix("mono") == [Wanted("mono", 1.0)]
    assert parse_mix(f"{tmp_path}/a=2=3")[0] == Wanted(f"{tmp_path}/a=2", 3.0)
    assert parse_mix("a=b=.25") == [Wanted("a=b", 0.25)]


@pytest.mark.parametrize("text", ["a=0", "a=x", "a=-1", "a=nan", "a=inf", "a=1e3", "a=1001", "a="])
def test_weights_that_are_none(text):
    with pytest.raises(FileError, match="--mix a=.*: expected a weight above 0 and up to 1000"):
        parse_mix(text)


def test_every_fault_of_a_mix_is_told(tmp_path):
    with pytest.raises(FileError) as error:
        parse_mix(f"{tmp_path}::b=x:{tmp_path}/.:original:original=2")
    for part in ("an empty ", "--mix b=x", "/. twice", "original twice"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "weight, whole, sampled", [(1, 1, 0), (2.5, 2, 5), (0.3, 0, 3), (1.01, 1, 0)]
)
def test_whole_times_and_a_random_rest(weight, whole, sampled):
    part = Part("x", list(range(10)), list(range(10)), weight)
    found = list(part.places([1, 0]))
    assert found[: 10 * whole] == list(range(10)) * whole
    rest = found[10 * whole :]
    assert len(rest) == sampled == len(set(rest)) and rest == sorted(rest)
    assert part.sentences == len(found) and found == list(part.places([1, 0]))


def test_a_sample_is_random():
    """Over many seeds each sentence is taken as often as the weight says."""
    part = Part("x", list(range(8)), [], 0.25)
    counts = np.bincount([i for seed in range(400) for i in part.places([seed, 0])], minlength=8)
    assert counts.sum() == 800 and abs(counts - 100).max() < 40


# the checksum


def test_the_checksum_of_pairs_by_hand():
    digest = mixing.PairDigest()
    digest.add(torch.tensor([4, 5, 2]), torch.tensor([2], dtype=torch.int32))
    digest.add(torch.tensor([70000, 2]), torch.tensor([6, 2]))
    by_hand = struct.pack("<4i 2i", 3, 4, 5, 2, 1, 2) + struct.pack("<3i 3i", 2, 70000, 2, 2, 6, 2)
    expected = hashlib.sha256(by_hand).hexdigest()
    assert digest.describe() == {"sentences": 2, "sha256": expected}


# mixing, without a teacher


def test_only_mixing(data, tmp_path, capsys):
    a = write_pairs(tmp_path / "a", ("a b", "c d"), ("a", "b"))
    b = write_pairs(tmp_path / "b", ("h", "g g"))
    out = tmp_path / "out"
    assert run(data.folder, "--mix", f"{a}:original=2:{b}=3", "--output", out) == 0
    pairs = [("a b", "c d"), ("a", "b")], [(line, line) for line in LINES], [("h", "g g")]
    assert train(out) == [*pairs[0], *pairs[1], *pairs[1], *pairs[2] * 3]
    assert "out: 10 original sentences and 5 of other data" in capsys.readouterr().out
    found = record(out)
    assert found["counts"]["original"] == 10 and found["counts"]["mixed"] == 5
    told = [(one["name"], one["weight"], one["sentences"], one["written"])
            for one in found["mix"]["parts"]]  # fmt: skip
    assert told == [(a, 1, 2, 2), (ORIGINAL, 2, 5, 10), (b, 3, 1, 3)]
    assert (out / "valid.aa-bb.bb.idx").is_file() and not (out / "text/dropped.tsv").exists()

    before = tree(out)
    assert run(data.folder, "--mix", f"{a}:original=2:{b}=3", "--output", out) == 0
    assert tree(out) == before
    assert run(data.folder, "--mix", f"{a}:original=2", "--output", out) == 1
    assert "was made with other settings: mix: parts is" in capsys.readouterr().err
    assert tree(out) == before
    # and what was mixed can be mixed, and inspected
    assert run(data.folder, "--mix", f"{out}=0.2", "--output", tmp_path / "again") == 0
    assert len(train(tmp_path / "again")) == 3


def test_shuffled(data, tmp_path):
    pairs = [(" ".join("abcdefgh"[i % 8 :]), " ".join("abcdefgh"[: i // 8 + 1])) for i in range(64)]
    a = write_pairs(tmp_path / "a", *pairs)
    flags = ("--mix", f"{a}:original", "--mix-order", SHUFFLED)
    for name, seed in (("one", 1), ("two", 1), ("three", 2)):
        out = tmp_path / name
        assert run(data.folder, *flags, "--output", out, "--seed", seed) == 0
        expected = sorted([*pairs, *((line, line) for line in LINES)])
        assert sorted(train(out)) == expected != train(out)
        assert not list(out.glob("*.new"))
    files = [tree(tmp_path / name) for name in ("one", "two", "three")]
    assert files[0] == files[1] != files[2]


def test_special_symbols_stay(data, tmp_path):
    """What is in a data-bin of the student's own is copied, and not encoded anew."""
    odd = [torch.tensor(tokens) for tokens in ([4, 1, 5, 2], [4, 2, 5, 2], [0, 3, 1, 2], [5])]
    write_pairs(tmp_path / "a")
    for lang in data.langs:
        databin.write(tmp_path / f"a/train.aa-bb.{lang}", data.source, odd)
    assert run(data.folder, "--mix", tmp_path / "a", "--output", tmp_path / "out") == 0
    side = databin.DataBin(str(tmp_path / "out"), "aa", "bb").side("train", "bb")
    assert [side[i].tolist() for i in range(4)] == [tokens.tolist() for tokens in odd]


# beside what is distilled


def test_before_what_is_distilled(data, tmp_path):
    corpus = LetterCorpus(data.side("train", "aa"), data.side("train", "bb"), data)
    student = Student(data, lambda text: text, None)
    a = write_pairs(tmp_path / "a", ("h", "g g"), ("h h", "g"))
    out = tmp_path / "out"
    mix = open_mix(
        *([Wanted(a, 0.5), Wanted(ORIGINAL)], "in-order", 1),
        data=data,
        subset="train",
        student=student,
        output=str(out),
    )
    chosen = choose(corpus, LISTS, student, Choice(filters=Filters(max_repeats=None)))
    Output(str(out), {}).write(corpus, LISTS, chosen, student, mix=mix)
    found = train(out)
    assert found[0] in (("h", "g g"), ("h h", "g")) and len(found) == 1 + 5 + 4
    assert found[6:] == [
        *(("a b c", "a b d"), ("b c d", "b c d"), ("c d e", "f g a"), ("e f g", "g g g")),
    ]
    counts = record(out)["counts"]
    assert (counts["mixed"], counts["original"], counts["distilled"]) == (1, 5, 4)


def test_the_text_of_a_student_with_subwords_of_its_own(data):
    student = Student(data, str.upper, str.lower, own_text=lambda subwords: subwords[::-1])
    tokens = databin.encode(data.target, "a b c")
    assert student.own(tokens)[:2] == ("c b a", "a b c")
    assert student._replace(own_text=None).own(tokens)[:2] == ("A B C", "a b c")


def test_records_of_before_are_still_complete(data):
    side = data.side("train", "aa")
    original = Part(ORIGINAL, side, side, 2.0)
    for parts, expected in (([], 0), ([original], 2)):
        assert Mix(parts).settings(beside_teacher=True) == {"original": expected, "mix": None}
    for mix in (
        Mix([original._replace(weight=0.5)]),
        Mix([original], SHUFFLED),
        Mix([original, original._replace(name="x")]),
    ):
        assert mix.settings(beside_teacher=True)["mix"] is not None
    assert Mix([original]).settings(beside_teacher=False)["mix"] is not None


# what is refused


def refusal(data, tmp_path, capsys, mix) -> str:
    assert run(data.folder, "--mix", mix, "--output", tmp_path / "out") == 1
    assert not (tmp_path / "out").exists()
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_what_cannot_be_mixed_is_told_at_once(data, tmp_path, capsys):
    other = write_letters(tmp_path / "other")
    lines = (other.folder / "dict.bb.txt").read_text().splitlines()
    (other.folder / "dict.bb.txt").write_text("\n".join([*lines[1::-1], *lines[2:]]) + "\n")
    uneven = write_letters(tmp_path / "uneven")
    databin.write(uneven.folder / "train.aa-bb.bb", uneven.target, [torch.tensor([4, 2])] * 3)
    empty = write_letters(tmp_path / "empty")
    for path in empty.folder.glob("train.*"):
        path.unlink()
    names = [tmp_path / name for name in ("other", "uneven", "empty", "none", "out")]
    found = refusal(data, tmp_path, capsys, ":".join(map(str, names)))
    for part in (
        f"{tmp_path}/other: dict.bb.txt is another dictionary than that of {data.folder} (symbol 4",
        "uneven: train has 5 sentences in aa and 3 in bb: expected as many",
        f"{tmp_path}/empty has no train of both languages",
        f"{tmp_path}/none: expected a folder with a data-bin, or original; there is no such one",
        f"{tmp_path}/out: that is --output",
    ):
        assert part in found, part


def test_sides_that_no_longer_belong_together(data, tmp_path, capsys):
    a = write_pairs(tmp_path / "a", ("a b", "c d"), ("a", "b"))
    made = tmp_path / "made"
    assert run(data.folder, "--mix", a, "--output", made) == 0
    side = made / "train.aa-bb.bb"
    databin.write(side, data.target, [databin.encode(data.target, t) for t in ("b", "c d")])
    found = refusal(data, tmp_path, capsys, f"{made}:{a}")
    assert f"--mix {made}: the pairs of {made} are not those that its record.json" in found
    assert f"the pairs of {a}" not in found
    # as the original training set of another command, too
    assert run(made, "--mix", f"original:{a}", "--output", tmp_path / "out") == 1
    assert f"--mix original: the pairs of {made} are not" in capsys.readouterr().err
    # a record from before there was a checksum
    old = {key: value for key, value in record(made).items() if key != "pairs"}
    (made / "record.json").write_text(json.dumps(old))
    assert run(data.folder, "--mix", made, "--output", tmp_path / "out") == 0


def test_a_symbol_that_is_in_no_dictionary(data, tmp_path, capsys):
    a = tmp_path / "a"
    write_pairs(a, ("a", "b"))
    databin.write(a / "train.aa-bb.aa", data.source, [torch.tensor([40, 2])])
    assert "the data holds symbol number 40" in refusal(data, tmp_path, capsys, a)


def test_what_is_cut_short(data, tmp_path, capsys):
    a = tmp_path / "a"
    write_pairs(a, ("a b c", "b"), ("a b c", "b"))
    (a / "train.aa-bb.aa.bin").write_bytes(b"\4")
    assert "it is damaged or cut short" in refusal(data, tmp_path, capsys, a)


@pytest.mark.parametrize(
    "flags, fault",
    [
        (["--mix", "original"], "--path: expected the teacher's checkpoint"),
        ([], "--path: expected the teacher's checkpoint"),
        (["--mix", "a", "--nbest", "2", "--beam", "2", "--select", "mbr"], "of choice and filters"),
        (["--mix", "a", "--hypotheses", "h"], "--hypotheses needs a teacher"),
        (["--mix", "a", "--repeat-original", "2"], "--repeat-original needs --mix original"),
        (["--mix", "a:original=2", "--repeat-original", "3"], "give one of them"),
        (["--mix", "a:original", "--repeat-original", "0"], "--repeat-original must be 1 or more"),
        (["--mix-order", "shuffled"], "--mix-order needs --mix"),
        (["--inspect-output", "a.md"], "--inspect-output needs --inspect"),
    ],
)
def test_flags_that_do_not_go_together(flags, fault, data, tmp_path, capsys):
    assert run(data.folder, *flags, "--output", tmp_path / "out") == 1
    assert fault in capsys.readouterr().err


def test_a_share_of_nothing(data, tmp_path, capsys):
    a = write_pairs(tmp_path / "a", ("a", "b"))
    assert run(data.folder, "--mix", f"{a}=0.1", "--output", tmp_path / "out") == 1
    assert "of so few sentences such a share is none" in capsys.readouterr().err


def test_a_mixture_does_not_pass_for_what_a_teacher_made(data, tmp_path, capsys):
    a = write_pairs(tmp_path / "a", ("a", "b"))
    out = tmp_path / "out"
    Output(str(out), {"select": "best"}).write_mixture(
        data, Student(data, str, None), Mix([Part("a", [torch.tensor([2])], [torch.tensor([2])])])
    )
    before = tree(out)
    assert run(data.folder, "--mix", a, "--output", out) == 1
    assert "select is None here, best there" in capsys.readouterr().err
    assert tree(out) == before
    assert run(data.folder, "--mix", a, "--output", out, "--overwrite") == 0
    assert train(out) == [("a", "b")]
    shutil.rmtree(str(out))
