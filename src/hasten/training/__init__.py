"""Recipes for small models: the reference models, drafts for any target, widened models."""
