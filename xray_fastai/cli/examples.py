"""Holds the examples at the end of each command's help: what they do, and what to type."""

EXAMPLES: dict[str, tuple[tuple[str, str], ...]] = {
    "": (
        ("Rehearse on drawn X-rays, without any data:", "xray-fastai fit --epochs 3"),
        ("Train on a folder, then measure the model on its test images:", "xray-fastai fit chest_xray"),
        ("", "xray-fastai evaluate"),
        ("Predict a folder of new images into a table:", "xray-fastai predict inbox --output night.csv"),
    ),
    "fit": (
        ("Train on chest_xray/train, and write exports/first:", "xray-fastai fit chest_xray --name first"),
        ("A quick trial: small images, a small network, few epochs:",
         "xray-fastai fit chest_xray --arch resnet18 --size 64 --epochs 3"),
        ("Five networks in one export, each on other patients (five times as long):",
         "xray-fastai fit chest_xray --members 5"),
        ("Continue from your own model with another hospital's images:",
         "xray-fastai fit other_hospital --weights exports/first"),
    ),
    "evaluate": (
        ("Measure the newest export on its test images:", "xray-fastai evaluate"),
        ("Measure one on another hospital's images, whose classes have the same names:",
         "xray-fastai evaluate exports/first --data other_hospital"),
        ("For a place where 3 in 100 have the disease:", "xray-fastai evaluate --prevalence 0.03"),
    ),
    "compare": (
        ("Which of two models is better on the same test images:", "xray-fastai compare exports/first exports/second"),
    ),
    "interpret": (
        ("The 16 validation images with the largest loss:", "xray-fastai interpret"),
        ("Only the wrong predictions of normal test images:",
         "xray-fastai interpret --split test --class NORMAL --only-errors"),
    ),
    "recalibrate": (
        ("Fit a model to 200 labelled images of another hospital:",
         "xray-fastai recalibrate exports/first --data other_hospital"),
        ("Adapt it to images without labels:", "xray-fastai recalibrate exports/first --unlabelled inbox"),
    ),
    "predict": (
        ("One image, by the newest export:", "xray-fastai predict image.jpeg"),
        ("A folder with its subfolders, into a table:", "xray-fastai predict inbox --recursive --output night.csv"),
        ("A heat map of each image, by one export:",
         "xray-fastai predict inbox --model exports/first --heatmaps maps"),
    ),
    "serve": (
        ("A page on this machine:", "xray-fastai serve --open"),
        ("A page for other machines of the network:", "xray-fastai serve exports/first --host 0.0.0.0 --port 8000"),
    ),
    "runs": (
        ("All runs, the best on test images first:", "xray-fastai runs --sort test"),
        ("What was set differently:", "xray-fastai runs exports/first exports/second"),
    ),
    "default": (
        ("Keep one model for the job of every night, whatever is trained later:",
         "xray-fastai default exports/first"),
        ("Use the newest again:", "xray-fastai default --clear"),
    ),
    "report": (
        ("Write the newest export's report again, and look at it:", "xray-fastai report --open"),
    ),
    "verify": (
        ("Check an export that somebody sent:", "xray-fastai verify received.zip"),
    ),
    "export": (
        ("Write the newest export as ONNX:", "xray-fastai export"),
        ("Choose the file:", "xray-fastai export exports/first --output model.onnx"),
    ),
    "data": (
        ("Look for faults before hours go into a data set:", "xray-fastai data check chest_xray"),
        ("Without data of your own:", "xray-fastai data download chest_xray"),
    ),
    "data check": (
        ("Check a folder, and list the files to leave out:",
         "xray-fastai data check chest_xray --fix leave_out.csv"),
        ("", "xray-fastai fit chest_xray --exclude leave_out.csv"),
    ),
    "data split": (
        ("Hold out a fifth of the patients for the test, without a copy:",
         "xray-fastai data split images split.csv --test 0.2"),
    ),
    "data download": (
        ("Download the public X-rays into ./chest_xray:", "xray-fastai data download"),
        ("Unpack a file that is here already:", "xray-fastai data download chest_xray --archive archive.zip"),
    ),
    "data phantom": (
        ("Draw a small data set:", "xray-fastai data phantom drawn --images 120"),
    ),
    "data cache": (
        ("Free the space:", "xray-fastai data cache --clear"),
    ),
}  # fmt: skip
