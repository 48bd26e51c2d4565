"""Keys of checkpoints that are Python literals; other hostile metadata: test_hostile_files.py."""

import ast

import pytest

from upcycle_jax.checkpoints import untrusted


def test_a_literal_is_read_and_no_more_than_that():
    assert untrusted.literal("('params', 'mlp', 'kernel')", "a") == ("params", "mlp", "kernel")
    for text in ("__import__('os')", "('params'", "[" * 200, "'x'," * 30_000):
        with pytest.raises(ValueError, match="unreadable key"):
            untrusted.literal(text, "a/_METADATA")


def test_threads_that_parse_at_a_time_do_not_lose_a_key(monkeypatch):
    """CPython 3.11's own error, seen where another thread parsed: the next try reads the key."""
    parse, calls = ast.literal_eval, []

    def mixed_up(text):
        calls.append(text)
        if len(calls) < 3:
            raise SystemError("AST constructor recursion depth mismatch (before=45, after=42)")
        return parse(text)

    monkeypatch.setattr(ast, "literal_eval", mixed_up)
    assert untrusted.literal("('a', 1)", "a") == ("a", 1) and len(calls) == 3
