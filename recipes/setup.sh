# Sourced by the recipes: finds or makes a Python environment, and installs kd_plugin and fairseq into it.
#
#   The active virtualenv or conda environment is used as it is, if there is one (conda's `base` doesn't count:
#   it is nobody's project). Otherwise .venv at the root of this checkout is made with $PYTHON, or with the best of
#   python3.11, python3.12, python3.8, python3 on PATH.
#
#   PYTHON   the Python to make the environment with
#   VENV     folder of the environment; overrules an active one
#   EXTRAS   what of setup.py's extras to install (recipes)
#   SETUP    `skip`: touch nothing, the active environment has all it needs (for offline machines)
#
# A second run is instant: a stamp in the environment holds the hash of setup.py. Packages come from wherever the
# user's pip configuration says. A fairseq that the environment already has is left alone.

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export REPO

say() { printf '%s\n' "$*" >&2; }
die() {
    say "error: $*"
    exit 1
}

# Runs a command with its output in a log; shows the log's end only if it fails.
quietly() { # LOG HINT COMMAND...
    local log=$1 hint=$2
    shift 2
    if ! "$@" >"$log" 2>&1; then
        tail -n 25 "$log" >&2
        die "this failed: $*
  The whole log is in $log. $hint"
    fi
}

# "3.11" of a Python that really runs (a pyenv shim without a selected version exists, but does not).
python_version() {
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

# Ends with a reason if fairseq cannot be had on this version.
check_version() { # VERSION NAME
    case $1 in
        3.8 | 3.11 | 3.12) ;;
        3.9 | 3.10)
            command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null ||
                die "expected Python 3.8, 3.11 or 3.12, which have a prebuilt fairseq, or a C++ compiler to build it
  with; got Python $1 ($2) and no c++, g++ or clang++ on PATH. Install one of these Pythons and say PYTHON=python3.11,
  or install a compiler."
            ;;
        *) die "expected Python 3.8 to 3.12 (3.8, 3.11 or 3.12 at best); got Python ${1:-that does not run} ($2).
  fairseq does not run there. Install one of these and say PYTHON=/path/to/python3.11." ;;
    esac
}

# The Python to make an environment with: one that runs, and can make environments.
find_python() {
    local name version seen=
    set -- python3.11 python3.12 python3.8 python3 python
    [ -z "${PYTHON:-}" ] || set -- "$PYTHON"
    for name in "$@"; do
        command -v "$name" >/dev/null || continue
        version=$(python_version "$name") || continue
        seen="$seen $name ($version)"
        if [ -z "${PYTHON:-}" ]; then
            case $version in 3.8 | 3.9 | 3.10 | 3.11 | 3.12) ;; *) continue ;; esac
            "$name" -c 'import venv, ensurepip' 2>/dev/null || continue
        fi
        echo "$name"
        return
    done
    die "expected a Python 3.8, 3.11 or 3.12 that runs and has the venv module; looked for $*; of these run:
 ${seen:- none}. Install one (Debian and Ubuntu: also python3-venv), or say PYTHON=/path/to/python3.11, or activate
  an environment."
}

set_up() {
    local base version log extras stamp wanted hash have extra missing=
    if [ -z "${VENV:-}" ] && [ -n "${VIRTUAL_ENV:-}" ]; then
        VENV=$VIRTUAL_ENV
    elif [ -z "${VENV:-}" ] && [ -n "${CONDA_PREFIX:-}" ] && [ "${CONDA_DEFAULT_ENV:-}" != base ]; then
        VENV=$CONDA_PREFIX
    fi
    VENV=${VENV:-$REPO/.venv}
    if [ ! -x "$VENV/bin/python" ]; then
        [ "${SETUP:-}" != skip ] || die "SETUP=skip expects an active environment; there is no $VENV/bin/python."
        base=$(find_python) || exit 1
        version=$(python_version "$base") || true
        check_version "$version" "$base"
        say "set-up: making $VENV with $base ($version)"
        # --clear: a half-made environment of an interrupted run has no python, but other leftovers.
        quietly "${TMPDIR:-/tmp}/kd_plugin-venv-$$.log" "Is the venv module complete (Debian and Ubuntu: python3-venv)?" \
            "$base" -m venv --clear "$VENV"
    fi
    unset PYTHONHOME
    export VIRTUAL_ENV=$VENV PATH="$VENV/bin:$PATH"
    [ "${SETUP:-}" != skip ] || return 0

    stamp=$VENV/.kd_plugin-installed
    wanted=${EXTRAS:-recipes}
    hash=$(python -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' \
        "$REPO/setup.py")
    hash="$hash@$REPO" # an environment may serve several checkouts; the editable install serves the last
    if [ -f "$stamp" ]; then
        { read -r have && read -r extras; } <"$stamp" || true
        [ "$have" = "$hash" ] || missing=all
        for extra in ${wanted//,/ }; do
            case ",$extras," in *",$extra,"*) ;; *) missing=$extra ;; esac
        done
        [ -n "$missing" ] || return 0
    fi

    version=$(python_version python)
    log=$VENV/kd_plugin-install.log
    local hint="Is the network up, and does \`pip config list\` point where you expect? Then run it again: what is
  installed already stays."
    extras=$wanted
    python -m pip --version >/dev/null 2>&1 || quietly "$log" "Install pip into $VENV." python -m ensurepip
    if ! python -c 'import fairseq' 2>/dev/null; then
        check_version "$version" "$VENV"
        extras=fairseq,$wanted
        case $version in
            3.11 | 3.12) ;;
            *)
                # omegaconf 2.0.6, which fairseq 0.12.2 needs, has metadata that pip >= 24.1 refuses.
                say "set-up: pip older than 24.1, for fairseq 0.12.2"
                quietly "$log" "$hint" python -m pip install --quiet "pip<24.1"
                # The release that fairseq 0.12.2 was made for. torchaudio must match it, and pip
                # tries many when it is not told.
                say "set-up: torch 1.12"
                quietly "$log" "$hint" python -m pip install --quiet "torch>=1.12,<1.13" "torchaudio>=0.12,<0.13"
                ;;
        esac
    fi
    say "set-up: kd_plugin[$extras] into $VENV (the first time, torch takes a while)"
    quietly "$log" "$hint" python -m pip install --quiet --editable "${REPO}[$extras]"
    python -c 'import fairseq' >/dev/null 2>"$log" || die "fairseq was installed, but \`import fairseq\` fails:
$(tail -n 3 "$log")"
    printf '%s\n%s\n' "$hash" "$wanted" >"$stamp.new" && mv "$stamp.new" "$stamp"
    say "set-up: done"
}

set_up
