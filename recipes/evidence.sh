#!/usr/bin/env bash
# Evidence: ways to distil, each with several seeds and the same number of updates; one table of means, spreads and
# tests against plain training. The learning rate falls to 0 with the last update, and the last checkpoint is what is
# judged: nothing is chosen, and nothing is averaged.
#
# Prepare:  raw text in one folder, train, val (or valid), test (or test_2016_flickr), each .de and .en; and a
#           teacher: a folder with checkpoint.pt, dict.de.txt, dict.en.txt and spm.model.
# Run:      TEACHER=dir bash recipes/evidence.sh CORPUS_DIR
#           a training for each row and seed, and each skips itself once it is done: stop and repeat as you like.
#           All rows of the first seed come first; the table shows what there is so far.
#           On a cluster, one job for each row and seed (ROWS=word SEEDS=2 JUDGE=0), after one for what they share; at
#           the end once without JUDGE=0.
# Adapt:    ROWS="plain word" SEEDS="1 2 3 4 5" UPDATES=20000; a row is a line of `row` below.
#
# Environment (see also setup.sh and stages.sh):
#   WORK           evidence-work    results; evidence.md and evidence.json are the table
#   ROWS           plain plain-ls0 word bucket-8 sample-8-8 sample-8-16 bucket-32 best closest mixed mixed-word
#                  also: word-ls0, sample-8-8-ls0; keep-4 (the 4 closest), mbr (of 16 samples, by chrF), samples (4 of
#                  these), backward (needs BACKWARD); ensemble (needs ENSEMBLE); junior (needs JUNIOR);
#                  of the running teacher hidden-relations, hidden-mse, attention, ranking;
#                  inputs-argmax, inputs-sample, inputs-reference: sample-8-8's student after an eighth as many updates
#                  more of the running teacher, on words of its own in half of the batches, or in none;
#                  annealed (8 and 8, the weight falling from 1 to 0: the references alone at the end);
#                  layers: sample-8-8 of a wider student, made of the teacher's layers; layers-random: the same from a
#                  random start
#                  ROW-finetuned: ROW's student after an eighth as many updates more, on the references alone
#   SEEDS          1 2 3
#   UPDATES        4000             of every training; choose it by plain ones: twice as many should gain nothing
#   KD_WEIGHT      0.9              of every row at word level
#   FINETUNE_LR    0.0015           highest learning rate of the rows that are finetuned
#   LAYERS         3:1              encoder and decoder layers of the rows layers and layers-random
#   LAYERS_LR      0.001            and their highest learning rate
#   JUDGE          1                0: only train
#   ENSEMBLE       none             more checkpoints of teachers with the same vocabulary, with ':' between
#   BACKWARD       none             model of the other direction: best, without the 5% that it finds least likely
#   JUNIOR         none             checkpoint of a medium teacher: the first half of the updates learn from it
#   SCHEDULE       to 0             flags of another learning rate's schedule
#   STUDENT_FLAGS, PRESET, TRAIN_FLAGS, ENGINE as in multi30k.sh
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

SRC=${SRC:-de} TGT=${TGT:-en}
WORK=${WORK:-$HERE/../evidence-work}
ROWS=${ROWS:-plain plain-ls0 word bucket-8 sample-8-8 sample-8-16 bucket-32 best closest mixed mixed-word}
SEEDS=${SEEDS:-1 2 3}
UPDATES=${UPDATES:-4000}
KD_WEIGHT=${KD_WEIGHT:-0.9}
FINETUNE_LR=${FINETUNE_LR:-0.0015}
LAYERS=${LAYERS:-3:1} LAYERS_LR=${LAYERS_LR:-0.001}

