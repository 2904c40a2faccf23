"""What all tests share: one thread per process, so that tests do not fight for cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
