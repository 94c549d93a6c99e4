"""What a network costs: by hand, by its paper, and by another way of counting."""

import pytest
from shapes import macs_of, paper_images
from variables import count, variable_shapes

import flaxcnn
from flaxcnn import accounting


def test_lenet5_by_hand() -> None:
    """Section II.B; connections with C3's partial ones are no `nn.Conv` and are not counted."""
    found = accounting.cost("lenet5")
    assert (found.params, found.image_size) == (60_850, 32)
    dense_and_whole = 28 * 28 * 6 * 25 + 120 * 16 * 25 + 120 * 84 + 84 * 10
    assert found.macs == dense_and_whole


def test_resnet20_by_hand() -> None:
    """Section 4.2: three stages of six 3x3 convolutions on maps of 32, 16 and 8 pixels."""
    stem, dense = 32 * 32 * 9 * 3 * 16, 64 * 10
    stages = sum(
        side * side * 9 * (before * width + 5 * width * width)
        for side, before, width in ((32, 16, 16), (16, 16, 32), (8, 32, 64))
    )
    assert accounting.cost("resnet20").macs == stem + stages + dense


@pytest.mark.parametrize(
    "name", ["googlenet_v1", "resnet18_v2", "plain18", "efficientnet_lite1", "alexnet_2012"]
)
def test_networks_without_published_weights(name: str) -> None:
    arguments = {"aux_logits": False} if name == "googlenet_v1" else {}
    model, images = flaxcnn.create_model(name, **arguments), paper_images(name)
    found = accounting.cost(name)
    assert found.image_size == images[1]
    assert found.params == count(variable_shapes(model, images)["params"])
    assert found.macs == sum(macs_of(model, images).values())


def test_networks_with_weights_cost_what_those_say() -> None:
    found = accounting.cost("efficientnet_b2")
    assert found == (9_109_994, 1_088_000_000, 288)  # of torchvision's weights, at their size
