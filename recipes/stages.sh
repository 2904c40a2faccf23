# Sourced by the recipes, after setup.sh: the stages that every experiment is made of.
#
# A stage skips itself when its result is there. Results are written under a temporary name and renamed when they
# are complete, so an interrupted run continues where it was; a training resumes from its last checkpoint.
# To do a stage again, delete its result.
#
#   WORK        folder of all results                      SRC, TGT    languages
#   VOCAB       SentencePiece symbols                      BEAM        beam of the evaluation (5)
#   LAUNCH      put before fairseq-train, e.g. "srun"      TRAIN_FLAGS added to every training
#   REFERENCES  to score against (text/test.$TGT; empty: data-bin's)      BLEU_TOKENIZE  sacreBLEU's --tokenize (the language's)
#   REMOVE_BPE  fairseq's --remove-bpe (sentencepiece)     SUBWORDS    what the names of subword text end in (.spm)
#   USER_DIR    the plugin (kd_plugin of this checkout)    KD_CACHE    read the teacher from a cache of its top K
#   DATA_BIN    what is trained on (data-bin)              ENGINE      of decoding: fairseq, or ctranslate2
#   TASK        fairseq's, without a teacher (translation) PAIR        flags of the languages (SRC's and TGT's)
#   LOSS        flags of a training, set by plain_flags and distil_flags
#   PRESET      the students' size: tiny, small, base or a file of flags (presets/), put before STUDENT_FLAGS
#   GREEDY      1: judge with beam 1, too                   REPORT      folder of the report (report)
#   REPORT_FLAGS, EXPORT_FLAGS  added to these commands
#
# $WORK afterwards:  text/  raw sentences, and the same as subwords      spm.model   SentencePiece
#                    data-bin/  binarised       models/NAME/  checkpoints and train.log      cache-K/  of the teacher
#                    hypotheses/  n-best lists of the teacher            data-NAME/  data-bin made of them
#                    exported/NAME/  for CTranslate2               report/  report.html, .md, .json, translations of test

set -f # lists of flags are split into words, and nothing else
USER_DIR=${USER_DIR:-$REPO/kd_plugin}
WORK=$(mkdir -p "$WORK" && cd "$WORK" && pwd)
for path in "$WORK" "${TEACHER:-}"; do
    case $path in *[:,]*) die "expected a folder without : and , in its name, which separate paths for fairseq; got $path." ;; esac
done
if [ -n "${PRESET:-}" ]; then
    case $PRESET in
        */* | *.flags) preset=$PRESET ;;
        *) preset=$REPO/recipes/presets/$PRESET.flags ;;
    esac
    [ -f "$preset" ] || die "expected PRESET=tiny, small, base or a file of fairseq-train's flags; got $PRESET."
    STUDENT_FLAGS="$(sed 's/#.*//' "$preset") ${STUDENT_FLAGS:-}"
fi
BEAM=${BEAM:-5}
TASK=${TASK:-translation} PAIR=${PAIR-"--source-lang $SRC --target-lang $TGT"} REMOVE_BPE=${REMOVE_BPE-sentencepiece}
SPLITS="train valid test"
# Waiting threads sleep instead of spinning: with a busy neighbour on one core, small models train 8 times faster.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
# glibc gives large tensors back to the system as soon as they are freed, and asks for them again: on a CPU a third of
# a small model's time (docs/performance.md).
export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-4294967296} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-4294967296}

# ve-fairseq 0.12.3 loses the end of the data, up to 7 sentences, when batches are rounded to a multiple of 8 as
# by default: then test has no translation of its longest sentences.
ALL_DATA="--required-batch-size-multiple 1 --skip-invalid-size-inputs-valid-test"

tools() { python "$REPO/recipes/tools.py" "$@"; }

# A command of this checkout's plugin.
command_of() { # NAME ARGUMENTS...
    local name=$1
    shift
    PYTHONPATH="$REPO${PYTHONPATH:+:$PYTHONPATH}" python -W ignore -m "kd_plugin.commands.$name" "$@"
}

