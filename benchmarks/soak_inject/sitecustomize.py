"""Python imports this at its start where this folder is on its path: notes what a rank holds."""

import os
import sys

if "SOAK_NOTES" in os.environ and "RANK" in os.environ and "-m" in sys.orig_argv:
    from tests.after_trainer import after_trainer

    def watch(module):
        from benchmarks.soak import note_each_step

        note_each_step(module)

    after_trainer(watch)
