"""How a plan's independent jobs run. Knows jobs, not LoRA."""

from loratool.engine.threads import Engine, NoProgress, Progress

__all__ = ["Engine", "NoProgress", "Progress"]
