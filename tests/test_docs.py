"""What the documentation says exists: links, flags, commands, scripts, messages."""

import argparse
import ast
import re
import runpy
import shlex
from itertools import chain
from pathlib import Path
from typing import Dict, Iterator, List, Set, Tuple

import pytest
from fairseq import options as fairseq_options

from kd_plugin.commands import benchmark, cache, export, init, report, sequences, vocabulary

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in chain(ROOT.glob("*.md"), (ROOT / "docs").rglob("*.md"), ROOT.glob("recipes/*.md"))
)
COMMANDS = {
    module.PROG: module
    for module in (benchmark, cache, export, init, report, sequences, vocabulary)
}
TRAINING = ["data-bin", "--arch", "transformer", "--optimizer", "adam", "--lr", "0.001"]
HOSTS = {"github.com", "opennmt.net", "fairseq.readthedocs.io"}
# Flags of other programs that the documentation mentions
FOREIGN = {
    *("--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--master_port"),  # torchrun
    *("--no-python", "--nodes", "--gpus-per-node", "--ntasks-per-node"),  # and srun
    *("--config-dir", "--config-name", "--no-index", "--find-links", "--wheel-dir", "--help"),
    *("--no-build-isolation", "--no-deps"),  # pip
    *("--kd-strategy", "--kd-rate", "--kd-criterion", "--alpha", "--tokenize"),
    *("--long", "--check", "--directory"),
    *("--task", "--model", "--avx2", "--onnx_model"),  # optimum-cli
    *("--rm", "--gpus", "--ipc", "--user", "--build-arg", "--strict"),  # docker, twine
    *("--noise", "--apply-bert-init"),  # fairseq's non-autoregressive task and models
}


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def code_blocks(text: str) -> Iterator[List[str]]:
    """Fenced and indented blocks, as lines."""
    block: List[str] = []
    fenced, before = False, ""
    for line in [*text.splitlines(), ""]:
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or (line.startswith("    ") and (block or not before.strip())):
            block.append(line if fenced else line[4:])
        elif block and line.strip():
            yield block
            block = []
        before = line
    if block:
        yield block


def prose(text: str) -> str:
    """A page without its code blocks."""
    code = {line for block in code_blocks(text) for line in block}
    return "\n".join(line for line in text.splitlines() if line.strip() not in map(str.strip, code))


