"""Small models of Hugging Face's transformers with random weights and real tokenizers, as folders.

Whether they translate well does not matter: what they say is to be said by CTranslate2, too.
"""

import json
import math
import random
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple

import sentencepiece
import torch

_WORDS = (
    "Ein Mann eine Frau zwei Hunde läuft schläft spielt auf der grünen Wiese am Strand mit einem "
    "roten Ball im Schnee neben dem Haus und schaut nach oben A man a woman two dogs runs sleeps "
    "plays on the green meadow at the beach with a red ball in the snow beside the house and looks "
    "upwards"
).split()


def sentences(number: int = 400, seed: int = 1) -> List[str]:
    rng = random.Random(seed)
    return [
        " ".join(rng.choice(_WORDS) for _ in range(rng.randint(2, 9))) + "." for _ in range(number)
    ]


def train_sentencepiece(path: Path, seed: int, size: int, **more: Any) -> str:
    """A SentencePiece model; its file."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(seed=seed)),
        model_prefix=str(path),
        vocab_size=size,
        character_coverage=1.0,
        minloglevel=2,
        **more,
    )
    return f"{path}.model"


def train_words(path: Path, words: List[str]) -> str:
    """A SentencePiece model whose pieces are whole words; its file."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(words)]),
        model_prefix=str(path),
        model_type="word",
        vocab_size=len(words) + 3,
        minloglevel=2,
    )
    return f"{path}.model"


class Said(NamedTuple):
    """What a model has said, in its own tokens."""

    tokens: List[str]
    score: float
    finished: bool


class Family(NamedTuple):
    """What a family of models needs to be told, in its own tokens.

    Attributes:
        make: write a model to a folder.
        flags: of ours.
        source, target: what its tokenizer and ``generate`` are told.
    """

    make: Callable[[Path], None]
    flags: Dict[str, str]
    languages: Dict[str, str] = {}
    forced: str = ""


_SMALL = dict(
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    max_position_embeddings=64,
)


def _save(folder: Path, model: Any, tokenizer: Any, scale: float = 0.6) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, scale)
        words = [
            i
            for token, i in tokenizer.get_vocab().items()
            if token.isalpha() or token[:1] == "\u2581"
        ]
        for weights in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            others = torch.ones(len(weights), dtype=torch.bool)
            others[words] = False
            weights *= 0.3  # so that a symbol is not always followed by itself
            weights[others] *= 0.1  # symbols of no text are to be rare
            weights[tokenizer.eos_token_id] *= 11
            weights[tokenizer.pad_token_id] = 0  # what Marian's decoder begins with
    model.eval().save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def _pieces(path: str) -> List[str]:
    model = sentencepiece.SentencePieceProcessor(model_file=path)
    return [model.id_to_piece(i) for i in range(3, len(model))]


def marian(folder: Path) -> None:
    from transformers import MarianConfig, MarianMTModel, MarianTokenizer

    folder.mkdir()
    source, target = [train_sentencepiece(folder / f"spm{i}", i, 80) for i in (1, 2)]
    tokens = dict.fromkeys(["</s>", "<unk>", *_pieces(source), *_pieces(target), "<pad>"])
    vocabulary = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab").write_text(json.dumps(vocabulary))
    tokenizer = MarianTokenizer(source, target, str(folder / "vocab"))
    pad = vocabulary["<pad>"]
    ids = dict(pad_token_id=pad, decoder_start_token_id=pad, eos_token_id=0)
    config = MarianConfig(vocab_size=len(vocabulary), forced_eos_token_id=None, **ids, **_SMALL)
    _save(folder, MarianMTModel(config), tokenizer, 2.5)


def m2m(folder: Path) -> None:
    from transformers import M2M100Config, M2M100ForConditionalGeneration, M2M100Tokenizer

    folder.mkdir()
    model = train_sentencepiece(folder / "spm", 1, 80)
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *_pieces(model)]
    (folder / "vocab").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    languages = M2M100Tokenizer(str(folder / "vocab"), model).lang_token_to_id
    tokenizer = M2M100Tokenizer(
        str(folder / "vocab"), model, additional_special_tokens=sorted(languages, key=languages.get)
    )
    config = M2M100Config(vocab_size=len(tokens) + len(languages) + 8, **_SMALL)
    _save(folder, M2M100ForConditionalGeneration(config), tokenizer)


