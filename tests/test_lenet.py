"""LeNet of 1989 and LeNet-5: units, connections and parameters as printed; each layer by hand."""

import math
from typing import Any

import by_hand
import jax.numpy as jnp
import numpy as np
from shapes import traced
from variables import count, random_variables

import flaxcnn
from flaxcnn import lenet


def connections(layer: Any, shape: tuple[int, ...]) -> int:
    """Each weight of a layer once at each place of its maps, and a bias for each unit."""
    return int(layer["kernel"].size) * math.prod(shape[:-1]) + math.prod(shape)


def squash(x: np.ndarray) -> np.ndarray:
    """1998: appendix A."""
    return 1.7159 * np.tanh(2 / 3 * x)


# ----------------------------------------------------------------------------------------- 1989
def test_lecun1989_has_the_papers_counts() -> None:
    """Section 3.3, layer by layer, and its sum: 1256 units, 64,660 connections, 9760 parameters."""
    model = flaxcnn.create_model("lecun1989")
    params = random_variables(model, (1, 16, 16, 1))["params"]
    shapes = traced(model, (1, 16, 16, 1)).modules
    layers = ("H1", "H2", "H3", "output")
    units = {name: math.prod(shapes[name]) for name in layers}
    assert units == {"H1": 768, "H2": 192, "H3": 30, "output": 10}
    linked = {name: connections(params[name], shapes[name]) for name in layers}
    assert linked == {"H1": 19_968, "H2": 38_592, "H3": 5_790, "output": 310}
    free = {name: count(params[name]) for name in layers}
    assert free == {"H1": 1068, "H2": 2592, "H3": 5_790, "output": 310}
    # The units include the 256 of the input.
    assert 256 + sum(units.values()) == 1256
    assert sum(linked.values()) == 64_660
    assert count(params) == sum(free.values()) == 9760


def test_lecun1989_maps_of_h2_see_eight_of_h1() -> None:
    """Section 3.3; that every map of H1 is seen by as many is our choice of the scheme."""
    assert [len(set(seen)) for seen in lenet.H2_INPUTS] == [8] * 12
    assert [sum(h1 in seen for seen in lenet.H2_INPUTS) for h1 in range(12)] == [8] * 12


def feature_extractor(x: np.ndarray, layer: Any, seen: Any) -> np.ndarray:
    """Section 3.3, unit by unit: [H, W, C] -> [H / 2, W / 2, maps].

    5x5 windows two pixels apart, -1 beyond the edges, a bias of its own for each unit.
    """
    x = np.pad(x, ((2, 2), (2, 2), (0, 0)), constant_values=-1)
    y = layer["bias"].astype("float64")
    connection = 0
    for output, inputs in enumerate(seen):
        for channel in inputs:
            weights = layer["kernel"][:, :, connection]
            connection += 1
            for i, j in np.ndindex(*y.shape[:2]):
                window = x[2 * i : 2 * i + 5, 2 * j : 2 * j + 5, channel]
                y[i, j, output] += np.sum(window * weights)
    return squash(y)


def test_lecun1989_layers_do_what_the_paper_says() -> None:
    model = flaxcnn.create_model("lecun1989")
    variables = random_variables(model, (1, 16, 16, 1))
    images = np.random.default_rng(0).uniform(-1, 1, (1, 16, 16, 1)).astype("float32")
    maps = flaxcnn.extract_features(model, variables, images, ["H1", "H2"])
    params = variables["params"]
    h1 = feature_extractor(images[0], params["H1"], [(0,)] * 12)
    h2 = feature_extractor(h1, params["H2"], lenet.H2_INPUTS)
    # Float32 sums of 25 and 200 products.
    np.testing.assert_allclose(maps["H1"][0], h1, atol=1e-5)
    np.testing.assert_allclose(maps["H2"][0], h2, atol=1e-5)
    h3 = squash(by_hand.dense(h2.ravel(), params["H3"]))
    logits = model.apply(variables, images, train=False)
    np.testing.assert_allclose(logits[0], by_hand.dense(h3, params["output"]), atol=1e-5)


def test_lecun1989_averages_larger_images() -> None:
    model = flaxcnn.create_model("lecun1989")
    variables = random_variables(model, (1, 16, 16, 1))
    images = np.random.default_rng(0).normal(size=(2, 48, 32, 1)).astype("float32")
    averaged = images.reshape(2, 16, 3, 16, 2, 1).mean((2, 4))
    np.testing.assert_allclose(
        model.apply(variables, images, train=False),
        model.apply(variables, averaged, train=False),
        atol=1e-5,
    )


