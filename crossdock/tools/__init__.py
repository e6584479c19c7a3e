"""Tools around a trained model: generate, evaluate, export, convert, report, tune."""
