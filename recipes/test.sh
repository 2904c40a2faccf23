#!/usr/bin/env bash
# All checks of this checkout: the environment's packages (pip check), ruff, mypy, pytest.
#
# Prepare:  nothing but Python; see setup.sh for the environment that is used or made.
# Run:      bash recipes/test.sh
#           bash recipes/test.sh --long      the fault suite (tests/faults) not in its short form, but as a whole
# Adapt:    arguments go to pytest: bash recipes/test.sh -k vocabulary -x
#           WORKERS=4 runs so many processes (default: 2).
#           Both ends of the supported versions, each in its own environment, as CI does: .ci/run
set -euo pipefail
EXTRAS=recipes,test # the tests also run the recipes
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

cd "$REPO"
# A busy neighbour on one core makes spinning threads several times slower (see stages.sh).
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
say "pip check" && python -m pip check
say "ruff" && python -m ruff check . && python -m ruff format --check .
say "mypy" && python -m mypy
# A file's tests stay in one process: they share what is slow to make. What all files share is made once.
say "pytest" && python -m pytest -q --numprocesses "${WORKERS:-2}" --dist loadfile "$@"
