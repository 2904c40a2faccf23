#!/usr/bin/env bash
# Speech recognition: a teacher that hears; students without it and with it; a report in word errors (WER).
#
# Prepare:  one of three.
#           - Nothing but espeak-ng (Debian and Ubuntu: apt install espeak-ng): sentences of five words are made, and it says them.
#           - Text that it is to say, one sentence per line, in a folder: train.txt, valid.txt, test.txt. Numbers should be words.
#           - Recordings, as fairseq's examples/speech_to_text prepare them: a folder with config.yaml, the dictionary that it
#             names, and train.tsv, valid.tsv, test.tsv. Then espeak-ng is not needed; speech translation works, too (METRICS=bleu).
# Run:      bash recipes/speech.sh [FOLDER]
#           run it again after an interruption, and it continues.
# Adapt:    the sizes are for the made sentences and minutes on a CPU. Recordings want more of everything: AUGMENT=1 VOCAB=5000
#           TEACHER_DIM=256 TEACHER_LAYERS=6 STUDENT_DIM=144 STUDENT_LAYERS=3 UPDATES=100000 MAX_FRAMES=40000 DROPOUT=0.1
#           A toy run, a minute or two: SIZE=60 HELD_OUT=12 VOCAB=60 UPDATES=10 TEACHER_DIM=16 STUDENT_DIM=8
#           Another language: VOICES="de de+f2" with your own text.
#
# Environment (see also setup.sh and stages.sh):
#   WORK             speech-work        results; delete it to start again
#   SIZE, HELD_OUT   3000, 200          of the made sentences: in train, in valid and test each
#   VOICES           en-us en-us+f3 en-us+m3 en-gb-scotland   of espeak-ng; one of them says each sentence
#   SPEEDS           140 170 200        words per minute; likewise
#   VOCAB            120                SentencePiece symbols of what is written
#   AUGMENT          0                  1: SpecAugment in training
#   METRICS          wer                of the report; for speech translation bleu, chrf, ter
#   TEACHER_LAYERS, TEACHER_DIM         2, 96      of encoder and decoder each; the ffn is 4 times as wide
#   STUDENT_LAYERS, STUDENT_DIM         1, 32
#   TEACHER_UPDATES, STUDENT_UPDATES    UPDATES (1200)
#   MAX_FRAMES       8000               of a batch, padding included; 100 are a second
#   LR, DROPOUT      0.002, 0
#   KD_WEIGHT, KD_TEMPERATURE           0.5, 1
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

WORK=${WORK:-$HERE/../speech-work}
VOCAB=${VOCAB:-120}
METRICS=${METRICS:-wer}
EXTRAS=${EXTRAS:-recipes,wer}
TASK=speech_to_text PAIR= REFERENCES= REMOVE_BPE= # fairseq's task has no flags of languages; its YAML file names the subwords

source "$HERE/setup.sh"
source "$HERE/stages.sh"
[ -z "${PRESET:-}" ] || die "PRESET names sizes of models that read text; say STUDENT_LAYERS and STUDENT_DIM instead."
[ $# -le 1 ] || die "expected at most one argument, a folder with text or recordings: bash recipes/speech.sh [FOLDER]"
case " $METRICS " in *" wer "*)
    python -c 'import jiwer' 2>/dev/null || die "WER needs a package: pip install jiwer, or METRICS=chrf."
    ;;
esac

spoken() { python "$HERE/spoken.py" "$@"; }

if [ -f "${1:-}/config.yaml" ]; then
    for split in $SPLITS; do
        [ -f "$1/$split.tsv" ] || die "expected $1/$split.tsv beside $1/config.yaml; a link of this name will do."
    done
    ln -sfn "$(cd "$1" && pwd)" "$WORK/data-bin"
elif ! done_already "$WORK/data-bin/config.yaml"; then
    command -v espeak-ng >/dev/null || die "expected espeak-ng, which says the sentences: apt install espeak-ng (Debian, Ubuntu),
  brew install espeak-ng; or give a folder with recordings, as fairseq's examples/speech_to_text prepare them."
    text=${1:-$WORK/text}
    if [ $# -eq 0 ]; then spoken write "$text" "${SIZE:-3000}" "${HELD_OUT:-200}"; fi
    for split in $SPLITS; do [ -f "$text/$split.txt" ] || die "expected $text/$split.txt: one sentence per line."; done
    say "speaking the sentences of $text"
    spoken say "$text" "$WORK/data-bin" "${VOICES:-en-us en-us+f3 en-us+m3 en-gb-scotland}" "${SPEEDS:-140 170 200}"
    say "SentencePiece: $VOCAB symbols"
    cut -f 4 "$WORK/data-bin/train.tsv" | tail -n +2 >"$WORK/written.txt"
    tools spm "$WORK/spm.model" "$VOCAB" "$WORK/written.txt"
    spoken describe "$WORK/data-bin" "$WORK/spm.model" "${AUGMENT:-0}"
fi

frames="--max-tokens ${MAX_FRAMES:-8000}"
model() { # LAYERS DIM UPDATES
    local heads=$(($2 < 64 ? 2 : $2 / 32))
    echo "--arch s2t_transformer --conv-channels $((2 * $2)) --share-decoder-input-output-embed
        --encoder-layers $1 --decoder-layers $1 --encoder-embed-dim $2 --decoder-embed-dim $2
        --encoder-ffn-embed-dim $((4 * $2)) --decoder-ffn-embed-dim $((4 * $2))
        --encoder-attention-heads $heads --decoder-attention-heads $heads --dropout ${DROPOUT:-0}
        --optimizer adam --adam-betas (0.9,0.98) --clip-norm 10 --lr ${LR:-0.002} --max-update $3
        --lr-scheduler inverse_sqrt --warmup-updates $(($3 / 5 + 1)) $frames --seed 1 --num-workers 0"
}
teacher=$(model "${TEACHER_LAYERS:-2}" "${TEACHER_DIM:-96}" "${TEACHER_UPDATES:-${UPDATES:-1200}}")
student=$(model "${STUDENT_LAYERS:-1}" "${STUDENT_DIM:-32}" "${STUDENT_UPDATES:-${UPDATES:-1200}}")

best=checkpoint_best.pt
teacher_checkpoint=$WORK/models/teacher/$best
plain_flags
train teacher $teacher "${LOSS[@]}"
train plain $student "${LOSS[@]}"
CACHE_FLAGS="--task kd_$TASK $frames ${CACHE_FLAGS:-}" cache_teacher "$teacher_checkpoint"
distil_flags "$teacher_checkpoint"
train distilled $student "${LOSS[@]}"

models=()
for name in teacher plain distilled; do models+=("$name=$WORK/models/$name/$best"); done
REPORT_FLAGS="--metrics $METRICS $frames ${REPORT_FLAGS:-}" judge "${models[@]}"
say "All of it is in $WORK ($SECONDS s)."
