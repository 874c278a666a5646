"""From a torch module to a Program: export with symbolic dimensions, normalise, lift and name the weights."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim as ExportDim
from torch.export.graph_signature import InputKind, OutputKind

from graphopt.diagnostics import CaptureError
from graphopt.frontend.normalize import normalize
from graphopt.frontend.ranges import fixed, guarded, is_constraint, suggested
from graphopt.ir.program import Dim, Entry, Input, Origin, Program
from graphopt.ir.purity import eliminate_dead_code
from graphopt.ir.shapes import propagate
from graphopt.ir.weights import Const, MemorySource, Source, TensorSource, Weight, WeightStore

DEFAULT_DIMS = (Dim("B", 1, 1 << 16, 3), Dim("S", 1, 1 << 20, 19))


def capture_module(
    module: torch.nn.Module,
    inputs: Mapping[str, Input] | tuple[Input, ...],
    *,
    dims: tuple[Dim, ...] = DEFAULT_DIMS,
    source: TensorSource | None = None,
    constants: Mapping[str, torch.Tensor] | None = None,
    origin: Origin | None = None,
    names_on_disk: frozenset[str] | None = None,
) -> Program:
    """Export `module` on its own device (meta or fake parameters included) into a Program.

    `inputs` are keyword arguments of `forward` in order; dimensions named in their shapes are symbolic. `source` supplies
    weights (default: the module's own tensors), `constants` the values of buffers when the module sits on meta.
    Raises CaptureError with torch.export's reason when the module cannot be exported.
    """
    specs = tuple(inputs.values()) if isinstance(inputs, Mapping) else tuple(inputs)
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    exported, dims = _export(module, specs, dims, device)
    sizes = {dim.name: dim.low for dim in dims if dim.low == dim.high}
    specs = tuple(replace(spec, shape=tuple(sizes.get(size, size) for size in spec.shape)) for spec in specs)  # type: ignore[arg-type]
    constants = dict(constants or {})
    aliases = _alias_groups(module, names_on_disk)
    weights: dict[str, Weight] = {}
    graph_module = exported.graph_module
    graph = graph_module.graph
    _count_users(graph)
    by_placeholder = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    first: dict[str, fx.Node] = {}
    values = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    for node in list(graph.nodes):
        if node.op != "placeholder":
            continue
        spec = by_placeholder[node.name]
        if spec.kind == InputKind.USER_INPUT:
            node.meta["input"] = node.name
            continue
        name = str(spec.target)
        canonical, others = aliases.get(name, (name, ()))
        node.meta["weight"] = canonical
        if canonical in first:
            node.replace_all_uses_with(first[canonical])
            graph.erase_node(node)
            continue
        first[canonical] = node
        tensor = values.get(name)
        if tensor is None:
            tensor = exported.constants[name]
        if spec.kind == InputKind.PARAMETER or (spec.kind == InputKind.BUFFER and spec.persistent):
            kind = "parameter" if spec.kind == InputKind.PARAMETER else "buffer"
            weights[canonical] = Weight(
                canonical, Source(canonical, tuple(tensor.shape), tensor.dtype), kind, tuple(others)
            )
        else:
            value = constants.get(name, tensor)
            if _valueless(value):
                raise CaptureError.of("constant_without_value", f"the value of constant {name!r} is not known")
            node.meta["constant"] = value.detach().cpu()
            weights[canonical] = Weight(canonical, Const(value.detach().clone().cpu(), value.dtype), "constant")
    entry = Entry(specs, _output_names(exported))
    _check_effects(exported)
    store_source = source
    if store_source is None and not any(_valueless(tensor) for tensor in values.values()):
        store_source = MemorySource({name: tensor.detach() for name, tensor in values.items()})
    normalize(graph_module)
    output = next(iter(reversed(graph.nodes)))
    output.args = (tuple(node for node in output.args[0] if isinstance(node, fx.Node)),)
    eliminate_dead_code(graph)
    clean = _rebuild(graph)
    live = {node.meta["weight"] for node in clean.graph.nodes if "weight" in node.meta}
    store = WeightStore(weights, store_source).only(live)
    propagate(clean, store, dims, entry)
    dtype = _model_dtype(store)
    return Program(clean, store, dims, entry, dtype, origin=origin or Origin(type(module).__name__))


def _count_users(graph: fx.Graph) -> None:
    """Set every node's users anew: torch.export leaves out users where it has merged equal casts."""
    for node in graph.nodes:
        node.users.clear()
    for node in graph.nodes:
        for read in node.all_input_nodes:
            read.users[node] = None


def _valueless(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "meta" or isinstance(tensor, FakeTensor)


def _export(
    module: torch.nn.Module, specs: tuple[Input, ...], dims: tuple[Dim, ...], device: torch.device
) -> tuple[Any, tuple[Dim, ...]]:
    """The exported program and the dimensions it holds for: those asked for, or the widest that export allows.

    When export refuses a range, its suggestion is taken, a size included; else its conditions are deferred and evaluated;
    at last the dimensions that it complains of are fixed at their hints.
    """
    deferred = False
    for _ in range(2 * len(dims) + 3):
        try:
            exported = _export_once(module, specs, dims, device, deferred)
        except Exception as error:
            if is_constraint(error):
                narrower = suggested(error, dims) or fixed(error, dims, said=not deferred)
                if narrower is None and not deferred:
                    deferred = True
                    continue
                if narrower is not None:
                    dims, deferred = narrower, deferred and any(dim.low < dim.high for dim in narrower)
                    continue
            raise _not_exportable(module, error) from error
        return exported, guarded(exported, specs, dims)
    raise CaptureError.of(
        "not_exportable", f"torch.export finds no sizes for which it can capture {type(module).__name__}"
    )


def _export_once(
    module: torch.nn.Module, specs: tuple[Input, ...], dims: tuple[Dim, ...], device: torch.device, deferred: bool
) -> Any:
    named = {dim.name: ExportDim(dim.name, min=dim.low, max=dim.high) for dim in dims if dim.low < dim.high}
    hints = {dim.name: dim.hint for dim in dims}
    example, dynamic = {}, {}
    for spec in specs:
        sizes = [hints[size] if isinstance(size, str) else size for size in spec.shape]
        example[spec.name] = torch.zeros(sizes, dtype=spec.dtype, device=device)
        dynamic[spec.name] = {i: named[size] for i, size in enumerate(spec.shape) if size in named}
    # Of a model that it cannot take torch.export prints the whole graph, before the error that we name the line of.
    with warnings.catch_warnings(), torch.no_grad(), _masks_as_given(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        return torch.export.export(
            module.eval(),
            (),
            example,
            dynamic_shapes=dynamic,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=deferred,
        )


@contextmanager
def _masks_as_given() -> Iterator[None]:
    """Keep torch's transformer layers from comparing a mask's values with a causal one: that only hints at a faster kernel."""
    from torch.nn.modules import transformer

    original = transformer._detect_is_causal_mask
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: bool(is_causal)
    try:
        yield
    finally:
        transformer._detect_is_causal_mask = original


def _not_exportable(module: torch.nn.Module, error: Exception) -> CaptureError:
    # What follows in torch's own text is about torch's settings, not about the model.
    reason = str(error).partition("consider using data-dependent")[0].strip().splitlines()
    where = _model_line(module, error)
    return CaptureError.of(
        "not_exportable",
        f"torch.export cannot capture {type(module).__name__}: {reason[0] if reason else type(error).__name__}",
        notes=((f"model line: {where}",) if where else ()) + tuple(reason[1:6]),
        help=(next((way for sign, way in _WAYS.items() if sign in str(error)), _CHANGE),),
    )


_CHANGE = "graphopt captures what torch.export can take; change the line named above"
_WAYS = {
    "data-dependent": "the line named above decides by the values of a tensor, and a graph does not know them: choose with"
    " torch.where, compute all of several branches (every expert for every token), or make the choice an option of the model",
    "Couldn't swap": "the line named above converts weights of the model while it runs: convert them when the model is made",
}


def _model_line(module: torch.nn.Module, error: BaseException) -> str | None:
    """The innermost line in the traceback of a file that defines a class of the model, else of any file but torch's."""
    sources = {sys.modules[type(part).__module__].__file__ for part in module.modules()}
    own = other = None
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if not any(part in code.co_filename for part in ("/torch/", "/graphopt/frontend/", "/sympy/")):
            other = f"{code.co_filename}:{trace.tb_lineno} in {code.co_name}"
            own = other if code.co_filename in sources else own
        trace = trace.tb_next
    return own or other


def _alias_groups(module: torch.nn.Module, on_disk: frozenset[str] | None) -> dict[str, tuple[str, tuple[str, ...]]]:
    """For every parameter name its canonical name and the other names of one storage.

    Export reads a tied weight under whichever name it met last; we use the name that the checkpoint holds, else the
    first in the module's own order.
    """
    groups: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    result = {}
    for names in groups.values():
        canonical = next((name for name in names if on_disk and name in on_disk), names[0])
        others = tuple(name for name in names if name != canonical)
        for name in names:
            result[name] = (canonical, others)
    return result


def _output_names(exported: Any) -> tuple[str, ...]:
    spec = exported.call_spec.out_spec
    count = sum(1 for s in exported.graph_signature.output_specs if s.kind == OutputKind.USER_OUTPUT)
    context = spec.context
    if isinstance(context, (list, tuple)) and all(isinstance(name, str) for name in context) and len(context) == count:
        return tuple(context)
    return ("output",) if count == 1 else tuple(f"output{i}" for i in range(count))


def _check_effects(exported: Any) -> None:
    mutated = [s.target for s in exported.graph_signature.output_specs if s.kind != OutputKind.USER_OUTPUT]
    if mutated:
        raise CaptureError.of(
            "mutation",
            f"the module writes {', '.join(map(str, mutated))} in forward; graphopt captures stateless graphs",
            help=("call .eval() or turn the cache off",),
        )


def _rebuild(graph: fx.Graph) -> fx.GraphModule:
    """A fresh graph, weights first, with readable names and only the metadata that later stages use."""
    clean = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    ordered = [n for n in placeholders if "weight" in n.meta] + [n for n in placeholders if "input" in n.meta]
    ordered += [node for node in graph.nodes if node.op != "placeholder"]
    for node in ordered:
        if node.op == "placeholder" and "weight" in node.meta:
            copy = clean.placeholder(node.meta["weight"].replace(".", "_"))
            copy.target = copy.name  # `a.b` and `a_b` are two arguments.
        else:
            copy = clean.node_copy(node, lambda n: mapping[n])
        stack = node.meta.get("nn_module_stack")
        copy.meta = {key: node.meta[key] for key in ("weight", "input") if key in node.meta}
        # What runs outside of every module export files under a hook of its own.
        inside = [str(name) for name, _ in (stack or {}).values() if not str(name).startswith("_empty_nn_module_stack")]
        if inside:
            copy.meta["path"] = inside[-1]
        mapping[node] = copy
    clean.lint()
    return fx.GraphModule(torch.nn.Module(), clean)


def _model_dtype(store: WeightStore) -> torch.dtype:
    """The dtype most parameter elements have: what activations between layers are in."""
    counts: dict[torch.dtype, int] = {}
    for weight in store.weights.values():
        if weight.kind == "parameter" and weight.expr.dtype.is_floating_point:
            counts[weight.expr.dtype] = counts.get(weight.expr.dtype, 0) + torch.Size(weight.expr.shape).numel()
    return max(counts, key=lambda d: counts[d]) if counts else torch.float32