done_already() { # RESULT
    [ -e "$1" ] || return 1
    say "have ${1#"$WORK"/}"
}

# --fp16 and the GPU if there is one.
device_flags() {
    if [ -z "${DEVICE_FLAGS:-}" ]; then
        DEVICE_FLAGS=--cpu
        if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then DEVICE_FLAGS=--fp16; fi
    fi
}

# How many lines a file has; unlike with wc, the last one need not be ended.
lines_of() { LC_ALL=C awk 'END { print NR }' "$1"; }

# The user's own text into $WORK/text. PREFIX is a split's file name without language: train, val, ...
use_text() { # SPLIT PREFIX
    local lang
    for lang in "$SRC" "$TGT"; do
        [ -f "$2.$lang" ] || die "expected $2.$lang: one sentence per line, as many lines on both sides."
    done
    if done_already "$WORK/text/$1.$TGT"; then return; fi
    [ "$(lines_of "$2.$SRC")" -eq "$(lines_of "$2.$TGT")" ] ||
        die "expected as many lines in $2.$SRC as in $2.$TGT; got $(lines_of "$2.$SRC") and $(lines_of "$2.$TGT")."
    mkdir -p "$WORK/text"
    for lang in "$SRC" "$TGT"; do
        cp "$2.$lang" "$WORK/text/new" && mv "$WORK/text/new" "$WORK/text/$1.$lang"
    done
}

# spm.model, trained on both sides of train (or copied from SPM_MODEL), and every split encoded with it.
prepare_spm() {
    if ! done_already "$WORK/spm.model"; then
        if [ -n "${SPM_MODEL:-}" ]; then
            cp "$SPM_MODEL" "$WORK/spm.new" && mv "$WORK/spm.new" "$WORK/spm.model"
        else
            say "SentencePiece: $VOCAB symbols"
            tools spm "$WORK/spm.model" "$VOCAB" "$WORK/text/train.$SRC" "$WORK/text/train.$TGT"
        fi
    fi
    local split lang
    for split in $SPLITS; do
        for lang in "$SRC" "$TGT"; do
            [ -e "$WORK/text/$split.spm.$lang" ] ||
                tools encode "$WORK/spm.model" "$WORK/text/$split.$lang" "$WORK/text/$split.spm.$lang"
        done
    done
}

# data-bin/ from text/SPLIT.spm.*, or text/SPLIT.* if SUBWORDS is empty. FLAGS go to fairseq-preprocess.
binarise() { # FLAGS...
    if done_already "$WORK/data-bin"; then return; fi
    local text=$WORK/text end=${SUBWORDS-.spm}
    say "binarising"
    rm -rf "$WORK/data-bin.new"
    quietly "$WORK/binarise.log" "" fairseq-preprocess --source-lang "$SRC" --target-lang "$TGT" \
        --trainpref "$text/train$end" --validpref "$text/valid$end" --testpref "$text/test$end" \
        --destdir "$WORK/data-bin.new" --workers 2 "$@"
    mv "$WORK/data-bin.new" "$WORK/data-bin"
}

# models/NAME/checkpoint_best.pt: the lowest nll_loss on valid. Never chosen by `loss`, which means something else
# for every objective. The command is the first line of models/NAME/train.log. KEEP: fairseq's flags on epochs' files.
train() { # NAME FLAGS...
    local name=$1 folder=$WORK/models/$1
    shift
    if done_already "$folder/done"; then return; fi
    device_flags
    mkdir -p "$folder"
    tools resumable "$folder"
    # shellcheck disable=SC2086  # LAUNCH and the flags are lists of words
    set -- ${LAUNCH:-} fairseq-train "$WORK/${DATA_BIN:-data-bin}" --user-dir "$USER_DIR" --save-dir "$folder" \
        $PAIR --best-checkpoint-metric nll_loss ${KEEP:---no-epoch-checkpoints} \
        $ALL_DATA --log-format json --log-interval 50 $DEVICE_FLAGS "$@" ${TRAIN_FLAGS:-}
    say "training $name (log: $folder/train.log)"
    {
        printf '%q ' "$@" && echo
        "$@" 2>&1
    } | tee -a "$folder/train.log" | tools progress "$name" || die "training $name failed. The log's end:
$(tail -n 15 "$folder/train.log")
  Run the recipe again to go on from the last checkpoint."
    touch "$folder/done"
}

