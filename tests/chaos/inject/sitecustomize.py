"""Python imports this at its start where this folder is on its path: plants the faults that CHAOS_PLAN tells of."""

import os
import sys

if "CHAOS_PLAN" in os.environ and "RANK" in os.environ and "-m" in sys.orig_argv:
    from tests.after_trainer import after_trainer

    def plant(module):
        from tests.chaos import faults

        faults.plant(module)

    after_trainer(plant)
