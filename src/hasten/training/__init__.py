"""Recipes that train what hasten ships and measures with: reference models, drafts, widened models."""