def nllb(folder: Path) -> None:
    from transformers import M2M100Config, M2M100ForConditionalGeneration, NllbTokenizerFast

    folder.mkdir()
    model = train_sentencepiece(folder / "spm", 1, 80, model_type="bpe")
    tokenizer = NllbTokenizerFast(model)
    config = M2M100Config(vocab_size=len(tokenizer) + 2, **_SMALL)
    _save(folder, M2M100ForConditionalGeneration(config), tokenizer)


def mbart50(folder: Path) -> None:
    from transformers import MBart50TokenizerFast, MBartConfig, MBartForConditionalGeneration

    folder.mkdir()
    tokenizer = MBart50TokenizerFast(train_sentencepiece(folder / "spm", 1, 80), bos_token="<s>")
    config = MBartConfig(
        vocab_size=len(tokenizer),
        decoder_start_token_id=2,
        forced_eos_token_id=None,
        tokenizer_class="MBart50Tokenizer",
        normalize_before=True,
        normalize_embedding=True,
        **_SMALL,
    )
    _save(folder, MBartForConditionalGeneration(config), tokenizer)


def t5(folder: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration, T5TokenizerFast

    folder.mkdir()
    pieces = train_sentencepiece(
        *(folder / "spm", 1, 80),
        **dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1, user_defined_symbols=["<2en>"]),
    )
    tokenizer = T5TokenizerFast(pieces, extra_ids=0, add_prefix_space=True)
    config = T5Config(
        vocab_size=len(tokenizer) + 3,
        **dict(d_model=32, d_kv=16, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=2),
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    _save(folder, T5ForConditionalGeneration(config), tokenizer)


FAMILIES = {
    "Marian": Family(marian, {}),
    "M2M-100": Family(
        m2m,
        {"source_prefix": "__de__", "target_prefix": "__en__"},
        *({"src_lang": "de"}, "__en__"),
    ),
    "NLLB": Family(
        nllb,
        {"source_prefix": "deu_Latn", "target_prefix": "eng_Latn"},
        *({"src_lang": "deu_Latn"}, "eng_Latn"),
    ),
    "mBART-50": Family(
        mbart50,
        {"source_prefix": "de_DE", "target_prefix": "en_XX"},
        *({"src_lang": "de_DE"}, "en_XX"),
    ),
    "T5": Family(t5, {"source_prefix": "<2en>"}),
}


def by_transformers(folder: Path, family: Family, texts: List[str], longest: int) -> List[Any]:
    """Tokens, text and score of each sentence's likeliest continuation, step by step, as Hugging
    Face's own ``generate`` finds it."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), **family.languages)
    model = AutoModelForSeq2SeqLM.from_pretrained(str(folder)).eval()
    forced = {}
    if family.forced:
        forced["forced_bos_token_id"] = tokenizer.convert_tokens_to_ids(family.forced)
    if "<2en>" in family.flags.values():
        texts = [f"<2en> {text}" for text in texts]
    # Marian's last symbol is none of its vocabulary
    without = [tokenizer.pad_token_id] if tokenizer.pad_token_id == len(tokenizer) - 1 else []
    found = []
    for text in texts:
        out = model.generate(
            **tokenizer([text], return_tensors="pt"),
            **forced,
            num_beams=1,
            do_sample=False,
            min_new_tokens=1 + len(forced),
            max_new_tokens=longest + len(forced),
            output_logits=True,
            return_dict_in_generate=True,
            bad_words_ids=[[i] for i in without] or None,
        )
        first = 1 + len(forced)
        ids = out.sequences[0][first:].tolist()
        logits = [step[0] for step in out.logits][len(forced) :]
        for step in logits:
            step[without] = -math.inf
        logits[0][tokenizer.eos_token_id] = -math.inf  # which CTranslate2 leaves out, too
        steps = [step.log_softmax(-1) for step in logits]
        scores = [float(step[i]) for step, i in zip(steps, ids)]
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        found.append((tokenizer.convert_ids_to_tokens(ids), text, sum(scores) / len(scores)))
    return found
