"""What exporters write down of the modules around a node: paths, classes, rules. It does not know what a node
computes."""

from __future__ import annotations

import ast
import re

import onnx_ir as ir

__all__ = ["FUSING_NORMS", "classes_around", "has_fused_norm", "module_around", "path_of", "scopes_around"]

# torch.onnx (dynamo) writes the module path of every node here, and the classes of the modules.
_NAME_SCOPES = "pkg.torch.onnx.name_scopes"
_CLASSES = "pkg.torch.onnx.class_hierarchy"

# What onnxscript's rewriter, behind torch.onnx (dynamo), says of a node that it made, and what its rules are called
# that multiply a batch norm into a weight.
_RULE_NAME = "pkg.onnxscript.rewriter.rule_name"
FUSING_NORMS = "FuseBatchNorm"

# TorchScript's exporter, and the GenAI builder: `/model/layers.0/self_attn/q_proj/MatMul_1`; quantizers add
# `_Q4`, `_matmul_Q4` or `_quant`.
_NODE_NAME = re.compile(r"/(?P<path>.+)/[A-Za-z]+(_\d+)?(_MatMul)?((_matmul)?_Q\d+|_quant)?")


def scopes_around(node: ir.Node) -> list[str]:
    """The paths of the modules around a node as dynamo names them, outermost first, and the call behind it; or none."""
    return _listed(node, _NAME_SCOPES)


def classes_around(node: ir.Node) -> list[str]:
    """The classes of the modules around a node, outermost first, and the function behind the call; or none."""
    return _listed(node, _CLASSES)


def module_around(node: ir.Node) -> str | None:
    """The module that a node is computed in, by what its exporter wrote; "" is the model itself, None is unknown."""
    scopes = scopes_around(node)
    return scopes[-2] if len(scopes) > 1 else path_of(node)


def path_of(node: ir.Node) -> str | None:
    """The module path in a node's name, as TorchScript's exporter and the GenAI builder write it; or None."""
    match = _NODE_NAME.fullmatch(node.name or "")
    return match["path"].replace("/", ".") if match else None


def has_fused_norm(node: ir.Node) -> bool:
    """Whether torch.onnx (dynamo) multiplied a batch norm into a node's weight, by what it wrote down."""
    return FUSING_NORMS in node.metadata_props.get(_RULE_NAME, "")


def _listed(node: ir.Node, key: str) -> list[str]:
    """The list that a node's metadata holds as a literal of Python; empty where there is none, or no sound one."""
    text = node.metadata_props.get(key, "[]")
    try:
        return [str(entry) for entry in ast.literal_eval(text)]
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return []
