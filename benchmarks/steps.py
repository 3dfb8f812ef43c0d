"""One step in a process of its own, so that its peak memory is its own. Called by `timing.run_child`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.timing import peak_memory


def main() -> None:
    step, source, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if step == "export":
        import optimum.exporters.onnx  # noqa: F401 - loading torch is not exporting
        import peft  # noqa: F401

        from onnx_lora.exporter import export

        facts = peak_memory(lambda: export(source, out, via="optimum", verify=False))
    elif step == "optimum":
        from optimum.exporters.onnx import main_export

        facts = peak_memory(
            lambda: main_export(str(source), str(out), task="text-generation-with-past", do_validation=False)
        )
    elif step == "attach":
        import onnx  # noqa: F401
        import onnxruntime.tools.symbolic_shape_infer  # noqa: F401

        from onnx_lora.exporter import attach

        facts = peak_memory(lambda: attach(source, out))
    else:
        raise SystemExit(f"no step {step!r}")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
