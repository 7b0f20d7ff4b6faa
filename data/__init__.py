"""Text → records → batches. Knows tokenizers; knows no model and no stage, and imports no other room."""
