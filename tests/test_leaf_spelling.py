"""What a leaf is, its role and twin say: no code outside the families and `moe/roles` reads it off
a path.
"""

import ast
import pathlib
import re

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "upcycle_jax"
SPELT = re.compile(r"\b(shared_)?expert/|\brouter/|\bmlp/|\b(layers|encoderblock)_")
"""Words of the paths of an MoE layer's parameters, and of layers."""

MAY_SPELL = (
    "moe/roles.py",
    "models/layer_names.py",
    # Reports and experts' parameters of the linen modules of those names.
    "models/layerwise.py",
    "models/shared.py",
    # A family, and its readers and writers of foreign checkpoints, know their own names.
    "models/decoder/",
    "models/t5/",
    "models/vit/",
    "checkpoints/huggingface/decoder/",
    "checkpoints/huggingface/t5/",
    "checkpoints/huggingface/vit/",
    "checkpoints/vit/",
)
"""Files and folders of the library that may write them."""


def spelt(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, text) of every string with such a word, without docstrings."""
    prose = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    return [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in prose
        and SPELT.search(node.value)
    ]


def test_no_leaf_is_known_by_its_spelling():
    files = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
    assert not [
        f"{name}:{line}: {text}"
        for name, path in files.items()
        if not name.startswith(MAY_SPELL)
        for line, text in spelt(ast.parse(path.read_text(encoding="utf-8")))
    ]


def test_the_words_are_found():
    code = 'name.replace("mlp/expert/", "mlp/")\ndef f():\n    """mlp/ in prose."""\n'
    assert [line for line, _ in spelt(ast.parse(code))] == [1, 1]
    assert spelt(ast.parse('f"{stack}/layers_{i}"'))
