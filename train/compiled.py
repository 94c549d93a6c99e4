"""Programs that were compiled once are read from disk the next time: minutes on an accelerator."""

import jax

from flaxcnn import download


def keep_programs() -> None:
    """Has JAX keep them in flaxcnn's cache directory, unless it has been told where.

    Not for a CPU: its programs are for one make of it, and a home directory may be seen from many.
    """
    if jax.default_backend() == "cpu" or jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    directory = download.cache_directory() / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(directory))
