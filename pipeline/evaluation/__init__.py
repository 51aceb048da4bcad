"""From tickets to numbers: metrics, superposition, BatchNorm recalibration, prediction and the report."""
