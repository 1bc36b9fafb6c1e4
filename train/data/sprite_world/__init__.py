"""The sprite world: `sprites` and `scenes` (drawings), `appearance` (instances), `views` (images as numbers), `world`
(samples and pairs by index), `renderer` (pixels), `source` (training data).

Only `renderer` needs torch.
"""
