"""image_cost: the size of a request in one number, for limits."""

from realcustom.request import ResolvedRequest

MEGAPIXEL = 2**20


def image_cost(request: ResolvedRequest) -> float:
    """Megapixels x steps x (1 + subjects): the text row, and one visual attention per subject.

    An image of 1024 x 1024 px with one subject in 25 steps costs 50.
    """
    return request.height * request.width / MEGAPIXEL * request.num_inference_steps * (1 + len(request.subjects))
