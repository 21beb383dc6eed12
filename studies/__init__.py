"""Scripted studies of why fine-tuning forgets; each module is one study and draws its figures."""
