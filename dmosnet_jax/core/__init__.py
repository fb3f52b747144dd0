"""Mesh, settings, shared types and errors: what every other room stands on."""
