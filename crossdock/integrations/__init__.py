"""Other libraries' ways in: transformers' registries and its Trainer."""
