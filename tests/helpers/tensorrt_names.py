"""The names that source code takes from the module `tensorrt`."""

import ast


def dotted(node):
    """a.b.c of an expression that is that, else nothing."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (inner := dotted(node.value)):
        return f"{inner}.{node.attr}"
    return ""


def names_in(source):
    """What is taken from the module, as "DataType.HALF": through `trt`, `flavour.trt` or a name for a part of it."""
    names, aliases = set(), {}
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            _, found, rest = f".{dotted(node.value)}.".partition(".trt.")
            if found and rest.strip("."):
                aliases[node.targets[0].id] = rest.strip(".")
    for node in ast.walk(tree):
        path = dotted(node) if isinstance(node, ast.Attribute) else ""
        first, _, rest = path.partition(".")
        if first in aliases:
            path = f"trt.{aliases[first]}.{rest}"
        _, found, rest = f".{path}".partition(".trt.")
        if found:
            names.add(rest.partition("__")[0].rstrip("."))
    return names - {""}
