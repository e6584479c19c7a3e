"""Python imports this at its start where this folder is on its path: records what ranks of replica groups compute."""

import os
import sys

if "LIVE_RECORDS" in os.environ and "RANK" in os.environ and "-m" in sys.orig_argv:
    from importlib.machinery import PathFinder

    class _AfterTrainer:
        """Looks in once the trainer has been imported."""

        def find_spec(self, name, path, target=None):
            if name != "crossdock.train.trainer":
                return None
            sys.meta_path.remove(self)
            spec = PathFinder.find_spec(name, path, target)
            assert spec is not None
            assert spec.loader is not None
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                from tests.integrations.live_records import record_steps

                record_steps(module.Trainer)

            spec.loader.exec_module = exec_module
            return spec

    sys.meta_path.insert(0, _AfterTrainer())
