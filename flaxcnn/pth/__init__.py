"""Files of torch.save, read and written without torch; nothing in one is executed."""

from flaxcnn.pth.reader import let_go, read_buffer, read_pth
from flaxcnn.pth.writer import write_pth

__all__ = ["let_go", "read_buffer", "read_pth", "write_pth"]
