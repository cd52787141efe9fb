"""Names the files of an export, and the version and the sizes of what they hold."""

FORMAT = 1
"""The version of `model.json`'s layout; a newer one is refused."""

SETTINGS, WEIGHTS = "model.json", "model.safetensors"

PICKLE = "learner.pkl"
OUT_OF_FOLD = "out_of_fold.csv"
HISTORY_COLUMNS = ("phase", "epoch", "train_loss", "valid_loss", "accuracy", "roc_auc", "lr")
"""The columns of `history.csv`."""

QUANTILES = 101
"""How many values describe the scores of a class."""
