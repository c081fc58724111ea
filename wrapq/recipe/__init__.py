"""What a recipe is and how it is composed. Nothing here imports torch, and no OmegaConf object leaves this folder."""
