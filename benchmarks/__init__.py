"""What the library costs, measured; each script prints its hardware and versions."""
