"""The sprite world: `sprites` (instances), `scenes` (backgrounds), `world` (samples and pairs by index)."""
