"""Networks made ready for inference: fewer passes over memory, nothing computed twice.

Everywhere batch norm is folded into the convolutions, and kernels come in the type of the layer.
For a GPU that is enough: XLA has cuDNN add the bias and the residual branch and apply the ReLU. On
a CPU, in the types that oneDNN computes, the network is traced, and each convolution and dense
layer takes in what follows it: the bias, the sum with a residual branch, the activation
(`onednn_layers`). Their kernels are brought into the library's order, once.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun
from jax.typing import DTypeLike

from flaxcnn import blocks, convolution, matrix_product
from flaxcnn.cpu import onednn, onednn_layers
from flaxcnn.cpu.geometry import Geometry
from flaxcnn.cpu.onednn_layers import Activation, Layer
from flaxcnn.folding import Offset, fold_batchnorm
from flaxcnn.network import Network


class Evaluable(Protocol):
    """A network, or what is applied as one is to evaluate."""

    def apply(self, variables: Any, x: jax.Array, *, train: bool) -> Any:
        """As `flax.linen.Module.apply`."""
        ...


class Images(Protocol):
    """An array, or a `jax.ShapeDtypeStruct`, which tells as much without one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, H, W, C]."""
        ...

    @property
    def dtype(self) -> Any:
        """As arrays have it."""
        ...


def optimize_for_inference(
    model: Network, variables: Mapping[str, Any], images: Images
) -> tuple[Evaluable, Any]:
    """The same network for evaluation, as fast as can be, and its variables in their new order.

        fast, prepared = flaxcnn.optimize_for_inference(model, variables, images)
        logits = jax.jit(partial(fast.apply, train=False))(prepared, images)

    On a CPU, in float32, and in bfloat16 where the processor has instructions for it, the network
    that comes back is for images of this shape and dtype alone, has no gradient and no `jax.vmap`,
    and wants `check_vma=False` of `jax.shard_map`; kernels are in memory a second time as long as
    `variables` are. Elsewhere, and with `FLAXCNN_PLAIN_CONVOLUTION=1`, it is what `fold_batchnorm`
    gives, with variables in the types that layers compute in. Logits are those of before but for
    rounding; of what is not a number, activations may make zeros. Not for `jax.jit`: variables are
    rewritten on the host.

    Args:
        model: of `create_model`.
        variables: {'params', 'batch_stats'}; they stay as they are.
        images: [N, H, W, C] as they will come; an array or a `jax.ShapeDtypeStruct`.

    Raises:
        TypeError: for a model that is none of flaxcnn's.
        ValueError: for images that the network cannot take.
    """
    folded, of_folded = fold_batchnorm(model, variables)
    # As JAX has them: without its 64-bit mode, float32 for float64.
    shape = jax.ShapeDtypeStruct(images.shape, jax.dtypes.canonicalize_dtype(images.dtype))
    prepared = _in_compute_types(folded, of_folded, shape)
    return _in_layers(folded, prepared, shape) if _by_onednn(folded.dtype) else (folded, prepared)


def _by_onednn(dtype: DTypeLike) -> bool:
    on_cpu = jax.default_backend() == "cpu" and not convolution.PLAIN
    return on_cpu and onednn.computes(dtype)


def _in_compute_types(model: Network, variables: Any, images: jax.ShapeDtypeStruct) -> Any:
    """The variables in the types that layers convert them to, so that no step has to."""
    params = flatten_dict(variables["params"])
    types: dict[tuple[str, ...], DTypeLike] = {}

    def watch(
        call: Any, arguments: Any, options: Any, context: nn.module.InterceptorContext
    ) -> Any:
        module = context.module
        converts = isinstance(module, (nn.Conv, nn.Dense, Offset))
        wide = (*module.path, "scale") in params  # it multiplies in float32
        if context.method_name == "__call__" and converts and not wide:
            types[module.path] = module.dtype or jnp.float32
        return call(*arguments, **options)

    with nn.intercept_methods(watch):
        jax.eval_shape(lambda v, x: model.apply(v, x, train=False), variables, images)
    converted = {
        path: jnp.asarray(value, types.get(path[:-1], value.dtype))
        for path, value in params.items()
    }
    return {**variables, "params": unflatten_dict(converted)}


class _ForOneShape:
    """A network in layers of oneDNN; `apply` as a module has it."""

    def __init__(self, program: ClosedJaxpr, images: jax.ShapeDtypeStruct) -> None:
        self._program = program
        self._images = images

    def apply(self, variables: Any, x: jax.Array, *, train: bool) -> jax.Array:
        """The logits; with the variables that came with this network, in their order."""
        if train:
            raise ValueError("a network optimised for inference evaluates only")
        x = jnp.asarray(x)
        if (x.shape, x.dtype) != (self._images.shape, self._images.dtype):
            raise ValueError(
                f"optimised for images {self._images.shape} of {self._images.dtype}, not "
                f"{x.shape} of {x.dtype}; call optimize_for_inference for those"
            )
        result: jax.Array = jaxpr_as_fun(self._program)(*variables, x)[0]
        return result


# --------------------------------------------------------------------- the network, layer by layer
def _in_layers(
    model: Network, variables: Any, images: jax.ShapeDtypeStruct
) -> tuple[Evaluable, Any]:
    """The program with layers that have taken in what follows, and the variables for it."""
    with nn.intercept_methods(_as_layer):
        traced = jax.make_jaxpr(lambda v, x: model.apply(v, x, train=False))(variables, images)
    equations, (*inputs, image) = traced.jaxpr.eqns, traced.jaxpr.invars
    given = dict(zip(inputs, jax.tree.leaves(variables), strict=True))
    made: dict[Var, jax.Array] = {}

    def known(array: jax.Array | np.ndarray) -> Var:
        value = Var(jax.typeof(array))
        made[value] = jnp.asarray(array)
        return value

    fusions = _fusions(traced)
    skipped = {i for fusion in fusions for i in fusion.members}
    fused = {fusion.members[-1]: fusion for fusion in fusions}
    program = []
    for i, equation in enumerate(equations):
        if i in fused:
            program.append(fused[i].equation(equations, given, known))
        elif i not in skipped:
            program.append(equation)
    used = {v for e in program for v in e.invars if not isinstance(v, Literal)}
    made |= {v: array for v, array in given.items() if v in used}
    changed = traced.jaxpr.replace(eqns=program, invars=[*made, image])
    return _ForOneShape(ClosedJaxpr(changed, traced.consts), images), list(made.values())


def _as_layer(
    call: Any, arguments: Any, options: Any, context: nn.module.InterceptorContext
) -> Any:
    """A convolution or dense layer as `onednn_layers.primitive`, its bias added behind it.

    What suits XLA better stays: 1x1 maps, and larger kernels where the output has four places or
    fewer (`convolution`), so that most of what they meet is padding.
    """
    module = context.module
    if context.method_name != "__call__" or type(module) not in (nn.Conv, nn.Dense):
        return call(*arguments, **options)
    (x,) = arguments
    kernel: jax.Array = module.get_variable("params", "kernel")
    dtype = jnp.dtype(module.dtype or x.dtype)
    layer = _convolution(module, x, kernel) if kernel.ndim == 4 else _dense(module, x, kernel)
    if layer is None or kernel.dtype != dtype or not onednn.computes(dtype):
        return call(*arguments, **options)
    layer = layer._replace(dtype=dtype)
    y = onednn_layers.primitive.bind(x.astype(dtype), kernel, layer=layer)
    return y + module.get_variable("params", "bias").astype(y.dtype) if module.use_bias else y


def _dense(module: Any, x: jax.Array, kernel: jax.Array) -> Layer | None:
    """As `blocks.dense` makes it; None for others."""
    if module.dot_general is not matrix_product.dot_general or x.ndim != 2:
        return None
    return Layer(x.shape, kernel.shape, (x.shape[0], kernel.shape[1]), None)


def _convolution(module: Any, x: jax.Array, kernel: jax.Array) -> Layer | None:
    """As `blocks.conv` makes it; None for others, and for what suits XLA better."""
    ours = module.conv_general_dilated is convolution.conv_general_dilated
    usual = module.kernel_dilation == module.input_dilation == 1 and module.mask is None
    if not ours or not usual or isinstance(module.padding, str):
        return None
    (strides, (low, high)) = module.strides, zip(*module.padding, strict=True)
    padded = [x.shape[i + 1] + low[i] + high[i] - kernel.shape[i] for i in range(2)]
    places = [size // stride + 1 for size, stride in zip(padded, strides, strict=True)]
    if math.prod(places) <= (1 if kernel.shape[:2] == (1, 1) else 4):
        return None
    geometry = Geometry(strides, (1, 1), low, high, module.feature_group_count)
    return Layer(x.shape, kernel.shape, (x.shape[0], *places, kernel.shape[3]), geometry)


# ------------------------------------------------------------------- what a layer can take in
class _Fusion(NamedTuple):
    """A layer with what it has taken in."""

    layer: Layer
    members: Sequence[int]  # its equations: the product, and what follows
    kernel: Var
    biases: Sequence[Var]  # the layer's bias is their sum
    residual: Var | None

    def equation(
        self,
        equations: Sequence[JaxprEqn],
        given: Mapping[Var, Any],
        known: Callable[[jax.Array | np.ndarray], Var],
    ) -> JaxprEqn:
        """In place of its last member, when all that it is made of has been computed.

        `given` are the variables; `known` takes more in.
        """
        first, last = equations[self.members[0]], equations[self.members[-1]]
        packed = known(onednn_layers.pack(self.layer, np.asarray(given[self.kernel])))
        biases = [np.asarray(given[v], np.float32) for v in self.biases]
        bias = [known(np.sum(biases, axis=0))] if biases else []
        residual = [self.residual] if self.residual is not None else []
        return first.replace(
            invars=[first.invars[0], packed, *bias, *residual],
            outvars=last.outvars,
            params={"layer": self.layer},
        )


def _fusions(traced: ClosedJaxpr) -> list[_Fusion]:
    """One for each layer; no equation is in two of them."""
    graph = _Graph(traced)
    found: list[_Fusion] = []
    taken: set[int] = set()
    for i, equation in enumerate(traced.jaxpr.eqns):
        if equation.primitive is onednn_layers.primitive:
            found.append(_grown(graph, i, taken))
            taken.update(found[-1].members)
    return found


def _grown(graph: "_Graph", first: int, taken: set[int]) -> _Fusion:
    """The layer of equation `first` with all that it can take in, in the order it computes them."""
    equation = graph.equations[first]
    members, y = [first], equation.outvars[0]
    biases: list[Var] = []
    residual = None
    activation = Activation.NONE
    while not activation:
        following = graph.only_use(y)
        if following is None or following in taken:
            break
        after = graph.equations[following]
        if _type(after.outvars[0]).shape != _type(y).shape:  # a sum that spreads it
            break
        other = _other_summand(after, y)
        if other is not None:
            bias = graph.per_channel(other, _type(y).shape[-1])
            if bias is not None:
                biases.append(bias)
            elif bias is None and residual is None and graph.is_computed(other, y):
                residual = other
            else:
                break
        else:
            activation = _activation(after)
            if not activation:
                break
        members.append(following)
        y = after.outvars[0]
    layer = equation.params["layer"]._replace(
        bias=bool(biases), residual=residual is not None, activation=activation
    )
    kernel = equation.invars[1]
    assert isinstance(kernel, Var)
    return _Fusion(layer, members, kernel, biases, residual)


class _Graph:
    """Who makes and who uses a value."""

    def __init__(self, traced: ClosedJaxpr) -> None:
        self.equations: Sequence[JaxprEqn] = traced.jaxpr.eqns
        self._inputs = set(traced.jaxpr.invars)
        self._makers = {v: i for i, e in enumerate(self.equations) for v in e.outvars}
        self._uses: dict[Var, list[int | None]] = defaultdict(list)
        for i, e in enumerate(self.equations):
            for v in e.invars:
                if not isinstance(v, Literal):
                    self._uses[v].append(i)
        for v in traced.jaxpr.outvars:
            if not isinstance(v, Literal):
                self._uses[v].append(None)

    def only_use(self, value: Var) -> int | None:
        """The equation that alone uses it; None if there are several, or it is the result."""
        uses = self._uses[value]
        return uses[0] if len(uses) == 1 else None

    def per_channel(self, value: Var, channels: int) -> Var | None:
        """The variable [channels] that this is, spread over all but its last axis, or None."""
        while value not in self._inputs:
            maker = self.equations[self._makers[value]] if value in self._makers else None
            if maker is None or maker.primitive.name not in ("broadcast_in_dim", "reshape"):
                return None
            places = maker.params.get("broadcast_dimensions")
            if places is not None and places[-1:] != (_type(value).ndim - 1,):
                return None
            (spread,) = maker.invars
            if isinstance(spread, Literal) or _type(spread).shape[-1:] != (channels,):
                return None
            value = spread
        return value if _type(value).shape == (channels,) else None

    def is_computed(self, value: Var, like: Var) -> bool:
        """Whether it is an array of that shape which the network computes."""
        return value in self._makers and _type(value).shape == _type(like).shape


def _other_summand(equation: JaxprEqn, summand: Var) -> Var | None:
    """If it adds something to that value: what."""
    if equation.primitive.name not in ("add", "add_any"):
        return None
    others = [v for v in equation.invars if v is not summand]
    return others[0] if len(others) == 1 and not isinstance(others[0], Literal) else None


def _activation(equation: JaxprEqn) -> Activation:
    """Which one it computes, told by what JAX writes for each."""
    if len(equation.invars) != 1:
        return Activation.NONE
    value = _type(equation.invars[0])
    for function, activation in _ACTIVATIONS.items():
        if _written(function, value.shape, value.dtype) == _text(equation):
            return activation
    return Activation.NONE


_ACTIVATIONS = {
    blocks.relu: Activation.RELU,
    jax.nn.relu: Activation.RELU,
    jax.nn.silu: Activation.SILU,
    jax.nn.relu6: Activation.RELU6,
}


@cache
def _written(function: Any, shape: tuple[int, ...], dtype: DTypeLike) -> str:
    """JAX's equation for it, as text; "" where it takes several."""
    equations = jax.make_jaxpr(function)(jax.ShapeDtypeStruct(shape, dtype)).jaxpr.eqns
    return _text(equations[0]) if len(equations) == 1 else ""


def _type(value: Var | Literal) -> Any:
    """Its shape and dtype."""
    return value.aval


def _text(equation: JaxprEqn) -> str:
    return f"{equation.primitive} {equation.params}"
