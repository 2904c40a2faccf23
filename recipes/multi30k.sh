#!/usr/bin/env bash
# Multi30k German to English: a student of a tenth of its teacher's size, without and with word-level distillation, and
# on data that the teacher has translated.
#
# Prepare:  the raw text of Multi30k (multi30k/dataset, task 1, raw) in one folder: train.de, val.de,
#           test_2016_flickr.de, and the same in .en.
# Run:      bash recipes/multi30k.sh CORPUS_DIR
#           an hour or less on 2 CPU cores with a teacher given; its own takes hours more there. Run it again after
#           an interruption, and it continues.
# Adapt:    a teacher that you have, and its vocabulary: TEACHER=dir with checkpoint.pt, dict.de.txt, dict.en.txt
#           and spm.model. Without, one is trained here.
#
# Environment (see also setup.sh and stages.sh):
#   WORK           multi30k-work    results; delete it to start again
#   SRC, TGT       de, en           any two languages of the corpus
#   VOCAB          8000             joint SentencePiece vocabulary, if TEACHER brings none
#   TEACHER_FLAGS, STUDENT_FLAGS, TRAIN_FLAGS    added to the trainings below: of the teacher, of both students, of all.
#                  A toy run, on some 1000 lines; a teacher that is worse than a guess would be refused, so it has
#                  to learn fast: VOCAB=500 TRAIN_FLAGS="--max-update 40 --lr 0.005 --warmup-updates 10"
#                  SEQUENCES_FLAGS="--no-filters --max-len-a 1 --max-len-b 5" (it does not know yet where to end)
#   PRESET         none             tiny, small or base: size and learning rate of the students (presets/); a WORK for each
#   KD_WEIGHT, KD_TEMPERATURE, KD_FLAGS    0.9, 1, none    the distillation
#   DISTILLED      distilled        name of the distilled student; another one for another try beside the first:
#                  DISTILLED=t2 KD_TEMPERATURE=2 bash recipes/multi30k.sh CORPUS_DIR
#   STUDENTS       all              which rows: plain, $DISTILLED (word-level), and of sequence level best (the teacher's
#                                   likeliest hypothesis), closest (to the reference, of 5), closest_word (that, and
#                                   word-level on top) and mixed (closest beside the original references, which are twice
#                                   the updates, and the last AVERAGE=5 checkpoints averaged); also keep-4 (the 4 closest),
#                                   mbr (of 16 samples, by chrF), samples (4 of these), and backward (best, without
#                                   the 5% that a model of the other direction, BACKWARD, finds least likely)
#   MIXED_FLAGS    none             added to the training of mixed, whose epochs are twice as long
#   INT8           mixed            which of them are exported for CTranslate2 in int8, as rows of their own
#   ENGINE         fairseq          decodes the training set; ctranslate2 is faster (pip install ctranslate2)
#   KD_CACHE       none             run the teacher once and keep its K likeliest symbols: worth it from the second
#                                   or third epoch on (8 is a good K; --temperatures of CACHE_FLAGS for T other than 1)
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

SRC=${SRC:-de} TGT=${TGT:-en}
WORK=${WORK:-$HERE/../multi30k-work}
VOCAB=${VOCAB:-8000}
DISTILLED=${DISTILLED:-distilled}
KD_WEIGHT=${KD_WEIGHT:-0.9}

