"""The commands of the project's pages, with less work."""

from __future__ import annotations

from pathlib import Path

__all__ = ["smaller"]


def smaller(words: list[str], folder: Path) -> list[str]:
    """The arguments of a command with less, not other, work, on one rank."""
    arguments = words[1:]
    for option in ("--nproc", "--parallelism.expert-parallel-degree"):
        if option in arguments and arguments[0] != "plan":
            del arguments[arguments.index(option) : arguments.index(option) + 2]
    match arguments[0]:
        case "train" | "config" if "--help" not in arguments:
            if "--training.steps" in arguments:
                del arguments[(steps := arguments.index("--training.steps")) : steps + 2]
            resumes = words[2].startswith("-") and "--job.dump-folder" in words
            arguments += ["--training.steps", "2" if resumes else "1", "--data.cache-folder", str(folder / "cache")]
            if not resumes and not words[2].startswith("examples/"):  # which are small
                arguments += ["--training.seq-len", "32", "--data.source", str(folder / "speeches")]
                if "--model.hf-assets-path" not in arguments:
                    arguments += ["--model.hf-assets-path", str(folder / "assets"), "--model.flavor="]
        case "generate":
            arguments += ["--max-new-tokens", "3"]
        case "eval":
            arguments += ["--seq-len", "32", "--cache-folder", "cache"]
        case "bench" if "--simulate" not in arguments:
            arguments += ["--tokens", "16", "--rounds", "1"]
        case "plan" if "--search" in arguments or "--scale" in arguments:  # of a small model; both try many layouts
            arguments = [word if not word.startswith("configs/") else "configs/debug.toml" for word in arguments]
            arguments[arguments.index("--gpus") + 1] = "8"
        case "doctor":
            arguments += ["--no-test"]  # tests/test_shell.py runs it
        case _:
            pass
    return arguments
