#!/usr/bin/env bash
# IWSLT14 German to English as the literature has it: a 6+6-layer teacher and a 2+2-layer student.
#
# For orientation (AIO-KD, EMNLP 2023): 33.48 BLEU for the plain student, 34.93 with word-level distillation.
# BLEU here is the literature's: on tokenised, lowercased text, and with no further tokenisation (tok:none). It is
# not comparable with BLEU on raw text.
#
# Prepare:  fairseq's examples/translation/prepare-iwslt14.sh writes the folder iwslt14.tokenized.de-en with
#           {train,valid,test}.{de,en}, tokenised, lowercased, in BPE (10,000 joint operations).
#           A folder that fairseq-preprocess made of it (it holds dict.de.txt and train.de-en.de.bin) also does.
# Run:      bash recipes/iwslt14_de_en.sh iwslt14.tokenized.de-en
#           one GPU, or all GPUs of this machine; some hours. Run it again after an interruption, and it continues.
# Several:  one GPU sees 4096 tokens per update, in the literature as here. With N GPUs it is N times as many: give
#           each 4096/N by MAX_TOKENS, or scale the learning rate.
#     torchrun, one machine:
#           LAUNCH="torchrun --nproc_per_node 4 --no-python" MAX_TOKENS=1024 bash recipes/iwslt14_de_en.sh DIR
#     torchrun, several machines: start the recipe on the first one, and on each of the others, once the first waits,
#           the same torchrun line with its --node_rank and the command that is the first line of train.log:
#           LAUNCH="torchrun --nnodes 2 --node_rank 0 --master_addr HOST --master_port 29500 --nproc_per_node 4
#               --no-python" MAX_TOKENS=512 bash recipes/iwslt14_de_en.sh DIR
#     SLURM: as the body of a batch script, one task per GPU; fairseq finds the rest in SLURM's environment. The
#           environment has to be ready (run `bash recipes/quickstart.sh` before, or activate one):
#           #SBATCH --nodes 2 --ntasks-per-node 4 --gres gpu:4
#           SETUP=skip LAUNCH=srun TRAIN_FLAGS="--distributed-port 29500 --distributed-world-size 8" \
#               MAX_TOKENS=512 \
#               bash recipes/iwslt14_de_en.sh DIR
#
# Environment (see also setup.sh and stages.sh):
#   WORK               iwslt14-work    results; delete it to start again
#   MAX_TOKENS         4096            per batch and GPU
#   TEACHER_UPDATES, STUDENT_UPDATES   60000, 60000
#   AVERAGE            5               how many of the last epochs' checkpoints are averaged
#   KD_WEIGHT, KD_TEMPERATURE, KD_FLAGS    0.5, 1, none    the distillation
#   TEACHER_FLAGS, STUDENT_FLAGS, TRAIN_FLAGS    added to the trainings: of the teacher, of both students, of all.
#   PRESET             none            tiny, small or base: size and learning rate of the students (presets/)
#                      A toy run, on some 1000 lines; a teacher that is worse than a guess would be refused, so it
#                      has to learn fast: AVERAGE=2 MAX_TOKENS=500 TEACHER_UPDATES=60 STUDENT_UPDATES=60 \
#                      TRAIN_FLAGS="--encoder-embed-dim 32 --decoder-embed-dim 32 --lr 0.01 --warmup-updates 10" \
#                      SEQUENCES_FLAGS=--no-filters
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

SRC=${SRC:-de} TGT=${TGT:-en}
WORK=${WORK:-$HERE/../iwslt14-work}
AVERAGE=${AVERAGE:-5}
KEEP="--keep-last-epochs $AVERAGE"
SUBWORDS=          # the text already is in subwords
REMOVE_BPE='@@ '    # those of subword-nmt
BLEU_TOKENIZE=none # the text already is tokenised

source "$HERE/setup.sh"
source "$HERE/stages.sh"
[ $# -eq 1 ] || die "expected one argument, the folder that fairseq's prepare-iwslt14.sh made"
DATA=$(cd "$1" && pwd)

if [ -f "$DATA/dict.$SRC.txt" ]; then
    [ -e "$WORK/data-bin" ] || ln -s "$DATA" "$WORK/data-bin"
    REFERENCES= # the data-bin's
else
    for split in $SPLITS; do use_text "$split" "$DATA/$split"; done
    binarise # a dictionary for each language, as in the literature
    REFERENCES=$WORK/text/references.$TGT
    sed 's/@@ //g' "$WORK/text/test.$TGT" >"$REFERENCES"
fi

model() { # NAME LAYERS UPDATES FLAGS...
    local name=$1 layers=$2 updates=$3
    shift 3
    train "$name" --arch transformer_iwslt_de_en --encoder-layers "$layers" --decoder-layers "$layers" \
        --share-decoder-input-output-embed --dropout 0.3 --weight-decay 0.0001 \
        --optimizer adam --adam-betas '(0.9,0.98)' --clip-norm 0 --lr 5e-4 --lr-scheduler inverse_sqrt \
        --warmup-updates 4000 --max-tokens "${MAX_TOKENS:-4096}" --max-update "$updates" --seed 1 "$@"
    average "$name" "$AVERAGE"
}
# two dictionaries share no embeddings
STUDENT_FLAGS=${STUDENT_FLAGS:-} && STUDENT_FLAGS=${STUDENT_FLAGS//--share-all-embeddings/}
best=averaged.pt
plain_flags
model teacher 6 "${TEACHER_UPDATES:-60000}" "${LOSS[@]}" ${TEACHER_FLAGS:-}
model plain 2 "${STUDENT_UPDATES:-60000}" "${LOSS[@]}" ${STUDENT_FLAGS:-}
cache_teacher "$WORK/models/teacher/$best"
distil_flags "$WORK/models/teacher/$best"
model distilled 2 "${STUDENT_UPDATES:-60000}" "${LOSS[@]}" ${STUDENT_FLAGS:-}
distil_sequences closest "$WORK/models/teacher/$best" --select closest
plain_flags
DATA_BIN=data-closest model sequences 2 "${STUDENT_UPDATES:-60000}" "${LOSS[@]}" ${STUDENT_FLAGS:-}

export_int8 distilled "$WORK/models/distilled/$best"
judge "teacher=$WORK/models/teacher/$best" "plain=$WORK/models/plain/$best" \
    "distilled=$WORK/models/distilled/$best" "sequences=$WORK/models/sequences/$best"
