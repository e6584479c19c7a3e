"""Tools around a trained model: generate, evaluate, export, report."""
