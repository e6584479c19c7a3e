"""Python imports this at its start where this folder is on its path: plants the faults that CHAOS_PLAN tells of."""

import os
import sys

if "CHAOS_PLAN" in os.environ and "RANK" in os.environ and "-m" in sys.orig_argv:
    from importlib.machinery import PathFinder

    class _AfterTrainer:
        """Plants faults once the trainer has been imported."""

        def find_spec(self, name, path, target=None):
            if name != "crossdock.train.trainer":
                return None
            sys.meta_path.remove(self)
            spec = PathFinder.find_spec(name, path, target)
            assert spec is not None
            assert spec.loader is not None
            loader = spec.loader
            execute = loader.exec_module

            def exec_module(module):
                execute(module)
                from tests.chaos.faults import plant

                plant(module)

            loader.exec_module = exec_module
            return spec

    sys.meta_path.insert(0, _AfterTrainer())