# data-NAME/: the training set as the teacher translates it, chosen from the n best of hypotheses/. Interrupted, it goes
# on where it was. SEQUENCES_FLAGS adds to its flags.
distil_sequences() { # NAME TEACHER FLAGS...
    local name=$1 teacher=$2
    shift 2
    if done_already "$WORK/data-$name/record.json"; then return; fi
    device_flags
    say "translating the training set with the teacher: $name"
    # shellcheck disable=SC2086
    command_of sequences "$WORK/data-bin" \
        --path "$teacher" --output "$WORK/data-$name" --hypotheses "$WORK/${HYPOTHESES:-hypotheses}" \
        ${SEARCH_FLAGS:---beam 5 --nbest 5} $PAIR --remove-bpe "$REMOVE_BPE" \
        --engine "${ENGINE:-fairseq}" --max-tokens 4096 $DEVICE_FLAGS "$@" ${SEQUENCES_FLAGS:-} ||
        die "distilling at sequence level failed. Run the recipe again to go on."
}

# data-ROW/ by the choices that these recipes compare.
choose_sequences() { # ROW TEACHER
    case $1 in
        best | closest) distil_sequences "$1" "$2" --select "$1" ;;
        keep-*) distil_sequences "$1" "$2" --select closest --keep "${1#keep-}" ;;
        mixed) distil_sequences "$1" "$2" --select closest --mix original ;;
        backward)
            [ -n "${BACKWARD:-}" ] || die "the row backward needs BACKWARD, a model from $TGT to $SRC."
            distil_sequences "$1" "$2" --backward-path "$BACKWARD" --min-backward-quantile 0.05
            ;;
        mbr | samples)
            local HYPOTHESES=hypotheses-sampled how=(--select mbr --metric chrf)
            local SEARCH_FLAGS="--sampling --sampling-topp 0.9 --beam 16 --nbest 16"
            if [ "$1" = samples ]; then how=(--keep 4); fi
            distil_sequences "$1" "$2" "${how[@]}"
            ;;
        *) return 1 ;;
    esac
}

# With KD_CACHE=K, cache-K/: the teacher's K likeliest symbols for train and valid, which distil_flags then reads
# instead of the teacher. Interrupted, it continues where it was. CACHE_FLAGS adds to its flags. Of a data-NAME/ that
# DATA_BIN names, cache-K-data-NAME/.
cache_teacher() { # TEACHER
    if [ -z "${KD_CACHE:-}" ]; then return; fi
    device_flags
    say "caching the teacher's $KD_CACHE likeliest symbols"
    # shellcheck disable=SC2086
    command_of cache "$WORK/${DATA_BIN:-data-bin}" --path "$1" --cache "$(cache_folder)" --top-k "${KD_CACHE%%-*}" \
        $PAIR --max-tokens 4096 $DEVICE_FLAGS ${CACHE_FLAGS:-} || die "caching failed. Run the recipe again to go on."
}

cache_folder() { echo "$WORK/cache-$KD_CACHE${DATA_BIN:+-$DATA_BIN}"; }

# LOSS becomes the flags that turn a student's training into a distillation. KD_FLAGS adds to them.
distil_flags() { # TEACHER
    LOSS=(--task "kd_$TASK" --criterion kd_label_smoothed_cross_entropy)
    LOSS+=(--label-smoothing "${LABEL_SMOOTHING:-0.1}")
    if [ -n "${KD_CACHE:-}" ]; then
        LOSS+=(--teacher-cache "$(cache_folder)")
    else
        LOSS+=(--teacher-checkpoint-path "$1")
    fi
    # shellcheck disable=SC2206  # lists of words
    LOSS+=(${KD_WEIGHT:+--kd-weight $KD_WEIGHT} ${KD_TEMPERATURE:+--kd-temperature $KD_TEMPERATURE} ${KD_FLAGS:-})
}

