"""The sprite world: `sprites` and `scenes` (drawings), `appearance` (instances), `views` (images as numbers), `world`
(samples and pairs by index), `renderer` (pixels); for training, `source` (records), `batches` (steps as numbers) and
`rendered` (their pixels).

Only `renderer` and `rendered` need torch.
"""
