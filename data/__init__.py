"""Turn text into records and records into batches.

This room knows tokenizers, but no model and no stage. Of the other rooms it imports only
`pipeline.errors`.
"""