source "$HERE/setup.sh"
source "$HERE/stages.sh"
[ $# -eq 1 ] || die "expected one argument, the folder with the raw text: bash recipes/evidence.sh CORPUS_DIR"
for name in checkpoint.pt "dict.$SRC.txt" "dict.$TGT.txt" spm.model; do
    [ -f "${TEACHER:-}/$name" ] || die "expected TEACHER, a folder with a checkpoint.pt, dict.$SRC.txt, dict.$TGT.txt
  and spm.model; got '${TEACHER:-}'."
done
TEACHER=$(cd "$TEACHER" && pwd)
teacher=$TEACHER/checkpoint.pt
SPM_MODEL=$TEACHER/spm.model

first_of() { # PREFIXES...
    local prefix
    for prefix in "$@"; do if [ -f "$prefix.$SRC" ]; then break; fi; done
    echo "$prefix"
}
use_text train "$1/train"
use_text valid "$(first_of "$1/valid" "$1/val")"
use_text test "$(first_of "$1/test" "$1/test_2016_flickr")"
prepare_spm
binarise --srcdict "$TEACHER/dict.$SRC.txt" --tgtdict "$TEACHER/dict.$TGT.txt"

SIZE=(--arch transformer --encoder-layers 2 --decoder-layers 2
    --encoder-embed-dim 64 --decoder-embed-dim 64 --encoder-ffn-embed-dim 256 --decoder-ffn-embed-dim 256
    --encoder-attention-heads 4 --decoder-attention-heads 4 --share-all-embeddings)
student() { # NAME FLAGS...; the flags of ROW come last
    train "$1" "${SIZE[@]}" --dropout 0.1 \
        --optimizer adam --adam-betas '(0.9,0.98)' --lr 0.005 \
        ${SCHEDULE:---lr-scheduler polynomial_decay --warmup-updates $((UPDATES / 8)) --total-num-update $UPDATES} \
        --max-tokens 2048 --max-update "$UPDATES" --num-workers 0 ${STUDENT_FLAGS:-} "${@:2}" "${LOSS[@]}"
}

# Word level from a cache of the K likeliest symbols and S samples of the rest.
cached() { # K S [TEACHER] [SUFFIX]
    KD_CACHE=$1-$2${4:-} KD_FLAGS="--kd-tail sample $KD_FLAGS" CACHE_FLAGS="--tail-samples $2 $CACHE_FLAGS"
    cache_teacher "${3:-$teacher}"
    distil_flags "${3:-$teacher}"
}

# An eighth as many updates more of a student that is trained. name and seed are those of `row`.
finetune() { # STUDENT
    UPDATES=$((UPDATES / 8)) student "$name" "${seed[@]}" --lr "$FINETUNE_LR" \
        --finetune-from-model "$WORK/models/$1/checkpoint_last.pt"
}

# What the rows are: the data, the teacher, the loss.
row() { # NAME SEED
    local name=$1-s$2 seed=(--seed "$2") junior k start
    local KD_CACHE= KD_WEIGHT=$KD_WEIGHT CACHE_FLAGS=${CACHE_FLAGS:-} KD_FLAGS=${KD_FLAGS:-} DATA_BIN= LABEL_SMOOTHING=${LABEL_SMOOTHING:-}
    case $1 in *-ls0) LABEL_SMOOTHING=0 ;; esac
    case $1 in
        *-finetuned)
            (row "${1%-finetuned}" "$2")
            plain_flags
            finetune "${1%-finetuned}-s$2"
            return
            ;;
        plain | plain-ls0)
            plain_flags
            ;;
        word | word-ls0)
            distil_flags "$teacher"
            ;;
        bucket-*)
            KD_CACHE=${1#bucket-}
            cache_teacher "$teacher"
            distil_flags "$teacher"
            ;;
        sample-*-*)
            k=${1#sample-} k=${k%-ls0}
            cached "${k%-*}" "${k#*-}"
            ;;
        hidden-*)
            KD_FLAGS="--kd-hidden ${1#hidden-} $KD_FLAGS"
            distil_flags "$teacher"
            ;;
        attention)
            KD_FLAGS="--kd-attention-weight 1 $KD_FLAGS"
            distil_flags "$teacher"
            ;;
        inputs-*)
            (KD_FLAGS="" row sample-8-8 "$2") # flags of the running teacher are not for a cache
            KD_FLAGS="--kd-inputs ${1#inputs-} $KD_FLAGS"
            if [ "$1" != inputs-reference ]; then KD_FLAGS="--kd-inputs-rate 0.5 $KD_FLAGS"; fi
            distil_flags "$teacher"
            finetune "sample-8-8-s$2"
            return
            ;;
        ranking)
            KD_FLAGS="--kd-ranking-weight 1 $KD_FLAGS"
            distil_flags "$teacher"
            ;;
        annealed)
            KD_WEIGHT= KD_FLAGS="--kd-weight-schedule linear:1:0:$UPDATES $KD_FLAGS"
            cached 8 8
            ;;
        best | closest | keep-* | mbr | samples | backward)
            choose_sequences "$1" "$teacher"
            DATA_BIN=data-$1
            plain_flags
            ;;
        mixed | mixed-word)
            choose_sequences mixed "$teacher"
            DATA_BIN=data-mixed
            plain_flags
            if [ "$1" = mixed-word ]; then cached 8 8; fi
            ;;
        ensemble)
            [ -n "${ENSEMBLE:-}" ] || die "the row ensemble needs ENSEMBLE, more teachers' checkpoints."
            cached 8 8 "$teacher:$ENSEMBLE" -ensemble
            ;;
        junior)
            [ -n "${JUNIOR:-}" ] || die "the row junior needs JUNIOR, a medium teacher's checkpoint."
            distil_flags "$JUNIOR"
            UPDATES=$((UPDATES / 2)) student "junior-first-s$2" "${seed[@]}"
            junior=$WORK/models/junior-first-s$2/checkpoint_last.pt
            distil_flags "$teacher"
            # the second half alone counts its updates anew, and its learning rate starts as high
            UPDATES=$((UPDATES - UPDATES / 2)) student "$name" "${seed[@]}" --finetune-from-model "$junior"
            return
            ;;
        layers | layers-random)
            cached 8 8
            # flags of fairseq-train as a shell reads them; the first two start from the layers
            start=$(command_of init "$teacher" --layers "$LAYERS" --teacher-data "$TEACHER" --source-lang "$SRC" \
                --target-lang "$TGT" --output "$WORK/layers.pt" --overwrite | tail -n 1) || die "taking the teacher's layers failed."
            eval "start=($start)"
            if [ "$1" = layers-random ]; then start=("${start[@]:2}"); fi
            # in place of the usual size, of which these leave out what they take by default
            local SIZE=("${start[@]}")
            student "$name" "${seed[@]}" --lr "$LAYERS_LR"
            return
            ;;
        *) die "there is no row '$1'; the rows are in the header of recipes/evidence.sh." ;;
    esac
    student "$name" "${seed[@]}"
}

evidence() { python "$HERE/evidence.py" "$@"; }

for seed in $SEEDS; do
    models=("teacher=$teacher")
    for name in $ROWS; do
        row "$name" "$seed"
        models+=("$name-s$seed=$WORK/models/$name-s$seed/checkpoint_last.pt")
    done
    if [ "${JUDGE:-1}" = 0 ]; then continue; fi
    flags="--repeats 1 --overwrite"
    case " $ROWS " in *" plain "*) flags="$flags --baseline plain-s$seed" ;; esac
    REPORT="report-s$seed" REPORT_FLAGS="$flags ${REPORT_FLAGS:-}" GREEDY=1 judge "${models[@]}"
    evidence "$WORK" "$TGT"
done
