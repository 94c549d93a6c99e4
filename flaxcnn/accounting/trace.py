"""The layers of a linen module in the order in which they are computed, read off its trace.

The module is traced once, for the shapes of its images, and nothing is run or allocated. JAX's
record of the trace tells all operations and what they are computed from; `marks` tell whose they
are.

A layer is what costs something, or brings together what several others made: a convolution, a
product with weights, a norm, a pool, a sum of two layers. Elementwise functions are part of the
layer that they follow.

Limits: `init` is what is traced, so what a module does only afterwards is not seen. `nn.remat` is
taken to keep what is kept without it. Calls of one class wrapped in `nn.jit` share a record, and
bear the name of the first; the variables of the others come last, as layers without output. What
rearranges places in a way that `field_rules` does not know is taken to see the whole image.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from jax.extend.core import Literal

from flaxcnn import blocks
from flaxcnn.accounting import field_rules, marks
from flaxcnn.accounting.field_rules import Seen
from flaxcnn.accounting.known_weights import KnownWeights
from flaxcnn.accounting.layers import IMAGES, Kept, Layers, TracedLayer, Window, size_bytes
from flaxcnn.errors import InputError
from flaxcnn.operators.primitives import written_out

_NORMS: Mapping[type, str] = {
    blocks.BatchNorm: "batch norm",
    nn.BatchNorm: "batch norm",
    nn.LayerNorm: "layer norm",
    nn.GroupNorm: "group norm",
    nn.InstanceNorm: "instance norm",
    nn.RMSNorm: "RMS norm",
}
# Functions that are one layer each, and carry their name into the trace as `jax.jit` ones.
_FUNCTIONS: Mapping[str, str] = {
    "local_response_norm": "response norm",
    "adaptive_averages": "adaptive avg pool",
}
_WINDOWS: Mapping[str, str] = {
    "reduce_window_max": "max pool",
    "reduce_window_min": "min pool",
    "reduce_window_sum": "avg pool",
    "reduce_window": "pool",
}
_REDUCTIONS: Mapping[str, str] = {
    "reduce_sum": "global avg pool",
    "reduce_max": "global max pool",
    "reduce_min": "global min pool",
}
_JOINTS: Mapping[str, str] = {
    "add": "add",
    "add_any": "add",
    "sub": "subtract",
    "mul": "multiply",
    "div": "divide",
    "max": "maximum",
    "min": "minimum",
}
# Their gradients need nothing of what went in.
_LINEAR = {"add", "add_any", "sub", "reduce_window_sum", "reduce_sum"}
_VIEWS = {"reshape", "squeeze", "transpose", "broadcast_in_dim", "slice", "copy", "name"}


class Trace(NamedTuple):
    """Of one module and one shape of images."""

    layers: list[TracedLayer]
    used: set[int]  # those that what the module returns depends on
    outputs: set[int]  # those that it returns the outputs of


def trace(module: nn.Module, images: jax.ShapeDtypeStruct, arguments: Mapping[str, Any]) -> Trace:
    """`module(images, **arguments)` layer by layer, the module's variables as `init` makes them.

    Raises:
        InputError: a ValueError, for a loop whose number of steps is not known before it runs, or
            a choice between functions.
    """
    found = marks.Marks()

    def run(x: jax.Array) -> Any:
        return module.init_with_output(jax.random.key(0), x, **arguments)

    with nn.intercept_methods(found.intercept):
        closed, (output, variables) = jax.make_jaxpr(run, return_shape=True)(images)
    walk = _Walk(found.modules, Layers(variables))
    (invar,) = closed.jaxpr.invars
    walk.values[invar] = _Value(field_rules.of_images(images.shape), IMAGES, walk.new_array())
    walk.run(closed.jaxpr, closed.consts)
    returned = closed.jaxpr.outvars[: len(jax.tree.leaves(output))]
    outputs = {value.source for v in returned if (value := walk.value(v)) is not None}
    layers, used = walk.layers.finished(outputs, field_rules.of_images(images.shape))
    return Trace(layers, used, outputs)


class _Value(NamedTuple):
    """What is known of an array that depends on the images."""

    seen: Seen
    source: int  # the layer that it is the output of, or an elementwise function of
    array: int  # the same for what shares its memory


class _Call(NamedTuple):
    """A module's call that has begun."""

    number: int
    module: nn.Module
    given: _Value  # its first argument
    given_bytes: int
    silent_before: bool

    @property
    def path(self) -> str:
        return "/".join(self.module.path)


