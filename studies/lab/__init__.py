"""The exact lab: a language model so small that all its responses can be enumerated (docs/theory.md)."""
