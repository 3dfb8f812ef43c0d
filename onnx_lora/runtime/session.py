"""A session whose calls choose their adapter. It ties a package's graph, its adapters and ONNX Runtime
together; what an adapter is made of, it does not know."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from onnx_lora.adapters import BoundAdapter
from onnx_lora.adapters.adapter import refuse_fold_only
from onnx_lora.adapters.bases import base_problem
from onnx_lora.adapters.explain import explain_doubts
from onnx_lora.boundary import public
from onnx_lora.errors import PackageError, SelectionError
from onnx_lora.manifest import GraphInfo
from onnx_lora.onnxruntime_errors import fail_in_run
from onnx_lora.package import Package
from onnx_lora.runtime._ort import Device, Options, Providers, make_fed_value, start_session
from onnx_lora.runtime.binding import AnyAdapter, AnyPackage, bind_adapter, open_package
from onnx_lora.runtime.lease import Lease
from onnx_lora.runtime.loaded import Values
from onnx_lora.runtime.selection import AdapterChoice, parse
from onnx_lora.runtime.signature import Signature
from onnx_lora.runtime.store import Store, resolve

__all__ = ["COMPOSED_BYTES", "AdapterSession"]

logger = logging.getLogger(__name__)

# Blends and row mixes that are kept between calls. A rank-16 adapter on every projection of a 1B model
# takes about 45 MB in float32; the limit holds a few of its mixtures.
COMPOSED_BYTES = 256 * 2**20

# Ways of ONNX Runtime around `run`, where an adapter chosen per call could not follow.
_WITHOUT_ADAPTERS = frozenset(
    ["io_binding", "run_async", "run_with_iobinding", "run_with_ort_values", "run_with_ortvaluevector", "set_providers"]
)


@public
class AdapterSession:
    """Runs one graph of a package, each call with the adapter it names.

    Where an `onnxruntime.InferenceSession` is used through `run` and the `get_` methods, it goes in its
    place. Safe to use from many threads: the adapter belongs to the call, never to the session, and
    adapters may be loaded and unloaded while calls run.
    """

    def __init__(
        self,
        package: AnyPackage,
        *,
        graph: str | None = None,
        providers: Providers | None = None,
        provider_options: Sequence[dict[Any, Any]] | None = None,
        sess_options: Any = None,
        composed_bytes: int = COMPOSED_BYTES,
        separate_base: bool = False,
    ) -> None:
        """Open `package` and start ONNX Runtime on its graph.

        `providers`, `provider_options`, `sess_options`: as for `onnxruntime.InferenceSession`. Without
        `sess_options` only errors are logged. `composed_bytes`: how many bytes of blends and row mixes are
        kept between calls; 0 keeps none. `separate_base`: calls without an adapter run in a session of
        their own on the graph without points: no slower than the plain model, for the weights twice in memory.

        Raises PackageError: the package is broken, has no such graph, or ONNX Runtime cannot open it.
        """
        self._package = open_package(package)
        self._graph = self._package.graph(graph)
        options = Options(providers, provider_options, sess_options).silence()
        path = self._package.path / self._graph.file
        self._session = start_session(path, options, path=path)
        self._base = self._session
        if separate_base:
            base = self._package.path / self._graph.base_file
            self._base = start_session(base, options, path=base)
        inputs = self._graph.adapter_inputs
        offered = {arg.name for arg in self._session.get_overridable_initializers()}
        missing = sorted(inputs - offered)
        if missing:
            raise PackageError(
                "the graph must have the inputs that the manifest names; make the package again",
                path=path,
                problems=[f"{name} is missing" for name in missing],
            )
        self._signature = Signature.of(self._session, inputs)
        self._store = Store(self._package, self._graph, Device.of(self._session), composed_bytes)

    @property
    def package(self) -> Package:
        """The package whose graph runs."""
        return self._package

    @property
    def graph(self) -> GraphInfo:
        """The manifest's entry of the graph that runs."""
        return self._graph

    @property
    def adapters(self) -> Mapping[str, BoundAdapter]:
        """The adapters loaded at this moment, by name; read-only."""
        return MappingProxyType({name: loaded.bound for name, loaded in self._store.loaded.items()})

    def load_adapter(
        self,
        name: str,
        adapter: AnyAdapter,
        *,
        strict: bool = False,
        allow_unproven: bool = False,
        replace: bool = False,
    ) -> BoundAdapter:
        """Make an adapter available to calls as `name`; its `coverage` says what it does here.

        `adapter`: a PEFT folder, a converted file, or what `read_adapter` or `bind` returned. One that names another
        base than the package's is noted in its coverage and logged as a warning, or refused if `strict`.
        `allow_unproven`: take points at which the graph may compute something else than the module. `replace`: an
        adapter of this name makes way once the new one is ready. Every call has the one or the other: those that run
        finish with the old one, and if the new one is refused the old one stays.

        Raises SelectionError: the name is taken or no name. AdapterError: it cannot be read, does not fit, or can only
        be folded.
        """
        if not isinstance(name, str) or not name:
            raise SelectionError(f"an adapter's name must be a string that is not empty, and is {name!r}")
        if not replace:
            self._store.check_free(name)
        bound = bind_adapter(adapter, self._package.allowing_unproven(allow_unproven), name=name, strict=strict)
        problem = base_problem(bound.origin.base_model, self._package)
        if problem is not None:
            logger.warning("adapter %r: %s", name, problem)
        for doubt in explain_doubts(bound.base_digests, self._package):
            logger.warning("adapter %r: %s", name, doubt)
        refuse_fold_only(bound, bound.coverage.fold_only)
        self._store.add(name, bound, replace=replace)
        return bound

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Calls that use it already finish with it. Raises SelectionError: not loaded."""
        self._store.remove(name)

    def run(
        self,
        output_names: Sequence[str] | None,
        input_feed: Mapping[str, Any],
        run_options: Any = None,
        *,
        adapter: AdapterChoice = None,
    ) -> list[Any]:
        """Compute outputs, as `onnxruntime.InferenceSession.run` does, with the adapter of this call.

        `adapter`: None (the base), a name, a blend `{name: weight}`, or a list of these, one per row. A weight is a
        number, or numbers by groups of modules: `{"style": {"down_blocks": 0.6, "*": 1.0}}`.

        Raises FeedError: inputs or outputs do not fit. SelectionError: no such adapter, blend or row.
        RunError: ONNX Runtime failed.
        """
        names = self._signature.output_names(output_names)
        self._signature.check_feeds(input_feed)
        values = self._choose(adapter, input_feed)
        with fail_in_run():
            if not values or not self._signature.plain:
                session = self._session if values else self._base
                return list(session.run(names, {**input_feed, **values}, run_options))
            # Of the ways to feed OrtValues the fastest: with 420 of them beside 62 arrays, 0.26 ms
            # over the base, against 0.36 ms by IOBinding and 0.39 ms by run().
            feeds = dict(values)
            inputs = self._signature.inputs
            for name, fed in input_feed.items():
                feeds[name] = make_fed_value(fed, inputs[name].element)
            outputs = self._session.run_with_ort_values(names, feeds, run_options)
            return [output.numpy() for output in outputs]

    def _choose(self, adapter: AdapterChoice, feeds: Mapping[str, Any]) -> Values:
        loaded = self._store.loaded
        selection = parse(adapter, loaded.keys())
        if selection.batch is not None:
            self._signature.check_rows(selection.batch, feeds)
        return self._store.values(selection, loaded)

    def lease(self, adapter: AdapterChoice, rows: int) -> Lease:
        """The adapter of several calls that belong together, for `rows` rows; the runtime's own, for generation.

        Raises SelectionError: no such adapter or blend, or another number of choices than of rows.
        """
        loaded = self._store.loaded
        selection = parse(adapter, loaded.keys())
        if selection.batch not in (None, rows):
            raise SelectionError(
                f"one choice per row means as many as the batch has rows; {selection.batch} were given "
                f"for {rows} prompt{'s' if rows > 1 else ''}"
            )
        values = self._store.values(selection, loaded)
        session = self._session if values else self._base
        return Lease.of(session, resolve(selection, loaded), values)

    def get_inputs(self) -> Sequence[Any]:
        """The model's inputs, not the adapters'."""
        return list(self._session.get_inputs())

    def get_outputs(self) -> Sequence[Any]:
        """The model's outputs."""
        return list(self._session.get_outputs())

    def get_overridable_initializers(self) -> Sequence[Any]:
        """Optional inputs a call may feed: not the adapters', which `run` fills."""
        optional = self._session.get_overridable_initializers()
        return [arg for arg in optional if arg.name not in self._signature.reserved]

    def get_modelmeta(self) -> Any:
        """As of an `onnxruntime.InferenceSession`."""
        return self._session.get_modelmeta()

    def get_providers(self) -> Sequence[str]:
        """The execution providers' names, in the order in which they are asked."""
        return list(self._session.get_providers())

    def get_provider_options(self) -> dict[str, Any]:
        """The options of each execution provider, by its name."""
        return dict(self._session.get_provider_options())

    def get_session_options(self) -> Any:
        """As of an `onnxruntime.InferenceSession`."""
        return self._session.get_session_options()

    def end_profiling(self) -> str:
        """The file that profiling wrote, where the session options ask for it."""
        return str(self._session.end_profiling())

    def __getattr__(self, name: str) -> Any:
        if name in _WITHOUT_ADAPTERS:
            raise AttributeError(f"an AdapterSession has no {name!r}: it would run without an adapter; use run()")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
