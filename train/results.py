"""Names of the files that a run writes to its folder `out`."""

ADAPTER = "adapter.safetensors"  # the trained adapter (EMA weights), for `RealCustomPipeline.load_realcustom`
SUMMARY = "training.json"  # number of steps and samples, and the configuration
LOG = "log.jsonl"
CHECKPOINTS = "checkpoints"
PREVIEWS = "previews"
CARD = "README.md"  # model card
TRACKERS = "trackers"
