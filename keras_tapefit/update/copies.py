"""Copies of the operations of one update for other variables, put into a graph at once.

Small variables whose update treats each element by itself share one copy: their
gradients and slots are read, joined along the first axis, computed with as one tensor, and
written back piece by piece. Each element goes through the same operations as before, all
of which round exactly, so it is the same to the last bit wherever it stands in a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from keras_tapefit.gradients.xla import is_in_xla

# What an update may be made of besides operations without side effects.
_READS = frozenset({"ReadVariableOp", "ResourceGather"})
_WRITES = frozenset(
    {"AssignVariableOp", "AssignAddVariableOp", "AssignSubVariableOp"}
    | {f"ResourceScatter{kind}" for kind in ("Add", "Sub", "Update")}
)
# By write: the operation that gives what a variable holds then.
_SUMS = {"AssignAddVariableOp": "AddV2", "AssignSubVariableOp": "Sub"}
# Operations on each element that round exactly, in all their implementations.
_EXACT = frozenset(
    "Abs Add AddN AddV2 Cast DivNoNan Equal Greater GreaterEqual Identity Less LessEqual "
    "LogicalAnd LogicalNot LogicalOr Maximum Minimum Mul MulNoNan Neg NotEqual RealDiv "
    "SelectV2 Sign Sqrt Square SquaredDifference Sub".split()
)
# Operations that TensorFlow's graph optimizer may take out.
_TAKEN_OUT = frozenset(
    "EnsureShape Identity IdentityN PreventGradient Reshape StopGradient".split()
)
# Those that it may put together, so that they round in another order.
_SUM = frozenset({"Add", "AddN", "AddV2"})
_PRODUCT = frozenset("DivNoNan Mul MulNoNan Neg RealDiv Reciprocal Sqrt Rsqrt".split())
# Of the elements of a variable, beyond which its copy costs more than the operations, and of
# those that are joined, so that they stay in a processor's cache.
_SMALL = 2**11
_ROOM = 2**15


class Differs(Exception):
    """The update of a variable may differ from that of another one like it."""


class Template:
    """The operations of the update of one variable.

    Args:
        graph: reads what is given and writes to what is replaced, nothing else.
        replaced: names of the tensors that differ from copy to copy.
        given: by name, the tensors that are the same for all copies.

    Raises:
        Differs: when the graph does something else.
    """

    def __init__(self, graph: tf.Graph, replaced: Sequence[str], given: dict[str, Any]) -> None:
        self._given = given
        self._shared: dict[str, tf.Tensor] | None = None
        self.replaced = set(replaced)
        once: set[str] = set()
        several: list[tf.Operation] = []
        for op in graph.get_operations():
            if op.type == "Placeholder":
                continue
            if all(t.op.name in once or t.name in given for t in op.inputs):
                once.add(op.name)
            else:
                several.append(op)
            if op.type in _READS or (op.type in _WRITES and op.inputs[0].name in self.replaced):
                continue
            if op.op_def.is_stateful or any("func" in a.type for a in op.op_def.attr):
                raise Differs(op.type)
        definition = graph.as_graph_def()
        self._once = _part(definition, once)
        self.several = _part(definition, {op.name for op in several})
        used = {_tensor_name(name) for node in self.several.node for name in node.input}
        handed_on = sorted(used - self.replaced - {f"{op.name}:0" for op in several})
        self._handed_on = [n for n in handed_on if n.split(":")[0] in once or n in given]
        self._operations = several

    def key(self) -> Any:
        """Returns what is equal for templates whose copies are."""
        given = tuple((name, id(tensor)) for name, tensor in self._given.items())
        parts = [p.SerializeToString(deterministic=True) for p in (self._once, self.several)]
        return *parts, given, tuple(sorted(self.replaced))

    def can_be_shared(self, shape: tf.TensorShape) -> bool:
        """Whether copies for variables of this shape may be one.

        Args:
            shape: that of the variable of the graph.
        """
        size = math.prod(shape)
        # Of one element it does not show whether a scalar is the variable's. XLA makes one
        # program of all copies anyway.
        if size < 2 or size > _SMALL or is_in_xla():
            return False
        return all(self._treats_elements_alike(op, shape) for op in self._operations)

    def may_merge(self, name: str, op_type: str) -> bool:
        """Whether TensorFlow may put operations together, which then round differently.

        Args:
            name: of a tensor.
            op_type: what it is made by, where a joined tensor would stand between that
                and what is computed of it.
        """
        users = [op for op in self._operations for t in op.inputs if t.name == name]
        for op in users:
            if op.type in _TAKEN_OUT and self.may_merge(op.outputs[0].name, op_type):
                return True
            both_sums = op_type in _SUM and op.type in _SUM
            # A factor that terms have in common may be taken out of their sum.
            is_product = op_type in _PRODUCT and op.type in _PRODUCT | _SUM
            if both_sums or is_product:
                return True
        return False

    def _treats_elements_alike(self, op: tf.Operation, shape: tf.TensorShape) -> bool:
        values = [t for t in op.inputs if t.dtype != tf.resource]
        if any(t.shape != () for t in values if t.name in self._handed_on):
            return False
        if op.type in _WRITES:
            return not op.type.startswith("ResourceScatter") and values[0].shape == shape
        if op.type == "ReadVariableOp":
            return op.outputs[0].shape == shape
        # TensorFlow makes a reciprocal root of it, which does not round exactly.
        is_root = op.type == "RealDiv" and op.inputs[1].op.type == "Sqrt"
        return (
            op.type in _EXACT
            and not is_root
            and op.outputs[0].shape == shape
            and all(t.shape in (shape, ()) for t in values)
        )

    def shared(self) -> dict[str, tf.Tensor]:
        """Returns the tensors that are the same for all copies, made the first time."""
        if self._shared is None:
            given = {name: in_graph(tensor) for name, tensor in self._given.items()}
            made = [name for name in self._handed_on if name not in given]
            tensors = _import(self._once, given, made)
            self._shared = {**given, **dict(zip(made, tensors, strict=True))}
        return self._shared


class _Member(NamedTuple):
    """A variable to be updated: its tensors by their names in the template."""

    tensors: dict[str, Any]
    shape: tf.TensorShape

    def without_barrier(self) -> _Member:
        """Returns the same with each tensor as it was before an `IdentityN`.

        Keras's sum over one replica leaves one in the graph, which has all updates wait for
        the last gradient.
        """
        sources = {n: _source(t, {"IdentityN"}) for n, t in self.tensors.items()}
        return self._replace(tensors=sources)


class Copies:
    """Copies of templates, each with its own inputs, that go into a graph at once."""

    def __init__(self) -> None:
        self._nodes = _Nodes()
        self._tensors: dict[str, Any] = {}
        self._count = 0
        self._are_apart = False
        self._waiting: dict[Any, tuple[Template, list[_Member]]] = {}

    def add(
        self, template: Template, tensors: dict[str, Any], shape: Any, device: Any = None
    ) -> None:
        """Adds a copy.

        Args:
            template: what is copied.
            tensors: what is replaced, by name, in the graph.
            shape: of the variable.
            device: where the variable and its slots are; those of one device may share
                operations. `None`: they may not.
        """
        # Along the first axis they can be joined as they are.
        kind = object() if device is None else (id(template), tuple(shape[1:]), device)
        self._waiting.setdefault(kind, (template, []))[1].append(_Member(tensors, shape))

    def keep_apart(self) -> None:
        """Has no copies of this graph share operations, and each wait for all gradients.

        TensorFlow puts what made a gradient together with what is computed of it, for one
        variable at least. How it does so may depend on who else uses what it is made of.
        """
        self._are_apart = True

    def make(self) -> None:
        """Puts the copies into the current graph."""
        for template, members in self._waiting.values():
            if self._are_apart:
                groups = [[member] for member in members]
            else:
                groups = _divided([member.without_barrier() for member in members])
            for group in groups:
                self._make(template, group)
        if self._count:
            _import(self._nodes.definition, self._tensors, [])

    def _make(self, template: Template, members: list[_Member]) -> None:
        self._count += 1
        prefix = str(self._count)
        each = [f"{prefix}.{i}" for i in range(len(members))] if len(members) > 1 else [prefix]
        given = [(prefix, template.shared())]
        given += [(own, member.tensors) for own, member in zip(each, members, strict=True)]
        for own, tensors in given:
            self._tensors.update((f"{own}/{name}", tensor) for name, tensor in tensors.items())
        self._nodes.definition.versions.CopyFrom(template.several.versions)
        if len(members) > 1:
            _Joint(self._nodes, template, members, prefix, each).add()
            return
        for node in template.several.node:
            self._nodes.copy(node, prefix, [_renamed(name, prefix) for name in node.input])


class _Nodes:
    """The nodes of a graph that is being put together."""

    def __init__(self) -> None:
        self.definition = tf.compat.v1.GraphDef()

    def copy(self, node: Any, prefix: str, inputs: Sequence[str]) -> str:
        copied = self.definition.node.add()
        copied.CopyFrom(node)
        copied.name = f"{prefix}/{node.name}"
        del copied.input[:]
        copied.input.extend(inputs)
        return copied.name

    def add(self, op: str, name: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Adds a node; an attribute is a number or a type."""
        node = self.definition.node.add(op=op, name=name, input=inputs)
        for key, value in attributes.items():
            if isinstance(value, tf.DType):
                node.attr[key].type = value.as_datatype_enum
            else:
                node.attr[key].i = value
        return name

    def add_integers(self, name: str, values: Any) -> str:
        """Adds a constant of int32."""
        node = self.definition.node.add(op="Const", name=name)
        node.attr["dtype"].type = tf.int32.as_datatype_enum
        node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(values, tf.int32))
        return name