def slugs(text: str) -> Set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: Dict[str, int] = {}
    for title in re.findall(r"^#{1,6} +(.*?)\s*#*$", prose(text), re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
        if found[slug]:
            found[f"{slug}-{found[slug]}"] = 0
    return set(found)


def links(page: str) -> List[str]:
    without_code = re.sub(r"`[^`\n]*`", "", prose(text_of(page)))
    return re.findall(r"\]\(([^)\s]+)\)", without_code)


def target(page: str, link: str) -> Tuple[Path, str]:
    path, _, anchor = link.partition("#")
    return ((ROOT / page).parent / path if path else ROOT / page).resolve(), anchor


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors(page):
    for link in links(page):
        if re.match(r"https?://", link):
            assert link.split("/")[2] in HOSTS, link
            continue
        path, anchor = target(page, link)
        assert path.exists(), f"{page}: {link}"
        if anchor:
            assert anchor in slugs(path.read_text(encoding="utf-8")), f"{page}: {link}"


def test_slugs_are_githubs():
    text = "# What is `--user-dir`?\n\n## A & B\n\n## A & B\n\n    # not a heading\n"
    assert slugs(text) == {"what-is---user-dir", "a--b", "a--b-1"}


def test_every_page_is_within_two_links_of_the_readme():
    near = {ROOT / "README.md"}
    for _ in range(2):
        found = {page for page in PAGES if ROOT / page in near}
        near |= {target(page, link)[0] for page in found for link in links(page)}
    assert {page for page in PAGES if ROOT / page not in near} == set()


def test_the_readme_is_short():
    assert len(text_of("README.md").split()) <= 1100


def test_the_flags_are_those_of_the_code():
    generate = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    assert text_of("docs/reference/flags.md") == generate["page"](), "run python docs/generate.py"


# Commands and flags


def commands(page: str) -> List[List[str]]:
    """The shell commands in a page's code blocks, as words; usages with placeholders left out."""
    found = []
    for block in code_blocks(text_of(page)):
        script = re.sub(r"\$\(which ([\w-]+)\)", r"\1", "\n".join(block)).replace("\\\n", " ")
        script = re.sub(r"\$\(cat ([\w./]+)\)", lambda m: " ".join(text_of(m[1]).split()), script)
        for line in script.splitlines():
            if re.search(r"\b(fairseq-|recipes/\w+\.)", line):
                try:
                    words = shlex.split(line, comments=True)
                except ValueError:  # not a shell's line
                    continue
                if not any(re.search(r"\b[SRN]\b|\[", word) for word in words):
                    found.append([word for word in words if word != "&"])
    return found


def parse(parser: argparse.ArgumentParser, arguments: List[str]) -> None:
    def fail(message: str) -> None:
        raise AssertionError(message)

    parser.error = fail  # type: ignore
    takes_task = any("--seed" in action.option_strings for action in parser._actions)
    if takes_task and not any("--trainpref" in a.option_strings for a in parser._actions):
        modified = {"modify_parser": lambda made: setattr(made, "error", fail)}
        fairseq_options.parse_args_and_arch(parser, arguments, **modified)
    else:
        parser.parse_args(arguments)


def without_user_dir(arguments: List[str]) -> List[str]:
    """It is imported already."""
    if "--user-dir" not in arguments:
        return arguments
    i = arguments.index("--user-dir")
    return arguments[:i] + arguments[i + 2 :]


def check(words: List[str]) -> bool:
    """Parse a command if it is one of those known; fails where its parser does."""
    for i, word in enumerate(words):
        rest = without_user_dir(words[i + 1 :])
        if word in ("torchrun", "srun", "sbatch"):
            continue
        if word == "fairseq-train":
            arguments = [argument for argument in rest if argument != "..."]
            parse(
                fairseq_options.get_training_parser(),
                [*TRAINING, *arguments] if arguments != rest else arguments,
            )
        elif word == "fairseq-eval-lm":
            parse(fairseq_options.get_eval_lm_parser(), rest)
        elif word == "fairseq-generate":
            parse(fairseq_options.get_generation_parser(), rest)
        elif word == "fairseq-preprocess":
            parse(fairseq_options.get_preprocessing_parser(), rest)
        elif word == benchmark.PROG:
            training = benchmark.make_parser().parse_known_args(rest)[1]
            if training:
                kd = ["--task", "kd_translation", "--criterion", "kd_label_smoothed_cross_entropy"]
                parse(fairseq_options.get_training_parser(), [*kd, *training])
        elif word == init.PROG:
            options, training = init.make_parser().parse_known_args(rest)
            task = ["--task", options.task or "translation"]
            parse(fairseq_options.get_training_parser(), [*TRAINING, *task, *training])
        elif word in COMMANDS:
            # the checkpoints, which are not here, would tell the command what they are
            of_text = word == report.PROG and "--sample-break-mode" in rest
            parser = COMMANDS[word].make_parser(*["language_modeling"] * of_text)
            parser.allow_abbrev = False
            parse(parser, rest)
        else:
            continue
        return True
    return False


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_commands_parse(page):
    for words in commands(page):
        try:
            check(words)
        except AssertionError as error:
            raise AssertionError(f"{page}: {' '.join(words)}: {error}") from None


def test_commands_are_found_and_wrong_ones_fail():
    guides = [page for page in PAGES if page.startswith("docs/guides")]
    assert sum(check(words) for page in guides for words in commands(page)) >= 20
    with pytest.raises(AssertionError):
        check(["fairseq-kd-export", "--path", "a.pt", "--output", "b.pt", "--over"])
    with pytest.raises(AssertionError):
        check(["fairseq-train", "...", "--kd-wait", "1"])
    with pytest.raises(AssertionError):
        check(
            ["fairseq-kd-cache", "data-bin", "--path", "a.pt", "--cache", "c", "--select", "best"]
        )


def known_flags() -> Set[str]:
    parsers = [module.make_parser() for module in COMMANDS.values()]
    parsers.append(fairseq_options.get_preprocessing_parser())
    kd = ["--criterion", "kd_label_smoothed_cross_entropy", "--task"]
    multilingual = ["kd_translation_multi_simple_epoch", "--lang-pairs", "de-en"]
    lm = ["kd_language_modeling", "--arch", "transformer_lm", "--lr-scheduler", "polynomial_decay"]
    speech = ["kd_speech_to_text", "--arch", "s2t_transformer"]
    # fairseq adds the flags of what is chosen while it parses
    for parser, arguments in (
        (fairseq_options.get_training_parser(), [*TRAINING, *kd, "kd_translation"]),
        (fairseq_options.get_training_parser(), [*TRAINING, *kd, *multilingual]),
        (fairseq_options.get_training_parser(), [*TRAINING, *kd, *lm]),
        (fairseq_options.get_training_parser(), [*TRAINING, *kd, *speech]),
        (fairseq_options.get_generation_parser(), ["data-bin", "--bpe", "sentencepiece"]),
    ):
        fairseq_options.parse_args_and_arch(parser, arguments, modify_parser=parsers.append)
    return {name for p in parsers for action in p._actions for name in action.option_strings}


def test_every_flag_that_is_mentioned_exists():
    known = known_flags() | FOREIGN
    for page in PAGES:
        if page != "CHANGELOG.md":
            # neither the middle of a word nor the start of a family ("--teacher-*")
            for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*\w(?![\w*-])", text_of(page)):
                assert flag in known, f"{page}: {flag}"


def test_scripts_that_are_named_exist():
    for page in PAGES:
        for name in re.findall(r"\b(?:recipes|docs|tests)/[\w/.-]+\w", text_of(page)):
            assert (ROOT / name).exists(), f"{page}: {name}"


def test_entry_points_are_the_commands():
    found = re.findall(r'"(fairseq-kd-[\w]+)=(kd_plugin\.commands\.\w+):main"', text_of("setup.py"))
    assert dict(found) == {prog: module.__name__ for prog, module in COMMANDS.items()}


# Words


def messages() -> List[str]:
    """All strings of the code, with … for what they are filled with."""
    found = []
    for path in (ROOT / "kd_plugin").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                values = [getattr(part, "value", None) for part in node.values]
                found.append("".join(v if isinstance(v, str) else "…" for v in values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"\{\w*\}", "…", node.value))
    return found


def test_messages_quoted_in_the_questions_exist():
    code = messages()
    quoted = re.findall(r'^\*\*"(.*?)"', text_of("docs/faq.md"), re.MULTILINE)
    assert len(quoted) >= 3
    for message in quoted:
        parts = [re.escape(part.strip()) for part in message.split("…")]
        assert any(re.search(".*".join(parts), text) for text in code), message


@pytest.mark.parametrize("page", PAGES)
def test_nothing_of_one_machine(page):
    for line in text_of(page).splitlines():
        assert not re.search(r"(?<![\w.-])/(work|root|home|tmp)/|\bsessions?\b", line), line
