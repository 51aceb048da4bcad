"""Build and check the FFCV data sets that the training pipeline reads (``python -m data_prep --help``)."""
