"""What a trace tells of arrays that do not depend on the images.

Three things count: which are constant matrices, as averages over bins; which are drawn at random,
as parameters are; and which weights are zero but for some that were put in, as those of LeNet's
partial connections.
"""

from typing import Any

import numpy as np
from jax.extend.core import JaxprEqn, Literal, Var

_SAME_VALUES = {"reshape", "squeeze", "transpose", "convert_element_type"}


class KnownWeights:
    """Filled by `note` as the operations of a trace go by."""

    def __init__(self) -> None:
        self._matrices: dict[Var, np.ndarray] = {}
        self._nonzeros: dict[Var, int] = {}
        self._zeros: set[Var] = set()
        self._random: set[Var] = set()

    def note_constant(self, var: Var, value: Any) -> None:
        """A constant of the trace."""
        if np.ndim(value) == 2:
            self._matrices[var] = np.asarray(value)

    def note(self, eqn: JaxprEqn) -> None:
        """An operation on arrays that do not depend on the images."""
        name, first = eqn.primitive.name, eqn.invars[0] if eqn.invars else None
        out = eqn.outvars[0]
        if name.startswith(("random_", "threefry")) or any(self.is_random(v) for v in eqn.invars):
            self._random.update(eqn.outvars)
        if name == "broadcast_in_dim" and isinstance(first, Literal) and first.val == 0:
            self._zeros.add(out)
        elif name.startswith("scatter") and first in self._zeros:
            updates: Any = eqn.invars[2].aval
            self._nonzeros[out] = updates.size
        elif name in _SAME_VALUES and isinstance(first, Var):
            if first in self._nonzeros:
                self._nonzeros[out] = self._nonzeros[first]
            if first in self._matrices and name == "convert_element_type":
                self._matrices[out] = self._matrices[first]

    def rename(self, var: Var, argument: Any) -> None:
        """`argument` is called `var` within a function; what `var` was before is forgotten."""
        known: Any
        for known in (self._matrices, self._nonzeros):
            known.pop(var, None)
            if isinstance(argument, Var) and argument in known:
                known[var] = known[argument]
        self._random.discard(var)
        if self.is_random(argument):
            self._random.add(var)

    def is_random(self, atom: Any) -> bool:
        """Whether it is drawn at random, or computed from what is."""
        return isinstance(atom, Var) and atom in self._random

    def matrix(self, atom: Any) -> np.ndarray | None:
        """The value of a constant matrix; None for all else."""
        if isinstance(atom, Literal):
            return np.asarray(atom.val) if np.ndim(atom.val) == 2 else None
        return self._matrices.get(atom)

    def nonzeros(self, atom: Any) -> int:
        """How many of the weights are not zero for certain."""
        size = int(atom.aval.size)
        return size if isinstance(atom, Literal) else self._nonzeros.get(atom, size)