class _Joint:
    """One copy of a template for several variables.

    Args:
        nodes: where to.
        template: what is copied; it treats elements alike.
        members: the variables.
        prefix: of the names of what they share.
        each: of the names of what each has for itself.
    """

    def __init__(
        self,
        nodes: _Nodes,
        template: Template,
        members: Sequence[_Member],
        prefix: str,
        each: Sequence[str],
    ) -> None:
        self._nodes = nodes
        self._template = template
        self._members = members
        self._prefix = prefix
        self._each = each
        self._axis = nodes.add_integers(f"{prefix}.axis", 0)
        self._sizes = nodes.add_integers(f"{prefix}.sizes", [m.shape[0] for m in members])
        # By name in the template: the joined tensor in its place.
        self._joined: dict[str, str] = {}
        # By handle: the joined tensor that the variables hold now, where it is known, and
        # whether it is a sum.
        self._held: dict[str, tuple[str, bool]] = {}
        self._pieces: dict[str, list[str]] = {}
        # Nodes that there are one each of, and those left out.
        self._apart: set[str] = set()
        self._left_out: set[str] = set()

    def add(self) -> None:
        """Adds the nodes."""
        for node in self._template.several.node:
            if node.op == "ReadVariableOp":
                self._read(node)
            elif node.op in _WRITES:
                self._write(node)
            else:
                inputs = [self._value(name) for name in node.input if name[0] != "^"]
                self._nodes.copy(node, self._prefix, [*inputs, *self._order(node)])

    def _read(self, node: Any) -> None:
        handle, dtype = node.input[0], tf.as_dtype(node.attr["dtype"].type)
        known, is_sum = self._held.get(handle, ("", False))
        if known and not (is_sum and self._template.may_merge(f"{node.name}:0", "AddV2")):
            self._left_out.add(node.name)
        else:
            parts = [
                self._nodes.copy(node, own, [f"{own}/{handle}", *self._order(node, own)])
                for own in self._each
            ]
            self._apart.add(node.name)
            known = self._join(f"{self._prefix}.joined/{node.name}", parts, dtype)
            self._held[handle] = known, False
        self._joined[f"{node.name}:0"] = known

    def _write(self, node: Any) -> None:
        handle, value = node.input[0], self._value(node.input[1])
        dtype = tf.as_dtype(node.attr["dtype"].type)
        for own, part in zip(self._each, self._divide(value, dtype), strict=True):
            self._nodes.copy(node, own, [f"{own}/{handle}", part, *self._order(node, own)])
        self._apart.add(node.name)
        if node.op not in _SUMS:
            self._held[handle] = value, False
        elif handle in self._held:
            name, terms = f"{self._prefix}.held/{node.name}", [self._held[handle][0], value]
            self._held[handle] = self._nodes.add(_SUMS[node.op], name, terms, T=dtype), True

    def _value(self, name: str) -> str:
        tensor = _tensor_name(name)
        if tensor in self._template.replaced and tensor not in self._joined:
            parts = [f"{own}/{tensor}" for own in self._each]
            dtype = self._members[0].tensors[tensor].dtype
            self._joined[tensor] = self._join(f"{self._prefix}.joined/{name}", parts, dtype)
        return self._joined.get(tensor) or _renamed(name, self._prefix)

    def _order(self, node: Any, own: str | None = None) -> list[str]:
        """Returns the ties of a node to earlier ones: of one variable, or of all."""
        found = []
        for name in (n[1:] for n in node.input if n[0] == "^"):
            if name in self._apart:
                found += [f"^{each}/{name}" for each in ([own] if own else self._each)]
            elif name not in self._left_out:
                found.append(f"^{self._prefix}/{name}")
        return found

    def _join(self, name: str, parts: Sequence[str], dtype: tf.DType) -> str:
        inputs = [*parts, self._axis]
        return self._nodes.add(
            "ConcatV2", name.split(":")[0], inputs, N=len(parts), T=dtype, Tidx=tf.int32
        )

    def _divide(self, value: str, dtype: tf.DType) -> list[str]:
        if value not in self._pieces:
            name, number = f"{value.split(':')[0]}.divided", len(self._each)
            inputs = [value, self._sizes, self._axis]
            self._nodes.add("SplitV", name, inputs, num_split=number, T=dtype, Tlen=tf.int32)
            self._pieces[value] = [f"{name}:{i}" for i in range(number)]
        return self._pieces[value]


