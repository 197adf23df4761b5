"""Train, transfer, study and ship Vision Transformers."""
