"""What each stage declares: settings, metrics, inputs, checks. Imports no torch."""
