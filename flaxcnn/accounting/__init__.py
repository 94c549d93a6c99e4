"""What networks cost, layer by layer: `summarize`; and side by side: `costs`, `stacks`."""

from flaxcnn.accounting.counting import summarize
from flaxcnn.accounting.summary import Layer, Sides, Stage, Summary

__all__ = ["Layer", "Sides", "Stage", "Summary", "summarize"]
