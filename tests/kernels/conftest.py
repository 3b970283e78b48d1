"""Kernels under Triton's interpreter: those files run in processes of their own (see test_interpreted.py)."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted/*"]