class _Walk:
    """Follows the images through the operations of a trace."""

    def __init__(self, modules: Sequence[nn.Module], layers: Layers) -> None:
        self.values: dict[Any, _Value] = {}  # by the variables of the trace
        self.layers = layers
        self._modules = modules
        self._weights = KnownWeights()
        self._calls: list[_Call] = []
        self._platforms: set[Any] = set()  # what lax.platform_dependent chooses by
        self._silent = False  # within a layer
        self._repeats = 1  # of the loop's body that is walked through
        self._arrays = 0
        self._outputs: dict[int, Kept] = {}  # layer -> its output

    def new_array(self) -> int:
        """The number of an array that is none of those before."""
        self._arrays += 1
        return self._arrays

    def value(self, atom: Any) -> _Value | None:
        """What is known of a variable; None where it does not depend on the images."""
        return None if isinstance(atom, Literal) else self.values.get(atom)

    # ------------------------------------------------------------------------------- operations
    def run(self, jaxpr: Any, consts: Sequence[Any]) -> None:
        """Every operation in turn."""
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            self._weights.note_constant(var, const)
        for eqn in jaxpr.eqns:
            self._step(eqn)

    def _step(self, eqn: Any) -> None:
        name = eqn.primitive.name
        if name == "platform_index":
            self._platforms.update(eqn.outvars)
        if not any(self.value(v) for v in eqn.invars):
            self._weights.note(eqn)
        elif name == "name":
            self._mark(eqn)
        elif name == "cond" and eqn.invars[0] in self._platforms:
            # Of lax.platform_dependent the last branch is for every platform.
            self._inside(eqn, eqn.params["branches"][-1], eqn.invars[1:])
        elif name == "cond":
            raise InputError(
                "which branch of lax.cond or lax.switch runs is not known before it runs, nor what "
                "it costs; use a Python if, or jnp.where"
            )
        elif name == "scan":
            self._scan(eqn)
        elif name == "while":
            raise InputError(
                "a while loop's number of steps is not known before it runs, nor what it costs; "
                "use a Python loop or lax.scan"
            )
        elif (inner := _called(eqn) or written_out(eqn)) is not None:
            self._inside(eqn, inner, eqn.invars)
        else:
            self._operation(eqn)

    def _inside(self, eqn: Any, inner: Any, arguments: Sequence[Any]) -> None:
        """The operations of a function that is called, which may be one layer as a whole."""
        kind = None if self._silent else _FUNCTIONS.get(str(eqn.params.get("name")))
        before, self._silent = self._silent, self._silent or kind is not None
        jaxpr, consts = (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ())
        for var, argument in zip(jaxpr.invars, arguments, strict=True):
            self._weights.rename(var, argument)
            self._pass_on(var, argument)
        self.run(jaxpr, consts)
        for var, result in zip(eqn.outvars, jaxpr.outvars, strict=True):
            self._pass_on(var, result)
        self._silent = before
        if kind is not None:
            given = [v for v in arguments if self.value(v) is not None]
            self._layer(eqn, kind, self.values[eqn.outvars[0]].seen, given, kept=given)

    def _pass_on(self, var: Any, argument: Any) -> None:
        """`argument` is called `var` from here; what `var` was before is forgotten."""
        self.values.pop(var, None)
        if (value := self.value(argument)) is not None:
            self.values[var] = value

    def _scan(self, eqn: Any) -> None:
        """A loop of known length: its body counts so often, and each step may mix all it is given.

        What is carried from step to step is one layer's output as far as layers are concerned;
        all of it is taken to depend on the images.
        """
        given = [value for v in eqn.invars if (value := self.value(v)) is not None]
        seen = field_rules.whole(field_rules.united([value.seen for value in given]))
        inner, before = eqn.params["jaxpr"], self._repeats
        self._repeats *= eqn.params["length"]
        carried = _carried(eqn, inner.jaxpr)
        for i, (var, argument) in enumerate(zip(inner.jaxpr.invars, eqn.invars, strict=True)):
            self._weights.rename(var, argument)
            self._pass_on(var, argument)
            if var in self.values:
                self.values[var] = self.values[var]._replace(seen=seen)
            elif i in carried:  # from the second step on it depends on the images
                self.values[var] = _Value(seen, given[0].source, self.new_array())
        self.run(inner.jaxpr, inner.consts)
        self._repeats = before
        for var, result in zip(eqn.outvars, inner.jaxpr.outvars, strict=True):
            self._pass_on(var, result)
            if var in self.values:
                value = self.values[var]
                self.values[var] = value._replace(seen=field_rules.whole(value.seen))

    def _operation(self, eqn: Any) -> None:
        name = eqn.primitive.name
        values = [self.value(v) for v in eqn.invars]
        given = [v for v in eqn.invars if self.value(v) is not None]
        matrix = next((m for v in eqn.invars if (m := self._weights.matrix(v)) is not None), None)
        seen = field_rules.after(eqn, [value and value.seen for value in values], matrix)
        kept = () if name in _LINEAR else given
        if self._silent:
            self._same_layer(eqn, seen, given)
        elif name == "conv_general_dilated":
            self._convolution(eqn, seen, given)
        elif name == "dot_general":
            self._product(eqn, seen, given)
        elif name in _WINDOWS:
            window = _pool_window(eqn, self.values[given[0]].seen)
            self._layer(eqn, _WINDOWS[name], seen, given, kept=kept, window=window)
        elif name in _REDUCTIONS and _is_over_the_map(eqn, self.values[given[0]].seen):
            self._layer(eqn, _REDUCTIONS[name], seen, given, kept=kept)
        elif len({self.values[v].source for v in given}) == 1:
            self._same_layer(eqn, seen, given)
        elif name == "concatenate":
            self._layer(eqn, "concatenate", seen, given)
        else:
            kind = _JOINTS.get(name, name.replace("_", " "))
            self._layer(eqn, kind, seen, given, kept=kept, in_place=name in _JOINTS)

    def _same_layer(self, eqn: Any, seen: Seen, given: Sequence[Any]) -> None:
        """An elementwise function, or another view, of what one layer made."""
        value = self.values[given[0]]
        if eqn.primitive.name == "mul" and len(given) > 1 and not self._silent:
            self._keep_output(value.source)
        array = value.array if eqn.primitive.name in _VIEWS else self.new_array()
        for var in eqn.outvars:
            self.values[var] = _Value(seen, value.source, array)

    def _keep_output(self, number: int) -> None:
        """A smooth function's gradient needs what it was given; ReLU's can do with what it gave.

        Behind a norm it is computed again, from what the norm itself keeps.
        """
        if number != IMAGES and self.layers.kind(number) not in _NORMS.values():
            self.layers.keep(number, self._outputs[number])

    # ----------------------------------------------------------------------------------- layers
    def _convolution(self, eqn: Any, seen: Seen, given: Sequence[Any]) -> None:
        params, (lhs, rhs) = eqn.params, eqn.invars
        numbers, groups = params["dimension_numbers"], params["feature_group_count"]
        transposed = any(d != 1 for d in params["lhs_dilation"])
        # Each weight is used once for each position of the output; where zeros were put between
        # the input's values, once for each of those.
        of, spec = (lhs, numbers.lhs_spec) if transposed else (eqn.outvars[0], numbers.out_spec)
        positions = of.aval.size // of.aval.shape[spec[1]]
        kind = "transposed conv" if transposed else "conv"
        if groups > 1:
            channels = lhs.aval.shape[numbers.lhs_spec[1]]
            kind = "depthwise conv" if groups == channels else "grouped conv"
        window = Window(
            tuple(rhs.aval.shape[axis] for axis in numbers.rhs_spec[2:]),
            tuple(params["window_strides"]),
            tuple(params["rhs_dilation"]),
        )
        macs = positions * self._weights.nonzeros(rhs)
        self._layer(eqn, kind, seen, given, kept=given, macs=macs, window=window)

    def _is_weights(self, eqn: Any) -> bool:
        """Whether a product is with parameters: drawn at random, or as large as the module's own.

        The second tells parameters that begin as zeros from constants.
        """
        (other,) = (v for v in eqn.invars if self.value(v) is None)
        path = self._calls[-1].path if self._calls else ""
        sizes = self.layers.own_sizes(path).values()
        return self._weights.is_random(other) or other.aval.size in sizes

    def _product(self, eqn: Any, seen: Seen, given: Sequence[Any]) -> None:
        if len(given) == 1 and not self._is_weights(eqn):  # averages over bins, resizing
            self._layer(eqn, "resample", seen, given)
            return
        (contracting, _), _ = eqn.params["dimension_numbers"]
        out = eqn.outvars[0].aval
        macs = out.size * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracting)
        if self._calls and isinstance(self._calls[-1].module, nn.Dense):
            # All its weights, in whatever way `blocks.dense` multiplies them.
            weights = self.layers.own_sizes(self._calls[-1].path)["kernel"]
            macs = max(macs, out.size // out.shape[-1] * weights)
        kind = "product" if len(given) > 1 else "dense"
        self._layer(eqn, kind, seen, given, kept=given, macs=macs)

    def _layer(
        self,
        eqn: Any,
        kind: str,
        seen: Seen,
        given: Sequence[Any],
        *,
        kept: Sequence[Any] = (),
        macs: int = 0,
        window: Window | None = None,
        in_place: bool = False,
    ) -> None:
        """Takes a layer down; `given` and `kept` are variables of the trace."""
        number = self.layers.add(
            self._calls[-1].path if self._calls else "",
            kind,
            seen,
            eqn.outvars[0].aval,
            inputs={self.values[v].source for v in given},
            macs=macs,
            repeats=self._repeats,
            kept=[Kept(self.values[v].array, size_bytes(v.aval)) for v in kept],
            window=window,
            in_place=in_place,
        )
        for var in eqn.outvars:
            self._made_by(number, var, seen)

    def _made_by(self, number: int, var: Any, seen: Seen) -> None:
        value = _Value(seen, number, self.new_array())
        self._outputs[number] = Kept(value.array, size_bytes(var.aval))
        self.values[var] = value

    # ------------------------------------------------------------------------- calls of modules
    def _mark(self, eqn: Any) -> None:
        (var,), (out,) = eqn.invars, eqn.outvars
        self.values[out] = self.values[var]
        what, which = marks.read(str(eqn.params["name"]))
        if what == marks.STAGE:
            self.layers.end_stage(which)
        elif what == marks.ENTER and all(call.number != int(which) for call in self._calls):
            module = self._modules[int(which)]
            self._calls.append(
                _Call(int(which), module, self.values[var], size_bytes(out.aval), self._silent)
            )  # fmt: skip
            self._silent = self._silent or _norm(module) is not None
        elif what == marks.LEAVE:
            self._leave(int(which), out)

    def _leave(self, number: int, out: Any) -> None:
        if all(call.number != number for call in self._calls):
            return  # it was given no arrays, or this is the second array that it returns
        while self._calls[-1].number != number:  # calls that returned no arrays
            self._calls.pop()
        call = self._calls[-1]
        self._silent = call.silent_before
        if not self._silent:
            self._whole_module(call, out)
        self._calls.pop()

    def _whole_module(self, call: _Call, out: Any) -> None:
        """What a module is as a whole, where it is one layer."""
        value, module = self.values[out], call.module
        kind = _norm(module)
        if kind is None and self.layers.unclaimed(call.path):
            kind = type(module).__name__  # an elementwise function with parameters
        if kind is not None:
            number = self.layers.add(
                call.path,
                kind,
                value.seen,
                out.aval,
                inputs={call.given.source, value.source},
                kept=[Kept(call.given.array, call.given_bytes)],
                in_place=True,
            )
            self._made_by(number, out, value.seen)
        elif isinstance(module, nn.Dropout) and module.rate > 0:
            # Its gradient needs to know which values were left out: a byte for each.
            sides = enumerate(out.aval.shape)
            mask = math.prod(n for axis, n in sides if axis not in module.broadcast_dims)
            self.layers.keep(value.source, Kept(self.new_array(), mask))


def _norm(module: nn.Module) -> str | None:
    """What kind of norm a module is, if one."""
    return next((kind for norm, kind in _NORMS.items() if isinstance(module, norm)), None)


# ---------------------------------------------------------------------------------- of operations
def _called(eqn: Any) -> Any:
    """The function that an operation calls: `jit`, `custom_jvp_call`, `checkpoint` and so on."""
    if eqn.primitive.name.startswith(("reduce", "scatter")):  # theirs combine two elements
        return None
    for value in eqn.params.values():
        jaxpr = getattr(value, "jaxpr", value)
        if hasattr(jaxpr, "eqns") and len(jaxpr.invars) == len(eqn.invars):
            return value
    return None


def _carried(eqn: Any, body: Any) -> range:
    """Which inputs of a scan are carried from step to step: those between constants and slices.

    Told by shapes, as the parameters that say so differ from JAX to JAX: what comes in slices, and
    what is stacked, has an axis more outside than inside.
    """
    sliced = sum(
        outside.aval.ndim > inside.aval.ndim
        for outside, inside in zip(eqn.invars, body.invars, strict=True)
    )
    count = sum(
        outside.aval.ndim == inside.aval.ndim
        for outside, inside in zip(eqn.outvars, body.outvars, strict=True)
    )
    end = len(eqn.invars) - sliced
    return range(end - count, end)


def _is_over_the_map(eqn: Any, seen: Seen) -> bool:
    return any(axis in eqn.params["axes"] for axis in (seen.row_axis, seen.column_axis))


def _pool_window(eqn: Any, seen: Seen) -> Window:
    """Along the image's axes; along all, where it has none any more."""
    params = eqn.params
    found = [axis for axis in (seen.row_axis, seen.column_axis) if axis is not None]
    axes = found or range(len(params["window_dimensions"]))
    return Window(
        *(
            tuple(params[name][axis] for axis in axes)
            for name in ("window_dimensions", "window_strides", "window_dilation")
        )
    )
