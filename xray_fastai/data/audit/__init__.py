"""The check of a data set (`data check`)."""
