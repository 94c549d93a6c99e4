"""What networks cost, layer by layer: `summarize`; and side by side: `costs`, `stacks`."""

from flaxcnn.accounting.summary import Layer, Sides, Stage, Summary, summarize

__all__ = ["Layer", "Sides", "Stage", "Summary", "summarize"]