# -------------------------------------------------------------------------------------- LeNet-5
def test_lenet5_has_the_papers_counts_and_maps() -> None:
    """Section II.B: parameters and connections of each layer, and the size of its maps."""
    model = flaxcnn.create_model("lenet5")
    params = random_variables(model, (1, 32, 32, 1))["params"]
    counts = {"C1": 156, "S2": 12, "C3": 1516, "S4": 32, "C5": 48_120, "F6": 10_164}
    assert {name: count(params[name]) for name in counts} == counts
    assert sum(counts.values()) == 60_000  # "trainable free parameters"
    shapes = traced(model, (1, 32, 32, 1)).modules
    assert shapes == {
        "": (10,),
        "C1": (28, 28, 6),
        "S2": (14, 14, 6),
        "C3": (10, 10, 16),
        "S4": (5, 5, 16),
        "C5": (1, 1, 120),
        "F6": (84,),
        "output": (10,),
    }
    linked = {name: connections(params[name], shapes[name]) for name in ("C1", "C3", "C5", "F6")}
    assert linked == {"C1": 122_304, "C3": 151_600, "C5": 48_120, "F6": 10_164}
    # A unit of S2 or S4 has four inputs and a bias.
    pooled = {name: 5 * math.prod(shapes[name]) for name in ("S2", "S4")}
    assert pooled == {"S2": 5_880, "S4": 2_000}
    # The sum that the paper prints has the distances of ten outputs to 84 inputs, without biases.
    assert sum(linked.values()) + sum(pooled.values()) + 10 * 84 == 340_908


def test_lenet5_connects_c3_as_table_i() -> None:
    rows = [  # of S2, as the paper prints them: the maps of C3 that see each
        [0, 4, 5, 6, 9, 10, 11, 12, 14, 15],
        [0, 1, 5, 6, 7, 10, 11, 12, 13, 15],
        [0, 1, 2, 6, 7, 8, 11, 13, 14, 15],
        [1, 2, 3, 6, 7, 8, 9, 12, 14, 15],
        [2, 3, 4, 7, 8, 9, 10, 12, 13, 15],
        [3, 4, 5, 8, 9, 10, 11, 13, 14, 15],
    ]
    ours = [[c3 for c3, seen in enumerate(lenet.C3_INPUTS) if s2 in seen] for s2 in range(6)]
    assert ours == rows


def test_lenet5_layers_do_what_the_paper_says() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 6, 6, 6)).astype("float32")
    params = {"kernel": rng.normal(size=(5, 5, 60)), "bias": rng.normal(size=16)}
    y = lenet.PartialConv(jnp.float32).apply({"params": params}, x)
    connection = 0
    for c3, seen in enumerate(lenet.C3_INPUTS):
        expected = params["bias"][c3]
        for s2 in seen:
            expected += np.sum(x[0, :5, :5, s2] * params["kernel"][:, :, connection])
            connection += 1
        # Float32 sums of up to 150 products of both signs against float64's.
        np.testing.assert_allclose(y[0, 0, 0, c3], expected, rtol=1e-4)

    params = {"scale": np.arange(1.0, 7), "bias": np.arange(6.0)}
    y = lenet.Subsampling(jnp.float32).apply({"params": params}, x)
    sums = x[0, 2:4, 4:6].sum((0, 1))
    np.testing.assert_allclose(y[0, 1, 2], sums * params["scale"] + params["bias"], rtol=1e-5)
    # The paper's constants, of five digits, make f(1) = 1 to as many.
    np.testing.assert_allclose(lenet.squash(jnp.array([-1.0, 1.0])), [-1, 1], atol=1e-4)


def test_lenet5_by_hand() -> None:
    """Each layer behind the other, and its sum squashed up to F6 (section II.B)."""
    model = flaxcnn.create_model("lenet5")
    variables = random_variables(model, (1, 32, 32, 1))
    params = variables["params"]
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 1)).astype("float32")

    def subsampled(x: np.ndarray, layer: Any) -> np.ndarray:
        quarters = [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
        return squash(sum(quarters) * layer["scale"] + layer["bias"])

    x = squash(by_hand.convolution(images, params["C1"]))
    x = subsampled(x, params["S2"])
    partial, connection = np.zeros((5, 5, 6, 16)), 0
    for c3, seen in enumerate(lenet.C3_INPUTS):
        for s2 in seen:
            partial[:, :, s2, c3] = params["C3"]["kernel"][:, :, connection]
            connection += 1
    x = squash(by_hand.convolution(x, {"kernel": partial, "bias": params["C3"]["bias"]}))
    x = subsampled(x, params["S4"])
    x = squash(by_hand.convolution(x, params["C5"]))[:, 0, 0]
    x = squash(by_hand.dense(x, params["F6"]))
    logits = model.apply(variables, images, train=False)
    # Float32 sums of up to 400 products: 2e-6 was seen.
    np.testing.assert_allclose(logits, by_hand.dense(x, params["output"]), atol=1e-5)
