"""Groups of a convolution taken several for one, for what computes few wide ones faster."""

import jax
import jax.numpy as jnp


def merge_groups(kernel: jax.Array, groups: int, merged: int) -> jax.Array:
    """[h, w, c, O] of `groups` groups -> [h, w, merged * c, O] of groups / merged groups.

    Between those that were apart the kernel is 0.
    """
    if merged == 1:
        return kernel
    height, width, channels, out_channels = kernel.shape
    # Five axes and a select: jaxlib 0.10.2 crashes on products summed over seven
    # (https://github.com/jax-ml/jax/issues/39257), which a multiplication's gradient would be.
    within = merged * out_channels // groups
    own = jnp.arange(merged)[:, None] == jnp.arange(within) // (out_channels // groups)
    kernel = kernel.reshape(height * width, 1, channels, groups // merged, within)
    kernel = jnp.where(own[:, None, None, :], kernel, 0)
    return kernel.reshape(height, width, merged * channels, out_channels)
