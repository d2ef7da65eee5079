"""Sweeps: spaces of settings, searched with Ray Tune, each trial a whole run."""