def maker(tensor: tf.Tensor) -> str:
    """Returns the type of the operation that made a tensor."""
    return _source(tensor, _TAKEN_OUT).op.type


def _source(tensor: tf.Tensor, passed_over: Collection[str]) -> tf.Tensor:
    """Returns what a tensor was before operations of some types."""
    while tensor.op.type in passed_over:
        tensor = tensor.op.inputs[tensor.value_index]
    return tensor


def _divided(members: Sequence[_Member]) -> list[list[_Member]]:
    """Returns the members in groups that have room."""
    groups: list[list[_Member]] = []
    room = 0
    for member in members:
        size = math.prod(member.shape)
        if not groups or size > room:
            groups.append([])
            room = _ROOM
        groups[-1].append(member)
        room -= size
    return groups


def _part(definition: Any, names: set[str]) -> Any:
    """Returns the nodes of a graph with these names, without ties to other nodes."""
    part = tf.compat.v1.GraphDef(versions=definition.versions)
    for node in definition.node:
        if node.name not in names:
            continue
        copied = part.node.add()
        copied.CopyFrom(node)
        del copied.input[:]
        copied.input.extend(
            name for name in node.input if not name.startswith("^") or name[1:] in names
        )
        copied.attr.pop("_class", None)
    return part


def _import(part: Any, tensors: dict[str, Any], outputs: list[str]) -> list[tf.Tensor]:
    used = {_tensor_name(name) for node in part.node for name in node.input}
    inputs = {name: tensor for name, tensor in tensors.items() if name in used}
    found = tf.graph_util.import_graph_def(part, inputs, outputs, name="update")
    return list(found or ())


def _tensor_name(name: str) -> str:
    return name if ":" in name or name.startswith("^") else f"{name}:0"


def _renamed(name: str, prefix: str) -> str:
    return f"^{prefix}/{name[1:]}" if name.startswith("^") else f"{prefix}/{name}"


def in_graph(tensor: Any) -> tf.Tensor:
    """Returns a tensor as one of the graph that is being traced."""
    if tensor.dtype == tf.resource:
        # It must stay what it is, or the order of what is done to it would be lost.
        return tf.convert_to_tensor(tensor)
    # An identity brings a tensor from outside a branch into it.
    inside = getattr(tensor, "graph", None) is tf.compat.v1.get_default_graph()
    return tensor if inside else tf.identity(tensor)