source "$HERE/setup.sh"
source "$HERE/stages.sh"
[ $# -eq 1 ] || die "expected one argument, the folder with the raw text: bash recipes/multi30k.sh CORPUS_DIR"

if [ -n "${TEACHER:-}" ]; then
    for name in checkpoint.pt "dict.$SRC.txt" "dict.$TGT.txt" spm.model; do
        [ -f "$TEACHER/$name" ] || die "expected $TEACHER/$name: TEACHER is a folder with a checkpoint, its
  dictionaries and its SentencePiece model."
    done
    TEACHER=$(cd "$TEACHER" && pwd)
    teacher=$TEACHER/checkpoint.pt
    SPM_MODEL=$TEACHER/spm.model
fi

use_text train "$1/train"
use_text valid "$1/val"
use_text test "$1/test_2016_flickr"
prepare_spm
if [ -n "${TEACHER:-}" ]; then
    binarise --srcdict "$TEACHER/dict.$SRC.txt" --tgtdict "$TEACHER/dict.$TGT.txt"
else
    binarise --joined-dictionary
    plain_flags
    train teacher --arch transformer --share-all-embeddings --encoder-layers 3 --decoder-layers 3 \
        --encoder-embed-dim 256 --decoder-embed-dim 256 --encoder-ffn-embed-dim 1024 --decoder-ffn-embed-dim 1024 \
        --encoder-attention-heads 4 --decoder-attention-heads 4 --dropout 0.3 \
        --optimizer adam --adam-betas '(0.9,0.98)' --lr 0.001 --lr-scheduler inverse_sqrt --warmup-updates 800 \
        --max-tokens 4096 --max-epoch 24 --seed 1 --num-workers 0 "${LOSS[@]}" ${TEACHER_FLAGS:-}
    teacher=$WORK/models/teacher/checkpoint_best.pt
fi

# fairseq's default multiple of 8, unlike the other recipes: docs/results.md was made with it. The training
# set's 29,000 sentences are a multiple of it; ve-fairseq leaves the 6 longest of valid's 1,014 out.
student() { # NAME FLAGS...
    train "$@" --arch transformer --encoder-layers 2 --decoder-layers 2 \
        --encoder-embed-dim 64 --decoder-embed-dim 64 --encoder-ffn-embed-dim 256 --decoder-ffn-embed-dim 256 \
        --encoder-attention-heads 4 --decoder-attention-heads 4 --share-all-embeddings --dropout 0.1 \
        --optimizer adam --adam-betas '(0.9,0.98)' --lr 0.005 --lr-scheduler inverse_sqrt --warmup-updates 800 \
        --max-tokens 2048 --max-epoch 10 --seed 1 --num-workers 0 \
        --required-batch-size-multiple 8 ${STUDENT_FLAGS:-}
}
GREEDY=1
AVERAGE=${AVERAGE:-5}
STUDENTS=${STUDENTS:-plain $DISTILLED best closest closest_word mixed}
for name in $STUDENTS; do
    plain_flags
    case $name in
        plain) student plain "${LOSS[@]}" ;;
        best | closest | keep-* | mbr | samples | backward)
            choose_sequences "$name" "$teacher"
            DATA_BIN=data-$name student "$name" "${LOSS[@]}"
            ;;
        closest_word)
            choose_sequences closest "$teacher"
            DATA_BIN=data-closest cache_teacher "$teacher"
            DATA_BIN=data-closest distil_flags "$teacher"
            DATA_BIN=data-closest student closest_word "${LOSS[@]}"
            ;;
        mixed)
            choose_sequences mixed "$teacher"
            DATA_BIN=data-mixed KEEP="--keep-last-epochs $AVERAGE" \
                STUDENT_FLAGS="${STUDENT_FLAGS:-} ${MIXED_FLAGS:-}" student mixed "${LOSS[@]}"
            average mixed "$AVERAGE"
            ;;
        *)
            cache_teacher "$teacher"
            distil_flags "$teacher"
            student "$name" "${LOSS[@]}"
            ;;
    esac
done

models=("teacher=$teacher")
for name in $STUDENTS; do
    checkpoint=$WORK/models/$name/averaged.pt
    [ -f "$checkpoint" ] || checkpoint=$WORK/models/$name/checkpoint_best.pt
    models+=("$name=$checkpoint")
    case " ${INT8:-mixed} " in *" $name "*) export_int8 "$name" "$checkpoint" ;; esac
done
judge "${models[@]}"
