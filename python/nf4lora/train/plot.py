"""loss.png: training and evaluation loss over steps."""

from __future__ import annotations

from pathlib import Path


def plot_loss(log_history: list[dict], path: Path) -> bool:
    """Draw the losses of a run; False where there is nothing to draw."""
    train = [(entry["step"], entry["loss"]) for entry in log_history if "loss" in entry]
    held_out = [(entry["step"], entry["eval_loss"]) for entry in log_history if "eval_loss" in entry]
    if not train and not held_out:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, and no change of anyone's backend
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    if train:
        axes.plot(*zip(*train, strict=True), color="tab:blue", marker="." if len(train) < 50 else "", label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="tab:orange", marker="o", label="held out")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150, format="png")
    return True