# LOSS becomes the flags of a training without a teacher.
plain_flags() {
    LOSS=(--task "$TASK" --criterion label_smoothed_cross_entropy --label-smoothing "${LABEL_SMOOTHING:-0.1}")
}

# models/NAME/averaged.pt: the average of the last COUNT epochs' checkpoints.
average() { # NAME COUNT
    local folder=$WORK/models/$1 paths= name
    if done_already "$folder/averaged.pt"; then return; fi
    for name in $(ls "$folder" | sed -n 's/^checkpoint\([0-9][0-9]*\)\.pt$/\1 &/p' | sort -n |
        tail -n "$2" | cut -d' ' -f2); do
        paths=$paths${paths:+:}$folder/$name
    done
    [ -n "$paths" ] || die "expected at least one whole epoch's checkpoint in $folder; train for longer."
    quietly "$folder/average.log" "" command_of export --path "$paths" --average --data "$WORK/data-bin" \
        --output "$folder/averaged.pt"
}

# exported/NAME/: models/NAME's checkpoint for CTranslate2 in int8, compared with it on valid. Without CTranslate2 nothing.
export_int8() { # NAME CHECKPOINT
    if done_already "$WORK/exported/$1"; then return; fi
    if ! python -c 'import ctranslate2' 2>/dev/null; then
        say "no int8 export: it needs pip install ctranslate2"
        return
    fi
    say "exporting $1 in int8"
    mkdir -p "$WORK/exported"
    set -- "$@" --remove-bpe "$REMOVE_BPE"
    if [ -f "$WORK/spm.model" ]; then set -- "$@" --spm "$WORK/spm.model"; fi
    # shellcheck disable=SC2086
    command_of export --path "$2" --format ctranslate2 --quantization int8 --output "$WORK/exported/$1" \
        --data "$WORK/data-bin" --beam "$BEAM" "${@:3}" ${EXPORT_FLAGS:-} >"$WORK/export.log" 2>&1 ||
        die "exporting failed: $(tail -n 1 "$WORK/export.log")"
}

# report/: all models on test, the first one being the teacher: quality, cost, differences (fairseq-kd-report, whose
# flags REPORT_FLAGS adds to). Curves are of models/NAME/train.log. What has been decoded already is kept; an exported
# int8 model is one more, named NAME-int8.
judge() { # NAME=CHECKPOINT...
    local models=("$@") logs=() flags=() pair name
    device_flags
    for pair in "${models[@]}"; do
        name=${pair%%=*}
        if [ -f "$WORK/models/$name/train.log" ]; then logs+=("$name=$WORK/models/$name/train.log"); fi
        if [ -d "$WORK/exported/$name" ]; then models+=("$name-int8=$WORK/exported/$name"); fi
    done
    if [ ${#logs[@]} -gt 0 ]; then flags+=(--logs "${logs[@]}"); fi
    if [ -n "${REFERENCES-$WORK/text/test.$TGT}" ]; then
        flags+=(--reference "${REFERENCES-$WORK/text/test.$TGT}")
    fi
    if [ -n "${GREEDY:-}" ]; then flags+=(--greedy); fi
    if [ -n "${BLEU_TOKENIZE:-}" ]; then flags+=(--bleu-tokenize "$BLEU_TOKENIZE"); fi
    say "judging on test"
    # shellcheck disable=SC2086
    LOGLEVEL=${LOGLEVEL:-WARNING} command_of report "$WORK/data-bin" $PAIR --output "$WORK/${REPORT:-report}" \
        --teacher "${models[0]%%=*}" --models "${models[@]}" ${flags[@]+"${flags[@]}"} --beam "$BEAM" --max-tokens 4096 \
        ${REMOVE_BPE:+--remove-bpe "$REMOVE_BPE"} $ALL_DATA $DEVICE_FLAGS ${REPORT_FLAGS:-} || die "judging failed. Run the recipe again to go on."
}
