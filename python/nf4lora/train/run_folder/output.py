"""Where a run writes: whether it may, how it begins there, and what it leaves at its end."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from nf4lora.train.errors import RunError, UsageError, reason
from nf4lora.train.run_folder import config_file, files
from nf4lora.train.run_folder.checkpoints import broken, check_options, checkpoints, is_whole, lies_in, step_of
from nf4lora.train.settings import TrainConfig
from nf4lora.words import listed

RESULTS = (
    "adapter_model.safetensors", "adapter_config.json", "nf4lora.json", "chat_template.jinja", "config.yaml",
    "metrics.jsonl", "loss.png", "trainer_state.json", "train_results.json", "eval_results.json",
)  # fmt: skip
OF_TOKENIZERS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
    "additional_chat_templates",
)  # fmt: skip
LAST = ("trainer_state.json", "train_results.json", "eval_results.json")


class Output:
    """The output folder of this run. Nothing in it is changed before `begin`.

    Attributes:
        folder: where it is
        checkpoint: the one that the run goes on from, or None
    """

    def __init__(self, config: TrainConfig, stack: ExitStack) -> None:
        """
        Raises:
            UsageError: no such checkpoint, one of another adapter, a folder that is in use, holds another run or files
                that no run wrote, or cannot be written to.
        """
        self.config, self.folder, self._stack, self._locked = config, Path(config.output_dir), stack, False
        check_place(config)
        if not config.dry_run:
            self._lock()
        self.checkpoint = self._check()

    @property
    def goes_on(self) -> bool:
        """Whether the run continues one in this very folder."""
        return self.checkpoint is not None and lies_in(self.checkpoint, self.folder)

    def _lock(self) -> None:
        if not self._locked and self.folder.is_dir():
            self._stack.enter_context(files.lock(self.folder))
            self._locked = True

    def _check(self) -> Path | None:
        config, folder = self.config, self.folder
        checkpoint: Path | None = None
        if config.resume_from_checkpoint == "auto":
            checkpoint = next(reversed(checkpoints(folder)), None)
        elif config.resume_from_checkpoint:
            checkpoint = Path(config.resume_from_checkpoint)
            if not is_whole(checkpoint):
                inside = checkpoints(checkpoint)
                hint = f"; the newest in it is {inside[-1]}" if inside else ""
                why = f" ({broken(checkpoint)})" if checkpoint.is_dir() and not inside else ""
                raise UsageError(f"resume_from_checkpoint: {checkpoint} is not a whole checkpoint{why}{hint}")
        goes_on = checkpoint is not None and lies_in(checkpoint, folder)
        if goes_on and config.overwrite_output_dir:
            raise UsageError("resume_from_checkpoint and overwrite_output_dir contradict each other")
        if checkpoint is not None:
            check_options(config, checkpoint)
        if config.dry_run:
            return checkpoint
        if not goes_on and not config.overwrite_output_dir and (result := results(folder, config)):
            go_on = "go on with --resume_from_checkpoint, "
            if config.resume_from_checkpoint == "auto":
                go_on = "there is no checkpoint to go on from; "
            raise UsageError(
                f"output_dir {folder} holds a run; {go_on}start anew with --overwrite_output_dir, or name another "
                f"folder (found {result})"
            )
        if others := foreign(folder, checkpoint if goes_on else None):
            where = f"output_dir {folder} holds {listed(others)}"
            cure = "move that away, or name another folder"
            if config_file.of_earlier_version(folder):
                go_on = "go on from its checkpoint with --resume_from_checkpoint, " if checkpoints(folder) else ""
                raise UsageError(
                    f"{where} of an earlier version of nf4lora train, which kept no list of its files; {go_on}{cure}"
                )
            raise UsageError(f"{where}, which no run of nf4lora train wrote there and this one would replace; {cure}")
        return checkpoint

    def begin(self, config: TrainConfig) -> list[str]:
        """Make the folder this run's own, just before training starts; returns what is to be said about it.

        Args:
            config: the options as they are written into config.yaml, where the run has decided what they left open

        Raises:
            UsageError: another process has taken the folder in the meantime.
            RunError: it cannot be written to.
        """
        folder, remarks = self.folder, []
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if not self._locked:
                self._lock()
                if self._check() != self.checkpoint:
                    raise UsageError(f"output_dir {folder}: another nf4lora train has put a checkpoint there meanwhile")
            files.sweep(folder)
            passes_over = config.resume_from_checkpoint == "auto"
            reached = -1 if self.checkpoint is None else step_of(self.checkpoint)
            if (passes_over or self.goes_on) and (aside := files.set_aside(folder, reached)):
                moved = files.checkpoint_folders(aside).values()
                if passes_over:
                    remarks += [
                        f"{checkpoint.name} is passed over: {broken(checkpoint)}; it is kept in {aside}"
                        for checkpoint in moved
                    ]
                else:
                    names = ", ".join(checkpoint.name for checkpoint in moved)
                    remarks.append(f"{names} and the results of the earlier course are kept in {aside}")
            if not self.goes_on:
                files.clear(folder)
            adopted = OF_TOKENIZERS if self.goes_on and config_file.of_earlier_version(folder) else ()
            files.note_files(folder, (*RESULTS, *adopted), output_dir=config.output_dir)
            config_file.write(config, folder / "config.yaml")
        return remarks

    def draw(self, plot: Callable[[list[dict], Path], bool], history: list[dict]) -> str:
        """loss.png; returns why there is none. A picture is no reason to lose a run."""
        part = self.folder / ".loss.png.part"
        try:
            if plot(history, part) and part.exists():
                os.replace(part, self.folder / "loss.png")
        except ImportError as error:
            return f"loss.png was not drawn: {error.name or error} is missing; pip install matplotlib"
        except Exception as error:
            part.unlink(missing_ok=True)
            return f"loss.png was not drawn ({type(error).__name__}: {error})"
        return ""

    def save(self, trainer: Any, metrics: dict[str, Any]) -> list[Path]:
        """Adapter, tokenizer, state and results; returns the files a user will look for.

        Raises:
            RunError: they cannot be written; the last checkpoint is named.
        """
        from nf4lora.adapters.files import save_adapter

        state = trainer.state
        with writing(self.folder, trainer.saved), files.staging(self.folder) as place:
            if self.config.load_in_4bit:
                save_adapter(trainer.model, place)
            else:
                trainer.model.save_pretrained(place)
                (place / "README.md").unlink(missing_ok=True)  # PEFT's form to fill in
            trainer.processing_class.save_pretrained(place)
            state.save_to_json(str(place / "trainer_state.json"))
            write_json(place / "train_results.json", metrics)
            held_out = [entry for entry in state.log_history if "eval_loss" in entry]
            if held_out:
                write_json(place / "eval_results.json", {"eval_loss_before": held_out[0]["eval_loss"], **held_out[-1]})
            files.publish(place, self.folder, LAST)
        return [self.folder / name for name in RESULTS if (self.folder / name).exists()]


def check_place(config: TrainConfig) -> None:
    """Refuse an output folder that is something else already, or that cannot be.

    Raises:
        UsageError: it is a file or a dead link, the model's or the data's folder, or not to be written to.
    """
    folder = Path(config.output_dir)
    if os.path.lexists(folder) and not folder.is_dir():
        raise UsageError(f"output_dir: {folder} is a {'link to nothing' if folder.is_symlink() else 'file'}")
    for name in ("model_name_or_path", "data", "page_to"):
        other = getattr(config, name)
        if other and os.path.isdir(other) and folder.resolve() == Path(other).resolve():
            raise UsageError(f"output_dir must not be the folder of {name}, got {folder}; name another folder")
    if config.dry_run:
        return
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise UsageError(f"output_dir: {existing} is a file, so that {folder} cannot be made")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"output_dir: {existing} cannot be written to; name another folder")


def results(folder: Path, config: TrainConfig) -> str:
    """What the folder holds that a new run would destroy. A run that was broken off before it had anything to show is
    nothing: the same command may simply be given again."""
    own, resumes = files.own_files(folder), config.resume_from_checkpoint == "auto"
    if (folders := files.checkpoint_folders(folder)) and not resumes:  # where it resumes, none of them is whole
        return next(reversed(folders.values())).name
    if "adapter_model.safetensors" in own:
        return "adapter_model.safetensors"
    logged = folder / "metrics.jsonl"
    if not resumes and "metrics.jsonl" in own and logged.stat().st_size:
        return "metrics.jsonl of a run that was broken off before its first checkpoint"
    return ""


def foreign(folder: Path, checkpoint: Path | None) -> list[str]:
    """Files that a run would replace although none wrote them; with a checkpoint to go on from, only later ones.

    What an earlier version left beside its checkpoints belongs to the run that goes on from them.
    """
    own = {files.RECORD, *files.own_files(folder)} if files.read_record(folder) else set()
    if checkpoint is not None and config_file.of_earlier_version(folder):
        own |= {*RESULTS, *OF_TOKENIZERS}
    names = [name for name in (*RESULTS, *OF_TOKENIZERS, files.RECORD) if os.path.lexists(folder / name)]
    reached = -1 if checkpoint is None else step_of(checkpoint)
    ours = files.own_checkpoints(folder)
    steps = [step for step in files.checkpoint_folders(folder) if step not in ours and step > reached]
    return [name for name in names if name not in own] + [f"checkpoint-{step}" for step in steps]


@contextmanager
def writing(folder: Path, saved: Path | None = None) -> Iterator[None]:
    """Say in one sentence why something could not be written, and what is there instead.

    Raises:
        RunError: in place of what the system or a library raised.
    """
    from safetensors import SafetensorError

    try:
        yield
    except Exception as error:
        # Of a full disk torch.save makes a RuntimeError, and the tokenizers library a bare Exception.
        if not isinstance(error, (OSError, SafetensorError, RuntimeError)) and type(error) is not Exception:
            raise
        there = f"; the last whole checkpoint is {saved}" if saved else "; no checkpoint has been written yet"
        raise RunError(f"{folder} could not be written to: {reason(error)}{there}") from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
